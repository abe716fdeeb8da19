"""The same loss and gradients as `nn.CrossEntropyLoss`, whatever the options.

Options are crossed so that every combination of values of any three of them occurs; the number of
classes and of rows, on which the kernels' loops split, are then walked one by one. Layouts other
than contiguous are in test_strides.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from support.devices import every_device
from support.grids import (
    DIFFERENTIATING,
    DTYPES,
    KINDS,
    MODES,
    REDUCTIONS,
    SHAPES,
    covering,
    crossed,
    every_reduction,
    name_of,
    together,
)
from support.layouts import target_of
from support.reference import check_against_stock, float64, ours, ulp

import fused_ce

pytestmark = every_device

OPTIONS = {
    "shape": tuple(SHAPES),
    "dtype": DTYPES,
    "kind": (*KINDS, "differentiable probability"),
    "mode": tuple(MODES),
    "reduction": ("mean", "sum", "none"),
    # None and some weights; a weight of zero, because a weighted mean divides by their sum.
    "weight": (None, "positive", "some zero"),
    # Ignored rows or none; a class that is also a valid index must be ignored as well.
    "ignored": (None, "a negative index", "a class"),
    # Off, usual, and all of the target's own share gone.
    "smoothing": (0.0, 0.1, 1.0),
    # The stored gradient serves only a grad_output of 1.
    "scale": (1.0, 0.25),
}


def is_possible(case):
    kind, ignored = case.get("kind"), case.get("ignored")
    if ignored == "a class":
        return kind not in ("probability", "differentiable probability")
    return (kind, ignored) != (torch.uint8, "a negative index")


def weights(choice, classes, dtype):
    if choice is None:
        return None
    weight = torch.rand(classes) + 0.25
    if choice == "some zero":
        weight[1::4] = 0
    return weight.to(dtype)


@together
@pytest.mark.parametrize("case", covering(OPTIONS, 3, is_possible), ids=name_of)
@pytest.mark.on_simulator
def test_all_options_agree_with_stock(case):
    # 19 classes: one vector of 16 floats and a remainder of 3.
    classes, dtype = 19, case["dtype"]
    shape = SHAPES[case["shape"]](classes)
    ignore_index = {None: -100, "a negative index": -7, "a class": 3}[case["ignored"]]
    kind = case["kind"]
    target_grad = kind == "differentiable probability"
    target = target_of(
        "probability" if target_grad else kind,
        shape,
        dtype,
        ignore_index=ignore_index if case["ignored"] else None,
    )
    check_against_stock(
        torch.randn(shape).mul(3).to(dtype),
        target,
        mode=case["mode"],
        scale=case["scale"],
        target_grad=target_grad,
        weight=weights(case["weight"], classes, dtype),
        ignore_index=ignore_index,
        reduction=case["reduction"],
        label_smoothing=case["smoothing"],
    )


# 1: softmax of a single class, loss 0. 2, 3: less than any vector. 10, 100, 1000: usual data sets.
# 16: one AVX-512 vector of floats, two of AVX2; 17, 19: one and three classes beyond it.
# 63, 64, 65: several vectors, 127, 128, 129: unrolled ones, each with one class less and more.
# 2047, 2048, 2049: a block of a long row; 4097: two blocks and one class.
CLASS_COUNTS = (1, 2, 3, 10, 16, 17, 19, 63, 64, 65, 100, 127, 128, 129, 1000)
LONG_ROWS = (2047, 2048, 2049, 4097)


@together
@crossed(
    classes=CLASS_COUNTS + LONG_ROWS,
    dtype=DTYPES,
    mode=DIFFERENTIATING,
    kind=(torch.int64, "probability"),
)
def test_any_number_of_classes_agrees_with_stock(classes, dtype, mode, kind):
    shape = (5, classes)
    check_against_stock(
        torch.randn(shape).mul(3).to(dtype),
        target_of(kind, shape, dtype),
        mode=mode,
        target_grad=kind == "probability",
        weight=weights("positive", classes, dtype),
        label_smoothing=0.1,
    )


@together
@pytest.mark.parametrize("classes", CLASS_COUNTS + LONG_ROWS)
@pytest.mark.parametrize("position", ["first", "last"])
@pytest.mark.on_simulator
def test_target_at_the_edge_of_a_row_is_met(classes, position):
    target = torch.full((3,), 0 if position == "first" else classes - 1)
    check_against_stock(torch.randn(3, classes).mul(3), target, reduction="none")


# 0: nothing at all. 1, 2, 3: fewer rows than threads or than a tile. 33: a tile and one row.
# 5000 x 10: many rows to a thread, and a mean over more rows than fp16 has digits.
@together
@crossed(rows=(0, 1, 2, 3, 33, 5000), dtype=DTYPES, mode=MODES, reduction=REDUCTIONS)
@pytest.mark.on_simulator
def test_any_number_of_rows_agrees_with_stock(rows, dtype, mode, reduction):
    check_against_stock(
        torch.randn(rows, 10).mul(3).to(dtype),
        target_of(torch.int64, (rows, 10), dtype, ignore_index=-100),
        mode=mode,
        reduction=reduction,
    )


# Enough work for every thread to take part in several blocks: long rows, and wide images, where
# neighbouring rows share cache lines.
@together
@crossed(
    shape=((65, 4097), (2, 21, 33, 67)),
    dtype=DTYPES,
    mode=DIFFERENTIATING,
    kind=(torch.int64, "probability"),
)
@pytest.mark.not_on_simulator
def test_work_shared_by_threads_agrees_with_stock(shape, dtype, mode, kind):
    torch.set_num_threads(3)
    check_against_stock(
        torch.randn(shape).mul(3).to(dtype),
        target_of(kind, shape, dtype),
        mode=mode,
        scale=0.25,
        target_grad=kind == "probability",
        weight=weights("positive", shape[1], dtype),
        label_smoothing=0.1,
    )


# Rows whose exponentials have nowhere to stay, so that they are computed twice: a half type beyond
# 262144 classes, a tile of a half type's lanes that has grown too large, and a strided row of more
# classes than are gathered into a tile.
OUTGROWN = {
    "262145 classes": lambda dtype: torch.randn(2, 262145).to(dtype),
    "transposed": lambda dtype: torch.randn(4097, 40).to(dtype).t(),
    "every second class": lambda dtype: torch.randn(5, 2 * 4097).to(dtype)[:, ::2],
}


@together
@crossed(rows=OUTGROWN, dtype=DTYPES[1:], mode=MODES, kind=(torch.int64, "probability"))
@pytest.mark.not_on_simulator
def test_row_that_outgrows_the_scratch_memory_is_right(rows, dtype, mode, kind):
    input = OUTGROWN[rows](dtype).mul(3)
    target = target_of(kind, input.shape, dtype, ignore_index=-100)
    check_against_stock(input, target, mode=mode, label_smoothing=0.1)


@together
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_reduction
@pytest.mark.parametrize("kind", [torch.int64, "probability"], ids=str)
def test_half_types_are_rounded_once(dtype, reduction, kind):
    # Not "as good as stock" but right to the last digit: float arithmetic, one rounding.
    input = torch.randn(300, 50).mul(3).to(dtype)
    target = target_of(kind, input.shape, dtype)
    options = {
        "reduction": reduction,
        "weight": weights("positive", 50, dtype),
        "label_smoothing": 0.1,
        "target_grad": kind == "probability",
    }
    result = ours(input, target, **options)
    exact = float64(input, target, **options)
    for value, reference in zip(result, exact, strict=True):
        if value is None:
            continue
        # Each element within half an ulp of its own and a little for the float arithmetic,
        # which near zero is relative to the numbers it subtracted.
        step = torch.finfo(dtype).eps * reference.abs()
        slack = 4 * ulp(reference, torch.float32) + 0.51 * ulp(torch.zeros(1), dtype)
        assert ((value.double() - reference).abs() <= 0.51 * step + slack).all()


@pytest.mark.not_on_simulator
def test_mean_over_many_half_precision_rows_does_not_overflow():
    # Stock on the CPU adds the losses in fp16: inf. The mean itself is an ordinary number.
    input = torch.randn(20000, 10).mul(8).half()
    target = torch.randint(0, 10, (20000,))
    assert input.is_cuda or F.cross_entropy(input, target).isinf()
    exact = float64(input, target)
    for mode in MODES:
        result = ours(input, target, mode=mode)
        torch.testing.assert_close(result.loss.double(), exact.loss, rtol=2**-11, atol=0)


# Rows as lanes beside each other, and on their own; as many as cost a plain sum three digits.
@pytest.mark.parametrize("rows, classes", [(2**22 + 77, 2), (2**19 + 77, 65)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.not_on_simulator
def test_sum_over_many_equal_rows_keeps_its_digits(weighted, rows, classes):
    # Equal rows are the worst: every addition to a plain sum rounds the same way.
    input = torch.randn(1, classes, dtype=torch.float64).expand(rows, classes)
    target = torch.zeros(rows, dtype=torch.uint8)
    weight = torch.rand(classes, dtype=torch.float64) if weighted else None
    losses = fused_ce.cross_entropy(input, target, weight, reduction="none")
    total = math.fsum(losses.tolist())
    divisor = math.fsum([weight[0].item()] * rows) if weighted else rows
    few_ulp = 32 * torch.finfo(torch.float64).eps  # the lanes of a tile are added plainly
    result = fused_ce.cross_entropy(input, target, weight, reduction="sum").item()
    assert result == pytest.approx(total, rel=few_ulp, abs=0)
    result = fused_ce.cross_entropy(input, target, weight).item()
    assert result == pytest.approx(total / divisor, rel=few_ulp, abs=0)
