"""Guards the simulator: a kernel with a fault in it must fail there, for each kind of fault.

Each fault is made in a copy of the sources, which is compiled and run like the real ones. The same
problems run on the unchanged kernels, in other tests and here under the sanitizers: one of them
finds accesses that nothing orders, which the simulator's own order of threads may hide.
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support import simulated
from support.kernel_cases import Case, check_backward, check_forward, forward, grad_like, make
from support.products import CUDA_SOURCES, kept
from support.simulated import Kernels, SimulatorError
from test_kernel_edges import REGIMES


class Fault(NamedTuple):
    file: str
    old: str
    new: str
    unit: str  # that is compiled from it
    case: Case
    noticed: str | None = None  # in what is said of it
    backward: bool = False


BLOCK, CLUSTER, TILE = REGIMES["block"], REGIMES["cluster"], REGIMES["tile"]

FAULTS = {
    "barrier missing before a block's sums are read": Fault(
        "on_chip.cuh",
        "if (lane == 0) shared.parts[warp] = sums;\n    __syncthreads();",
        "if (lane == 0) shared.parts[warp] = sums;",
        "on_chip_bfloat16",
        BLOCK,
    ),
    "barrier missing before a cluster's sums are read": Fault(
        "on_chip.cuh",
        "Peer::arrive();\n    Peer::await();",
        "Peer::arrive();",
        "on_chip_float32",
        CLUSTER,
    ),
    "one class too few of a cluster's share": Fault(
        "on_chip.cuh",
        "(row.packs + Layout::kCluster - 1) / Layout::kCluster",
        "row.packs / Layout::kCluster",
        "on_chip_float32",
        Case(17005, rows=(2,)),
    ),
    "last pack taken from beyond the row": Fault(
        "streaming_forward.cu",
        "packs[i] = pack < row.packs ?",
        "packs[i] = pack <= row.packs ?",
        "streaming_forward",
        Case(4 * (4096 + 1500), rows=(3,), clusters=False),
        "outside of a buffer",
    ),
    "single element off by one": Fault(
        "vector_row.cuh",
        "+ thread - kPack;",
        "+ thread - kPack + 1;",
        "elementwise_backward",
        Case(1001),
        backward=True,
    ),
    "target's logit read when it may be overwritten": Fault(
        "on_chip.cuh",
        "loss = unweighted_loss(sums, target_logit, weight, k);",
        "loss = unweighted_loss(sums, widen(x[target.index]), weight, k);",
        "on_chip_bfloat16",
        BLOCK,
    ),
    "target's neighbour taken for it": Fault(
        "vector_row.cuh",
        "if (j == distance) values[j]",
        "if (j == distance + 1) values[j]",
        "on_chip_bfloat16",
        BLOCK,
    ),
    "barrier missing after the copy of a tile": Fault(
        "tile_rows_forward.cu",
        "k.spreads();\n  __syncthreads();",
        "k.spreads();",
        "tile_rows_forward",
        TILE,
    ),
    "barrier that some threads do not reach": Fault(
        "tile_rows_forward.cu",
        "k.spreads();\n  __syncthreads();",
        "k.spreads();\n  if (tile.has_row()) __syncthreads();",
        "tile_rows_forward",
        TILE,
        "deadlock",
    ),
    "shuffle that some lanes do not reach": Fault(
        "tile_rows_forward.cu",
        "sums.max = max_lanes<kLanes>(sums.max);",
        "if (tile.has_row()) sums.max = max_lanes<kLanes>(sums.max);",
        "tile_rows_forward",
        Case(10, rows=(133,)),
    ),
    "classes of a rotated row counted wrong": Fault(
        "tile_rows.cuh",
        "start_ + i < rounds_ ?",
        "start_ + i <= rounds_ ?",
        "tile_rows_forward",
        TILE,
    ),
    "class too many": Fault(
        "strided_forward.cu",
        "if (c < p.classes) gradient.store",
        "if (c <= p.classes) gradient.store",
        "strided_forward",
        REGIMES["kept"],
    ),
    "ticket drawn too early": Fault(
        "block_sum.cuh",
        "atomicAdd(ticket, 1u) == count - 1",
        "atomicAdd(ticket, 1u) == count - 2",
        "general_forward",
        REGIMES["two reads by a block"],
    ),
    "ignored rows counted": Fault(
        "totals.cu",
        "if (!target.is_counted) continue;",
        "if (!target.is_counted) rows += 1;\n      if (!target.is_counted) continue;",
        "totals",
        TILE,
    ),
    "sums that another warp is still reading": Fault(
        "row_threads.cuh",
        "__syncthreads();  // all are through with the row before",
        "",
        "general_forward",
        Case(1030, rows=(60,), dtype=torch.float64),
    ),
    "gradient written beyond its row": Fault(
        "general.cuh",
        "grad[c * p.grad.class_stride] = narrow<T>(value);",
        "grad[(c + 1) * p.grad.class_stride] = narrow<T>(value);",
        "general_forward",
        REGIMES["two reads"],
    ),
    "pack stored where no pack can be": Fault(
        "on_chip.cuh",
        ".store(grad + first);",
        ".store(grad + first + 1);",
        "on_chip_bfloat16",
        BLOCK,
        "not aligned",
    ),
}


def run(kernels, fault_or_case, backward):
    if backward:
        check_backward(kernels, fault_or_case, in_place=True)
    else:
        check_forward(kernels, fault_or_case, "in place")
        check_forward(kernels, fault_or_case, "gradient")


def with_fault(kernels, fault, name, *flags):
    """The same kernels, but for the fault."""

    def build(place):
        shutil.copytree(simulated.KERNELS, place / "csrc")
        (source,) = (place / "csrc" / "cuda").rglob(fault.file)
        text = source.read_text()
        assert text.count(fault.old) >= 1, "the fault's place is gone: find it another"
        source.write_text(text.replace(fault.old, fault.new))
        simulated.build(
            place,
            *flags,
            sources=place / "csrc",
            base=kernels.directory,
            only=[fault.unit],
        )

    name = re.sub(r"\W+", "_", name)
    made_from = (fault.file, fault.old, fault.new, fault.unit, flags)
    sources = *CUDA_SOURCES, *simulated.SIMULATOR_SOURCES
    return Kernels(kept(name, build, *sources, of=made_from))


# Often, one fault of each kind: in the order of threads, at the end of memory, in what waits for
# what, in the alignment. A wrong number of any kind is noticed by the same comparison.
SELDOM = (
    "one class too few of a cluster's share",
    "target's neighbour taken for it",
    "barrier missing after the copy of a tile",
    "classes of a rotated row counted wrong",
    "class too many",
    "ignored rows counted",
    "sums that another warp is still reading",
    # As "row overwritten while lanes of its warp read it".
    "tile overwritten while its target is read",
    "strided row overwritten while lanes of its warp read it",
    "losses of other blocks read by lanes that drew no ticket",
)


def each(faults):
    return pytest.mark.parametrize(
        "fault",
        [
            pytest.param(fault, id=name, marks=pytest.mark.slow if name in SELDOM else ())
            for name, fault in faults.items()
        ],
    )


@each(FAULTS)
def test_planted_fault_is_caught(kernels, fault, request):
    run(kernels, fault.case, fault.backward)  # without it
    with with_fault(kernels, fault, request.node.callspec.id, "-O0") as faulty:
        with pytest.raises((AssertionError, SimulatorError), match=fault.noticed):
            run(faulty, fault.case, fault.backward)


@pytest.fixture(scope="session")
def sanitized():
    flags = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    with Kernels(simulated.built("sanitized", *flags)) as kernels:
        yield kernels


# Each regime once more at an odd distance from 16 bytes, and with half the bytes to an element.
SANITIZED = {
    **REGIMES,
    "tile at an offset": Case(13, rows=(150,), dtype=torch.bfloat16, layout="offset of 3"),
    "block at an offset": Case(3001, dtype=torch.float16, layout="odd offset", smoothing=0.1),
    "cluster of halves": Case(50257, rows=(2,), dtype=torch.bfloat16),
    "tile with weights": Case(100, weight=True, smoothing=0.1, reduction="none"),
    "targets of a byte": Case(100, target=torch.uint8),
    "six dimensions": Case(12, rows=(2, 1, 3, 2, 2), layout="classes last"),
}


@pytest.mark.slow  # they take a build of their own
@pytest.mark.parametrize("case", SANITIZED.values(), ids=SANITIZED)
def test_sanitizers_have_nothing_to_say(sanitized, case):
    check_forward(sanitized, case, "no grad")
    check_forward(sanitized, case, "in place")
    check_backward(sanitized, case)


@pytest.mark.slow
def test_sanitizers_watch_the_buffers(sanitized):
    """A row of weights that ends one class too early is read beyond its end."""
    input, target = torch.randn(4, 300), torch.full((4,), 299)
    with pytest.raises(SimulatorError, match="heap-buffer-overflow"):
        sanitized.forward(input, target, weight=torch.ones(299))


@pytest.mark.parametrize("seed", [0, 1])  # the buffers lie at the end of their pages, or the start
def test_what_lies_around_a_buffer_is_nan(kernels, seed):
    # The same weights without a sanitizer: nothing stops the read, but its number cannot be used.
    input, target = torch.randn(4, 300), torch.full((4,), 299)
    loss, _ = kernels.forward(input, target, weight=torch.ones(299), seed=seed)
    assert loss.isnan()


# Order of accesses: whether the result shows it or not

WATCHED = ("-O0", "-fsanitize=thread")


@pytest.fixture(scope="session")
def watched():
    with Kernels(simulated.built("watched", *WATCHED)) as kernels:
        try:
            overwrite(kernels, TILE)
        except SimulatorError as error:
            if "unexpected memory mapping" in str(error):
                pytest.skip("ThreadSanitizer cannot work with this kernel's layout of memory")
            raise
        yield kernels


def overwrite(kernels, case):
    """In place, where threads have the most to do with each other."""
    forward(kernels, case, make(case), "in place", seed=7)


@pytest.mark.parametrize("name", [*REGIMES, "tile at an offset", "block at an offset"])
def test_order_of_accesses_is_left_to_nothing(watched, name):
    case = SANITIZED[name]
    overwrite(watched, case)
    data = make(case)
    loss, stats, _ = forward(watched, case, data, "statistics")
    grad = grad_like(data, in_place=True)
    grad_output = torch.full_like(loss, 0.5)
    watched.backward(grad, data.target, stats, grad_output, grad, seed=11, **data.options)


UNORDERED = {
    "tile overwritten while its target is read": Fault(
        "tile_rows.cuh",
        "__syncwarp();  // all lanes have read the target's logit",
        "",
        "tile_rows_forward",
        TILE,
    ),
    "row overwritten while lanes of its warp read it": Fault(
        "on_chip.cuh",
        "__syncwarp();\n    return;",
        "return;",
        "on_chip_float32",
        REGIMES["warp"],
    ),
    "strided row overwritten while lanes of its warp read it": Fault(
        "row_threads.cuh",
        "__syncwarp();  // what the warp has read may be overwritten now",
        "",
        "general_forward",
        REGIMES["two reads"],
    ),
    "losses of other blocks read by lanes that drew no ticket": Fault(
        "block_sum.cuh",
        "__threadfence();\n  __syncwarp();",
        "__threadfence();",
        "on_chip_float32",
        REGIMES["warp"],
    ),
    "loss left without a fence before the ticket": Fault(
        "block_sum.cuh",
        "parts[index] = part;\n    __threadfence();",
        "parts[index] = part;",
        "on_chip_float32",
        REGIMES["warp"],
    ),
    "sums of a cluster written without release": Fault(
        "on_chip.cuh",
        "__cluster_barrier_arrive();",
        "__cluster_barrier_arrive_relaxed();",
        "on_chip_float32",
        CLUSTER,
    ),
}


@each(UNORDERED)
def test_missing_order_is_noticed(watched, fault, request):
    with with_fault(watched, fault, request.node.callspec.id, *WATCHED) as faulty:
        with pytest.raises(SimulatorError, match="ThreadSanitizer: data race"):
            overwrite(faulty, fault.case)


SHARED_BYTES = 1024
MISUSES = {
    "fewer threads at a barrier": ("if (threadIdx.x < 63) __syncthreads();", "deadlock"),
    "a lane missing in a shuffle": (
        "if (threadIdx.x != 5) __shfl_xor_sync(0xffffffff, 1, 1);",
        "deadlock",
    ),
    "lanes that disagree": (
        "if (threadIdx.x % 2) __syncwarp(); else __shfl_xor_sync(0xffffffff, 1, 1);",
        "lanes of one warp",
    ),
    "a part of a warp": ("__syncwarp(0xffff);", "only whole warps"),
    "a wait without arrival": ("__cluster_barrier_wait();", "without having arrived"),
    "a peer that is not there": (
        "__cluster_map_shared_rank(simulator::shared_memory(), 1);",
        "no block 1",
    ),
    "a store beyond the shared memory": (
        "static_cast<char*>(simulator::shared_memory())[1024] = 0;",
        "beyond the shared memory",
    ),
}


# What shuffles and barriers do, by CUDA's rules.
RULES = """
  int* shared = static_cast<int*>(simulator::shared_memory());
  const int other = __shfl_xor_sync(0xffffffff, static_cast<int>(threadIdx.x), 3);
  if (other != static_cast<int>(threadIdx.x ^ 3)) simulator::fail("xor");
  if (__shfl_sync(0xffffffff, threadIdx.x, 7) % 32 != 7) simulator::fail("lane");
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  const int opposite = 63 - static_cast<int>(threadIdx.x);
  if (shared[opposite] != opposite) simulator::fail("barrier");
