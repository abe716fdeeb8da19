"""What the demo prints: a live table with a progress bar, and the summary at the end.

The live part needs a terminal. Elsewhere, in a log say, it is left out and the same facts come as
plain lines, ten for a training, which a terminal shows too: they are what stays to be read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bench.common.memory import RESOLUTION
from bench.common.text import memory_text, milliseconds_text, new_table, ratio_text
from bench.demo.agreement import TOLERANCE, Parting, differences, first_parting
from bench.demo.training import Run, Task

LINES = 10


@dataclass
class Outcome:
    """One task, trained: everything the summary and the picture need."""

    task: Task
    runs: Mapping[str, Run]
    memory: Mapping[str, int | None]

    @property
    def compared(self) -> bool:
        return len(self.runs) == 2

    @property
    def differences(self) -> list[float]:
        return differences(self.runs["stock"].losses, self.runs["fused"].losses)

    @property
    def parting(self) -> Parting | None:
        return first_parting(self.runs["stock"].losses, self.runs["fused"].losses)


peak_text = partial(memory_text, missing="not measured")


def gain_text(stock: float | None, fused: float | None, floor: float = 0.0) -> str:
    """Empty where either side is missing or too small for a ratio to mean anything."""
    if stock is None or fused is None or min(stock, fused) <= floor:
        return ""
    return f"{ratio_text(stock / fused)}x"


class Progression:
    """Shows one training as it goes."""

    def __init__(self, console: Console, task: Task, memory: Mapping[str, int | None], steps: int):
        self.console, self.task, self.memory, self.steps = console, task, memory, steps
        self.progress = Progress(
            TextColumn(task.name),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps, left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.bar = self.progress.add_task("", total=steps)
        self.live = Live(console=console, refresh_per_second=8) if console.is_terminal else None
        self.largest = 0.0

    def __enter__(self) -> "Progression":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.live.stop()

    def update(self, runs: Mapping[str, Run]) -> None:
        step = len(next(iter(runs.values())).losses)
        if len(runs) == 2:
            latest = differences(runs["stock"].losses[-1:], runs["fused"].losses[-1:])
            self.largest = max(self.largest, *latest)
        if self.live:
            self.progress.update(self.bar, completed=step)
            self.live.update(Group(self.table(runs), self.progress))
        if step == 1 or step * LINES // self.steps > (step - 1) * LINES // self.steps:
            self.console.print(self.line(step, runs), highlight=False, soft_wrap=True)

    def line(self, step: int, runs: Mapping[str, Run]) -> str:
        width = len(str(self.steps))
        losses = "  ".join(f"{name} {run.losses[-1]:.5f}" for name, run in runs.items())
        times = " | ".join(milliseconds_text(run.milliseconds[-1]) for run in runs.values())
        apart = f"  largest difference {self.largest:.1e}" if len(runs) == 2 else ""
        return f"  step {step:{width}}  {losses}{apart}  {times} ms"

    def table(self, runs: Mapping[str, Run]) -> Table:
        table = Table(box=None, pad_edge=False)
        table.add_column(self.task.name, style="dim")
        for heading in ("loss", "ms, this step", "ms, median", "peak memory"):
            table.add_column(heading, justify="right")
        for name, run in runs.items():
            table.add_row(
                name,
                f"{run.losses[-1]:.6f}",
                milliseconds_text(run.milliseconds[-1]),
                milliseconds_text(median(run.milliseconds)),
                peak_text(self.memory[name]),
            )
        if len(runs) == 2:
            table.add_row("difference", f"{self.largest:.1e}", style="bold")
        return table


def summary(outcomes: Sequence[Outcome]) -> Table:
    numbers = ("first", "final", "difference", "ms/step", "peak memory")
    table = new_table("", ("task", "loss"), numbers)
    for outcome in outcomes:
        names = list(outcome.runs)
        for name, run in outcome.runs.items():
            table.add_row(
                outcome.task.name if name == names[0] else "",
                name,
                f"{run.losses[0]:.4f}",
                f"{run.losses[-1]:.4f}",
                "",
                milliseconds_text(median(run.milliseconds)),
                peak_text(outcome.memory[name]),
                end_section=name == names[-1] and not outcome.compared,
            )
        if outcome.compared:
            times = [median(outcome.runs[name].milliseconds) for name in ("stock", "fused")]
            table.add_row(
                "",
                "[bold]ratio",
                "",
                "",
                f"[bold]{max(outcome.differences):.1e}",
                f"[bold]{gain_text(*times)}",
                f"[bold]{gain_text(outcome.memory['stock'], outcome.memory['fused'], RESOLUTION)}",
                end_section=True,
            )
    return table


def verdict(outcome: Outcome) -> str:
    name, parting = outcome.task.name, outcome.parting
    if parting is None:
        return (
            f"[green]{name}: the curves agree[/], largest difference "
            f"{max(outcome.differences):.1e}, allowed {TOLERANCE:.0e}"
        )
    return (
        f"[red]{name}: the curves part at step {parting.step}[/], stock {parting.stock:.7g}, "
        f"fused {parting.fused:.7g}, difference {parting.difference:.1e}, "
        f"allowed {TOLERANCE:.0e}"
    )
