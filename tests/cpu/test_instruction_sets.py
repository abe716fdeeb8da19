"""Every instruction set obeys the accuracy rule; threads, processes and the run change no bit.

The set is chosen once in a process, so each is tried in a process of its own: this file run as a
program. Also guards what threads and processes need: work after a fork, calls from many Python
threads at once, and a released interpreter lock while the kernels run.
"""

import concurrent.futures
import hashlib
import itertools
import multiprocessing
import sys
import threading
import time

import pytest
import torch
from support.compiled import cpu_flags
from support.grids import (
    DTYPES,
    MODES,
    SHAPES,
    covering,
    every_differentiating_mode,
    every_mode,
    name_of,
)
from support.instruction_sets import CAPABILITIES, every_instruction_set
from support.layouts import OVERLAPPING, lay_out, target_of
from support.processes import environment, finish
from support.reference import check_against_stock, one_thread, ours

import fused_ce

AXES = {
    "geometry": (
        ("NC", "contiguous"),
        ("NC", "transposed"),
        ("NC", "every second class"),
        ("NC", "odd offset"),
        ("NC", "expanded rows"),
        ("NCHW", "contiguous"),
        ("NCHW", "channels_last"),
        ("NCd", "next token"),
    ),
    "dtype": DTYPES,
    "kind": (torch.int64, torch.uint8, "probability"),
    "mode": tuple(MODES),
    "reduction": ("mean", "none"),
    # Less than a vector of any set, some vectors and a rest, and more than one block.
    "classes": (5, 67, 1029),
    "weighted and smooth": (False, True),
}
# For the bits: enough rows, or long enough ones, for seven threads.
SHARED_WORK = ((7001, 10), (33, 4097), (4, 21, 33, 65))


def is_possible(case):
    _, layout = case.get("geometry", (None, None))
    return not (layout in OVERLAPPING and case.get("mode") == "in place")


def check_accuracy():
    """Compares all cases with float64; torch's own kernels are held to the same set."""
    for case in covering(AXES, 2, is_possible):
        torch.manual_seed(0)
        (shape, layout), dtype, classes = case["geometry"], case["dtype"], case["classes"]
        options = {"reduction": case["reduction"]}
        if case["weighted and smooth"]:
            options |= {"weight": torch.rand(classes).to(dtype), "label_smoothing": 0.1}
        input = lay_out(torch.randn(SHAPES[shape](classes)).mul(3).to(dtype), layout)
        target = target_of(case["kind"], input.shape, dtype)
        target_grad = case["kind"] == "probability" and case["mode"] != "no grad"
        try:
            check_against_stock(
                input, target, mode=case["mode"], scale=0.25, target_grad=target_grad, **options
            )
        except AssertionError as error:
            raise AssertionError(name_of(case)) from error


def shared_results():
    """Losses and gradients of calls that several threads share, in every mode."""
    for shape, kind, mode, reduction, dtype in itertools.product(
        SHARED_WORK,
        (torch.int64, "probability"),
        MODES,
        ("mean", "none"),
        (torch.float32, torch.bfloat16),
    ):
        generator = torch.Generator().manual_seed(0)
        input = torch.randn(shape, generator=generator).to(dtype)
        with one_thread():  # stock's softmax has other bits for other numbers of threads
            target = target_of(kind, shape, dtype, ignore_index=-100, generator=generator)
        weight = torch.rand(shape[1], generator=generator).to(dtype)
        yield ours(
            input,
            target,
            mode=mode,
            scale=0.25,
            target_grad=kind == "probability" and mode != "no grad",
            weight=weight,
            label_smoothing=0.1,
            reduction=reduction,
        )


def digest(outcomes):
    total = hashlib.sha256()
    for outcome in outcomes:
        for tensor in outcome:
            if tensor is not None:
                total.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def in_a_process(capability):
    """The set that is in use there and the digest of `shared_results`, once the rule is obeyed."""
    result = finish(__file__, env=environment(ATEN_CPU_CAPABILITY=capability))
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@every_instruction_set
def test_instruction_set_is_accurate_and_the_one_asked_for(capability):
    name, needed = CAPABILITIES[capability]
    if missing := needed - cpu_flags():
        pytest.skip(f"this CPU has no {', '.join(sorted(missing))}")
    found, bits = in_a_process(capability)
    assert found == name
    own = fused_ce.explain(torch.randn(2, 3), torch.tensor([0, 1])).rsplit(", ", 1)[1]
    if own == name:  # another process, another run: not one bit differs
        assert bits == digest(shared_results())


@every_mode
@pytest.mark.parametrize("shape", SHARED_WORK, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "reversed axes"])
def test_number_of_threads_changes_no_bit(layout, shape, mode):
    if layout == "reversed axes":
        layout = "transposed" if len(shape) == 2 else layout
    input = lay_out(torch.randn(shape), layout)
    for kind, reduction in itertools.product((torch.int64, "probability"), ("sum", "none")):
        target = target_of(kind, shape, torch.float32, ignore_index=-100)
        results = []
        for threads in (1, 2, 3, 7, 7):
            torch.set_num_threads(threads)
            results.append(ours(input, target, mode=mode, reduction=reduction, scale=0.25))
        for result in results[1:]:
            for value, first in zip(result[:2], results[0][:2], strict=True):
                assert (value is None and first is None) or torch.equal(value, first)


