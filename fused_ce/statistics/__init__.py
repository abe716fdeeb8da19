"""``softmax_stats``: what a row of logits says of its distribution, in one pass over it.

The kernels take the classes in dimension 1, where a view puts them. ``reference`` has the same in
plain torch, for what the kernels do not take and for derivatives of higher order.
"""

from typing import Any

import torch
from torch import Tensor
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
from ..options import integer, real
from ..scripting import refusal
from ..signatures import bound, takes_arguments_of
from ..stock import INDEX_DTYPES
from . import eager, graph
from .reference import Settings, SoftmaxStats, reference

_LEAST, _LARGEST = 1e-30, 1e30  # of temperature and softcap, for which they are normal floats
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1


def softmax_stats(
    input: Tensor,
    target: Tensor | None = None,
    *,
    dim: int = -1,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = True,
    argmax: bool = False,
) -> SoftmaxStats:
    r"""Computes the log-probability of the target, the entropy, the logsumexp and the most probable
    class of each row of logits, in one pass over them.

    With :math:`p` the softmax of the logits, after the temperature and the soft cap,

    .. math::
        \text{log\_prob} = \log p_t, \quad
        \text{entropy} = -\sum_c p_c \log p_c, \quad
        \text{logsumexp} = \log \sum_c \exp(x_c).

    The first three are differentiable, to any order. No copy of the logits is made in any layout,
    and none of their size is kept: the backward reads the logits once more and writes their
    gradient. What is not used in a loss costs nothing there.

    Args:
        input (Tensor): logits, of float32, float64, bfloat16 or float16, in any strides.
        target (Tensor, optional): class indices (int64, and also int32, int16 or uint8).
        dim (int): the dimension of the classes. Default: ``-1``
        temperature (float): what the logits are divided by. A tensor of one element may require
            grad. Default: ``1.0``
        softcap (float, optional): replaces the divided logits by
            ``softcap * tanh(logits / softcap)``. A logit of -inf becomes ``-softcap``, so a class
            that was masked with it counts again.
        ignore_index (int): a target that marks a row to leave out. Nothing of such a row is used:
            its results are 0, its argmax is -1 and its gradient is zero. Default: ``-100``
        entropy (bool): whether to compute the entropy. Default: ``True``
        argmax (bool): whether to find the most probable class, the first of several. Default:
            ``False``

    Returns:
        SoftmaxStats: a named tuple of ``log_prob``, ``entropy``, ``logsumexp`` and ``argmax``, each
        of the input's shape without ``dim``, or ``None`` where it was not asked for: ``log_prob``
        without a target, for one. They are in float32 for the half types.

    Raises:
        IndexError: for a target that is no class, before anything is written, and for a ``dim``
            that the input does not have.
        TypeError, ValueError: for other arguments that cannot be right.

    Example::

        >>> import fused_ce
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0, 0.1], [0.5, 2.0, 0.3]], requires_grad=True)
        >>> stats = fused_ce.softmax_stats(logits, torch.tensor([0, 1]), argmax=True)
        >>> [f"{value:.4f}" for value in stats.log_prob.tolist()]
        ['-0.4170', '-0.3406']
        >>> [f"{value:.4f}" for value in stats.entropy.tolist()]
        ['0.8467', '0.7996']
        >>> stats.argmax.tolist()
        [0, 1]
        >>> (stats.log_prob.sum() + 0.01 * stats.entropy.mean()).backward()
    """
    options = {
        "dim": dim,
        "temperature": temperature,
        "softcap": softcap,
        "ignore_index": ignore_index,
        "entropy": entropy,
        "argmax": argmax,
    }
    overridden = False
    if has_torch_function_variadic(input, target):
        overridden = overrides(input) or overrides(target)
        if not overridden:  # a mode: a device context, say
            return handle_torch_function(softmax_stats, (input, target), input, target, **options)
    dim, settings = _checked(input, target, dim, temperature, softcap, ignore_index)
    reason = OVERRIDDEN if overridden else _reason(input, target, settings)
    if reason is None:
        return _fused(input, target, dim, settings, entropy, argmax)
    stats = reference(input, target, dim, settings, entropy=entropy, argmax=argmax)
    if fallback.is_on:
        fallback.warn("softmax_stats", reason)
    return stats


softmax_stats.__prepare_scriptable__ = refusal(
    "softmax_stats", "torch.nn.functional.log_softmax", "both"
)


@explains(softmax_stats)
@takes_arguments_of(softmax_stats)
def explain_stats(*args: Any, **kwargs: Any) -> str:
    """Says how :func:`softmax_stats` would take this call, without computing anything.

    Returns ``"fused: "`` with the instruction set in use, or ``"stock: "`` with the reason why
    plain operations of torch compute the statistics.

    Example::

        >>> import fused_ce
        >>> import torch
        >>> fused_ce.explain_stats(torch.randn(3, 5).to_sparse())
        'stock: the logits are sparse'
        >>> fused_ce.explain_stats(torch.randn(3, 5)).split(":")[0]
        'fused'
    """
    call = bound(softmax_stats, args, kwargs)
    input, target = call["input"], call["target"]
    if overrides(input) or overrides(target):
        return f"stock: {OVERRIDDEN}"
    numbers = (call[name] for name in ("dim", "temperature", "softcap", "ignore_index"))
    _, settings = _checked(input, target, *numbers)
    reason = _reason(input, target, settings)
    if reason is not None:
        return f"stock: {reason}"
    moment = "recomputed in backward" if _differentiates(input) else "no gradient"
    return f"fused: {moment}, {functional.instructions(input)}"


