"""Every test starts from the same random state and leaves the number of threads as it was."""

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seed_and_threads():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
