"""Times providers in rounds, and measures the memory of one in a process of its own.

A round takes one sample of every provider and pass, in an order shuffled anew, so that whatever
else the machine does falls on all alike and nobody always follows the same neighbour. Memory needs
a fresh process, since what one provider has freed would hide what the next one takes. The same call
goes before the one that is measured: it compiles, loads code and starts threads.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeVar

from bench.common import process
from bench.common.devices import Device
from bench.common.figures import Figures
from bench.common.process import Notice
from bench.common.subject import Subject

Item = TypeVar("Item")
MakeSubjects = Callable[[Any, Sequence[str], Device], list[Subject]]  # of a case, for providers


@dataclass(frozen=True)
class Effort:
    """Rounds until the seconds have passed, within bounds."""

    seconds: float
    least: int = 5
    most: int = 100


def rounds(items: Sequence[Item], effort: Effort) -> Iterator[Item]:
    order, start = random.Random(0), perf_counter()
    for done in range(effort.most):
        if done >= effort.least and perf_counter() - start > effort.seconds:
            return
        yield from order.sample(items, len(items))


def measure_times(case: str, subjects: Sequence[Subject], effort: Effort, notice: Notice) -> None:
    for subject in subjects:
        notice(f"{case}: warming up {subject.figures.provider}")
        subject.attempt(subject.prepare)
    notice(f"{case}: timing")
    for subject in rounds(subjects, effort):
        subject.attempt(subject.sample)


def peaks_here(
    make_subjects: MakeSubjects, case: Any, name: str, device: Device
) -> dict[str, int | None]:
    device.keep_nothing_freed()
    subjects = make_subjects(case, [name], device)
    for subject in subjects:
        subject.warm_up()
        subject.weigh()
    return {subject.figures.which: subject.figures.peak for subject in subjects}


def measure_peaks(
    make_subjects: MakeSubjects, case: Any, name: str, device: Device, figures: Sequence[Figures]
) -> None:
    """Fills in the figures of one provider."""
    try:
        peaks = process.call(peaks_here, make_subjects, case, name, device)
    except process.Failed as failure:
        for found in figures:
            found.reason = f"memory: {failure}"
        return
    for found in figures:
        found.peak = peaks[found.which]
        if found.peak is None:
            found.reason = "memory: the system keeps no high-water mark that can be read"
