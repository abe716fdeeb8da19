"""What a rank has, and the answer that it is held against."""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common.made import Box, made
from bench.parallel.cases import Sharded

UNSHARDED = "unsharded"  # the provider that has all classes, on the first rank


class RankTensors:
    def __init__(self, case: Sharded, rank: int) -> None:
        self.case, self.rank = case, rank
        part = -(-case.classes // case.ranks)
        self.first = min(case.classes, rank * part)
        self.own = self.whole[:, self.first : self.first + part].clone()
        generator = torch.Generator().manual_seed(1)
        self.target = torch.randint(case.classes, (case.rows,), generator=generator)

    @cached_property
    def whole(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.case.rows, self.case.classes, generator=generator)

    def logits(self, provider: str) -> Box:
        """For one call."""
        if provider == UNSHARDED:
            return made(self.whole) if self.rank == 0 else []
        return made(self.own)

    def reference(self) -> tuple[Tensor, Tensor]:
        whole = self.whole.detach().requires_grad_()
        loss = F.cross_entropy(whole, self.target)
        loss.backward()
        part = self.own.shape[1]
        return loss.detach(), whole.grad[:, self.first : self.first + part].clone()
