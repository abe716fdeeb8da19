"""Guards that nvcc takes every kernel, and that none needs more registers than its launch grants.

A spilled register is memory traffic that the byte counts of the kernels leave out. The bound is the
kernel's own: what `__launch_bounds__` says of its blocks, so many of which must fit.
"""

import json
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from support import products
from support.products import CUDA_SOURCES, kept

KERNELS = products.KERNELS / "cuda"
SOURCES = sorted(KERNELS.rglob("*.cu"))
REGISTERS = 65536  # of a multiprocessor, on every architecture since compute capability 3.7
OFTEN = 90  # the architecture that has clusters and is there
SELDOM = ("on_chip_float16",)  # as on_chip_bfloat16, but for the conversions
GRANULE = 8  # a thread is given multiples of this

pytestmark = [
    pytest.mark.skipif(
        shutil.which("nvcc") is None,
        reason="nvcc, which compiles the CUDA kernels, is not on the PATH",
    ),
    pytest.mark.xdist_group("nvcc"),  # one fixture compiles them all
]


class Usage(NamedTuple):
    registers: int
    spilled: int  # bytes


def usages(report):
    """From what `ptxas -v` prints: for each kernel what it uses."""
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    found = re.findall(pattern, report, re.DOTALL)
    return {name: Usage(int(used), int(out) + int(back)) for name, out, back, used in found}


def bounds(ptx):
    """From the assembly: for each kernel the registers that leave room for its blocks."""
    found = {}
    pattern = r"\.entry (\w+)\(.*?\)\s*((?:\.\w+ [\d, ]+\s*)*)\{"
    for name, directives in re.findall(pattern, ptx, re.DOTALL):
        threads = re.search(r"\.maxntid (\d+)", directives)
        blocks = re.search(r"\.minnctapersm (\d+)", directives)
        resident = int(threads[1] if threads else 1024) * int(blocks[1] if blocks else 1)
        found[name] = min(255, REGISTERS // resident // GRANULE * GRANULE)
    return found


def compile_for(source, architecture):
    """What a source's kernels use, and what they may."""
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    # Often only the device's half of what has kernels; the simulator's g++ reads the other.
    what = "-cubin" if architecture == OFTEN and defines_kernels(source) else "-c"
    command = ["nvcc", "-std=c++20", "-O3", "-Xptxas", "-v", "-gencode", target, what, source]

    def compile(place):
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / "kernels.o"
            done = subprocess.run(
                [*command, "--keep", "--keep-dir", scratch, "-o", output],
                capture_output=True,
                text=True,
                timeout=900,
            )
            assert done.returncode == 0, done.stderr
            (place / "report").write_text(done.stderr)
            (assembly,) = Path(scratch).glob("*.ptx")
            (place / "bounds.json").write_text(json.dumps(bounds(assembly.read_text())))

    name = f"nvcc_{source.stem}_{architecture}"
    place = kept(name, compile, *CUDA_SOURCES, of=command, by="nvcc")
    report = (place / "report").read_text()
    assert "warning" not in report, report
    return usages(report), json.loads((place / "bounds.json").read_text())


def defines_kernels(source):
    included = re.findall(r'#include "(\w+\.cuh)"', source.read_text())
    texts = [source.read_text(), *((source.parent / name).read_text() for name in included)]
    return source.name != "on_chip.cu" and any("__global__" in text for text in texts)


@pytest.fixture(scope="module")
def compiled(request):
    """What nvcc made of the sources that the selected tests ask for, two at a time."""
    selected = [getattr(item, "callspec", None) for item in request.session.items]
    wanted = dict.fromkeys(
        (spec.params["source"], spec.params["architecture"])
        for spec in selected
        if spec and "architecture" in spec.params
    )
    with ThreadPoolExecutor(2) as pool:
        yield {key: pool.submit(compile_for, *key) for key in wanted}
        pool.shutdown(cancel_futures=True)


# The oldest architecture of the default build has no clusters, and the newest is the one after
# Hopper.
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(80, marks=pytest.mark.slow), OFTEN, pytest.param(100, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    "source",
    [
        pytest.param(
            source, id=source.stem, marks=pytest.mark.slow if source.stem in SELDOM else ()
        )
        for source in SOURCES
    ],
)
def test_kernels_keep_to_their_registers(source, architecture, compiled):
    used, allowed = compiled[source, architecture].result()
    assert used.keys() == allowed.keys()
    assert used or not defines_kernels(source)
    for kernel, (registers, spilled) in used.items():
        assert spilled == 0, f"{kernel} spills {spilled} bytes"
        assert registers <= allowed[kernel], f"{kernel} has {registers} registers"


def test_code_without_clusters_ends_rather_than_take_part_of_a_row():
    """Such code is what PTX for an older architecture becomes on a device that has clusters."""
    source = KERNELS / "regimes" / "on_chip_float16.cu"
    command = ["nvcc", "-std=c++20", "-arch=compute_80", "-ptx", source]

    def compile(place):
        subprocess.run([*command, "-o", place / "kernels.ptx"], check=True, timeout=900)

    place = kept("nvcc_without_clusters", compile, *CUDA_SOURCES, of=command, by="nvcc")
    assembly = place / "kernels.ptx"
    kernels = re.findall(r"\.entry (\w+)\((.*?)\n\}\n", assembly.read_text(), re.DOTALL)
    loading = {name for name, body in kernels if "ld.global" in body}
    ending = {name for name, body in kernels if "trap;" in body}
    assert loading and ending and loading.isdisjoint(ending)
    layouts = (source.parent / "on_chip.cuh").read_text()
    layouts = re.findall(r"LayoutAt<(\d)> : RowLayout<\d+, \d+, (\d)>", layouts)
    clusters = {index for index, blocks in layouts if blocks != "1"}
    assert {re.search(r"LayoutAtILi(\d)E", name)[1] for name in ending} == clusters


def test_kernels_know_nothing_of_torch():
    """Only the backend does, so that kernels compile in seconds and run on the simulator."""
    names = ("formula.h", "problem.h", "statistics.h", "statistics_problem.h")
    names += ("pointwise.h", "pointwise_problem.h")
    names += ("divergence.h", "divergence_problem.h", "shard.h", "shard_problem.h")
    shared = {KERNELS.parent / name for name in names}
    sources = [path for path in KERNELS.rglob("*.*") if path.name != "backend.cpp"]
    assert len(sources) > len(SOURCES)
    for source in sources:
        text = source.read_text()
        for name in re.findall(r'#include "(.*)"', text):
            included = (source.parent / name).resolve()
            assert KERNELS in included.parents or included in shared, f"{source} includes {name}"
        assert "#include <torch" not in text, source
