"""``kl_div_with_logits``: how far apart two softmax distributions are, in one pass over the logits
of both.

``reference`` has the same in plain torch, for what the kernels do not take and for derivatives of
higher order.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import fallback, functional, ops
from ..eligibility import (
    LOGIT_DTYPES,
    MAX_DIMS,
    OVERRIDDEN,
    foreign,
    overrides,
    recording_reason,
)
from ..explaining import explains
from ..extensions import as_tensor, requires_grad, single, weight_of_rows
from ..fakes import row_shape
from ..options import MEAN, NONE, SUM
from ..scripting import refusal
from ..signatures import bound, takes_arguments_of
from ..statistics import positive
from . import eager, graph
from .reference import Settings, reference


def kl_div_with_logits(
    input: Tensor,
    target_logits: Tensor,
    *,
    temperature: float = 1.0,
    reverse: bool = False,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    grad_in_forward: bool = True,
    inplace: bool | str | None = None,
) -> Tensor:
    r"""Computes the Kullback-Leibler divergence between the distributions of a teacher's logits and
    a student's, in one fused pass over both.

    With :math:`p` the softmax of ``input / temperature``, the student's, and :math:`q` that of
    ``target_logits / temperature``, the divergence of a row is

    .. math::
        \mathrm{KL}(q \,\|\, p) = \sum_{c=1}^{C} q_c (\log q_c - \log p_c),
        \quad\text{or with } \mathtt{reverse} \quad
        \mathrm{KL}(p \,\|\, q) = \sum_{c=1}^{C} p_c (\log p_c - \log q_c).

    It is what ``F.kl_div(log_softmax(input / temperature, 1), log_softmax(target_logits /
    temperature, 1), log_target=True)`` adds up, without a copy of the logits in any layout and
    without a log-softmax stored. Rows that are nearly equal keep their digits, and no divergence is
    negative. A class that both rule out with a logit of -inf has no part in it. There is no factor
    ``temperature ** 2``; for that of `Distilling the Knowledge in a Neural Network
    <https://arxiv.org/abs/1503.02531>`__ multiply the loss, or divide the ``denominator``, by it.

    Args:
        input (Tensor): the student's logits, of float32, float64, bfloat16 or float16, in any
            strides.
        target_logits (Tensor): the teacher's logits, of the same shape; dtype and strides may be
            others. If they require grad plain operations of torch compute the divergence.
        temperature (float): what both logits are divided by. Default: ``1.0``
        reverse (bool): the mean is taken over the student's distribution, as `MiniLLM
            <https://arxiv.org/abs/2306.08543>`__ does, instead of the teacher's. Default: ``False``
        reduction (str): ``'none'`` | ``'mean'`` | ``'sum'``, of the rows' divergences. ``'mean'``
            divides by the number of rows. Default: ``'mean'``
        sample_weight (Tensor, optional): a factor for the divergence of each row, in the shape of
            the loss with ``reduction='none'``; ``'mean'`` divides by the weights' sum. A row of
            weight 0 is not read.
        denominator (float or Tensor, optional): what ``'mean'`` divides by, instead. A tensor has
            one element and is not waited for.
        grad_in_forward, inplace: as :func:`fused_ce.cross_entropy` has them, for the gradient of
            the student's logits.

    Shape:
        - Input: :math:`(C)`, :math:`(N, C)` or :math:`(N, C, d_1, ..., d_K)`.
        - Target: the input's shape.
        - Output: a scalar, or the shape without :math:`C` for ``reduction='none'``; in float32 for
          the half types, in float64 if one of the logits is.

    Raises:
        TypeError, ValueError: for arguments that cannot be right.
        RuntimeError: with ``inplace=True``, as :func:`fused_ce.cross_entropy`.

    Example::

        >>> import fused_ce
        >>> import torch
        >>> student = torch.tensor([[2.0, 1.0, 0.1], [0.5, 2.0, 0.3]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, 0.2], [0.1, 2.5, 0.3]])
        >>> loss = fused_ce.kl_div_with_logits(student, teacher, temperature=2.0)
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}")
        0.0224
    """
    options = {
        "temperature": temperature,
        "reverse": reverse,
        "reduction": reduction,
        "sample_weight": sample_weight,
        "denominator": denominator,
        "grad_in_forward": grad_in_forward,
        "inplace": inplace,
    }
    overridden = False
    tensors = input, target_logits
    if has_torch_function_variadic(*tensors):
        overridden = any(map(overrides, tensors))
        if not overridden:  # a mode: a device context, say
            return handle_torch_function(kl_div_with_logits, tensors, *tensors, **options)
    weights, settings = _checked(
        *tensors, temperature, reverse, reduction, sample_weight, denominator
    )
    reason = OVERRIDDEN if overridden else _reason(*tensors, *weights, settings)
    if reason is not None:
        loss = reference(*tensors, *weights, settings)
        if fallback.is_on:
            fallback.warn("kl_div_with_logits", reason)
        return loss
    return _fused(*tensors, *weights, settings, grad_in_forward, inplace)


kl_div_with_logits.__prepare_scriptable__ = refusal(
    "kl_div_with_logits", "torch.nn.functional.kl_div", "both"
)


@explains(kl_div_with_logits)
@takes_arguments_of(kl_div_with_logits)
def _explain(*args: Any, **kwargs: Any) -> str:
    """How :func:`kl_div_with_logits` would take this call, for :func:`fused_ce.explain_call`."""
    call = bound(kl_div_with_logits, args, kwargs)
    tensors = call["input"], call["target_logits"]
    if any(map(overrides, tensors)):
        return f"stock: {OVERRIDDEN}"
    names = "temperature", "reverse", "reduction", "sample_weight", "denominator"
    weights, settings = _checked(*tensors, *(call[name] for name in names))
    reason = _reason(*tensors, *weights, settings)
    if reason is not None:
        return f"stock: {reason}"
    mode = _mode(*tensors, settings, call["grad_in_forward"], call["inplace"])
    if mode in functional.OVERWRITES:
        try:
            ops.check_overwritable(*tensors, sample_weight=weights[0])
        except RuntimeError as error:
            return f"refused: {str(error).splitlines()[0]}"
    return f"fused: {mode}, {functional.instructions(call['input'])}"


def _checked(
    input: Tensor,
    target_logits: Tensor,
    temperature: Any,
    reverse: Any,
    reduction: str,
    sample_weight: Any,
    denominator: Any,
) -> tuple[tuple, Settings]:
    """The two kinds of weights, and the settings; raises for what cannot be right."""
    for tensor, name in ((input, "input"), (target_logits, "target_logits")):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"fused_ce: expected {name} to be a tensor, got {type(tensor).__name__}."
            )
        if not tensor.dtype.is_floating_point:
            raise TypeError(
                f"fused_ce: expected {name} to be of a floating type, got {tensor.dtype}."
            )
    if input.dim() == 0:
        raise ValueError("fused_ce: expected input with a dimension of classes, got a scalar.")
    if target_logits.shape != input.shape:
        raise ValueError(
            f"fused_ce: expected target_logits of the input's shape {tuple(input.shape)}, got "
            f"{tuple(target_logits.shape)}."
        )
    settings = Settings(
        positive("temperature", temperature), bool(reverse), _Reduction.get_enum(reduction)
    )
    if denominator is not None:
        if settings.reduction != MEAN:
            raise ValueError(
                f"fused_ce: denominator is what 'mean' divides by, got reduction={reduction!r}; "
                "leave it out, or use reduction='mean'."
            )
        denominator = single(denominator, "denominator")
    return (weight_of_rows(sample_weight, row_shape(input.shape)), denominator), settings


def _reason(
    input: Tensor,
    target_logits: Tensor,
    sample_weight: Tensor | None,
    denominator: float | Tensor | None,
    settings: Settings,
) -> str | None:
    """Why the kernels cannot take this call; None if they can."""
    for tensor, name in (
        (input, "logits"),
        (target_logits, "target"),
        (sample_weight, "sample_weight"),
        (denominator, "denominator"),
    ):
        reason = foreign(tensor, name) if isinstance(tensor, Tensor) else None
        if reason is not None:
            return reason
    reason = recording_reason()
    if reason is None and not input.is_cpu:
        reason = ops.lacking(input.device.type, input.get_device())
    if reason is not None:
        return reason
    if target_logits.device != input.device:
        return "the two logits are on different devices"
    for tensor in (input, target_logits):
        if tensor.dtype not in LOGIT_DTYPES:
            return f"there are no kernels for {tensor.dtype} logits"
    if isinstance(settings.temperature, Tensor):
        return "the temperature is a tensor"
    if requires_grad(target_logits):
        return "the target_logits require grad"
    if input.dim() > MAX_DIMS:
        return f"the logits have more than {MAX_DIMS} dimensions"
    if 0 in input.shape:
        return "there are no logits"
    return None


def _mode(
    input: Tensor,
    target_logits: Tensor,
    settings: Settings,
    grad_in_forward: bool,
    inplace: bool | str | None,
) -> str:
    """When the gradient is computed; a key of _RUN."""
    return functional.mode_of(input, target_logits, settings.reduction, grad_in_forward, inplace)


def _fused(
    input: Tensor,
    target_logits: Tensor,
    sample_weight: Tensor | None,
    denominator: float | Tensor | None,
    settings: Settings,
    *when: bool | str | None,
) -> Tensor:
    tensors = input, target_logits
    if requires_grad(sample_weight):
        # Its gradient is each row's divergence: what is left is torch's arithmetic.
        rows = _fused(*tensors, None, None, settings._replace(reduction=NONE), *when)
        weight = sample_weight.to(input.device, rows.dtype)
        rows = torch.where(weight != 0, rows * weight, 0)
        if settings.reduction == NONE:
            return rows
        if settings.reduction == SUM:
            return rows.sum()
        return rows.sum() / _divisor(weight.sum() if denominator is None else denominator, rows)
    if requires_grad(denominator):
        total = _fused(*tensors, sample_weight, None, settings._replace(reduction=SUM), *when)
        return total / _divisor(denominator, total)
    if sample_weight is not None:
        sample_weight = sample_weight.to(input.device)
    weights = sample_weight, as_tensor(denominator, input.device)
    return _RUN[_mode(*tensors, settings, *when)](*tensors, *weights, settings)


def _divisor(value: float | Tensor, of: Tensor) -> float | Tensor:
    return value.reshape(()).to(of.device, of.dtype) if isinstance(value, Tensor) else value


_RUN = {
    "no gradient": eager.no_gradient,
    "no gradient in the graph": eager.no_gradient,
    "gradient in forward": eager.grad_in_forward,
    "recomputed in backward": eager.recompute,
    "recomputed in the graph's backward": graph.divergence,
    "in place in forward": eager.overwrite_in_forward,
    "in place in backward": eager.overwrite_in_backward,
    functional.TAKEN: eager.take_in_backward,
}
