"""The cases of the benchmark: one table of plain data, each with the reason it is there.

A case is logits, a target and the options of the loss; its name says what it is and is what
`--cases` selects by. Nothing in the project may be tuned to a shape of this table, so a change that
helps here has to be seen helping the shapes beside it too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod

import torch

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]  # (N, C) or (N, C, height, width)
    dtype: str = "fp32"
    channels_last: bool = False
    probabilities: bool = False  # targets are a distribution over the classes for each row
    weighted: bool = False  # class weights, ignored rows and label smoothing, all at once
    grad_output: float = 1.0

    @property
    def name(self) -> str:
        parts = ["x".join(map(str, self.shape))]
        parts += ["channels-last"] if self.channels_last else []
        parts += ["probabilities"] if self.probabilities else []
        parts += ["weighted"] if self.weighted else []
        parts += [f"grad-{self.grad_output:g}"] if self.grad_output != 1.0 else []
        parts += [self.dtype] if self.dtype != "fp32" else []
        return "-".join(parts)

    @property
    def logits_bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


CASES = (
    # A row is shorter than a vector register, so rows have to share one.
    Case((65536, 10)),
    # A row is a few vectors long: what is done once a row costs as much as the exps.
    Case((65536, 128)),
    # Image classification; the logits fit the last-level cache of a server.
    Case((8192, 1000)),
    # A language model with a small vocabulary, and the case the others are variations of.
    Case((1024, 32000)),
    # An odd number of classes: every other row starts off the vector's alignment.
    Case((512, 50257)),
    # The largest vocabulary in wide use; a row of 513 KB just fits a core's own cache.
    Case((256, 128256)),
    # Segmentation: the class dimension is the second of four, with a stride of a whole image.
    Case((8, 19, 512, 512)),
    # The same with many classes and small images.
    Case((16, 150, 128, 128)),
    # The same memory order as (N, C), reached through strides that no copy may tidy up.
    Case((8, 19, 512, 512), channels_last=True),
    # Every option of the loss in one pass, as label-smoothed training has them.
    Case((1024, 32000), weighted=True),
    # Distillation and mixup: the target is as large as the logits, and read as often.
    Case((1024, 32000), probabilities=True),
    # Fewer rows than threads: the row itself has to be shared out.
    Case((1, 4_000_000)),
    # Nothing to compute: what is left is the cost of the call.
    Case((8, 10)),
    # The half types: half the bytes, the same number of exps.
    Case((1024, 32000), "bf16"),
    Case((1024, 32000), "fp16"),
    # Odd rows of two-byte elements are aligned to nothing at all.
    Case((512, 50257), "bf16"),
    # Gradient accumulation: the gradient computed ahead was for a grad_output of 1.
    Case((1024, 32000), grad_output=0.25),
)


class NoSuchCase(ValueError):
    pass


def select(patterns: Sequence[str] | None, dtype: str | None) -> list[Case]:
    """The cases that any of the names or globs matches, in the table's order; `dtype` replaces
    their own. Two that become the same by it are one."""
    chosen = list(CASES)
    if patterns:
        for pattern in patterns:
            if not any(fnmatchcase(case.name, pattern) for case in CASES):
                names = " ".join(case.name for case in CASES)
                raise NoSuchCase(f"no case matches {pattern!r}; there are: {names}")
        chosen = [case for case in CASES if any(fnmatchcase(case.name, p) for p in patterns)]
    if dtype:
        chosen = [replace(case, dtype=dtype) for case in chosen]
    return list(dict.fromkeys(chosen))
