"""The account that Linux keeps of a process's memory, and what a measurement of it must allow.

Each measurement is a process of its own: it makes a first small call, so that threads and code are
in memory, then resets the peak of its resident memory and asks by how much a call raised it. To
import torch takes longer than that, so one process imports it and is forked for each measurement.
"""

import atexit
import functools
import importlib.util
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch._dynamo  # noqa: F401  which a backward imports: once here, or each child would

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
    """What `measure` of a test file finds, in bytes. One program measures for all of them: their
    tests are one group of xdist, `ONE_PROGRAM`."""

    def __init__(self, file):
        self.file = file

    def of(self, call):
        program = _program()
        print(json.dumps((self.file, call)), file=program.stdin, flush=True)
        answer = program.stdout.readline()
        assert answer.strip(), f"{call} could not be measured"
        return list(map(int, answer.split()))


ONE_PROGRAM = pytest.mark.xdist_group("memory")


@functools.cache
def _program():
    """This file, which imports torch."""
    pipe = subprocess.PIPE
    program = subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__],
        stdin=pipe,
        stdout=pipe,
        env=environment(),
        text=True,
    )
    atexit.register(program.communicate)
    return program


@functools.cache
def _measure_of(file):
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.measure


def serve():
    for file, call in map(json.loads, sys.stdin):
        measure = _measure_of(file)
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


if __name__ == "__main__":
    serve()
