"""The most memory one loss, forward and backward, takes beyond its logits.

Run in a process of its own, because the operating system's high-water mark only ever rises and a
training would have raised it already. A small call first, so that library code, thread stacks and
autograd's own tables are in place before the mark is read. Where no mark can be read the answer
is None: a figure that was not measured is not shown.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.training import make_loss, timed_loss

# The kernel counts resident pages in batches per processor; less than this is not a measurement.
RESOLUTION = 512 * 1024
WARM_UP_ROWS = 64


def read_status(key: str) -> int | None:
    """Bytes, from the kernel's account of this process; None on systems that keep no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None


def lower_mark() -> None:
    """Brings the mark down to what is resident now, where that is allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def rise(call: Callable[[], object]) -> int | None:
    """Bytes by which the call raises the high-water mark."""
    lower_mark()
    mark, resident = read_status("VmHWM"), read_status("VmRSS")
    # A mark left standing above the water would hide the first part of the rise.
    if mark is None or resident is None or mark - resident > RESOLUTION:
        return None
    call()
    return read_status("VmHWM") - mark


def measure_here(name: str, rows: int, classes: int) -> int | None:
    loss = make_loss(name)
    few = min(rows, WARM_UP_ROWS)
    timed_loss(loss, torch.randn(few, classes), torch.randint(classes, (few,)))
    logits, target = torch.randn(rows, classes), torch.randint(classes, (rows,))
    return rise(lambda: timed_loss(loss, logits, target))


def measure(name: str, rows: int, classes: int) -> int | None:
    """Bytes, measured in a fresh process."""
    command = [sys.executable, "-m", "bench.peak_memory", name, str(rows), str(classes)]
    root = Path(__file__).resolve().parent.parent
    answer = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    return None if answer.stdout.strip() == "None" else int(answer.stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("rows", type=int)
    parser.add_argument("classes", type=int)
    arguments = parser.parse_args()
    print(measure_here(arguments.name, arguments.rows, arguments.classes))
