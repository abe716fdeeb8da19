"""Which devices the tests run on, and why one is left out.

A module that has `pytestmark = every_device` runs all its tests on each: what they create without
naming a device is then on that one. Without a GPU the CUDA half is not collected at all, and the
head of the report says so; `pytest -m cuda` is that half alone.
"""

import pytest
import torch

from fused_ce import ops


def missing_for_cuda():
    """What keeps the CUDA tests from running here; empty if nothing does."""
    if not torch.cuda.is_available():
        return "there is no GPU that this torch can use"
    return ops.lacking("cuda", torch.cuda.current_device()) or ""


MISSING = missing_for_cuda()
DEVICES = ("cpu",) if MISSING else ("cpu", pytest.param("cuda", marks=pytest.mark.cuda))
every_device = pytest.mark.usefixtures("device")
# For a test of such a module that is about the CPU: its threads, or stock's order of additions.
on_cpu = pytest.mark.parametrize("device", ["cpu"], indirect=True)
