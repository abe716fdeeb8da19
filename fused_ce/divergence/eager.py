"""The divergence as ``torch.autograd.Function`` classes, for eager calls; see ``fused_ce.eager``.

A call is ``(input, target_logits, sample_weight, denominator, settings)``; the teacher has no
gradient here.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import ops, stock
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
from .reference import gradient

_FUNCTION = "kl_div_with_logits"
_NOTHING_ELSE = (None,) * 4


def _save(ctx: Any, call: tuple, stats: tuple, *others: Tensor) -> None:
    """Keeps for the backward what its operators take, and the reference."""
    input, target_logits, sample_weight, denominator, ctx.settings = call
    ctx.save_for_backward(*others, input, target_logits, *stats, sample_weight, denominator)
    ctx.version = version_of(input)


def _fused_gradient(ctx: Any, grad_output: Tensor, saved: tuple) -> Tensor:
    check_version(ctx, saved[0], _FUNCTION)
    *tensors, sample_weight, _ = saved
    return ops.kl_div_with_logits_backward(*tensors, grad_output, sample_weight, *ctx.settings)


def _reference_gradient(ctx: Any, grad_output: Tensor, saved: tuple) -> Tensor:
    input, target_logits, _, _, *weights = saved
    check_version(ctx, input, _FUNCTION)
    return gradient(input, target_logits, *weights, ctx.settings, grad_output)


def _recomputed_gradient(ctx: Any, grad_output: Tensor, saved: tuple) -> Tensor:
    find = _reference_gradient if backward_needs_stock(grad_output) else _fused_gradient
    return find(ctx, grad_output, saved)


class Recompute(Function):
    """Keeps a few numbers a row; the gradient is computed from the logits in the backward."""

    @staticmethod
    def forward(ctx, *call):
        *tensors, settings = call
        loss, *stats = ops.kl_div_with_logits_stats(*tensors, *settings)
        _save(ctx, call, stats)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        return _recomputed_gradient(ctx, grad_output, ctx.saved_tensors), *_NOTHING_ELSE


class GradInForward(Function):
    """Computes the gradient for a ``grad_output`` of 1 along with the loss.

    The backward hands it out as it is if that is what arrives, and else computes it anew into the
    same memory.
    """

    @staticmethod
    def forward(ctx, *call):
        *tensors, settings = call
        loss, *stats, grad = ops.kl_div_with_logits_grad(*tensors, *settings)
        _save(ctx, call, stats, grad)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        grad, *saved = ctx.saved_tensors
        if backward_needs_stock(grad_output):
            return _reference_gradient(ctx, grad_output, saved), *_NOTHING_ELSE
        if torch.compiler.is_compiling():
            return _fused_gradient(ctx, grad_output, saved), *_NOTHING_ELSE
        check_version(ctx, saved[0], _FUNCTION)
        if graph_is_kept():
            grad = grad.clone()
        *tensors, sample_weight, _ = saved
        ops.kl_div_with_logits_rescale_(grad, *tensors, grad_output, sample_weight, *ctx.settings)
        return grad, *_NOTHING_ELSE


class OverwriteInForward(Overwriting):
    """Overwrites the student's logits with the gradient while it computes the loss."""

    @staticmethod
    def forward(ctx, *call):
        *tensors, settings = call
        loss = ops.kl_div_with_logits_grad_(*tensors, *settings)
        keep_overwritten(ctx, tensors[0], tensors[2])
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        grad, sample_weight = Overwriting.begin_backward(ctx, grad_output, _FUNCTION)

        def left_out() -> Tensor | None:
            return stock.left_out(grad, None, sample_weight)

        return scale_overwritten(ctx, grad, grad_output, left_out), *_NOTHING_ELSE


class OverwriteInBackward(Overwriting):
    """Overwrites the logits in the backward, with ``grad_output`` folded in before rounding."""

    @staticmethod
    def forward(ctx, *call):
        *tensors, settings = call
        input, target_logits, sample_weight, _ = tensors
        ops.check_overwritable(input, target_logits, sample_weight=sample_weight)
        loss, *stats = ops.kl_div_with_logits_stats(*tensors, *settings)
        _save(ctx, call, stats)
        keep_to_overwrite(ctx, input)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        saved = input, *_ = Overwriting.begin_backward(ctx, grad_output, _FUNCTION)
        if not may_overwrite(ctx, input):
            return _fused_gradient(ctx, grad_output, saved), *_NOTHING_ELSE
        check_version(ctx, input, _FUNCTION)
        grad = _overwritten(ctx, grad_output, saved)
        tell_overwritten(ctx, input)
        return grad, *_NOTHING_ELSE


class TakeInBackward(Recompute):
    """Overwrites the logits in the backward if nobody else can see them, and else leaves them."""

    @staticmethod
    def backward(ctx, grad_output):
        grad = take_or_leave(ctx, grad_output, _overwritten, _recomputed_gradient)
        return grad, *_NOTHING_ELSE


def _overwritten(ctx: Any, grad_output: Tensor, saved: tuple) -> Tensor:
    """The gradient, where the student's logits were."""
    input, *tensors, sample_weight, _ = saved
    grad = input.detach()
    ops.kl_div_with_logits_backward_(grad, *tensors, grad_output, sample_weight, *ctx.settings)
    return grad


def no_gradient(*call: Any) -> Tensor:
    *tensors, settings = call
    return ops.kl_div_with_logits(*tensors, *settings)


recompute = entrance(Recompute)
grad_in_forward = entrance(GradInForward)
overwrite_in_forward = entrance(OverwriteInForward)
overwrite_in_backward = entrance(OverwriteInBackward)
take_in_backward = entrance(TakeInBackward)
