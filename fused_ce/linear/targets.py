"""Probabilities of several batch dimensions of which no view makes one.

An operator is given them as they are, without the dimensions of size 1: then the product of the
others reaches the number of rows at one place only, and says where they end. A chunk's rows are a
view if they lie within one row of the outer dimensions, and else a copy.
"""

import math

import torch
from torch import Tensor


def flattened(target: Tensor, dims: int) -> Tensor:
    """The first `dims` dimensions as one if that takes no copy, else without those of size 1."""
    inner = target.shape[dims:]
    if not target.is_floating_point() or _is_one(target, dims):
        return target.reshape(math.prod(target.shape[:dims]), *inner)
    return target.reshape([size for size in target.shape[:dims] if size != 1] + [*inner])


def _is_one(target: Tensor, dims: int) -> bool:
    """Whether a view makes one of these dimensions. What has no strides is left to others."""
    if target.layout is not torch.strided or target.numel() == 0:
        return True
    steps = zip(target.shape[:dims], target.stride()[:dims], strict=True)
    steps = [step for step in steps if step[0] != 1]
    pairs = zip(steps, steps[1:], strict=False)
    return all(outer[1] == inner[0] * inner[1] for outer, inner in pairs)


def batch_dims(target: Tensor, rows: int) -> int:
    """How many of the target's dimensions are those of the batch."""
    dims, found = 1, target.shape[0]
    while found != rows:
        found *= target.shape[dims]
        dims += 1
    return dims


def example(target: Tensor, rows: int) -> Tensor:
    """A target of one batch dimension with the same type and rows of the same shape, that is there
    to be asked about."""
    dims = batch_dims(target, rows)
    return target[(0,) * dims].expand(rows, *target.shape[dims:]) if dims > 1 else target


def of_one_dimension(target: Tensor, rows: int) -> Tensor:
    return target.reshape(rows, *target.shape[batch_dims(target, rows) :])


class Rows:
    """What `target[rows]` is for a target of one batch dimension, for one of several.

    A copy is in memory that all chunks share: it holds until another is asked for.
    """

    def __init__(self, target: Tensor, dims: int) -> None:
        self._target, self._dims = target, dims
        self._memory, self._held = target.new_empty(0), None

    def numel(self) -> int:
        return self._target.numel()

    def __getitem__(self, rows: slice) -> Tensor:
        part, dims, start, count = self._target, self._dims, rows.start, rows.stop - rows.start
        while dims > 1:
            outer, inner = divmod(start, math.prod(part.shape[1:dims]))
            if inner + count > math.prod(part.shape[1:dims]):
                return self._copied(rows)
            part, dims, start = part[outer], dims - 1, inner
        return part[start : start + count]

    def _copied(self, rows: slice) -> Tensor:
        count, inner = rows.stop - rows.start, self._target.shape[self._dims :]
        if count > len(self._memory):
            self._memory = self._target.new_empty((count, *inner))
        found = self._memory[:count]
        if self._held != (rows.start, rows.stop):
            _copy(self._target, self._dims, rows.start, found)
            self._held = rows.start, rows.stop
        return found


def _copy(target: Tensor, dims: int, start: int, out: Tensor) -> None:
    """Writes as many rows as `out` has: the end of an outer one, whole ones, a beginning."""
    if dims == 1:
        out.copy_(target[start : start + len(out)])
        return
    batch, inner = target.shape[1:dims], target.shape[dims:]
    size = math.prod(batch)
    end = min(-start % size, len(out))
    first, whole = -(-start // size), (len(out) - end) // size
    if end:
        _copy(target[start // size], dims - 1, start % size, out[:end])
    if whole:
        into = out[end : end + whole * size].view(whole, *batch, *inner)
        into.copy_(target[first : first + whole])
    if end + whole * size < len(out):
        _copy(target[first + whole], dims - 1, 0, out[end + whole * size :])
