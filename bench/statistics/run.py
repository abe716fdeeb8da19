"""`python -m bench --statistics`: time and memory of log-probability and entropy."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from bench.common.console import print_reasons, progress
from bench.common.devices import DEVICES
from bench.common.measure import Effort
from bench.common.text import memory_text, milliseconds_text, new_table, ratio_text
from bench.statistics import measure
from bench.statistics.cases import CASES, QUICK
from bench.statistics.measure import StatisticsFigures


def table_of(figures: Sequence[StatisticsFigures]) -> Table:
    table = new_table(
        "log-probability and entropy, forward+backward",
        ("rows x classes", "provider"),
        ("ms", "min", "x stock", "memory"),
    )
    for found in figures:
        is_ours = found.provider == "fused"
        table.add_row(
            found.case.name if found.provider == "stock" else "",
            found.provider,
            milliseconds_text(found.median),
            milliseconds_text(found.minimum),
            ratio_text(found.ratio),
            memory_text(found.peak),
            style="bold" if is_ours else "",
            end_section=is_ours,
        )
    return table


def run(
    console: Console, args: Namespace, effort: Effort, note: str
) -> Iterator[list[StatisticsFigures]]:
    cases = QUICK if args.quick else CASES
    if args.dtype:
        cases = list(dict.fromkeys(replace(case, dtype=args.dtype) for case in cases))
    figures = []
    with progress(console, measure.notices(cases)) as notice:
        for case in cases:
            figures += measure.measure(case, DEVICES[args.device], effort, notice)
            yield figures  # a run that is stopped leaves what it has measured
    console.print(table_of(figures))
    print_reasons(console, figures)
    yield figures
