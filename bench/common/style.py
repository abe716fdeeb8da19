"""How the pictures look: the colours and marks of the providers, axes, legends and files.

Sizes and letters are chosen for the width of a README.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT = "#1f2933", "#d9dee4"
WIDTH, DPI = 8.4, 200
# Colour and shape, for readers who cannot tell all the colours apart.
MARKS = {
    "stock": ("#7d97b8", "s", 30),
    "compile": ("#4f7cac", "^", 40),
    "recompute": ("#e8a33d", "v", 36),
    "fused": ("#c2410c", "o", 52),
    "inplace": ("#15803d", "D", 36),
    "liger": ("#7c3aed", "P", 40),
    "quack": ("#0e7490", "X", 40),
    "copy": ("#6b7280", "|", 110),
}
LABELS = {
    "stock": "stock, eager",
    "compile": "stock, torch.compile",
    "recompute": "fused_ce, recompute",
    "fused": "fused_ce",
    "inplace": "fused_ce, in place",
    "liger": "Liger",
    "quack": "quack",
    "copy": "copying the logits",
}


def plain_number(value: float, _: int) -> str:
    return f"{value:g}"


def style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, length=0, labelsize=9)


def legend(figure: Figure, axes: Sequence[Axes], order: Iterable[str], columns: int = 3) -> None:
    found = {}
    for panel in axes:
        handles, labels = panel.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    ordered = [label for label in order if label in found]
    figure.legend(
        [found[label] for label in ordered],
        ordered,
        loc="outside lower center",
        ncols=min(columns, len(ordered)),
        frameon=False,
        fontsize=10,
        labelcolor=INK,
    )


def new_figure(title: str, note: str, height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(f"{title}\n\n", x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    figure.text(0.01, 1 - 0.45 / height, note, fontsize=9.5, color=INK, va="center")
    return figure


def save(figure: Figure, path: Path, dpi: int = DPI) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, facecolor="white")
