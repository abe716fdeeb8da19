"""Measures a case: all providers on one group of ranks, the memory of each on one of its own."""

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from bench.common import process
from bench.common.figures import Figures
from bench.common.measure import Effort
from bench.common.process import Notice
from bench.parallel.cases import Sharded
from bench.parallel.providers import PROVIDERS
from bench.parallel.rank import Rank


@dataclass(kw_only=True)
class ShardedFigures(Figures):
    case: Sharded
    collectives: int | None = None
    ratios: list[float] = field(default_factory=list)  # to loss_parallel in the same round
    to_unsharded: list[float] = field(default_factory=list)  # its time, in the same round

    @property
    def subject(self) -> str:
        return f"{self.provider}, {self.case.name}"

    @property
    def ratio(self) -> float | None:
        return median(self.ratios) if self.ratios else None

    @property
    def share(self) -> float | None:
        return median(self.to_unsharded) if self.to_unsharded else None

    def as_data(self) -> dict[str, Any]:
        return {
            "provider": self.provider,
            "case": {"name": self.case.name, **asdict(self.case)},
            "reason": self.reason,
            "median_ms": self.median,
            "times_as_fast_as_loss_parallel": self.ratio,
            "time_over_unsharded": self.share,
            "collectives": self.collectives,
            "peak_extra_bytes": self.peak,
            "samples_ms": [round(sample, 3) for sample in self.samples],
        }


def on_all_ranks(case: Sharded, method: str, *arguments: Any) -> list[Any]:
    """What the method gives on each rank of a new group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ExitStack() as stack, ThreadPoolExecutor(case.ranks) as pool:
        ranks = [Rank(case, rank, port) for rank in range(case.ranks)]
        workers = [stack.enter_context(process.Worker(rank)) for rank in ranks]
        return list(pool.map(lambda worker: worker.ask(method, *arguments), workers))


def notices(cases: Sequence[Sharded]) -> int:
    return len(cases) * (len(PROVIDERS) + 1)


def measure(case: Sharded, effort: Effort, notice: Notice) -> list[ShardedFigures]:
    figures = [ShardedFigures(name, case=case) for name in PROVIDERS]
    notice(f"{case.name}: timing")
    try:
        samples, *_ = on_all_ranks(case, "times", effort)
    except process.Failed as failure:
        for found in figures:
            found.reason = str(failure)
        return figures
    for found in figures:
        found.samples = samples[found.provider]
        pairs = zip(samples["loss_parallel"], samples["unsharded"], found.samples, strict=True)
        for stock, unsharded, own in pairs:
            found.ratios.append(stock / own)
            found.to_unsharded.append(own / unsharded)
        notice(f"{case.name}: memory of {found.provider}")
        try:
            found.peak, found.collectives = on_all_ranks(case, "weigh", found.provider)[0]
        except process.Failed as failure:
            found.reason = f"memory: {failure}"
    return figures
