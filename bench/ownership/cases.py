"""The sizes of the logits, and what else a step may differ in."""

from dataclasses import dataclass

FREE, HELD = "free", "held"  # the logits, by a variable, until after the backward
GRAD_OUTPUTS = (1.0, 0.25)  # a plain step, and one of four whose gradients are accumulated


@dataclass(frozen=True)
class Size:
    rows: int
    classes: int

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.classes}"

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.classes * 4


# Llama 2's vocabulary: 10 MB, which the C library keeps when they are freed, 131 MB, 1 GB and 2 GB.
SIZES = [Size(rows, 32000) for rows in (80, 1024, 8192, 16384)]
QUICK = [Size(64, 500)]

# A round of all steps takes a minute from here on, and what disturbs it is a small part of each.
LARGE, FEW_ROUNDS = 2**29, 3

# Logits, what they are made of, and what stock's loss and the check of an answer take at most.
COPIES = 8


def which_of(loop: str, grad_output: float) -> str:
    return f"{loop}, grad {grad_output:g}"


STEPS = {which_of(loop, grad): (loop, grad) for loop in (FREE, HELD) for grad in GRAD_OUTPUTS}
