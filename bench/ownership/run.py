"""`python -m bench --ownership`: the loss of a training step whose logits are held, or are not.

It answers a question: whether the memory of the logits should be taken without being asked for.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter

import torch
from rich.console import Console
from rich.table import Table

from bench.common import process
from bench.common.console import print_line, print_reasons, progress
from bench.common.measure import Effort
from bench.common.memory import available
from bench.common.text import memory_text, milliseconds_text, new_table, ratio_text
from bench.ownership import measure
from bench.ownership.cases import COPIES, QUICK, SIZES, Size
from bench.ownership.measure import StepFigures
from bench.ownership.providers import PROVIDERS

COMPILER = ("torch._dynamo", "torch._inductor.compile_fx")  # seconds, if every process imports them

Row = dict[str, StepFigures]  # of one size and kind of step, by provider


def rows_of(figures: Sequence[StepFigures]) -> list[Row]:
    found: dict[tuple, Row] = {}
    for one in figures:
        found.setdefault((one.size, one.threads, one.which), {})[one.provider] = one
    return list(found.values())


def table_of(
    title: str, figures: Sequence[StepFigures], text: Callable[[StepFigures], str], *ratio: str
) -> Table:
    """A row for each kind of step; with a ratio, that of auto to the default at the end of it."""
    table = new_table(title, ("rows x classes", "threads", "logits"), (*PROVIDERS, *ratio))
    for row in rows_of(figures):
        one = row["auto"]
        cells = [text(row[name]) for name in PROVIDERS]
        cells += [ratio_text(one.ratio)] * len(ratio)
        table.add_row(one.size.name, str(one.threads), one.which, *cells)
    return table


def megabytes_text(one: StepFigures) -> str:
    return memory_text(one.peak).removesuffix(" MB")


def verdict(figures: Sequence[StepFigures]) -> str:
    ratios = {one.subject: one.ratio for one in figures if one.provider == "auto" and one.ratio}
    if not ratios:
        return "auto has no figures"
    said = []
    for word, choose in (("best", min), ("worst", max)):
        subject = choose(ratios, key=ratios.get)
        said.append(f"at {word} {ratios[subject]:.2f} ({subject.partition(', ')[2]})")
    return f"auto's time over the default's is {' and '.join(said)}"


def fits(size: Size) -> bool:
    room = available()
    return room is None or COPIES * size.logits_bytes <= room


def run(
    console: Console, args: Namespace, effort: Effort, note: str
) -> Iterator[list[StepFigures]]:
    process.preload("fused_ce", "bench.ownership.measure", *COMPILER)
    all_threads = torch.get_num_threads()
    threads = [all_threads] if args.threads or args.quick else sorted({1, all_threads})
    sizes = QUICK if args.quick else SIZES
    figures, start = [], perf_counter()
    with progress(console, len(threads) * measure.notices(sizes)) as notice:
        for size in sizes:
            if not fits(size):
                print_line(console, f"[yellow]no memory for {size.name}[/]")
                continue
            for count in threads:
                if args.budget is not None and perf_counter() - start > args.budget:
                    print_line(console, f"[yellow]no time left for {size.name}[/]")
                    break
                torch.set_num_threads(count)
                figures += measure.measure(size, effort, notice)
                yield figures  # a run that is stopped leaves what it has measured
    torch.set_num_threads(all_threads)
    title = "the loss of a training step and its backward"
    console.print(
        table_of(f"{title}, ms", figures, lambda one: milliseconds_text(one.median), "auto/fused")
    )
    console.print(table_of(f"{title}, peak memory in MB", figures, megabytes_text))
    print_line(console, verdict(figures))
    print_reasons(console, figures)
    yield figures
