"""Stock PyTorch's loss: its call, and the formula that is differentiated to any order.

The functions are those beneath ``torch.nn.functional``. An attribute of that module may be ours,
and a fallback that called it would call itself: a program may say
``F.cross_entropy = fused_ce.cross_entropy``, before this file is loaded or after.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn import _reduction as _Reduction
from torch.overrides import handle_torch_function

from .options import SUM, Options

INDEX_DTYPES = frozenset({torch.int64, torch.int32, torch.int16, torch.uint8})


def _beneath(name: str) -> Callable:
    """A function of torch's own; the operator in a torch that has none of this name."""
    return getattr(torch._C._nn, name, None) or getattr(torch.ops.aten, name)


_cross_entropy = _beneath("cross_entropy_loss")
_nll_loss = _beneath("nll_loss_nd")
linear = _beneath("linear")


def cross_entropy(input: Tensor, target: Tensor, options: Options) -> Tensor:
    """The call; of integer targets stock takes int64 alone for every shape."""
    return _cross_entropy(input, _as_stock_takes(target, input), *_arguments(options))


def nll_loss(input: Tensor, target: Tensor, options: Options) -> Tensor:
    target = _as_stock_takes(target, input)
    return _nll_loss(input, target, options.weight, options.reduction, options.ignore_index)


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


def _torchs_own() -> Callable:
    """The object that ``torch.nn.functional.cross_entropy`` was when torch was loaded.

    A library that has replaced it may have wrapped it; one that did not has left nothing to find,
    and then there is only the function above.
    """
    function = F.cross_entropy
    while function is not None:
        if getattr(function, "__globals__", None) is F.__dict__:
            return function
        function = getattr(function, "__wrapped__", None)
    return _public


_own = _torchs_own()


def overridden(input: Tensor, target: Tensor, weight: Tensor | None, **arguments: Any) -> Any:
    """Hands the call to a ``__torch_function__``, which looks for the function in a table of
    torch's."""
    tensors = (input, target, weight)
    return handle_torch_function(_own, tensors, input, target, weight=weight, **arguments)


# Derivatives of any order.


def ignored(target: Tensor, options: Options, input: Tensor) -> Tensor:
    """Which rows are ignored, in a shape that spreads over the classes of the logits."""
    rows = target.long() == options.ignore_index  # a narrower type would wrap the index around
    return rows.unsqueeze(1) if input.dim() > 1 else rows.reshape(1)


def loss(input: Tensor, target: Tensor, options: Options, loss_dtype: torch.dtype) -> Tensor:
    """The loss for its derivatives of any order: stock's, of mapped logits.

    In the loss's dtype, which under autocast is wider than the logits', and in float32 for the
    half types. Ignored logits are replaced: zero times a nan among them would not be zero.
    """
    dtype = torch.promote_types(loss_dtype, torch.float32)
    input = input.to(dtype)
    if target.is_floating_point():
        target = target.to(dtype)
    else:
        input = input.masked_fill(ignored(target, options, input), 0)
        target = target.long()
    if options.logit_scale is not None:
        input = input * options.logit_scale.to(dtype)
    if options.softcap > 0:
        input = options.softcap * torch.tanh(input / options.softcap)
    if options.weight is not None:
        options = options._replace(weight=options.weight.to(dtype))
    if options.denominator is None:
        return _cross_entropy(input, target, *_arguments(options))
    total = _cross_entropy(input, target, *_arguments(options._replace(reduction=SUM)))
    return total / options.denominator.to(dtype)


def gradients(
    input: Tensor, target: Tensor, options: Options, grad_output: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of input and target that are needed, under a graph if the caller wants one.

    The gradient is that for a ``grad_output`` of 1, times ``grad_output``: what may be a batch, or
    carry a tangent, then only meets a product, and the rest runs outside of any transform. Up to
    that product it is in float32 at least, or the product would come after a rounding.
    """
    dtype = torch.promote_types(grad_output.dtype, torch.float32)
    create_graph = torch.is_grad_enabled()
    with temporarily_clear_interpreter_stack(), torch.enable_grad():
        wide = [t.to(dtype) if t.is_floating_point() else t for t in (input, target)]
        value = loss(*wide, options, dtype)
        needed = [t for t, needs_it in zip(wide, needs, strict=True) if needs_it]
        ones = torch.ones_like(value)
        units = iter(torch.autograd.grad(value, needed, ones, create_graph=create_graph))
    if value.dim() > 0:
        grad_output = grad_output.unsqueeze(1 if input.dim() > 1 else 0)
    input_grad, target_grad = (
        (next(units) * grad_output).to(t.dtype) if needs_it else None
        for t, needs_it in zip((input, target), needs, strict=True)
    )
    if not target.is_floating_point():
        # An ignored row has no gradient, even if what arrives for it is nan.
        input_grad = input_grad.masked_fill(ignored(target, options, input), 0)
    return input_grad, target_grad
