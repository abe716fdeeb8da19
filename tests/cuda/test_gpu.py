"""What CUDA adds to the contract, on a GPU: `pytest -m cuda`, skipped elsewhere.

The parity suite itself runs on every device. Here are the sizes that choose between the kernels,
and what only a device has: streams, graphs, no synchronisation, memory that the allocator counts,
assertions that end a process, and more elements than 32 bits count.
"""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.devices import MISSING
from support.grids import MODES, every_differentiating_mode, every_mode
from support.layouts import target_of
from support.processes import TESTS
from support.reference import check_against_stock, differentiate, ours, stock
from support.shards import at, evenly, merged_by_all, shards_of
from support.shards import check as check_shards

import fused_ce
from fused_ce import ops
from fused_ce.options import Options

if MISSING:
    pytest.skip(MISSING, allow_module_level=True)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.xdist_group("gpu"),  # most of its memory may be asked for
    pytest.mark.usefixtures("device"),
    pytest.mark.parametrize("device", ["cuda"], indirect=True),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GIGABYTE = 2**30


def problem(shape=(64, 1000), dtype=torch.float32, kind=torch.int64):
    return torch.randn(shape).mul(3).to(dtype), target_of(kind, shape, dtype, ignore_index=-100)


# Numbers of classes

# Where one kernel hands over to the next, by bytes of a row: 1 KB and 4 KB (a warp's share), 16 and
# 32 KB (a block's), 64 to 512 KB (two, four and eight blocks'), and what no cluster holds; each
# with one class less and more, whose rows begin at every alignment. Also the vocabularies of GPT-2,
# Llama and Gemma.
EDGES = (256, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144)
CLASSES = sorted({c + d for c in EDGES for d in (-1, 0, 1)} | {50257, 128256, 256000, 300007})


@every_mode
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_any_number_of_classes_agrees_with_stock(classes, dtype, mode):
    input, target = problem((5, classes), dtype)
    check_against_stock(input, target, mode=mode, label_smoothing=0.1)


@every_differentiating_mode
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("classes", [19, 1000, 5003, 50257])
def test_rows_off_the_alignment_of_vectors_agree_with_stock(classes, offset, dtype, mode):
    values, target = problem((3, classes), dtype)
    flat = torch.full((values.numel() + offset + 8,), math.nan, dtype=dtype)
    input = flat[offset : offset + values.numel()].view(values.shape).copy_(values)
    check_against_stock(input, target, mode=mode, weight=torch.rand(classes).to(dtype))


@every_differentiating_mode
@pytest.mark.parametrize("shape", [(1 << 20, 10), (70001, 3), (2, 19, 257, 263), (1, 1 << 20)])
def test_many_rows_and_positions_agree_with_stock(shape, mode):
    input, target = problem(shape)
    check_against_stock(input, target, mode=mode, scale=0.25)


def test_mean_over_a_million_half_rows_is_rounded_once():
    input, target = problem((1 << 20, 10), torch.bfloat16)
    exact = F.cross_entropy(input.double(), target).item()
    loss = ops.forward(input, target, *Options(loss_dtype=torch.float32))
    assert loss.item() == pytest.approx(exact, rel=1e-6)


def test_bits_are_the_same_in_every_run():
    for shape in ((5000, 10), (4096, 1000), (33, 50257), (2, 21, 65, 67)):
        input, target = problem(shape, torch.bfloat16)
        weight = torch.rand(shape[1]).bfloat16()
        first = ours(input, target, weight=weight)
        for _ in range(5):
            again = ours(input, target, weight=weight)
            assert torch.equal(again.loss, first.loss)
            assert torch.equal(again.grad_input, first.grad_input)


# Nothing waits


