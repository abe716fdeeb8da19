"""The benchmark as a program: options in; tables, JSON and charts out."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench import charts, scaling
from bench.cases import CASES, DTYPES, Case, NoSuchCase, select
from bench.devices import DEVICES
from bench.machine import describe, headline
from bench.measure import Effort, Notice, measure, measure_peaks, notices
from bench.providers import PROVIDERS
from bench.record import Record, write_json
from bench.tables import details, reasons, summary

QUICK = Effort(seconds=0, least=2, most=2)
WIDTH = 100  # where the output is no terminal


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[Case]]:
    parser = argparse.ArgumentParser(
        prog="bench",
        description="measure fused_ce, stock PyTorch and a copy of the logits side by side",
        epilog="cases: " + " ".join(case.name for case in CASES),
    )
    parser.add_argument("--device", choices=list(DEVICES), default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="in place of each case's own")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="names or globs; default: all")
    parser.add_argument(
        "--providers",
        nargs="+",
        choices=list(PROVIDERS),
        metavar="NAME",
        help="of " + ", ".join(PROVIDERS) + "; default: all",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/bench"), help="folder; default: %(default)s"
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="of timing for a case; default: %(default)s"
    )
    parser.add_argument("--threads", type=int, help="default: as many as torch chooses")
    parser.add_argument("--quick", action="store_true", help="two rounds: to see that all runs")
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="instead of the cases: sizes from 1 MB to 2 GB, on one thread and on all",
    )
    options = parser.parse_args(arguments)
    default = scaling.PROVIDERS if options.scaling else PROVIDERS
    # In the table's order, whatever the order asked for, and nobody twice.
    options.providers = [name for name in PROVIDERS if name in (options.providers or default)]
    if not DEVICES[options.device].is_here():
        parser.error(f"there is no {options.device} device here")
    if options.scaling and options.cases:
        parser.error("--scaling has sizes of its own; leave --cases out")
    try:
        return options, select(options.cases, options.dtype)
    except NoSuchCase as error:
        parser.error(str(error))


@contextmanager
def progress(console: Console, total: int) -> Iterator[Notice]:
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    bar = Progress(
        *columns,
        TextColumn("{task.description}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, description=text, advance=1)


def run_cases(
    console: Console, options: argparse.Namespace, cases: Sequence[Case], effort: Effort
) -> list[Record]:
    device, names = DEVICES[options.device], options.providers
    records = []
    with progress(console, sum(notices(case, names) for case in cases)) as notice:
        for case in cases:
            record = measure(case, names, device, effort, notice)
            measure_peaks(record, names, device, notice)
            console.print(details(record))
            for reason in reasons(record):
                console.print(f"  {reason}", highlight=False, soft_wrap=True)
            records.append(record)
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    options, cases = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    device, out = DEVICES[options.device], options.out
    effort = QUICK if options.quick else Effort(options.seconds)
    facts = describe(device)
    note = headline(facts)
    console.print(note, highlight=False, soft_wrap=True)

    start = perf_counter()
    if options.scaling:
        name = "scaling"
        sizes = scaling.cases(options.dtype or "fp32", options.quick)
        with progress(console, scaling.steps(sizes, options.providers)) as notice:
            data = scaling.run(sizes, options.providers, device, effort, notice)
        console.print(scaling.table(data))
        scaling.draw(data, note, out / "scaling.png")
    else:
        name = "bench"
        data = run_cases(console, options, cases, effort)
        console.print(summary(data, options.providers))
        charts.draw_speed(data, note, out / "speed.png")
        charts.draw_memory(data, note, out / "memory.png")
