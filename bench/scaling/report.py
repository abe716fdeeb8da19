"""What is printed and drawn of sizes: tables of time and of threads, and a picture of both.

A line as straight and as steep as the copy's means linear; where one bends, a cache or the
allocator has come in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator
from rich.table import Table

from bench.common.figures import COPY, FORWARD
from bench.common.style import (
    FAINT,
    INK,
    LABELS,
    MARKS,
    legend,
    new_figure,
    plain_number,
    save,
    style,
)
from bench.common.text import milliseconds_text, new_table, ratio_text
from bench.loss.record import Record
from bench.loss.tables import pass_text
from bench.scaling.measure import CLASSES


@dataclass
class Line:
    """One provider in one pass, by bytes of logits."""

    provider: str
    which: str
    milliseconds: dict[int, float]  # on all threads
    gains: dict[int, float]  # how many times faster than on one; empty where one is all

    @property
    def label(self) -> str:
        return LABELS[self.provider] + (f", {self.which}" if self.which != COPY else "")


def lines(records: Sequence[Record]) -> list[Line]:
    counts = sorted({record.threads for record in records})
    times: dict[tuple[str, str], dict[int, dict[int, float]]] = {}
    for record in records:
        for result in record.results:
            by_threads = times.setdefault((result.provider, result.which), {n: {} for n in counts})
            if result.median is not None:
                by_threads[record.threads][record.case.logits_bytes] = result.median
    found = []
    for (provider, which), by_threads in times.items():
        all_threads, one = by_threads[counts[-1]], by_threads[counts[0]]
        both = [size for size in all_threads if size in one and len(counts) > 1]
        gains = {size: one[size] / all_threads[size] for size in both}
        found.append(Line(provider, which, all_threads, gains))
    return found


def table(records: Sequence[Record], title: str, cell: Callable[[Line, int], str]) -> Table:
    found = lines(records)
    headings = [f"{pass_text(line.which)}\n{line.provider}" for line in found]
    table = new_table(title, (), ("logits", *headings))
    for size in sorted({record.case.logits_bytes for record in records}):
        table.add_row(f"{size / 1e6:.0f} MB", *(cell(line, size) for line in found))
    return table


def tables(records: Sequence[Record]) -> list[Table]:
    counts = sorted({record.threads for record in records})
    made = [
        table(
            records,
            f"milliseconds, {counts[-1]} threads",
            lambda line, size: milliseconds_text(line.milliseconds.get(size)),
        )
    ]
    if len(counts) > 1:
        made.append(
            table(
                records,
                f"times as fast on {counts[-1]} threads as on one",
                lambda line, size: ratio_text(line.gains.get(size)),
            )
        )
    return made


def size_axis(axes: Axes, title: str) -> None:
    style(axes)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda size, _: f"{size / 1e6:g} MB" if size < 1e9 else f"{size / 1e9:g} GB")
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_xlabel("logits", color=INK)
    axes.set_title(title, loc="left", fontsize=10, color=INK)


def plot(axes: Axes, line: Line, values: dict[int, float]) -> None:
    color, marker, _ = MARKS[line.provider]
    axes.plot(
        list(values),
        list(values.values()),
        linestyle="--" if line.which == FORWARD else ":" if line.which == COPY else "-",
        color=color,
        marker=None if line.provider == "copy" else marker,
        markersize=4.5,
        linewidth=1.6,
        label=line.label,
    )


def draw(records: Sequence[Record], note: str, path: Path) -> None:
    found = lines(records)
    scales = any(line.gains for line in found)
    figure = new_figure(f"Time against size, rows of {CLASSES} classes", note, 5.2)
    left, *right = figure.subplots(1, 2 if scales else 1, squeeze=False)[0]
    threads = max(record.threads for record in records)
    size_axis(left, f"milliseconds, {threads} threads")
    left.set_yscale("log")
    left.yaxis.set_minor_locator(NullLocator())
    left.yaxis.set_major_formatter(plain_number)
    for line in found:
        plot(left, line, line.milliseconds)
    for axes in right:
        size_axis(axes, f"times as fast on {threads} threads as on one")
        for line in found:
            plot(axes, line, line.gains)
        axes.set_ylim(bottom=0)
    legend(figure, [left], [line.label for line in found], columns=2)
    save(figure, path)
