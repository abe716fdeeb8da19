"""What one loss of the demo takes, forward and backward, measured in a fresh process."""

import torch
from torch import nn

from bench.common import memory, process
from bench.demo.training import make_loss, timed_loss


def peak_here(name: str, rows: int, classes: int, features: int | None) -> int | None:
    memory.keep_nothing_freed()
    head = nn.Linear(features, classes) if features else None
    loss = make_loss(name, head)
    output, target = torch.randn(rows, features or classes), torch.randint(classes, (rows,))

    def call() -> None:
        timed_loss(loss, output, target)
        if head is not None:
            head.zero_grad()

    call()  # library code, the stacks of threads and autograd's own tables are in place after it
    return memory.rise(call)


def measure_peak(name: str, rows: int, classes: int, features: int | None = None) -> int | None:
    """Bytes that one loss takes beyond its logits. With `features`, the loss of a head of so many,
    beyond what the head is given."""
    return process.call(peak_here, name, rows, classes, features)
