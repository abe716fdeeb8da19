"""What the benchmark prints: a table for each case when it is done, and one of ratios at the end.

A dash is a figure that this run did not measure; the reason is printed below the table.
"""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bench.demo.display import memory_text
from bench.loss.providers import PROVIDERS
from bench.loss.record import Record, Result
from bench.loss.tensors import BOTH, COPY, FORWARD

DASH = "-"
OURS = ("fused", "recompute", "inplace")


def ratio_text(ratio: float | None) -> str:
    return DASH if ratio is None else f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"


def milliseconds_text(value: float | None) -> str:
    if value is None:
        return DASH
    decimals = 4 if value < 0.1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f}"


def bandwidth_text(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}" if value >= 0.01 else "< 0.01"


def pass_text(which: str) -> str:
    """Narrow enough to head a column."""
    return "" if which == COPY else which.replace("forward+", "+")


def peak_text(result: Result) -> str:
    return DASH if result.peak is None else memory_text(result.peak)


def details(record: Record) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="bold")
    table.title = f"{record.case.name}: {record.case.logits_bytes / 1e6:.3g} MB of logits"
    table.add_column("pass", no_wrap=True)
    table.add_column("provider", no_wrap=True)
    for heading in ("ms", "min", "GB/s", "of copy", "x stock", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for which in (FORWARD, BOTH, COPY):
        results = [result for result in record.results if result.which == which]
        for result in results:
            share = record.share_of_copy(result)
            table.add_row(
                which if result is results[0] else "",
                result.provider,
                milliseconds_text(result.median),
                milliseconds_text(result.minimum),
                bandwidth_text(result.bandwidth),
                DASH if share is None else f"{share:.0%}",
                ratio_text(record.ratio(result.provider, which)),
                peak_text(result),
                end_section=result is results[-1],
                style="bold" if result.provider in OURS else "",
            )
    return table


def reasons(record: Record) -> list[str]:
    return [
        f"{result.provider}, {result.which}: {result.reason}"
        for result in record.results
        if result.reason
    ]


def summary(records: Sequence[Record], names: Sequence[str]) -> Table:
    """Ratios to stock, a line for each case."""
    columns = [
        (name, which)
        for which in (FORWARD, BOTH)
        for name in names
        if which in PROVIDERS[name].passes and name != "stock"
    ]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="bold")
    table.title = "times as fast as stock, by medians"
    table.add_column("case", no_wrap=True)
    for name, which in columns:
        table.add_column(f"{pass_text(which)}\n{name}", justify="right", no_wrap=True)
    for record in records:
        table.add_row(
            record.case.name,
            *(ratio_text(record.ratio(name, which)) for name, which in columns),
        )
    return table
