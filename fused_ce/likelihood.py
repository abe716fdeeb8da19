"""``log_softmax`` and ``nll_loss`` with the signatures of ``torch.nn.functional``'s.

A kernel that does one of them alone reads and writes as much as stock's does, so stock's it is. Of
large tensors most of its time goes to the memory that it writes, which ``huge_pages`` makes ready;
all else is stock's function, as is whatever differentiates, records or overrides it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.nn import _reduction as _Reduction
from torch.overrides import (
    handle_torch_function,
    has_torch_function_unary,
    has_torch_function_variadic,
)

from . import huge_pages, stock
from .eligibility import LOGIT_DTYPES, OVERRIDDEN, foreign, overrides, recording_reason
from .explaining import explains
from .scripting import stocks_or_refusal
from .signatures import bound

_HUGE_PAGES = "torch's kernel, writing into huge pages that are asked for"
_PLAIN = (Tensor, Parameter)
_implicit_dim = F._get_softmax_dim
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


def log_softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Computes the logarithm of the softmax along a dimension; a drop-in for
    :func:`torch.nn.functional.log_softmax`.

    .. math::
        \text{log\_softmax}(x)_c = x_c - \max_k x_k - \log \sum_k \exp(x_k - \max_k x_k)

    The numbers, the errors and the derivatives of any order are torch's own. On the CPU results of
    32 MiB and more are written into huge pages, forward and backward, without most of the page
    faults that fresh memory costs.

    The loss ``nll_loss(log_softmax(input, 1), target)`` is :func:`fused_ce.cross_entropy`, which
    takes one pass and holds no log-probabilities. The pair is not turned into it, since whoever has
    the log-probabilities may ask for their own gradient, or change it, until the backward has run.

    Args:
        input (Tensor): logits, of any shape.
        dim (int): the dimension of the classes. Without it torch chooses one, and warns.
        dtype (torch.dtype, optional): that of the result, to which the input is converted first.

    Shape:
        - Output: the input's shape, contiguous.

    Raises:
        Exception: what torch raises for the same call.

    Example::

        >>> import fused_ce
        >>> import torch
        >>> log_prob = fused_ce.log_softmax(torch.tensor([[2.0, 0.5, 0.1]]), dim=1)
        >>> print(f"{-log_prob[0, 0].item():.4f}")
        0.3168
    """
    if has_torch_function_unary(input):
        function = _torchs_log_softmax if overrides(input) else log_softmax
        return handle_torch_function(
            function, (input,), input, dim=dim, _stacklevel=_stacklevel, dtype=dtype
        )
    if dim is None:
        dim = _implicit_dim("log_softmax", input.dim(), _stacklevel)
    if _may_be_large(input) and _stock_takes_log_softmax(input, dim, dtype) is None:
        return huge_pages.log_softmax(input, dim, dtype or input.dtype)
    return input.log_softmax(dim) if dtype is None else input.log_softmax(dim, dtype=dtype)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Computes the negative log-likelihood of the targets; a drop-in for
    :func:`torch.nn.functional.nll_loss`.

    With class weights :math:`w` the loss of a row :math:`n` that is not ignored is
    :math:`-w_{y_n} x_{n,y_n}`, and ``'mean'`` divides their sum by :math:`\sum_n w_{y_n}`.

    The numbers, the errors and the derivatives of any order are torch's own. On the CPU a gradient
    of 32 MiB and more, nearly all of it zeros, is written into huge pages, without most of the page
    faults that fresh memory costs. See :func:`fused_ce.log_softmax` for the two together.

    Args:
        input (Tensor): log-probabilities.
        target (Tensor): class indices.
        weight (Tensor, optional): a weight for each class.
        size_average, reduce: deprecated, as in torch.
        ignore_index (int): a class index that marks a row to leave out. Default: ``-100``
        reduction (str): ``'none'`` | ``'mean'`` | ``'sum'``. Default: ``'mean'``

    Shape:
        - Input: :math:`(C)`, :math:`(N, C)` or :math:`(N, C, d_1, ..., d_K)`.
        - Target: the input's shape without :math:`C`.
        - Output: a scalar, or the target's shape for ``reduction='none'``.

    Raises:
        Exception: what torch raises for the same call, among it ``IndexError`` for a target that is
            no class.

    Example::

        >>> import fused_ce
        >>> import torch
        >>> log_prob = fused_ce.log_softmax(torch.tensor([[2.0, 0.5, 0.1]]), dim=1)
        >>> print(f"{fused_ce.nll_loss(log_prob, torch.tensor([0])).item():.4f}")
        0.3168
    """
    if has_torch_function_variadic(input, target, weight):
        tensors = (input, target, weight)
        function = _torchs_nll_loss if any(map(overrides, tensors)) else nll_loss
        return handle_torch_function(
            function,
            tensors,
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
        )
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    arguments = input, target, weight, _Reduction.get_enum(reduction), ignore_index
    if _may_be_large(input) and _stock_takes_nll_loss(*arguments) is None:
        return huge_pages.nll_loss(*arguments)
    return stock.nll_loss_nd(*arguments)


_torchs_log_softmax = stock.torchs_own("log_softmax", log_softmax)
_torchs_nll_loss = stock.torchs_own("nll_loss", nll_loss)

log_softmax.__prepare_scriptable__ = stocks_or_refusal(
    log_softmax, _torchs_log_softmax, "torch.nn.functional.log_softmax", "both"
)
nll_loss.__prepare_scriptable__ = stocks_or_refusal(
    nll_loss, _torchs_nll_loss, "torch.nn.functional.nll_loss", "both"
)


@explains(log_softmax)
def _explain_log_softmax(*args: Any, **kwargs: Any) -> str:
    call = bound(log_softmax, args, kwargs)
    input, dim = call["input"], call["dim"]
    if overrides(input):
        return f"stock: {OVERRIDDEN}"
    dim = 0 if dim is None else dim  # whichever torch chooses, there is one
    return f"stock: {_stock_takes_log_softmax(input, dim, call['dtype']) or _HUGE_PAGES}"


@explains(nll_loss)
def _explain_nll_loss(*args: Any, **kwargs: Any) -> str:
    call = bound(nll_loss, args, kwargs)
    tensors = call["input"], call["target"], call["weight"]
    if any(map(overrides, tensors)):
        return f"stock: {OVERRIDDEN}"
    reason = _stock_takes_nll_loss(*tensors, 0, call["ignore_index"])
    return f"stock: {reason or _HUGE_PAGES}"


def _may_be_large(input: Tensor) -> bool:
    """All that a small call waits for, and all that a graph sees, where a size would be a guard."""
    return (
        type(input) in _PLAIN
        and not _is_dynamo_compiling()
        and torch._C._get_tracing_state() is None
        and input.numel() >= huge_pages.LEAST_BYTES // 8
    )


_OTHERS = "the call is none of the usual ones, which alone are given memory"


def _stock_takes_log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None) -> str | None:
    """Why stock's function takes a call as it is; None where it is given memory to write in."""
    reason = _small_or_special("result", input, dtype)
    if reason is None and (type(dim) is not int or not -input.dim() <= dim < input.dim()):
        return _OTHERS
    return reason