def _loss_in_a_child(connection, input, target, threads):
    if threads:
        torch.set_num_threads(threads)
    leaf = input.requires_grad_()
    loss = fused_ce.cross_entropy(leaf, target)
    loss.backward()
    connection.send((loss.item(), leaf.grad.numpy().tobytes()))
    connection.close()


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_loss_works_after_a_fork():
    # With one thread, as the workers of a DataLoader have: the C library's OpenMP, stock's as well,
    # hangs in a child of a process that has used more.
    input, target = torch.randn(5000, 11), torch.randint(0, 11, (5000,))
    torch.set_num_threads(2)
    expected = ours(input, target)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_loss_in_a_child, args=(sender, input, target, 1))
    child.start()
    try:
        assert receiver.poll(60), "the child gives no answer"
        loss, gradient = receiver.recv()
    finally:
        child.kill()
        child.join()
    assert loss == expected.loss.item()
    assert gradient == expected.grad_input.numpy().tobytes()


def _fork_at_once():
    """Run as a program: imports, and forks before anything was computed with threads."""
    input, target = torch.randn(5000, 11), torch.randint(0, 11, (5000,))
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_loss_in_a_child, args=(sender, input, target, 2))
    child.start()
    assert receiver.poll(60)
    loss, gradient = receiver.recv()
    child.join()
    torch.set_num_threads(2)
    expected = ours(input, target)
    assert loss == expected.loss.item()
    assert gradient == expected.grad_input.numpy().tobytes()


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_threads_work_in_the_child_of_a_process_that_only_imported():
    result = finish(__file__, "fork", env=environment())
    assert result.returncode == 0, result.stderr


@every_mode
def test_python_threads_leave_each_other_alone(mode):
    # All start at the same moment, each with several threads of its own and another problem.
    count = 8
    problems = [
        (torch.randn(400 + 37 * i, 53), torch.randint(0, 53, (400 + 37 * i,))) for i in range(count)
    ]
    torch.set_num_threads(3)
    expected = [ours(*problem, mode=mode, scale=0.25) for problem in problems]
    barrier = threading.Barrier(count)

    def run(problem):
        barrier.wait()
        return [ours(*problem, mode=mode, scale=0.25) for _ in range(5)]

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        for results, alone in zip(pool.map(run, problems), expected, strict=True):
            for result in results:
                assert torch.equal(result.loss, alone.loss)
                if alone.grad_input is not None:
                    assert torch.equal(result.grad_input, alone.grad_input)


@every_differentiating_mode
def test_replicas_in_threads_agree_with_one_model(mode):
    # What DataParallel does: replicas of one model, each in a thread with a part of the batch, and
    # one backward through all of them, into the same parameters.
    x, y = torch.randn(4, 25, 6), torch.randint(0, 5, (4, 25))
    grads = []
    for criterion in (fused_ce.CrossEntropyLoss(**MODES[mode]), torch.nn.CrossEntropyLoss()):
        torch.manual_seed(1)
        layer = torch.nn.Linear(6, 5)

        def replica(part, layer=layer, criterion=criterion):
            return criterion(layer(part[0]), part[1])

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            losses = list(pool.map(replica, zip(x, y, strict=True)))
        torch.stack(losses).mean().backward()
        grads.append([p.grad for p in layer.parameters()])
    torch.testing.assert_close(*grads)


class Clock(threading.Thread):
    """Looks at the time for as long as it may: only with the interpreter lock it can."""

    def __init__(self):
        super().__init__(daemon=True)
        self.longest, self.stopped = 0.0, False

    def run(self):
        last = time.perf_counter()
        while not self.stopped:
            now = time.perf_counter()
            self.longest = max(self.longest, now - last)
            last = now

    def pause_during(self, call):
        """The longest time without a look, as a part of the time that `call` took."""
        self.longest, start = 0.0, time.perf_counter()
        call()
        time.sleep(0)  # for the look that a held lock has put off
        return self.longest / (time.perf_counter() - start)


@pytest.mark.parametrize("step", ["forward", "backward", "forward, in place"])
def test_kernels_run_with_the_interpreter_unlocked(step):
    # One row for all, in float64: much work in little memory. Others may have the processors too,
    # so the best of some attempts counts; with the lock held there is no good one.
    input = torch.randn(1, 1000, dtype=torch.float64).expand(16000, 1000)
    target = torch.randint(0, 1000, (16000,))
    torch.set_num_threads(1)
    leaf = input.detach().requires_grad_()
    loss = fused_ce.cross_entropy(leaf, target, grad_in_forward=False)
    own = input.clone().requires_grad_()
    call = {
        "forward": lambda: fused_ce.cross_entropy(input, target),
        "backward": lambda: torch.autograd.grad(loss, leaf, retain_graph=True),
        "forward, in place": lambda: fused_ce.cross_entropy(own, target, inplace=True),
    }[step]
    clock = Clock()
    clock.start()
    try:
        pauses = [clock.pause_during(call) for _ in range(5)]
    finally:
        clock.stopped = True
        clock.join()
    assert min(pauses) < 0.5, pauses


if __name__ == "__main__":
    if sys.argv[1:] == ["fork"]:
        _fork_at_once()
    else:
        check_accuracy()
        torch.set_num_threads(3)
        reason = fused_ce.explain(torch.randn(2, 3), torch.tensor([0, 1]))
        print(reason.rsplit(", ", 1)[1], digest(shared_results()))
