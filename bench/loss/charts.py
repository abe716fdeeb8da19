"""Draws what was measured: how many times stock's speed, and how many logits of memory.

One line for each case and one mark for each provider, so that twenty cases stay readable. Speeds
are ratios, hence the logarithmic axis: twice as fast and half as fast are the same distance from
stock. What was not measured has no mark.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from bench.common.figures import BOTH, FORWARD
from bench.common.memory import RESOLUTION
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
from bench.loss.record import Record

BAND = "#f5f7f9"
# A copy of less than this takes the time of a call, and is no measure of anything else.
SMALLEST_COPY = 1e6


def mark(axes: Axes, name: str, points: Sequence[tuple[float, float]], scale: float = 1.0) -> None:
    if not points:
        return
    color, marker, size = MARKS[name]
    across, down = zip(*points, strict=True)
    axes.scatter(across, down, s=scale * size, c=color, marker=marker, label=LABELS[name], zorder=3)


def case_axis(axes: Axes, records: Sequence[Record]) -> None:
    style(axes)
    axes.set_yticks(range(len(records)), [record.case.name for record in records])
    axes.tick_params(labelsize=10)
    axes.set_ylim(len(records) - 0.5, -0.5)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for row in range(0, len(records), 2):
        axes.axhspan(row - 0.5, row + 0.5, color=BAND, linewidth=0, zorder=0)


def draw_speed(records: Sequence[Record], note: str, path: Path) -> None:
    figure = new_figure(
        "Times as fast as stock PyTorch: to the right is faster", note, 2.1 + 0.29 * len(records)
    )
    panels = figure.subplots(1, 2, sharey=True)
    for axes, which in zip(panels, (FORWARD, BOTH), strict=True):
        case_axis(axes, records)
        axes.set_title(which, fontsize=11, color=INK)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(plain_number)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.axvline(1, color=MARKS["stock"][0], linewidth=2, zorder=1, label=LABELS["stock"])
        for name in MARKS:
            if name == "stock":
                continue
            points = []
            for row, record in enumerate(records):
                ratio = record.ratio(name, which)
                tiny = name == "copy" and record.case.logits_bytes < SMALLEST_COPY
                if ratio is not None and not tiny:
                    points.append((ratio, row))
            mark(axes, name, points)
    legend(figure, panels, LABELS.values())
    save(figure, path)


def draw_memory(records: Sequence[Record], note: str, path: Path) -> None:
    """Forward+backward, in logits. Small logits are left out: what the system's account of memory
    cannot resolve would be a large part of them."""
    records = [record for record in records if record.case.logits_bytes >= 16 * RESOLUTION]
    if not records:
        path.unlink(missing_ok=True)  # an earlier run's picture would pass for this one's
        return
    figure = new_figure(
        "Peak memory of forward+backward beyond the logits, in logits",
        note,
        2.1 + 0.45 * len(records),
    )
    axes = figure.subplots()
    case_axis(axes, records)
    names = [name for name in MARKS if name != "copy"]
    for place, name in enumerate(names):
        points = []
        for row, record in enumerate(records):
            result = record.find(name, BOTH)
            if result is not None and result.peak is not None:
                # One below the other, since several need exactly one gradient.
                offset = 0.7 * (place / (len(names) - 1) - 0.5)
                points.append((result.peak / record.case.logits_bytes, row + offset))
        for across, down in points:
            axes.hlines(down, 0, across, color=MARKS[name][0], linewidth=1.5)
        mark(axes, name, points, scale=0.45)
    legend(figure, [axes], LABELS.values())
    save(figure, path)
