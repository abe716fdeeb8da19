"""Who is measured: stock PyTorch, stock compiled, the modes of fused_ce, its peers, and the copy.

A provider gives the call of a pass: logits in, loss (and gradient) out, nothing between the two
that is not the provider's own work. Forward runs without a gradient. Forward+backward is the loss
and `torch.autograd.grad` of it, which hands the gradient on as a model's own backward would take
it: a fresh tensor in every call, nothing accumulated.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common.devices import Call
from bench.common.figures import BOTH, COPY, FORWARD
from bench.loss.cases import Case
from bench.loss.composed import EXTENSIONS
from bench.loss.tensors import LossTensors

WARM_UPS = 3  # of a call before it is captured


def stock(function: Callable[..., Tensor] = F.cross_entropy) -> Callable[..., Tensor]:
    return function


def compiled(function: Callable[..., Tensor] = F.cross_entropy) -> Callable[..., Tensor]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def fused() -> Callable[..., Tensor]:
    # Imported here, so that where nothing has been built the others are still measured.
    import fused_ce

    return fused_ce.cross_entropy


def liger() -> Callable[..., Tensor]:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy


def quack() -> Callable[..., Tensor]:
    from quack.cross_entropy import cross_entropy

    return cross_entropy


@dataclass(frozen=True)
class Provider:
    function: Callable[[], Callable[..., Tensor]] | None  # none for the copy
    has_extensions: bool = False  # or what they are composed of
    mode: Mapping[str, bool] = field(default_factory=dict)
    passes: tuple[str, ...] = (FORWARD, BOTH)
    package: str = ""  # of a peer, which may not be installed and has kernels for CUDA alone


# Recompute and in place differ from the default by when the gradient is computed; without one they
# are the same call.
PROVIDERS = {
    "stock": Provider(stock),
    "compile": Provider(compiled),
    "fused": Provider(fused, True),
    "recompute": Provider(fused, True, {"grad_in_forward": False}, (BOTH,)),
    "inplace": Provider(fused, True, {"inplace": True}, (BOTH,)),
    # Liger writes its gradient over the logits it is given; all get logits that nobody else needs.
    "liger": Provider(liger, package="liger_kernel"),
    "quack": Provider(quack, package="quack"),
    "copy": Provider(None, passes=(COPY,)),
}


def usual(device: str) -> list[str]:
    """Who is measured if nobody says: the peers where they are installed and have kernels."""
    return [
        name
        for name, provider in PROVIDERS.items()
        if not provider.package or (device == "cuda" and find_spec(provider.package))
    ]


def passes_of(name: str, case: Case) -> tuple[str, ...]:
    """Without a gradient a case with a grad_output of its own is the plain case again. A peer has
    not all options."""
    passes = PROVIDERS[name].passes
    if case.extension and PROVIDERS[name].package:
        return ()
    return passes if case.grad_output == 1.0 else tuple(p for p in passes if p != FORWARD)


def make_call(name: str, which: str, tensors: LossTensors, calls: int) -> Call:
    """For `calls` calls in a row, each with logits of its own."""
    call = make_eager_call(name, which, tensors, calls)
    return replayed(call, tensors) if tensors.case.graph else call


def make_eager_call(name: str, which: str, tensors: LossTensors, calls: int) -> Call:
    provider = PROVIDERS[name]
    if provider.function is None:
        # Touched before, so that the copy pays for its traffic and not for its pages.
        destinations = cycle([torch.zeros_like(tensors.original) for _ in range(calls)])
        return lambda logits: next(destinations).copy_(logits)
    extension = tensors.case.extension
    if extension and not provider.has_extensions:
        function = provider.function(EXTENSIONS[extension].composed)
    else:
        function = provider.function()
    loss = partial(function, target=tensors.target, **tensors.options, **provider.mode)
    if which == FORWARD:
        return loss
    grad_output = tensors.grad_output

    def forward_and_backward(logits: Tensor) -> tuple[Tensor, Tensor]:
        value = loss(logits)
        return value, torch.autograd.grad(value, logits, grad_output)[0]

    return forward_and_backward


def replayed(call: Call, tensors: LossTensors) -> Call:
    """The call as a CUDA graph, which has logits of its own and answers for those."""
    logits = torch.empty_like(tensors.original).requires_grad_()

    def write() -> None:
        with torch.no_grad():
            logits.copy_(tensors.original)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            write()
            call(logits)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = call(logits)
    write()  # in place the first replay overwrites them, and only its answer is looked at

    def replay(_: Tensor) -> Any:
        graph.replay()
        return answer

    return replay


def path_of(name: str, tensors: LossTensors) -> str:
    """Which of its paths fused_ce takes, in its own words. Stock's figures under the name of fused
    would be the worst this program could print."""
    provider = PROVIDERS[name]
    if provider.function is not fused:
        return ""
    from fused_ce import explain

    (logits,) = tensors.inputs(1)
    answer = explain(logits, tensors.target, **tensors.options, **provider.mode)
    if not answer.startswith("fused"):
        raise RuntimeError(f"fused_ce does not take this case: {answer}")
    return answer
