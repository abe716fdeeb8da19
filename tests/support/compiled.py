"""The CPU library compiled for the guards: under a sanitizer, and with a fault planted in it.

Each build compiles a copy of the sources for the widest vectors that this machine has, and on
x86-64 not for the baseline, whose source is that of AVX2: it takes a third of the time. A fault
needs its one file compiled anew; the other objects are those of the build without it.
"""

import functools
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from support.processes import TESTS
from support.products import COMPILER, KERNELS, ROOT, kept

NATIVE = TESTS / "cpu" / "native"
FLAGS = (
    "-std=c++20 -g1 -w -fPIC -fopenmp-simd -fno-math-errno -fno-trapping-math -fno-signed-zeros "
    "-ffp-contract=fast -DTORCH_TARGET_VERSION=0x020a000000000000"
).split()
USE_TORCH = ("ops", "checks", "backend")
SOURCES = (KERNELS / "ops.cpp", KERNELS / "checks.cpp", KERNELS / "cpu", *KERNELS.glob("*.h"))

AVX512 = (
    "  if (level() == Level::kAvx512) return f(std::integral_constant<Level, Level::kAvx512>{});"
)
BASELINE = "  f(std::integral_constant<Level, Level::kBaseline>{});"


class Build(NamedTuple):
    name: str
    flags: tuple[str, ...]
    units: tuple[str, ...] | None = None  # all where it is None


class Fault(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    unit: str  # that is compiled from it


KERNEL_UNITS = (
    *("kernels", "scale", "logits", "row_tiling"),
    *(f"row_kernels_{a}_{way}" for a in ("float", "double") for way in ("forward", "backward")),
)
# Memory out of bounds, freed or misaligned, and arithmetic that C++ does not define.
MEMORY = Build(
    "memory",
    ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-D_GLIBCXX_ASSERTIONS"),
)
# Accesses of several threads that nothing orders.
ORDER = Build("order", ("-fsanitize=thread",), KERNEL_UNITS)


def cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split())
    return set()


@functools.cache
def capabilities() -> tuple[str, ...]:
    """The values of ATEN_CPU_CAPABILITY that the builds are made for."""
    if platform.machine() != "x86_64" or not {"avx2", "fma", "bmi2"} <= cpu_flags():
        return ("default",)
    wide = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"} <= cpu_flags()
    return ("avx2", "avx512") if wide else ("avx2",)


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} is not to be found in {path.name} once: adapt the test"
    path.write_text(text.replace(old, new))


def _compile(place: Path, build: Build, fault: Fault | None) -> None:
    shutil.copytree(KERNELS, place / "csrc")
    simd = place / "csrc" / "cpu" / "vector" / "simd.h"
    if "avx512" not in capabilities():
        _replace(simd, AVX512, "")
    if "default" not in capabilities():
        _replace(simd, BASELINE, "  __builtin_trap();")
    if fault:
        (source,) = (place / "csrc").rglob(fault.file)
        _replace(source, fault.old, fault.new)
    wanted = [fault.unit] if fault else build.units
    units = [place / "csrc/ops.cpp", place / "csrc/checks.cpp"]
    units += sorted((place / "csrc" / "cpu").rglob("*.cpp"))
    assert len({unit.stem for unit in units}) == len(units), "an object is named by its file alone"
    units = [unit for unit in units if wanted is None or unit.stem in wanted]
    includes = [f"-isystem{path}" for path in include_paths()]
    level = "-O0" if fault else "-O1"  # of one file the time to compile counts for more

    def compile_one(unit):
        own = includes if unit.stem in USE_TORCH else []
        target = ["-c", unit, "-o", place / f"{unit.stem}.o"]
        subprocess.run([COMPILER, *FLAGS, level, *build.flags, *own, *target], check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, units))


def _name(*parts: str) -> str:
    return re.sub(r"\W+", "_", "_".join(parts))


def _objects(build: Build, fault: Fault | None) -> list[Path]:
    """Those of the fault first: of a function in a header the linker takes the first copy."""
    of = (FLAGS, build, capabilities())
    name = _name("cpu", build.name)
    place = kept(name, lambda place: _compile(place, build, None), *SOURCES, of=of)
    objects = sorted(place.glob("*.o"))
    if not fault:
        return objects
    own = kept(
        _name(name, fault.name),
        lambda place: _compile(place, build, fault),
        *SOURCES,
        of=(of, fault),
    )
    return [own / f"{fault.unit}.o", *(each for each in objects if each.stem != fault.unit)]


def program(source: Path, build: Build, fault: Fault | None = None) -> Path:
    """A program of `NATIVE` with the kernels; it is compiled from the copy, as they are."""
    objects = [each for each in _objects(build, fault) if each.stem not in USE_TORCH]

    def make(place):
        folder = place / "tests" / "cpu"
        shutil.copytree(NATIVE, folder / "native")
        (place / "csrc").symlink_to(objects[-1].parent / "csrc")
        here = folder / "native" / source.name
        command = [COMPILER, *FLAGS, "-O1", *build.flags, here, *objects, "-pthread"]
        subprocess.run([*command, "-o", place / source.stem], check=True)

    name = _name(source.stem, build.name, *([fault.name] if fault else []))
    made = kept(name, make, *SOURCES, NATIVE, of=(FLAGS, build, fault, capabilities()))
    return made / source.stem


def package(build: Build, fault: Fault | None = None) -> Path:
    """The folder of a fused_ce with this library."""

    def make(place):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / "fused_ce", place / "fused_ce", ignore=ignored)
        libraries = Path(torch.__file__).parent / "lib"
        link = [f"-L{libraries}", "-lc10", "-ltorch", "-ltorch_cpu"]
        library = ["-shared", *build.flags, "-o", place / "fused_ce/_C.so"]
        subprocess.run([COMPILER, *library, *_objects(build, fault), *link], check=True)

    name = _name("package", build.name, *([fault.name] if fault else []))
    sources = *SOURCES, ROOT / "fused_ce"
    return kept(name, make, *sources, of=(FLAGS, build, fault, capabilities()))


def under_sanitizer(package: Path) -> dict[str, str]:
    """The environment of a Python that imports it. torch's memory is watched as well, since the
    sanitizer's allocator takes the place of the C library's."""
    found = [
        subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True)
        for name in ("libasan.so", "libstdc++.so.6")  # the second, for it catches exceptions too
    ]
    runtimes = [each.stdout.strip() for each in found]
    if not all(map(os.path.isabs, runtimes)):
        pytest.skip(f"{COMPILER} has no library of AddressSanitizer to load before Python")
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "PYTHONPATH": os.pathsep.join(map(str, (package, TESTS))),
        # What Python and torch keep till the end are no leaks.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
        "OMP_NUM_THREADS": "2",
    }
