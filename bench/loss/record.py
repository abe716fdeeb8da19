"""What was measured of one case of the loss: each provider beside stock and beside the copy."""

from dataclasses import asdict, dataclass
from typing import Any

from bench.common.figures import COPY, Figures
from bench.loss.cases import Case


@dataclass
class LossFigures(Figures):
    traffic: int = 0  # bytes that the pass has to move; see LossTensors.traffic
    path: str = ""  # that fused_ce takes, in its own words

    @property
    def bandwidth(self) -> float | None:
        """GB/s of the traffic the pass cannot avoid, whatever the provider moved besides."""
        return self.traffic / self.median / 1e6 if self.median else None


@dataclass
class Record:
    """One case."""

    case: Case
    threads: int
    results: list[LossFigures]

    def find(self, provider: str, which: str) -> LossFigures | None:
        for result in self.results:
            if (result.provider, result.which) == (provider, which):
                return result
        return None

    def ratio(self, provider: str, which: str) -> float | None:
        """How many times faster than stock; the copy is held against any pass."""
        stock = self.find("stock", which)
        other = self.find(provider, COPY if provider == COPY else which)
        if stock is None or other is None or not stock.median or not other.median:
            return None
        return stock.median / other.median

    def share_of_copy(self, result: LossFigures) -> float | None:
        copy = self.find("copy", COPY)
        if copy is None or not copy.bandwidth or not result.bandwidth:
            return None
        return result.bandwidth / copy.bandwidth

    def as_data(self) -> dict[str, Any]:
        return {
            "name": self.case.name,
            **asdict(self.case),
            "threads": self.threads,
            "logits_bytes": self.case.logits_bytes,
            "results": [self._result_data(result) for result in self.results],
        }

    def _result_data(self, result: LossFigures) -> dict[str, Any]:
        return {
            "provider": result.provider,
            "pass": result.which,
            "path": result.path,
            "reason": result.reason,
            "median_ms": result.median,
            "min_ms": result.minimum,
            "traffic_bytes": result.traffic,
            "gb_per_s": result.bandwidth,
            "share_of_copy": self.share_of_copy(result),
            "ratio_to_stock": self.ratio(result.provider, result.which),
            "peak_extra_bytes": result.peak,
            "calls_per_sample": result.calls,
            "samples_ms": [round(sample, 6) for sample in result.samples],
        }
