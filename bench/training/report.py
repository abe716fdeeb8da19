"""What is printed and drawn of training: the step's time, its memory, and the largest batch."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from bench.common.memory import RESOLUTION
from bench.common.style import INK, MARKS, legend, new_figure, save
from bench.common.text import DASH, memory_text, milliseconds_text, new_table, ratio_text
from bench.loss.charts import case_axis
from bench.losses.report import Group, groups, ratio
from bench.training.measure import TrainingFigures

LABELS = {
    "stock": "stock",
    "patch": "fused_ce.patch()",
    "head": "linear_cross_entropy",
    "inplace": "inplace=True",
}
COLORS = {
    "stock": MARKS["stock"][0],
    "patch": MARKS["recompute"][0],
    "head": MARKS["fused"][0],
    "inplace": MARKS["inplace"][0],
}
THICKNESS = 0.24  # of a bar, where a case has 1

Value = Callable[[TrainingFigures], float | None]
Text = Callable[[TrainingFigures], str]


def largest_text(found: TrainingFigures) -> str:
    return DASH if found.largest is None else f"{found.largest} {found.case.item}"


def limit_of(figures: Sequence[TrainingFigures]) -> str:
    limits = [found.limit for found in figures if found.limit]
    return f"{max(limits) / 1e9:.3g} GB" if limits else DASH


def table_of(figures: Sequence[TrainingFigures]) -> Table:
    table = new_table(
        f"a step of training, and the largest batch in {limit_of(figures)}",
        ["provider"],
        ("ms", "min", "x stock", "memory", "largest batch"),
    )
    for group in groups(figures):
        table.add_row(group[0].case.name, style="italic")
        for found in group:
            table.add_row(
                "  " + found.provider,
                milliseconds_text(found.median),
                milliseconds_text(found.minimum),
                ratio_text(ratio(found, group)),
                memory_text(found.peak),
                largest_text(found),
                style="" if found.provider == "stock" else "bold",
                end_section=found is group[-1],
            )
    return table


def draw(figures: Sequence[TrainingFigures], note: str, path: Path) -> None:
    save(picture(figures, note), path)


def picture(figures: Sequence[TrainingFigures], note: str) -> Figure:
    """Bars as long as the share of stock's, and beside each what it stands for."""
    found = groups(figures)
    figure = new_figure(
        "A step of training: time, memory and the largest batch, over stock's",
        note,
        1.9 + 0.95 * len(found),
    )
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (title, value, text) in zip(panels, measures(figures), strict=True):
        case_axis(axes, [group[0] for group in found])
        axes.set_yticks(range(len(found)), [group[0].case.label for group in found])
        axes.set_title(title, fontsize=11, color=INK)
        bars(axes, found, value, text)
    legend(figure, panels, LABELS.values(), columns=4)
    return figure


def measures(figures: Sequence[TrainingFigures]) -> list[tuple[str, Value, Text]]:
    """What each panel is about, its figure and how that is written."""

    def peak(one: TrainingFigures) -> int | None:
        # What the system's account cannot resolve is no share of anything.
        return one.peak if one.peak and one.peak >= 16 * RESOLUTION else None

    return [
        ("time of a step", lambda one: one.median, lambda one: f"{one.median / 1e3:.2f} s"),
        ("peak memory of a step", peak, lambda one: f"{one.peak / 1e9:.2f} GB"),
        (
            f"largest batch in {limit_of(figures)}",
            lambda one: one.largest,
            lambda one: str(one.largest),
        ),
    ]


def bars(axes: Axes, found: Sequence[Group], value: Value, text: Text) -> None:
    longest = 1.0
    for row, group in enumerate(found):
        stock = value(group[0])
        for place, one in enumerate(group):
            own = value(one)
            if not stock or not own:
                continue
            share, name = own / stock, one.provider
            longest = max(longest, share)
            down = row + 1.15 * THICKNESS * (place - (len(group) - 1) / 2)
            axes.barh(down, share, THICKNESS, color=COLORS[name], label=LABELS[name], zorder=2)
            axes.annotate(
                text(one),
                (share, down),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=INK,
            )
    axes.set_xlim(0, 1.45 * longest)
