"""The pointwise losses within a graph of ``torch.compile``; see ``fused_ce.graph``.

The forward operator's registered derivative is the backward operator, and that one's is the
reference's, twice.
"""

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd import Function
from torch.library import register_fake

from .. import ops
from ..eligibility import transform_is_active
from ..fakes import empty_gradient
from ..graph import variable
from ..options import NONE
from . import reference
from .reference import Settings

loss = ops.graph_pointwise
_NUMBERS = len(Settings._fields) - 1


def _save_forward(ctx, inputs, output) -> None:
    *tensors, ctx.settings = *inputs[:4], Settings(*inputs[4:])
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_loss: Tensor) -> tuple:
    tensors = ctx.saved_tensors
    nothing_else = (None,) * (len(ctx.needs_input_grad) - 1)
    if transform_is_active():
        # A graph that runs as it was captured: the transform began only after it.
        return reference.gradient(*tensors, ctx.settings, grad_loss), *nothing_else
    numbers = ctx.settings.numbers
    return ops.graph_pointwise_backward(*tensors, grad_loss, *numbers), *nothing_else


def _by_reference(tensors: tuple, grad_output: Tensor, settings: Settings, create_graph: bool):
    """What the backward operator returns."""
    value = reference.formula(*tensors, settings)
    (gradient,) = torch.autograd.grad(
        value, tensors[0], grad_output.to(value.dtype), create_graph=create_graph
    )
    return gradient


class _Gradient(Function):
    """The backward operator, whose derivative is the reference's."""

    @staticmethod
    def forward(ctx, input, target, weight, pos_weight, grad_output, *numbers):
        ctx.settings = Settings(*numbers)
        ctx.save_for_backward(input, target, weight, pos_weight, grad_output)
        with torch._C._AutoDispatchBelowAutograd():
            return ops.graph_pointwise_backward(
                input, target, weight, pos_weight, grad_output, *numbers
            )

    @staticmethod
    def backward(ctx, grad):
        input, target, weight, pos_weight, grad_output = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            input, grad_output = variable(input), variable(grad_output)
            tensors = input, target, weight, pos_weight
            first = _by_reference(tensors, grad_output, ctx.settings, create_graph=True)
        by_input, by_grad_output = torch.autograd.grad(
            first, (input, grad_output), grad, create_graph=create_graph, allow_unused=True
        )
        return by_input, None, None, None, by_grad_output, *(None,) * _NUMBERS


def _autograd_kernel(*arguments):
    """What autograd runs in the place of the backward operator."""
    if forward_ad._current_level < 0:
        return _Gradient.apply(*arguments)
    input, *others, grad_output = arguments[:5]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        tensors = (variable(input), *others)
        result = _by_reference(tensors, grad_output, Settings(*arguments[5:]), create_graph)
    # The graph was made for the strides of the operator's result.
    return empty_gradient(input).copy_(result)


torch.library.register_autograd("fused_ce::graph_pointwise", _backward, setup_context=_save_forward)
# A kernel of our own, since what register_autograd makes would drop a tangent without a word.
_library = torch.library.Library("fused_ce", "IMPL")
_library.impl(ops.graph_pointwise_backward, _autograd_kernel, "Autograd")


def _loss(input: Tensor, reduction: int, dtype: torch.dtype | None) -> Tensor:
    return input.new_empty(input.shape if reduction == NONE else (), dtype=dtype)


@register_fake("fused_ce::pointwise")
@register_fake("fused_ce::pointwise_grad_")
@register_fake("fused_ce::graph_pointwise")
def _(input, target, weight, pos_weight, loss, reduction, alpha, gamma, loss_dtype=None):
    return _loss(input, reduction, loss_dtype)


@register_fake("fused_ce::pointwise_grad")
def _(input, target, weight, pos_weight, loss, reduction, alpha, gamma, loss_dtype=None):
    return _loss(input, reduction, loss_dtype), empty_gradient(input)


@register_fake("fused_ce::pointwise_backward")
@register_fake("fused_ce::graph_pointwise_backward")
def _(input, *_):
    return empty_gradient(input)


@register_fake("fused_ce::pointwise_backward_")
@register_fake("fused_ce::pointwise_rescale_")
def _(written, *_):
    return written


@register_fake("fused_ce::check_pointwise_overwritable")
def _(*_):
    return None
