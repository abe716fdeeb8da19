"""What differs from one kind of device to the next: the clock, and the account of memory.

On the CPU a call has ended when it returns, and the system keeps a high-water mark of the memory of
the process. On CUDA, events mark the time on the device, calls go round buffers that together
outgrow the cache, and the allocator keeps a high-water mark of its own.
"""

import subprocess
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.common import memory

Call = Callable[[Tensor], Any]  # tensor in, loss (and gradients) out

# Logits so small that a call is over before a stray interrupt or the clock itself stops mattering
# are timed in bursts.
SMALL, BURST = 64 * 1024, 32

# CUDA: how many times the cache the logits of one sample are, and what the host may take to queue a
# call, in cycles of the device.
RING, CYCLES_TO_QUEUE = 4, 400_000


def ring(logits_bytes: int, cache_bytes: int) -> int:
    """How many logits of that size one sample needs, for none to be in the cache from before."""
    if logits_bytes < SMALL:
        return BURST
    return max(1, min(BURST, ceil(RING * cache_bytes / logits_bytes)))


def driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


class Device(Protocol):
    name: str
    counts_memory: bool  # exactly, whatever a process has done before

    def missing(self) -> str:
        """Why nothing can be measured on it; empty if something can."""

    def model(self) -> str: ...

    def facts(self) -> dict[str, Any]:
        """What else a figure has to be read with."""

    def calls(self, logits_bytes: int) -> int:
        """How many calls, each on logits of its own, one sample takes."""

    def milliseconds(self, call: Call, inputs: Sequence[Tensor]) -> float:
        """For one call on each of the inputs."""

    def keep_nothing_freed(self) -> None:
        """For the rest of this process, so that memory used again counts again in `rise`."""

    def rise(self, call: Callable[[], object]) -> int | None:
        """The most bytes in use during the call, beyond those before; None if nobody counts."""


class Cpu:
    name = "cpu"
    counts_memory = False

    def missing(self) -> str:
        return ""

    def facts(self) -> dict[str, Any]:
        return {}

    def calls(self, logits_bytes: int) -> int:
        return BURST if logits_bytes < SMALL else 1

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
        memory.keep_nothing_freed()

    def rise(self, call: Callable[[], object]) -> int | None:
        return memory.rise(call)


class Cuda:
    name = "cuda"
    counts_memory = True

    def missing(self) -> str:
        if torch.cuda.is_available():
            return ""
        return f"there is no GPU here that torch {torch.__version__} can use; leave --device out"

    def facts(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties()
        return {
            "driver": driver_version(),
            "cuda": torch.version.cuda,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cache_bytes": properties.L2_cache_size,
        }

    def calls(self, logits_bytes: int) -> int:
        return ring(logits_bytes, torch.cuda.get_device_properties().L2_cache_size)

    def model(self) -> str:
        return torch.cuda.get_device_name()

    def milliseconds(self, call: Call, inputs: Sequence[Tensor]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # What the host takes to queue a call is hidden behind a wait of the device, except where
        # that is all there is to measure. Who waits for the device in between pays for it.
        if inputs[0].nbytes >= SMALL:
            self.empty_cache()
            torch.cuda._sleep(CYCLES_TO_QUEUE * len(inputs))
        start.record()
        # All are kept: a gradient written where the last one was would find it in the cache.
        answers = [call(logits) for logits in inputs]
        end.record()
        torch.cuda.synchronize()
        del answers
        return start.elapsed_time(end)

    def empty_cache(self) -> None:
        """Of the device itself: the logits have just been written, and their last part is there."""
        cache_bytes = torch.cuda.get_device_properties().L2_cache_size
        torch.empty(RING * cache_bytes, dtype=torch.uint8, device="cuda").zero_()

    def keep_nothing_freed(self) -> None:
        """The allocator counts what is in use, not what it keeps."""

    def rise(self, call: Callable[[], object]) -> int | None:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before


DEVICES: dict[str, Device] = {device.name: device for device in (Cpu(), Cuda())}
