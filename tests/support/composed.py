"""The options that torch's loss does not have, as people write them around it in plain torch.

Written from the options' definitions, it shares nothing with the package, and may be told to
compute in float64.
"""

import torch
import torch.nn.functional as F


def composed(
    input,
    target,
    weight=None,
    *,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    dtype=None,
    logit_scale=1.0,
    softcap=None,
    z_loss=0.0,
    focal_gamma=0.0,
    sample_weight=None,
    denominator=None,
    on_all_ignored="nan",
):
    """What people write around torch's function."""
    axis = 1 if input.dim() > 1 else 0
    logits = (input if dtype is None else input.to(dtype)) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    probabilities = target.is_floating_point()

    def cross_entropy(**options):
        options = {"ignore_index": ignore_index, "reduction": "none", **options}
        return F.cross_entropy(logits, target, **options)

    losses = cross_entropy(weight=weight, label_smoothing=label_smoothing)
    counted = torch.ones_like(losses, dtype=torch.bool)
    if not probabilities:
        counted = target != ignore_index
    z_losses = z_loss * logits.logsumexp(axis).square()
    if focal_gamma:
        losses = losses * (1 - torch.exp(-cross_entropy())) ** focal_gamma
    of_row = torch.ones_like(losses)
    if sample_weight is not None:
        of_row = sample_weight.to(losses.dtype)
    of_row = torch.where(counted, of_row, 0)
    losses, z_losses = (torch.where(of_row != 0, of_row * each, 0) for each in (losses, z_losses))
    if reduction == "none":
        return losses + z_losses
    total = (losses + z_losses).sum()
    if reduction == "sum" or (on_all_ignored == "zero" and not (of_row != 0).any()):
        return total
    if denominator is not None:
        return total / denominator
    weights = of_row
    if weight is not None and not probabilities:
        weights = of_row * weight[target.where(counted, 0)]
    total = weights.sum()
    if label_smoothing > 0:  # as stock has it, also where smoothing leaves a loss to divide
        total = total.masked_fill(total == 0, torch.nan)
    return losses.sum() / total + z_losses.sum() / of_row.sum()


def in_float64(options):
    return {
        name: value.double() if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
