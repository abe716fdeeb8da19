"""Measures all providers on one case, in a process of the case's own.

Before the rounds each one warms up (torch.compile compiles), and what fused_ce answers is held
against stock in single precision. Where the device counts memory exactly, the same process is
asked for it; elsewhere `measure_peaks` takes one for each provider.
"""

from collections.abc import Sequence
from typing import Any

import torch

from bench.common import measure as common
from bench.common import process
from bench.common.devices import Call, Device
from bench.common.figures import BOTH
from bench.common.measure import Effort
from bench.common.precision import check
from bench.common.process import Notice
from bench.common.subject import Subject
from bench.loss.cases import Case
from bench.loss.providers import PROVIDERS, fused, make_call, passes_of, path_of
from bench.loss.record import LossFigures, Record
from bench.loss.tensors import LossTensors


class LossSubject(Subject):
    def make_call(self) -> Call:
        name, which = self.figures.provider, self.figures.which
        self.figures.path = path_of(name, self.tensors)
        return make_call(name, which, self.tensors, self.figures.calls)

    def judge(self, answer: Any) -> None:
        # Stock's own answers are what they are: its float16 mean over 65536 rows is inf.
        if PROVIDERS[self.figures.provider].function is fused:
            answer = answer if self.figures.which == BOTH else (answer,)
            reference, dtype = self.tensors.reference(), self.tensors.case.dtype
            check(answer, reference, ("loss", "gradient"), dtype)

    def weigh(self) -> None:
        if self.tensors.case.graph:
            self.figures.reason = "memory: a graph keeps its own between replays"
        else:
            super().weigh()


def make_subjects(case: Case, names: Sequence[str], device: Device) -> list[Subject]:
    tensors, calls = LossTensors(case, device.name), device.calls(case.logits_bytes)
    return [
        LossSubject(
            LossFigures(name, which, calls, traffic=tensors.traffic(which)), tensors, device
        )
        for name in names
        for which in passes_of(name, case)
    ]


def notices(case: Case, names: Sequence[str]) -> int:
    """How many `measure` gives: each warm-up, and the timing."""
    return sum(len(passes_of(name, case)) for name in names) + 1


def measure_here(
    case: Case, names: Sequence[str], device: Device, effort: Effort, notice: Notice
) -> Record:
    subjects = make_subjects(case, names, device)
    common.measure_times(case.name, subjects, effort, notice)
    if device.counts_memory:
        for subject in subjects:
            subject.attempt(subject.weigh)
    return Record(case, torch.get_num_threads(), [subject.figures for subject in subjects])


def measure(
    case: Case, names: Sequence[str], device: Device, effort: Effort, notice: Notice
) -> Record:
    try:
        return process.call(measure_here, case, names, device, effort, notice=notice)
    except process.Failed as failure:
        nothing = [
            LossFigures(name, which, reason=str(failure))
            for name in names
            for which in passes_of(name, case)
        ]
        return Record(case, torch.get_num_threads(), nothing)


def measure_peaks(record: Record, names: Sequence[str], device: Device, notice: Notice) -> None:
    """For every result that has a time."""
    for name in names:
        notice(f"{record.case.name}: memory of {name}")
        timed = [result for result in record.results if result.provider == name and result.samples]
        if timed:
            common.measure_peaks(make_subjects, record.case, name, device, timed)
