"""The options of a loss, in one list: every operator takes them at its end, in this order.

A new option is a line here and one in ``csrc/options.h``, an argument of the functions, and its
mathematics, which ``formula.h`` has for the kernels and ``stock.py`` for all derivatives. Whatever
else hands options on takes them as a whole.
"""

import numbers
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction

NONE, MEAN, SUM = map(_Reduction.get_enum, ("none", "mean", "sum"))


class Options(NamedTuple):
    """The tensors come first. None of the options has a gradient here."""

    weight: Tensor | None = None
    # One value for a mean to divide by, instead of its own, or two: the second for the z-losses.
    denominator: Tensor | None = None
    logit_scale: Tensor | None = None  # one value, a factor of the logits
    sample_weight: Tensor | None = None  # of each row, a factor of its loss; 0 ignores it
    reduction: int = MEAN
    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float = 0.0  # where positive, scaled logits become softcap * tanh(logits / softcap)
    z_loss: float = 0.0  # a factor of the square of each row's lse
    focal_gamma: float = 0.0  # the power of 1 - p_t
    on_all_ignored: int = 0  # 1: a mean of no rows is 0
    on_out_of_range: int = 0  # 1: a target that is no class makes its row nan
    loss_dtype: torch.dtype | None = None  # that of the logits where none is given


DEFAULTS = Options()
# What autograd is given in the place of the options' gradients.
NO_GRADIENTS = (None,) * len(DEFAULTS)
_SCALE = Options._fields.index("logit_scale")

_SCHEMA_TYPES = {
    Tensor | None: "Tensor?",
    int: "int",
    float: "float",
    torch.dtype | None: "ScalarType?",
}
SCHEMA = ", ".join(
    f"{_SCHEMA_TYPES[kind]} {name}={Options._field_defaults[name]}"
    for name, kind in Options.__annotations__.items()
)
_TENSORS = sum(kind == Tensor | None for kind in Options.__annotations__.values())


def needs_of(ctx: Any) -> tuple[bool, bool, bool]:
    """Which gradients of input, target and ``logit_scale`` autograd wants of a call."""
    needs_input, needs_target, *of_options = ctx.needs_input_grad
    return needs_input, needs_target, bool(of_options) and of_options[_SCALE]


def gradients_of(scale_grad: Tensor | None) -> tuple:
    """The options' gradients, of which that of ``logit_scale`` is the one there may be."""
    if scale_grad is None:
        return NO_GRADIENTS
    return *NO_GRADIENTS[:_SCALE], scale_grad, *NO_GRADIENTS[_SCALE + 1 :]


def integer(number: Any) -> Any:
    """A whole number as Python's, where it is NumPy's or a tensor; what torch refuses as it is."""
    if isinstance(number, bool) or _is_traced(number):
        return number
    if isinstance(number, Tensor) and number.dtype == torch.bool:
        return number
    try:
        return operator.index(number)
    except (TypeError, RuntimeError):
        return number


def real(number: Any) -> Any:
    """The same for any number; torch takes a bool and no fraction."""
    if isinstance(number, Tensor):
        is_real = number.dim() == 0 and not (number.requires_grad or number.is_complex())
        return float(number) if is_real and not _is_traced(number) else number
    is_fraction = isinstance(number, numbers.Rational) and not isinstance(number, numbers.Integral)
    is_real = isinstance(number, numbers.Real) and not is_fraction
    try:
        return float(number) if is_real else number
    except OverflowError:
        return number


def _is_traced(number: Any) -> bool:
    """A graph has no number of a tensor."""
    return isinstance(number, Tensor) and torch.compiler.is_compiling()


def split(options: tuple) -> tuple[tuple, tuple]:
    """The tensors, which autograd has to save, and the numbers; nothing of no options."""
    return options[:_TENSORS], options[_TENSORS:]
