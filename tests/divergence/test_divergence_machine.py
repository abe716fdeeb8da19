"""Peak memory of the divergence, and every instruction set, each in processes of their own.

This file run as a program compares a selection of calls with float64 on the instruction set in
use, and says which that is.
"""

import sys

import pytest
import torch
from support.divergence_reference import check, composed
from support.grids import DTYPES, covering
from support.instruction_sets import every_instruction_set, has_its_accuracy
from support.layouts import lay_out
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

# name: (layout of the student's logits, that of the teacher's, dtype, options, how many copies)
CALLS = {
    "contiguous": ((0, 1), (0, 1), "float32", {}, 1),
    "no grad": ((0, 1), (0, 1), "float32", {}, 0),
    "rows side by side": ((1, 0), (0, 1), "float32", {}, 1),
    "bfloat16, in reverse": ((0, 1), (1, 0), "bfloat16", {"reverse": True}, 1),
    "recomputed": ((0, 1), (0, 1), "float32", {"grad_in_forward": False}, 1),
    "in place": ((0, 1), (0, 1), "float32", {"inplace": True}, 0),
    "in place, in backward": (
        (0, 1),
        (0, 1),
        "bfloat16",
        {"inplace": True, "grad_in_forward": False},
        0,
    ),
    "no grad, rows side by side": ((1, 0), (1, 0), "bfloat16", {"reverse": True}, 0),
}
# Each takes a second; the others are variations of these.
OFTEN = ("contiguous", "no grad")

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
    extra, logits = extra_memory(call), LOGITS * CALLS[call][-1]
    # And a row of what is kept for the gradient, of each thread.
    assert extra <= logits + 2 * PER_ROW * ROWS + 2 * SLACK
    assert extra >= logits - SLACK  # the measurement sees what there is


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_the_composition_takes_more(extra_memory):
    assert extra_memory("composed") > 3 * LOGITS


def measure(name):
    order, teachers, dtype, options, copies = CALLS.get(name, CALLS["contiguous"])
    function = composed if name == "composed" else fused_ce.kl_div_with_logits
    dtype = getattr(torch, dtype)
    with_grad = copies or options.get("inplace")

    def call(rows, size):
        classes = size // rows // dtype.itemsize
        student, teacher = (
            torch.ones([(rows, classes)[d] for d in axes], dtype=dtype).permute(
                axes
            )  # quickly made
            for axes in (order, teachers)
        )
        student.requires_grad_(bool(with_grad))
        before = reset_peak()
        loss = function(student, teacher, temperature=2.0, **options)
        if with_grad:
            loss.backward()
        return status("VmHWM") - before, rows

    call(160, MEGABYTE)
    return call(ROWS, LOGITS)


AXES = {
    "layout": ("contiguous", "transposed", "every second class"),
    "dtype": DTYPES,
    # Less than a vector of any set, some vectors and a rest, and more than one block.
    "classes": (5, 70, 4099),
    "reverse": (False, True),
    "masked": (False, True),
    "mode": ("default", "recompute"),
}


def check_accuracy():
    for case in covering(AXES, 2):
        torch.manual_seed(0)
        # As many rows as make the root of a mean square more than luck.
        logits = torch.randn(2, 40, case["classes"]).mul(3).to(case["dtype"])
        input, teacher = (lay_out(each, case["layout"]) for each in logits)
        if case["masked"]:
            input[..., -1] = -100.0  # whose exp is subnormal
        options = {"reverse": case["reverse"], "temperature": 0.7}
        check(input, teacher, mode=case["mode"], luck=2.0, **options)


@every_instruction_set
def test_every_instruction_set_is_as_accurate_as_the_composition(capability):
    has_its_accuracy(capability, __file__, check_accuracy)


if __name__ == "__main__":
    check_accuracy()
    said = fused_ce.explain_call(fused_ce.kl_div_with_logits, torch.randn(2, 3), torch.randn(2, 3))
    print(said.rsplit(", ", 1)[1])
