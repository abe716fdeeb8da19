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
    shards = TESTS / "parallel" / "test_shards.py"
    run(package, *folders, shards, "-m", "on_simulator and not slow and not cuda")


# Shards that do not belong together, each in a process of its own: an assertion ends it.
DISAGREEING = """
import os, resource, sys
import torch
from support.shards import evenly, shards_of

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
input, target = torch.randn(6, 10), torch.randint(0, 10, (6,))

def with_second(**changes):
    shards = shards_of(input, target, evenly(10, 3))
    other = shards_of(input, target, evenly(10, 3), **changes.pop("options", {}))[1]
    for name, value in changes.items():
        setattr(other, name, value)
    return [shards[0], other, shards[2]]

bad = target.index_fill(0, torch.tensor([4]), 10)
logits = torch.randn(6, 0)
CASES = {
    "agreeing": lambda: with_second(),
    "a scale in the device's memory": lambda: with_second(options={"logit_scale": 0.5}),
    "a number": lambda: with_second(options={"z_loss": 1e-4}),
    "targets": lambda: with_second(target=target.flip(0)),
    "a gap": lambda: shards_of(input, target, [(0, 4), (5, 10)]),
    "an end": lambda: shards_of(input, target, [(0, 4), (4, 9)]),
    "no class": lambda: shards_of(input, bad, evenly(10, 3)),
    "a refusal": lambda: with_second(input=logits, place=(-1, 0, 10)),
}
for name, make in CASES.items():
    print(f"<{name}>", file=sys.stderr, flush=True)
    child = os.fork()
    if child == 0:
        shards = make()
        packets = torch.cat([shard.packet() for shard in shards])
        print("sent", file=sys.stderr, flush=True)
        shards[0].merge(packets)
        os._exit(0)
    os.waitpid(child, 0)
"""
FROM_RANK_0 = "of a rank differ from those of rank 0"
DISAGREEMENTS = {
    "agreeing": None,
    "a scale in the device's memory": f"the options {FROM_RANK_0}",
    "a number": f"the options {FROM_RANK_0}",
    "targets": f"the targets {FROM_RANK_0}",
    "a gap": "the classes of a rank should begin where those before it end",
    "an end": "the shards should end with the last class",
    "no class": "t >= 0 && t < n_classes",
    "a refusal": "a rank refused its arguments; its own error says why",
}


def test_shards_that_disagree_are_assertions_once_all_packets_are_there(package):
    command = [sys.executable, "-P", "-c", DISAGREEING]
    environment = {**os.environ, "PYTHONPATH": f"{package}:{TESTS}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = dict(re.findall(r"^<(.*?)>\n(.*?)(?=^<|\Z)", done.stderr, re.M | re.S))
    assert said.keys() == DISAGREEMENTS.keys(), done.stderr
    for name, text in DISAGREEMENTS.items():
        assert said[name].startswith("sent\n"), said[name]
        failed = re.findall(r"Assertion `(.*)' failed", said[name])
        assert len(failed) == (text is not None), (name, said[name])
        assert text is None or text in failed[0], (name, failed)


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
