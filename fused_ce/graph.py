"""The loss within a graph of ``torch.compile``: operators with derivatives registered for them.

A graph cannot hold what ``eager`` decides at run time, and it runs a ``Function`` without the
saved tensors' history, which would drop second derivatives without a word. Registered derivatives
keep it: the forward's is the backward operator, and that one's is stock's formula, twice.
Forward mode may begin after the forward, and then has stock's formula for the gradient as well.
"""

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd import Function

from . import ops, stock
from .eligibility import transform_is_active
from .fakes import empty_gradient
from .options import NO_GRADIENTS, Options, split


def graph_loss(input: Tensor, target: Tensor, *options) -> Tensor:
    """Returns the loss; its gradient is recomputed from the logits in the graph's backward."""
    loss, *_ = ops.graph_forward(input, target, *options)
    return loss


def _save_forward(ctx, inputs, output) -> None:
    input, target, *options = inputs
    _, stats, totals = output
    option_tensors, ctx.options = split(options)
    ctx.save_for_backward(input, target, stats, totals, *option_tensors)


def _backward(ctx, grad_loss: Tensor, *_) -> tuple:
    input, target, stats, totals, *option_tensors = ctx.saved_tensors
    options = Options(*option_tensors, *ctx.options)
    needs = needs_input, needs_target = ctx.needs_input_grad[:2]
    if transform_is_active():
        # A graph that runs as it was captured: the transform began only after it.
        found = stock.gradients(input, target, options, grad_loss, (*needs, False))
        return *found[:2], *NO_GRADIENTS
    arguments = (input, target, stats, totals, grad_loss, *options)
    return (
        ops.graph_backward(*arguments) if needs_input else None,
        ops.graph_backward_target(*arguments) if needs_target else None,
        *NO_GRADIENTS,
    )


def _by_stock(of_target: bool, input, target, grad_output, options: Options, create_graph: bool):
    """What one of the two backward operators returns, by stock's formula."""
    loss = stock.loss(input, target, options, grad_output.dtype)
    (gradient,) = torch.autograd.grad(
        loss, target if of_target else input, grad_output.to(loss.dtype), create_graph=create_graph
    )
    return gradient


def _unpack(arguments: tuple) -> tuple[Tensor, Tensor, Tensor, Options]:
    """What a backward operator is given, with the defaults of what a call leaves out.

    The dispatcher takes away what equals its default, also where the call spelled it out.
    """
    input, target, _, _, grad_output, *options = arguments
    return input, target, grad_output, Options(*options)


class _Gradient(Function):
    """One of the two backward operators, whose derivative is that of stock's formula."""

    @staticmethod
    def forward(ctx, operator, *arguments):
        *tensors, options = _unpack(arguments)
        option_tensors, ctx.options = split(options)
        ctx.save_for_backward(*tensors, *option_tensors)
        ctx.of_target = operator is ops.graph_backward_target
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    @staticmethod
    def backward(ctx, grad):
        input, target, grad_output, *option_tensors = ctx.saved_tensors
        options = Options(*option_tensors, *ctx.options)
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            variables = input, target, grad_output = [
                variable(t) for t in (input, target, grad_output)
            ]
            first = _by_stock(ctx.of_target, *variables, options, create_graph=True)
        wanted = [t for t in (input, target, grad_output) if t.is_floating_point()]
        by_input, *by_target, by_grad_output = torch.autograd.grad(
            first, wanted, grad, create_graph=create_graph, allow_unused=True
        )
        (by_target,) = by_target or (None,)
        of_rows = None, None  # the statistics and the totals
        return None, by_input, by_target, *of_rows, by_grad_output, *NO_GRADIENTS


def _autograd_kernel(operator):
    """What autograd runs in the operator's place."""

    def kernel(*arguments):
        if forward_ad._current_level < 0:
            return _Gradient.apply(operator, *arguments)
        input, target, *others = _unpack(arguments)
        of_target = operator is ops.graph_backward_target
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            input, target = map(variable, (input, target))
            gradient = _by_stock(of_target, input, target, *others, create_graph)
        # The graph was made for the strides of the operator's result.
        return empty_gradient(target if of_target else input).copy_(gradient)

    return kernel


def variable(tensor: Tensor) -> Tensor:
    """The tensor, as something that can be differentiated by.

    And no further: what arrives for a loss may itself come from the logits.
    """
    if not tensor.is_floating_point():
        return tensor
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


torch.library.register_autograd("fused_ce::graph_forward", _backward, setup_context=_save_forward)
# Kernels of our own, since what register_autograd makes would drop a tangent without a word.
_library = torch.library.Library("fused_ce", "IMPL")
for _operator in (ops.graph_backward, ops.graph_backward_target):
    _library.impl(_operator, _autograd_kernel(_operator), "Autograd")
