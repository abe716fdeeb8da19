"""The ``torch.autograd.Function`` classes, one for each moment the gradient can be computed.

They are written in the ctx style, without ``setup_context``: with it, ``torch.compile`` of
``torch.func.grad`` gives silent zeros. Transforms never reach them; ``functional`` sends those to
stock. A backward that must be differentiable itself is stock's formula, differentiated.
"""

from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import Function
from torch.autograd.graph import increment_version

from . import ops

_REDUCTIONS = ("none", "mean", "sum")


def transform_is_active() -> bool:
    """Whether a ``torch.func`` transform or forward-mode differentiation is under way."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class Options(NamedTuple):
    """What a call asks for besides its tensors, in the order of the operators' arguments."""

    reduction: int
    ignore_index: int
    label_smoothing: float


def _ignored(target: Tensor, ignore_index: int, input: Tensor) -> Tensor:
    """Which rows are ignored, in a shape that spreads over the classes of the logits."""
    ignored = target.long() == ignore_index  # a narrower type would wrap the index around
    return ignored.unsqueeze(1) if input.dim() > 1 else ignored.reshape(1)


def stock_loss(
    input: Tensor, target: Tensor, weight: Tensor | None, options: Options, loss_dtype: torch.dtype
) -> Tensor:
    """Stock's loss for its derivatives of any order.

    In the loss's dtype, which under autocast is wider than the logits', and in float32 for the
    half types. Ignored logits are replaced: zero times a nan among them would not be zero.
    """
    dtype = torch.promote_types(loss_dtype, torch.float32)
    input = input.to(dtype)
    if not target.is_floating_point():
        input = input.masked_fill(_ignored(target, options.ignore_index, input), 0)
    return F.cross_entropy(
        input,
        target.to(dtype) if target.is_floating_point() else target.long(),
        None if weight is None else weight.to(dtype),
        ignore_index=options.ignore_index,
        reduction=_REDUCTIONS[options.reduction],
        label_smoothing=options.label_smoothing,
    )


def stock_gradients(ctx: Any, grad_output: Tensor, input: Tensor, target: Tensor, weight) -> tuple:
    """Differentiates stock's loss, under a graph if the caller wants one.

    The gradient is that for a ``grad_output`` of 1, times ``grad_output``: what may be a batch, or
    carry a tangent, then only meets a product, and the rest runs outside of any transform. Up to
    that product it is in float32 at least, or the product would come after a rounding.
    """
    dtype = torch.promote_types(ctx.loss_dtype, torch.float32)
    create_graph = torch.is_grad_enabled()
    with temporarily_clear_interpreter_stack(), torch.enable_grad():
        wide = [t.to(dtype) if t.is_floating_point() else t for t in (input, target)]
        loss = stock_loss(*wide, weight, ctx.options, dtype)
        needed = [t for t, needs in zip(wide, ctx.needs_input_grad, strict=False) if needs]
        ones = torch.ones_like(loss)
        units = iter(torch.autograd.grad(loss, needed, ones, create_graph=create_graph))
    if loss.dim() > 0:
        grad_output = grad_output.unsqueeze(1 if input.dim() > 1 else 0)
    input_grad, target_grad = (
        (next(units) * grad_output).to(t.dtype) if needs else None
        for t, needs in zip((input, target), ctx.needs_input_grad, strict=False)
    )
    if not target.is_floating_point():
        # An ignored row has no gradient, even if what arrives for it is nan.
        input_grad = input_grad.masked_fill(_ignored(target, ctx.options.ignore_index, input), 0)
    return input_grad, target_grad, None, None, None


def _needs_stock(grad_output: Tensor) -> bool:
    """Whether the gradient itself is to be differentiated, or comes as a batch of gradients.

    An operator would drop a tangent and refuse a batch, and a transform may have begun only after
    the forward.
    """
    if torch.compiler.is_compiling():
        return False
    return (
        torch.is_grad_enabled()
        or transform_is_active()
        or torch._C._functorch.is_legacy_batchedtensor(grad_output)
    )


