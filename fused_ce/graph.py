"""The loss within a graph of ``torch.compile``: operators with derivatives registered for them.

A graph cannot hold what ``autograd`` decides at run time, and it runs a ``Function`` without the
saved tensors' history, which would drop second derivatives without a word. Registered derivatives
keep it: the forward's is the backward operator, and that one's is stock's formula, twice.
"""

import torch
from torch import Tensor

from . import ops
from .autograd import Options, stock_loss


def graph_loss(input, target, weight, options: Options, loss_dtype: torch.dtype) -> Tensor:
    """Returns the loss; its gradient is recomputed from the logits in the graph's backward."""
    loss, _ = ops.graph_forward(input, target, weight, *options, loss_dtype)
    return loss


def _save_forward(ctx, inputs, output) -> None:
    input, target, weight, *options, _ = inputs
    _, stats = output
    ctx.save_for_backward(input, target, weight, stats)
    ctx.options = options


def _backward(ctx, grad_loss: Tensor, _) -> tuple:
    input, target, weight, stats = ctx.saved_tensors
    needs_input, needs_target, *_ = ctx.needs_input_grad
    arguments = (input, target, weight, *ctx.options, stats, grad_loss)
    return (
        ops.graph_backward(*arguments) if needs_input else None,
        ops.graph_backward_target(*arguments) if needs_target else None,
        *(None,) * 5,
    )


def _save_backward(ctx, inputs, output) -> None:
    input, target, weight, *options, _, grad_output = inputs
    ctx.save_for_backward(input, target, weight, grad_output)
    ctx.options = Options(*options)


def _derivative_of_backward(of_target: bool):
    """The derivative of one of the two backward operators."""

    def derivative(ctx, grad: Tensor) -> tuple:
        input, target, weight, grad_output = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            input, target, grad_output = map(_variable, (input, target, grad_output))
            loss = stock_loss(input, target, weight, ctx.options, grad_output.dtype)
            argument = target if of_target else input
            (first,) = torch.autograd.grad(
                loss, argument, grad_output.to(loss.dtype), create_graph=True
            )
        wanted = [t for t in (input, target, grad_output) if t.is_floating_point()]
        by_input, *by_target, by_grad_output = torch.autograd.grad(
            first, wanted, grad, create_graph=create_graph, allow_unused=True
        )
        return by_input, *(by_target or [None]), *(None,) * 5, by_grad_output

    return derivative


def _variable(tensor: Tensor) -> Tensor:
    """The tensor, as something that can be differentiated by."""
    if tensor.requires_grad or not tensor.is_floating_point():
        return tensor
    return tensor.detach().requires_grad_()


for _name, _derivative, _save in (
    ("graph_forward", _backward, _save_forward),
    ("graph_backward", _derivative_of_backward(of_target=False), _save_backward),
    ("graph_backward_target", _derivative_of_backward(of_target=True), _save_backward),
):
    torch.library.register_autograd(f"fused_ce::{_name}", _derivative, setup_context=_save)
