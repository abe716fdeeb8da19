"""The types of the tensors by their short names, and how far from stock's an answer may lie.

Only faults that no rounding explains are found here; the parity suite judges the last digits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
TOLERANCES = {"fp64": 1e-8, "fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}


def ulp_of_zero(dtype: str) -> float:
    """A gradient's mean over a million rows lies where float16 has only a few values left."""
    limits = torch.finfo(DTYPES[dtype])
    return limits.tiny * limits.eps


def check(
    answer: Sequence[Tensor],
    reference: Sequence[Tensor],
    names: Sequence[str],
    dtype: str,
    roundings: int = 1,
) -> None:
    """The answer lies within so many roundings to `dtype` of the reference."""
    for name, ours, expected in zip(names, answer, reference, strict=False):
        apart = (ours - expected).detach().abs().max().item()
        allowed = roundings * TOLERANCES[dtype] * expected.abs().max().item() + ulp_of_zero(dtype)
        if not apart <= allowed:
            raise ArithmeticError(f"the {name} is {apart:.3g} from stock's, allowed {allowed:.3g}")
