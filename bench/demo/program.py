"""The demo as a program: options in; both trainings as they go, a table and a picture out.

Each model is trained once per loss from the same seed. The program exits with 1 if the curves part,
so that it serves as a check as well as a show.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console

from bench.common.console import positive
from bench.demo.digits import digits
from bench.demo.display import Outcome, Progression, peak_text, summary, verdict
from bench.demo.language_model import language_model
from bench.demo.memory import measure_peak
from bench.demo.picture import draw
from bench.demo.training import LOSS_NAMES, Task, train

TASKS = {"language-model": language_model, "digits": digits}
PICTURE = "demo.png"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.demo", description="train real models with the stock loss and with fused_ce"
    )
    parser.add_argument("--loss", choices=[*LOSS_NAMES, "both"], default="both")
    parser.add_argument("--task", choices=[*TASKS, "all"], default="all")
    parser.add_argument(
        "--linear",
        action="store_true",
        help="the language model alone, its head and loss as fused_ce.linear_cross_entropy",
    )
    parser.add_argument("--steps", type=positive, help="of each training; default: as the task has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/demo"),
        help=f"folder for {PICTURE}; default: %(default)s",
    )
    options = parser.parse_args(arguments)
    if options.linear and options.task == "digits":
        parser.error("--linear is about the language model; leave --task digits out")
    return options


def tasks(options: argparse.Namespace) -> list[Callable[[], Task]]:
    if options.linear:
        return [partial(language_model, linear=True)]
    return list(TASKS.values()) if options.task == "all" else [TASKS[options.task]]


def run(console: Console, make_task: Callable[[], Task], options: argparse.Namespace) -> Outcome:
    task = make_task()
    losses = LOSS_NAMES if options.loss == "both" else (options.loss,)
    steps = options.steps or task.steps
    rows, classes = task.logits_shape
    heading = f"[bold]{task.name}[/]: {task.about}; logits {rows} x {classes}"
    console.print(heading, highlight=False, soft_wrap=True)
    with console.status("measuring peak memory"):
        size = (rows, classes, task.features)
        memory = {loss: measure_peak(loss, *size) for loss in losses}
    sizes = ", ".join(f"{loss} {peak_text(size)}" for loss, size in memory.items())
    console.print(f"  peak memory of one loss: {sizes}", highlight=False)
    with Progression(console, task, memory, steps) as progression:
        for runs in train(task, losses, steps, options.seed):
            progression.update(runs)
    console.print()
    return Outcome(task, runs, memory)


def succeeded(outcome: Outcome) -> bool:
    if outcome.compared:
        return outcome.parting is None
    return all(math.isfinite(loss) for run in outcome.runs.values() for loss in run.losses)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = Console()
    outcomes = [run(console, make_task, options) for make_task in tasks(options)]

    console.print(summary(outcomes))
    for outcome in outcomes:
        if outcome.compared:
            console.print(verdict(outcome), highlight=False, soft_wrap=True)
    draw(outcomes, options.out / PICTURE)
    console.print(f"picture: {options.out / PICTURE}", highlight=False, soft_wrap=True)
    return 0 if all(map(succeeded, outcomes)) else 1
