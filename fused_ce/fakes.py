"""The operators' fake kernels: the shapes, dtypes and strides that ``torch.compile`` plans with.

They check nothing: ``eligibility`` has asked what they rely on.
"""

import math

import torch
from torch import Tensor
from torch.library import register_fake

from .options import NONE, Options


def row_shape(shape: tuple) -> tuple:
    """The shape of the rows of logits of a shape: without the classes."""
    return shape[:1] + shape[2:] if len(shape) > 1 else shape[:0]


def class_dim(input: Tensor) -> int:
    """Where the operators have the classes."""
    return min(input.dim() - 1, 1)


def _loss(input: Tensor, *options) -> Tensor:
    options = Options(*options)
    shape = row_shape(input.shape) if options.reduction == NONE else ()
    return input.new_empty(shape, dtype=options.loss_dtype)


def _stats(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The statistics of the rows, and the totals."""
    numbers = 4 if target.is_floating_point() else 2
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    stats = input.new_empty((numbers, math.prod(row_shape(input.shape))), dtype=dtype)
    return stats, input.new_empty(3, dtype=torch.float64)


def _is_dense(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return True
    expected = 1
    dims = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(dim for dim in dims if dim[1] != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def empty_gradient(like: Tensor) -> Tensor:
    """With the strides of what it is a gradient of if those are dense, else contiguous."""
    if _is_dense(like):
        return torch.empty_like(like)
    return torch.empty_like(like, memory_format=torch.contiguous_format)


@register_fake("fused_ce::forward")
def _(input, target, *options):
    return _loss(input, *options)


@register_fake("fused_ce::forward_grad_")
def _(input, target, grad_output=None, *options):
    return _loss(input, *options)


@register_fake("fused_ce::forward_stats")
@register_fake("fused_ce::graph_forward")
def _(input, target, *options):
    return _loss(input, *options), *_stats(input, target)


@register_fake("fused_ce::forward_grad")
def _(input, target, *options):
    return _loss(input, *options), *_stats(input, target), empty_gradient(input)


@register_fake("fused_ce::backward")
@register_fake("fused_ce::graph_backward")
@register_fake("fused_ce::shard_backward")
def _(input, *_):
    return empty_gradient(input)


@register_fake("fused_ce::backward_target")
@register_fake("fused_ce::graph_backward_target")
@register_fake("fused_ce::shard_backward_target")
def _(input, target, *_):
    return empty_gradient(target)


@register_fake("fused_ce::backward_logit_scale")
def _(input, *_):
    return input.new_empty((), dtype=torch.float64)


@register_fake("fused_ce::backward_")
@register_fake("fused_ce::rescale_")
@register_fake("fused_ce::scale_")
@register_fake("fused_ce::shard_backward_")
def _(written, *_):
    return written


# Of sharded classes (csrc/shard_problem.h): what a packet has of each row, and columns after the
# rows.
_SHARD_NUMBERS, _SHARD_COLUMNS = 4, 3


@register_fake("fused_ce::shard_forward")
def _(input, *_):
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    columns = math.prod(row_shape(input.shape)) + _SHARD_COLUMNS
    return input.new_empty((1, _SHARD_NUMBERS, columns), dtype=dtype)


@register_fake("fused_ce::shard_merge")
def _(packets, input, target, num_classes, *options):
    stats = input.new_empty((3, math.prod(row_shape(input.shape))), dtype=torch.float64)
    return _loss(input, *options), stats, input.new_empty(3, dtype=torch.float64)


@register_fake("fused_ce::check_overwritable")
@register_fake("fused_ce::advise_huge_pages")
def _(*_):
    return None
