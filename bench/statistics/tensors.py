"""The tensors of a case, and the composition that its answers are held against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common.precision import DTYPES
from bench.statistics.cases import Rows


def composed(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy as people write them, in the type of the logits."""
    log_p = logits.log_softmax(-1)
    log_prob = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return log_prob, -(log_p.exp() * log_p).sum(-1)


class RowTensors:
    def __init__(self, case: Rows, device: str) -> None:
        torch.manual_seed(0)
        kind = {"dtype": DTYPES[case.dtype], "device": device}
        self.case = case
        self.weight = None
        if case.features:
            self.input = torch.randn(case.rows, case.features, **kind).requires_grad_()
            self.weight = torch.empty(case.classes, case.features, **kind)
            self.weight.normal_(std=case.features**-0.5).requires_grad_()
        else:
            self.input = torch.randn(case.rows, case.classes, **kind).requires_grad_()
        self.target = torch.randint(case.classes, (case.rows,), device=device)
        self.of_log_prob = torch.randn(case.rows, device=device)
        self.of_entropy = torch.randn(case.rows, device=device)

    def inputs(self, count: int) -> list[Tensor]:
        """Nobody writes into it, so one serves all calls."""
        return [self.input] * count

    def logits(self) -> Tensor:
        return self.input if self.weight is None else F.linear(self.input, self.weight)

    def with_gradients(self, log_prob: Tensor, entropy: Tensor) -> tuple[Tensor, ...]:
        leaves = [t for t in (self.input, self.weight) if t is not None]
        values = (log_prob, entropy)
        grads = (self.of_log_prob.to(log_prob.dtype), self.of_entropy.to(entropy.dtype))
        gradients = torch.autograd.grad(values, leaves, grads)
        return log_prob.detach(), entropy.detach(), *gradients

    def reference(self) -> tuple[Tensor, ...]:
        """In float32 at least."""
        return self.with_gradients(*composed(self.logits().float(), self.target))
