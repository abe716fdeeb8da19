"""What the benchmark prints: a table for each case when it is done, and one of ratios at the end.

A dash is a figure that this run did not measure; the reason is printed below the table.
"""

from collections.abc import Sequence

from rich.table import Table

from bench.common.figures import BOTH, COPY, FORWARD
from bench.common.text import DASH, memory_text, milliseconds_text, new_table, ratio_text
from bench.loss.providers import PROVIDERS
from bench.loss.record import Record

OURS = ("fused", "recompute", "inplace")


def bandwidth_text(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}" if value >= 0.01 else "< 0.01"


def pass_text(which: str) -> str:
    """Narrow enough to head a column."""
    return "" if which == COPY else which.replace("forward+", "+")


def case_table(record: Record) -> Table:
    table = new_table(
        f"{record.case.name}: {record.case.logits_bytes / 1e6:.3g} MB of logits",
        ("pass", "provider"),
        ("ms", "min", "GB/s", "of copy", "x stock", "memory"),
    )
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
                memory_text(result.peak),
                end_section=result is results[-1],
                style="bold" if result.provider in OURS else "",
            )
    return table


def ratio_table(records: Sequence[Record], names: Sequence[str]) -> Table:
    """Ratios to stock, a line for each case."""
    columns = [
        (name, which)
        for which in (FORWARD, BOTH)
        for name in names
        if which in PROVIDERS[name].passes and name != "stock"
    ]
    headings = [f"{pass_text(which)}\n{name}" for name, which in columns]
    table = new_table("times as fast as stock, by medians", ["case"], headings)
    for record in records:
        table.add_row(
            record.case.name,
            *(ratio_text(record.ratio(name, which)) for name, which in columns),
        )
    return table
