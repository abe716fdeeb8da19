"""Measures training: the time of a step, all providers in one process; its memory, each provider in
a process of its own; and the largest batch, each that is tried in a process that may have no more.

The largest batch is guessed from the memory of two batches, and the guess is worth nothing by
itself: what is written down has taken a step, and one more has been refused memory.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from bench.common import measure as common
from bench.common import memory, process
from bench.common.devices import DEVICES, Call, Device
from bench.common.figures import Figures
from bench.common.measure import Effort
from bench.common.precision import check
from bench.common.process import Notice
from bench.common.subject import Subject
from bench.training.cases import QUICK_ROOM, Case
from bench.training.search import largest_that_fits
from bench.training.training import Answer, Training

# A round takes half a minute.
LEAST_ROUNDS = 3
# How torch's allocator and C++ say that the system has no more memory for them.
NO_MEMORY = ("DefaultCPUAllocator: ", "bad_alloc", "MemoryError")


@dataclass(kw_only=True)
class TrainingFigures(Figures):
    case: Case
    path: str = ""
    largest: int | None = None  # batch within the limit
    limit: int | None = None  # bytes
    tried: dict[int, bool] = field(default_factory=dict)  # batch: whether it fits

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
            "largest_batch": self.largest,
            "limit_bytes": self.limit,
            "tried_batches": {str(count): fits for count, fits in sorted(self.tried.items())},
            "samples_ms": [round(sample, 3) for sample in self.samples],
        }


class NotFused(Exception):
    """The loss would be stock's, and so no figure of ours."""


class TrainingSubject(Subject):
    def make_call(self) -> Call:
        self.tensors.restart()
        if self.figures.provider != "stock":
            self.figures.path = self.tensors.path(self.figures.provider)
            if not self.figures.path.startswith("fused: "):
                raise NotFused(self.figures.path)
        return partial(self.tensors.step, self.figures.provider)

    def judge(self, answer: Answer) -> None:
        if self.figures.provider == "stock":
            self.tensors.reference = answer
            return
        (loss, gradients), (stock, expected) = answer, self.tensors.reference
        names = ["loss", *self.tensors.names]
        check([loss, *gradients], [stock, *expected], names, "fp32", roundings=2)

    def weigh(self) -> None:
        """The gradients of the step before are memory that this one frees."""
        self.tensors.optimizer.zero_grad()
        super().weigh()


def make_subjects(case: Case, names: Sequence[str], device: Device) -> list[Subject]:
    training = Training(case)
    return [TrainingSubject(TrainingFigures(name, case=case), training, device) for name in names]


def time_here(case: Case, device: Device, effort: Effort, notice: Notice) -> list[TrainingFigures]:
    subjects = make_subjects(case, case.providers, device)
    common.measure_times(case.name, subjects, effort, notice)
    return [subject.figures for subject in subjects]


@dataclass(frozen=True)
class Footprint:
    """Bytes: of the process between two steps, and what a step takes beyond, whole and half a batch
    at a time."""

    rest: int | None
    half: int | None
    whole: int | None

    def guess(self, batch: int, limit: int) -> int:
        """The batch that the limit allows, if memory grows in proportion."""
        for_one = (self.whole - self.half) / (batch - batch // 2)
        return int(batch + (limit - self.rest - self.whole) / max(for_one, 1))


def weigh_here(case: Case, name: str, device: Device) -> Footprint:
    device.keep_nothing_freed()
    (subject,) = make_subjects(replace(case, batch=case.batch // 2), [name], device)
    subject.warm_up()
    peaks = []
    for count in (case.batch // 2, case.batch):
        subject.tensors.take(count)
        subject.weigh()
        peaks.append(subject.figures.peak)
    subject.tensors.optimizer.zero_grad()
    return Footprint(memory.read_status("VmData"), *peaks)


def step_within(limit: int, case: Case, name: str, count: int) -> None:
    """A step with so large a batch, in a process whose own memory the system limits. A step with
    the smallest goes before: the first of all has no optimizer's state to carry."""
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    memory.keep_nothing_freed()
    training = Training(replace(case, batch=1))
    training.step(name, *training.inputs(1))
    training.optimizer.zero_grad()
    training.take(count)
    training.step(name, *training.inputs(1))


def fits(found: TrainingFigures, notice: Notice, count: int) -> bool:
    notice(f"{found.case.name}: {found.provider}, {count} {found.case.item}")
    try:
        process.call(step_within, found.limit, found.case, found.provider, count)
    except process.Failed as failure:
        if not any(words in str(failure) for words in NO_MEMORY):
            raise
        found.tried[count] = False
    else:
        found.tried[count] = True
    return found.tried[count]


def measure_memory(found: TrainingFigures, notice: Notice) -> None:
    """Fills in the peak and the largest batch."""
    case, step = found.case, "memory"
    try:
        notice(f"{case.name}: memory of {found.provider}")
        weighed = process.call(weigh_here, case, found.provider, DEVICES["cpu"])
        found.peak = weighed.whole
        if sys.platform != "linux" or None in (weighed.rest, weighed.half, weighed.whole):
            found.reason = "memory: the system keeps no high-water mark and limit that can be used"
            return
        step = "largest batch"
        found.limit = case.limit or weighed.rest + QUICK_ROOM
        guess = weighed.guess(case.batch, found.limit)
        found.largest = largest_that_fits(partial(fits, found, notice), guess)
    except process.Failed as failure:
        found.reason = f"{step}: {failure}"


def notices(cases: Sequence[Case]) -> int:
    """The largest batch is mostly found in two tries."""
    return sum(1 + 4 * len(case.providers) for case in cases)


def measure_times(case: Case, effort: Effort, notice: Notice) -> list[TrainingFigures]:
    effort = replace(effort, least=min(effort.least, LEAST_ROUNDS))
    try:
        return process.call(time_here, case, DEVICES["cpu"], effort, notice=notice)
    except process.Failed as failure:
        reason = str(failure)
        return [TrainingFigures(name, case=case, reason=reason) for name in case.providers]
