"""The tensors of a head: hidden states, a weight that spreads the logits over a few units, and
targets."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common.precision import DTYPES
from bench.heads.cases import Head


class HeadTensors:
    def __init__(self, head: Head, device: str) -> None:
        torch.manual_seed(0)
        kind = {"dtype": DTYPES[head.dtype], "device": device}
        self.head = head
        self.input = torch.randn(head.rows, head.features, **kind).requires_grad_()
        self.weight = torch.empty(head.classes, head.features, **kind)
        self.weight.normal_(std=head.features**-0.5).requires_grad_()
        self.target = torch.randint(head.classes, (head.rows,), device=device)

    def inputs(self, count: int) -> list[Tensor]:
        """Nobody writes into it, so one serves all calls."""
        return [self.input] * count

    def loss_and_gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return loss.detach(), *torch.autograd.grad(loss, (self.input, self.weight))

    def reference(self) -> tuple[Tensor, ...]:
        """Stock's own answer."""
        logits = F.linear(self.input, self.weight)
        return self.loss_and_gradients(F.cross_entropy(logits, self.target))
