"""The ``torch.autograd.Function`` classes of sharded classes; see ``fused_ce.eager``.

The gradient is always computed in the backward: in the forward its row would be read again anyway,
once the statistics have travelled. The collective is in the forward alone.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import ops
from ..eager import (
    Overwriting,
    check_version,
    keep_to_overwrite,
    may_overwrite,
    take_or_leave,
    tell_overwritten,
    version_of,
)
from ..eligibility import backward_needs_stock, transform_is_active
from ..options import NO_GRADIENTS, Options, split
from . import reference
from .collectives import Group, gathered
from .partition import Place


def loss(
    input: Tensor, target: Tensor, place: Place, group: Group, *options
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and what its backward needs: the statistics of the rows, and the totals."""
    packet = ops.shard_forward(input, target, *place, *options)
    packets = gathered(packet, group)
    return ops.shard_merge(packets, input, target, place.num_classes, *options)


def loss_alone(*call) -> Tensor:
    found, *_ = loss(*call)
    return found


def _save(ctx: Any, input: Tensor, target: Tensor, place: Place, group: Group, options: tuple):
    found, *stats = loss(input, target, place, group, *options)
    option_tensors, ctx.options = split(options)
    ctx.save_for_backward(input, target, *stats, *option_tensors)
    ctx.place, ctx.group = place, group
    ctx.version = None if torch.compiler.is_compiling() else version_of(input)
    return found


def _gradients(ctx: Any, grad_output: Tensor, saved: tuple) -> tuple:
    input, target, *stats = saved[:4]
    check_version(ctx, input)
    options = (*saved[4:], *ctx.options)
    needs = ctx.needs_input_grad[:2]
    if backward_needs_stock(grad_output):
        return _by_reference(ctx, input, target, Options(*options), grad_output, needs)
    call = (input, target, *stats, grad_output, *ctx.place, *options)
    return (
        ops.shard_backward(*call) if needs[0] else None,
        ops.shard_backward_target(*call) if needs[1] else None,
        *_NO_MORE,
    )


def _by_reference(ctx, input, target, options: Options, grad_output: Tensor, needs: tuple) -> tuple:
    if transform_is_active() or torch._C._functorch.is_legacy_batchedtensor(grad_output):
        raise NotImplementedError(NO_TRANSFORMS)
    found = reference.gradients(input, target, options, ctx.place, ctx.group, grad_output, needs)
    return *found, *_NO_MORE


REFUSED = -1  # the class_offset of who has found something wrong (csrc/shard_problem.h)
NO_TRANSFORMS = (
    "fused_ce: a loss over a process_group cannot be transformed by torch.func, batched or "
    "differentiated in forward mode, since its collectives cannot; use autograd's backward."
)
_NO_MORE = None, None, *NO_GRADIENTS  # the place, the group and the options


class Recompute(Function):
    """Keeps a few numbers a row; the gradient is computed from the logits in the backward."""

    @staticmethod
    def forward(ctx, input, target, place, group, *options):
        return _save(ctx, input, target, place, group, options)

    @staticmethod
    def backward(ctx, grad_output):
        return _gradients(ctx, grad_output, ctx.saved_tensors)


class OverwriteInBackward(Overwriting):
    """Overwrites the logits in the backward."""

    @staticmethod
    def forward(ctx, input, target, place, group, *options):
        found = _save(ctx, input, target, place, group, options)
        keep_to_overwrite(ctx, input)
        return found

    @staticmethod
    def backward(ctx, grad_output):
        saved = input, *_ = Overwriting.begin_backward(ctx, grad_output)
        if not may_overwrite(ctx, input):
            return _gradients(ctx, grad_output, saved)
        check_version(ctx, input)
        found = _overwritten_gradients(ctx, grad_output, saved)
        tell_overwritten(ctx, input)
        return found


class TakeInBackward(Recompute):
    """Overwrites the logits in the backward if nobody else in this process can see them, whatever
    the other ranks do: the gradient has the same bits, and nothing is exchanged any more."""

    @staticmethod
    def backward(ctx, grad_output):
        return take_or_leave(ctx, grad_output, _overwritten_gradients, _gradients)


def _overwritten_gradients(ctx: Any, grad_output: Tensor, saved: tuple) -> tuple:
    """The target's first: it is computed from the logits."""
    input, target, *stats = saved[:4]
    call = (target, *stats, grad_output, *ctx.place, *saved[4:], *ctx.options)
    _, needs_target = ctx.needs_input_grad[:2]
    target_grad = ops.shard_backward_target(input, *call) if needs_target else None
    grad = input.detach()
    ops.shard_backward_(grad, *call)
    return grad, target_grad, *_NO_MORE


recompute = Recompute.apply
overwrite_in_backward = OverwriteInBackward.apply
take_in_backward = TakeInBackward.apply
