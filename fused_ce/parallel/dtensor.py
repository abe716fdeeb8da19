"""The losses of a ``DTensor``, which says itself how it is sharded.

The local parts go to the loss of plain tensors, over the group of the mesh dimension that shards
the classes, if there is one. What the loss is on the other dimensions is a matter of placements: of
sharded rows it is a sum to come, and a mean of them divides by the weights of all.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Replicate, Shard

from .. import functional, parallel
from ..extensions import Extensions
from ..fakes import class_dim, row_shape
from ..options import MEAN, NONE, Options
from .collectives import group_of, total
from .partition import Sharding


class _Layout(NamedTuple):
    """Where the rows of a loss are, and its classes."""

    mesh: DeviceMesh
    rows: list  # the placements of what has a value for each row
    of_probabilities: list  # those of targets with classes
    class_dims: list[int]  # the dimensions of the mesh that shard the classes


def _layout_of_logits(input: DTensor) -> _Layout:
    at = class_dim(input)

    def of_row(placement: Any) -> Any:
        if not placement.is_shard() or placement.is_shard(at):
            return Replicate()
        return Shard(placement.dim - (placement.dim > at))

    rows = [of_row(placement) for placement in input.placements]
    class_dims = [d for d, p in enumerate(input.placements) if p.is_shard(at)]
    return _Layout(input.device_mesh, rows, list(input.placements), class_dims)


def reason(input: DTensor, target: Any, options: Options, given: Extensions) -> str | None:
    """Why torch's function takes this call; None if it is ours."""
    for placement in input.placements:
        if type(placement) not in (Shard, Replicate):
            return f"the logits are a DTensor with the placement {placement}"
    layout = _layout_of_logits(input)
    if len(layout.class_dims) > 1:
        return "two mesh dimensions shard the classes of the logits"
    return _reason_of_others(layout, "logits", target, options, given)


def _reason_of_others(
    layout: _Layout, of: str, target: Any, options: Options, given: Extensions
) -> str | None:
    if not isinstance(target, Tensor):
        return "the target is not a tensor"
    wanted = layout.of_probabilities if target.is_floating_point() else layout.rows
    others = {"target": (target, wanted), "sample_weight": (given.sample_weight, layout.rows)}
    others["weight"] = options.weight, None
    for name in ("denominator", "logit_scale"):
        others[name] = getattr(given, name), None
    for name, (tensor, placements) in others.items():
        if not isinstance(tensor, Tensor):
            continue
        if isinstance(tensor, DTensor):
            if tensor.device_mesh != layout.mesh:
                return f"the {name} is on another mesh than the {of}"
        elif placements is not None and not all(p.is_replicate() for p in placements):
            return f"the {name} is no DTensor, and would be sharded as the {of} would"
        if tensor.requires_grad and torch.is_grad_enabled() and name != "target":
            return f"the {of} are a DTensor, and the {name} requires grad"
    return None


def local_arguments(
    input: DTensor, target: Tensor, options: Options, given: Extensions
) -> dict[str, Any]:
    """The arguments of the same call on the parts of this rank. Target and weights are moved where
    they have to be, if they are elsewhere."""
    layout, own = _layout_of_logits(input), input.to_local()
    found = _of_rows(layout, target, options, given, row_shape(own.shape))
    for dim in layout.class_dims:
        found["process_group"] = input.device_mesh.get_group(dim)
        found["num_classes"] = input.shape[class_dim(input)]
    return found | {"input": own}


def _of_rows(
    layout: _Layout, target: Tensor, options: Options, given: Extensions, rows: torch.Size
) -> dict[str, Any]:
    """Target and options of the rows that this rank has."""
    target = _local(target, layout.of_probabilities if target.is_floating_point() else layout.rows)
    weight, sample_weight = _whole(options.weight), given.sample_weight
    if sample_weight is not None:
        sample_weight = _local(sample_weight, layout.rows)
    found = given._asdict() | {
        "target": target,
        "weight": weight,
        "sample_weight": sample_weight,
        "denominator": _whole(given.denominator),
        "logit_scale": _whole(given.logit_scale),
    }
    groups = [layout.mesh.get_group(d) for d, p in enumerate(layout.rows) if p.is_shard()]
    if groups and options.reduction == MEAN and given.denominator is None:
        divisors = _denominators(target, weight, sample_weight, options.ignore_index, rows)
        for group in groups:
            divisors = total(divisors, group_of(group))
        found["denominator"] = divisors
    return found


def placed(loss: Tensor, input: DTensor, reduction: int) -> DTensor:
    """The loss of this rank as what it is of the whole."""
    return _placed(loss, _layout_of_logits(input), row_shape(input.shape), reduction)


def _placed(loss: Tensor, layout: _Layout, shape: Sequence[int], reduction: int) -> DTensor:
    if reduction != NONE:
        rows = [Partial("sum") if p.is_shard() else p for p in layout.rows]
        return DTensor.from_local(loss, layout.mesh, rows, run_check=False)
    shape = torch.Size(shape)
    stride = torch.empty(shape, device="meta").stride()
    whole = {"run_check": False, "shape": shape, "stride": stride}
    return DTensor.from_local(loss, layout.mesh, layout.rows, **whole)


