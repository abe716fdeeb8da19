"""The search as a program: how long and from what seed; a table of the worst, and their lines.

A few rounds in this process pass most cases by. What seems slow is measured again in a process of
its own, where no memory is left over from another case.
"""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.cliffs.cases import MOST, Case
from bench.cliffs.measure import HandedToStock, Timing, compare
from bench.cliffs.search import MANY, search
from bench.common.console import make_console, positive, print_line
from bench.common.devices import DEVICES
from bench.common.figures import write_json
from bench.common.machine import describe, headline
from bench.common.process import call, preload
from bench.common.text import milliseconds_text, new_table, ratio_text


def parse(command_line: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.cliffs",
        description="look for calls above 10,000 elements that stock PyTorch answers sooner",
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn; default: 0")
    parser.add_argument(
        "--most", type=positive, default=MOST, metavar="ELEMENTS", help="default: %(default)s"
    )
    parser.add_argument("--show", type=positive, default=10, help="the worst; default: 10")
    parser.add_argument(
        "--limit",
        type=float,
        default=1.1,
        help="ours over stock's that is a cliff: the exit code is 1; default: %(default)s",
    )
    parser.add_argument("--case", metavar="LINE", help="instead: this case, as one was printed")
    parser.add_argument(
        "--out", type=Path, default=Path("build/bench"), help="folder; default: %(default)s"
    )
    args = parser.parse_args(command_line)
    try:
        args.case = args.case and Case.parse(args.case)
    except ValueError as error:
        parser.error(f"--case: {error}")
    return args


def worst_table(timings: Sequence[Timing]) -> Table:
    table = new_table(
        "ours over stock's, processor time of one thread",
        ("case",),
        ("ratio", "stock ms", "ours ms"),
    )
    table.columns[0].no_wrap = False
    for timing in timings:
        times = (milliseconds_text(each) for each in (timing.stock, timing.ours))
        table.add_row(str(timing.case), ratio_text(timing.ratio), *times)
    return table


def report(console: Console, timings: Sequence[Timing], show: int, limit: float) -> int:
    """The number of cliffs."""
    worst = sorted(timings, key=lambda timing: -timing.ratio)
    console.print(worst_table(worst[:show]))
    for timing in worst[:show]:
        print_line(console, f"python -m bench.cliffs --case {shlex.quote(str(timing.case))}")
    cliffs = sum(timing.ratio > limit for timing in timings)
    slower = sum(timing.ratio > 1.0 for timing in timings)
    print_line(
        console,
        f"{len(timings)} cases: {slower} slower than stock, {cliffs} by more than {limit:g} times",
    )
    return cliffs


def as_data(timing: Timing) -> dict:
    return {
        "case": str(timing.case),
        "ratio": timing.ratio,
        "stock_ms": timing.stock,
        "ours_ms": timing.ours,
        "parts": asdict(timing.case),
    }


def main(command_line: Sequence[str] | None = None) -> int:
    args = parse(command_line)
    torch.set_num_threads(1)
    console, facts = make_console(), describe(DEVICES["cpu"])
    print_line(console, headline(facts))

    def again(case: Case, rounds: int) -> Timing:
        return call(compare, case, rounds)

    timings: list[Timing] = []
    try:
        if args.case:  # this process is a fresh one
            timings.append(compare(args.case, MANY))
        else:
            preload("fused_ce", "bench.cliffs.measure")
            with console.status("searching") as status:
                for timing in search(args.seconds, args.seed, again, compare, args.most):
                    timings.append(timing)
                    worst = max(each.ratio for each in timings)
                    status.update(f"{len(timings)} cases, the worst {ratio_text(worst)}")
    except (ArithmeticError, HandedToStock) as reason:
        print_line(console, f"[red]{escape(str(reason))}[/]")
        return 1
    data = {
        "kind": "cliffs",
        "machine": facts,
        "seed": args.seed,
        "cases": [as_data(timing) for timing in timings],
    }
    write_json(args.out / "cliffs.json", data)
    return int(report(console, timings, args.show, args.limit) > 0)
