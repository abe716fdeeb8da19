"""Who is measured: the composition in torch's operations, the same compiled, the plain fused loss
as a mark of what one pass takes, and the row statistics.

A provider gives a call that answers with log-probability, entropy and their gradients.
"""

import torch
from torch import Tensor

from bench.common.devices import Call
from bench.statistics.tensors import RowTensors, composed


def stock(tensors: RowTensors) -> Call:
    return lambda _: tensors.with_gradients(*composed(tensors.logits(), tensors.target))


def compiled(tensors: RowTensors) -> Call:
    function = torch.compile(composed, fullgraph=True, dynamic=False)
    return lambda _: tensors.with_gradients(*function(tensors.logits(), tensors.target))


def loss(tensors: RowTensors) -> Call:
    """Neither log-probability nor entropy comes of it, and its answer is not held against them."""
    from fused_ce import cross_entropy, linear_cross_entropy

    leaves = [t for t in (tensors.input, tensors.weight) if t is not None]

    def call(_: Tensor) -> tuple[Tensor, ...]:
        if tensors.weight is None:
            value = cross_entropy(tensors.input, tensors.target)
        else:
            value = linear_cross_entropy(tensors.input, tensors.weight, tensors.target)
        return torch.autograd.grad(value, leaves)

    return call


def fused(tensors: RowTensors) -> Call:
    from fused_ce import linear_softmax_stats, softmax_stats

    def call(_: Tensor) -> tuple[Tensor, ...]:
        if tensors.weight is None:
            stats = softmax_stats(tensors.input, tensors.target)
        else:
            stats = linear_softmax_stats(tensors.input, tensors.weight, tensors.target)
        return tensors.with_gradients(stats.log_prob, stats.entropy)

    return call


PROVIDERS = {"stock": stock, "compile": compiled, "loss": loss, "fused": fused}
