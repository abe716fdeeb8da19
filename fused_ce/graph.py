"""The loss within a graph of ``torch.compile``: operators with derivatives registered for them.

A graph cannot hold what ``autograd`` decides at run time, and it runs a ``Function`` without the
saved tensors' history, which would drop second derivatives without a word. Registered derivatives
keep it: the forward's is the backward operator, and that one's is stock's formula, twice.
Forward mode may begin after the forward, and then has stock's formula for the gradient as well.
"""

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd import Function

from . import ops
from .autograd import Options, stock_gradients, stock_loss, transform_is_active


def graph_loss(input: Tensor, target: Tensor, *arguments) -> Tensor:
    """Returns the loss; its gradient is recomputed from the logits in the graph's backward."""
    loss, *_ = ops.graph_forward(input, target, *arguments)
    return loss


def _save_forward(ctx, inputs, output) -> None:
    input, target, weight, *options = inputs
    _, stats, totals = output
    ctx.save_for_backward(input, target, stats, totals, weight)
    ctx.options = options


def _backward(ctx, grad_loss: Tensor, *_) -> tuple:
    saved = input, target, stats, totals, weight = ctx.saved_tensors
    if transform_is_active():
        # A graph that runs as it was captured: the transform began only after it.
        return stock_gradients(ctx, grad_loss, saved)
    needs_input, needs_target, *_ = ctx.needs_input_grad
    arguments = (input, target, stats, totals, grad_loss, weight, *ctx.options)
    return (
        ops.graph_backward(*arguments) if needs_input else None,
        ops.graph_backward_target(*arguments) if needs_target else None,
        *(None,) * 6,
    )


def _by_stock(of_target: bool, input, target, weight, options, grad_output, create_graph):
    """What one of the two backward operators returns, by stock's formula."""
    loss = stock_loss(input, target, weight, options, grad_output.dtype)
    (gradient,) = torch.autograd.grad(
        loss, target if of_target else input, grad_output.to(loss.dtype), create_graph=create_graph
    )
    return gradient


def _unpack(arguments: tuple) -> tuple:
    """A backward operator's problem, with the defaults of what a call leaves out.

    The dispatcher takes away what equals its default, also where the call spelled it out.
    """
    input, target, _, _, grad_output, *given = arguments
    options = Options(*given, *ops.DEFAULTS[len(given) :])
    return input, target, options.weight, options, grad_output


class _Gradient(Function):
    """One of the two backward operators, whose derivative is that of stock's formula."""

    @staticmethod
    def forward(ctx, operator, *arguments):
        input, target, weight, ctx.options, grad_output = _unpack(arguments)
        ctx.save_for_backward(input, target, weight, grad_output)
        ctx.of_target = operator is ops.graph_backward_target
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    @staticmethod
    def backward(ctx, grad):
        input, target, weight, grad_output = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            input, target, grad_output = map(_variable, (input, target, grad_output))
            arguments = (input, target, weight, ctx.options, grad_output)
            first = _by_stock(ctx.of_target, *arguments, create_graph=True)
        wanted = [t for t in (input, target, grad_output) if t.is_floating_point()]
        by_input, *by_target, by_grad_output = torch.autograd.grad(
            first, wanted, grad, create_graph=create_graph, allow_unused=True
        )
        return None, by_input, *(by_target or [None]), None, None, by_grad_output, *(None,) * 6


def _autograd_kernel(operator):
    """What autograd runs in the operator's place."""

    def kernel(*arguments):
        if forward_ad._current_level < 0:
            return _Gradient.apply(operator, *arguments)
        input, target, *others = _unpack(arguments)
        of_target = operator is ops.graph_backward_target
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            input, target = map(_variable, (input, target))
            gradient = _by_stock(of_target, input, target, *others, create_graph)
        # The graph was made for the strides of the operator's result.
        return ops.empty_gradient(target if of_target else input).copy_(gradient)

    return kernel


def _variable(tensor: Tensor) -> Tensor:
    """The tensor, as something that can be differentiated by."""
    if tensor.requires_grad or not tensor.is_floating_point():
        return tensor
    return tensor.detach().requires_grad_()


torch.library.register_autograd("fused_ce::graph_forward", _backward, setup_context=_save_forward)
# Kernels of our own, since what register_autograd makes would drop a tangent without a word.
_library = torch.library.Library("fused_ce", "IMPL")
for _operator in (ops.graph_backward, ops.graph_backward_target):
    _library.impl(_operator, _autograd_kernel(_operator), "Autograd")