"""
BODIES = {"rules": RULES, **{name: body for name, (body, _) in MISUSES.items()}}


def build_small_kernels(place):
    """A program of kernels of one block of 64 threads, one of which it is told to run."""
    source = place / "kernels.cpp"
    launch = 'if (!std::strcmp(arguments[1], "%s")) simulator::run({1, 64, 1, %d}, [] { %s });'
    launches = "\n".join(launch % (name, SHARED_BYTES, body) for name, body in BODIES.items())
    source.write_text(f"""
        #include <cuda_runtime.h>
        #include <cstring>
        int main(int, char** arguments) {{ {launches} }}
    """)
    engine = simulated.SIMULATOR / "engine.cpp"
    command = [simulated.COMPILER, *simulated.FLAGS, f"-I{simulated.SIMULATOR}"]
    subprocess.run([*command, source, engine, "-o", place / "kernels"], check=True)


@pytest.fixture(scope="session")
def run_small_kernel():
    sources = *CUDA_SOURCES, *simulated.SIMULATOR_SOURCES, Path(__file__)
    program = kept("small_kernels", build_small_kernels, *sources) / "kernels"
    return lambda name: subprocess.run([program, name], capture_output=True, text=True)


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_ends_the_program(run_small_kernel, name):
    done = run_small_kernel(name)
    assert done.returncode == 3 and MISUSES[name][1] in done.stderr


def test_shuffles_and_barriers_do_what_cuda_says(run_small_kernel):
    done = run_small_kernel("rules")
    assert done.returncode == 0, done.stderr
