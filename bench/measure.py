"""Times all providers on one case, in rounds.

A round takes one sample of every provider and pass, in an order shuffled anew, so that whatever
else the machine does falls on all alike and nobody always follows the same neighbour. Before the
rounds each one warms up (torch.compile compiles) and has its answer held against stock's: a wrong
answer is not a fast one, and gets no figure.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from time import perf_counter

import torch
from torch import Tensor

from bench.cases import Case
from bench.devices import Device
from bench.problem import BOTH, COPY, Problem
from bench.providers import make_call, passes_of, path
from bench.record import Record, Result

# A call shorter than this is timed in bursts that last so long: the clock's own cost and a stray
# interrupt would be a visible part of it.
SHORT_MS, BURST_MS, MAX_BURST = 0.02, 0.2, 64

# Only faults that no rounding explains; the parity suite is what judges the last digits.
TOLERANCES = {"fp64": 1e-8, "fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}

Notice = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """Rounds until the seconds have passed, within bounds."""

    seconds: float
    least: int = 5
    most: int = 100


class Subject:
    """One provider in one pass; after its first exception it is left alone and has no figures."""

    def __init__(self, name: str, which: str, problem: Problem, device: Device) -> None:
        self.result = Result(name, which, problem.traffic(which))
        self.problem, self.device = problem, device

    def prepare(self, reference: Sequence[Tensor]) -> None:
        name, which = self.result.provider, self.result.which
        self.call = make_call(name, which, self.problem)
        (logits,) = self.problem.inputs(1)
        with torch.set_grad_enabled(which == BOTH):
            self.result.path = path(name, self.problem, logits)
            answer = self.call(logits)
        if which != COPY:
            check(answer if which == BOTH else (answer,), reference, self.problem.case.dtype)
        del answer
        single = self.time(1)
        if single < SHORT_MS:
            self.result.calls = min(MAX_BURST, ceil(BURST_MS / single))

    def time(self, calls: int) -> float:
        """Milliseconds of one call."""
        inputs = self.problem.inputs(calls)
        with torch.set_grad_enabled(self.result.which == BOTH):
            return self.device.milliseconds(self.call, inputs) / calls

    def sample(self) -> None:
        self.result.samples.append(self.time(self.result.calls))

    def attempt(self, step: Callable[..., None], *arguments: object) -> None:
        if self.result.reason:
            return
        try:
            step(*arguments)
        except Exception as error:
            self.result.reason = first_line(error)
            self.result.samples.clear()


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def check(answer: Sequence[Tensor], reference: Sequence[Tensor], dtype: str) -> None:
    for what, ours, expected in zip(("loss", "gradient"), answer, reference, strict=False):
        apart = (ours - expected).detach().abs().max().item()
        allowed = TOLERANCES[dtype] * expected.abs().max().item()
        if not apart <= allowed:
            raise ArithmeticError(f"the {what} is {apart:.3g} from stock's, allowed {allowed:.3g}")


def notices(case: Case, names: Sequence[str]) -> int:
    """How many a case gives: each warm-up, the timing, each memory."""
    return sum(len(passes_of(name, case)) for name in names) + 1 + len(names)


def measure(
    case: Case, names: Sequence[str], device: Device, effort: Effort, notice: Notice
) -> Record:
    # Else the compiled code of every case so far counts against dynamo's limit for one function.
    torch.compiler.reset()
    problem = Problem(case, device.name)
    reference = make_call("stock", BOTH, problem)(problem.inputs(1)[0])
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
    return Record(case, [subject.result for subject in subjects])


def measure_peaks(record: Record, names: Sequence[str], device: Device, notice: Notice) -> None:
    """Fills in the memory of every result that has a time."""
    for name in names:
        notice(f"{record.case.name}: memory of {name}")
        timed = [result for result in record.results if result.provider == name and result.samples]
        if not timed:
            continue
        try:
            peaks = device.peaks(record.case, name)
        except Exception as error:
            for result in timed:
                result.reason = f"memory: {first_line(error)}"
            continue
        for result in timed:
            result.peak = peaks[result.which]
            if result.peak is None:
                result.reason = "memory: the system keeps no high-water mark that can be read"
