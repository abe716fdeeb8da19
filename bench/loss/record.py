"""What a run has measured, and the JSON it leaves behind.

A figure that was not measured is None here, a dash on the terminal and absent from the charts, and
`reason` says why. Every sample goes into the file, so that a reader can judge more than medians.
"""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.loss.cases import Case
from bench.loss.tensors import COPY


@dataclass
class Result:
    """One provider in one pass."""

    provider: str
    which: str
    traffic: int = 0  # bytes that the pass has to move; see Problem.traffic
    calls: int = 1  # in one sample
    samples: list[float] = field(default_factory=list)  # milliseconds of one call
    peak: int | None = None  # bytes beyond what was there before the call
    path: str = ""
    reason: str = ""

    @property
    def median(self) -> float | None:
        return median(self.samples) if self.samples else None

    @property
    def minimum(self) -> float | None:
        return min(self.samples, default=None)

    @property
    def bandwidth(self) -> float | None:
        """GB/s of the traffic the pass cannot avoid, whatever the provider moved besides."""
        return self.traffic / self.median / 1e6 if self.median else None


@dataclass
class Record:
    """One case."""

    case: Case
    threads: int
    results: list[Result]

    def find(self, provider: str, which: str) -> Result | None:
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

    def share_of_copy(self, result: Result) -> float | None:
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

    def _result_data(self, result: Result) -> dict[str, Any]:
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


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, indent=1)
    # A list of numbers on one line: a sample a line would make a file nobody scrolls through.
    text = re.sub(r"\[([\d\s.,e+-]+)\]", lambda list: f"[{' '.join(list[1].split())}]", text)
    path.write_text(text + "\n")
