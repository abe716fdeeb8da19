"""What was measured of one provider on one head."""

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from bench.common.figures import Figures
from bench.heads.cases import Head


@dataclass(kw_only=True)
class HeadFigures(Figures):
    head: Head
    ratios: list[float] = field(default_factory=list)  # to the GEMMs of the same round

    @property
    def subject(self) -> str:
        return f"{self.provider}, {self.head.name}"

    @property
    def tflops(self) -> float | None:
        return self.head.flops / self.median / 1e9 if self.median else None

    @property
    def ratio(self) -> float | None:
        return median(self.ratios) if self.ratios else None

    def as_data(self) -> dict[str, Any]:
        head = {"name": self.head.name, **asdict(self.head), "bytes": self.head.bytes}
        return {
            "provider": self.provider,
            "head": head,
            "reason": self.reason,
            "median_ms": self.median,
            "tflops": self.tflops,
            "ratio_to_gemms": self.ratio,
            "peak_extra_bytes": self.peak,
            "samples_ms": [round(sample, 3) for sample in self.samples],
        }
