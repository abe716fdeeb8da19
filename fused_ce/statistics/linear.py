"""``linear_softmax_stats``: the statistics of a linear layer's output, which never exists as a
whole.

Rows are taken in chunks, as ``linear_cross_entropy`` takes them; the backward computes their logits
a second time, so it has four GEMMs where the formula with all logits has three.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import fallback, functional, ops, stock
from ..eligibility import LOGIT_DTYPES, OVERRIDDEN, foreign, overrides, recording_reason
from ..explaining import explains
from ..linear.plan import DEVICES, Limits, Sizes, check_limits, logits_dtype
from ..scripting import refusal
from ..signatures import bound, takes_arguments_of
from . import check_target, checked_settings, linear_operators, softmax_stats
from .reference import Settings, SoftmaxStats


class _Call(NamedTuple):
    input: Tensor  # [N, H]
    linear_weight: Tensor  # [V, H]
    target: Tensor | None  # [N]
    linear_bias: Tensor | None  # [V]
    settings: Settings
    limits: Limits
    batch: tuple[int, ...]  # the shape of the results


def linear_softmax_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = True,
    argmax: bool = False,
    chunk_size: int | None = None,
    max_chunk_bytes: int | None = None,
) -> SoftmaxStats:
    r"""Computes what :func:`fused_ce.softmax_stats` does of
    ``input @ linear_weight.T + linear_bias``, without holding these logits.

    They are computed in chunks of rows, and in the backward once more. The results are
    differentiable by input, weight and bias, to any order. Sums over the chunks are taken in
    float32 at least.

    Args:
        input (Tensor): of float32, float64, bfloat16 or float16.
        linear_weight (Tensor): the layer's weight, of the input's dtype.
        target (Tensor, optional): class indices (int64, and also int32, int16 or uint8).
        linear_bias (Tensor, optional): the layer's bias.
        temperature, softcap, ignore_index, entropy, argmax: as :func:`fused_ce.softmax_stats` has
            them.
        chunk_size, max_chunk_bytes: as :func:`fused_ce.linear_cross_entropy` has them.

    Shape:
        - Input: :math:`(*, H)`.
        - Linear weight: :math:`(V, H)`.
        - Linear bias: :math:`(V)`.
        - Target and results: :math:`(*)`.

    Returns:
        SoftmaxStats: as :func:`fused_ce.softmax_stats` returns it.

    Example::

        >>> import fused_ce
        >>> import torch
        >>> hidden = torch.randn(2, 7, 16, requires_grad=True)
        >>> head = torch.nn.Linear(16, 1000, bias=False)
        >>> target = torch.randint(1000, (2, 7))
        >>> stats = fused_ce.linear_softmax_stats(hidden, head.weight, target)
        >>> stats.log_prob.shape, stats.entropy.shape
        (torch.Size([2, 7]), torch.Size([2, 7]))
        >>> stats.log_prob.sum().backward()
    """
    tensors = (input, linear_weight, target, linear_bias)
    options = {
        "temperature": temperature,
        "softcap": softcap,
        "ignore_index": ignore_index,
        "entropy": entropy,
        "argmax": argmax,
        "chunk_size": chunk_size,
        "max_chunk_bytes": max_chunk_bytes,
    }
    overridden = False
    if has_torch_function_variadic(*tensors):
        overridden = any(map(overrides, tensors))
        if not overridden:  # a mode: a device context, say
            return handle_torch_function(
                linear_softmax_stats, tensors, *tensors[:3], linear_bias=linear_bias, **options
            )
    settings = temperature, softcap, ignore_index
    call = _checked(*tensors, settings, chunk_size, max_chunk_bytes)
    reason = OVERRIDDEN if overridden else _reason(call)
    if reason is None:
        return _fused(call, entropy, argmax)
    if fallback.is_on:  # before the function within gives the same reason
        fallback.warn("linear_softmax_stats", reason)
    logits = stock.linear(input, linear_weight, linear_bias)
    del options["chunk_size"], options["max_chunk_bytes"]
    return softmax_stats(logits, target, **options)


linear_softmax_stats.__prepare_scriptable__ = refusal(
    "linear_softmax_stats", "torch.nn.functional.linear and log_softmax", "all of them"
)


@explains(linear_softmax_stats)
@takes_arguments_of(linear_softmax_stats)
def explain_linear_stats(*args: Any, **kwargs: Any) -> str:
    """Says how :func:`linear_softmax_stats` would take this call, without computing anything.

    Returns ``"fused: "`` with the chunks and the instruction set in use, or ``"stock: "`` with the
    reason why all logits are computed.

    Example::

        >>> import fused_ce
        >>> import torch
        >>> hidden, head = torch.randn(1000, 16), torch.randn(50, 16)
        >>> said = fused_ce.explain_linear_stats(hidden, head, chunk_size=300)
        >>> said.rpartition(",")[0]
        'fused: 4 chunks of 256 rows'
    """
    arguments = bound(linear_softmax_stats, args, kwargs)
    names = ("input", "linear_weight", "target", "linear_bias")
    tensors = [arguments[name] for name in names]
    if any(map(overrides, tensors)):
        return f"stock: {OVERRIDDEN}"
    settings = [arguments[name] for name in ("temperature", "softcap", "ignore_index")]
    call = _checked(*tensors, settings, arguments["chunk_size"], arguments["max_chunk_bytes"])
    reason = _reason(call)
    if reason is not None:
        return f"stock: {reason}"
    device = DEVICES[call.input.device.type]
    dtype = device.computed_dtype(logits_dtype(call.input))
    columns, features = call.linear_weight.shape
    count = len(call.input)
    sizes = Sizes(count, features, columns, columns, call.input.dtype != dtype, 0)
    rows = sizes.chunk_rows(call.limits, dtype, device)
    chunks, rows = -(-count // rows), min(rows, count)
    what = f"{chunks} chunk{'s' * (chunks != 1)} of {rows} row{'s' * (rows != 1)}"
    return f"fused: {what}, {functional.instructions(call.input)}"


def _checked(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None,
    linear_bias: Tensor | None,
    settings: Any,
    *limits: int | None,
) -> _Call:
    for tensor, name in ((input, "input"), (linear_weight, "linear_weight")):
        if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
            what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"fused_ce: expected {name} to be a floating tensor, got {what}.")
    if input.dim() < 1:
        raise ValueError("fused_ce: expected input of shape (..., H), got a scalar.")
    if linear_weight.dim() != 2 or linear_weight.shape[1] != input.shape[-1]:
        raise ValueError(
            f"fused_ce: expected linear_weight of shape (V, {input.shape[-1]}), one column for "
            f"each feature of the input, got {tuple(linear_weight.shape)}."
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        raise ValueError(
            f"fused_ce: expected linear_bias of shape {tuple(linear_weight.shape[:1])}, "
            f"got {tuple(linear_bias.shape)}."
        )
    batch = input.shape[:-1]
    check_target(target, batch)
    check_limits(*limits)
    return _Call(
        input.reshape(-1, input.shape[-1]) if 0 not in input.shape else input,
        linear_weight,
        None if target is None else target.reshape(-1),
        linear_bias,
        checked_settings(*settings),
        Limits(*limits),
        batch,
    )


def _reason(call: _Call) -> str | None:
    """Why the chunks cannot take this call; None if they can."""
    layer = [call.input, call.linear_weight, call.linear_bias]
    names = ("input", "linear weight", "linear bias", "target")
    for tensor, name in zip((*layer, call.target), names, strict=True):
        reason = None if tensor is None else foreign(tensor, name)
        if reason is not None:
            return reason
    reason = recording_reason()
    input = call.input
    if reason is None and not input.is_cpu:
        reason = ops.lacking(input.device.type, input.get_device())
    if reason is not None:
        return reason
    dtype = logits_dtype(input)
    if dtype not in LOGIT_DTYPES:
        return f"there are no kernels for {dtype} logits"
    for tensor in layer:
        if tensor is not None and (tensor.device, logits_dtype(tensor)) != (input.device, dtype):
            return "the layer's tensors differ in device or dtype"
    if isinstance(call.settings.temperature, Tensor):
        return "the temperature is a tensor"
    if 0 in input.shape or 0 in call.linear_weight.shape:
        return "there are no logits"
    return None


def _fused(call: _Call, entropy: bool, argmax: bool) -> SoftmaxStats:
    layer = (call.input, call.linear_weight, call.linear_bias)
    keeps = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in layer)
    size, budget, _ = call.limits
    *found, _ = linear_operators.forward(
        call.input,
        call.linear_weight,
        call.target,
        call.linear_bias,
        logits_dtype(call.input),
        size,
        budget,
        *call.settings,
        entropy,
        argmax,
        keeps,
    )
    wanted = (call.target is not None, entropy, True, argmax)
    return SoftmaxStats(
        *(v.reshape(call.batch) if w else None for v, w in zip(found, wanted, strict=True))
    )
