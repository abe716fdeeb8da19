"""The divergence in plain torch: for whatever the kernels do not take, and for derivatives.

Nothing of it is particular to one device or to eager calls, so transforms, forward mode, tracing
and subclasses go through it as through any code of torch's.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from ..fakes import class_dim
from ..options import MEAN, NONE


class Settings(NamedTuple):
    """The numbers of a call, in the order in which the operators take them."""

    temperature: float | Tensor = 1.0
    reverse: bool = False
    reduction: int = MEAN


def computed_dtype(input: Tensor, target_logits: Tensor) -> torch.dtype:
    """In which a divergence is computed, and what it is in."""
    dtype = torch.promote_types(input.dtype, target_logits.dtype)
    return torch.promote_types(dtype, torch.float32)


def reference(
    input: Tensor,
    target_logits: Tensor,
    sample_weight: Tensor | None,
    denominator: float | Tensor | None,
    settings: Settings,
) -> Tensor:
    dtype, dim = computed_dtype(input, target_logits), class_dim(input)
    student, teacher = input.to(dtype), target_logits.to(dtype)
    if sample_weight is not None:
        # What has no weight is replaced: zero times a nan among it would not be zero.
        weightless = (sample_weight == 0).unsqueeze(dim)
        student, teacher = (t.masked_fill(weightless, 0) for t in (student, teacher))
    log_p, log_q = (
        (logits / settings.temperature).log_softmax(dim) for logits in (student, teacher)
    )
    first, second = (log_p, log_q) if settings.reverse else (log_q, log_p)
    of_first = first.exp()
    # A class of no probability has nothing to add: 0 log 0 is 0.
    gaps = (first - second).masked_fill(of_first == 0, 0)
    losses = (of_first * gaps).sum(dim)
    if sample_weight is not None:
        sample_weight = sample_weight.to(dtype)
        losses = losses * sample_weight
    if settings.reduction == NONE:
        return losses
    total = losses.sum()
    if settings.reduction != MEAN:
        return total
    if denominator is None:
        denominator = losses.numel() if sample_weight is None else sample_weight.sum()
    elif isinstance(denominator, Tensor):
        denominator = denominator.reshape(()).to(dtype)
    if not isinstance(denominator, Tensor):
        denominator = total.new_full((), denominator)  # of which 0 is no error
    return total / denominator


def gradient(
    input: Tensor,
    target_logits: Tensor,
    sample_weight: Tensor | None,
    denominator: float | Tensor | None,
    settings: Settings,
    grad_output: Tensor,
) -> Tensor:
    """The gradient of the student's logits, under a graph if the caller wants one.

    It is the gradient for ones, times ``grad_output``: what may be a batch, or carry a tangent,
    then only meets a product, and the rest runs outside of any transform.
    """
    create_graph = torch.is_grad_enabled()
    with temporarily_clear_interpreter_stack(), torch.enable_grad():
        wide = input.to(computed_dtype(input, target_logits))
        if not wide.requires_grad:
            wide = wide.detach().requires_grad_()
        value = reference(wide, target_logits, sample_weight, denominator, settings)
        (unit,) = torch.autograd.grad(
            value, wide, torch.ones_like(value), create_graph=create_graph
        )
    if settings.reduction == NONE:
        grad_output = grad_output.unsqueeze(class_dim(input))
    found = unit * grad_output
    if sample_weight is not None:
        # A row without weight has no gradient, even if what arrives for it is nan.
        found = found.masked_fill((sample_weight == 0).unsqueeze(class_dim(input)), 0)
    return found.to(input.dtype)
