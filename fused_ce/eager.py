"""The ``torch.autograd.Function`` classes, one for each moment the gradient can be computed.

They are written in the ctx style, without ``setup_context``: with it, ``torch.compile`` of
``torch.func.grad`` gives silent zeros. Transforms never reach them; ``functional`` sends those to
stock. A backward that must be differentiable itself is stock's formula, differentiated.

A call is ``(input, target, *options)``, as the forward operators take it, with no options at all
where each is its default.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd import Function
from torch.autograd.graph import increment_version

from . import ops, overwritten, stock
from .eligibility import backward_needs_stock
from .options import NO_GRADIENTS, Options, gradients_of, needs_of, split
from .ownership import is_last_user


def graph_is_kept() -> bool:
    """Whether this backward runs with ``retain_graph``, so that another may follow."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def hooks_are_active() -> bool:
    """Whether what is saved for a backward goes through a hook, as a checkpoint's does."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _save(ctx: Any, options: tuple, *tensors: Tensor, logits: Tensor) -> None:
    """Keeps for the backward what its operators take."""
    option_tensors, ctx.options = split(options)
    ctx.save_for_backward(*tensors, *option_tensors)
    ctx.version = version_of(logits)


def version_of(logits: Tensor) -> tuple[int, int] | None:
    """Where autograd will not compare versions, which it does of what no hook has had: what
    :func:`check_version` compares in the backward."""
    return (logits.data_ptr(), logits._version) if hooks_are_active() else None


def check_version(ctx: Any, logits: Tensor, function: str = "cross_entropy") -> None:
    if ctx.version is None or logits.data_ptr() != ctx.version[0]:
        return
    if logits._version != ctx.version[1]:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: the logits of fused_ce.{function} are at version {logits._version}; "
            f"expected version {ctx.version[1]} instead."
        )


def _saved_call(ctx: Any, saved: tuple) -> tuple[tuple, tuple]:
    """Input, target and what was found of their rows; and the options."""
    return saved[:4], (*saved[4:], *ctx.options)


def _fused_gradients(ctx: Any, grad_output: Tensor, saved: tuple) -> tuple:
    tensors, options = _saved_call(ctx, saved)
    check_version(ctx, tensors[0])
    needs_input, needs_target, needs_scale = needs_of(ctx)
    call = (*tensors, grad_output, *options)
    return (
        ops.backward(*call) if needs_input else None,
        ops.backward_target(*call) if needs_target else None,
        *gradients_of(ops.backward_logit_scale(*call) if needs_scale else None),
    )


def _stock_gradients(ctx: Any, grad_output: Tensor, saved: tuple) -> tuple:
    (input, target, *_), options = _saved_call(ctx, saved)
    check_version(ctx, input)
    by_input, by_target, by_scale = stock.gradients(
        input, target, Options(*options), grad_output, needs_of(ctx)
    )
    return by_input, by_target, *gradients_of(by_scale)


def _recomputed_gradients(ctx: Any, grad_output: Tensor, saved: tuple) -> tuple:
    found = _stock_gradients if backward_needs_stock(grad_output) else _fused_gradients
    return found(ctx, grad_output, saved)


class Recompute(Function):
    """Keeps a few numbers a row; the gradient is computed from the logits in the backward."""

    @staticmethod
    def forward(ctx, input, target, *options):
        loss, *stats = ops.eager.forward_stats(input, target, *options)
        _save(ctx, options, input, target, *stats, logits=input)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        return _recomputed_gradients(ctx, grad_output, ctx.saved_tensors)


class GradInForward(Function):
    """Computes the gradient for a ``grad_output`` of 1 along with the loss.

    The backward hands it out as it is if that is what arrives, and else computes it anew into the
    same memory. It is never scaled: in float16 a small gradient would be lost before a gradient
    scaler's factor could save it.
    """

    @staticmethod
    def forward(ctx, input, target, *options):
        loss, stats, totals, grad = ops.eager.forward_grad(input, target, *options)
        _save(ctx, options, grad, input, target, stats, totals, logits=input)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        grad, *saved = ctx.saved_tensors
        if backward_needs_stock(grad_output):
            return _stock_gradients(ctx, grad_output, saved)
        if torch.compiler.is_compiling():
            return _fused_gradients(ctx, grad_output, saved)
        check_version(ctx, saved[0])
        if graph_is_kept():
            grad = grad.clone()
        ops.eager.rescale_(grad, grad_output, *saved, *ctx.options)  # the tensors come first
        if not needs_of(ctx)[2]:
            return grad, None, *NO_GRADIENTS
        tensors, options = _saved_call(ctx, saved)
        return grad, None, *gradients_of(ops.backward_logit_scale(*tensors, grad_output, *options))


class Overwriting(Function):
    """What the in-place forms share: the logits are gone, so there is one backward."""

    @staticmethod
    def begin_backward(ctx, grad_output, function="cross_entropy"):
        if ctx.consumed:
            raise RuntimeError(
                f"fused_ce: the first backward through {function}(inplace=True) overwrote the "
                "logits, so there can be no second one; use inplace=False to go back twice."
            )
        if backward_needs_stock(grad_output):
            raise RuntimeError(
                f"fused_ce: {function}(inplace=True) overwrites the logits, so its gradient "
                "cannot be differentiated or batched; use inplace=False for that."
            )
        ctx.consumed = True
        return ctx.saved_tensors


class OverwriteInForward(Overwriting):
    """Overwrites the logits with the gradient while it computes the loss."""

    @staticmethod
    def forward(ctx, input, target, *options):
        loss = ops.eager.forward_grad_(input, target, None, *options)
        given = Options(*options)
        ctx.ignore_index = given.ignore_index
        indices = None if target.is_floating_point() else target
        keep_overwritten(ctx, input, indices, given.sample_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        grad, *rows = Overwriting.begin_backward(ctx, grad_output)

        def left_out() -> Tensor | None:
            return stock.left_out(grad, *rows, ctx.ignore_index)

        return scale_overwritten(ctx, grad, grad_output, left_out), None, *NO_GRADIENTS


def keep_overwritten(ctx: Any, input: Tensor, *rows: Tensor | None) -> None:
    """Keeps logits that the forward has overwritten with their gradient, and what tells which rows
    count."""
    ctx.logits = overwritten.logits_of(input)
    if ctx.logits is None:
        increment_version(input)
    else:
        ctx.logits.overwritten(input)
    ctx.save_for_backward(input.detach(), *rows)  # without the node, which would hold this one
    ctx.consumed = False


def scale_overwritten(
    ctx: Any,
    grad: Tensor,
    grad_output: Tensor,
    left_out: Callable[[], Tensor | None] = lambda: None,
) -> Tensor:
    """The gradient that lies where the logits were, for what arrives in the backward. Of rows that
    are left out it is zero whatever that is."""
    if torch.compiler.is_compiling():
        # A graph holds no operator that returns what it was given. As the operator has it, a zero
        # stays one even times nan.
        return torch.where(grad == 0, grad, grad * grad_output)
    if type(grad) is Tensor and grad.is_cpu and not math.isfinite(grad_output):
        # The operator keeps every zero, and does not wait for a device to look at this.
        rows = left_out()
        grad.data.mul_(grad_output if rows is None else torch.where(rows, 0, grad_output))
    else:
        ops.scale_(grad, grad_output)
    if ctx.logits is None:
        increment_version(grad)
    else:
        ctx.logits.hand_on_hooks(ctx)
        ctx.logits.scaled(grad)
    return grad


class OverwriteInBackward(Overwriting):
    """Overwrites the logits in the backward, with ``grad_output`` folded in before rounding."""

    @staticmethod
    def forward(ctx, input, target, *options):
        ops.check_overwritable(input, target, *options)
        loss, *stats = ops.eager.forward_stats(input, target, *options)
        _save(ctx, options, input, target, *stats, logits=input)
        keep_to_overwrite(ctx, input)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        saved = input, *_ = Overwriting.begin_backward(ctx, grad_output)
        if not may_overwrite(ctx, input):
            return _fused_gradients(ctx, grad_output, saved)
        (_, *tensors), options = _saved_call(ctx, saved)
        check_version(ctx, input)
        found = _overwritten_gradients(ctx, input, (*tensors, grad_output, *options))
        tell_overwritten(ctx, input)
        return found


class TakeInBackward(Recompute):
    """Overwrites the logits in the backward if nobody else can see them, and else leaves them."""

    @staticmethod
    def backward(ctx, grad_output):
        return take_or_leave(ctx, grad_output, _taken_gradients, _recomputed_gradients)


def _taken_gradients(ctx: Any, grad_output: Tensor, saved: tuple) -> tuple:
    (input, *tensors), options = _saved_call(ctx, saved)
    return _overwritten_gradients(ctx, input, (*tensors, grad_output, *options))


def _overwritten_gradients(ctx: Any, input: Tensor, call: tuple) -> tuple:
    """The other gradients first: they are computed from the logits."""
    _, needs_target, needs_scale = needs_of(ctx)
    target_grad = ops.backward_target(input, *call) if needs_target else None
    scale_grad = ops.backward_logit_scale(input, *call) if needs_scale else None
    grad = input.detach()
    ops.backward_(grad, *call)
    return grad, target_grad, *gradients_of(scale_grad)


def take_or_leave(ctx: Any, grad_output: Tensor, take: Callable, leave: Callable) -> Any:
    """What ``take`` finds, which writes over the first of the saved tensors, if nobody else can see
    that, and else what ``leave`` does. Both are given the context, ``grad_output`` and what was
    saved, which no variable but one may hold: references are counted."""
    saved = ctx.saved_tensors
    # Another backward may need it, or a hook may have a copy of it.
    is_needed = backward_needs_stock(grad_output) or graph_is_kept() or ctx.version is not None
    if is_needed or not is_last_user(saved):
        return leave(ctx, grad_output, saved)
    found = take(ctx, grad_output, saved)
    increment_version(saved[0])
    return found


def keep_to_overwrite(ctx: Any, input: Tensor) -> None:
    """For logits that the backward is to overwrite."""
    ctx.logits = overwritten.logits_of(input)
    ctx.storage = input.untyped_storage()._cdata
    ctx.consumed = False


def may_overwrite(ctx: Any, input: Tensor) -> bool:
    """A graph holds no operator that returns what it was given. And a hook on saved tensors may
    have given a copy back, which others may have been given too."""
    return not torch.compiler.is_compiling() and input.untyped_storage()._cdata == ctx.storage


def tell_overwritten(ctx: Any, input: Tensor) -> None:
    """Tells autograd that the backward has overwritten the logits."""
    if ctx.logits is None:
        increment_version(input)
    else:
        ctx.logits.overwritten(input)
        ctx.logits.hand_on_hooks(ctx)


def entrance(function: type[Function]) -> Callable[..., Tensor]:
    """``function.apply`` for calls outside of any transform.

    That method asks every argument whether a transform is active or has left it behind, which
    takes longer than all that follows; here the question is put once for each of two tensors.
    """
    apply = super(Function, function).apply

    def enter(input, target, *options):
        return apply(unwrap_if_dead(input), unwrap_if_dead(target), *options)

    return enter


recompute = entrance(Recompute)
grad_in_forward = entrance(GradInForward)
overwrite_in_forward = entrance(OverwriteInForward)
overwrite_in_backward = entrance(OverwriteInBackward)
take_in_backward = entrance(TakeInBackward)