def _checked(input: Tensor, target: Tensor | None, dim: int, *numbers: Any) -> tuple[int, Settings]:
    """The dimension, counted from the first, and the settings; raises for what cannot be right."""
    if not isinstance(input, Tensor):
        raise TypeError(f"fused_ce: expected input to be a tensor, got {type(input).__name__}.")
    if not input.dtype.is_floating_point:
        raise TypeError(f"fused_ce: expected logits of a floating type, got {input.dtype}.")
    dims = input.dim()
    if dims == 0:
        raise ValueError("fused_ce: expected input with a dimension of classes, got a scalar.")
    dim = integer(dim)
    if not -dims <= dim < dims:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-dims}, {dims - 1}], "
            f"but got {dim})"
        )
    dim %= dims
    check_target(target, (*input.shape[:dim], *input.shape[dim + 1 :]))
    return dim, checked_settings(*numbers)


def check_target(target: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raises unless the target, if there is one, has an index for each row."""
    if target is None:
        return
    if not isinstance(target, Tensor):
        raise TypeError(f"fused_ce: expected target to be a tensor, got {type(target).__name__}.")
    if target.dtype not in INDEX_DTYPES:
        raise TypeError(
            "fused_ce: expected target to hold class indices (int64, int32, int16 or uint8), "
            f"got {target.dtype}."
        )
    if target.shape != shape:
        raise ValueError(
            f"fused_ce: expected target of shape {tuple(shape)}, one index for each row of "
            f"logits, got {tuple(target.shape)}."
        )


def checked_settings(temperature: Any, softcap: Any, ignore_index: Any) -> Settings:
    return Settings(
        positive("temperature", temperature),
        0.0 if softcap is None else positive("softcap", softcap, or_none=True),
        _index(ignore_index),
    )


def positive(name: str, number: Any, or_none: bool = False) -> Any:
    """A number, or a tensor of one element where it can be none but that."""
    if isinstance(number, Tensor):
        if number.numel() != 1 or or_none:
            raise ValueError(
                f"fused_ce: expected {name} to be a number, got a tensor of shape "
                f"{tuple(number.shape)}."
            )
        # That of another device would have to be waited for.
        number = real(number) if number.is_cpu else number
        if isinstance(number, Tensor):
            return number.reshape(())
    number = real(number)
    if not isinstance(number, float | int | torch.SymFloat) or not _LEAST <= number <= _LARGEST:
        raise ValueError(
            f"fused_ce: expected {name} to be a positive number from {_LEAST} to {_LARGEST}"
            f"{', or None' * or_none}, got {number!r}."
        )
    return number


def _index(number: Any) -> int:
    index = integer(number)
    if type(index) is not int or not _INT64_MIN <= index <= _INT64_MAX:
        raise TypeError(f"fused_ce: expected ignore_index to be an int, got {number!r}.")
    return index


def _reason(input: Tensor, target: Tensor | None, settings: Settings) -> str | None:
    """Why the kernels cannot take this call; None if they can."""
    for tensor, name in ((input, "logits"), (target, "target")):
        reason = None if tensor is None else foreign(tensor, name)
        if reason is not None:
            return reason
    reason = recording_reason()
    if reason is None and not input.is_cpu:
        reason = ops.lacking(input.device.type, input.get_device())
    if reason is not None:
        return reason
    if input.dtype not in LOGIT_DTYPES:
        return f"there are no kernels for {input.dtype} logits"
    if isinstance(settings.temperature, Tensor):
        return "the temperature is a tensor"
    if input.dim() > MAX_DIMS:
        return f"the logits have more than {MAX_DIMS} dimensions"
    if 0 in input.shape:
        return "there are no logits"
    return None


def _differentiates(input: Tensor) -> bool:
    return input.requires_grad and torch.is_grad_enabled()


def _fused(
    input: Tensor, target: Tensor | None, dim: int, settings: Settings, entropy: bool, argmax: bool
) -> SoftmaxStats:
    if input.dim() > 1 and dim != 1:
        input = input.movedim(dim, 1)
    if torch.compiler.is_compiling():
        found = graph.statistics(input, target, settings, entropy, argmax)
    elif _differentiates(input):
        found = eager.statistics(input, target, settings, entropy, argmax)
    else:
        found = ops.softmax_stats(input, target, *settings, entropy, argmax, False)
    wanted = (target is not None, entropy, True, argmax)
    return SoftmaxStats(*(v if w else None for v, w in zip(found, wanted, strict=False)))
