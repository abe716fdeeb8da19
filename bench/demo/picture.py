"""Draws the demo's one picture: a column for each task, from the curves down to their cost.

The stock curve is broad and pale, the fused one thin and dark on top, so that agreement shows as
one line in two tones. The strip below has the difference on a logarithmic scale, beside what is
allowed, because two curves that look the same on the page may still be a tenth of a percent apart.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.common.memory import RESOLUTION
from bench.common.style import FAINT, INK, MARKS, save, style
from bench.common.text import milliseconds_text
from bench.demo.agreement import TOLERANCE
from bench.demo.display import Outcome, gain_text, peak_text

COLORS = {"stock": "#9db4d0", "fused": MARKS["fused"][0]}
ROUNDING = 1e-9  # where a difference of exactly zero is drawn


def draw_losses(axes: Axes, outcome: Outcome) -> None:
    widths = {"stock": 5.0, "fused": 1.3}
    for name, run in outcome.runs.items():
        steps = range(1, len(run.losses) + 1)
        axes.plot(steps, run.losses, color=COLORS[name], linewidth=widths[name], label=name)
    axes.set_title(f"{outcome.task.name}\n", loc="left", fontsize=13, fontweight="bold", color=INK)
    axes.text(0, 1.03, outcome.task.about, transform=axes.transAxes, fontsize=9, color=INK)
    axes.set_ylabel("training loss", color=INK)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.legend(frameon=False, loc="upper right")


def draw_differences(axes: Axes, outcome: Outcome) -> None:
    # A broken training differs by infinity, which no axis can show; it is drawn at 1, the top.
    shown = [min(1.0, max(value, ROUNDING)) for value in outcome.differences]
    axes.semilogy(range(1, len(shown) + 1), shown, ".", markersize=3, color=INK)
    axes.axhline(TOLERANCE, color=COLORS["fused"], linewidth=1, linestyle="--")
    axes.annotate(
        f"allowed: {TOLERANCE:.0e}",
        (1, TOLERANCE),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=COLORS["fused"],
    )
    axes.set_ylim(ROUNDING / 2, max(1e-3, 2 * max(shown)))
    axes.set_yticks([1e-9, 1e-7, 1e-5, 1e-3], ["0", "1e-7", "1e-5", "1e-3"])
    axes.minorticks_off()
    axes.set_ylabel("difference", color=INK)
    axes.set_xlabel("step", color=INK)


def draw_bars(
    axes: Axes,
    title: str,
    values: dict[str, float | None],
    labels: dict[str, str],
    ratio: str,
    floor: float = 0.0,
) -> None:
    """Horizontal bars, a figure at the end of each; what was not measured has no bar."""
    names = list(values)
    lengths = [value if value is not None and value > floor else 0.0 for value in values.values()]
    axes.barh(names, lengths, color=[COLORS[name] for name in names], height=0.6)
    axes.set_xlim(0, max(lengths) or 1)
    for row, (name, length) in enumerate(zip(names, lengths, strict=True)):
        axes.annotate(
            labels[name],
            (length, row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=INK,
        )
    axes.invert_yaxis()
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    axes.set_title(
        f"{title} (stock / fused: {ratio})" if ratio else title, loc="left", fontsize=10, color=INK
    )


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    figure = Figure(figsize=(6.5 * len(outcomes), 8), layout="constrained")
    columns = figure.subfigures(1, len(outcomes), squeeze=False, wspace=0.04)[0]
    for column, outcome in zip(columns, outcomes, strict=True):
        heights = {"losses": 5.0, "apart": 1.8, "times": 1.0, "memory": 1.0}
        if not outcome.compared:
            del heights["apart"]
        panels = column.subplot_mosaic(
            [[name] for name in heights], height_ratios=list(heights.values())
        )
        for axes in panels.values():
            style(axes)
        draw_losses(panels["losses"], outcome)
        if outcome.compared:
            panels["apart"].sharex(panels["losses"])
            draw_differences(panels["apart"], outcome)
        middle = {name: median(run.milliseconds) for name, run in outcome.runs.items()}
        draw_bars(
            panels["times"],
            "loss, forward and backward",
            middle,
            {name: f"{milliseconds_text(value)} ms" for name, value in middle.items()},
            gain_text(middle.get("stock"), middle.get("fused")),
        )
        draw_bars(
            panels["memory"],
            "peak memory of one loss",
            dict(outcome.memory),
            {name: peak_text(value) for name, value in outcome.memory.items()},
            gain_text(outcome.memory.get("stock"), outcome.memory.get("fused"), RESOLUTION),
            RESOLUTION,
        )
    save(figure, path, dpi=110)