def _graph_is_kept() -> bool:
    """Whether this backward runs with ``retain_graph``, so that another may follow."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def _fused_gradients(ctx: Any, grad_output: Tensor, saved: tuple) -> tuple:
    input, target, weight, stats = saved
    needs_input, needs_target, *_ = ctx.needs_input_grad
    arguments = (input, target, weight, *ctx.options, stats, grad_output)
    return (
        ops.backward(*arguments) if needs_input else None,
        ops.backward_target(*arguments) if needs_target else None,
        None,
        None,
        None,
    )


class Recompute(Function):
    """Keeps a few numbers a row; the gradient is computed from the logits in the backward."""

    @staticmethod
    def forward(ctx, input, target, weight, options, loss_dtype):
        loss, stats = ops.forward_stats(input, target, weight, *options, loss_dtype)
        ctx.save_for_backward(input, target, weight, stats)
        ctx.options = options
        ctx.loss_dtype = loss_dtype
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        saved = ctx.saved_tensors
        if _needs_stock(grad_output):
            return stock_gradients(ctx, grad_output, *saved[:3])
        return _fused_gradients(ctx, grad_output, saved)


class GradInForward(Function):
    """Computes the gradient for a ``grad_output`` of 1 along with the loss.

    The backward hands it out as it is if that is what arrives, and else computes it anew into the
    same memory. It is never scaled: in float16 a small gradient would be lost before a gradient
    scaler's factor could save it.
    """

    @staticmethod
    def forward(ctx, input, target, weight, options, loss_dtype):
        loss, stats, grad = ops.forward_grad(input, target, weight, *options, loss_dtype)
        ctx.save_for_backward(input, target, weight, stats, grad)
        ctx.options = options
        ctx.loss_dtype = loss_dtype
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        *saved, grad = ctx.saved_tensors
        if _needs_stock(grad_output):
            return stock_gradients(ctx, grad_output, *saved[:3])
        if torch.compiler.is_compiling() or _graph_is_kept():
            return _fused_gradients(ctx, grad_output, saved)
        input, target, weight, stats = saved
        ops.rescale_(grad, input, target, weight, *ctx.options, stats, grad_output)
        return grad, None, None, None, None


class _Overwriting(Function):
    """What the in-place forms share: the logits are gone, so there is one backward."""

    @staticmethod
    def begin_backward(ctx, grad_output):
        if ctx.consumed:
            raise RuntimeError(
                "fused_ce: the first backward through cross_entropy(inplace=True) overwrote the "
                "logits, so there can be no second one; use inplace=False to go back twice."
            )
        if _needs_stock(grad_output):
            raise RuntimeError(
                "fused_ce: cross_entropy(inplace=True) overwrites the logits, so its gradient "
                "cannot be differentiated or batched; use inplace=False for that."
            )
        ctx.consumed = True
        return ctx.saved_tensors


class OverwriteInForward(_Overwriting):
    """Overwrites the logits with the gradient while it computes the loss."""

    @staticmethod
    def forward(ctx, input, target, weight, options, loss_dtype):
        loss = ops.forward_grad_(input, target, weight, *options, loss_dtype)
        increment_version(input)
        ctx.save_for_backward(input)
        ctx.consumed = False
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        (input,) = _Overwriting.begin_backward(ctx, grad_output)
        grad = input.detach()
        ops.scale_(grad, grad_output)
        increment_version(input)
        return grad, None, None, None, None


class OverwriteInBackward(_Overwriting):
    """Overwrites the logits in the backward, with ``grad_output`` folded in before rounding."""

    @staticmethod
    def forward(ctx, input, target, weight, options, loss_dtype):
        ops.check_overwritable(input, target, weight)
        loss, stats = ops.forward_stats(input, target, weight, *options, loss_dtype)
        ctx.save_for_backward(input, target, weight, stats)
        ctx.storage = input.untyped_storage()._cdata
        ctx.options = options
        ctx.consumed = False
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        saved = input, target, weight, stats = _Overwriting.begin_backward(ctx, grad_output)
        if input.untyped_storage()._cdata != ctx.storage:
            # A hook on saved tensors gave a copy back, which others may have been given too.
            return _fused_gradients(ctx, grad_output, saved)
        arguments = (target, weight, *ctx.options, stats, grad_output)
        target_grad = None
        if ctx.needs_input_grad[1]:
            target_grad = ops.backward_target(input, *arguments)
        grad = input.detach()
        ops.backward_(grad, *arguments)
        increment_version(input)
        return grad, target_grad, None, None, None
