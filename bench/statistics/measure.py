"""Measures the row statistics: all providers of a case in one process, the memory of each in one of
its own."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from bench.common import measure as common
from bench.common import process
from bench.common.devices import Call, Device
from bench.common.figures import Figures
from bench.common.measure import Effort
from bench.common.precision import check
from bench.common.process import Notice
from bench.common.subject import Subject
from bench.statistics.cases import Rows
from bench.statistics.providers import PROVIDERS
from bench.statistics.tensors import RowTensors

NAMES = ("log-probability", "entropy", "gradient", "gradient of the weight")


@dataclass(kw_only=True)
class StatisticsFigures(Figures):
    case: Rows
    ratios: list[float] = field(default_factory=list)  # to stock in the same round

    @property
    def subject(self) -> str:
        return f"{self.provider}, {self.case.name}"

    @property
    def ratio(self) -> float | None:
        return median(self.ratios) if self.ratios else None

    def as_data(self) -> dict[str, Any]:
        return {
            "provider": self.provider,
            "case": {"name": self.case.name, **asdict(self.case)},
            "reason": self.reason,
            "median_ms": self.median,
            "times_as_fast_as_stock": self.ratio,
            "peak_extra_bytes": self.peak,
            "samples_ms": [round(sample, 3) for sample in self.samples],
        }


class StatisticsSubject(Subject):
    def make_call(self) -> Call:
        return PROVIDERS[self.figures.provider](self.tensors)

    def judge(self, answer: Any) -> None:
        if self.figures.provider == "fused":
            reference, dtype = self.tensors.reference(), self.tensors.case.dtype
            check(answer, reference, NAMES, dtype, roundings=2)


def make_subjects(case: Rows, names: Sequence[str], device: Device) -> list[Subject]:
    tensors = RowTensors(case, device.name)
    calls = device.calls(case.logits_bytes)
    return [
        StatisticsSubject(StatisticsFigures(name, calls=calls, case=case), tensors, device)
        for name in names
    ]


def time_here(
    case: Rows, device: Device, effort: Effort, notice: Notice
) -> list[StatisticsFigures]:
    subjects = make_subjects(case, list(PROVIDERS), device)
    common.measure_times(case.name, subjects, effort, notice)
    figures = [subject.figures for subject in subjects]
    for found in figures:
        found.ratios = [a / b for a, b in zip(figures[0].samples, found.samples, strict=False)]
    return figures


def notices(cases: Sequence[Rows]) -> int:
    return len(cases) * (2 * len(PROVIDERS) + 1)


def measure(case: Rows, device: Device, effort: Effort, notice: Notice) -> list[StatisticsFigures]:
    try:
        figures = process.call(time_here, case, device, effort, notice=notice)
    except process.Failed as failure:
        reason = str(failure)
        return [StatisticsFigures(name, case=case, reason=reason) for name in PROVIDERS]
    for found in figures:
        notice(f"{case.name}: memory of {found.provider}")
        if found.samples:
            common.measure_peaks(make_subjects, case, found.provider, device, [found])
    return figures
