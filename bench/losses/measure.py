"""Measures a loss: all providers in one process, the memory of each in one of its own."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.common import measure as common
from bench.common import process
from bench.common.devices import Call, Device
from bench.common.figures import Figures
from bench.common.measure import Effort
from bench.common.precision import check
from bench.common.process import Notice
from bench.common.subject import Subject
from bench.losses.cases import Case
from bench.losses.providers import PROVIDERS, path_of
from bench.losses.tensors import LossesTensors

NAMES = ("loss", "gradient")


@dataclass(kw_only=True)
class LossesFigures(Figures):
    case: Case
    path: str = ""

    @property
    def subject(self) -> str:
        return f"{self.provider}, {self.case.name}"

    def as_data(self) -> dict[str, Any]:
        return {
            "provider": self.provider,
            "case": {"name": self.case.name, **asdict(self.case)},
            "path": self.path,
            "reason": self.reason,
            "median_ms": self.median,
            "min_ms": self.minimum,
            "peak_extra_bytes": self.peak,
            "input_bytes": self.case.input_bytes,
            "samples_ms": [round(sample, 4) for sample in self.samples],
        }


class LossesSubject(Subject):
    def make_call(self) -> Call:
        self.figures.path = path_of(self.figures.provider, self.tensors)
        return PROVIDERS[self.figures.provider](self.tensors)

    def judge(self, answer: Any) -> None:
        if self.figures.provider == "fused":
            case = self.tensors.case
            check(answer, self.tensors.reference(), NAMES, case.dtype, roundings=2)


def make_subjects(case: Case, names: Sequence[str], device: Device) -> list[Subject]:
    tensors = LossesTensors(case, device.name)
    calls = device.calls(case.input_bytes)
    return [
        LossesSubject(LossesFigures(name, calls=calls, case=case), tensors, device)
        for name in names
    ]


def time_here(case: Case, device: Device, effort: Effort, notice: Notice) -> list[LossesFigures]:
    subjects = make_subjects(case, list(PROVIDERS), device)
    common.measure_times(case.name, subjects, effort, notice)
    return [subject.figures for subject in subjects]


def notices(cases: Sequence[Case]) -> int:
    return len(cases) * (2 * len(PROVIDERS) + 1)


def measure(case: Case, device: Device, effort: Effort, notice: Notice) -> list[LossesFigures]:
    try:
        figures = process.call(time_here, case, device, effort, notice=notice)
    except process.Failed as failure:
        reason = str(failure)
        return [LossesFigures(name, case=case, reason=reason) for name in PROVIDERS]
    for found in figures:
        notice(f"{case.name}: memory of {found.provider}")
        if found.samples and found.provider != "copy":
            common.measure_peaks(make_subjects, case, found.provider, device, [found])
    return figures
