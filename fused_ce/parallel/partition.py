"""Which classes of the vocabulary a rank has.

Without more it is the part of an even division that torch.chunk and DTensor make. A rank whose
columns are more than that has padding after them, as Megatron-LM pads a vocabulary. No rank sees
the others' widths here: that the parts are those of one vocabulary is checked once they have met.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..options import integer
from .collectives import Group, group_of


class Sharding(NamedTuple):
    """As :func:`fused_ce.cross_entropy` takes and describes it."""

    process_group: Any = None
    num_classes: int | None = None
    class_offset: int | None = None


class Place(NamedTuple):
    """A rank's classes, as the operators take them: the first columns of its logits."""

    class_offset: int
    shard_classes: int
    num_classes: int


def place_of(width: int, sharding: Sharding, group: Group) -> Place:
    """Of logits with so many columns."""
    if sharding.num_classes is None:
        num_classes = width * group.size
    else:
        num_classes = _whole("num_classes", sharding.num_classes, 1)
    if sharding.class_offset is None:
        part = -(-num_classes // group.size)
        first = group.rank * max(width, part)
    else:
        first = _whole("class_offset", sharding.class_offset, 0)
    first = min(first, num_classes)
    return Place(first, min(width, num_classes - first), num_classes)


def classes_of_rank(num_classes: int, process_group: Any) -> int:
    """How many of a vocabulary this rank has."""
    group = group_of(process_group)
    part = -(-num_classes // group.size)
    return place_of(part, Sharding(process_group, num_classes), group).shard_classes


def _whole(name: str, value: Any, least: int) -> int:
    number = integer(value)
    if type(number) is not int or number < least:
        raise ValueError(f"fused_ce: {name} must be an int from {least} on, got {value!r}.")
    return number


def own_weights(weight: Tensor | None, width: int, place: Place) -> Tensor | None:
    """The class weights of a rank's columns, from those of all classes or of its own."""
    if weight is None:
        return None
    first, own, num_classes = place
    if weight.shape == (num_classes,):
        weight = weight.narrow(0, first, own)
    elif weight.dim() != 1 or len(weight) not in (own, width):
        raise ValueError(
            f"fused_ce: weight must be of all {num_classes} classes or of this rank's {own}, got "
            f"{tuple(weight.shape)}."
        )
    if len(weight) == width:
        return weight
    return torch.cat([weight, weight.new_zeros(width - len(weight))])  # padding's are not read