@every_mode
@pytest.mark.parametrize("kind", [torch.int64, "probability"], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_host_does_not_wait_for_the_device(reduction, kind, mode):
    input, target = problem(kind=kind)
    options = {"weight": torch.rand(1000), "reduction": reduction, "label_smoothing": 0.1}

    def run(leaf):
        loss = fused_ce.cross_entropy(leaf, target, **options, **MODES[mode])
        if mode != "no grad":
            loss.backward(torch.full_like(loss, 0.25))

    # The first call loads code and allocates, and may wait.
    first, second = (input.clone().requires_grad_(mode != "no grad") for _ in range(2))
    run(first)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(second)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def pass_of(mode, reduction, input, target, incoming):
    """Loss, and the gradient for `incoming`, without touching `input` in place."""
    if mode == "no grad":
        return (fused_ce.cross_entropy(input, target, reduction=reduction),)
    leaf = (input * 1).requires_grad_()
    loss = fused_ce.cross_entropy(leaf, target, reduction=reduction, **MODES[mode])
    return loss.detach(), torch.autograd.grad(loss, leaf, incoming)[0]


@every_mode
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(33, 1001), (8, 50257), (2000, 10), (2, 19, 17, 13)], ids=str)
def test_replayed_graph_answers_for_its_inputs(shape, reduction, mode):
    input, target = problem(shape)
    positions = target.shape if reduction == "none" else ()
    incoming = torch.ones(positions)

    def run():
        return pass_of(mode, reduction, input, target, incoming)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    # A graph remembers addresses, and must remember nothing else: not the number of rows that
    # count, nor that grad_output was 1.
    for ignored, scale in ((0.0, 1.0), (0.5, 0.25), (1.0, 1.0), (0.1, -2.0)):
        other, _ = problem(shape)
        input.copy_(other)
        target.copy_(torch.randint(0, shape[1], target.shape))
        target.masked_fill_(torch.rand(target.shape) < ignored, -100)
        incoming.fill_(scale)
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        for value, expected in zip(replayed, run(), strict=True):
            assert torch.equal(value.nan_to_num(7), expected.nan_to_num(7))


def kernels_of(call):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return [event.name for event in profile.events() if event.device_type == cuda]


@pytest.mark.parametrize("shape", [(8, 10), (16, 1000)], ids=str)
def test_small_call_launches_few_kernels(shape):
    # Two for the loss and its gradient, one to see that grad_output is 1. Autograd makes that 1.
    input, target = problem(shape)
    input.requires_grad_()
    torch.autograd.grad(fused_ce.cross_entropy(input, target), input)
    losses = []
    forward = kernels_of(lambda: losses.append(fused_ce.cross_entropy(input, target)))
    if not forward:
        pytest.skip("the profiler sees no kernels here")
    one = torch.ones_like(losses[0])
    backward = kernels_of(lambda: torch.autograd.grad(losses[0], input, one))
    assert len(forward) <= 2, forward
    assert len(backward) <= 1, backward


# Streams and devices


@every_mode
def test_work_is_queued_on_the_current_stream(mode):
    input, target = problem((256, 5003))
    expected = pass_of(mode, "mean", input, target, torch.tensor(0.5))
    late = torch.full_like(input, math.nan)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # whoever does not wait finds the nan
            values = late.clone()
            values.copy_(input)
            results.append(pass_of(mode, "mean", values, target, torch.tensor(0.5)))
    torch.cuda.synchronize()
    for result in results:
        for value, reference in zip(result, expected, strict=True):
            assert torch.equal(value, reference)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU, or none")
@every_mode
def test_work_stays_on_the_second_device(mode):
    input, target = problem()
    expected = pass_of(mode, "mean", input, target, torch.tensor(0.5))
    other = [t.to("cuda:1") for t in (input, target, torch.tensor(0.5))]
    result = pass_of(mode, "mean", *other[:2], other[2])
    assert torch.cuda.current_device() == 0
    for value, reference in zip(result, expected, strict=True):
        assert value.device == torch.device("cuda:1")
        torch.testing.assert_close(value.to("cuda:0"), reference)
    with pytest.raises(RuntimeError):
        fused_ce.cross_entropy(input, other[1])


