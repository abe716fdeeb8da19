"""The time of ours over stock's in one case: of the processor, for one thread.

Processor time does not count what other programs take, and a ratio of medians of neighbours leaves
out most of what they do to the caches.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import process_time

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cliffs.cases import (
    BOTH,
    LAYOUTS,
    LOGITS,
    PROBABILITIES,
    TARGET_LAYOUTS,
    TARGETS,
    Case,
)
from bench.common.precision import DTYPES, check
from bench.loss.providers import PROVIDERS

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Timing:
    case: Case
    stock: float  # milliseconds of a call
    ours: float

    @property
    def ratio(self) -> float:
        return self.ours / self.stock


class HandedToStock(Exception):
    """Ours answers this call with stock's function, and there is nothing to compare."""


class Call:
    """The tensors of a case, and a loss at work on them."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case, dtype = case, DTYPES[case.dtype]
        self.original = torch.randn(case.shape, dtype=dtype)
        self.logits = LAYOUTS[case.layout](case.shape, dtype)
        make_target, rows = TARGET_LAYOUTS[case.target_layout], case.shape[:1] + case.shape[2:]
        if case.target == PROBABILITIES:
            self.target = filled(make_target(case.shape, dtype), self.original.flip(1).softmax(1))
        else:
            indices = torch.randint(case.shape[1], rows)
            self.target = filled(make_target(rows, getattr(torch, case.target)), indices)
        self.options = {"reduction": case.reduction, "label_smoothing": case.smoothing}
        if case.weighted:
            self.options["weight"] = torch.rand(case.shape[1], dtype=dtype) + 0.5
        self.mode = PROVIDERS[case.mode].mode
        self.grad_output = None
        if case.reduction == "none":
            self.grad_output = torch.full(rows, case.grad_output, dtype=dtype)
        elif case.grad_output != 1.0:
            self.grad_output = torch.tensor(case.grad_output, dtype=dtype)
        self.logits.requires_grad_(case.grads in (LOGITS, BOTH))
        self.target.requires_grad_(case.grads in (TARGETS, BOTH))
        self.leaves = [each for each in (self.logits, self.target) if each.requires_grad]

    def write_logits(self) -> None:
        """As before the last call, which may have overwritten them."""
        with torch.no_grad():
            self.logits.copy_(self.original)

    def run(self, loss: Loss) -> list[Tensor]:
        with torch.set_grad_enabled(bool(self.leaves)):
            value = loss(self.logits, self.target, **self.options)
            if not self.leaves:
                return [value]
            return [value, *torch.autograd.grad(value, self.leaves, self.grad_output)]

    def ours(self, loss: Loss) -> Loss:
        return lambda *given, **options: loss(*given, **options, **self.mode)

    def milliseconds(self, loss: Loss) -> float:
        self.write_logits()
        start = process_time()
        self.run(loss)
        return (process_time() - start) * 1e3

    def reference(self) -> list[Tensor]:
        """What stock computes, in float32 at least."""
        wide = Call.__new__(Call)
        wide.__dict__ |= self.__dict__
        at_least = torch.promote_types(self.logits.dtype, torch.float32)

        def widen(tensor: Tensor) -> Tensor:
            return tensor.detach().to(at_least) if tensor.is_floating_point() else tensor.long()

        self.write_logits()
        wide.logits = widen(self.logits).requires_grad_(self.logits.requires_grad)
        wide.target = widen(self.target).requires_grad_(self.target.requires_grad)
        wide.leaves = [each for each in (wide.logits, wide.target) if each.requires_grad]
        wide.options = {
            name: widen(value) if torch.is_tensor(value) else value
            for name, value in self.options.items()
        }
        if self.grad_output is not None:
            wide.grad_output = widen(self.grad_output)
        return wide.run(F.cross_entropy)


def filled(tensor: Tensor, values: Tensor) -> Tensor:
    """With the first of the values where it is expanded."""
    if tensor.stride(0) == 0 and tensor.shape[0] > 1:
        tensor[0].copy_(values[0])
        return tensor
    return tensor.copy_(values)


def compare(case: Case, rounds: int, ours: Loss | None = None) -> Timing:
    import fused_ce

    call = Call(case)
    mine = call.ours(ours or fused_ce.cross_entropy)
    call.write_logits()
    path = fused_ce.explain(call.logits, call.target, **call.options, **call.mode)
    if not path.startswith("fused"):
        raise HandedToStock(path)
    expected = call.reference()
    try:
        check(call.run(mine), expected, ("loss", "gradient", "other gradient"), case.dtype)
    except ArithmeticError as error:
        raise ArithmeticError(f"{case}: {error}") from None
    losses = {"stock": F.cross_entropy, "ours": mine}
    if case.target == "int32":  # which stock does not take
        call_stock = losses["stock"]
        losses["stock"] = lambda logits, target, **options: call_stock(
            logits, target.long(), **options
        )
    samples: dict[str, list[float]] = {name: [] for name in losses}
    order = random.Random(0)
    call.milliseconds(losses["stock"])
    for _ in range(rounds):
        for name in order.sample(sorted(losses), 2):
            samples[name].append(call.milliseconds(losses[name]))
    return Timing(case, *(median(samples[name]) for name in ("stock", "ours")))
