"""Peak memory of one loss, forward and backward, beyond the logits: 1.0 logits, or O(rows).

`measure` makes logits and calls the loss with them, in a process of its own each time.
"""

import sys

import pytest
import torch
import torch.nn.functional as F
from support.memory import (
    LOGITS,
    MEGABYTE,
    ONE_PROGRAM,
    PER_ROW,
    ROWS,
    SLACK,
    Measurements,
    reset_peak,
    status,
)

import fused_ce

# name: (function, options, layout of the logits, dtype, grad_output)
CALLS = {
    "stock": ("stock", {}, "contiguous", "float32", 1.0),
    "default": ("ours", {}, "contiguous", "float32", 1.0),
    "default, scaled": ("ours", {}, "contiguous", "float32", 0.25),
    "recompute": ("ours", {"grad_in_forward": False}, "contiguous", "float32", 1.0),
    "bfloat16": ("ours", {}, "contiguous", "bfloat16", 0.25),
    "channels_last": ("ours", {}, "channels_last", "float32", 0.25),
    "image": ("ours", {}, "image", "float32", 0.25),
    "next token": ("ours", {}, "next token", "float32", 1.0),
    "in place": ("ours", {"inplace": True}, "contiguous", "float32", 0.25),
    "in place, none": ("ours", {"inplace": True, "reduction": "none"}, "contiguous", "float32", 1),
    "in place, float16": ("ours", {"inplace": True}, "contiguous", "float16", 1024.0),
    "in place, of a layer": ("ours", {"inplace": True}, "of a layer", "float32", 0.25),
    "in place, of a layer, none": (
        "ours",
        {"inplace": True, "reduction": "none"},
        "of a layer",
        "float32",
        1,
    ),
    "no grad": ("ours", {}, "contiguous", "float32", None),
    "no grad, transposed": ("ours", {}, "transposed", "float32", None),
    "no grad, image": ("ours", {}, "image", "bfloat16", None),
}
# name: (options, whether there is a gradient, most that it may take, in logits)
AUTOCAST = {
    "autocast": ({}, True, 1),
    "autocast, recompute": ({"grad_in_forward": False}, True, 1),
    "autocast, in place": ({"inplace": True}, True, 0),
    "autocast, no grad": ({}, False, 0),
}


@pytest.fixture(scope="module")
def extra_memory():
    """What a call adds to the logits at its peak, in bytes, and the number of rows."""
    measurements = Measurements(__file__)

    def of(call):
        extra, rows = measurements.of(call)
        print(f"{call}: {extra / LOGITS:.3f} logits, {extra} bytes")
        return extra, rows

    return of


pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status"),
    ONE_PROGRAM,
]


@pytest.mark.parametrize(
    "call", [name for name in CALLS if not name.startswith(("stock", "in place", "no grad"))]
)
def test_no_more_than_one_gradient_is_allocated(extra_memory, call):
    extra, rows = extra_memory(call)
    assert extra <= LOGITS + PER_ROW * rows + SLACK
    # And the gradient is there: the measurement itself sees 100 MB.
    assert extra > LOGITS - SLACK


@pytest.mark.parametrize(
    "call", [name for name in CALLS if name.startswith(("in place", "no grad"))]
)
def test_no_more_than_a_few_numbers_a_row_are_allocated(extra_memory, call):
    extra, rows = extra_memory(call)
    assert extra <= PER_ROW * rows + SLACK


def test_stock_takes_more_than_ours(extra_memory):
    # Otherwise the measurement is wrong, or the promise is worth nothing.
    extra, _ = extra_memory("stock")
    assert extra > 2 * LOGITS


@pytest.mark.parametrize("call", AUTOCAST)
def test_autocast_makes_no_float_copy_of_the_logits(extra_memory, call):
    # Stock's first step there is a copy of the half precision logits, twice their size.
    extra, rows = extra_memory(call)
    logits = AUTOCAST[call][2]
    assert extra <= logits * LOGITS + PER_ROW * rows + SLACK
    assert extra >= logits * (LOGITS - SLACK)  # the measurement sees what there is


class Layer(torch.autograd.Function):
    """What takes no memory of its own."""

    @staticmethod
    def forward(ctx, parameter, shape):
        return torch.ones(shape)  # quickly made

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output.sum(), None


def measure_autocast(options, with_grad):
    def call(rows, bytes):
        logits = torch.ones(rows, bytes // rows // 2, dtype=torch.bfloat16)
        logits.requires_grad_(with_grad)
        target = torch.randint(0, logits.shape[1], (rows,))
        before = reset_peak()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = fused_ce.cross_entropy(logits, target, **options)
        assert loss.dtype == torch.float32
        if with_grad:
            (loss * 4).backward()
            assert logits.grad.dtype == torch.bfloat16
        return status("VmHWM") - before, rows

    call(160, MEGABYTE)
    return call(ROWS, LOGITS)


def measure(name):
    if name in AUTOCAST:
        return measure_autocast(*AUTOCAST[name][:2])
    which, options, layout, dtype, scale = CALLS[name]
    function = F.cross_entropy if which == "stock" else fused_ce.cross_entropy
    dtype = getattr(torch, dtype)

    def problem(rows, bytes):
        classes = bytes // rows // dtype.itemsize
        if layout == "of a layer":
            logits = Layer.apply(torch.zeros((), requires_grad=True), (8, rows // 8, classes))
            return logits.view(rows, classes), torch.randint(0, classes, (rows,))
        shape, order = {
            "contiguous": ((rows, classes), (0, 1)),
            "transposed": ((classes, rows), (1, 0)),
            # Four images of rows / 4 pixels each, classes first or last.
            "image": ((4, classes, rows // 40, 10), (0, 1, 2, 3)),
            "channels_last": ((4, rows // 40, 10, classes), (0, 3, 1, 2)),
            "next token": ((8, rows // 8, classes), (0, 1, 2)),
        }[layout]
        memory = torch.ones(shape, dtype=dtype)
        logits = memory.permute(order)
        if layout == "next token":
            logits = logits[:, :-1].transpose(1, 2)
        positions = logits.shape[:1] + logits.shape[2:]
        target = torch.randint(0, classes, positions)
        return logits.requires_grad_(scale is not None), target

    def call(logits, target):
        if scale is None:
            return function(logits, target, **options)
        loss = function(logits, target, **options)
        loss.backward(torch.full_like(loss, scale))

    call(*problem(160, MEGABYTE))
    logits, target = problem(ROWS, LOGITS)
    before = reset_peak()
    call(logits, target)
    return status("VmHWM") - before, target.numel()


@pytest.mark.parametrize("name", ["cross_entropy", "binary_cross_entropy_with_logits"])
def test_memory_that_torch_has_not_is_an_error_in_its_words(name):
    # Programs that look for the largest batch know the error by them. No gradient is so large.
    logits = torch.zeros(1, 1, requires_grad=True).expand(1 << 20, 1 << 25)
    target = logits.detach() if name.startswith("binary") else torch.zeros(1 << 20).long()
    words = "DefaultCPUAllocator: can't allocate memory"
    if torch.__version__ < "2.13":  # does not hand them on
        words = "out of memory"
    with pytest.raises(RuntimeError, match=words):
        getattr(fused_ce, name)(logits, target)