ON_THE_SECOND = """
import threading, torch, fused_ce
input, target = torch.zeros(4, 3, device="cuda:1"), torch.zeros(4, device="cuda:1").long()
thread = threading.Thread(target=lambda: fused_ce.cross_entropy(input, target))
thread.start()
thread.join()
print(torch._C._cuda_hasPrimaryContext(0), torch._C._cuda_hasPrimaryContext(1))
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU, or none")
def test_call_on_the_second_device_leaves_the_first_alone():
    # As every process of a group would do with the first GPU, hundreds of megabytes each.
    root = Path(fused_ce.__file__).parents[1]
    command = [sys.executable, "-c", ON_THE_SECOND]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_tensors_of_the_host_are_refused_on_the_device():
    input, target = problem((6, 5))
    with pytest.raises(RuntimeError):
        fused_ce.cross_entropy(input, target.cpu())
    with pytest.raises(RuntimeError):
        fused_ce.cross_entropy(input, target, torch.rand(5, device="cpu"))
    loss, stats, totals, grad = ops.forward_grad(input, target)
    with pytest.raises(RuntimeError, match="stats must be on the input's device"):
        ops.backward(input, target, stats.cpu(), totals, loss)
    with pytest.raises(RuntimeError, match="stats must be what the forward operator returned"):
        ops.backward(input, target, stats[:, :5].contiguous(), totals, loss)
    with pytest.raises(RuntimeError, match="totals must be on the input's device"):
        ops.backward(input, target, stats, totals.cpu(), loss)
    with pytest.raises(RuntimeError, match="grad_output must be on the"):
        ops.scale_(grad, torch.tensor(0.5, device="cpu"))


# The rest of torch


@every_differentiating_mode
@pytest.mark.parametrize("shape", [(64, 1000), (2, 19, 17, 13)], ids=str)
def test_deterministic_algorithms_are_taken_and_agree(shape, mode):
    # Stock refuses images here, for its sums are in any order.
    input, target = problem(shape)
    expected = ours(input, target, mode=mode)
    torch.use_deterministic_algorithms(True)
    try:
        result = ours(input, target, mode=mode)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(result.grad_input, expected.grad_input)


@pytest.mark.parametrize("compile_mode", ["default", "reduce-overhead"])
def test_compiled_call_agrees(compile_mode):
    def step(input, target):
        return fused_ce.cross_entropy(input, target, label_smoothing=0.1)

    compiled = torch.compile(step, fullgraph=True, mode=compile_mode)
    for _ in range(4):  # the third call of reduce-overhead replays a graph
        input, target = problem()
        torch.compiler.cudagraph_mark_step_begin()
        result = differentiate(compiled, input, target, scale=0.5)
        expected = stock(input, target, label_smoothing=0.1, scale=0.5)
        torch.testing.assert_close(result[:2], expected[:2])


@pytest.mark.parametrize(
    "mode, most", [("no grad", 0), ("default", 1), ("recompute", 1), ("in place", 0)]
)
def test_no_more_memory_is_taken_than_promised(mode, most):
    rows, classes = 2048, 32000
    input, target = problem((rows, classes), torch.bfloat16)
    input.requires_grad_(mode != "no grad")
    fused_ce.cross_entropy(*problem((2, 5))).item()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = fused_ce.cross_entropy(input, target, **MODES[mode])
    if mode != "no grad":
        torch.autograd.grad(loss, input)
    rise = torch.cuda.max_memory_allocated() - before
    assert rise <= most * input.nbytes + 64 * rows + 2**20


# Targets out of range

OUT_OF_RANGE = """
import contextlib, sys, torch, fused_ce
loss = {"ours": fused_ce.cross_entropy, "stock": torch.nn.functional.cross_entropy}[sys.argv[1]]
input = torch.randn(6, 5, device="cuda", requires_grad=sys.argv[3] == "grad")
target = torch.tensor([0, 1, int(sys.argv[2]), 3, 4, 0], device="cuda")
with contextlib.suppress(RuntimeError):  # a call's second launch may already meet the assertion
    loss(input, target)
try:
    torch.cuda.synchronize()
except RuntimeError as error:
    print(error)
    sys.exit(3)
