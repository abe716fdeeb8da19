"""Times two builds of fused_ce on one case, old and new, as neighbours in time.

Both are called fused_ce and register the same operators, so each has a process of its own. The two
take turns, and take turns in going first: whatever drifts falls on both, and the ratio of two
neighbours is worth more than that of two medians.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from bench.common.devices import Device
from bench.common.figures import Figures
from bench.common.measure import Effort, rounds
from bench.common.process import Failed, Notice, Worker
from bench.heads.cases import Head
from bench.heads.measure import make_subjects as head_subjects
from bench.heads.providers import PROVIDERS as HEAD_PROVIDERS
from bench.loss.cases import Case
from bench.loss.measure import make_subjects as loss_subjects

NOTICES = 2  # for a case


class Build:
    """What the process of one build holds: the subjects of a case, with that build's fused_ce."""

    def __init__(self, folder: Path, case: Case | Head, names: Sequence[str], device: Device):
        self.folder, self.case, self.names, self.device = folder, case, names, device

    def prepare(self) -> list[Figures]:
        sys.path.insert(0, str(self.folder))
        import fused_ce

        if Path(fused_ce.__file__).parents[1] != self.folder:
            raise ImportError(f"fused_ce came from {fused_ce.__file__}, not from {self.folder}")
        if isinstance(self.case, Head):
            names = [name for name in self.names if name in HEAD_PROVIDERS]
            self.subjects = head_subjects(self.case, names, self.device)
        else:
            self.subjects = loss_subjects(self.case, self.names, self.device)
        for subject in self.subjects:
            subject.attempt(subject.prepare)
        return [subject.figures for subject in self.subjects]

    def sample(self, number: int) -> float:
        subject = self.subjects[number]
        subject.sample()
        return subject.figures.samples[-1]


@dataclass
class Comparison:
    """One provider in one pass, with either build."""

    case: str
    old: Figures
    new: Figures

    @property
    def reasons(self) -> list[str]:
        return list(dict.fromkeys(f.reason for f in (self.old, self.new) if f.reason))

    @property
    def ratios(self) -> list[float]:
        return [new / old for old, new in zip(self.old.samples, self.new.samples, strict=True)]

    @property
    def ratio(self) -> float | None:
        return median(self.ratios) if self.ratios else None

    @property
    def middle_half(self) -> tuple[float, float] | None:
        """Of the ratios: where one is inside, this run has not told the builds apart."""
        if len(self.ratios) < 2:
            return None
        first, _, third = quantiles(self.ratios, method="inclusive")
        return first, third

    def as_data(self) -> dict[str, Any]:
        return {
            "name": self.case,
            "provider": self.new.provider,
            "pass": self.new.which,
            "reasons": self.reasons,
            "calls_per_sample": self.new.calls,
            "old_median_ms": self.old.median,
            "new_median_ms": self.new.median,
            "ratio_new_to_old": self.ratio,
            "middle_half": self.middle_half,
            "old_samples_ms": [round(sample, 6) for sample in self.old.samples],
            "new_samples_ms": [round(sample, 6) for sample in self.new.samples],
        }


def take_turns(
    case: Case | Head, workers: Sequence[Worker], effort: Effort, notice: Notice
) -> list[Comparison]:
    notice(f"{case.name}: warming up")
    old, new = (worker.ask("prepare") for worker in workers)
    pairs = [Comparison(case.name, *both) for both in zip(old, new, strict=True)]
    notice(f"{case.name}: timing")
    alive = [number for number, pair in enumerate(pairs) if not pair.reasons]
    for number in rounds(alive, effort):
        turns = list(zip(workers, (pairs[number].old, pairs[number].new), strict=True))
        for worker, found in turns if len(turns[0][1].samples) % 2 else reversed(turns):
            found.samples.append(worker.ask("sample", number))
    return pairs


def compare(
    case: Case | Head,
    names: Sequence[str],
    folders: tuple[Path, Path],
    device: Device,
    effort: Effort,
    notice: Notice,
) -> list[Comparison]:
    old, new = (Build(folder, case, names, device) for folder in folders)
    try:
        with Worker(old) as left, Worker(new) as right:
            return take_turns(case, (left, right), effort, notice)
    except Failed as failure:
        nothing = Figures(", ".join(names), reason=str(failure))
        return [Comparison(case.name, nothing, nothing)]
