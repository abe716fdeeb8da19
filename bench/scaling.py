"""How the time grows: logits from 1 MB to 2 GB, on one thread and on all.

The sizes differ in the number of rows alone, so that nothing but size changes. A line as straight
and as steep as the copy's means linear; where one bends, a cache or the allocator has come in.
Memory is not measured again here.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator
from rich.box import SIMPLE_HEAD
from rich.table import Table

from bench.cases import DTYPES, Case
from bench.charts import LABELS, MARKS, new_figure, save
from bench.curves import FAINT, INK, style
from bench.devices import Device
from bench.measure import Effort, Notice, measure, notices
from bench.problem import FORWARD
from bench.record import Record
from bench.tables import milliseconds_text, ratio_text

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


def notices_of_all(cases: Sequence[Case], names: Sequence[str], device: Device) -> int:
    return len(thread_counts(device)) * sum(notices(case, names) for case in cases)


def run(
    cases: Sequence[Case], names: Sequence[str], device: Device, effort: Effort, notice: Notice
) -> list[Record]:
    counts, records = thread_counts(device), []
    for case in cases:
        for threads in counts:
            torch.set_num_threads(threads)
            records.append(measure(case, names, device, effort, notice))
    return records


class Line:
    """One provider in one pass over all sizes, on the most threads and on the fewest."""

    def __init__(self, provider: str, which: str, records: Sequence[Record]) -> None:
        self.provider, self.which = provider, which
        counts = sorted({record.threads for record in records})
        self.times, self.alone = (
            {
                record.case.logits_bytes: record.find(provider, which).median
                for record in records
                if record.threads == threads and record.find(provider, which).samples
            }
            for threads in (counts[-1], counts[0])
        )
        self.gains = {}
        if len(counts) > 1:
            self.gains = {
                size: self.alone[size] / self.times[size]
                for size in self.times
                if size in self.alone
            }
