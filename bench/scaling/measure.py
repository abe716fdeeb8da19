"""Sizes from 1 MB to 2 GB of logits, and their runs on one thread and on all.

The sizes differ in the number of rows alone, so that nothing but size changes. Memory is not
measured again here.
"""

from collections.abc import Sequence

import torch

from bench.common.devices import Device
from bench.common.measure import Effort
from bench.common.precision import DTYPES
from bench.common.process import Notice
from bench.loss import measure as loss
from bench.loss.cases import Case
from bench.loss.record import Record

PROVIDERS = ("stock", "fused", "inplace", "copy")
CLASSES = 32000
SMALLEST, DOUBLINGS, QUICK_DOUBLINGS = 1e6, 11, 2


def sizes(dtype: str, quick: bool) -> list[Case]:
    rows = round(SMALLEST / CLASSES / DTYPES[dtype].itemsize)
    doublings = QUICK_DOUBLINGS if quick else DOUBLINGS
    return [Case((rows << doubling, CLASSES), dtype) for doubling in range(doublings + 1)]


def thread_counts(device: Device) -> list[int]:
    """Threads are the CPU's; another device's work does not depend on them."""
    everyone = torch.get_num_threads()
    return [1, everyone] if device.name == "cpu" and everyone > 1 else [everyone]


def notices(cases: Sequence[Case], names: Sequence[str], device: Device) -> int:
    return len(thread_counts(device)) * sum(loss.notices(case, names) for case in cases)


def measure(
    cases: Sequence[Case], names: Sequence[str], device: Device, effort: Effort, notice: Notice
) -> list[Record]:
    counts, records = thread_counts(device), []
    for case in cases:
        for threads in counts:
            # What `measure` starts takes over the number.
            torch.set_num_threads(threads)
            records.append(loss.measure(case, names, device, effort, notice))
    return records
