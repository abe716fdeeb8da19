"""The cases of the benchmark: a table of plain data for each device, each with its reason.

A case is logits, a target and the options of the loss; its name says what it is and is what
`--cases` selects by. Nothing in the project may be tuned to a shape of this table, so a change that
helps here has to be seen helping the shapes beside it too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from typing import TypeVar

from bench.common.precision import DTYPES


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]  # (N, C) or (N, C, height, width)
    dtype: str = "fp32"
    channels_last: bool = False
    probabilities: bool = False  # targets are a distribution over the classes for each row
    weighted: bool = False  # class weights, ignored rows and label smoothing, all at once
    grad_output: float = 1.0
    graph: bool = False  # each call replays a CUDA graph
    extension: str = ""  # an option that stock does not have, of composed.EXTENSIONS

    @property
    def name(self) -> str:
        parts = ["x".join(map(str, self.shape))]
        parts += ["channels-last"] if self.channels_last else []
        parts += ["probabilities"] if self.probabilities else []
        parts += ["weighted"] if self.weighted else []
        parts += [self.extension] if self.extension else []
        parts += [f"grad-{self.grad_output:g}"] if self.grad_output != 1.0 else []
        parts += ["graph"] if self.graph else []
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
    # What is written around the loss, and is an option here: each should cost what the plain loss
    # does, but for softcap, whose tanh is computed twice.
    Case((1024, 32000), extension="z-loss"),
    Case((1024, 32000), extension="softcap"),
    Case((1024, 32000), extension="scale"),
    Case((1024, 32000), extension="denominator"),
    Case((1024, 32000), extension="sample-weight"),
    # Transformers' loss of bf16 logits, which makes a float32 copy of them.
    Case((1024, 32000), "bf16", extension="float32-loss"),
)


# What a GPU needs to be filled, and where its kernels and those of its peers hand over to others.
CUDA_CASES = (
    # A row shorter than a warp, a million times: stock's sum over rows runs on one multiprocessor.
    Case((1_048_576, 10)),
    Case((262_144, 100), "bf16"),
    # Rows that one warp or one block holds: what is done once a row decides.
    Case((65536, 256), "bf16"),
    Case((65536, 512), "bf16"),
    Case((65536, 1024), "bf16"),
    Case((32768, 2048), "bf16"),
    Case((16384, 4096), "bf16"),
    Case((16384, 8192), "bf16"),
    Case((8192, 8192)),
    # Vocabularies, for which stock reads the logits three times before it writes anything.
    Case((8192, 32000), "bf16"),
    Case((8192, 32000)),
    Case((8192, 32000), "fp16"),
    # An odd number of classes, and the next multiple of a vector.
    Case((8192, 50257), "bf16"),
    Case((8192, 50264), "bf16"),
    Case((4096, 50257)),
    # The largest in wide use; with float32 a row is as much as eight blocks hold.
    Case((4096, 128256), "bf16"),
    Case((4096, 128256)),
    Case((2048, 262144), "bf16"),
    # Segmentation, the class dimension strided and not.
    Case((8, 19, 1024, 1024)),
    Case((8, 19, 1024, 1024), "bf16"),
    Case((8, 19, 1024, 1024), channels_last=True),
    Case((16, 150, 256, 256)),
    # Every option of the loss in one pass, and targets as large as the logits.
    Case((8192, 32000), "bf16", weighted=True),
    Case((8192, 32000), "bf16", probabilities=True),
    # Gradient accumulation: the gradient computed ahead was for a grad_output of 1.
    Case((8192, 32000), "bf16", grad_output=0.25),
    Case((8192, 128256), "bf16", grad_output=0.25),
    # Options that stock does not have: in the pass, and in a kernel of their own.
    Case((8192, 32000), "bf16", extension="z-loss"),
    Case((8192, 32000), "bf16", extension="softcap"),
    Case((8192, 32000), "bf16", extension="float32-loss"),
    # Fewer rows than multiprocessors.
    Case((8, 128256), "bf16"),
    # Nothing to compute: the cost of the call, and of its kernels alone.
    Case((8, 10)),
    Case((8, 10), graph=True),
    Case((64, 1000), graph=True),
)

TABLES = {"cpu": CASES, "cuda": CUDA_CASES}


class NoSuchCase(ValueError):
    pass


Named = TypeVar("Named")  # a case, or a head


def select(
    patterns: Sequence[str] | None, dtype: str | None, table: Sequence[Named] = CASES
) -> list[Named]:
    """The cases of the table that any of the names or globs matches, in its order; `dtype` replaces
    their own. Two that become the same by it are one."""
    chosen = list(table)
    if patterns:
        for pattern in patterns:
            if not any(fnmatchcase(case.name, pattern) for case in table):
                names = " ".join(case.name for case in table)
                raise NoSuchCase(f"no case matches {pattern!r}; there are: {names}")
        chosen = [case for case in table if any(fnmatchcase(case.name, p) for p in patterns)]
    if dtype:
        chosen = [replace(case, dtype=dtype) for case in chosen]
    return list(dict.fromkeys(chosen))
