"""What is printed and drawn of the losses: times beside stock's, and the most memory."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.table import Table

from bench.common.memory import RESOLUTION
from bench.common.style import INK, LABELS, MARKS, legend, new_figure, plain_number, save
from bench.common.text import memory_text, milliseconds_text, new_table, ratio_text
from bench.loss.charts import case_axis, mark
from bench.losses.measure import LossesFigures

Group = Sequence[LossesFigures]  # of one case, stock's first
Point = tuple[int, float | None, float | None]


def groups(figures: Sequence[LossesFigures]) -> list[Group]:
    found: dict[str, list[LossesFigures]] = {}
    for one in figures:
        found.setdefault(one.case.name, []).append(one)
    return list(found.values())


def ratio(one: LossesFigures, group: Group) -> float | None:
    """How many times as fast as stock, by medians."""
    stock = group[0].median
    return stock / one.median if stock and one.median else None


def table_of(figures: Sequence[LossesFigures]) -> Table:
    table = new_table(
        "losses, forward+backward", ("loss", "provider"), ("ms", "min", "x stock", "memory")
    )
    for group in groups(figures):
        for one in group:
            table.add_row(
                one.case.name if one is group[0] else "",
                one.provider,
                milliseconds_text(one.median),
                milliseconds_text(one.minimum),
                ratio_text(ratio(one, group)),
                memory_text(one.peak),
                style="bold" if one.provider == "fused" else "",
                end_section=one is group[-1],
            )
    return table


def draw(figures: Sequence[LossesFigures], note: str, path: Path) -> None:
    save(picture(figures, note), path)


def picture(figures: Sequence[LossesFigures], note: str) -> Figure:
    found = groups(figures)
    title = "Losses: times as fast as stock PyTorch, and memory beyond the input"
    figure = new_figure(title, note, 2.1 + 0.4 * len(found))
    speed, memory = figure.subplots(1, 2, sharey=True)
    for axes in (speed, memory):
        case_axis(axes, [group[0] for group in found])
    speed.set_title("speed: to the right is faster", fontsize=11, color=INK)
    speed.set_xscale("log", base=2)
    speed.xaxis.set_major_formatter(plain_number)
    speed.xaxis.set_minor_locator(NullLocator())
    speed.axvline(1, color=MARKS["stock"][0], linewidth=2, zorder=1, label=LABELS["stock"])
    memory.set_title("peak memory, in inputs", fontsize=11, color=INK)
    for name in MARKS:
        points = list(points_of(name, found))
        if name != "stock":
            mark(speed, name, [(x, row) for row, x, _ in points if x is not None])
        mark(memory, name, [(y, row) for row, _, y in points if y is not None], scale=0.8)
    memory.set_xlim(left=0)
    legend(figure, (speed, memory), LABELS.values(), columns=4)
    return figure


def points_of(name: str, found: Sequence[Group]) -> Iterator[Point]:
    """Of each case its row in the picture, the speed and the memory."""
    for row, group in enumerate(found):
        for one in group:
            if one.provider == name:
                # What the system's account cannot resolve is no share of anything.
                is_large = one.case.input_bytes >= 16 * RESOLUTION
                inputs = one.peak / one.case.input_bytes if one.peak and is_large else None
                yield row, ratio(one, group), inputs
