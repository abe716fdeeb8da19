"""The terminal: what is typed there, tables and lines, and a bar for what is being measured and how
long it will take. In a log there are the tables and lines alone."""

from argparse import ArgumentTypeError
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.common.figures import Figures
from bench.common.process import Notice

WIDTH = 100  # where the output is no terminal


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ArgumentTypeError("must be at least 1")
    return number


def make_console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def print_line(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def print_reasons(console: Console, figures: Iterable[Figures]) -> None:
    for found in figures:
        if found.reason:
            print_line(console, f"  {found.subject}: {found.reason}")


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
