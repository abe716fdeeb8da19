"""Who computes the loss of a step, in the words of a user's own loop.

Each is written once, with a seam: `call` makes the call, and so makes the loss or, with
`fused_ce.explain_call`, tells which way that very call would take.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
Options = Mapping[str, Any]
Provider = Callable[[Callable[..., Any], nn.Module, Batch, Options], Any]


def stock(call: Callable[..., Any], model: nn.Module, batch: Batch, options: Options) -> Any:
    inputs, target = batch
    return call(F.cross_entropy, model(inputs), target, **options)


def patched(call: Callable[..., Any], model: nn.Module, batch: Batch, options: Options) -> Any:
    import fused_ce

    with fused_ce.patch():
        return stock(call, model, batch, options)


def head_fused(call: Callable[..., Any], model: nn.Module, batch: Batch, options: Options) -> Any:
    import fused_ce

    inputs, target = batch
    hidden = model.features(inputs)
    return call(fused_ce.linear_cross_entropy, hidden, model.head.weight, target, **options)


def in_place(call: Callable[..., Any], model: nn.Module, batch: Batch, options: Options) -> Any:
    import fused_ce

    inputs, target = batch
    return call(fused_ce.cross_entropy, model(inputs), target, inplace=True, **options)


PROVIDERS: dict[str, Provider] = {
    "stock": stock,
    "patch": patched,
    "head": head_fused,
    "inplace": in_place,
}


def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return function(*arguments, **options)


def loss_of(name: str, model: nn.Module, batch: Batch, options: Options) -> Tensor:
    return PROVIDERS[name](call, model, batch, options)


def path_of(name: str, model: nn.Module, batch: Batch, options: Options) -> str:
    """Which way fused_ce takes, in its own words."""
    if name == "stock":
        return ""
    import fused_ce

    return PROVIDERS[name](fused_ce.explain_call, model, batch, options)
