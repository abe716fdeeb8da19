"""``cross_entropy`` of a ``DTensor``, which says itself how it is sharded.

The local parts go to the loss of plain tensors, over the group of the mesh dimension that shards
the classes, if there is one. What the loss is on the other dimensions is a matter of placements: of
sharded rows it is a sum to come, and a mean of them divides by the weights of all.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from .. import functional, parallel
from ..extensions import Extensions
from ..fakes import row_shape
from ..options import MEAN, NONE, Options
from .collectives import Group, group_of, total
from .partition import Sharding


def reason(input: DTensor, target: Any, options: Options, given: Extensions) -> str | None:
    """Why torch's function takes this call; None if it is ours."""
    for placement in input.placements:
        if type(placement) not in (Shard, Replicate):
            return f"the logits are a DTensor with the placement {placement}"
    if len(_of_classes(input)) > 1:
        return "two mesh dimensions shard the classes of the logits"
    if not isinstance(target, Tensor):
        return "the target is not a tensor"
    wanted = input.placements if target.is_floating_point() else _of_rows(input)
    others = {"target": (target, wanted), "sample_weight": (given.sample_weight, _of_rows(input))}
    others["weight"] = options.weight, None
    for name in ("denominator", "logit_scale"):
        others[name] = getattr(given, name), None
    for name, (tensor, placements) in others.items():
        if not isinstance(tensor, Tensor):
            continue
        if isinstance(tensor, DTensor):
            if tensor.device_mesh != input.device_mesh:
                return f"the {name} is on another mesh than the logits"
        elif placements is not None and not all(p.is_replicate() for p in placements):
            return f"the {name} is no DTensor, and would be sharded as the logits are"
        if tensor.requires_grad and torch.is_grad_enabled() and name != "target":
            return f"the logits are a DTensor, and the {name} requires grad"
    return None


def local_arguments(
    input: DTensor, target: Tensor, options: Options, given: Extensions
) -> dict[str, Any]:
    """The arguments of the same call on the parts of this rank. Target and weights are moved where
    they have to be, if they are elsewhere."""
    rows = _of_rows(input)
    indices = not target.is_floating_point()
    target = _local(target, rows if indices else input.placements)
    sample_weight = given.sample_weight
    if sample_weight is not None:
        sample_weight = _local(sample_weight, rows)
    found = given._asdict() | {
        "input": input.to_local(),
        "target": target,
        "weight": _whole(options.weight),
        "sample_weight": sample_weight,
        "denominator": _whole(given.denominator),
        "logit_scale": _whole(given.logit_scale),
    }
    divides = options.reduction == MEAN and given.denominator is None
    groups = _row_groups(input)
    if divides and groups:
        found["denominator"] = _denominators(found, options.ignore_index, groups)
    for dim in _of_classes(input):
        found["process_group"] = input.device_mesh.get_group(dim)
        found["num_classes"] = input.shape[_class_dim(input)]
    return found


def placed(loss: Tensor, input: DTensor, reduction: int) -> DTensor:
    """The loss of this rank as what it is of the whole."""
    rows = _of_rows(input)
    mesh = input.device_mesh
    if reduction != NONE:
        rows = [Partial("sum") if p.is_shard() else p for p in rows]
        return DTensor.from_local(loss, mesh, rows, run_check=False)
    at = _class_dim(input)
    shape = torch.Size(n for d, n in enumerate(input.shape) if d != at)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(loss, mesh, rows, run_check=False, shape=shape, stride=stride)


def explain(
    input: DTensor,
    target: Tensor,
    options: Options,
    given: Extensions,
    grad_in_forward: bool,
    inplace: bool,
) -> str:
    """As :func:`fused_ce.explain` of a call that is ours; moves nothing."""
    local = input.to_local()
    shape = row_shape(local.shape) if not target.is_floating_point() else local.shape
    own_target = torch.empty((), dtype=target.dtype, device=local.device).expand(shape)
    own_target.requires_grad_(target.requires_grad)
    weight = given.sample_weight
    if weight is not None:
        weight = torch.empty((), dtype=weight.dtype, device=local.device).expand(shape)
    given = given._replace(sample_weight=weight)
    for dim in _of_classes(input):
        sharding = Sharding(input.device_mesh.get_group(dim), input.shape[_class_dim(input)])
        return parallel.explain(local, own_target, options, given, sharding, inplace)
    return functional.explain(
        local,
        own_target,
        options.weight,
        ignore_index=options.ignore_index,
        reduction=functional.REDUCTIONS[options.reduction],
        label_smoothing=options.label_smoothing,
        grad_in_forward=grad_in_forward,
        inplace=inplace,
        **given._asdict(),
    )


def _class_dim(input: Tensor) -> int:
    return 1 if input.dim() > 1 else 0


def _of_classes(input: DTensor) -> list[int]:
    """The mesh dimensions that shard the classes."""
    return [d for d, p in enumerate(input.placements) if p.is_shard(_class_dim(input))]


def _of_rows(input: DTensor) -> list:
    """The placements of what has a value for each row."""
    at = _class_dim(input)

    def of(placement: Any) -> Any:
        if not placement.is_shard() or placement.is_shard(at):
            return Replicate()
        return Shard(placement.dim - (placement.dim > at))

    return [of(placement) for placement in input.placements]


def _row_groups(input: DTensor) -> list[Group]:
    """Those whose ranks have different rows."""
    mesh = input.device_mesh
    return [group_of(mesh.get_group(d)) for d, p in enumerate(_of_rows(input)) if p.is_shard()]


def _local(tensor: Tensor, placements: Sequence) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.redistribute(placements=placements).to_local()


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _denominators(call: dict[str, Any], ignore_index: int, groups: Sequence[Group]) -> Tensor:
    """What a mean divides by, for the losses and for the z-losses, from the rows of all ranks."""
    target, weight, samples = call["target"], call["weight"], call["sample_weight"]
    rows = call["input"].shape[:1] + call["input"].shape[2:]
    of_row = torch.ones(rows, dtype=torch.float64, device=target.device)
    if samples is not None:
        of_row = of_row * samples
    of_loss = of_row
    if not target.is_floating_point():
        target = target.long().reshape(rows)
        is_left_out = target == ignore_index
        of_row = of_loss = of_row.masked_fill(is_left_out, 0)
        if weight is not None:
            of_loss = of_row * weight[target.clamp(0, len(weight) - 1)].double()
    divisors = torch.stack([of_loss.sum(), of_row.sum()])
    for group in groups:
        divisors = total(divisors, group)
    return divisors
