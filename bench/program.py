"""The benchmark as a program: options in; tables, JSON and charts out.

A table is printed as soon as its case is done, and the files are written at the end. On a terminal
a bar shows what is being measured and how long it will take; in a log there are the tables alone.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.common import process as fresh_process
from bench.common.devices import DEVICES
from bench.common.machine import busy, describe, headline
from bench.common.process import Notice
from bench.heads import measure as linear
from bench.loss import charts
from bench.loss.cases import DTYPES, TABLES, Case, NoSuchCase, select
from bench.loss.measure import Effort, measure, notices
from bench.loss.memory import measure_peaks
from bench.loss.providers import PROVIDERS, usual
from bench.loss.record import Record, write_json
from bench.loss.tables import details, reasons, summary
from bench.scaling import measure as scaling

QUICK = Effort(seconds=0, least=2, most=2)
WIDTH = 100  # where the output is no terminal
COMPILER = ("torch._dynamo", "torch._inductor.compile_fx")  # seconds, if every process imports them


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[Case]]:
    parser = argparse.ArgumentParser(
        prog="bench",
        description="measure fused_ce, stock PyTorch and a copy of the logits side by side",
        epilog=" ".join(
            f"cases on {device}: {' '.join(case.name for case in table)}."
            for device, table in TABLES.items()
        ),
    )
    parser.add_argument("--device", choices=list(DEVICES), default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="in place of each case's own")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="names or globs; default: all")
    parser.add_argument(
        "--providers",
        nargs="+",
        choices=list(PROVIDERS),
        metavar="NAME",
        help="of " + ", ".join(PROVIDERS) + "; default: all that are installed for the device",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/bench"), help="folder; default: %(default)s"
    )
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="of timing for a case; default: %(default)s"
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="begin no case after that; default: none",
    )
    parser.add_argument("--threads", type=int, help="default: as many as torch chooses")
    parser.add_argument("--quick", action="store_true", help="two rounds: to see that all runs")
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="instead of the cases: sizes from 1 MB to 2 GB, on one thread and on all",
    )
    parser.add_argument(
        "--linear",
        action="store_true",
        help="instead of the cases: heads of language models, and linear_cross_entropy",
    )
    options = parser.parse_args(arguments)
    default = scaling.PROVIDERS if options.scaling else usual(options.device)
    # In the table's order, whatever the order asked for, and nobody twice.
    options.providers = [name for name in PROVIDERS if name in (options.providers or default)]
    missing = DEVICES[options.device].missing()
    if missing:
        parser.error(missing)
    if options.threads is not None and options.threads < 1:
        parser.error("--threads must be at least 1")
    if options.scaling and options.cases:
        parser.error("--scaling has sizes of its own; leave --cases out")
    if options.linear and (options.cases or options.providers != list(default) or options.scaling):
        parser.error("--linear has sizes and providers of its own; leave the others' options out")
    try:
        return options, select(options.cases, options.dtype, options.device)
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
) -> Iterator[Record]:
    device, names = DEVICES[options.device], options.providers
    start = perf_counter()
    elsewhere = 0 if device.counts_memory else len(names)
    total = sum(notices(case, names) + elsewhere for case in cases)
    with progress(console, total) as notice:
        for done, case in enumerate(cases):
            if options.budget is not None and perf_counter() - start > options.budget:
                left = " ".join(case.name for case in cases[done:])
                console.print(f"[yellow]no time left for {left}[/]", highlight=False)
                return
            record = measure(case, names, device, effort, notice)
            if elsewhere:
                measure_peaks(record, names, device, notice)
            console.print(details(record))
            for reason in reasons(record):
                console.print(f"  {reason}", highlight=False, soft_wrap=True)
            yield record


def run_linear(
    console: Console, options: argparse.Namespace, effort: Effort, note: str
) -> Iterator[list[linear.Figures]]:
    device, quick = DEVICES[options.device], options.quick
    heads = linear.QUICK if quick else linear.HEADS[device.name]
    tall = linear.QUICK[0] if quick else linear.TALL[device.name]
    if options.dtype:
        tall = replace(tall, dtype=options.dtype)
        heads = dict.fromkeys(replace(head, dtype=options.dtype) for head in heads)
    vocabularies = linear.QUICK_VOCABULARIES if quick else linear.VOCABULARIES
    talls = [replace(tall, classes=classes) for classes in vocabularies]
    with progress(console, linear.notices_of(heads, vocabularies)) as notice:
        times = linear.time_heads(heads, device, effort, notice)
        console.print(linear.time_table(times))
        yield times
        peaks = linear.measure_peaks(talls, device, notice)
        console.print(linear.memory_table(peaks))
    for reason in linear.reasons([*times, *peaks]):
        console.print(f"  {reason}", highlight=False, soft_wrap=True)
    linear.draw_memory(peaks, note, options.out / "linear_memory.png")
    yield peaks


def main(arguments: Sequence[str] | None = None) -> int:
    options, cases = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if "compile" in options.providers and not options.linear:
        fresh_process.preload(*COMPILER)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    device, out = DEVICES[options.device], options.out
    effort = QUICK if options.quick else Effort(options.seconds)
    facts = describe(device)
    note = headline(facts)
    console.print(note, highlight=False, soft_wrap=True)
    if busy(facts):
        console.print(f"[yellow]{busy(facts)}[/]", highlight=False, soft_wrap=True)

    kind = "linear" if options.linear else "scaling" if options.scaling else "bench"
    start = perf_counter()

    def write(records: Sequence[Record | linear.Figures]) -> None:
        data = {
            "kind": kind,
            "machine": facts,
            "effort": asdict(effort),
            "providers": list(linear.PROVIDERS) if options.linear else options.providers,
            "seconds": round(perf_counter() - start, 1),
            "cases": [record.as_data() for record in records],
        }
        write_json(out / f"{kind}.json", data)

    if options.linear:
        records = []
        for figures in run_linear(console, options, effort, note):
            records += figures
            write(records)  # a run that is stopped leaves what it has measured
    elif options.scaling:
        sizes = scaling.sizes(options.dtype or "fp32", options.quick)
        total = scaling.notices_of(sizes, options.providers, device)
        with progress(console, total) as notice:
            records = scaling.run(sizes, options.providers, device, effort, notice)
        console.print(*scaling.tables(records))
        scaling.draw(records, note, out / "scaling.png")
    else:
        records = []
        for record in run_cases(console, options, cases, effort):
            records.append(record)
            write(records)
        console.print(summary(records, options.providers))
        charts.draw_speed(records, note, out / "speed.png")
        charts.draw_memory(records, note, out / "memory.png")
    write(records)
    console.print(f"{perf_counter() - start:.0f} s; JSON and charts are in {out}", highlight=False)
    return 0
