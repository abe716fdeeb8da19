"""Peak memory of one loss, forward and backward, beyond the logits: 1.0 logits, or O(rows).

Each measurement is a fresh process: this file run as a program makes the logits and a first small
call, so that threads and code are in memory, then resets the peak of its resident memory
(Linux keeps it as VmHWM) and prints by how much the call raised it.
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support.memory import LOGITS, MEGABYTE, PER_ROW, ROWS, SLACK, reset_peak, status
from support.processes import environment

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
    "no grad": ("ours", {}, "contiguous", "float32", None),
    "no grad, transposed": ("ours", {}, "transposed", "float32", None),
    "no grad, image": ("ours", {}, "image", "bfloat16", None),
}


def extra_memory(call):
    """What the call adds to the logits at its peak, in bytes, in a process of its own."""
    command = [sys.executable, __file__, call]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    extra, rows = map(int, result.stdout.split())
    print(f"{call}: {extra / LOGITS:.3f} logits, {extra} bytes")
    return extra, rows


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")


@pytest.mark.parametrize(
    "call", [name for name in CALLS if not name.startswith(("stock", "in place", "no grad"))]
)
def test_more_than_one_gradient_is_allocated(call):
    extra, rows = extra_memory(call)
    assert extra <= LOGITS + PER_ROW * rows + SLACK
    # And the gradient is there: the measurement itself sees 100 MB.
    assert extra > LOGITS - SLACK


@pytest.mark.parametrize(
    "call", [name for name in CALLS if name.startswith(("in place", "no grad"))]
)
def test_more_than_a_few_numbers_a_row_are_allocated(call):
    extra, rows = extra_memory(call)
    assert extra <= PER_ROW * rows + SLACK


def test_stock_takes_no_more_than_ours():
    # Otherwise the measurement is wrong, or the promise is worth nothing.
    extra, _ = extra_memory("stock")
    assert extra > 2 * LOGITS


def _measure(name):
    which, options, layout, dtype, scale = CALLS[name]
    function = F.cross_entropy if which == "stock" else fused_ce.cross_entropy
    dtype = getattr(torch, dtype)

    def problem(rows, bytes):
        classes = bytes // rows // dtype.itemsize
        shape, order = {
            "contiguous": ((rows, classes), (0, 1)),
            "transposed": ((classes, rows), (1, 0)),
            # Four images of rows / 4 pixels each, classes first or last.
            "image": ((4, classes, rows // 40, 10), (0, 1, 2, 3)),
            "channels_last": ((4, rows // 40, 10, classes), (0, 3, 1, 2)),
            "next token": ((8, rows // 8, classes), (0, 1, 2)),
        }[layout]
        memory = torch.randn(shape, dtype=dtype)
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
    print(status("VmHWM") - before, target.numel())


if __name__ == "__main__":
    _measure(sys.argv[1])
