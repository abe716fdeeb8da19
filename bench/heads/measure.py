"""Measures heads: the time of forward and backward, all providers in one process for each head, and
the memory of it over the size of the vocabulary, each provider in a process of its own."""

from collections.abc import Iterable, Sequence
from typing import Any

from bench.common import measure as common
from bench.common import process
from bench.common.devices import Call, Device
from bench.common.measure import Effort
from bench.common.precision import check
from bench.common.process import Notice
from bench.common.subject import Subject
from bench.heads.cases import Head
from bench.heads.providers import PROVIDERS
from bench.heads.record import HeadFigures
from bench.heads.tensors import HeadTensors

WEIGHED = tuple(name for name in PROVIDERS if name != "gemms")


class HeadSubject(Subject):
    def make_call(self) -> Call:
        return PROVIDERS[self.figures.provider](self.tensors)

    def judge(self, answer: Any) -> None:
        if self.figures.provider == "fused":
            names = ("loss", "gradient of the input", "gradient of the weight")
            # Stock's answer is in the same type, so both have been rounded.
            reference, dtype = self.tensors.reference(), self.tensors.head.dtype
            check(answer, reference, names, dtype, roundings=2)


def make_subjects(head: Head, names: Sequence[str], device: Device) -> list[Subject]:
    tensors = HeadTensors(head, device.name)
    return [HeadSubject(HeadFigures(name, head=head), tensors, device) for name in names]


def time_here(head: Head, device: Device, effort: Effort, notice: Notice) -> list[HeadFigures]:
    subjects = make_subjects(head, list(PROVIDERS), device)
    common.measure_times(head.name, subjects, effort, notice)
    figures = [subject.figures for subject in subjects]
    for found in figures:
        found.ratios = [a / b for a, b in zip(found.samples, figures[0].samples, strict=False)]
    return figures


def notices(timed: Sequence[Head], weighed: Sequence[Head]) -> int:
    return len(timed) * (len(PROVIDERS) + 1) + len(weighed) * len(WEIGHED)


def measure_times(
    heads: Iterable[Head], device: Device, effort: Effort, notice: Notice
) -> list[HeadFigures]:
    figures = []
    for head in heads:
        try:
            figures += process.call(time_here, head, device, effort, notice=notice)
        except process.Failed as failure:
            figures += [HeadFigures(name, head=head, reason=str(failure)) for name in PROVIDERS]
    return figures


def measure_peaks(heads: Iterable[Head], device: Device, notice: Notice) -> list[HeadFigures]:
    figures = []
    for head in heads:
        for name in WEIGHED:
            notice(f"{head.name}: memory of {name}")
            figures.append(HeadFigures(name, head=head))
            common.measure_peaks(make_subjects, head, name, device, figures[-1:])
    return figures