"""


def assertion_of(who, target, grad="grad"):
    command = [sys.executable, "-c", OUT_OF_RANGE, who, str(target), grad]
    root = Path(fused_ce.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root)
    assert done.returncode == 3, done.stderr
    assert "device-side assert" in done.stdout
    return set(re.findall(r"Assertion `(.*)` failed", done.stderr))


@pytest.mark.parametrize("grad", ["grad", "no grad"])
@pytest.mark.parametrize("target", [5, -1, 2**40])
def test_target_out_of_range_is_the_assertion_of_stock(target, grad):
    # An assertion ends the use of the device by its process.
    assert assertion_of("ours", target, grad) == assertion_of("stock", target, grad)


# Sharded classes


@pytest.mark.parametrize("kind", [torch.int64, "probability"], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 10), (5, 3001), (3, 50257), (2, 19, 5, 7), (20000, 11)])
def test_shards_agree_with_the_whole_vocabulary(shape, dtype, kind):
    input, target = problem(shape, dtype, kind)
    for inplace, options in ((False, {}), (True, {"label_smoothing": 0.1, "z_loss": 1e-3})):
        check_shards(
            input,
            target,
            evenly(shape[1], 3),
            padding=2,
            scale=0.25,
            inplace=inplace,
            target_grad=kind == "probability",
            luck=4.0,  # an exp of a float is an approximation, worst where it is small
            weight=(torch.rand(shape[1]) + 0.5).to(dtype),
            **options,
        )


def test_shards_have_the_same_bits_in_every_run():
    # Also where several blocks count the rows, and add up the losses.
    input, target = problem((20000, 300), torch.bfloat16)
    shards = shards_of(input, target, at(100, 299, 300), weight=torch.rand(300), softcap=5.0)
    first = merged_by_all(shards)[0]
    for _ in range(5):
        for value, expected in zip(merged_by_all(shards)[0], first, strict=True):
            assert torch.equal(value, expected)


def pass_of_shards(shards, grad_output):
    packets = torch.cat([shard.packet() for shard in shards])
    merged = [shard.merge(packets) for shard in shards]
    grads = [s.gradient(m[1:], grad_output) for s, m in zip(shards, merged, strict=True)]
    return merged[0][0], *grads


def test_host_does_not_wait_for_shards():
    input, target = problem()
    shards = shards_of(
        *(input, target, evenly(1000, 3)),
        label_smoothing=0.1,
        weight=torch.rand(1000),
        denominator=7.5,
        logit_scale=0.5,
    )
    grad_output = torch.tensor(0.25)
    pass_of_shards(shards, grad_output)  # which loads code, and may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pass_of_shards(shards, grad_output)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", [(33, 1001), (20000, 10)], ids=str)
def test_replayed_graph_of_shards_answers_for_its_inputs(shape):
    input, target = problem(shape)
    grad_output = torch.tensor(1.0)
    shards = shards_of(input, target, evenly(shape[1], 2), weight=torch.rand(shape[1]))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            pass_of_shards(shards, grad_output)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = pass_of_shards(shards, grad_output)
    for ignored, scale in ((0.0, 0.25), (0.5, 1.0), (1.0, -2.0)):
        other, _ = problem(shape)
        input.copy_(other)  # the shards are views of it
        target.copy_(torch.randint(0, shape[1], target.shape))
        target.masked_fill_(torch.rand(target.shape) < ignored, -100)
        grad_output.fill_(scale)
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        for value, expected in zip(replayed, pass_of_shards(shards, grad_output), strict=True):
            assert torch.equal(value.nan_to_num(7), expected.nan_to_num(7))


DISAGREEING_SHARDS = """
import sys, torch
from support.shards import evenly, shards_of
torch.set_default_device("cuda")
input, target = torch.randn(6, 10), torch.randint(0, 10, (6,))
other = target.clone()
if sys.argv[1] == "targets":
    other[2] = (other[2] + 1) % 10
if sys.argv[1] == "no class":
    other[2] = target[2] = 10
scale = 0.5 if sys.argv[1] == "options" else 1.0
shards = shards_of(input, target, evenly(10, 2), logit_scale=1.0)
others = shards_of(input, other, evenly(10, 2), logit_scale=scale)
packets = torch.cat([shards[0].packet(), others[1].packet()])
torch.cuda.synchronize()  # whatever a shard holds, its packet is sent
try:
    shards[0].merge(packets)
    torch.cuda.synchronize()
except RuntimeError as error:
    print(error)
    sys.exit(3)
