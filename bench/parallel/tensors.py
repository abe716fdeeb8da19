"""What a rank has, and the answer that it is held against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.parallel.cases import Sharded


class RankTensors:
    def __init__(self, case: Sharded, rank: int) -> None:
        self.case, self.rank = case, rank
        part = -(-case.classes // case.ranks)
        self.first = min(case.classes, rank * part)
        self.own = self.whole()[:, self.first : self.first + part].clone()
        generator = torch.Generator().manual_seed(1)
        self.target = torch.randint(case.classes, (case.rows,), generator=generator)

    def whole(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.case.rows, self.case.classes, generator=generator)

    def logits(self) -> Tensor:
        """A leaf for one call. Overwritten, it holds gradients, which are logits like any other."""
        return self.own.detach().requires_grad_()

    def reference(self) -> tuple[Tensor, Tensor]:
        whole = self.whole().requires_grad_()
        loss = F.cross_entropy(whole, self.target)
        loss.backward()
        part = self.own.shape[1]
        return loss.detach(), whole.grad[:, self.first : self.first + part].clone()
