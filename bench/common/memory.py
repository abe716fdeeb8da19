"""The system's account of this process's memory.

A call is charged with the rise of the high-water mark while it runs. Where no mark can be read the
answer is None: a figure that was not measured is not shown.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path

# The kernel counts resident pages in batches per processor; less than this is not a measurement.
RESOLUTION = 512 * 1024

M_MMAP_THRESHOLD = -3  # <malloc.h>
LARGE = 64 * 1024


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


def available() -> int | None:
    """Bytes that the system can still give out; None where it keeps no such file."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line), None)


def lower_mark() -> None:
    """Brings the mark down to what is resident now, where that is allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def keep_nothing_freed() -> None:
    """Has glibc return every block of some size to the system when it is freed. Otherwise the first
    call's blocks are still resident in the second, which then seems to need less."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)


def rise(call: Callable[[], object]) -> int | None:
    """Bytes by which the call raises the high-water mark."""
    lower_mark()
    mark, resident = read_status("VmHWM"), read_status("VmRSS")
    # A mark left standing above the water would hide the first part of the rise.
    if mark is None or resident is None or mark - resident > RESOLUTION:
        return None
    call()
    return read_status("VmHWM") - mark
