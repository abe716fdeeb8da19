"""A provider at work: its call is made, tried, held against stock, timed and weighed.

What it is given and what it is held against is the business of its kind: the loss of logits, or a
head. A wrong answer is not a fast one, and gets no figure.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.common.devices import Call, Device
from bench.common.figures import BOTH, Figures
from bench.common.process import first_line


class Tensors(Protocol):
    def inputs(self, count: int) -> list[Tensor]:
        """What so many calls are given, one after the other."""


class Subject:
    """One provider in one pass; after its first exception it is left alone and has no figures."""

    def __init__(self, figures: Figures, tensors: Tensors, device: Device) -> None:
        self.figures, self.tensors, self.device = figures, tensors, device

    def make_call(self) -> Call:
        raise NotImplementedError

    def judge(self, answer: Any) -> None:
        """Raises where the answer is wrong."""

    def grad_mode(self) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(self.figures.which == BOTH)

    def warm_up(self) -> Any:
        with self.grad_mode():
            self.call = self.make_call()
            return self.call(*self.tensors.inputs(1))

    def prepare(self) -> None:
        self.judge(self.warm_up())

    def sample(self) -> None:
        inputs = self.tensors.inputs(self.figures.calls)
        with self.grad_mode():
            elapsed = self.device.milliseconds(self.call, inputs)
        self.figures.samples.append(elapsed / len(inputs))

    def weigh(self) -> None:
        (given,) = self.tensors.inputs(1)
        with self.grad_mode():
            self.figures.peak = self.device.rise(partial(self.call, given))

    def attempt(self, step: Callable[[], None]) -> None:
        if self.figures.reason:
            return
        try:
            step()
        except Exception as error:
            self.figures.reason = first_line(error)
            self.figures.samples.clear()
