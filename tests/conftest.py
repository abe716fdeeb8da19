"""Every test starts from the same random state and leaves the number of threads as it was."""

import fcntl
import os

import pytest
import torch
from support import simulated
from support.devices import DEVICES, MISSING


def pytest_report_header():
    return f"without CUDA: {MISSING}" if MISSING else None


@pytest.fixture(autouse=True)
def fixed_seed_and_threads():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


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
def once_a_run(tmp_path_factory):
    """Makes a folder's contents in one of the processes of a run, for all of them."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def once(name, make):
        made = shared / name
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                unfinished = shared / f"{name}.unfinished"
                unfinished.mkdir(exist_ok=True)
                make(unfinished)
                unfinished.rename(made)
        return made

    return once


@pytest.fixture(scope="session")
def kernels(once_a_run):
    """The CUDA kernels on the simulator."""
    with simulated.Kernels(once_a_run("simulator", simulated.build)) as kernels:
        yield kernels
