"""The pointwise losses in torch's own operations: for whatever the kernels do not take, and for
derivatives.

Two of them are torch's functions, bound beneath ``torch.nn.functional`` (see ``fused_ce.stock``);
the third is composed as torchvision composes it, without the difference that loses the digits of a
confident element.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from ..options import MEAN, NONE, SUM

# As csrc/pointwise_problem.h numbers the losses.
BINARY_CROSS_ENTROPY, SIGMOID_FOCAL, KL_DIVERGENCE, KL_DIVERGENCE_OF_LOGS = range(4)
BATCH_MEAN = 3  # beside torch's reductions: the sum, divided by the size of the first dimension


class Settings(NamedTuple):
    """The numbers of a call, in the order in which the operators take them."""

    loss: int
    reduction: int
    alpha: float = -1.0
    gamma: float = 0.0
    loss_dtype: torch.dtype | None = None  # that of the input where none is given

    @property
    def numbers(self) -> tuple:
        """What a backward operator takes."""
        return self[:-1]


_FUNCTIONS = torch._C._VariableFunctions
binary_cross_entropy_with_logits = _FUNCTIONS.binary_cross_entropy_with_logits
kl_div = _FUNCTIONS.kl_div


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float, gamma: float, reduction: int
) -> Tensor:
    """torchvision's, whose ``1 - p_t`` is summed up of its two halves."""
    cross_entropy = binary_cross_entropy_with_logits(inputs, targets, None, None, NONE)
    u = torch.sigmoid(inputs) * (1 - targets) + torch.sigmoid(-inputs) * targets
    # A power of less than 1 rises infinitely fast at 0.
    u = torch.where(u == 0, torch.finfo(u.dtype).tiny, u)
    loss = cross_entropy * u**gamma
    if alpha >= 0:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    if reduction == NONE:
        return loss
    return loss.mean() if reduction == MEAN else loss.sum()


def batch_mean(total: Tensor, input: Tensor) -> Tensor:
    """A sum, divided by the number of samples."""
    return total / input.shape[0] if input.dim() > 0 else total


def formula(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    settings: Settings,
) -> Tensor:
    """The loss, in float32 at least."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    input, target = input.to(dtype), target.to(dtype)
    loss, reduction = settings.loss, settings.reduction
    if loss == BINARY_CROSS_ENTROPY:
        return binary_cross_entropy_with_logits(input, target, weight, pos_weight, reduction)
    if loss == SIGMOID_FOCAL:
        return sigmoid_focal_loss(input, target, settings.alpha, settings.gamma, reduction)
    log_target = loss == KL_DIVERGENCE_OF_LOGS
    if reduction == BATCH_MEAN:
        return batch_mean(kl_div(input, target, SUM, log_target=log_target), input)
    return kl_div(input, target, reduction, log_target=log_target)


def gradient(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    settings: Settings,
    grad_output: Tensor,
) -> Tensor:
    """The gradient of the input, under a graph if the caller wants one.

    It is that for ones, times what arrives: what may be a batch, or carry a tangent, then only
    meets a product, and the rest runs outside of any transform.
    """
    create_graph = torch.is_grad_enabled()
    with temporarily_clear_interpreter_stack(), torch.enable_grad():
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        if not wide.requires_grad:
            wide = wide.detach().requires_grad_()
        value = formula(wide, target, weight, pos_weight, settings)
        (unit,) = torch.autograd.grad(
            value, wide, torch.ones_like(value), create_graph=create_graph
        )
    return (unit * grad_output).to(input.dtype)
