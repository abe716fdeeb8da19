"""How figures are written: a dash for what is missing, and as many digits as mean anything."""

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bench.common.memory import RESOLUTION

DASH = "-"


def ratio_text(ratio: float | None) -> str:
    return DASH if ratio is None else f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"


def milliseconds_text(value: float | None) -> str:
    if value is None:
        return DASH
    decimals = 4 if value < 0.1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f}"


def memory_text(amount: int | None, missing: str = DASH) -> str:
    if amount is None:
        return missing
    if amount < RESOLUTION:
        return f"< {RESOLUTION / 1e6:.1f} MB"
    return f"{amount / 1e6:.1f} MB"


def new_table(title: str, words: Iterable[str], numbers: Iterable[str]) -> Table:
    """Columns of words on the left, of numbers on the right."""
    table = Table(
        title=title, box=SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="bold"
    )
    for heading in words:
        table.add_column(heading, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
