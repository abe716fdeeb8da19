"""Stock's kernels of log-softmax and of the negative log-likelihood, writing into huge pages.

The C library maps every large block anew, and then half of a kernel's time may go to the page
faults of the memory that it writes. torch's own operators take memory to write in, so that nothing
of theirs is repeated here: the numbers are stock's, bit for bit. What is differentiated further has
stock's operators and their derivatives.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import ops
from .eligibility import backward_needs_stock

# From here on glibc never keeps a freed block for the next call (DEFAULT_MMAP_THRESHOLD_MAX).
LEAST_BYTES = 1 << 25

_aten = torch.ops.aten
_log_softmax = _aten._log_softmax.out
_log_softmax_backward = _aten._log_softmax_backward_data
_nll_loss, _nll_loss_backward = _aten.nll_loss_forward.default, _aten.nll_loss_backward
_nll_loss2d, _nll_loss2d_backward = _aten.nll_loss2d_forward.default, _aten.nll_loss2d_backward


def fresh(shape: tuple, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory that will be written as a whole; on the CPU without most of its page faults."""
    memory = like.new_empty(shape, dtype=dtype)
    ops.advise_huge_pages(memory)
    return memory


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == dtype else fresh(tensor.shape, tensor, dtype).copy_(tensor)


def _must_be_stocks(grad_output: Tensor) -> bool:
    """Whether a backward is part of a graph, or something else than numbers in memory arrives."""
    return (
        torch.compiler.is_compiling()
        or backward_needs_stock(grad_output)
        or type(grad_output) is not Tensor
    )


def _forward(input: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    result = fresh(input.shape, input, dtype)
    return _log_softmax(_as(dtype, input), dim, False, out=result)


class _LogSoftmax(Function):
    """As in stock, the log-probabilities are what is kept."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        result = _forward(input, dim, dtype)
        ctx.save_for_backward(result)
        ctx.set_materialize_grads(False)
        ctx.dim, ctx.dtype = dim, input.dtype
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple:
        if grad_output is None:
            return None, None, None
        (result,) = ctx.saved_tensors
        arguments = grad_output, result, ctx.dim, result.dtype
        if _must_be_stocks(grad_output):
            return _log_softmax_backward.default(*arguments).to(ctx.dtype), None, None
        grad = fresh(result.shape, result, result.dtype)
        return _as(ctx.dtype, _log_softmax_backward.out(*arguments, out=grad)), None, None


class _NllLoss(Function):
    """Of contiguous log-probabilities (N, C) or (N, C, H, W)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, *options: Any) -> Tensor:
        weight, *numbers = options
        function = _nll_loss if input.dim() == 2 else _nll_loss2d
        loss, total_weight = function(input, target, *options)
        ctx.save_for_backward(input, target, weight, total_weight)
        ctx.set_materialize_grads(False)
        ctx.numbers = numbers
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple:
        nothing_else = (None,) * 4
        if grad_output is None:
            return None, *nothing_else
        input, target, weight, total_weight = ctx.saved_tensors
        arguments = grad_output, input, target, weight, *ctx.numbers, total_weight
        function = _nll_loss_backward if input.dim() == 2 else _nll_loss2d_backward
        if _must_be_stocks(grad_output):
            return function.default(*arguments), *nothing_else
        grad = fresh(input.shape, input, input.dtype)
        return function.grad_input(*arguments, grad_input=grad), *nothing_else


def log_softmax(input: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    if input.requires_grad and torch.is_grad_enabled():
        return _LogSoftmax.apply(input, dim, dtype)
    return _forward(input, dim, dtype)


def nll_loss(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> Tensor:
    """Of log-probabilities that require grad."""
    if input.dim() not in (2, 4):  # as stock has it
        input = input.view(*input.shape[:2], 1, -1)
        rows = target.reshape(len(target), 1, -1)
        loss = _NllLoss.apply(input, rows, weight, reduction, ignore_index)
        return loss.view(target.shape) if loss.dim() > 0 else loss
    return _NllLoss.apply(input, target, weight, reduction, ignore_index)
