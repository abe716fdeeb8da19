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
Pair = tuple[Tensor, Tensor]
_lock = threading.Lock()


def is_last_user(saved: tuple) -> bool:
    """Of the first of the saved tensors, as the backward has just unpacked them into a variable.

    A leaf belongs to whoever made it, and memory that torch has not allocated, or that processes
    share, to those who have. A weak reference can become a strong one at any time.
    """
    tensor = saved[0]
    base = tensor._base
    if tensor.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        return False
    storage = tensor.untyped_storage()
    if not storage.resizable() or (tensor.is_cpu and storage.is_shared()):  # CUDA's always says so
        return False
    if any(weakref.getweakrefcount(each) > 0 for each in (tensor, base, storage)):
        return False
    kind = 0 if base is None else 2 if base.is_leaf else 1
    del tensor, base, storage
    alone = _counts_alone()[kind]
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


class _Unwrap(Function):
    """Gives out a view of what autograd knows nothing of, as ``DTensor.to_local`` does."""

    @staticmethod
    def forward(ctx, tensor, wrapped):
        return wrapped[0].view_as(wrapped[0])

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, None


def _counts_alone() -> tuple[Counts | None, ...]:
    """Of each of the kinds below; None where they prove nothing."""
    with _lock:
        return _found()


@functools.cache
def _found() -> tuple[Counts | None, ...]:
    with _disable_current_modes(), torch.enable_grad():
        return tuple(map(_calibrated, _KINDS))


def _of_its_own() -> Pair:
    tensor = _leaf() * 2
    return tensor, tensor


def _view() -> Pair:
    base = _leaf() * 2
    return base, base.view(-1)


def _view_without_a_gradient() -> Pair:
    base = torch.ones(2, 2)
    return base, _Unwrap.apply(_leaf(), [base])


def _leaf() -> Tensor:
    return torch.ones(2, 2, requires_grad=True)


# What may be saved, and whose memory it has.
_KINDS: tuple[Callable[[], Pair], ...] = (_of_its_own, _view, _view_without_a_gradient)

# Who may hold either.
_HOLDERS: tuple[Callable[[Tensor, Tensor], Any], ...] = (
    lambda base, saved: saved,
    lambda base, saved: base,
    lambda base, saved: base.detach(),
    lambda base, saved: saved.detach(),
    lambda base, saved: base.untyped_storage(),
    lambda base, saved: saved.untyped_storage(),
    lambda base, saved: base[:1],
    lambda base, saved: saved[:1],
    lambda base, saved: (saved * saved).grad_fn,
    lambda base, saved: (base * _leaf()).grad_fn,
)


def _calibrated(kind: Callable[[], Pair]) -> Counts | None:
    alone = {_probed(kind, lambda *_: None) for _ in range(2)}
    if len(alone) > 1:
        return None
    (counts,) = alone
    return None if any(_probed(kind, hold) == counts for hold in _HOLDERS) else counts


def _probed(kind: Callable[[], Pair], hold: Callable[[Tensor, Tensor], Any]) -> Counts:
    found: list[Counts] = []
    base, saved = kind()
    holder = hold(base, saved)
    loss = _Probe.apply(saved, found)
    del base, saved
    loss.backward()
    del holder
    return found[0]
