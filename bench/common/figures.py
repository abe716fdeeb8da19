"""What was measured of one provider, and the JSON that a run leaves behind.

A figure that was not measured is None here, a dash on the terminal and absent from the charts, and
`reason` says why. Every sample goes into the file, so that a reader can judge more than medians.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

FORWARD, BOTH, COPY = "forward", "forward+backward", "copy"


@dataclass
class Figures:
    """One provider in one pass."""

    provider: str
    which: str = BOTH
    calls: int = 1  # in one sample
    samples: list[float] = field(default_factory=list)  # milliseconds of one call
    peak: int | None = None  # bytes beyond what was there before the call
    reason: str = ""

    @property
    def subject(self) -> str:
        return f"{self.provider}, {self.which}"

    @property
    def median(self) -> float | None:
        return median(self.samples) if self.samples else None

    @property
    def minimum(self) -> float | None:
        return min(self.samples, default=None)


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, indent=1)
    # A list of numbers on one line: a sample a line would make a file nobody scrolls through.
    text = re.sub(r"\[([\d\s.,e+-]+)\]", lambda list: f"[{' '.join(list[1].split())}]", text)
    path.write_text(text + "\n")
