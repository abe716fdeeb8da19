"""The benchmark as a program: options in; tables, JSON and charts out.

A table is printed as soon as its case is done, and what has been measured so far is in the JSON.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import torch

from bench.against.measure import Comparison
from bench.against.run import CASES as COMPARED_CASES
from bench.against.run import PROVIDERS as COMPARED
from bench.against.run import run as run_builds
from bench.common.console import make_console, positive, print_line
from bench.common.devices import DEVICES
from bench.common.figures import write_json
from bench.common.machine import busy, commit, describe, headline
from bench.common.measure import Effort
from bench.common.precision import DTYPES
from bench.heads.cases import HEADS
from bench.heads.providers import PROVIDERS as HEAD_PROVIDERS
from bench.heads.record import HeadFigures
from bench.heads.run import run as run_heads
from bench.loss.cases import TABLES, NoSuchCase, select
from bench.loss.providers import PROVIDERS, usual
from bench.loss.record import Record
from bench.loss.run import run as run_cases
from bench.losses.measure import LossesFigures
from bench.losses.providers import PROVIDERS as LOSSES_PROVIDERS
from bench.losses.run import run as run_losses
from bench.ownership.measure import StepFigures
from bench.ownership.providers import PROVIDERS as OWNERSHIP_PROVIDERS
from bench.ownership.run import run as run_ownership
from bench.parallel.measure import ShardedFigures
from bench.parallel.providers import PROVIDERS as PARALLEL_PROVIDERS
from bench.parallel.run import run as run_parallel
from bench.scaling.measure import PROVIDERS as SIZE_PROVIDERS
from bench.scaling.run import run as run_sizes
from bench.statistics.measure import StatisticsFigures
from bench.statistics.providers import PROVIDERS as STATISTICS_PROVIDERS
from bench.statistics.run import run as run_statistics
from bench.training.measure import TrainingFigures
from bench.training.providers import PROVIDERS as TRAINING_PROVIDERS
from bench.training.run import run as run_training

QUICK = Effort(seconds=0, least=2, most=2)
RUNS = {
    "bench": run_cases,
    "linear": run_heads,
    "statistics": run_statistics,
    "losses": run_losses,
    "parallel": run_parallel,
    "ownership": run_ownership,
    "training": run_training,
    "scaling": run_sizes,
    "against": run_builds,
}
# Of the kinds that have providers of their own.
OWN_PROVIDERS = {
    "linear": HEAD_PROVIDERS,
    "statistics": STATISTICS_PROVIDERS,
    "losses": LOSSES_PROVIDERS,
    "parallel": PARALLEL_PROVIDERS,
    "ownership": OWNERSHIP_PROVIDERS,
    "training": TRAINING_PROVIDERS,
}


def parse(command_line: Sequence[str] | None) -> argparse.Namespace:
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
    parser.add_argument("--threads", type=positive, help="default: as many as torch chooses")
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
    parser.add_argument(
        "--statistics",
        action="store_true",
        help="instead of the cases: log-probability and entropy, of logits and of a head",
    )
    parser.add_argument(
        "--losses",
        action="store_true",
        help="instead of the cases: the losses beside the cross entropy, as BCE and log_softmax",
    )
    parser.add_argument(
        "--parallel",
        action="store_true",
        help="instead of the cases: classes sharded over two processes of one thread, with gloo",
    )
    parser.add_argument(
        "--ownership",
        action="store_true",
        help="instead of the cases: steps that hold their logits until after the backward, or not",
    )
    parser.add_argument(
        "--training",
        action="store_true",
        help="instead of the cases: whole steps of training, and the largest batch in 4 GB",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FOLDER",
        help="instead: another checkout's built fused_ce and this one's in turns, the head too",
    )
    args = parser.parse_args(command_line)
    args.kind = next((kind for kind in RUNS if getattr(args, kind, None)), "bench")
    default = COMPARED if args.against else SIZE_PROVIDERS if args.scaling else usual(args.device)
    # In the table's order, whatever the order asked for, and nobody twice.
    args.providers = [name for name in PROVIDERS if name in (args.providers or default)]
    missing = DEVICES[args.device].missing()
    if missing:
        parser.error(missing)
    if args.scaling and args.cases:
        parser.error("--scaling has sizes of its own; leave --cases out")
    others = args.cases or args.providers != list(default) or args.scaling
    for kind in OWN_PROVIDERS:
        if getattr(args, kind) and (others or args.kind != kind):
            parser.error(
                f"--{kind} has sizes and providers of its own; leave the others' options out"
            )
    if args.training and (args.dtype or args.device != "cpu"):
        parser.error("--training is float32 on the CPU; leave --dtype and --device out")
    table = TABLES[args.device]
    if args.against:
        if args.scaling or args.kind in OWN_PROVIDERS:
            parser.error("--against measures heads with its cases; name them in --cases")
        args.against = args.against.resolve()
        if not (args.against / "fused_ce" / "_C.so").exists():
            parser.error(f"--against expects a built fused_ce in {args.against}; build it there")
        table = (*table, *HEADS[args.device])
        args.cases = args.cases or COMPARED_CASES[args.device]
    try:
        args.cases = select(args.cases, args.dtype, table)
    except NoSuchCase as error:
        parser.error(str(error))
    return args


def main(command_line: Sequence[str] | None = None) -> int:
    args = parse(command_line)
    if args.threads:
        torch.set_num_threads(args.threads)
    console, out = make_console(), args.out
    effort = QUICK if args.quick else Effort(args.seconds)
    facts = describe(DEVICES[args.device])
    note = headline(facts)
    print_line(console, note)
    if busy(facts):
        print_line(console, f"[yellow]{busy(facts)}[/]")

    if args.against:
        facts["against"] = commit(args.against)
    start, records = perf_counter(), []

    def write(
        records: Sequence[
            Record
            | HeadFigures
            | StatisticsFigures
            | LossesFigures
            | ShardedFigures
            | StepFigures
            | TrainingFigures
            | Comparison
        ],
    ) -> None:
        data = {
            "kind": args.kind,
            "machine": facts,
            "effort": asdict(effort),
            "providers": list(OWN_PROVIDERS.get(args.kind, args.providers)),
            "seconds": round(perf_counter() - start, 1),
            "cases": [record.as_data() for record in records],
        }
        write_json(out / f"{args.kind}.json", data)

    for records in RUNS[args.kind](console, args, effort, note):
        write(records)
    write(records)
    console.print(f"{perf_counter() - start:.0f} s; JSON and charts are in {out}", highlight=False)
    return 0
