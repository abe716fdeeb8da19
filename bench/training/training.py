"""A net in training: its parameters, its optimizer, a batch, and the step that is measured."""

from functools import cached_property

import torch
from torch import Tensor

from bench.training.cases import Case
from bench.training.providers import loss_of, path_of

Answer = tuple[Tensor, list[Tensor]]  # the loss, and the gradient of every parameter


class Training:
    def __init__(self, case: Case) -> None:
        self.case = case
        self.restart()
        self.take(case.batch)

    def restart(self) -> None:
        """The same parameters each time."""
        torch.manual_seed(0)
        self.model = self.case.make_model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)

    def take(self, count: int) -> None:
        torch.manual_seed(1)
        self.batch = self.case.make_batch(count)

    def inputs(self, count: int) -> list[Tensor]:
        """Nobody writes into it, so one serves all steps."""
        return [self.batch[0]] * count

    def step(self, provider: str, inputs: Tensor) -> Answer:
        self.optimizer.zero_grad()
        loss = loss_of(provider, self.model, (inputs, self.batch[1]), self.case.options)
        loss.backward()
        self.optimizer.step()
        return loss.detach(), [parameter.grad for parameter in self.model.parameters()]

    def path(self, provider: str) -> str:
        return path_of(provider, self.model, self.batch, self.case.options)

    @cached_property
    def reference(self) -> Answer:
        """Stock's first step, where stock has not been first; with parameters of its own."""
        first = Training(self.case)
        return first.step("stock", *first.inputs(1))

    @property
    def names(self) -> list[str]:
        return [f"gradient of {name}" for name, _ in self.model.named_parameters()]
