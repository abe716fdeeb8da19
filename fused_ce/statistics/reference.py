"""The row statistics in plain torch: for whatever the kernels do not take, and for derivatives.

Nothing of it is particular to one device or to eager calls, so transforms, forward mode, tracing
and subclasses go through it as through any code of torch's.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from ..fakes import class_dim


class SoftmaxStats(NamedTuple):
    """What :func:`fused_ce.softmax_stats` returns; ``None`` where something was not asked for."""

    log_prob: Tensor | None
    entropy: Tensor | None
    logsumexp: Tensor
    argmax: Tensor | None


class Settings(NamedTuple):
    """The numbers of a call, in the order in which the operators take them."""

    temperature: float | Tensor = 1.0
    softcap: float = 0.0  # for none
    ignore_index: int = -100


def reference(
    input: Tensor,
    target: Tensor | None,
    dim: int,
    settings: Settings,
    *,
    entropy: bool = True,
    argmax: bool = False,
) -> SoftmaxStats:
    """The statistics over a dimension, counted from the first, in float32 at least."""
    temperature, softcap, ignore_index = settings
    logits = input.to(torch.promote_types(input.dtype, torch.float32))
    ignored = None
    if target is not None:
        target = target.long()  # a narrower type would wrap the index around
        ignored = target == ignore_index
        # What is ignored is replaced: zero times a nan among it would not be zero.
        logits = logits.masked_fill(ignored.unsqueeze(dim), 0)
    logits = logits / temperature
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = logits.log_softmax(dim)

    def kept(rows: Tensor, instead: int = 0) -> Tensor:
        return rows if ignored is None else rows.masked_fill(ignored, instead)

    return SoftmaxStats(
        None if target is None else kept(_of_target(log_p, kept(target), dim)),
        kept(_entropy(log_p, dim)) if entropy else None,
        kept(logits.logsumexp(dim)),
        kept(logits.argmax(dim), -1) if argmax else None,
    )


def _of_target(log_p: Tensor, target: Tensor, dim: int) -> Tensor:
    return log_p.gather(dim, target.unsqueeze(dim)).squeeze(dim)


def _entropy(log_p: Tensor, dim: int) -> Tensor:
    """A class of no probability has nothing to add: 0 log 0 is 0."""
    p = log_p.exp()
    return -(p * log_p.masked_fill(p == 0, 0)).sum(dim)


def gradient(
    input: Tensor,  # the classes in dimension 1, or in 0 if there is no other
    target: Tensor | None,
    settings: Settings,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Tensor:
    """The gradient of the logits, under a graph if the caller wants one.

    It is the sum of the gradients for ones, times what arrives: what may be a batch, or carry a
    tangent, then only meets a product, and the rest runs outside of any transform.
    """
    dim = class_dim(input)
    dtype = torch.promote_types(input.dtype, torch.float32)
    create_graph = torch.is_grad_enabled()
    total = None
    with temporarily_clear_interpreter_stack(), torch.enable_grad():
        wide = input.to(dtype)
        found = reference(wide, target, dim, settings, entropy=grads[1] is not None)
        units = [
            None
            if grad is None
            else torch.autograd.grad(
                value, wide, torch.ones_like(value), create_graph=create_graph, retain_graph=True
            )[0]
            for value, grad in zip(found[:3], grads, strict=True)
        ]
    for unit, grad in zip(units, grads, strict=True):
        if grad is not None:
            part = unit * grad.unsqueeze(dim)
            total = part if total is None else total + part
    if target is not None:
        # An ignored row has no gradient, even if what arrives for it is nan.
        ignored = target.long() == settings.ignore_index
        total = total.masked_fill(ignored.unsqueeze(dim), 0)
    return total.to(input.dtype)
