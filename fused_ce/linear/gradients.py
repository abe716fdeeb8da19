"""The gradients of a linear layer's tensors, summed over the chunks.

Sums are taken in float32 at least, and what is most of one goes in by itself where a GEMM would
have rounded it.
"""

import torch
from torch import Tensor

from ..huge_pages import fresh
from .chunks import Problem, Which
from .plan import TILE_BYTES


class Gradients:
    """The gradients of the layer's tensors that need one, as chunk after chunk adds to them."""

    def __init__(self, problem: Problem, like: tuple, needs: tuple) -> None:
        self.problem = problem
        self.like = like
        self.needs = needs
        input, linear_weight, linear_bias = like
        dtype = problem.input_grad_dtype(input.dtype)
        # Rows that do not count have a gradient of zero, which no chunk writes.
        new = torch.empty_like if problem.counted is None else torch.zeros_like
        self.input = (
            new(input, dtype=dtype, memory_format=torch.contiguous_format) if needs[0] else None
        )
        # Little is lost by summing in the GEMMs' own type where one of them gives the whole, or
        # where narrow results of two are added and rounded once.
        terms = -(-problem.count // problem.rows)
        exact = terms <= 1 or (terms == 2 and problem.has_tiles)
        same = linear_weight.dtype == problem.dtype
        wide = torch.promote_types(problem.dtype, torch.float32)
        self.sum_dtype = problem.dtype if exact and same else wide
        self.linear_weight = self.linear_bias = None
        # A GEMM's narrow results are rounded before they are added, which stock's one GEMM is not.
        # What the targets' logits contribute is most of many, so it goes into the sum by itself.
        self.targets_apart = problem.has_tiles and terms > 1 and problem.classes > 0
        self.targets = []  # of each chunk, the columns of the logits and the gradients there

    def add(self, rows: Which, input: Tensor, logits_grad: Tensor) -> None:
        problem = self.problem
        if self.needs[0]:
            part = self.input[rows]
            _mm(logits_grad, problem.linear_weight, part, problem.device.widens)
            if isinstance(rows, Tensor):  # a copy
                self.input[rows] = part
            problem.take_input_grad(part)
        if self.needs[2]:
            self._add_bias(logits_grad)
        if self.needs[1]:
            if self.targets_apart:
                self._take_targets(rows, logits_grad)
            self._add_weight(logits_grad.t(), input)

    def _add_weight(self, logits_grad: Tensor, input: Tensor) -> None:
        problem, first = self.problem, self.linear_weight is None
        if first:
            shape = problem.linear_weight.shape
            self.linear_weight = fresh(shape, input, self.sum_dtype)
        total = self.linear_weight
        if problem.has_tiles and (not first or total.dtype != problem.dtype):
            for tile in problem.tiles():
                part = torch.mm(logits_grad[tile], input)
                total[tile].copy_(part) if first else total[tile].add_(part)
        elif total.dtype != problem.dtype:
            if first:
                torch.mm(logits_grad, input, out_dtype=total.dtype, out=total)
            else:
                torch.addmm(total, logits_grad, input, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, logits_grad, input, beta=0 if first else 1, out=total)

    def _take_targets(self, rows: Which, logits_grad: Tensor) -> None:
        columns = self.problem.columns_of_targets(rows)
        each = torch.arange(len(columns), device=columns.device).unsqueeze(1)
        self.targets.append((columns, logits_grad[each, columns]))
        logits_grad[each, columns] = 0

    def _add_targets(self) -> None:
        """Adds what was taken out: all that belongs to a row of the weight before it is rounded."""
        total, input, counted = self.linear_weight, self.problem.input, self.problem.counted
        columns, values = map(torch.cat, zip(*self.targets, strict=True))  # [N, positions]
        found, places = columns.unique(return_inverse=True)
        wide = torch.promote_types(total.dtype, torch.float32)
        values = values.to(wide).unsqueeze(2)
        # A piece of scratch for the sums of some features, and one for their terms of some rows.
        width = max(TILE_BYTES // (max(len(found), 1) * wide.itemsize), 1)
        for start in range(0, input.shape[1], width):
            some = slice(start, start + width)
            sums = total[found, some].to(wide)
            height = max(TILE_BYTES // (sums.shape[1] * places.shape[1] * wide.itemsize), 1)
            for rows in (slice(first, first + height) for first in range(0, len(values), height)):
                of_input = rows if counted is None else counted[rows]
                terms = values[rows] * input[of_input, some].to(self.problem.dtype).unsqueeze(1)
                sums.index_add_(0, places[rows].flatten(), terms.flatten(0, 1))
            total[found, some] = sums.to(total.dtype)

    def _add_bias(self, logits_grad: Tensor) -> None:
        wide = torch.promote_types(self.problem.dtype, torch.float32)
        if self.linear_bias is None:
            self.linear_bias = logits_grad.new_zeros(logits_grad.shape[1], dtype=torch.float64)
        # By parts, since a sum in another type makes a copy in that type on the CPU.
        size = max(TILE_BYTES // (max(len(logits_grad), 1) * wide.itemsize), 1)
        for total, part in zip(
            self.linear_bias.split(size), logits_grad.split(size, dim=1), strict=True
        ):
            total += part.sum(0, dtype=wide)

    def result(self) -> list[Tensor]:
        """In the types of what they are gradients of; where none is needed, an empty tensor."""
        if self.targets:
            self._add_targets()
        found = (self.input, self.linear_weight, self.linear_bias)
        gradients = []
        for like, grad, needed in zip(self.like, found, self.needs, strict=True):
            if not needed:
                gradients.append(self.like[0].new_empty(0))
            elif grad is None:  # there were no rows
                gradients.append(torch.zeros_like(like, memory_format=torch.contiguous_format))
            else:
                gradients.append(grad.to(like.dtype))
        return gradients


def _mm(a: Tensor, b: Tensor, out: Tensor, widens: bool) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif widens and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(a, b))
