"""How much memory a call takes beyond its arguments, their gradients, and the float32 sum of the
weight's gradient: what a chunk may take, and not the logits.

Each call is measured by the system, in a process of its own that has made the same call before.
"""

import sys

import pytest
import torch
from support.linear_reference import gemms, stock_loss
from support.memory import MEGABYTE, ONE_PROGRAM, SLACK, Measurements, reset_peak, status

import fused_ce

# Rows, features and classes: 200 MB of float32 logits, and gradients that are small beside a chunk,
# as are the products of matrices, which in bfloat16 take seconds on many a processor; and rows of
# input that are much wider than their logits.
SIZES, WIDE = (1600, 4, 32768), (4096, 4096, 64)
BUDGET = 16 * MEGABYTE
DEFAULT = 64 * MEGABYTE

# name: (function, options, dtype, probability targets)
CALLS = {
    "stock": ("stock", {}, "float32", False),
    "default": ("ours", {}, "float32", False),
    "budget": ("ours", {"max_chunk_bytes": BUDGET}, "float32", False),
    "budget, all options": (
        "ours",
        {"max_chunk_bytes": BUDGET, "label_smoothing": 0.1, "weight": True, "linear_bias": True},
        "float32",
        False,
    ),
    "budget, bfloat16": (
        "ours",
        {"max_chunk_bytes": BUDGET, "linear_bias": True},
        "bfloat16",
        False,
    ),
    "budget, float16": ("ours", {"max_chunk_bytes": BUDGET}, "float16", False),
    "budget, float16, wide": ("ours", {"max_chunk_bytes": BUDGET}, "float16", False),
    "budget, none": ("ours", {"max_chunk_bytes": BUDGET, "reduction": "none"}, "float32", False),
    "budget, recompute": (
        "ours",
        {"max_chunk_bytes": BUDGET, "grad_in_forward": False},
        "bfloat16",
        False,
    ),
    "budget, probabilities": ("ours", {"max_chunk_bytes": BUDGET}, "float32", True),
    "budget, probabilities, bfloat16": ("ours", {"max_chunk_bytes": BUDGET}, "bfloat16", True),
    "budget, next token": ("ours", {"max_chunk_bytes": BUDGET}, "float32", True),
    "budget, next token, bfloat16": ("ours", {"max_chunk_bytes": BUDGET}, "bfloat16", True),
    "budget, no grad": ("ours", {"max_chunk_bytes": BUDGET, "no_grad": True}, "float32", False),
}

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status"),
    ONE_PROGRAM,
]


@pytest.fixture(scope="module")
def extra_memory():
    """What a call takes at its peak, and that without gradients and their sums, in bytes."""
    measurements = Measurements(__file__)

    def of(call):
        extra, gradients = measurements.of(call)
        print(f"{call}: {extra} bytes, {gradients} of them gradients and weights in another type")
        return extra, extra - gradients

    return of


# By default, the calls that take the most besides their logits.
OFTEN = ("budget, all options", "budget, bfloat16", "budget, float16, wide", "budget, next token")


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow)
        for name in CALLS
        if name.startswith("budget")
    ],
)
def test_budget_of_memory_is_kept(extra_memory, call):
    taken, without_gradients = extra_memory(call)
    assert without_gradients <= 1.05 * BUDGET + SLACK
    # And it is used: the measurement itself sees a chunk. (Of the gradients it may see less, where
    # they lie in what the small call has left.)
    assert taken > BUDGET / 2


@pytest.mark.slow
def test_default_budget_of_memory_is_kept(extra_memory):
    taken, without_gradients = extra_memory("default")
    assert without_gradients <= 1.05 * DEFAULT + SLACK
    assert taken > DEFAULT / 2


@pytest.mark.slow
def test_stock_takes_more_than_ours(extra_memory):
    assert extra_memory("stock")[1] > 5 * DEFAULT


def scratch_of_gemm(rows, features, classes, dtype):
    """What the library takes for itself while it computes a chunk's logits: on some processors a
    float32 copy of a bfloat16 result."""
    input, weight = torch.randn(rows, features).to(dtype), torch.randn(classes, features).to(dtype)
    logits = torch.zeros(rows, classes, dtype=dtype)
    torch.mm(input, weight.t(), out=logits)
    before = reset_peak()
    torch.mm(input, weight.t(), out=logits)
    return status("VmHWM") - before


def measure(name):
    which, options, dtype, probabilities = CALLS[name]
    function = stock_loss if which == "stock" else fused_ce.linear_cross_entropy
    options, dtype = dict(options), getattr(torch, dtype)
    no_grad = options.pop("no_grad", False)
    all_rows, features, classes = WIDE if name.endswith("wide") else SIZES
    for option in ("weight", "linear_bias"):
        if option in options:
            options[option] = torch.rand(classes, dtype=dtype)

    def problem(rows):
        layer = torch.randn(rows, features).to(dtype), torch.randn(classes, features).to(dtype)
        target = torch.randint(classes, (rows,))
        if probabilities:
            target = torch.ones(rows, classes, dtype=dtype)  # quickly made
        if "next token" in name:
            # Not a multiple of a chunk's rows, which then lie in several of the batch.
            layer = layer[0].view(32, rows // 32, features), layer[1]
            target = torch.ones(32, rows // 32 + 1, classes, dtype=dtype)[:, 1:]
        return *(t.requires_grad_(not no_grad) for t in layer), target

    def call(input, linear_weight, target):
        loss = function(input, linear_weight, target, **options)
        if not no_grad:
            loss.backward(torch.ones_like(loss))

    from bench.common.memory import keep_nothing_freed

    keep_nothing_freed()
    with gemms() as shapes:
        # It leaves nothing behind but what the library of the GEMMs keeps.
        call(*problem(all_rows // 2))
    chunk_rows = max((rows for rows, columns in shapes if columns == classes), default=0)
    input, linear_weight, target = problem(all_rows)
    before = reset_peak()
    call(input, linear_weight, target)
    extra = status("VmHWM") - before
    apart = 0 if no_grad else input.nbytes + linear_weight.nbytes
    if dtype != torch.float32:
        apart += 4 * linear_weight.numel() * (dtype == torch.float16)  # the weight as float32
        apart += 4 * linear_weight.numel()  # the sum
    computed = torch.float32 if dtype == torch.float16 else dtype
    return extra, apart + scratch_of_gemm(chunk_rows, features, classes, computed)
