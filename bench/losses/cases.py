"""The losses that are measured, a line each, and the sizes of what they are given.

A line names a function of fused_ce, what people call without it, and the arguments beside the
input. A build of fused_ce without the function leaves a dash and says so.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common.precision import DTYPES
from bench.losses import composed

Arguments = Mapping[str, Any]


def indices(input: Tensor) -> Arguments:
    rows, classes = input.shape
    return {"target": torch.randint(classes, (rows,), device=input.device)}


def probabilities(input: Tensor) -> Arguments:
    return {"target": torch.randn_like(input).softmax(1), "reduction": "batchmean"}


def labels(input: Tensor) -> Arguments:
    return {"target": (torch.rand_like(input) < 0.1).to(input.dtype)}


def weighted_labels(input: Tensor) -> Arguments:
    weight = torch.rand(input.shape[1], device=input.device) + 0.5
    return {**labels(input), "pos_weight": weight.to(input.dtype)}


def focal_labels(input: Tensor) -> Arguments:
    return {"targets": labels(input)["target"], "reduction": "mean"}


def teacher(input: Tensor) -> Arguments:
    return {"target_logits": torch.randn_like(input)}


def classes(_: Tensor) -> Arguments:
    return {"dim": 1}


@dataclass(frozen=True)
class Loss:
    function: str  # of fused_ce
    stock: Callable[..., Tensor]
    arguments: Callable[[Tensor], Arguments]  # beside the input, of which they are made
    takes_log_probabilities: bool = False


LOSSES = {
    "BCE": Loss("binary_cross_entropy_with_logits", F.binary_cross_entropy_with_logits, labels),
    "BCE, pos_weight": Loss(
        "binary_cross_entropy_with_logits", F.binary_cross_entropy_with_logits, weighted_labels
    ),
    "sigmoid focal": Loss("sigmoid_focal_loss", composed.sigmoid_focal_loss, focal_labels),
    "kl_div": Loss("kl_div", F.kl_div, probabilities, takes_log_probabilities=True),
    "kl_div_with_logits": Loss("kl_div_with_logits", composed.kl_div_with_logits, teacher),
    "log_softmax": Loss("log_softmax", F.log_softmax, classes),
    "nll_loss": Loss("nll_loss", F.nll_loss, indices, takes_log_probabilities=True),
}


@dataclass(frozen=True)
class Case:
    loss: str
    rows: int
    classes: int
    dtype: str = "fp32"

    @property
    def name(self) -> str:
        return f"{self.loss}, {self.rows}x{self.classes}-{self.dtype}"

    @property
    def input_bytes(self) -> int:
        return self.rows * self.classes * DTYPES[self.dtype].itemsize


# A vocabulary: on the CPU beyond what the C library keeps, on CUDA beyond the second-level cache.
SIZES = {"cpu": (512, 32000), "cuda": (4096, 32000)}
QUICK_SIZE = (64, 500)
