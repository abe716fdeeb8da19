"""One call, cut into chunks of rows: one GEMM for their logits, then the cross entropy over them.

The mean's denominators are computed once from all rows, so that what a chunk leaves is final.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..huge_pages import fresh
from ..options import MEAN, NONE, Options
from .plan import DEVICES, TILE_BYTES, Limits, Sizes
from .targets import Rows, batch_dims

Which = slice | Tensor  # rows next to each other, or these
_CLASSES_APART = 2  # of a row's probabilities: those that mixed-up labels have


class Problem:
    """The tensors of a call in the types that are computed with, and the chunks."""

    def __init__(
        self,
        input: Tensor,  # [N, H]
        linear_weight: Tensor,  # [V, H], V being the classes times all positions
        target: Tensor,  # [N, d1, ..., dK], or [N, C, d1, ..., dK] with all batch dimensions
        linear_bias: Tensor | None,  # [V]
        dtype: torch.dtype,  # of the logits
        limits: Limits,
        options: Options,
    ) -> None:
        device = DEVICES[input.device.type]
        self.device = device
        self.dtype = device.computed_dtype(dtype)
        dims = batch_dims(target, len(input))
        self.input, self.target = input, target if dims == 1 else Rows(target, dims)
        self.linear_weight = linear_weight.to(self.dtype)
        self.linear_bias = None if linear_bias is None else linear_bias.to(self.dtype)
        self.probabilities = target.is_floating_point()
        self.positions = target.shape[dims + self.probabilities :]
        columns = linear_weight.shape[0]
        self.classes = columns // max(math.prod(self.positions), 1)
        self.all_classes = self.whole(self.classes)
        self.reduction, self.loss_dtype = options.reduction, options.loss_dtype
        divides = options.reduction == MEAN
        divides = divides and (options.denominator is None or bool(options.on_all_ignored))
        left_out = self._left_out(options) if divides or device.checks_values else None
        if device.checks_values and not options.on_out_of_range:
            self.check_range(left_out)
        if divides:
            found = self._denominators(options, left_out)
            options = options._replace(denominator=found, on_all_ignored=0)
        self.options = options._replace(loss_dtype=torch.float64)  # of a chunk's own loss
        # The rows that count, where others do not and the host may look; else all of them.
        self.counted = self.rows_that_count(left_out) if device.checks_values else None
        copied = target.dtype.itemsize if dims > 1 else 0
        self.rows = self.sizes(columns, copied).chunk_rows(limits, self.dtype, device)

    def check_range(self, left_out: Tensor) -> None:
        """Before the first chunk, since the operators see each no more than their own."""
        if self.probabilities:
            return
        outside = self._outside(left_out)
        if outside.any():
            found = self.target.long()[outside][0].item()
            raise IndexError(f"Target {found} is out of bounds.")

    def sizes(self, columns: int, copied_bytes: int) -> Sizes:
        """What decides how many rows a chunk has."""
        copies = self.input.dtype != self.dtype or self.counted is not None
        features = self.input.shape[1]
        return Sizes(self.count, features, self.classes, columns, copies, copied_bytes)

    def rows_that_count(self, left_out: Tensor) -> Tensor | None:
        """The others get no logits: a padded batch does not pay for its padding. None for all."""
        if isinstance(self.target, Rows):
            return None
        if left_out.dim() > 1:
            left_out = left_out.flatten(1).all(1)
        return left_out.logical_not().nonzero().squeeze(1) if left_out.any() else None

    @property
    def count(self) -> int:
        """How many rows get logits."""
        return len(self.input if self.counted is None else self.counted)

    def _denominators(self, options: Options, left_out: Tensor) -> Tensor:
        """What the mean divides the losses and the z-losses by, in float64; no number visits the
        host."""
        count = left_out.logical_not().sum(dtype=torch.float64)
        if options.denominator is not None:
            found = options.denominator.double().expand(2)
        else:
            of_rows = of_classes = count
            weights = options.sample_weight
            if weights is not None:
                weights = weights.double().masked_fill(left_out, 0)
                of_rows = of_classes = weights.sum()
            if options.weight is not None and not self.probabilities:
                by_class = self.weights_of(options.weight.double(), self._classes_of(left_out))
                by_class = by_class.masked_fill(left_out, 0)
                if options.on_out_of_range:
                    by_class = by_class.masked_fill(self._outside(left_out), 1)
                of_classes = (by_class if weights is None else by_class * weights).sum()
            if options.label_smoothing > 0:
                # As stock has it, also where smoothing leaves a loss to divide.
                of_classes = of_classes.masked_fill(of_classes == 0, math.nan)
            found = torch.stack([of_classes, of_rows])
        return torch.where(count == 0, 1.0, found) if options.on_all_ignored else found

    def _left_out(self, options: Options) -> Tensor:
        """Which rows do not count, [N, d1, ..., dK]."""
        if self.probabilities:
            rows = self.input.new_zeros((len(self.input), *self.positions), dtype=torch.bool)
        else:
            rows = self.target.long() == options.ignore_index
        weight = options.sample_weight
        return rows if weight is None else rows | (weight == 0)

    def _outside(self, left_out: Tensor) -> Tensor:
        """Which targets of the rows that count are no classes."""
        target = self.target.long()
        return ((target < 0) | (target >= self.all_classes)) & ~left_out

    def _classes_of(self, left_out: Tensor) -> Tensor:
        """The target of each row that has one, and class 0 of the others."""
        return self.target.long().masked_fill(left_out | self._outside(left_out), 0)

    def whole(self, classes: int) -> int:
        """How many classes there are in all."""
        return classes

    def own_class(self, target: Tensor) -> Tensor:
        """Which of the logits is that of each target, if one of them is."""
        return target

    def weights_of(self, weight: Tensor, classes: Tensor) -> Tensor:
        """The weight of the class of each row."""
        return weight[classes]

    def options_of(self, rows: Which) -> Options:
        weight = self.options.sample_weight
        return self.options if weight is None else self.options._replace(sample_weight=weight[rows])

    @property
    def has_tiles(self) -> bool:
        return self.device.sums_by_tiles(self.dtype)

    def tiles(self) -> Iterator[slice]:
        """Parts of the weight whose gradient in the GEMMs' type is a piece of scratch."""
        columns, features = self.linear_weight.shape
        size = max(TILE_BYTES // (max(features, 1) * self.dtype.itemsize), 1)
        for start in range(0, columns, size):
            yield slice(start, min(start + size, columns))

    def chunks(self, held: int = 1) -> Iterator[tuple[Which, Tensor, Tensor]]:
        """Which rows, these rows of the input, and their logits, in memory that is used again for
        those of so many chunks later."""
        count, columns = self.count, self.linear_weight.shape[0]
        shape = min(self.rows, count), columns
        memory: list[Tensor] = []
        for index, start in enumerate(range(0, count, self.rows)):
            rows: Which = slice(start, min(start + self.rows, count))
            if self.counted is not None:
                rows = self.counted[rows]
            input = self.input[rows].to(self.dtype)
            if index < held:
                memory.append(fresh(shape, self.input, self.dtype))
            logits = memory[index % held][: input.shape[0]]
            if self.linear_bias is None:
                torch.mm(input, self.linear_weight.t(), out=logits)
            else:
                torch.addmm(self.linear_bias, input, self.linear_weight.t(), out=logits)
            yield rows, input, logits

    def losses(self) -> list[Tensor]:
        """Of each chunk, in float64."""
        return [
            ops.forward(self.shaped(logits), self.target[rows], *self.options_of(rows))
            for rows, _, logits in self.chunks()
        ]

    def losses_and_gradients(
        self, grad_output: Tensor | None, take: Callable[[Which, Tensor, Tensor], Any]
    ) -> list[Tensor]:
        """The losses; ``take`` is given each chunk with the gradient in the place of its logits.

        The memory of the logits is free again on return, before what the gradients take to be
        finished.
        """
        losses = []
        for rows, input, logits in self.chunks():
            of_rows = grad_output
            if grad_output is not None and self.reduction == NONE:
                of_rows = grad_output[rows]
            arguments = self.target[rows], of_rows, *self.options_of(rows)
            losses.append(ops.forward_grad_(self.shaped(logits), *arguments))
            take(rows, input, logits)
        return losses

    def input_grad_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which the gradient of an input of this dtype is put together."""
        return dtype

    def take_input_grad(self, grad: Tensor) -> None:
        """Is given that of each chunk."""

    def columns_of_targets(self, rows: Which) -> Tensor:
        """Where in a row of logits those of its targets are, or of the two most probable classes;
        any place for an ignored one."""
        target = self.target[rows]
        if self.probabilities:
            found = target.topk(min(_CLASSES_APART, self.classes), 1).indices
        else:
            found = self.own_class(target.long())
            found = found.where((found >= 0) & (found < self.classes), 0).unsqueeze(1)
        found = found.reshape(*found.shape[:2], -1)
        count = found.shape[2]
        return (found * count + torch.arange(count, device=found.device)).flatten(1)

    def shaped(self, logits: Tensor) -> Tensor:
        return logits.view(len(logits), self.classes, *self.positions)

    def total(self, losses: list[Tensor]) -> Tensor:
        """The loss, from those of the chunks."""
        if self.reduction == NONE:
            empty = self.input.new_empty((0, *self.positions), dtype=torch.float64)
            found = torch.cat([empty, *losses]).to(self.loss_dtype)
            if self.counted is None:
                return found
            return found.new_zeros((len(self.input), *self.positions)).index_copy_(
                0, self.counted, found
            )
        loss = self.input.new_zeros((), dtype=torch.float64)
        for part in losses:
            loss += part
        if self.reduction == MEAN and not losses:
            loss /= self.options.denominator.view(-1)[0]
        return loss.to(self.loss_dtype)
