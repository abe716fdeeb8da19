"""Who is measured: stock PyTorch, the same compiled, fused_ce, and a copy of the input.

A provider gives a call that answers with the loss and its gradient; the copy, as the yardstick,
with a copy into memory touched before.
"""

import torch

from bench.common.devices import Call
from bench.losses.tensors import LossesTensors


def stock(tensors: LossesTensors) -> Call:
    return lambda input: tensors.answer(tensors.loss.stock, input)


def compiled(tensors: LossesTensors) -> Call:
    function = torch.compile(tensors.loss.stock, fullgraph=True, dynamic=False)
    return lambda input: tensors.answer(function, input)


def fused(tensors: LossesTensors) -> Call:
    import fused_ce

    function = getattr(fused_ce, tensors.loss.function)
    return lambda input: tensors.answer(function, input)


def copy(tensors: LossesTensors) -> Call:
    destination = torch.zeros_like(tensors.input, requires_grad=False)
    return lambda input: destination.copy_(input.detach())


PROVIDERS = {"stock": stock, "compile": compiled, "fused": fused, "copy": copy}


def path_of(name: str, tensors: LossesTensors) -> str:
    """Which way fused_ce takes, in its own words."""
    if name != "fused":
        return ""
    import fused_ce

    function = getattr(fused_ce, tensors.loss.function)
    return fused_ce.explain_call(function, tensors.input, **tensors.arguments)
