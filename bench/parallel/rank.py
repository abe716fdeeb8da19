"""One rank at work, in a process of its own with one thread.

All ranks go through the same providers and rounds, since each call of one is a call of all. A
sample is the time from one barrier to the next, as the slowest rank has it.
"""

import os
import random
from datetime import timedelta
from functools import partial
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.common import memory
from bench.common.made import Box
from bench.common.measure import Effort
from bench.common.precision import check
from bench.parallel.cases import Sharded
from bench.parallel.providers import PROVIDERS
from bench.parallel.tensors import RankTensors

NAMES = ("loss", "gradient")


class Rank:
    """What a :class:`bench.common.process.Worker` holds."""

    def __init__(self, case: Sharded, rank: int, port: int) -> None:
        self.case, self.rank, self.port = case, rank, port

    def _begin(self) -> RankTensors:
        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{self.port}",
            rank=self.rank,
            world_size=self.case.ranks,
            timeout=timedelta(seconds=120),
        )
        return RankTensors(self.case, self.rank)

    def times(self, effort: Effort) -> dict[str, list[float]]:
        """Milliseconds of each provider. Raises for an answer that is wrong."""
        tensors = self._begin()
        calls = {name: make(tensors) for name, make in PROVIDERS.items()}
        reference = tensors.reference()
        for name, call in calls.items():
            if call is not None:
                check(call(tensors.logits(name)), reference, NAMES, "fp32")
        del reference
        order, samples = random.Random(0), {name: [] for name in calls}
        start = perf_counter()
        for done in range(effort.most):
            if done >= effort.least and self._agree(perf_counter() - start) > effort.seconds:
                break
            for name in order.sample(list(calls), len(calls)):
                samples[name].append(self._sample(calls[name], tensors.logits(name)))
        self._end()
        return samples

    def _sample(self, call: Any, logits: Box) -> float:
        dist.barrier()
        start = perf_counter()
        answer = None if call is None else call(logits)
        dist.barrier()
        elapsed = perf_counter() - start
        del answer
        return elapsed * 1e3

    def _agree(self, seconds: float) -> float:
        """On the first rank's clock, or the ranks would go different numbers of rounds."""
        found = torch.tensor(seconds)
        dist.broadcast(found, 0)
        return float(found)

    def weigh(self, name: str) -> tuple[int | None, int]:
        """The memory that one call takes on this rank, and how many collectives."""
        memory.keep_nothing_freed()
        tensors = self._begin()
        call = PROVIDERS[name](tensors)
        peak = collectives = None
        if call is not None:
            call(tensors.logits(name))
            peak = memory.rise(partial(call, tensors.logits(name)))
            collectives = _collectives_of(partial(call, tensors.logits(name)))
        dist.barrier()
        self._end()
        return peak, collectives

    def _end(self) -> None:
        dist.barrier()


def _collectives_of(call: Any) -> int:
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as communication:
        found: tuple[Tensor, Tensor] = call()
    del found
    return communication.get_total_counts()
