"""Times all providers on one case, in rounds, in a process of the case's own.

A round takes one sample of every provider and pass, in an order shuffled anew, so that whatever
else the machine does falls on all alike and nobody always follows the same neighbour. Before the
rounds each one warms up (torch.compile compiles), and what fused_ce answers is held against stock
in single precision: a wrong answer is not a fast one, and gets no figure.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from bench.common import process as fresh_process
from bench.common.devices import Device
from bench.common.process import Notice, first_line
from bench.loss.cases import DTYPES, Case
from bench.loss.providers import PROVIDERS, fused, make_call, passes_of, path
from bench.loss.record import Record, Result
from bench.loss.tensors import BOTH, Problem

# Only faults that no rounding explains; the parity suite is what judges the last digits.
TOLERANCES = {"fp64": 1e-8, "fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}


@dataclass(frozen=True)
class Effort:
    """Rounds until the seconds have passed, within bounds."""

    seconds: float
    least: int = 5
    most: int = 100


class Subject:
    """One provider in one pass; after its first exception it is left alone and has no figures."""

    def __init__(self, name: str, which: str, problem: Problem, device: Device) -> None:
        calls = device.calls(problem.case.logits_bytes)
        self.result = Result(name, which, problem.traffic(which), calls)
        self.problem, self.device = problem, device

    def prepare(self, reference: Sequence[Tensor]) -> None:
        name, which = self.result.provider, self.result.which
        self.call = make_call(name, which, self.problem, self.result.calls)
        (logits,) = self.problem.inputs(1)
        with torch.set_grad_enabled(which == BOTH):
            self.result.path = path(name, self.problem, logits)
            answer = self.call(logits)
        # Stock's own answers are what they are: its float16 mean over 65536 rows is inf.
        if PROVIDERS[name].function is fused:
            check(answer if which == BOTH else (answer,), reference, self.problem.case.dtype)

    def sample(self) -> None:
        calls = self.result.calls
        inputs = self.problem.inputs(calls)
        with torch.set_grad_enabled(self.result.which == BOTH):
            self.result.samples.append(self.device.milliseconds(self.call, inputs) / calls)

    def weigh(self) -> None:
        if self.problem.case.graph:
            self.result.reason = "memory: a graph keeps its own between replays"
            return
        (logits,) = self.problem.inputs(1)
        with torch.set_grad_enabled(self.result.which == BOTH):
            self.result.peak = self.device.rise(partial(self.call, logits))

    def attempt(self, step: Callable[..., None], *arguments: object) -> None:
        if self.result.reason:
            return
        try:
            step(*arguments)
        except Exception as error:
            self.result.reason = first_line(error)
            self.result.samples.clear()


def ulp_of_zero(dtype: str) -> float:
    """A gradient's mean over a million rows lies where float16 has only a few values left."""
    limits = torch.finfo(DTYPES[dtype])
    return limits.tiny * limits.eps


def check(answer: Sequence[Tensor], reference: Sequence[Tensor], dtype: str) -> None:
    for what, ours, expected in zip(("loss", "gradient"), answer, reference, strict=False):
        apart = (ours - expected).detach().abs().max().item()
        allowed = TOLERANCES[dtype] * expected.abs().max().item() + ulp_of_zero(dtype)
        if not apart <= allowed:
            raise ArithmeticError(f"the {what} is {apart:.3g} from stock's, allowed {allowed:.3g}")


def notices(case: Case, names: Sequence[str]) -> int:
    """How many `measure` gives: each warm-up, and the timing."""
    return sum(len(passes_of(name, case)) for name in names) + 1


def measure_here(
    case: Case, names: Sequence[str], device: Device, effort: Effort, notice: Notice
) -> Record:
    problem = Problem(case, device.name)
    reference = problem.reference()
    subjects = [
        Subject(name, which, problem, device) for name in names for which in passes_of(name, case)
    ]
    for subject in subjects:
        notice(f"{case.name}: warming up {subject.result.provider}")
        subject.attempt(subject.prepare, reference)
    del reference

    notice(f"{case.name}: timing")
    order = random.Random(0)
    start = perf_counter()
    for done in range(effort.most):
        if done >= effort.least and perf_counter() - start > effort.seconds:
            break
        for subject in order.sample(subjects, len(subjects)):
            subject.attempt(subject.sample)
    if device.counts_memory:
        for subject in subjects:
            subject.attempt(subject.weigh)
    return Record(case, torch.get_num_threads(), [subject.result for subject in subjects])


def measure(
    case: Case, names: Sequence[str], device: Device, effort: Effort, notice: Notice
) -> Record:
    try:
        return fresh_process.call(measure_here, case, names, device, effort, notice=notice)
    except fresh_process.Failed as failure:
        nothing = [
            Result(name, which, reason=str(failure))
            for name in names
            for which in passes_of(name, case)
        ]
        return Record(case, torch.get_num_threads(), nothing)
