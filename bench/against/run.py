"""`python -m bench --against FOLDER`: a table for each case, of the build there and of this one."""

from argparse import Namespace
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from bench.against.measure import NOTICES, Comparison, compare
from bench.common.console import print_line, progress
from bench.common.devices import DEVICES
from bench.common.machine import ROOT
from bench.common.measure import Effort
from bench.common.text import DASH, milliseconds_text, new_table

PROVIDERS = ("fused", "recompute", "inplace")
# Where a change of a kernel or of the call shows: rows long and short, half and strided, nothing to
# compute, and a head.
CASES = {
    "cpu": (
        *("1024x32000", "1024x32000-bf16", "65536x10", "8x19x512x512", "8x10"),
        "2048x768-32000-fp32",
    ),
    "cuda": ("*",),
}


def case_table(pairs: Sequence[Comparison]) -> Table:
    numbers = ("old ms", "new ms", "new / old", "middle half")
    table = new_table(pairs[0].case, ("pass", "provider"), numbers)
    for pair in pairs:
        half = pair.middle_half
        table.add_row(
            pair.new.which,
            pair.new.provider,
            milliseconds_text(pair.old.median),
            milliseconds_text(pair.new.median),
            DASH if pair.ratio is None else f"{pair.ratio:.3f}",
            DASH if half is None else "{:.3f} to {:.3f}".format(*half),
        )
    return table


def run(console: Console, args: Namespace, effort: Effort, note: str) -> Iterator[list[Comparison]]:
    device, done = DEVICES[args.device], []
    with progress(console, NOTICES * len(args.cases)) as notice:
        for case in args.cases:
            pairs = compare(case, args.providers, (args.against, ROOT), device, effort, notice)
            console.print(case_table(pairs))
            for reason in (reason for pair in pairs for reason in pair.reasons):
                print_line(console, f"  {reason}")
            done += pairs
            yield done
