"""`python -m bench --losses`: time and memory of the losses beside the cross entropy."""

from argparse import Namespace
from collections.abc import Iterator

from rich.console import Console

from bench.common.console import print_reasons, progress
from bench.common.devices import DEVICES
from bench.common.measure import Effort
from bench.losses import measure
from bench.losses.cases import LOSSES, QUICK_SIZE, SIZES, Case
from bench.losses.measure import LossesFigures
from bench.losses.report import draw, table_of


def run(
    console: Console, args: Namespace, effort: Effort, note: str
) -> Iterator[list[LossesFigures]]:
    size = QUICK_SIZE if args.quick else SIZES[args.device]
    cases = [Case(name, *size, args.dtype or "fp32") for name in LOSSES]
    figures = []
    with progress(console, measure.notices(cases)) as notice:
        for case in cases:
            figures += measure.measure(case, DEVICES[args.device], effort, notice)
            yield figures  # a run that is stopped leaves what it has measured
    console.print(table_of(figures))
    print_reasons(console, figures)
    draw(figures, note, args.out / "losses.png")
    yield figures
