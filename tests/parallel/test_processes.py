"""The loss of sharded classes between processes: compiled, and with hooks on what it saves."""

import pytest
from support.processes import environment, finish


@pytest.mark.slow  # three processes that start torch, and compile
def test_processes_meet():
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    env = environment() | {"GLOO_SOCKET_IFNAME": "lo"}
    done = finish(*torchrun, "tests/parallel/in_processes.py", env=env)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    lines = [
        "compiled by eager",
        "compiled by aot_eager",
        "compiled by inductor",
        "a compiled head",
        "hooks on saved tensors",
        "an error of both: fused_ce: the options of rank 1 differ from those of rank 0; pass the "
        "same",
    ]
    assert said == lines
