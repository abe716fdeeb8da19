"""`python -m bench --scaling`: all sizes, then the tables and the picture."""

from argparse import Namespace
from collections.abc import Iterator

from rich.console import Console

from bench.common.console import progress
from bench.common.devices import DEVICES
from bench.common.measure import Effort
from bench.loss.record import Record
from bench.scaling import measure, report


def run(console: Console, args: Namespace, effort: Effort, note: str) -> Iterator[list[Record]]:
    device = DEVICES[args.device]
    sizes = measure.sizes(args.dtype or "fp32", args.quick)
    with progress(console, measure.notices(sizes, args.providers, device)) as notice:
        records = measure.measure(sizes, args.providers, device, effort, notice)
    console.print(*report.tables(records))
    report.draw(records, note, args.out / "scaling.png")
    yield records
