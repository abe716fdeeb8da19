"""What differs from one kind of device to the next: the clock, and the account of memory.

On the CPU a call has ended when it returns, and the most memory it took is the high-water mark of
a fresh process, see `memory.py`. On CUDA, events mark the time on the device, and the allocator
keeps a high-water mark of its own.
"""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor

from bench import memory
from bench.cases import Case
from bench.problem import BOTH, Problem
from bench.providers import Call, make_call, passes_of


class Device(Protocol):
    name: str

    def is_here(self) -> bool: ...

    def model(self) -> str: ...

    def milliseconds(self, call: Call, inputs: Sequence[Tensor]) -> float:
        """For one call on each of the inputs."""

    def peaks(self, case: Case, provider: str) -> dict[str, int | None]:
        """For each pass the bytes it takes beyond what it is given; None if nobody keeps count."""


class Cpu:
    name = "cpu"

    def is_here(self) -> bool:
        return True

    def model(self) -> str:
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
        except OSError:
            return ""
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return models[0] if models else ""

    def milliseconds(self, call: Call, inputs: Sequence[Tensor]) -> float:
        start = perf_counter()
        for logits in inputs:
            answer = call(logits)
        elapsed = perf_counter() - start
        # The last answer is given back after the clock has stopped: freeing a gradient is the
        # business of whoever used it.
        del answer
        return elapsed * 1e3

    def peaks(self, case: Case, provider: str) -> dict[str, int | None]:
        return memory.peaks(case, provider)


class Cuda:
    name = "cuda"

    def is_here(self) -> bool:
        return torch.cuda.is_available()

    def model(self) -> str:
        return torch.cuda.get_device_name()

    def milliseconds(self, call: Call, inputs: Sequence[Tensor]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for logits in inputs:
            answer = call(logits)
        end.record()
        torch.cuda.synchronize()
        del answer
        return start.elapsed_time(end)

    def peaks(self, case: Case, provider: str) -> dict[str, int | None]:
        problem = Problem(case, self.name)
        found = {}
        for which in passes_of(provider, case):
            call = make_call(provider, which, problem)
            (logits,) = problem.inputs(1)
            with torch.set_grad_enabled(which == BOTH):
                call(logits)
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                call(logits)
            found[which] = torch.cuda.max_memory_allocated() - before
        return found


DEVICES: dict[str, Device] = {device.name: device for device in (Cpu(), Cuda())}
