"""Losses that torch has no function for, as people write them in its operations."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2, reduction: str = "none"
) -> Tensor:
    """torchvision's formula."""
    p = torch.sigmoid(inputs)
    loss = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss * (1 - p_t) ** gamma
    return loss.mean() if reduction == "mean" else loss


def kl_div_with_logits(input: Tensor, target_logits: Tensor) -> Tensor:
    """The mean over the rows."""
    student, teacher = F.log_softmax(input, 1), F.log_softmax(target_logits, 1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)
