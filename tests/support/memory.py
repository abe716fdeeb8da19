"""The account that Linux keeps of a process's memory, and what a measurement of it must allow.

Each measurement is a process of its own: it makes a first small call, so that threads and code are
in memory, then resets the peak of its resident memory and asks by how much a call raised it. To
import torch takes longer than that, so one process imports it and is forked for each measurement.
"""

import os
import subprocess
import sys
import traceback
from pathlib import Path

import torch

from support.processes import environment

MEGABYTE = 2**20
ROWS = 800
# 100 MB of logits, so that one more copy of them, of a part of them, or of one number per class
# and thread cannot be mistaken for anything else.
LOGITS = 100 * MEGABYTE
# What the process takes besides: stacks and heaps of the threads that first do something, and the
# kernel's own count of pages, which is exact only to a batch for each core.
SLACK = MEGABYTE
PER_ROW = 16


def status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def reset_peak():
    """Sets the peak to what is resident now; where that is not allowed, it is the peak so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return status("VmHWM")
    return status("VmRSS")


class Measurements:
    """What `measure` of a test file finds; that file, run as a program, calls `serve`."""

    def __init__(self, file):
        pipe = subprocess.PIPE
        self.program = subprocess.Popen(
            [sys.executable, "-W", "ignore", file],
            stdin=pipe,
            stdout=pipe,
            env=environment(),
            text=True,
        )

    def of(self, call):
        print(call, file=self.program.stdin, flush=True)
        answer = self.program.stdout.readline()
        assert answer.strip(), f"{call} could not be measured"
        return list(map(int, answer.split()))

    def close(self):
        self.program.communicate()


def serve(measure):
    for call in map(str.strip, sys.stdin):
        child = os.fork()
        if not child:
            try:
                torch.set_num_threads(2)  # what a thread takes of its own must be seen
                print(*measure(call), flush=True)
            except BaseException:
                traceback.print_exc()
                print(flush=True)
            os._exit(0)
        os.waitpid(child, 0)
