"""The options of a loss, in one list: every operator takes them at its end, in this order.

A new option is a line here and one in ``csrc/options.h``, an argument of the functions, and its
mathematics, which ``formula.h`` has for the kernels and ``stock.py`` for all derivatives. Whatever
else hands options on takes them as a whole.
"""

import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction

NONE, MEAN, SUM = map(_Reduction.get_enum, ("none", "mean", "sum"))


class Options(NamedTuple):
    """The tensors come first. None of the options has a gradient."""

    weight: Tensor | None = None
    denominator: Tensor | None = None  # one value for a mean to divide by, instead of its own
    logit_scale: Tensor | None = None  # one value, a factor of the logits
    reduction: int = MEAN
    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float = 0.0  # where positive, scaled logits become softcap * tanh(logits / softcap)
    loss_dtype: torch.dtype | None = None  # that of the logits where none is given


DEFAULTS = Options()
# What autograd is given in the place of the options' gradients.
NO_GRADIENTS = (None,) * len(DEFAULTS)

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


def integer(number: Any) -> Any:
    """A whole number, NumPy's too, as Python's; what torch refuses for one as it is."""
    is_whole = isinstance(number, numbers.Integral) and not isinstance(number, bool)
    return int(number) if is_whole else number


def real(number: Any) -> Any:
    """The same for any number; torch takes a bool and no fraction."""
    is_fraction = isinstance(number, numbers.Rational) and not isinstance(number, numbers.Integral)
    is_real = isinstance(number, numbers.Real) and not is_fraction
    return float(number) if is_real else number


def split(options: tuple) -> tuple[tuple, tuple]:
    """The tensors, which autograd has to save, and the numbers; nothing of no options."""
    return options[:_TENSORS], options[_TENSORS:]
