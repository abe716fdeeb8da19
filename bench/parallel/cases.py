"""The logits whose classes are sharded."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sharded:
    rows: int
    classes: int
    ranks: int = 2

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.classes}-over-{self.ranks}"


# Llama 2's vocabulary and Llama 3's.
CASES = [Sharded(1024, 32000), Sharded(1024, 128256)]
QUICK = [Sharded(16, 100)]
