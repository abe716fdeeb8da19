"""`python -m bench --linear`: the times of heads, then memory over the size of the vocabulary."""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace

from rich.console import Console

from bench.common.console import print_reasons, progress
from bench.common.devices import DEVICES
from bench.common.measure import Effort
from bench.heads import measure, report
from bench.heads.cases import HEADS, QUICK, QUICK_VOCABULARIES, TALL, VOCABULARIES
from bench.heads.record import HeadFigures


def run(
    console: Console, args: Namespace, effort: Effort, note: str
) -> Iterator[list[HeadFigures]]:
    device = DEVICES[args.device]
    heads = QUICK if args.quick else HEADS[device.name]
    tall = QUICK[0] if args.quick else TALL[device.name]
    if args.dtype:
        tall = replace(tall, dtype=args.dtype)
        heads = list(dict.fromkeys(replace(head, dtype=args.dtype) for head in heads))
    vocabularies = QUICK_VOCABULARIES if args.quick else VOCABULARIES
    talls = [replace(tall, classes=classes) for classes in vocabularies]
    with progress(console, measure.notices(heads, talls)) as notice:
        times = measure.measure_times(heads, device, effort, notice)
        console.print(report.time_table(times))
        yield times  # a run that is stopped leaves what it has measured
        peaks = measure.measure_peaks(talls, device, notice)
        console.print(report.memory_table(peaks))
    print_reasons(console, [*times, *peaks])
    report.draw(peaks, note, args.out / "linear_memory.png")
    yield [*times, *peaks]
