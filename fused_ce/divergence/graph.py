"""The divergence within a graph of ``torch.compile``; see ``fused_ce.graph``.

The forward operator's registered derivative is the backward operator, and that one's is the
reference's, twice.
"""

import math

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd import Function
from torch.library import register_fake

from .. import ops
from ..eligibility import transform_is_active
from ..fakes import empty_gradient, row_shape
from ..graph import variable
from ..options import MEAN, NONE
from .reference import Settings, computed_dtype, gradient, reference

_TENSORS = 4  # of the forward: both logits, sample_weight and denominator
_DENOMINATOR = 1  # among the totals


def divergence(*call) -> Tensor:
    """As an entrance of ``eager``."""
    *tensors, settings = call
    loss, *_ = ops.graph_kl_div_with_logits(*tensors, *settings)
    return loss


def _save_forward(ctx, inputs, output) -> None:
    tensors, ctx.settings = inputs[:_TENSORS], Settings(*inputs[_TENSORS:])
    _, *stats = output
    ctx.save_for_backward(*tensors, *stats)


def _backward(ctx, grad_loss: Tensor, *_) -> tuple:
    input, target_logits, sample_weight, denominator, *stats = ctx.saved_tensors
    nothing_else = (None,) * (len(ctx.needs_input_grad) - 1)
    if transform_is_active():
        # A graph that runs as it was captured: the transform began only after it.
        weights = sample_weight, denominator
        found = gradient(input, target_logits, *weights, ctx.settings, grad_loss)
    else:
        found = ops.graph_kl_div_with_logits_backward(
            input, target_logits, *stats, grad_loss, sample_weight, *ctx.settings
        )
    return found, *nothing_else


def _by_reference(
    input: Tensor,
    target_logits: Tensor,
    totals: Tensor,
    grad_output: Tensor,
    sample_weight: Tensor | None,
    settings: Settings,
    create_graph: bool,
) -> Tensor:
    """What the backward operator returns."""
    denominator = totals[_DENOMINATOR] if settings.reduction == MEAN else None
    value = reference(input, target_logits, sample_weight, denominator, settings)
    (result,) = torch.autograd.grad(
        value, input, grad_output.to(value.dtype), create_graph=create_graph
    )
    return result


class _Gradient(Function):
    """The backward operator, whose derivative is the reference's."""

    @staticmethod
    def forward(ctx, *arguments):
        input, target_logits, _, totals, grad_output, sample_weight, *settings = arguments
        ctx.settings = Settings(*settings)
        ctx.save_for_backward(input, target_logits, totals, grad_output, sample_weight)
        with torch._C._AutoDispatchBelowAutograd():
            return ops.graph_kl_div_with_logits_backward(*arguments)

    @staticmethod
    def backward(ctx, grad):
        input, target_logits, totals, grad_output, sample_weight = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            input, grad_output = variable(input), variable(grad_output)
            first = _by_reference(
                input, target_logits, totals, grad_output, sample_weight, ctx.settings, True
            )
        by_input, by_grad_output = torch.autograd.grad(
            first, (input, grad_output), grad, create_graph=create_graph, allow_unused=True
        )
        return by_input, None, None, None, by_grad_output, None, *(None,) * len(Settings._fields)


def _autograd_kernel(*arguments):
    """What autograd runs in the place of the backward operator."""
    if forward_ad._current_level < 0:
        return _Gradient.apply(*arguments)
    input, target_logits, _, totals, grad_output, sample_weight, *settings = arguments
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        result = _by_reference(
            variable(input),
            target_logits,
            totals,
            grad_output,
            sample_weight,
            Settings(*settings),
            create_graph,
        )
    # The graph was made for the strides of the operator's result.
    return empty_gradient(input).copy_(result)


torch.library.register_autograd(
    "fused_ce::graph_kl_div_with_logits", _backward, setup_context=_save_forward
)
# A kernel of our own, since what register_autograd makes would drop a tangent without a word.
_library = torch.library.Library("fused_ce", "IMPL")
_library.impl(ops.graph_kl_div_with_logits_backward, _autograd_kernel, "Autograd")


def _loss(input: Tensor, target_logits: Tensor, settings: Settings) -> Tensor:
    shape = row_shape(input.shape) if settings.reduction == NONE else ()
    return input.new_empty(shape, dtype=computed_dtype(input, target_logits))


def _stats(input: Tensor, target_logits: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """The statistics of the rows, and the totals."""
    numbers = 5 if settings.reverse else 4
    stats = input.new_empty(
        (numbers, math.prod(row_shape(input.shape))), dtype=computed_dtype(input, target_logits)
    )
    return stats, input.new_empty(3, dtype=torch.float64)


@register_fake("fused_ce::kl_div_with_logits")
@register_fake("fused_ce::kl_div_with_logits_grad_")
def _(input, target_logits, sample_weight, denominator, *settings):
    return _loss(input, target_logits, Settings(*settings))


@register_fake("fused_ce::kl_div_with_logits_stats")
@register_fake("fused_ce::graph_kl_div_with_logits")
def _(input, target_logits, sample_weight, denominator, *settings):
    call = input, target_logits, Settings(*settings)
    return _loss(*call), *_stats(*call)


@register_fake("fused_ce::kl_div_with_logits_grad")
def _(input, target_logits, sample_weight, denominator, *settings):
    call = input, target_logits, Settings(*settings)
    return _loss(*call), *_stats(*call), empty_gradient(input)


@register_fake("fused_ce::kl_div_with_logits_backward")
@register_fake("fused_ce::graph_kl_div_with_logits_backward")
def _(input, *_):
    return empty_gradient(input)


@register_fake("fused_ce::kl_div_with_logits_backward_")
@register_fake("fused_ce::kl_div_with_logits_rescale_")
def _(written, *_):
    return written
