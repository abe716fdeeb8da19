"""The options that torch's loss does not have: as a caller gives them, and as the operators do.

The functions take them by name and hand them on as one value. What is refused here would give a
wrong number further down; what the kernels cannot hold has a reason, and the reference takes it.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .eligibility import foreign
from .options import MEAN, NONE, SUM, Options, integer, real

ON_ALL_IGNORED = {"nan": 0, "zero": 1}
ON_OUT_OF_RANGE = {"assert": 0, "raise": 0, "nan": 1}
_HALF_DTYPES = (torch.bfloat16, torch.float16)


class Extensions(NamedTuple):
    """As :func:`fused_ce.cross_entropy` takes and describes them."""

    dtype: torch.dtype | None = None
    denominator: float | Tensor | None = None
    on_all_ignored: str = "nan"
    z_loss: float = 0.0
    logit_scale: float | Tensor = 1.0
    softcap: float | None = None
    sample_weight: Tensor | None = None
    focal_gamma: float = 0.0
    on_out_of_range: str = "assert"

    @property
    def are_default(self) -> bool:
        """Nothing is asked of a tensor's values: a device would have to be waited for."""
        for given, default in zip(self, _DEFAULTS, strict=True):
            if given is not default and (isinstance(given, Tensor) or given != default):
                return False
        return True

    def checked(self, options: Options, probabilities: bool, row_shape: tuple) -> "Extensions":
        """The same with Python's numbers; what makes no sense raises."""
        z_loss = _factor(self.z_loss, "z_loss")
        focal_gamma = _factor(self.focal_gamma, "focal_gamma")
        if focal_gamma and (probabilities or options.label_smoothing > 0):
            raise ValueError(
                "fused_ce: focal_gamma goes with class indices and no label_smoothing, got "
                f"{'probabilities' if probabilities else 'label_smoothing'}; leave one of them out."
            )
        if self.denominator is not None and options.reduction != MEAN:
            raise ValueError(
                "fused_ce: denominator is what 'mean' divides by, got another reduction; "
                "leave it out, or use reduction='mean'."
            )
        for value, name, choices in (
            (self.on_all_ignored, "on_all_ignored", ON_ALL_IGNORED),
            (self.on_out_of_range, "on_out_of_range", ON_OUT_OF_RANGE),
        ):
            if value not in choices:
                raise ValueError(f"fused_ce: {name} must be one of {[*choices]}, got {value!r}.")
        check_dtype(self.dtype)
        return self._replace(
            z_loss=z_loss,
            focal_gamma=focal_gamma,
            denominator=_divisors(self.denominator),
            logit_scale=single(self.logit_scale, "logit_scale"),
            softcap=_cap(self.softcap),
            sample_weight=weight_of_rows(self.sample_weight, row_shape),
        )

    def reference_reason(self, input_dtype: torch.dtype) -> str | None:
        """Why the kernels cannot take a call with these; None if they can."""
        if not computes_as(self.dtype, input_dtype):
            return f"there are no kernels for a loss in {self.dtype} of {input_dtype} logits"
        for name in ("denominator", "logit_scale", "sample_weight"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                reason = foreign(value, name)
                if reason is not None:
                    return reason
        if torch.compiler.is_compiling() and requires_grad(self.logit_scale):
            return "a graph has no kernel for the gradient of logit_scale"
        return None

    def added_to(self, options: Options, device: torch.device) -> Options:
        """For the operators, with numbers as tensors where they take those."""
        given = self.added_for_reference(options)
        scale = None if _is_one(self.logit_scale) else as_tensor(self.logit_scale, device)
        weight = self.sample_weight
        return given._replace(
            denominator=as_tensor(self.denominator, device),
            logit_scale=scale,
            sample_weight=None if weight is None else weight.to(device),
        )

    def added_for_reference(self, options: Options) -> Options:
        """For the formula, which takes numbers as they are."""
        return options._replace(
            denominator=self.denominator,
            logit_scale=None if _is_one(self.logit_scale) else self.logit_scale,
            sample_weight=self.sample_weight,
            softcap=self.softcap or 0.0,
            z_loss=self.z_loss,
            focal_gamma=self.focal_gamma,
            on_all_ignored=ON_ALL_IGNORED[self.on_all_ignored],
            on_out_of_range=ON_OUT_OF_RANGE[self.on_out_of_range],
        )


_DEFAULTS = Extensions()
NAMES = Extensions._fields
COMPOSED = "denominator or sample_weight requires grad, with an option that has to know the rows"


def requires_grad(value: Any) -> bool:
    """Whether a gradient of this option is wanted."""
    return isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled()


def computes_as(dtype: torch.dtype | None, input_dtype: torch.dtype) -> bool:
    """Whether the kernels compute logits of the input's dtype as they would those of this one."""
    return dtype in (None, input_dtype) or (dtype == torch.float32 and input_dtype in _HALF_DTYPES)


def composes(given: Extensions, options: Options, target: Tensor) -> bool:
    """Whether a gradient of the weights takes the formula: :func:`weighed` does not know the
    rows."""
    if not (requires_grad(given.denominator) or requires_grad(given.sample_weight)):
        return False
    by_class = options.weight is not None and not target.is_floating_point()
    if isinstance(given.denominator, Tensor) and given.denominator.numel() > 1:
        return True
    return given.on_all_ignored == "zero" or (
        options.reduction == MEAN and given.denominator is None and by_class
    )


def weighed(
    given: Extensions,
    options: Options,
    target: Tensor,
    dtype: torch.dtype,
    loss: Callable[[Options, Extensions], Tensor],
) -> Tensor:
    """The loss where ``denominator`` or ``sample_weight`` requires grad: torch's arithmetic on what
    ``loss`` gives without them."""
    result_dtype = given.dtype or dtype
    weight, denominator = given.sample_weight, given.denominator
    if not requires_grad(weight):
        total = loss(options._replace(reduction=SUM), given._replace(denominator=None))
        return total / denominator.reshape(()).to(total.dtype)
    wide = torch.float32 if dtype in _HALF_DTYPES else given.dtype
    plain = given._replace(sample_weight=None, denominator=None, dtype=wide)
    rows = loss(options._replace(reduction=NONE), plain)
    weight = weight.to(rows.dtype)
    rows = torch.where(weight != 0, rows * weight, 0)
    if options.reduction == NONE:
        return rows.to(result_dtype)
    total = rows.sum()
    if options.reduction == MEAN:
        if denominator is None:
            if not target.is_floating_point():
                kept = target.reshape(weight.shape) != options.ignore_index
                weight = torch.where(kept, weight, 0)
            denominator = weight.sum()
        elif isinstance(denominator, Tensor):
            denominator = denominator.reshape(()).to(total.dtype)
        total = total / denominator
    return total.to(result_dtype)


def check_targets(given: Extensions, options: Options, target: Tensor, shape: tuple) -> None:
    """Where that is asked for, raises for a target that is no class, and says where it is. Waits
    for the device."""
    if given.on_out_of_range != "raise" or target.is_floating_point():
        return
    if torch.compiler.is_compiling():
        return  # a graph has the kernels' own check
    if target.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "fused_ce: on_out_of_range='raise' waits for the device, which a CUDA graph that is "
            "being captured cannot; use 'assert' or 'nan'."
        )
    classes = shape[1 if len(shape) > 1 else 0]
    target = target.long()
    outside = ((target < 0) | (target >= classes)) & (target != options.ignore_index)
    if given.sample_weight is not None:
        outside &= given.sample_weight.reshape(target.shape) != 0
    if outside.any():
        row = outside.nonzero()[0].tolist()
        raise IndexError(
            f"Target {target[tuple(row)].item()} is out of bounds: row "
            f"{row[0] if len(row) == 1 else row}, {classes} classes."
        )


