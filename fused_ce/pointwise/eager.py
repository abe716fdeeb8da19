"""The pointwise losses as ``torch.autograd.Function`` classes, one for each moment the gradient can
be computed; see ``fused_ce.eager``.

A call is ``(input, target, weight, pos_weight, *settings)``, as the forward operators take it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import ops
from ..eager import (
    Overwriting,
    check_version,
    entrance,
    graph_is_kept,
    keep_overwritten,
    keep_to_overwrite,
    may_overwrite,
    scale_overwritten,
    take_or_leave,
    tell_overwritten,
    version_of,
)
from ..eligibility import backward_needs_stock
from . import reference
from .reference import Settings

_NAMES = (
    "binary_cross_entropy_with_logits",
    "sigmoid_focal_loss",
    "kl_div",
    "kl_div",
)
_NOTHING_ELSE = (None,) * (3 + len(Settings._fields))  # has a gradient


def _save(ctx: Any, call: tuple, *before: Tensor) -> None:
    """Keeps for the backward what its operator takes."""
    ctx.settings = Settings(*call[4:])
    ctx.name = _NAMES[ctx.settings.loss]
    ctx.save_for_backward(*before, *call[:4])
    ctx.version = version_of(call[0])


def _gradient(ctx: Any, grad_output: Tensor, tensors: tuple) -> Tensor:
    check_version(ctx, tensors[0], ctx.name)
    if backward_needs_stock(grad_output):
        return reference.gradient(*tensors, ctx.settings, grad_output)
    return ops.pointwise_backward(*tensors, grad_output, *ctx.settings.numbers)


class Recompute(Function):
    """Keeps nothing; the gradient is computed from the input in the backward."""

    @staticmethod
    def forward(ctx, *call):
        loss = ops.eager.pointwise(*call)
        _save(ctx, call)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        return _gradient(ctx, grad_output, ctx.saved_tensors), *_NOTHING_ELSE


class GradInForward(Function):
    """Computes the gradient for a ``grad_output`` of 1 along with the loss.

    The backward hands it out as it is if that is what arrives, and else computes it anew into the
    same memory.
    """

    @staticmethod
    def forward(ctx, *call):
        loss, grad = ops.eager.pointwise_grad(*call)
        _save(ctx, call, grad)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        grad, *tensors = ctx.saved_tensors
        if backward_needs_stock(grad_output) or torch.compiler.is_compiling():
            return _gradient(ctx, grad_output, tensors), *_NOTHING_ELSE
        check_version(ctx, tensors[0], ctx.name)
        if graph_is_kept():
            grad = grad.clone()
        ops.eager.pointwise_rescale_(grad, grad_output, *tensors, *ctx.settings.numbers)
        return grad, *_NOTHING_ELSE


class OverwriteInForward(Overwriting):
    """Overwrites the input with the gradient while it computes the loss."""

    @staticmethod
    def forward(ctx, *call):
        loss = ops.eager.pointwise_grad_(*call)
        ctx.name = _NAMES[call[4]]
        keep_overwritten(ctx, call[0])
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        (grad,) = Overwriting.begin_backward(ctx, grad_output, ctx.name)
        return scale_overwritten(ctx, grad, grad_output), *_NOTHING_ELSE


class OverwriteInBackward(Overwriting):
    """Overwrites the input in the backward, with ``grad_output`` folded in before rounding."""

    @staticmethod
    def forward(ctx, *call):
        ops.check_pointwise_overwritable(*call[:4])
        loss = ops.eager.pointwise(*call)
        _save(ctx, call)
        keep_to_overwrite(ctx, call[0])
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        tensors = input, *_ = Overwriting.begin_backward(ctx, grad_output, ctx.name)
        if not may_overwrite(ctx, input):
            return _gradient(ctx, grad_output, tensors), *_NOTHING_ELSE
        check_version(ctx, input, ctx.name)
        grad = _overwritten(ctx, grad_output, tensors)
        tell_overwritten(ctx, input)
        return grad, *_NOTHING_ELSE


class TakeInBackward(Recompute):
    """Overwrites the input in the backward if nobody else can see it, and else leaves it."""

    @staticmethod
    def backward(ctx, grad_output):
        return take_or_leave(ctx, grad_output, _overwritten, _gradient), *_NOTHING_ELSE


def _overwritten(ctx: Any, grad_output: Tensor, tensors: tuple) -> Tensor:
    """The gradient, where the first of the tensors was."""
    input, *others = tensors
    grad = input.detach()
    ops.pointwise_backward_(grad, *others, grad_output, *ctx.settings.numbers)
    return grad


recompute = entrance(Recompute)
grad_in_forward = entrance(GradInForward)
overwrite_in_forward = entrance(OverwriteInForward)
overwrite_in_backward = entrance(OverwriteInBackward)
take_in_backward = entrance(TakeInBackward)
