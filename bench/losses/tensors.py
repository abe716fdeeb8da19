"""The tensors of a case, and the answer that fused_ce's is held against."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.common.precision import DTYPES
from bench.losses.cases import LOSSES, Arguments, Case


class LossesTensors:
    def __init__(self, case: Case, device: str) -> None:
        torch.manual_seed(0)
        kind = {"dtype": DTYPES[case.dtype], "device": device}
        self.case, self.loss = case, LOSSES[case.loss]
        input = torch.randn(case.rows, case.classes, **kind)
        if self.loss.takes_log_probabilities:
            input = input.log_softmax(1)
        self.input = input.requires_grad_()
        self.arguments = self.loss.arguments(input.detach())
        # For a result that is no scalar; what comes down in a model is no constant either.
        self.grad_output = torch.randn_like(self.input)

    def inputs(self, count: int) -> list[Tensor]:
        """Nobody writes into it, so one serves all calls."""
        return [self.input] * count

    def answer(self, function: Callable[..., Tensor], input: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the gradient."""
        return self._answer(function, input, self.arguments)

    def reference(self) -> tuple[Tensor, Tensor]:
        """Stock's, in float32 at least."""
        wide = torch.promote_types(self.input.dtype, torch.float32)

        def widened(value: Any) -> Any:
            is_floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(wide) if is_floating else value

        arguments = {name: widened(value) for name, value in self.arguments.items()}
        return self._answer(self.loss.stock, self.input.to(wide), arguments)

    def _answer(
        self, function: Callable[..., Tensor], input: Tensor, arguments: Arguments
    ) -> tuple[Tensor, Tensor]:
        value = function(input, **arguments)
        grad_output = None if value.dim() == 0 else self.grad_output.to(value.dtype)
        return value.detach(), *torch.autograd.grad(value, input, grad_output)
