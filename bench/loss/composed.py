"""What people write around torch's loss for each option that it does not have.

A case names one of these; fused_ce is given the option, everybody else the composition.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Extension:
    options: Callable[[int], dict[str, Any]]  # of fused_ce, for a number of rows
    composed: Callable[..., Tensor]  # the same call in torch's operations


def of_scaled(input: Tensor, target: Tensor, logit_scale: float) -> Tensor:
    return F.cross_entropy(input * logit_scale, target)


def of_capped(input: Tensor, target: Tensor, softcap: float) -> Tensor:
    return F.cross_entropy(softcap * torch.tanh(input / softcap), target)


def with_z_loss(input: Tensor, target: Tensor, z_loss: float) -> Tensor:
    return F.cross_entropy(input, target) + z_loss * input.logsumexp(-1).square().mean()


def by_count(input: Tensor, target: Tensor, denominator: float) -> Tensor:
    return F.cross_entropy(input, target, reduction="sum") / denominator


def of_samples(input: Tensor, target: Tensor, sample_weight: Tensor) -> Tensor:
    losses = F.cross_entropy(input, target, reduction="none")
    return (losses * sample_weight).sum() / sample_weight.sum()


def in_float32(input: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """As Transformers computes its loss."""
    return F.cross_entropy(input.to(dtype), target)


EXTENSIONS = {
    "z-loss": Extension(lambda rows: {"z_loss": 1e-4}, with_z_loss),
    "softcap": Extension(lambda rows: {"softcap": 30.0}, of_capped),
    "scale": Extension(lambda rows: {"logit_scale": 0.5}, of_scaled),
    "denominator": Extension(lambda rows: {"denominator": 2.0 * rows}, by_count),
    "sample-weight": Extension(
        lambda rows: {"sample_weight": torch.linspace(0.5, 1.5, rows)}, of_samples
    ),
    "float32-loss": Extension(lambda rows: {"dtype": torch.float32}, in_float32),
}
