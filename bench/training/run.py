"""`python -m bench --training`: whole steps of training, stock's and those of every way to fuse."""

from argparse import Namespace
from collections.abc import Iterator

from rich.console import Console

from bench.common import process
from bench.common.console import print_reasons, progress
from bench.common.measure import Effort
from bench.training import measure
from bench.training.cases import CASES, QUICK
from bench.training.measure import TrainingFigures
from bench.training.report import draw, table_of


def run(
    console: Console, args: Namespace, effort: Effort, note: str
) -> Iterator[list[TrainingFigures]]:
    process.preload("fused_ce", "bench.training.measure")
    cases = QUICK if args.quick else CASES
    figures = []
    with progress(console, measure.notices(cases)) as notice:
        for case in cases:
            timed = measure.measure_times(case, effort, notice)
            figures += timed
            yield figures  # a run that is stopped leaves what it has measured
            for found in timed:
                if found.samples:
                    measure.measure_memory(found, notice)
                    yield figures
    console.print(table_of(figures))
    print_reasons(console, figures)
    draw(figures, note, args.out / "training.png")
    yield figures
