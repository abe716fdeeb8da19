"""Trains one model per loss, side by side: same seed, same batches, in the same step.

Every step runs stock and fused one after the other, so whatever else the machine is doing slows
both alike and their times can be compared. The logits are detached for the loss and the gradient
is handed back to the model by hand; what the clock sees is the loss alone, forward and backward.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor, nn

LOSS_NAMES = ("stock", "fused")


@dataclass(frozen=True)
class Task:
    name: str
    about: str
    make_model: Callable[[], nn.Module]
    make_batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]]  # seed -> endless batches
    logits_shape: tuple[int, int]  # of one step: rows, classes
    learning_rate: float
    steps: int


@dataclass
class Run:
    """What one model has been through, step by step."""

    losses: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)


def make_loss(name: str) -> nn.Module:
    if name == "stock":
        return nn.CrossEntropyLoss()
    # Imported here so that `--loss stock` runs on a machine where nothing has been built.
    import fused_ce

    return fused_ce.CrossEntropyLoss()


def timed_loss(loss: nn.Module, logits: Tensor, target: Tensor) -> tuple[float, Tensor, float]:
    """The loss, its gradient with respect to the logits, and the milliseconds both took."""
    leaf = logits.detach().requires_grad_()
    start = perf_counter()
    value = loss(leaf, target)
    value.backward()
    elapsed = perf_counter() - start
    return value.item(), leaf.grad, elapsed * 1e3


def train(task: Task, names: Sequence[str], steps: int, seed: int) -> Iterator[dict[str, Run]]:
    """Yields the runs after every step; the same objects each time, one entry longer."""
    runs = {name: Run() for name in names}
    losses = {name: make_loss(name) for name in names}
    models, optimizers = {}, {}
    for name in names:
        torch.manual_seed(seed)
        models[name] = task.make_model()
        # SGD because it follows the gradient's size: Adam divides a constant factor away, and a
        # mean over the wrong count, a likely fault of a loss, would leave its curve untouched.
        optimizers[name] = torch.optim.SGD(
            models[name].parameters(), lr=task.learning_rate, momentum=0.9
        )

    batches = task.make_batches(seed)
    for step in range(steps):
        inputs, target = next(batches)
        # In turn, or a scheduler with a rhythm of its own could fall on the same one every time.
        for name in names if step % 2 == 0 else reversed(names):
            run = runs[name]
            logits = models[name](inputs)
            value, gradient, milliseconds = timed_loss(losses[name], logits, target)
            optimizers[name].zero_grad()
            logits.backward(gradient)
            optimizers[name].step()
            run.losses.append(value)
            run.milliseconds.append(milliseconds)
        yield runs


def shuffled_batches(
    inputs: Tensor, targets: Tensor, size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch in a new order; a short last batch is dropped to keep one logits shape."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(inputs), generator=generator)
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            yield inputs[chosen], targets[chosen].flatten()
