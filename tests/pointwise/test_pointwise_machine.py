"""Peak memory of the pointwise losses, and every instruction set, each in processes of their own.

This file run as a program compares a selection of calls with float64 on the instruction set in
use, and says which that is.
"""

import sys

import pytest
import torch
from support.grids import DTYPES, covering
from support.instruction_sets import every_instruction_set, has_its_accuracy
from support.memory import (
    LOGITS,
    MEGABYTE,
    ONE_PROGRAM,
    ROWS,
    SLACK,
    Measurements,
    reset_peak,
    status,
)
from support.pointwise_reference import BCE, FOCAL, KL, LOSSES, check, tensors_of

import fused_ce

# A number in float64 for each tile of 8192 elements.
SUMS = LOGITS // 4096
# name: (loss, order of the dimensions in memory, dtype, options, logits' worth of memory)
CALLS = {
    "bce": (BCE, (0, 1), "float32", {}, 1),
    "bce, both weights": (BCE, (0, 1), "bfloat16", {"weighs": True}, 1),
    "bce, transposed": (BCE, (1, 0), "float32", {"weighs": True}, 1),
    "focal": (FOCAL, (0, 1), "float32", {"reduction": "mean"}, 1),
    "kl": (KL, (0, 1), "float32", {"reduction": "batchmean"}, 1),
    "in place": (FOCAL, (0, 1), "float32", {"reduction": "mean", "inplace": True}, 0),
    "no grad": (BCE, (0, 1), "float32", {"grad": False}, 0),
}
# Each takes a second; the others are variations of these.
OFTEN = ("bce, transposed", "in place")

# One program measures all.
pytestmark = ONE_PROGRAM


@pytest.fixture(scope="module")
def extra_memory():
    measurements = Measurements(__file__)
    return lambda call: measurements.of(call)[0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(
    "call",
    [pytest.param(c, marks=() if c in OFTEN else pytest.mark.slow) for c in CALLS],
)
def test_no_more_than_the_gradient_is_allocated(extra_memory, call):
    extra, logits = extra_memory(call), LOGITS * CALLS[call][4]
    assert extra <= logits + SUMS + SLACK
    assert extra >= logits - SLACK  # the measurement sees what there is


def measure(name):
    loss, order, dtype, options, _ = CALLS[name]
    options = dict(options)
    weighs, with_grad = options.pop("weighs", False), options.pop("grad", True)
    dtype = getattr(torch, dtype)

    def call(rows, size):
        classes = size // rows // dtype.itemsize
        shape = [(rows, classes)[d] for d in order]
        # Quickly made; of log-probabilities of 1 there is no divergence, but its work is the same.
        input = torch.ones(shape, dtype=dtype).permute(order).requires_grad_(with_grad)
        target = torch.ones(shape, dtype=dtype).permute(order)
        if weighs:
            options.update(weight=torch.rand(rows, 1), pos_weight=torch.rand(classes))
        before = reset_peak()
        value = loss.function(input, target, **options)
        if with_grad:
            value.backward()
        return status("VmHWM") - before, rows

    call(160, MEGABYTE)
    return call(ROWS, LOGITS)


AXES = {
    "loss": tuple(range(len(LOSSES))),
    "layout": ("contiguous", "transposed", "every second class"),
    "dtype": DTYPES,
    # Less than a vector of any set, some vectors and a rest, and more than one block.
    "classes": (5, 70, 1500),
    "reduction": ("sum", "none"),
}


def check_accuracy():
    for case in covering(AXES, 2):
        torch.manual_seed(0)
        loss, dtype = LOSSES[case["loss"]], case["dtype"]
        input, target = tensors_of(loss, (20, case["classes"]), case["layout"], dtype)
        # Without fused multiply-adds there are more roundings than stock's own have.
        check(loss, input, target, reduction=case["reduction"], luck=2.0)


@every_instruction_set
def test_every_instruction_set_is_as_accurate_as_stock(capability):
    has_its_accuracy(capability, __file__, check_accuracy)


if __name__ == "__main__":
    check_accuracy()
    said = fused_ce.explain_call(BCE.function, torch.randn(3), torch.rand(3))
    print(said.rsplit(", ", 1)[1])
