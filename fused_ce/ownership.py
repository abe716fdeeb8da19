"""Whether a backward is the last user of a tensor that was saved for it.

Then its memory may be taken. The proof is by counts: of the references that C++ and Python have to
the tensor and to its memory. Which counts say that nobody else is there depends on torch and on
Python, so they are found by trying: what a graph known to be alone shows, and no graph with a
holder does. Where the two look alike nothing is ever taken.
"""

import functools
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils._python_dispatch import _disable_current_modes

Counts = tuple[int, ...]
_lock = threading.Lock()


def is_last_user(saved: tuple) -> bool:
    """Of the first of the saved tensors, as the backward has just unpacked them into a variable.

    A leaf belongs to whoever made it, and memory that processes share to all of them. A weak
    reference can become a strong one at any time.
    """
    tensor = saved[0]
    base = tensor._base
    for each in (tensor,) if base is None else (tensor, base):
        if each.is_leaf or weakref.getweakrefcount(each) > 0:
            return False
    storage = tensor.untyped_storage()
    if storage.is_shared() or weakref.getweakrefcount(storage) > 0:
        return False
    alone = _counts_alone()[base is not None]
    del tensor, base, each, storage
    return alone is not None and _counts(saved) == alone


def _counts(saved: tuple) -> Counts:
    tensor = saved[0]
    base, storage = tensor._base, tensor.untyped_storage()
    found = (
        tensor._use_count(),
        sys.getrefcount(tensor),
        torch._C._storage_Use_Count(storage._cdata),
        sys.getrefcount(storage),  # of which there is one object, whoever asks for it
    )
    return found if base is None else (*found, base._use_count(), sys.getrefcount(base))


class _Probe(Function):
    """Has what the real backward has, and hands its counts to a list."""

    @staticmethod
    def forward(ctx, tensor, found):
        ctx.found = found
        ctx.save_for_backward(tensor)
        return tensor.new_zeros(())

    @staticmethod
    def backward(ctx, grad_output):
        saved = ctx.saved_tensors
        ctx.found.append(_counts(saved))
        return grad_output.expand(saved[0].shape), None


def _counts_alone() -> tuple[Counts | None, Counts | None]:
    """Of a tensor with memory of its own, and of a view; None where they prove nothing."""
    with _lock:
        return _found()


@functools.cache
def _found() -> tuple[Counts | None, Counts | None]:
    with _disable_current_modes(), torch.enable_grad():
        return _calibrated(lambda tensor: tensor), _calibrated(lambda tensor: tensor.view(-1))


def _calibrated(saved_of: Callable[[Tensor], Tensor]) -> Counts | None:
    """What is saved is made of a fresh tensor."""
    alone = {_probed(saved_of, lambda *_: None) for _ in range(2)}
    if len(alone) > 1:
        return None
    (counts,) = alone
    return None if any(_probed(saved_of, hold) == counts for hold in _HOLDERS) else counts


# Who may hold the fresh tensor, or what was saved of it.
_HOLDERS: tuple[Callable[[Tensor, Tensor], Any], ...] = (
    lambda fresh, saved: saved,
    lambda fresh, saved: fresh,
    lambda fresh, saved: fresh.detach(),
    lambda fresh, saved: saved.detach(),
    lambda fresh, saved: fresh.untyped_storage(),
    lambda fresh, saved: saved.untyped_storage(),
    lambda fresh, saved: fresh[:1],
    lambda fresh, saved: saved[:1],
    lambda fresh, saved: (saved * saved).grad_fn,
    lambda fresh, saved: (fresh * fresh).grad_fn,
)


def _probed(saved_of: Callable[[Tensor], Tensor], hold: Callable[[Tensor, Tensor], Any]) -> Counts:
    found: list[Counts] = []
    fresh = torch.ones(2, 2, requires_grad=True) * 2
    saved = saved_of(fresh)
    holder = hold(fresh, saved)
    loss = _Probe.apply(saved, found)
    del fresh, saved
    loss.backward()
    del holder
    return found[0]
