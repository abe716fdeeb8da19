"""``python -m fused_ce``: what is installed, whether it is right here, and a script run on it.

python -m fused_ce                       what a report of a problem needs
python -m fused_ce check                 a few dozen calls beside stock PyTorch
python -m fused_ce run SCRIPT [ARGS]     the script, with torch's losses replaced by these
python -m fused_ce run -m MODULE [ARGS]
"""

import argparse
import os
import platform
import runpy
import sys

import torch

import fused_ce

from . import checking, ops
from .explaining import explain_call


def report() -> None:
    """One fact a line."""
    kernels = "in this build" if ops.has_cuda_kernels else "not in this build"
    print(f"fused_ce     {fused_ce.__version__}, {ops.LIBRARY}")
    print(f"torch        {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"python       {platform.python_version()}, {platform.platform()}")
    print(f"CPU          {ops.instruction_set()}")
    print(f"CUDA         kernels {kernels}; {_gpus()}")
    for device in _devices():
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.zeros(4, 10, dtype=dtype, device=device, requires_grad=True)
            target = torch.zeros(4, dtype=torch.int64, device=device)
            said = explain_call(fused_ce.cross_entropy, logits, target)
            name = str(dtype).removeprefix("torch.")
            print(f"{f'{name} on {device}':20} {said}")


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))


def _devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def run(command: list[str]) -> None:
    """As Python runs a script or a module, whose arguments and folder come first."""
    is_module = command[:1] == ["-m"]
    names = command[1:] if is_module else command
    if not names:
        sys.exit("fused_ce: expected a script to run, got none; name it after `run`.")
    patched = fused_ce.patch()
    print(f"fused_ce: {', '.join(patched.names)} of torch.nn.functional are fused", file=sys.stderr)
    sys.argv = names
    if is_module:
        sys.path[0] = os.getcwd()
        runpy.run_module(names[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(names[0]))
        runpy.run_path(names[0], run_name="__main__")


def main(arguments: list[str]) -> int:
    # What follows `run` is the script's.
    if arguments[:1] == ["run"]:
        run(arguments[1:])
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m fused_ce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", choices=["check", "run"], help="default: a report")
    parser.add_argument("--device", help="of the check; default: a GPU if the build has kernels")
    asked = parser.parse_args(arguments)
    if asked.command is None:
        report()
        return 0
    has_gpu = torch.cuda.is_available() and ops.lacking("cuda", 0) is None
    return min(checking.run(asked.device or ("cuda" if has_gpu else "cpu"), print), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