"""


@pytest.mark.parametrize(
    "what, says",
    [
        ("options", "the options of a rank differ from those of rank 0"),
        ("targets", "the targets of a rank differ from those of rank 0"),
        ("no class", "t >= 0 && t < n_classes"),
    ],
)
def test_shards_that_disagree_are_an_assertion(what, says):
    command = [sys.executable, "-c", DISAGREEING_SHARDS, what]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    root = Path(fused_ce.__file__).parents[1]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=root, env=environment
    )
    assert done.returncode == 3, done.stderr
    assert "device-side assert" in done.stdout
    assert says in done.stderr


# Sizes beyond 32 bits


def needs_memory(gigabytes):
    free, _ = torch.cuda.mem_get_info()
    if free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated() < gigabytes * GIGABYTE:
        pytest.skip(f"needs {gigabytes} GiB of free memory on the GPU")


def exact_rows(input, target, rows, scale):
    logits = input[rows].double()
    gradient = logits.softmax(1)
    gradient[torch.arange(len(rows)), target[rows]] -= 1
    return gradient * scale


@every_mode
@pytest.mark.parametrize("shape", [(33_000, 65_101), (2**28 + 3, 9), (9_000, 262_147)], ids=str)
def test_more_than_2_to_the_31_elements_agree(shape, mode):
    rows, classes = shape
    assert rows * classes > 2**31
    needs_memory(24)
    input = torch.empty(shape, dtype=torch.bfloat16).normal_()
    target = torch.randint(0, classes, (rows,))
    # The first and last rows, and those in which byte and element numbers pass 31 and 32 bits.
    edges = {2**30 // classes, 2**31 // classes, rows // 2}
    chosen = {0, 1, rows - 2, rows - 1} | {e + d for e in edges for d in (-1, 0, 1)}
    chosen = torch.tensor(sorted(row for row in chosen if 0 <= row < rows))
    exact = exact_rows(input, target, chosen, 0.25)
    parts = zip(input.split(2**27 // classes), target.split(2**27 // classes), strict=True)
    losses = [F.cross_entropy(x.float(), y, reduction="none").double().sum() for x, y in parts]
    expected = torch.stack(losses).sum().item() / rows
    if mode == "no grad":
        assert fused_ce.cross_entropy(input, target).item() == pytest.approx(expected, rel=2**-8)
        return
    input.requires_grad_()
    loss = fused_ce.cross_entropy(input, target, reduction="sum", **MODES[mode])
    assert loss.item() == pytest.approx(expected * rows, rel=2**-7)
    (gradient,) = torch.autograd.grad(loss, input, torch.tensor(0.25).bfloat16())
    torch.testing.assert_close(gradient[chosen].double(), exact, rtol=2**-7, atol=1e-6)


# NVIDIA's own checker

SANITIZED = """
import torch, fused_ce
for shape in ((5, 3), (33, 100), (7, 1001), (3, 5003), (2, 50257), (2, 19, 5, 7)):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for options in ({}, {"grad_in_forward": False}, {"inplace": True}):
            input = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
            target = torch.randint(0, shape[1], shape[:1] + shape[2:], device="cuda")
            loss = fused_ce.cross_entropy(input, target, label_smoothing=0.1, **options)
            loss.backward(torch.full_like(loss, 0.5))
torch.cuda.synchronize()
"""


@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="there is no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_has_nothing_to_say(tool, monkeypatch):
    # Without the allocator's own reserves, memory ends where a tensor ends.
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    # Racecheck follows every access to shared memory; of torch's kernels none is of interest.
    options = ["--tool", tool, "--kernel-name", "kernel_substring=fused_ce"]
    options += ["--report-api-errors", "no"]
    command = ["compute-sanitizer", *options, sys.executable, "-c", SANITIZED]
    root = Path(fused_ce.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=root)
    output = done.stdout + done.stderr
    if "Device not supported" in output or "SUMMARY" not in output:
        pytest.skip(f"compute-sanitizer cannot work here: {output.strip()[-200:]}")
    errors = re.search(r"ERROR SUMMARY: (\d+)|RACECHECK SUMMARY: (\d+)", output)
    assert errors and int(errors[1] or errors[2]) == 0, output[-4000:]
    assert done.returncode == 0, output[-4000:]
