"""What differs from one kind of device to the next: the clock, and the account of memory.

On the CPU a call has ended when it returns, and the system keeps a high-water mark of the memory of
the process. On CUDA, events mark the time on the device, and the allocator keeps a high-water mark
of its own.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor

from bench import peak_memory
from bench.providers import Call


class Device(Protocol):
    name: str

    def is_here(self) -> bool: ...

    def model(self) -> str: ...

    def milliseconds(self, call: Call, inputs: Sequence[Tensor]) -> float:
        """For one call on each of the inputs."""

    def keep_nothing_freed(self) -> None:
        """For the rest of this process, so that memory used again counts again in `rise`."""

    def rise(self, call: Callable[[], object]) -> int | None:
        """The most bytes in use during the call, beyond those before; None if nobody counts."""


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

    def keep_nothing_freed(self) -> None:
        peak_memory.keep_nothing_freed()

    def rise(self, call: Callable[[], object]) -> int | None:
        return peak_memory.rise(call)


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

    def keep_nothing_freed(self) -> None:
        """The allocator counts what is in use, not what it keeps."""

    def rise(self, call: Callable[[], object]) -> int | None:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before


DEVICES: dict[str, Device] = {device.name: device for device in (Cpu(), Cuda())}
