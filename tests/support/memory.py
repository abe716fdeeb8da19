"""The account that Linux keeps of a process's memory, and what a measurement of it must allow.

A measurement is a process of its own: it makes a first small call, so that threads and code are in
memory, then resets the peak of its resident memory and asks by how much a call raised it.
"""

from pathlib import Path

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