def _factor(value: Any, name: str) -> float:
    value = real(value)
    if type(value) is not float or not 0 <= value < math.inf:
        raise ValueError(f"fused_ce: {name} must be a finite number from 0 on, got {value!r}.")
    return value


def _cap(value: Any) -> float | None:
    if value is None:
        return None
    value = real(value)
    if type(value) is not float or not 1e-30 <= value <= 1e30:
        raise ValueError(f"fused_ce: softcap must be from 1e-30 to 1e30, or None, got {value!r}.")
    return value


def single(value: Any, name: str) -> float | Tensor:
    """A number, or a tensor of one element."""
    if isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_complex():
            return value
        got = f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    elif isinstance(value, numbers.Real):
        return float(value)
    else:
        converted = real(integer(value))  # NumPy's
        if isinstance(converted, int | float):
            return float(converted)
        got = repr(value)
    raise ValueError(f"fused_ce: {name} must be a number or a tensor of one element, got {got}.")


def _divisors(value: Any) -> float | Tensor | None:
    """What a mean divides by: one for losses and z-losses, or one for each."""
    if value is None:
        return None
    if isinstance(value, Tensor) and value.shape == (2,) and not requires_grad(value):
        return value
    return single(value, "denominator")


def _is_one(scale: float | Tensor) -> bool:
    return not isinstance(scale, Tensor) and scale == 1.0


def check_dtype(dtype: Any) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"fused_ce: dtype must be a floating-point torch.dtype, got {dtype!r}.")


def weight_of_rows(weight: Any, row_shape: tuple) -> Tensor | None:
    if weight is None:
        return None
    if not isinstance(weight, Tensor) or weight.is_complex():
        raise ValueError(f"fused_ce: sample_weight must be a tensor, got {weight!r}.")
    if weight.shape != row_shape:
        raise ValueError(
            f"fused_ce: sample_weight must have the shape {tuple(row_shape)} of the loss with "
            f"reduction='none', got {tuple(weight.shape)}."
        )
    return weight if weight.is_floating_point() else weight.float()


def as_tensor(value: float | Tensor | None, device: torch.device) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        shape = () if value.numel() == 1 else value.shape
        return value.reshape(shape).to(device, torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)
