"""The logits whose log-probabilities and entropies are measured, and a head."""

from dataclasses import dataclass

from bench.common.precision import DTYPES


@dataclass(frozen=True)
class Rows:
    rows: int
    classes: int
    dtype: str = "fp32"
    features: int = 0  # of a head; without, the logits are given

    @property
    def name(self) -> str:
        size = f"{self.rows}x{self.classes}"
        return (
            f"{size}-head-{self.features}-{self.dtype}" if self.features else f"{size}-{self.dtype}"
        )

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.classes * DTYPES[self.dtype].itemsize


# Vocabularies in the types that policies are trained in, one of a row that fits a core's cache, and
# an action space, whose rows are lanes.
CASES = [
    Rows(1024, 32000),
    Rows(1024, 32000, "bf16"),
    Rows(256, 128256),
    Rows(65536, 18),
    Rows(1024, 32000, "bf16", 768),
]
QUICK = [Rows(64, 500), Rows(64, 500, "bf16", 16)]
