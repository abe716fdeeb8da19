"""More than 2^31 elements, rows, classes or strides: every index must be a 64-bit one.

Mostly views that repeat a little memory, or large storage of which only a few pages are touched;
two tests hold 4 GiB of logits and check the gradient around each place where 32 bits would end.
"""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.grids import MODES, every_mode
from support.reference import stock

import fused_ce

# One after the other: each may take most of the memory.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("large")]

BEYOND = 2**31
GIGABYTE = 2**30


def needs_memory(gigabytes):
    """Skips where that much is not free; elsewhere than on Linux nobody knows."""
    available = 0
    if Path("/proc/meminfo").exists():
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    if available < gigabytes * GIGABYTE:
        pytest.skip(f"needs {gigabytes} GiB of free memory")


def is_fused(*args, **options):
    return fused_ce.explain(*args, **options).startswith("fused")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_many_repeated_rows_give_the_same_loss(kind, dtype):
    # Few rows of 1000 classes, each read more often than 32 bits can count elements.
    repeats, classes = BEYOND // 2000 + 3, 1000
    row = torch.randn(2, classes).to(dtype)
    input = row.unsqueeze(0).expand(repeats, 2, classes).permute(0, 2, 1)
    assert input.numel() > BEYOND
    if kind == "index":
        target = torch.tensor([3, 999]).expand(repeats, 2)
        each = F.cross_entropy(row.double(), torch.tensor([3, 999]))
    else:
        probabilities = torch.rand(2, classes).softmax(1).to(dtype)
        target = probabilities.expand(repeats, 2, classes).permute(0, 2, 1)
        each = F.cross_entropy(row.double(), probabilities.double())
    assert is_fused(input, target)
    loss = fused_ce.cross_entropy(input, target)
    assert abs(loss.item() - each.item()) <= 2 * torch.finfo(dtype).eps * each.item()


