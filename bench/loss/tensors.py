"""The tensors of one case, made the same way every time.

The logits exist once as they were made and once or more as what a provider is given. Every timed
call gets logits written just before, outside the timer, as a model would just have written them:
in place needs it, and so every provider finds the caches in the same state.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common.figures import BOTH, COPY
from bench.common.precision import DTYPES
from bench.loss.cases import Case
from bench.loss.composed import EXTENSIONS

IGNORED = -100
IGNORED_PART = 0.1
SMOOTHING = 0.1


class LossTensors:
    def __init__(self, case: Case, device: str) -> None:
        torch.manual_seed(0)
        self.case = case
        dtype = DTYPES[case.dtype]
        classes, positions = case.shape[1], case.shape[:1] + case.shape[2:]
        self.original = torch.randn(case.shape, dtype=dtype, device=device)
        if case.channels_last:
            self.original = self.original.contiguous(memory_format=torch.channels_last)
        if case.probabilities:
            self.target = torch.randn_like(self.original).softmax(1)
        else:
            self.target = torch.randint(classes, positions, device=device)
        self.options: dict[str, Any] = {}
        if case.weighted:
            ignored = torch.rand(positions, device=device) < IGNORED_PART
            self.target.masked_fill_(ignored, IGNORED)
            weight = torch.rand(classes, dtype=dtype, device=device) + 0.5
            self.options = {
                "weight": weight,
                "ignore_index": IGNORED,
                "label_smoothing": SMOOTHING,
            }
        elif case.extension:
            options = EXTENSIONS[case.extension].options(self.target.numel())
            self.options = {
                name: value.to(device) if torch.is_tensor(value) else value
                for name, value in options.items()
            }
        # None is what loss.backward() passes; it stands for 1.
        self.grad_output = None
        if case.grad_output != 1.0:
            self.grad_output = torch.tensor(case.grad_output, dtype=dtype, device=device)
        self._inputs: list[Tensor] = []

    def inputs(self, count: int) -> list[Tensor]:
        """That many leaves with the original's values, written anew."""
        while len(self._inputs) < count:
            self._inputs.append(torch.empty_like(self.original).requires_grad_())
        chosen = self._inputs[:count]
        with torch.no_grad():
            for logits in chosen:
                logits.copy_(self.original)
        return chosen

    def reference(self) -> tuple[Tensor, Tensor]:
        """Stock's loss and gradient, in float32 at least: its half types sum in half precision, and
        lose a loss over many rows."""

        def widen(value: Any) -> Any:
            wide = torch.is_tensor(value) and value.is_floating_point()
            return value.to(torch.promote_types(value.dtype, torch.float32)) if wide else value

        logits = widen(self.original).detach().requires_grad_()
        options = {name: widen(value) for name, value in self.options.items()}
        extension = self.case.extension
        function = EXTENSIONS[extension].composed if extension else F.cross_entropy
        loss = function(logits, widen(self.target), **options)
        return loss.detach(), torch.autograd.grad(loss, logits, widen(self.grad_output))[0]

    def traffic(self, which: str) -> int:
        """The fewest bytes the pass can move: what it is given read once, the gradient (or the
        copy) written once."""
        if which == COPY:
            return 2 * self.original.nbytes
        given = [self.original, self.target, *filter(torch.is_tensor, self.options.values())]
        read = sum(tensor.nbytes for tensor in given)
        return read + self.original.nbytes if which == BOTH else read
