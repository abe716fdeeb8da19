"""The ``torch.autograd.Function`` classes, one for each moment the gradient can be computed.

They are written in the ctx style, without ``setup_context``: with it, ``torch.compile`` of
``torch.func.grad`` gives silent zeros. Transforms never reach them; ``functional`` sends those to
stock. A backward that must be differentiable itself is stock's formula, differentiated.

A call is ``(input, target, *arguments)``, as the forward operators take it: the arguments are the
options of the operators, or none of them where all have their defaults.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import Function
from torch.autograd.graph import increment_version

from . import ops

_REDUCTIONS = ("none", "mean", "sum")
# The gradients of the arguments after input and target; there may be more of them than arguments.
_NO_MORE = (None,) * 6


def transform_is_active() -> bool:
    """Whether a ``torch.func`` transform or forward-mode differentiation is under way."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class Options(NamedTuple):
    """The options in the order of the operators' arguments."""

    weight: Tensor | None
    denominator: Tensor | None
    reduction: int
    ignore_index: int
    label_smoothing: float
    loss_dtype: torch.dtype | None


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


def stock_gradients(ctx: Any, grad_output: Tensor, saved: tuple) -> tuple:
    """Differentiates stock's loss, under a graph if the caller wants one.

    The gradient is that for a ``grad_output`` of 1, times ``grad_output``: what may be a batch, or
    carry a tangent, then only meets a product, and the rest runs outside of any transform. Up to
    that product it is in float32 at least, or the product would come after a rounding.
    """
    input, target, _, _, *weight = saved
    weight = weight[0] if weight else None
    options = Options(weight, *(ctx.options or ops.DEFAULTS[1:]))
    dtype = torch.promote_types(grad_output.dtype, torch.float32)
    create_graph = torch.is_grad_enabled()
    with temporarily_clear_interpreter_stack(), torch.enable_grad():
        wide = [t.to(dtype) if t.is_floating_point() else t for t in (input, target)]
        loss = stock_loss(*wide, weight, options, dtype)
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
        input_grad = input_grad.masked_fill(_ignored(target, options.ignore_index, input), 0)
    return input_grad, target_grad, *_NO_MORE


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
    needs_input, needs_target, *_ = ctx.needs_input_grad
    arguments = (*saved[:4], grad_output, *saved[4:], *ctx.options)
    return (
        ops.backward(*arguments) if needs_input else None,
        ops.backward_target(*arguments) if needs_target else None,
        *_NO_MORE,
    )


def _save(ctx: Any, arguments: tuple, *tensors: Tensor) -> None:
    """Keeps for the backward what its operators take: the tensors, the weight and the options."""
    ctx.save_for_backward(*tensors, *arguments[:1])
    ctx.options = arguments[1:]


class Recompute(Function):
    """Keeps a few numbers a row; the gradient is computed from the logits in the backward."""

    @staticmethod
    def forward(ctx, input, target, *arguments):
        loss, *stats = ops.eager.forward_stats(input, target, *arguments)
        _save(ctx, arguments, input, target, *stats)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        saved = ctx.saved_tensors
        if _needs_stock(grad_output):
            return stock_gradients(ctx, grad_output, saved)
        return _fused_gradients(ctx, grad_output, saved)


class GradInForward(Function):
    """Computes the gradient for a ``grad_output`` of 1 along with the loss.

    The backward hands it out as it is if that is what arrives, and else computes it anew into the
    same memory. It is never scaled: in float16 a small gradient would be lost before a gradient
    scaler's factor could save it.
    """

    @staticmethod
    def forward(ctx, input, target, *arguments):
        loss, stats, totals, grad = ops.eager.forward_grad(input, target, *arguments)
        _save(ctx, arguments, grad, input, target, stats, totals)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        grad, *saved = ctx.saved_tensors
        if _needs_stock(grad_output):
            return stock_gradients(ctx, grad_output, saved)
        if torch.compiler.is_compiling() or _graph_is_kept():
            return _fused_gradients(ctx, grad_output, saved)
        ops.eager.rescale_(grad, grad_output, *saved, *ctx.options)
        return grad, None, *_NO_MORE


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
    def forward(ctx, input, target, *arguments):
        loss = ops.eager.forward_grad_(input, target, None, *arguments)
        increment_version(input)
        ctx.save_for_backward(input)
        ctx.consumed = False
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        (input,) = _Overwriting.begin_backward(ctx, grad_output)
        if torch.compiler.is_compiling():
            # A graph holds no operator that returns what it was given. As the operator has it, a
            # zero stays one even times nan.
            return torch.where(input == 0, input, input * grad_output), None, *_NO_MORE
        grad = input.detach()
        ops.scale_(grad, grad_output)
        increment_version(input)
        return grad, None, *_NO_MORE


class OverwriteInBackward(_Overwriting):
    """Overwrites the logits in the backward, with ``grad_output`` folded in before rounding."""

    @staticmethod
    def forward(ctx, input, target, *arguments):
        ops.check_overwritable(input, target, *arguments[:1])
        loss, *stats = ops.eager.forward_stats(input, target, *arguments)
        _save(ctx, arguments, input, target, *stats)
        ctx.storage = input.untyped_storage()._cdata
        ctx.consumed = False
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        saved = input, *rest = _Overwriting.begin_backward(ctx, grad_output)
        if torch.compiler.is_compiling() or input.untyped_storage()._cdata != ctx.storage:
            # A graph holds no operator that returns what it was given. And a hook on saved tensors
            # may have given a copy back, which others may have been given too.
            return _fused_gradients(ctx, grad_output, saved)
        arguments = (*rest[:3], grad_output, *rest[3:], *ctx.options)
        target_grad = None
        if ctx.needs_input_grad[1]:
            target_grad = ops.backward_target(input, *arguments)
        grad = input.detach()
        ops.backward_(grad, *arguments)
        increment_version(input)
        return grad, target_grad, *_NO_MORE


def _entrance(function: type[Function]) -> Callable[..., Tensor]:
    """``function.apply`` for calls outside of any transform.

    That method asks every argument whether a transform is active or has left it behind, which
    takes longer than all that follows; here the question is put once for each of two tensors.
    """
    apply = super(Function, function).apply

    def enter(input, target, *arguments):
        return apply(unwrap_if_dead(input), unwrap_if_dead(target), *arguments)

    return enter


recompute = _entrance(Recompute)
grad_in_forward = _entrance(GradInForward)
overwrite_in_forward = _entrance(OverwriteInForward)
overwrite_in_backward = _entrance(OverwriteInBackward)
