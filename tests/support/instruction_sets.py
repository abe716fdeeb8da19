"""The kernels' instruction sets, of which a process has one from its first call on.

A test of all of them lies in a file that is also a program: run as one, it compares with float64
on the set that it was given, and prints how explain() calls that.
"""

import platform
import sys

import pytest

from fused_ce import ops
from support.compiled import cpu_flags
from support.processes import environment, finish

# value of ATEN_CPU_CAPABILITY: (how explain() calls the set, what the CPU must have)
CAPABILITIES = {
    "default": ("baseline", set()),
    "avx2": ("avx2", {"avx2", "fma"}),
    "avx512": ("avx512", {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"}),
}


def every_instruction_set(test):
    """For a test that calls :func:`has_its_accuracy`."""
    test = pytest.mark.parametrize("capability", CAPABILITIES)(test)
    return pytest.mark.skipif(
        platform.machine() != "x86_64" or sys.platform != "linux",
        reason="elsewhere there is one instruction set",
    )(test)


def has_its_accuracy(capability, file, check):
    """Runs the file as a program where `check()` in this process would be of another set."""
    name, needed = CAPABILITIES[capability]
    if missing := needed - cpu_flags():
        pytest.skip(f"this CPU has no {', '.join(sorted(missing))}")
    if name == ops.instruction_set():
        check()
        return
    done = finish(file, env=environment(ATEN_CPU_CAPABILITY=capability))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == name
