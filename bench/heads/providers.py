"""Who is measured on a head: the GEMMs alone, stock PyTorch, torch's own chunks, and fused_ce.

A provider gives a call that answers with the loss and its gradients for input and weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common.devices import Call
from bench.heads.tensors import HeadTensors


def gemms(tensors: HeadTensors) -> Call:
    """Into memory that has been touched before: they pay for arithmetic alone."""
    input, weight = tensors.input.detach(), tensors.weight.detach()
    logits = torch.mm(input, weight.t())
    input_grad, weight_grad = torch.zeros_like(input), torch.zeros_like(weight)

    def call(_: Tensor) -> tuple[Tensor, ...]:
        torch.mm(input, weight.t(), out=logits)
        torch.mm(logits, weight, out=input_grad)
        torch.mm(logits.t(), input, out=weight_grad)
        return ()

    return call


def stock(tensors: HeadTensors) -> Call:
    return lambda _: tensors.reference()


def torch_chunks(tensors: HeadTensors) -> Call:
    options = nn.LinearCrossEntropyOptions()  # torch 2.13 and newer

    def call(_: Tensor) -> tuple[Tensor, ...]:
        loss = F.linear_cross_entropy(
            tensors.input, tensors.weight, tensors.target, options=options
        )
        return tensors.loss_and_gradients(loss)

    return call


def fused(tensors: HeadTensors) -> Call:
    from fused_ce import linear_cross_entropy

    def call(_: Tensor) -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(tensors.input, tensors.weight, tensors.target)
        return tensors.loss_and_gradients(loss)

    return call


PROVIDERS = {"gemms": gemms, "stock": stock, "torch chunks": torch_chunks, "fused": fused}
