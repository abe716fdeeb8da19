"""What the steps of a size are given, and the answer that theirs are held against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common.made import Box, made
from bench.ownership.cases import Size

CHECKED_ROWS = 64


class StepTensors:
    def __init__(self, size: Size) -> None:
        torch.manual_seed(0)
        self.original = torch.randn(size.rows, size.classes)
        self.target = torch.randint(size.classes, (size.rows,))
        self._reference: tuple[Tensor, Tensor] | None = None

    def inputs(self, count: int) -> list[Box]:
        return [made(self.original) for _ in range(count)]

    def reference(self, grad_output: float) -> tuple[Tensor, Tensor]:
        """Stock's loss, and its gradient as far as it is checked."""
        if self._reference is None:
            logits = self.original.detach().requires_grad_()
            loss = F.cross_entropy(logits, self.target)
            (grad,) = torch.autograd.grad(loss, logits)
            self._reference = loss.detach(), self.checked(grad).clone()
        loss, grad = self._reference
        return loss, grad * grad_output

    def checked(self, grad: Tensor) -> Tensor:
        """Of a gradient some rows from first to last."""
        return grad[:: max(1, len(grad) // CHECKED_ROWS)]
