"""A plugin for pytest: the tests judge the CUDA kernels on the simulator as they would on a GPU.

For test_package_on_simulator.py, which puts a package with such a library first on the path.
"""

import torch

import fused_ce


def pytest_report_header():
    how = fused_ce.explain(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    if not how.endswith("simulator"):
        raise RuntimeError(f"this is not the package on the simulator: {how}, {fused_ce.__file__}")
