"""`python -m bench --parallel`: the loss of sharded classes on several processes."""

from argparse import Namespace
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from bench.common.console import print_reasons, progress
from bench.common.measure import Effort
from bench.common.text import DASH, memory_text, milliseconds_text, new_table, ratio_text
from bench.parallel import measure
from bench.parallel.cases import CASES, QUICK
from bench.parallel.measure import ShardedFigures


def table_of(figures: Sequence[ShardedFigures]) -> Table:
    table = new_table(
        "sharded classes, forward+backward, ranks of one thread",
        ("rows x classes", "provider"),
        ("ms", "x torch", "/ unsharded", "gathers", "memory"),
    )
    last = figures[-1].provider
    for found in figures:
        table.add_row(
            found.case.name if found.provider == "loss_parallel" else "",
            found.provider,
            milliseconds_text(found.median),
            ratio_text(found.ratio),
            ratio_text(found.share),
            DASH if found.collectives is None else str(found.collectives),
            memory_text(found.peak),
            style="bold" if found.provider in ("fused", "fresh", "inplace") else "",
            end_section=found.provider == last,
        )
    return table


def run(
    console: Console, args: Namespace, effort: Effort, note: str
) -> Iterator[list[ShardedFigures]]:
    cases = QUICK if args.quick else CASES
    figures = []
    with progress(console, measure.notices(cases)) as notice:
        for case in cases:
            figures += measure.measure(case, effort, notice)
            yield figures  # a run that is stopped leaves what it has measured
    console.print(table_of(figures))
    print_reasons(console, figures)
    yield figures
