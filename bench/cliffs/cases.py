"""Random calls of the loss, each of them a line of words that brings it back.

Sizes are drawn by their logarithm, so that few classes, small maps and short runs of rows come as
often as long rows. Every tensor has a layout of its own: most cliffs lie where two of them differ.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from bench.common.precision import DTYPES

FEWEST = 10_000  # elements: below, what a call costs by itself decides
MOST = 1_000_000
MOST_CLASSES = 50_000
FEW_CLASSES = 64
LONGEST_SIDE = 64

PROBABILITIES = "probabilities"
# The gradients that are asked for.
NONE, LOGITS, TARGETS, BOTH = "none", "logits", "targets", "both"

Size = Sequence[int]
Layout = Callable[[Size, torch.dtype], Tensor]


def in_order(order: Callable[[list[int]], list[int]]) -> Layout:
    """Dense memory with the axes in this order, the outermost first."""

    def make(size: Size, dtype: torch.dtype) -> Tensor:
        axes = order(list(range(len(size))))
        memory = torch.empty([size[axis] for axis in axes], dtype=dtype)
        return memory.permute([axes.index(axis) for axis in range(len(size))])

    return make


def part_of(whole: Callable[[list[int]], list[int]], part: Callable[[int], tuple]) -> Layout:
    """A slice of a larger tensor."""

    def make(size: Size, dtype: torch.dtype) -> Tensor:
        memory = torch.empty(whole(list(size)), dtype=dtype)
        return memory[part(len(size))]

    return make


def expanded(size: Size, dtype: torch.dtype) -> Tensor:
    return torch.empty([1, *size[1:]], dtype=dtype).expand(*size)


EVERY_OTHER = slice(None, None, 2)
# Of any tensor of rows, class indices too.
ROW_LAYOUTS: dict[str, Layout] = {
    "contiguous": in_order(lambda axes: axes),
    "reversed": in_order(lambda axes: axes[::-1]),
    "batch_last": in_order(lambda axes: [*axes[1:], axes[0]]),
    "sliced": part_of(lambda size: [*size[:-1], 2 * size[-1]], lambda axes: (..., EVERY_OTHER)),
    "padded": part_of(lambda size: [*size[:-1], size[-1] + 3], lambda axes: (..., slice(-3))),
    "every_other_row": part_of(lambda size: [2 * size[0], *size[1:]], lambda axes: (EVERY_OTHER,)),
    "cropped": part_of(
        lambda size: [*size[:1], *(side + 2 for side in size[1:])],
        lambda axes: (slice(None), *(slice(1, -1) for _ in range(axes - 1))),
    ),
}
# Of tensors that have classes as well.
LAYOUTS: dict[str, Layout] = ROW_LAYOUTS | {
    "channels_last": in_order(lambda axes: [axes[0], *axes[2:], axes[1]]),
    "class_first": in_order(lambda axes: [axes[1], axes[0], *axes[2:]]),
    "every_other_class": part_of(
        lambda size: [size[0], 2 * size[1], *size[2:]], lambda axes: (slice(None), EVERY_OTHER)
    ),
}
TARGET_LAYOUTS: dict[str, Layout] = LAYOUTS | {"expanded": expanded}


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...] = (1024, 10)
    dtype: str = "fp32"
    layout: str = "contiguous"
    target: str = "int64"
    target_layout: str = "contiguous"
    grads: str = NONE
    mode: str = "fused"  # a provider of bench/loss/providers.py
    grad_output: float = 1.0
    reduction: str = "mean"
    smoothing: float = 0.0
    weighted: bool = False

    def __str__(self) -> str:
        """What differs from the defaults."""
        words = []
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name == "shape":
                value = "x".join(map(str, value))
            elif value == each.default:
                continue
            words.append(f"{each.name}={value}")
        return " ".join(words)

    @classmethod
    def parse(cls, line: str) -> "Case":
        defaults, known = {each.name: each.default for each in fields(cls)}, {}
        for word in line.split():
            name, _, value = word.partition("=")
            if name not in defaults:
                raise ValueError(f"expected one of {', '.join(defaults)}, got {name!r}")
            known[name] = _read(defaults[name], value)
        case = cls(**known)
        if case.layout not in LAYOUTS or case.target_layout not in TARGET_LAYOUTS:
            raise ValueError(f"expected layouts of {', '.join(TARGET_LAYOUTS)}, got {line!r}")
        return case


def _read(default: object, value: str) -> object:
    if isinstance(default, bool):
        return value == "True"
    if isinstance(default, tuple):
        return tuple(map(int, value.split("x")))
    return type(default)(value)


def draw(chance: random.Random, most: int = MOST) -> Case:
    probabilities = chance.random() < 0.5
    given = {}
    if chance.random() < 0.3:
        given |= {"smoothing": 0.1}
    if chance.random() < 0.2:
        given |= {"weighted": True}
    grads = chance.choice([NONE, LOGITS, LOGITS, *([TARGETS, BOTH] if probabilities else [])])
    if grads != NONE:
        given |= {"grad_output": chance.choice([1.0, 1.0, 0.25])}
    if grads == LOGITS:
        given |= {"mode": chance.choice(["fused", "fused", "recompute", "inplace"])}
    target = PROBABILITIES if probabilities else chance.choice(["int64", "int64", "int32"])
    layout, dtype = chance.choice(list(LAYOUTS)), chance.choice(list(DTYPES))
    # The largest float16 is less than most sums.
    reductions = ["mean", "mean", "none", *(["sum"] if dtype != "fp16" else [])]
    return Case(
        shape=draw_shape(chance, most),
        dtype=dtype,
        layout=layout,
        target=target,
        target_layout=draw_target_layout(chance, layout, probabilities),
        grads=grads,
        reduction=chance.choice(reductions),
        **given,
    )


def draw_target_layout(chance: random.Random, layout: str, probabilities: bool) -> str:
    """The logits' own as often as all others together."""
    if probabilities and chance.random() < 0.5:
        return layout
    if chance.random() < 0.5:
        return "contiguous"
    return chance.choice(list(TARGET_LAYOUTS if probabilities else ROW_LAYOUTS))


def draw_shape(chance: random.Random, most: int) -> tuple[int, ...]:
    elements = between(chance, FEWEST, most)
    largest = FEW_CLASSES if chance.random() < 0.6 else min(MOST_CLASSES, elements)
    classes = between(chance, 2, largest)
    sides: list[int] = []
    for _ in range(chance.choice([0, 0, 1, 2, 2, 3])):
        room = elements // (classes * math.prod(sides))
        if room >= 2:
            sides.append(between(chance, 2, min(LONGEST_SIDE, room)))
    rows = -(-elements // (classes * math.prod(sides)))
    return rows, classes, *sides


def between(chance: random.Random, least: int, most: int) -> int:
    """By the logarithm."""
    return round(math.exp(chance.uniform(math.log(least), math.log(most))))
