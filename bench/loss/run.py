"""`python -m bench`: the cases one by one, then all ratios and the charts."""

from argparse import Namespace
from collections.abc import Iterator
from time import perf_counter

from rich.console import Console

from bench.common import process
from bench.common.console import print_line, print_reasons, progress
from bench.common.devices import DEVICES
from bench.common.measure import Effort
from bench.loss.charts import draw_memory, draw_speed
from bench.loss.measure import measure, measure_peaks, notices
from bench.loss.record import Record
from bench.loss.tables import case_table, ratio_table

COMPILER = ("torch._dynamo", "torch._inductor.compile_fx")  # seconds, if every process imports them


def run(console: Console, args: Namespace, effort: Effort, note: str) -> Iterator[list[Record]]:
    process.preload("fused_ce", "bench.loss.measure", *COMPILER * ("compile" in args.providers))
    device, names = DEVICES[args.device], args.providers
    records, start = [], perf_counter()
    elsewhere = 0 if device.counts_memory else len(names)
    total = sum(notices(case, names) + elsewhere for case in args.cases)
    with progress(console, total) as notice:
        for done, case in enumerate(args.cases):
            if args.budget is not None and perf_counter() - start > args.budget:
                left = " ".join(case.name for case in args.cases[done:])
                print_line(console, f"[yellow]no time left for {left}[/]")
                break
            record = measure(case, names, device, effort, notice)
            if elsewhere:
                measure_peaks(record, names, device, notice)
            console.print(case_table(record))
            print_reasons(console, record.results)
            records.append(record)
            yield records
    console.print(ratio_table(records, names))
    draw_speed(records, note, args.out / "speed.png")
    draw_memory(records, note, args.out / "memory.png")
