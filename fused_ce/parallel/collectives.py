"""What moves between the ranks of a process group; no other file names ``torch.distributed``.

The forward has one all-gather. The formula that is differentiated to any order has sums over the
ranks, as two Functions that are each other's adjoint: torch's own differentiable all-reduce sums
what arrives for a value that every rank has, which is as many times too much as there are ranks.
The module is imported when a call first names a group.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

_functional = torch.ops._c10d_functional


class Group(NamedTuple):
    """A process group as its operators name it, and this process within it."""

    name: str
    size: int
    rank: int


def group_of(process_group: Any) -> Group:
    """Raises where this process is none of the group's."""
    if isinstance(process_group, dist.DeviceMesh):
        if process_group.ndim != 1:
            raise ValueError(
                "fused_ce: process_group must be a ProcessGroup or a mesh of one dimension, got a "
                f"mesh of {process_group.ndim}; pass mesh.get_group(dimension)."
            )
        process_group = process_group.get_group()
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "fused_ce: process_group must be a torch.distributed.ProcessGroup, got "
            f"{type(process_group).__name__}."
        )
    rank = dist.get_rank(process_group)
    if rank < 0:
        raise ValueError(
            "fused_ce: this process is not in the process_group; call the loss in those that are."
        )
    return Group(process_group.group_name, dist.get_world_size(process_group), rank)


def gathered(tensor: Tensor, group: Group) -> Tensor:
    """The tensors of all ranks in their order, one after another along the first dimension."""
    return waited(started_gather(tensor, group))


def total(tensor: Tensor, group: Group) -> Tensor:
    """The sum over the ranks, of what has no derivative."""
    return _reduced(tensor, "sum", group)


def started_gather(tensor: Tensor, group: Group) -> Tensor:
    """As :func:`gathered`, of what may be used only once it has been waited for."""
    if group.size == 1:
        return tensor
    return _functional.all_gather_into_tensor(tensor, group.size, group.name)


def started_sum(tensor: Tensor, group: Group) -> Tensor:
    """As :func:`total`, likewise."""
    if group.size == 1:
        return tensor
    return _functional.all_reduce(tensor, "sum", group.name)


def waited(started: Tensor) -> Tensor:
    return _functional.wait_tensor(started)


def _reduced(tensor: Tensor, operation: str, group: Group) -> Tensor:
    if group.size == 1:
        return tensor.clone()
    found = _functional.all_reduce(tensor.contiguous(), operation, group.name)
    return _functional.wait_tensor(found)


def largest(tensor: Tensor, group: Group) -> Tensor:
    """The largest over the ranks, for which there is no derivative."""
    return _reduced(tensor.detach(), "max", group)


class _Summed(Function):
    """Of a value of each rank, their sum, which every rank has."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return _reduced(tensor, "sum", group)

    @staticmethod
    def backward(ctx, grad_output):
        return _Shared.apply(grad_output, ctx.group), None


class _Shared(Function):
    """Of a value that every rank has, this rank's use of it."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad_output):
        return _Summed.apply(grad_output, ctx.group), None


def summed(tensor: Tensor, group: Group) -> Tensor:
    """The sum over the ranks of what each has."""
    return _Summed.apply(tensor, group)


def shared(tensor: Tensor, group: Group) -> Tensor:
    """What every rank has, for a computation in which each has another part."""
    return _Shared.apply(tensor, group)
