"""The CPU library touches its own memory alone, does nothing undefined, and orders its threads.

A library compiled for AddressSanitizer and UndefinedBehaviorSanitizer answers the calls of the
fuzzer, hostile ones too; a program compiled for ThreadSanitizer shares every kind of call between
threads. That either would notice a fault is seen from faults planted in the sources, none of which
changes a result.
"""

import os
import subprocess
import sys

import pytest
from support.compiled import (
    MEMORY,
    NATIVE,
    ORDER,
    Fault,
    capabilities,
    package,
    program,
    under_sanitizer,
)
from support.processes import ROOT

pytestmark = pytest.mark.slow  # for the builds: a minute and a half of one core

CASES = 1000  # of a kind
FEW = 300  # of one that has one operator and no hostile arguments


def fuzz(package, cases, capability, *options):
    # Without -P the fused_ce of the current folder would come first.
    command = [sys.executable, "-P", "-m", "fuzz", "--cases", str(cases), *options]
    environment = under_sanitizer(package) | {"ATEN_CPU_CAPABILITY": capability}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("capability", capabilities())
@pytest.mark.parametrize(
    ("kind", "cases"),
    [
        ("loss", CASES),
        ("head", CASES),
        ("operator", CASES),
        ("pointwise", FEW),
        ("divergence", FEW),
    ],
)
def test_random_and_hostile_calls_keep_to_their_memory(kind, cases, capability):
    options = "--only", kind, "--seed", str(capabilities().index(capability))
    done = fuzz(package(MEMORY), cases // len(capabilities()), capability, *options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert done.stdout.rstrip().endswith("cases without a fault")


# Compiled without optimisation, they are not left out.
READ = "[[maybe_unused]] const auto beyond = {};"
WRITE = "{0} = std::remove_reference_t<decltype({0})>({0});"
MEMORY_FAULTS = (
    (
        "loss",
        Fault(
            "logit read beyond a row",
            "rows/row_kernel.h",
            "static Extent<A> extent_of(const A* x, Count n) {",
            "static Extent<A> extent_of(const A* x, Count n) {" + READ.format("x[n]"),
            "row_kernels_float_forward",
        ),
        "heap-buffer-overflow",
    ),
    (
        "loss",
        Fault(
            "gradient written beyond a row",
            "rows/row_kernel.h",
            "A* out = grad_direct_ ? grad_block(r, b) : buffer_;",
            "A* out = grad_direct_ ? grad_block(r, b) : buffer_;"
            + WRITE.format("out[grad_direct_ ? n : 0]"),
            "row_kernels_float_forward",
        ),
        "heap-buffer-overflow",
    ),
    (
        "loss",
        Fault(
            "element stored beyond a run",
            "span.h",
            "T* to, int64_t stride) {",
            "T* to, int64_t stride) {" + WRITE.format("to[n * stride]"),
            "row_kernels_double_backward",
        ),
        "buffer-overflow",
    ),
    (
        "loss",
        Fault(
            "target read beyond the last",
            "targets.h",
            "  int64_t counted = 0, bad = 0;",
            "  int64_t counted = 0, bad = 0;" + READ.format("targets[n * stride]"),
            "kernels",
        ),
        "heap-buffer-overflow",
    ),
    (
        "operator",
        Fault(
            "weights of any number taken",
            "checks.cpp",
            "weight.dim() == 1 && weight.numel == problem_.classes,",
            "weight.dim() == 1,",
            "checks",
        ),
        "heap-buffer-overflow",
    ),
    (
        "loss",
        Fault(
            "converted weights freed before their use",
            "checks.cpp",
            "  return {checked_data(Facts(*tensor), name), *dtype_of(dtype), facts.numel};",
            "  void* data = checked_data(Facts(*tensor), name);\n"
            "  const Values values{data, *dtype_of(dtype), facts.numel};\n"
            "  tensor.reset();\n"
            "  return values;",
            "checks",
        ),
        "heap-use-after-free",
    ),
    (
        "operator",
        Fault(
            "indices subtracted",
            "targets.h",
            "    const int64_t counts = index != ignored;",
            "    const int64_t gap = index - ignored, counts = gap != 0;",
            "kernels",
        ),
        "signed integer overflow",
    ),
)


# Of each sanitizer one that takes seconds to compile; the others are noticed in the same way.
OFTEN = ("weights of any number taken", "indices subtracted")


def marks_of(fault):
    return () if fault.name in OFTEN else pytest.mark.rare


@pytest.mark.parametrize(
    ("kind", "fault", "noticed"),
    [
        pytest.param(
            *each, id=each[1].name, marks=() if each[1].name in OFTEN else pytest.mark.rare
        )
        for each in MEMORY_FAULTS
    ],
)
def test_planted_fault_of_memory_is_noticed(kind, fault, noticed):
    seed = "1" if kind == "operator" else "0"  # whose cases come upon the fault
    options = "--only", kind, "--seed", seed
    done = fuzz(package(MEMORY, fault), CASES, capabilities()[0], *options)
    assert done.returncode == 1, done.stdout[-4000:] + done.stderr[-8000:]
    assert noticed in done.stderr
    assert done.stdout.startswith("# the process ended: SIGABRT\n")


def share_calls(fault=None):
    """Runs the calls with one thread and with three."""
    path = program(NATIVE / "any_number_of_threads.cpp", ORDER, fault)
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([path], env=environment, capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot work with this kernel's layout of memory")
    return done


def test_order_of_accesses_is_left_to_no_chance():
    done = share_calls()
    assert done.returncode == 0, done.stderr[-8000:]
    assert done.stdout.endswith(" calls\n")


@pytest.mark.parametrize(
    "fault",
    [
        Fault(
            "threads write to one place",
            "kernels.cpp",
            "for (int64_t t = begin; t < end; t++) scans[t] =",
            "for (int64_t t = begin; t < end; t++) scans[0] = scans[t] =",
            "kernels",
        ),
        pytest.param(
            Fault(
                "threads take one kernel",
                "parts.h",
                "if (lock.owns_lock()) return",
                "return",
                "row_kernels_float_forward",
            ),
            marks=pytest.mark.rare,
        ),
    ],
    ids=lambda fault: fault.name,
)
def test_planted_race_is_noticed(fault):
    assert "WARNING: ThreadSanitizer: data race" in share_calls(fault).stderr
