"""Stock PyTorch's loss: its call, and the formula that is differentiated to any order.

The functions are those beneath ``torch.nn.functional``. An attribute of that module may be ours,
and a fallback that called it would call itself: a program may say
``F.cross_entropy = fused_ce.cross_entropy``, before this file is loaded or after.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn import _reduction as _Reduction
from torch.overrides import handle_torch_function

from .options import NONE, SUM, Options

INDEX_DTYPES = frozenset({torch.int64, torch.int32, torch.int16, torch.uint8})


def _beneath(name: str) -> Callable:
    """A function of torch's own; the operator in a torch that has none of this name."""
    return getattr(torch._C._nn, name, None) or getattr(torch.ops.aten, name)


_cross_entropy = _beneath("cross_entropy_loss")
nll_loss_nd = _beneath("nll_loss_nd")
linear = _beneath("linear")


def cross_entropy(input: Tensor, target: Tensor, options: Options) -> Tensor:
    """The call; of integer targets stock takes int64 alone for every shape."""
    return _cross_entropy(input, _as_stock_takes(target, input), *_arguments(options))


def nll_loss(input: Tensor, target: Tensor, options: Options) -> Tensor:
    target = _as_stock_takes(target, input)
    return nll_loss_nd(input, target, options.weight, options.reduction, options.ignore_index)


def _arguments(options: Options) -> tuple:
    return options.weight, options.reduction, options.ignore_index, options.label_smoothing


def _as_stock_takes(target: Tensor, input: Tensor) -> Tensor:
    if (
        isinstance(target, Tensor)
        and isinstance(input, Tensor)
        and target.dtype in INDEX_DTYPES
        and target.shape != input.shape
    ):
        return target.long()
    return target


# Subclasses that override torch's functions.


def _public(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """What ``torch.nn.functional.cross_entropy`` computes, whatever that attribute is."""
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    reduction = _Reduction.get_enum(reduction)
    return _cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing)


def torchs_own(name: str, otherwise: Callable | None) -> Callable | None:
    """The object that this attribute of ``torch.nn.functional`` was when torch was loaded.

    A library that has replaced it may have wrapped it; one that did not has left nothing to find,
    and then there is only a function of ours that computes the same.
    """
    function = getattr(F, name, None)
    while function is not None:
        if getattr(function, "__globals__", None) is F.__dict__:
            return function
        function = getattr(function, "__wrapped__", None)
    return otherwise


own_cross_entropy = torchs_own("cross_entropy", _public)
own_linear_cross_entropy = torchs_own("linear_cross_entropy", None)


def overridden(input: Tensor, target: Tensor, weight: Tensor | None, **arguments: Any) -> Any:
    """Hands the call to a ``__torch_function__``, which looks for the function in a table of
    torch's."""
    tensors = (input, target, weight)
    return handle_torch_function(
        own_cross_entropy, tensors, input, target, weight=weight, **arguments
    )


# The whole formula, with every option, for its derivatives of any order.


def uncounted(target: Tensor, options: Options, input: Tensor) -> Tensor | None:
    """Which rows are left out, in a shape that spreads over the classes; None if none can be."""
    indices = None if target.is_floating_point() else target
    return left_out(input, indices, options.sample_weight, options.ignore_index)


def left_out(
    input: Tensor, indices: Tensor | None, sample_weight: Tensor | None, ignore_index: int = -100
) -> Tensor | None:
    """The same of the class indices of a target, None for probabilities."""
    rows = None
    if indices is not None:
        # A narrower type would wrap the index around.
        rows = _row_shaped(indices, input).long() == ignore_index
    if sample_weight is not None:
        weightless = sample_weight == 0
        rows = weightless if rows is None else rows | weightless
    return None if rows is None else rows.unsqueeze(1 if input.dim() > 1 else 0)


def _row_shaped(target: Tensor, input: Tensor) -> Tensor:
    """Class indices in the shape of the rows: an unbatched input takes one of shape [1] as well."""
    return target if input.dim() > 1 else target.reshape(())


def _as(dtype: torch.dtype, value: float | Tensor) -> float | Tensor:
    return value.to(dtype) if isinstance(value, Tensor) else value


def loss(input: Tensor, target: Tensor, options: Options, loss_dtype: torch.dtype) -> Tensor:
    """The loss for its derivatives of any order, with every option.

    In the loss's dtype, which under autocast is wider than the logits', and in float32 for the
    half types. Logits that are left out are replaced: zero times a nan among them would not be
    zero.
    """
    dtype = torch.promote_types(loss_dtype, torch.float32)
    input = input.to(dtype)
    target = target.to(dtype) if target.is_floating_point() else target.long()
    left_out = uncounted(target, options, input)
    if left_out is not None:
        input = input.masked_fill(left_out, 0)
    if options.logit_scale is not None:
        input = input * _as(dtype, options.logit_scale)
    if options.softcap > 0:
        input = options.softcap * torch.tanh(input / options.softcap)
    if options.weight is not None:
        options = options._replace(weight=options.weight.to(dtype))
    if _is_stocks(options):
        return _cross_entropy(input, target, *_arguments(options))
    return _extended(input, target, options, left_out)


def _is_stocks(options: Options) -> bool:
    """Whether stock's function has all that is left once the logits are mapped."""
    return (
        options.denominator is None
        and options.sample_weight is None
        and options.z_loss == options.focal_gamma == 0
        and options.on_all_ignored == options.on_out_of_range == 0
    )