def _stock_takes_nll_loss(
    input: Tensor, target: Tensor, weight: Tensor | None, _: int, ignore_index: int
) -> str | None:
    """The same of the loss, whose gradient is all that is large."""
    reason = _small_or_special("gradient", input, None)
    if reason is not None:
        return reason
    if not input.requires_grad or not torch.is_grad_enabled():
        return "there is no gradient to write"
    if torch.is_autocast_enabled("cpu"):
        return "autocast chooses the type"
    if not _is_plain(target) or target.shape != (*input.shape[:1], *input.shape[2:]):
        return _OTHERS
    if weight is not None and (not _is_plain(weight) or weight.requires_grad):
        return _OTHERS
    if type(ignore_index) is not int or input.dim() < 2 or not input.is_contiguous():
        return _OTHERS
    return None


def _small_or_special(what: str, input: Tensor, dtype: torch.dtype | None) -> str | None:
    """Why there is nothing large to write in the CPU's own memory; None if there is."""
    if not isinstance(input, Tensor):
        return "the input is not a tensor"
    dtype = dtype or input.dtype
    if input.numel() * dtype.itemsize < huge_pages.LEAST_BYTES:
        return f"a {what} of less than 32 MiB finds memory at hand"
    if not _is_plain(input):
        return foreign(input, "logits") or "the memory is not the CPU's own"
    if not LOGIT_DTYPES.issuperset((dtype, input.dtype)):
        return _OTHERS
    if torch.are_deterministic_algorithms_enabled():
        return "torch.use_deterministic_algorithms has fresh memory filled"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a TorchDispatchMode looks on"
    return recording_reason()


def _is_plain(tensor: object) -> bool:
    return (
        type(tensor) in _PLAIN
        and tensor.layout is torch.strided
        and tensor.is_cpu
        and not tensor.is_nested
    )
