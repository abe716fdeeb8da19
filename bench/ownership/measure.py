"""Measures a size: all providers and kinds of steps in one process, in rounds; the memory of each
provider in a process of its own."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

import torch

from bench.common import measure as common
from bench.common import process
from bench.common.devices import DEVICES, Call, Device
from bench.common.figures import Figures
from bench.common.measure import Effort
from bench.common.precision import check
from bench.common.process import Notice
from bench.common.subject import Subject
from bench.ownership.cases import FEW_ROUNDS, LARGE, STEPS, Size
from bench.ownership.providers import OURS, PROVIDERS, step
from bench.ownership.tensors import StepTensors

NAMES = ("loss", "gradient")
DEFAULT = "fused"


@dataclass(kw_only=True)
class StepFigures(Figures):
    size: Size
    threads: int
    ratios: list[float] = field(default_factory=list)  # of its time to the default's in each round

    @property
    def subject(self) -> str:
        return f"{self.provider}, {self.size.name}, {self.which}, {self.threads} threads"

    @property
    def ratio(self) -> float | None:
        return median(self.ratios) if self.ratios else None

    def as_data(self) -> dict[str, Any]:
        loop, grad_output = STEPS[self.which]
        return {
            "provider": self.provider,
            "size": {"name": self.size.name, **asdict(self.size)},
            "logits_bytes": self.size.logits_bytes,
            "threads": self.threads,
            "loop": loop,
            "grad_output": grad_output,
            "reason": self.reason,
            "median_ms": self.median,
            "time_over_default": self.ratio,
            "peak_extra_bytes": self.peak,
            "samples_ms": [round(sample, 3) for sample in self.samples],
        }


class StepSubject(Subject):
    def make_call(self) -> Call:
        return step(self.figures.provider, self.tensors, *STEPS[self.figures.which])

    def grad_mode(self) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(True)

    def judge(self, answer: Any) -> None:
        if self.figures.provider in OURS:
            loss, grad = answer
            _, grad_output = STEPS[self.figures.which]
            found = loss, self.tensors.checked(grad)
            check(found, self.tensors.reference(grad_output), NAMES, "fp32")


def make_subjects(size: Size, names: Sequence[str], device: Device) -> list[Subject]:
    tensors, threads = StepTensors(size), torch.get_num_threads()
    return [
        StepSubject(StepFigures(name, which, size=size, threads=threads), tensors, device)
        for which in STEPS
        for name in names
    ]


def time_here(size: Size, effort: Effort, notice: Notice) -> list[StepFigures]:
    if size.logits_bytes > LARGE:
        effort = replace(effort, least=min(effort.least, FEW_ROUNDS))
    subjects = make_subjects(size, list(PROVIDERS), DEVICES["cpu"])
    common.measure_times(size.name, subjects, effort, notice)
    return [subject.figures for subject in subjects]


def notices(sizes: Sequence[Size]) -> int:
    return len(sizes) * (len(PROVIDERS) * (len(STEPS) + 1) + 1)


def measure(size: Size, effort: Effort, notice: Notice) -> list[StepFigures]:
    try:
        figures = process.call(time_here, size, effort, notice=notice)
    except process.Failed as failure:
        threads, reason = torch.get_num_threads(), str(failure)
        return [
            StepFigures(name, which, size=size, threads=threads, reason=reason)
            for which in STEPS
            for name in PROVIDERS
        ]
    defaults = {found.which: found for found in figures if found.provider == DEFAULT}
    for found in figures:
        pairs = zip(found.samples, defaults[found.which].samples, strict=False)
        found.ratios = [own / default for own, default in pairs]
    for name in PROVIDERS:
        notice(f"{size.name}: memory of {name}")
        timed = [found for found in figures if found.provider == name and found.samples]
        if timed:
            common.measure_peaks(make_subjects, size, name, DEVICES["cpu"], timed)
    return figures