def _extended(input: Tensor, target: Tensor, options: Options, left_out: Tensor | None) -> Tensor:
    """What stock has no function for, of mapped logits and of a target and weights in their
    types."""
    probabilities = target.is_floating_point()
    classes_at = 1 if input.dim() > 1 else 0
    left_out = None if left_out is None else left_out.squeeze(classes_at)
    of_class = None  # the weight of each row's class
    if not probabilities:
        target = _row_shaped(target, input)
        target = target.masked_fill(left_out, options.ignore_index)
        kept = target.masked_fill(left_out, 0)
        if options.on_out_of_range:
            outside = (kept < 0) | (kept >= input.shape[classes_at])
            kept = kept.masked_fill(outside, 0)
            target = target.masked_fill(outside, 0)
            nan = torch.where(outside, math.nan, 1.0).to(input.dtype)
            input = input * nan.unsqueeze(classes_at)
        if options.weight is not None:
            of_class = options.weight[kept]
            if options.on_out_of_range:
                of_class = of_class.masked_fill(outside, 1)

    def rows_of(weight: Tensor | None, label_smoothing: float) -> Tensor:
        arguments = weight, NONE, options.ignore_index, label_smoothing
        return _cross_entropy(input, target, *arguments)

    losses = rows_of(options.weight, options.label_smoothing)
    if options.focal_gamma > 0:
        losses = losses * (-torch.expm1(-rows_of(None, 0.0))) ** options.focal_gamma
    lse = input.logsumexp(classes_at) if options.z_loss > 0 else None
    return reduced(losses, lse, of_class, left_out, options)


def reduced(
    losses: Tensor,
    lse: Tensor | None,
    of_class: Tensor | None,
    left_out: Tensor | None,
    options: Options,
) -> Tensor:
    """The loss from the rows': the lse is that of each, which a z-loss has to have, and `of_class`
    the weight of its class, None for 1."""
    z_losses = torch.zeros_like(losses)
    if options.z_loss > 0:
        z_losses = options.z_loss * lse.square()
    of_row = torch.ones_like(losses)
    if options.sample_weight is not None:
        of_row = of_row * options.sample_weight.to(losses.dtype)
    if left_out is not None:
        of_row = of_row.masked_fill(left_out, 0)
        z_losses = z_losses.masked_fill(left_out, 0)
    losses, z_losses = of_row * losses, of_row * z_losses
    if options.reduction == NONE:
        return losses + z_losses
    losses, z_losses = losses.sum(), z_losses.sum()
    if options.reduction == SUM:
        return losses + z_losses
    if options.denominator is None:
        divisors = (of_row if of_class is None else of_row * of_class).sum(), of_row.sum()
        if options.label_smoothing > 0:
            divisors = divisors[0].masked_fill(divisors[0] == 0, math.nan), divisors[1]
    else:
        given = _as(losses.dtype, options.denominator)
        # One for both, or one for each.
        divisors = given.reshape(-1).expand(2) if isinstance(given, Tensor) else (given, given)
    if options.on_all_ignored:
        none = of_row.new_full((), of_row.numel() == 0, dtype=torch.bool)
        if left_out is not None:
            none = left_out.all()
        divisors = (torch.where(none, 1.0, divisor) for divisor in divisors)
    of_losses, of_z_losses = divisors
    return losses / of_losses + (z_losses / of_z_losses if options.z_loss > 0 else 0)


def gradients(
    input: Tensor,
    target: Tensor,
    options: Options,
    grad_output: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of input, target and ``logit_scale`` that are needed, under a graph if the
    caller wants one.

    The gradient is that for a ``grad_output`` of 1, times ``grad_output``: what may be a batch, or
    carry a tangent, then only meets a product, and the rest runs outside of any transform. Up to
    that product it is in float32 at least, or the product would come after a rounding.
    """
    dtype = torch.promote_types(grad_output.dtype, torch.float32)
    create_graph = torch.is_grad_enabled()
    scale = options.logit_scale
    needs_input, needs_target, needs_scale = needs
    with temporarily_clear_interpreter_stack(), torch.enable_grad():
        wide_input, wide_target = (
            t.to(dtype) if t.is_floating_point() else t for t in (input, target)
        )
        left_out = uncounted(target, options, input)
        if left_out is not None:
            wide_input = wide_input.masked_fill(left_out, 0)
        # The variable is the scaled logits: by them it is a row's gradient for both.
        scaled = wide_input if scale is None else wide_input * scale.to(dtype)
        if not scaled.requires_grad:
            scaled = scaled.detach().requires_grad_()
        value = loss(scaled, wide_target, options._replace(logit_scale=None), dtype)
        needed = [scaled, wide_target] if needs_target else [scaled]
        ones = torch.ones_like(value)
        unit, *units = torch.autograd.grad(value, needed, ones, create_graph=create_graph)
    if value.dim() > 0:
        grad_output = grad_output.unsqueeze(1 if input.dim() > 1 else 0)
    found = unit * grad_output
    if left_out is not None:
        # A row that is left out has no gradient, even if what arrives for it is nan.
        found = found.masked_fill(left_out, 0)
    input_grad = target_grad = scale_grad = None
    if needs_input:
        input_grad = (found if scale is None else found * scale.to(dtype)).to(input.dtype)
    if needs_target:
        target_grad = (units[0] * grad_output).to(target.dtype)
        if left_out is not None:
            target_grad = target_grad.masked_fill(left_out, 0)
    if needs_scale:
        scale_grad = (found * wide_input).sum().reshape(scale.shape).to(scale.dtype)
    return input_grad, target_grad, scale_grad
