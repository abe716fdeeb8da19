"""Guards the whole way from `cross_entropy` to the CUDA kernels, on machines without a GPU.

A package is put together whose library runs the kernels on the simulator, behind the checks and the
operators that CUDA has, on tensors of the CPU; then the tests of every device are run with it.
What a GPU alone can show is in test_gpu.py.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import simulated
from support.processes import ROOT, TESTS
from support.products import kept
from torch.utils.cpp_extension import include_paths

SOURCES = (
    ROOT / "csrc/ops.cpp",
    ROOT / "csrc/checks.cpp",
    TESTS / "cuda/simulator/backend/backend.cpp",
)


@pytest.fixture(scope="session")
def package():
    """The folder of a fused_ce that computes on the simulator."""
    kernels = simulated.built("simulator")
    sources = simulated.KERNELS, *simulated.SIMULATOR_SOURCES, ROOT / "fused_ce"
    return kept("package", lambda place: build_package(place, kernels), *sources)


def build_package(place, kernels):
    # Less another program's main.
    objects = [unit for unit in kernels.glob("*.o") if not unit.name.startswith(simulated.PROGRAM)]
    flags = ["-std=c++20", "-O1", "-fPIC", "-w", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [f"-I{path}" for path in (simulated.SIMULATOR, *include_paths())]
    for source in SOURCES:
        objects.append(place / f"{source.name}.o")
        command = [simulated.COMPILER, *flags, "-c", source, "-o", objects[-1]]
        subprocess.run(command, check=True)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "fused_ce", place / "fused_ce", ignore=ignored)
    libraries = Path(torch.__file__).parent / "lib"
    link = [f"-L{libraries}", "-lc10", "-ltorch", "-ltorch_cpu"]
    library = ["-shared", "-o", place / "fused_ce/_C.so", *objects]
    subprocess.run([simulated.COMPILER, *library, *link], check=True)


def run(package, *arguments):
    # Without -P the fused_ce of the current folder would come first.
    command = [sys.executable, "-P", "-m", "pytest", "-p", "support.on_simulator"]
    command += ["-p", "no:cacheprovider", "--tb=short", "--maxfail=20"]
    environment = {**os.environ, "PYTHONPATH": f"{package}:{TESTS}"}
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    for place in filter(Path.exists, map(Path, arguments)):  # of each, some
        name = re.escape(str(place.relative_to(ROOT)))
        assert re.search(rf"^{name}\S* .*[.]", done.stdout, re.M), done.stdout


def test_package_on_the_simulator_agrees_with_stock(package):
    """And the other losses and the row statistics with what they are composed of."""
    folders = (TESTS / name for name in ("loss", "statistics", "pointwise", "divergence"))
    run(package, *folders, "-m", "on_simulator and not slow and not cuda")


@pytest.mark.slow
@pytest.mark.parametrize(
    "file",
    [
        *("loss/test_parity.py", "loss/test_strides.py", "loss/test_edges.py"),
        *("loss/test_modes.py", "loss/test_operators.py", "autograd/test_gradients.py"),
    ],
)
def test_whole_suite_agrees_on_the_simulator(package, file):
    run(package, TESTS / file, "-m", "not not_on_simulator and not cuda")
