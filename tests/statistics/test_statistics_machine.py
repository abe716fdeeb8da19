"""Peak memory of the row statistics, and every instruction set, each in processes of their own.

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
    PER_ROW,
    ROWS,
    SLACK,
    Measurements,
    reset_peak,
    status,
)
from support.statistics_reference import FIELDS, check, composed, logits_of, target_of

import fused_ce

# Six numbers a row are returned or saved, two of them of eight bytes.
RESULTS = 2 * PER_ROW
# name: (layout of the logits, dtype, options, whether there is a gradient)
CALLS = {
    "contiguous": ((0, 1), "float32", {}, True),
    "bfloat16": ((0, 1), "bfloat16", {}, True),
    "rows side by side": ((1, 0), "float32", {}, True),
    "softcap": ((0, 1), "float32", {"softcap": 30.0, "temperature": 0.7}, True),
    "no grad": ((0, 1), "float32", {}, False),
    "no grad, bfloat16": ((0, 1), "bfloat16", {"softcap": 30.0}, False),
    "no grad, rows side by side": ((1, 0), "bfloat16", {}, False),
}


# Each takes a second; the others are variations of these.
OFTEN = ("contiguous", "rows side by side", "no grad")

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
def test_no_more_than_the_gradient_and_a_few_numbers_a_row_are_allocated(extra_memory, call):
    extra, logits = extra_memory(call), LOGITS * CALLS[call][3]
    assert extra <= logits + RESULTS * ROWS + SLACK
    assert extra >= logits - SLACK  # the measurement sees what there is


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_the_composition_takes_more(extra_memory):
    assert extra_memory("composed") > 3 * LOGITS


def measure(name):
    order, dtype, options, with_grad = CALLS.get(name, CALLS["contiguous"])
    function = composed if name == "composed" else fused_ce.softmax_stats
    dtype = getattr(torch, dtype)

    def call(rows, size):
        classes = size // rows // dtype.itemsize
        memory = torch.ones([(rows, classes)[d] for d in order], dtype=dtype)  # quickly made
        logits = memory.permute(order).requires_grad_(with_grad)
        target = torch.randint(0, classes, (rows,))
        before = reset_peak()
        log_prob, entropy, *_ = function(logits, target, **options, dim=1)
        if with_grad:
            (log_prob.sum() + entropy.sum()).backward()
        return status("VmHWM") - before, rows

    call(160, MEGABYTE)
    return call(ROWS, LOGITS)


AXES = {
    "geometry": (("NC", "contiguous"), ("NC", "transposed"), ("NC", "every second class")),
    "dtype": DTYPES,
    # Less than a vector of any set, some vectors and a rest, and more than one block.
    "classes": (5, 70, 4099),
    "map": ((1.0, None), (0.7, 20.0)),
    "masked": (False, True),
}


def check_accuracy():
    for case in covering(AXES, 2):
        torch.manual_seed(0)
        (shape, layout), (temperature, softcap) = case["geometry"], case["map"]
        input = logits_of(shape, layout, case["classes"], case["dtype"])
        if case["masked"]:
            input[..., -1] = -100.0  # whose exp is subnormal
        options = {"temperature": temperature, "softcap": softcap}
        check(input, target_of(input), wanted=FIELDS, **options)


@every_instruction_set
def test_every_instruction_set_is_as_accurate_as_the_composition(capability):
    has_its_accuracy(capability, __file__, check_accuracy)


if __name__ == "__main__":
    check_accuracy()
    print(fused_ce.explain_stats(torch.randn(2, 3)).rsplit(", ", 1)[1])
