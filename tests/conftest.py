"""Every test starts from the same random state and leaves the number of threads as it was."""

import gc
import re

import pytest
import torch
from support import grids, simulated, torchvision
from support.devices import DEVICES, MISSING

from fused_ce.linear import plan

torchvision.make_importable()


def pytest_configure(config):
    chosen = config.option.markexpr
    grids.without_slow = bool(re.search(r"\bnot slow\b", chosen)) and " or " not in chosen
    gc.disable()


def pytest_collection_finish():
    """What is there by now stays: no search for garbage, which some tests ask for, goes through it
    again."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_report_header():
    return f"without CUDA: {MISSING}" if MISSING else None


@pytest.fixture(autouse=True)
def fixed_seed_and_threads():
    with grids.as_a_test_begins():
        yield


@pytest.fixture(params=DEVICES, scope="module")
def device(request):
    """The device of everything that a test creates without naming one."""
    if request.param == "cpu":
        yield "cpu"  # and no mode of torch's in the way of each call
        return
    torch.set_default_device(request.param)
    yield request.param
    torch.set_default_device(None)


@pytest.fixture(scope="session")
def kernels():
    """The CUDA kernels on the simulator."""
    with simulated.Kernels(simulated.built("simulator")) as kernels:
        yield kernels


@pytest.fixture
def bfloat16_in_itself(monkeypatch):
    """A head's products, as where this processor has fast ones of the type."""
    cpu = plan.DEVICES["cpu"]._replace(gemm_dtype={torch.float16: torch.float32})
    monkeypatch.setitem(plan.DEVICES, "cpu", cpu)
