"""What is printed and drawn of heads: tables of time and memory, and a picture of the memory."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.ticker import FuncFormatter
from rich.table import Table

from bench.common.style import FAINT, INK, MARKS, legend, new_figure, save, style
from bench.common.text import DASH, memory_text, milliseconds_text, new_table, ratio_text
from bench.heads.record import HeadFigures

LABELS = {
    "stock": "F.linear, F.cross_entropy",
    "torch chunks": "torch's own chunks",
    "fused": "fused_ce.linear_cross_entropy",
}
LINES = {"stock": MARKS["stock"], "torch chunks": MARKS["compile"], "fused": MARKS["fused"]}


def time_table(figures: Sequence[HeadFigures]) -> Table:
    table = new_table(
        "forward+backward of a head",
        ("rows x features-classes", "provider"),
        ("ms", "min", "TFLOP/s", "x GEMMs"),
    )
    for found in figures:
        table.add_row(
            found.head.name if found.provider == "gemms" else "",
            found.provider,
            milliseconds_text(found.median),
            milliseconds_text(found.minimum),
            DASH if found.tflops is None else f"{found.tflops:.3g}",
            ratio_text(found.ratio),
            style="bold" if found.provider == "fused" else "",
            end_section=found.provider == "fused",
        )
    return table


def memory_table(figures: Sequence[HeadFigures]) -> Table:
    table = new_table(
        "peak memory of forward+backward beyond input and weight",
        ["rows x features-classes"],
        ("gradients", *LINES),
    )
    for head in dict.fromkeys(found.head for found in figures):
        peaks = [found.peak for found in figures if found.head == head]
        table.add_row(head.name, *map(memory_text, (head.bytes["gradients"], *peaks)))
    return table


def draw(figures: Sequence[HeadFigures], note: str, path: Path) -> None:
    heads = list(dict.fromkeys(found.head for found in figures))
    first = heads[0]
    figure = new_figure(
        f"Peak memory of a head's forward+backward, {first.rows} rows of {first.features} features,"
        f" {first.dtype}",
        note,
        4.6,
    )
    axes = figure.subplots()
    style(axes)
    axes.grid(color=FAINT, linewidth=0.7)
    classes = [head.classes for head in heads]
    for name, (color, marker, _) in LINES.items():
        points = [(f.head.classes, f.peak) for f in figures if f.provider == name and f.peak]
        if points:
            across, up = zip(*points, strict=True)
            axes.plot(across, up, color=color, marker=marker, linewidth=1.8, label=LABELS[name])
    least = [head.bytes["gradients"] for head in heads]
    axes.plot(classes, least, color=MARKS["copy"][0], linestyle=":", label="the gradients alone")
    axes.set_xticks(classes, [f"{count:,}" for count in classes])
    axes.set_xlabel("classes", color=INK)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e9:g} GB"))
    axes.set_ylim(bottom=0)
    legend(figure, [axes], [*LABELS.values(), "the gradients alone"], columns=2)
    save(figure, path)