def test_more_rows_than_32_bits_count_are_all_counted():
    needs_memory(4)
    rows = BEYOND + 5
    row = torch.randn(1, 2, dtype=torch.float64)
    input = row.expand(rows, 2)
    target = torch.zeros(rows, dtype=torch.uint8)
    target[-1] = 1  # one row in so many is still far more than the rounding of their sum
    losses = F.cross_entropy(row.expand(2, 2).double(), torch.tensor([0, 1]), reduction="none")
    total = ((rows - 1) * losses[0] + losses[1]).item()
    loss = fused_ce.cross_entropy(input, target, reduction="sum").item()
    assert loss == pytest.approx(total, rel=1e-10)
    loss = fused_ce.cross_entropy(input, target).item()
    assert loss == pytest.approx(total / rows, rel=1e-10)
    target[-1] = 5
    with pytest.raises(IndexError, match="Target 5 is out of bounds"):
        fused_ce.cross_entropy(input, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_classes_than_32_bits_count_are_all_counted(dtype):
    # All logits are one number: the loss is the logarithm of the number of classes.
    classes = BEYOND + 11
    input = torch.tensor([[0.5]], dtype=dtype).expand(2, classes)
    target = torch.tensor([BEYOND + 10, 1])
    expected = torch.tensor(float(classes), dtype=torch.float64).log().item()
    for options in ({}, {"label_smoothing": 0.25}, {"reduction": "none"}):
        loss = fused_ce.cross_entropy(input, target, **options).double()
        assert ((loss - expected).abs() <= 2 * torch.finfo(dtype).eps * expected).all()
    for outside in (classes, BEYOND * 2, -1):
        with pytest.raises(IndexError, match=f"Target {outside} is out of bounds"):
            fused_ce.cross_entropy(input, torch.tensor([0, outside]))


def test_equal_logits_of_many_classes_are_all_counted():
    # All of them are the largest: 2^26 is where a count in float32, four at a time, stands still.
    rows, classes = 4, 2**27
    input = torch.zeros(rows).expand(classes, rows).t()
    target = torch.zeros(rows, dtype=torch.long)
    assert is_fused(input, target)
    loss = fused_ce.cross_entropy(input, target)
    assert loss.item() == pytest.approx(math.log(classes), rel=1e-6)


@every_mode
@pytest.mark.parametrize("axis", ["rows", "classes", "offset"])
def test_wide_strides_reach_their_elements(axis, mode):
    # Only the pages that hold the logits are ever touched: 8 GiB of addresses, little memory.
    storage = torch.empty(4 * BEYOND, dtype=torch.uint8).view(torch.bfloat16)
    size, stride, offset = {
        "rows": ((4, 300), (BEYOND // 2 + 7, 1), 5),
        "classes": ((300, 4), (1, BEYOND // 2 + 7), 5),
        "offset": ((4, 300), (300, 1), BEYOND + 5),
    }[axis]
    input = storage.as_strided(size, stride, offset)
    values = torch.randn(size).bfloat16()
    input.copy_(values)
    target = torch.randint(0, size[1], size[:1])
    if mode == "no grad":
        loss = fused_ce.cross_entropy(input, target)
    else:
        input.requires_grad_()
        loss = fused_ce.cross_entropy(input, target, **MODES[mode])
        (gradient,) = torch.autograd.grad(loss, input, torch.tensor(0.5).bfloat16())
        expected = stock(values, target, scale=0.5).grad_input
        torch.testing.assert_close(gradient.contiguous(), expected, rtol=2e-2, atol=2e-3)
    assert loss.item() == pytest.approx(F.cross_entropy(values.float(), target).item(), rel=1e-2)


def large_logits(rows, classes):
    """bfloat16 logits whose rows are all different, made quickly, and targets."""
    needs_memory(12)
    logits = torch.empty(rows, classes, dtype=torch.bfloat16)
    block = torch.randn(64, classes)
    for start in range(0, rows, 64):
        shifted = block.roll(start // 64, 1) if start else block
        logits[start : start + 64] = shifted[: rows - start]
    return logits, torch.randint(0, classes, (rows,))


def mean_in_float32(logits, target):
    """Stock's loss of each row, a few rows at a time, so that they fit beside the logits."""
    parts = zip(logits.split(1024), target.split(1024), strict=True)
    losses = [F.cross_entropy(x.float(), y, reduction="none") for x, y in parts]
    return torch.cat(losses).double().mean().item()


def check_gradient(gradient, rows_of, target, scale):
    for row, values in rows_of.items():
        exact = values.double().softmax(0)
        exact[target[row]] -= 1
        exact *= scale
        bound = exact.abs() * torch.finfo(torch.bfloat16).eps + 1e-30
        assert ((gradient[row].double() - exact).abs() <= bound).all(), row


@pytest.mark.parametrize("mode", ["in place", "default"])
def test_large_gradient_has_its_elements(mode):
    # 33,000 rows of a vocabulary of 65,101: in rows, in bytes and in elements past 2^31.
    rows, classes = 33_000, 65_101
    assert rows * classes > BEYOND
    logits, target = large_logits(rows, classes)
    # The first and last rows, and those in which byte and element numbers pass 31 and 32 bits.
    edges = {BEYOND // 2 // classes, BEYOND // classes, BEYOND // 4 // classes}
    chosen = {0, 1, rows // 2, rows - 1} | {e + d for e in edges for d in (-1, 0, 1)}
    rows_of = {row: logits[row].clone() for row in sorted(chosen) if row < rows}
    expected = mean_in_float32(logits, target)
    logits.requires_grad_()
    loss = fused_ce.cross_entropy(logits, target, **MODES[mode])
    assert loss.item() == pytest.approx(expected, rel=2**-7)
    loss.backward()
    assert (logits.grad.data_ptr() == logits.data_ptr()) == (mode == "in place")
    check_gradient(logits.grad, rows_of, target, 1 / rows)


def test_large_image_has_its_elements():
    # Classes before positions, so that a class is more than 2^27 elements from the next.
    needs_memory(14)
    classes, height, width = 17, 2**14, 2**13 + 3
    line = torch.randn(1, classes, 1, width)
    logits = torch.empty(1, classes, height, width, dtype=torch.bfloat16)
    assert logits.numel() > BEYOND
    logits.copy_(line)
    target = torch.randint(0, classes, (1, 1, width)).expand(1, height, width)
    values = logits[0, :, 0].t().clone()
    exact = F.cross_entropy(values.double(), target[0, 0]).item()
    logits.requires_grad_()
    loss = fused_ce.cross_entropy(logits, target, inplace=True)
    assert loss.item() == pytest.approx(exact, rel=2**-7)
    loss.backward()
    gradient = logits.grad[0, :, [0, height // 2, height - 1]]  # [C, 3, W]
    for line in gradient.unbind(1):
        rows_of = {column: values[column] for column in (0, 1, width // 2, width - 1)}
        check_gradient(line.t(), rows_of, target[0, 0], 1 / (height * width))