def explain(
    input: DTensor,
    target: Tensor,
    options: Options,
    given: Extensions,
    grad_in_forward: bool,
    inplace: bool | str | None,
) -> str:
    """As :func:`fused_ce.explain` of a call that is ours; moves nothing."""
    local = input.to_local()
    shape = row_shape(local.shape) if not target.is_floating_point() else local.shape
    own_target = torch.empty((), dtype=target.dtype, device=local.device).expand(shape)
    own_target.requires_grad_(target.requires_grad)
    weight = given.sample_weight
    if weight is not None:
        weight = torch.empty((), dtype=weight.dtype, device=local.device)
        weight = weight.expand(row_shape(local.shape))
    given = given._replace(sample_weight=weight)
    for dim in _layout_of_logits(input).class_dims:
        sharding = Sharding(input.device_mesh.get_group(dim), input.shape[class_dim(input)])
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


# Of a head, whose weight says which dimension of the mesh shards the classes.


def _layout_of_head(input: DTensor, linear_weight: DTensor) -> _Layout:
    class_dims = [d for d, p in enumerate(linear_weight.placements) if p.is_shard()]
    rows = [Replicate() if d in class_dims else p for d, p in enumerate(input.placements)]
    classes = Shard(input.dim() - 1)
    of_probabilities = [classes if d in class_dims else p for d, p in enumerate(rows)]
    return _Layout(input.device_mesh, rows, of_probabilities, class_dims)


def head_reason(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Any,
    options: Options,
    given: Extensions,
) -> str | None:
    """Why all logits are made by torch for this call of a head; None if they need not be."""
    layer = {"input": input, "linear weight": linear_weight, "linear bias": linear_bias}
    for name, tensor in layer.items():
        if tensor is None:
            continue
        if not isinstance(tensor, DTensor):
            return f"the {name} is no DTensor, and other tensors of the layer are"
        if tensor.device_mesh != linear_weight.device_mesh:
            return f"the {name} is on another mesh than the linear weight"
    for tensor in (linear_weight, linear_bias):
        if tensor is not None and tensor.placements != linear_weight.placements:
            return "the linear bias is sharded in another way than the linear weight"
    for placement in linear_weight.placements:
        if type(placement) is not Replicate and placement != Shard(0):
            return f"the linear weight is a DTensor with the placement {placement}"
    layout = _layout_of_head(input, linear_weight)
    if len(layout.class_dims) > 1:
        return "two mesh dimensions shard the classes of the linear weight"
    for placement in input.placements:
        sharded = type(placement) is Shard and placement.dim < input.dim() - 1
        if not sharded and type(placement) is not Replicate:
            return f"the input is a DTensor with the placement {placement}"
    return _reason_of_others(layout, "input and weight", target, options, given)


def local_head(
    input: DTensor,
    linear_weight: DTensor,
    linear_bias: DTensor | None,
    target: Tensor,
    options: Options,
    given: Extensions,
) -> dict[str, Any]:
    """As :func:`local_arguments`. What is a sum over the ranks is left to the gradients'
    placements: where the input came sharded by its rows, one reduce-scatter gives its own."""
    layout = _layout_of_head(input, linear_weight)
    dims = range(layout.mesh.ndim)
    of_input = [Partial() if d in layout.class_dims else layout.rows[d] for d in dims]
    of_layer = [
        Partial() if layout.rows[d].is_shard() else linear_weight.placements[d] for d in dims
    ]
    own = input.redistribute(placements=layout.rows).to_local(grad_placements=of_input)
    rows = (*own.shape[:-1], *linear_weight.shape[1:-1])
    found = _of_rows(layout, target, options, given, torch.Size(rows))
    for dim in layout.class_dims:
        found["process_group"] = layout.mesh.get_group(dim)
        found["num_classes"] = linear_weight.shape[0]
        found["reduce_input_grad"] = False
    bias = None if linear_bias is None else linear_bias.to_local(grad_placements=of_layer)
    return found | {
        "input": own,
        "linear_weight": linear_weight.to_local(grad_placements=of_layer),
        "linear_bias": bias,
    }


def placed_head(loss: Tensor, input: DTensor, linear_weight: DTensor, reduction: int) -> DTensor:
    layout = _layout_of_head(input, linear_weight)
    return _placed(loss, layout, (*input.shape[:-1], *linear_weight.shape[1:-1]), reduction)


# What of a tensor this rank needs.


def _local(tensor: Tensor, placements: Sequence) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.redistribute(placements=placements).to_local()


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _denominators(
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    rows: torch.Size,
) -> Tensor:
    """What a mean divides by, for the losses and for the z-losses, as far as these rows go."""
    of_row = torch.ones(rows, dtype=torch.float64, device=target.device)
    if sample_weight is not None:
        of_row = of_row * sample_weight
    of_loss = of_row
    if not target.is_floating_point():
        target = target.long().reshape(rows)
        of_row = of_loss = of_row.masked_fill(target == ignore_index, 0)
        if weight is not None:
            of_loss = of_row * weight[target.clamp(0, len(weight) - 1)].double()
    return torch.stack([of_loss.sum(), of_row.sum()])
