"""The losses of single elements: ``binary_cross_entropy_with_logits``, ``sigmoid_focal_loss`` and
``kl_div``, each in one pass over its input.

A function says what its call means; what all of them share, which way a call takes, comes after
them. ``reference`` has the same in torch's operations.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import fallback, ops
from ..eligibility import (
    INVALID,
    LOGIT_DTYPES,
    MAX_DIMS,
    OVERRIDDEN,
    computed_dtype,
    foreign,
    is_elsewhere,
    overrides,
    recording_reason,
)
from ..explaining import explains
from ..functional import OVERWRITES, TAKEN, instructions, mode_of
from ..options import SUM, real
from ..scripting import refusal, stocks_or_refusal
from ..signatures import bound, takes_arguments_of
from ..stock import torchs_own
from . import eager, graph, reference
from .reference import (
    BATCH_MEAN,
    BINARY_CROSS_ENTROPY,
    KL_DIVERGENCE,
    KL_DIVERGENCE_OF_LOGS,
    SIGMOID_FOCAL,
    Settings,
    batch_mean,
)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    grad_in_forward: bool = True,
    inplace: bool | str | None = None,
) -> Tensor:
    r"""Computes the binary cross entropy between logits and target, in one fused pass.

    Loss and gradient are those of :func:`torch.nn.functional.binary_cross_entropy_with_logits`. Of
    an element, with :math:`\sigma(x) = 1 / (1 + \exp(-x))`, the loss is

    .. math::
        -w \bigl[p\, y \log \sigma(x) + (1 - y) \log (1 - \sigma(x))\bigr]

    with :math:`w` its weight and :math:`p` its positive weight. It takes no memory but that of the
    gradient, in any layout.

    Args:
        input (Tensor): logits, of float32, float64, bfloat16 or float16, in any strides.
        target (Tensor): of the input's shape, values within [0, 1].
        weight (Tensor, optional): a factor of each element's loss, in a shape that expands to the
            input's.
        size_average, reduce: deprecated, as in torch.
        reduction (str): ``'none'`` | ``'mean'`` | ``'sum'``. Default: ``'mean'``
        pos_weight (Tensor, optional): a factor of the positive part of each element's loss, in a
            shape that expands to the input's.
        grad_in_forward (bool): compute the gradient along with the loss, for a ``grad_output`` of
            1; see :func:`fused_ce.cross_entropy`. Default: ``True``
        inplace (bool or str): write the gradient over the input, or do so with ``'auto'`` if nobody
            else holds it, as :func:`fused_ce.cross_entropy` describes it. Default: ``None``

    Raises:
        Exception: what torch raises for the same call.
        RuntimeError: with ``inplace=True``, as :func:`fused_ce.cross_entropy`.

    An input of -inf with a target of 1 has a loss of inf. One of +-inf with the target that it is
    sure of has a loss of 0. torch's loss is nan for both.

    Example::

        >>> import fused_ce
        >>> import torch
        >>> input = torch.tensor([[2.0, -1.0], [0.5, 3.0]], requires_grad=True)
        >>> target = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> loss = fused_ce.binary_cross_entropy_with_logits(input, target)
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}")
        0.2407
    """
    tensors = (input, target, weight, pos_weight)
    if has_torch_function_variadic(*tensors):
        arguments = {
            "weight": weight,
            "size_average": size_average,
            "reduce": reduce,
            "reduction": reduction,
            "pos_weight": pos_weight,
        }
        own = {"grad_in_forward": grad_in_forward, "inplace": inplace}
        return _overridden(
            binary_cross_entropy_with_logits, _torchs_bce, tensors, tensors[:2], arguments, own
        )
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    settings = Settings(BINARY_CROSS_ENTROPY, _Reduction.get_enum(reduction))
    return _computed(
        "binary_cross_entropy_with_logits", tensors, settings, _stock_bce, grad_in_forward, inplace
    )


def _stock_bce(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    settings: Settings,
) -> Tensor:
    if not (target.size() == input.size()):
        raise ValueError(
            f"Target size ({target.size()}) must be the same as input size ({input.size()})"
        )
    return reference.binary_cross_entropy_with_logits(
        input, target, weight, pos_weight, settings.reduction
    )


def _public_bce(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """What ``torch.nn.functional.binary_cross_entropy_with_logits`` computes."""
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    settings = Settings(BINARY_CROSS_ENTROPY, _Reduction.get_enum(reduction))
    return _stock_bce(input, target, weight, pos_weight, settings)


_torchs_bce = torchs_own("binary_cross_entropy_with_logits", _public_bce)
binary_cross_entropy_with_logits.__prepare_scriptable__ = stocks_or_refusal(
    binary_cross_entropy_with_logits,
    _torchs_bce,
    "torch.nn.functional.binary_cross_entropy_with_logits",
    "both",
)


@explains(binary_cross_entropy_with_logits)
@takes_arguments_of(binary_cross_entropy_with_logits)
def _explain_bce(*args: Any, **kwargs: Any) -> str:
    call = bound(binary_cross_entropy_with_logits, args, kwargs)
    tensors = tuple(call[name] for name in ("input", "target", "weight", "pos_weight"))
    return _explained(call, tensors, lambda reduction: Settings(BINARY_CROSS_ENTROPY, reduction))


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    grad_in_forward: bool = True,
    inplace: bool | str | None = None,
) -> Tensor:
    r"""Computes the focal loss of `Focal Loss for Dense Object Detection
    <https://arxiv.org/abs/1708.02002>`__ of independent classes, in one fused pass.

    Loss and gradient are those of ``torchvision.ops.sigmoid_focal_loss``:

    .. math::
        \alpha_t\, (1 - p_t)^\gamma\, \mathrm{ce}, \qquad
        p_t = y\, \sigma(x) + (1 - y) (1 - \sigma(x)), \qquad
        \alpha_t = \alpha y + (1 - \alpha) (1 - y)

    with :math:`\mathrm{ce}` the binary cross entropy of the element and :math:`\sigma(x) = 1 / (1 +
    \exp(-x))`. :math:`1 - p_t` is not found as a difference, so a confident element keeps its
    digits.

    Args:
        inputs (Tensor): logits, of float32, float64, bfloat16 or float16, in any strides.
        targets (Tensor): of the same shape, 0 or 1, or between them.
        alpha (float): within [0, 1], or -1 for no :math:`\alpha_t`. Default: ``0.25``
        gamma (float): the power. Default: ``2``
        reduction (str): ``'none'`` | ``'mean'`` | ``'sum'``. Default: ``'none'``
        grad_in_forward, inplace: as in :func:`fused_ce.cross_entropy`.

    Raises:
        Exception: what torchvision raises for the same call.
        RuntimeError: with ``inplace=True``, as :func:`fused_ce.cross_entropy`.

    At certainty the gradient is 0 for every ``gamma``. torchvision's is nan for one below 1.

    Example::

        >>> import fused_ce
        >>> import torch
        >>> inputs = torch.tensor([2.0, -1.0, 0.5], requires_grad=True)
        >>> targets = torch.tensor([1.0, 0.0, 0.0])
        >>> loss = fused_ce.sigmoid_focal_loss(inputs, targets, reduction="sum")
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}")
        0.3005
    """
    tensors = (inputs, targets, None, None)
    overridden = False
    if has_torch_function_variadic(inputs, targets):
        overridden = overrides(inputs) or overrides(targets)
        if not overridden:  # a mode: a device context, say
            options = {"grad_in_forward": grad_in_forward, "inplace": inplace}
            arguments = (inputs, targets, alpha, gamma, reduction)
            return handle_torch_function(sigmoid_focal_loss, tensors[:2], *arguments, **options)
    settings = _focal_settings(alpha, gamma, reduction)
    return _computed(
        "sigmoid_focal_loss",
        tensors,
        settings,
        _composed_focal,
        grad_in_forward,
        inplace,
        OVERRIDDEN if overridden else None,
    )


def _focal_settings(alpha: Any, gamma: Any, reduction: str) -> Settings:
    if not (0 <= alpha <= 1) and alpha != -1:
        raise ValueError(
            f"Invalid alpha value: {alpha}. alpha must be in the range [0,1] or -1 for ignore."
        )
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(
            f"Invalid Value for arg 'reduction': '{reduction} \n Supported reduction modes: "
            "'none', 'mean', 'sum'"
        )
    reduction = _Reduction.get_enum(reduction)
    return Settings(SIGMOID_FOCAL, reduction, real(alpha), real(gamma))


def _composed_focal(
    input: Tensor, target: Tensor, weight: None, pos_weight: None, settings: Settings
) -> Tensor:
    if not (target.size() == input.size()):
        raise ValueError(
            f"Target size ({target.size()}) must be the same as input size ({input.size()})"
        )
    return reference.sigmoid_focal_loss(
        input, target, settings.alpha, settings.gamma, settings.reduction
    )


sigmoid_focal_loss.__prepare_scriptable__ = refusal(
    "sigmoid_focal_loss", "torchvision.ops.sigmoid_focal_loss", "both"
)


@explains(sigmoid_focal_loss)
@takes_arguments_of(sigmoid_focal_loss)
def _explain_focal(*args: Any, **kwargs: Any) -> str:
    call = bound(sigmoid_focal_loss, args, kwargs)
    try:
        settings = _focal_settings(call["alpha"], call["gamma"], call["reduction"])
    except ValueError as error:
        return f"refused: {error}"
    tensors = (call["inputs"], call["targets"], None, None)
    return _explained(call, tensors, lambda _: settings)


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
    *,
    grad_in_forward: bool = True,
    inplace: bool | str | None = None,
) -> Tensor:
    r"""Computes the Kullback-Leibler divergence of log-probabilities from a target, in one fused
    pass.

    Loss and gradient are those of :func:`torch.nn.functional.kl_div`, whose warning for ``'mean'``
    is given as well. Of an element the loss is :math:`y (\log y - x)`, and 0 where :math:`y` is 0.

    Args:
        input (Tensor): log-probabilities, of float32, float64, bfloat16 or float16, in any strides.
        target (Tensor): of the input's shape, probabilities, or their logarithms with
            ``log_target``. Another shape, which torch broadcasts, is left to torch.
        size_average, reduce: deprecated, as in torch.
        reduction (str): ``'none'`` | ``'batchmean'`` | ``'sum'`` | ``'mean'``. ``'batchmean'``
            divides the sum by the size of the first dimension, ``'mean'`` by the number of
            elements. Default: ``'mean'``
        log_target (bool): whether the target is logarithms. Default: ``False``
        grad_in_forward, inplace: as in :func:`fused_ce.cross_entropy`.

    Raises:
        Exception: what torch raises for the same call.
        RuntimeError: with ``inplace=True``, as :func:`fused_ce.cross_entropy`.

    Example::

        >>> import fused_ce
        >>> import torch
        >>> input = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
        >>> target = torch.tensor([[0.2, 0.3, 0.5]])
        >>> log_p = input.log_softmax(1)
        >>> loss = fused_ce.kl_div(log_p, target, reduction="batchmean")
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}")
        0.0780
    """
    tensors = (input, target, None, None)
    if has_torch_function_variadic(input, target):
        arguments = {
            "size_average": size_average,
            "reduce": reduce,
            "reduction": reduction,
            "log_target": log_target,
        }
        own = {"grad_in_forward": grad_in_forward, "inplace": inplace}
        return _overridden(kl_div, _torchs_kl_div, tensors[:2], tensors[:2], arguments, own)
    of_batch = reduction == "batchmean"
    kind = KL_DIVERGENCE_OF_LOGS if log_target else KL_DIVERGENCE
    settings = Settings(kind, _kl_reduction(size_average, reduce, reduction))
    found = _computed("kl_div", tensors, settings, _stock_kl_div, grad_in_forward, inplace)
    # Only the arguments that are deprecated can ask for a mean over the batch of something else.
    return batch_mean(found, input) if of_batch and settings.reduction != BATCH_MEAN else found


def _kl_reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> int:
    if size_average is not None or reduce is not None:
        number = _Reduction.legacy_get_enum(size_average, reduce)
        return BATCH_MEAN if number == SUM and reduction == "batchmean" else number
    if reduction == "mean":
        warnings.warn(
            "reduction: 'mean' divides the total loss by both the batch size and the support size."
            "'batchmean' divides only by the batch size, and aligns with the KL div math "
            "definition.'mean' will be changed to behave the same as 'batchmean' in the next major "
            "release.",
            stacklevel=3,
        )
    return BATCH_MEAN if reduction == "batchmean" else _Reduction.get_enum(reduction)


def _stock_kl_div(
    input: Tensor, target: Tensor, weight: None, pos_weight: None, settings: Settings
) -> Tensor:
    log_target = settings.loss == KL_DIVERGENCE_OF_LOGS
    if settings.reduction == BATCH_MEAN:
        return batch_mean(reference.kl_div(input, target, SUM, log_target=log_target), input)
    return reference.kl_div(input, target, settings.reduction, log_target=log_target)


def _public_kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """What ``torch.nn.functional.kl_div`` computes."""
    kind = KL_DIVERGENCE_OF_LOGS if log_target else KL_DIVERGENCE
    settings = Settings(kind, _kl_reduction(size_average, reduce, reduction))
    found = _stock_kl_div(input, target, None, None, settings)
    of_batch = reduction == "batchmean" and settings.reduction != BATCH_MEAN
    return batch_mean(found, input) if of_batch else found


_torchs_kl_div = torchs_own("kl_div", _public_kl_div)
kl_div.__prepare_scriptable__ = stocks_or_refusal(
    kl_div, _torchs_kl_div, "torch.nn.functional.kl_div", "both"
)


@explains(kl_div)
@takes_arguments_of(kl_div)
def _explain_kl_div(*args: Any, **kwargs: Any) -> str:
    call = bound(kl_div, args, kwargs)
    kind = KL_DIVERGENCE_OF_LOGS if call["log_target"] else KL_DIVERGENCE
    if call["reduction"] == "batchmean":
        call["reduction"] = "sum"  # whose gradient is computed at the same moment
    tensors = (call["input"], call["target"], None, None)
    return _explained(call, tensors, lambda reduction: Settings(kind, reduction))


# What the functions share.

_Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
_HALF_DTYPES = (torch.bfloat16, torch.float16)
_STRIDED = torch.strided
_NAMES = ("input", "target", "weight", "pos_weight")


def _computed(
    name: str,
    tensors: _Tensors,
    settings: Settings,
    stock: Callable[..., Tensor],
    grad_in_forward: bool,
    inplace: bool | str | None,
    reason: str | None = None,
) -> Tensor:
    """The loss, by the kernels if they can."""
    if reason is None:
        reason, loss_dtype = _way(tensors, settings)
    if reason is not None:
        loss = stock(*tensors, settings)
        if fallback.is_on:  # afterwards, since stock may have refused the call
            fallback.warn(name, reason)
        return loss
    kind, reduction, alpha, gamma, _ = settings
    mode = mode_of(tensors[0], tensors[1], reduction, grad_in_forward, inplace)
    return _RUN[mode](*tensors, kind, reduction, alpha, gamma, loss_dtype)


_RUN = {
    "no gradient": ops.eager.pointwise,
    "no gradient in the graph": ops.pointwise,
    "gradient in forward": eager.grad_in_forward,
    "recomputed in backward": eager.recompute,
    "recomputed in the graph's backward": graph.loss,
    "in place in forward": eager.overwrite_in_forward,
    "in place in backward": eager.overwrite_in_backward,
    TAKEN: eager.take_in_backward,
}


def _way(tensors: _Tensors, settings: Settings) -> tuple[str | None, torch.dtype | None]:
    """Why the kernels cannot take a call, if so; else the loss's dtype if it is not the input's.

    It runs before every call and takes as long as a small one: an attribute is read once.
    """
    reason = _foreign(tensors) or recording_reason()
    if reason is not None:
        return reason, None
    input, target, *weights = tensors
    if not input.is_cpu:
        reason = ops.lacking(input.device.type, input.get_device())
        if reason is not None:
            return reason, None
    dtype, target_dtype, shape = input.dtype, target.dtype, input.shape
    if dtype not in LOGIT_DTYPES or target_dtype not in LOGIT_DTYPES:
        return f"there are no kernels for {dtype} with a target of {target_dtype}", None
    if dtype is not target_dtype and torch.float64 in (dtype, target_dtype):
        return "one of input and target is in float64", None
    if target.shape != shape or len(shape) >= MAX_DIMS or is_elsewhere(target, input):
        return INVALID, None
    for weight in weights:
        if weight is not None and not _is_valid(weight, input):
            return INVALID, None
    if target.requires_grad and torch.is_grad_enabled():
        return "the target requires grad", None
    if settings.loss == SIGMOID_FOCAL and not _is_finite(settings):
        return "there are no kernels for such an alpha or gamma", None
    return None, _loss_dtype(dtype, target_dtype, input.device.type, settings.loss)


def _foreign(tensors: _Tensors) -> str | None:
    """Why one of the arguments is not a tensor of plain strided memory; None if all are."""
    for tensor, name in zip(tensors, _NAMES, strict=True):
        if type(tensor) is Tensor and tensor.layout is _STRIDED and not tensor.is_nested:
            continue
        if tensor is not None or name in ("input", "target"):
            reason = foreign(tensor, name)
            if reason is not None:
                return reason
    return None


def _is_valid(weight: Tensor, input: Tensor) -> bool:
    """Whether a weight is one of those that stock and the kernels take."""
    if weight.dtype not in LOGIT_DTYPES or is_elsewhere(weight, input):
        return False
    if weight.requires_grad and torch.is_grad_enabled():
        return False
    shape, of_input = weight.shape, input.shape
    missing = len(of_input) - len(shape)
    return missing >= 0 and all(
        size in (1, whole) for size, whole in zip(shape, of_input[missing:], strict=True)
    )


def _is_finite(settings: Settings) -> bool:
    number = float | torch.SymFloat
    alpha, gamma = settings.alpha, settings.gamma
    return isinstance(alpha, number) and isinstance(gamma, number) and 0 <= gamma < math.inf


def _loss_dtype(
    dtype: torch.dtype, target_dtype: torch.dtype, device: str, loss: int
) -> torch.dtype | None:
    """The loss's dtype, or None where it is the input's own."""
    if dtype is target_dtype and dtype not in _HALF_DTYPES:
        return None
    found = computed_dtype(target_dtype, device)
    if loss != BINARY_CROSS_ENTROPY:
        found = torch.promote_types(found, computed_dtype(dtype, device))
    return None if found == dtype else found


def _overridden(
    function: Callable,
    torchs: Callable,
    tensors: tuple,
    positional: tuple,
    arguments: dict[str, Any],
    own: dict[str, Any],
) -> Tensor:
    """A subclass gets the function that it knows, torch's; a mode (a device context, say) ours."""
    if not any(overrides(tensor) for tensor in tensors):
        return handle_torch_function(function, tensors, *positional, **arguments, **own)
    loss = handle_torch_function(torchs, tensors, *positional, **arguments)
    if fallback.is_on:
        fallback.warn(function.__name__, OVERRIDDEN)
    return loss


def _explained(
    call: dict[str, Any], tensors: _Tensors, settings_of: Callable[[int], Settings]
) -> str:
    if any(overrides(tensor) for tensor in tensors):
        return f"stock: {OVERRIDDEN}"
    reduction, legacy = call["reduction"], (call.get("size_average"), call.get("reduce"))
    if legacy != (None, None):
        reduction = _Reduction.legacy_get_string(*legacy, emit_warning=False)
    try:
        settings = settings_of(_Reduction.get_enum(reduction))
    except ValueError as error:
        return f"refused: {error}"
    reason, _ = _way(tensors, settings)
    if reason is not None:
        return f"stock: {reason}"
    grad_in_forward, inplace = call["grad_in_forward"], call["inplace"]
    mode = mode_of(tensors[0], tensors[1], settings.reduction, grad_in_forward, inplace)
    if mode in OVERWRITES:
        try:
            ops.check_pointwise_overwritable(*tensors)
        except RuntimeError as error:
            return f"refused: {str(error).splitlines()[0]}"
    return f"fused: {mode}, {instructions(tensors[0])}"
