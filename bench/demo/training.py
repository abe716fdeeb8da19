"""Trains one model per loss, side by side: same seed, same batches, in the same step.

Every step runs stock and fused one after the other, so whatever else the machine is doing slows
both alike and their times can be compared. The model's output is detached for the loss and the
gradient is handed back by hand; what the clock sees is the loss alone, forward and backward.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor, nn

LOSS_NAMES = ("stock", "fused")

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    name: str
    about: str
    make_model: Callable[[], nn.Module]
    make_batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]]  # seed -> endless batches
    logits_shape: tuple[int, int]  # of one step: rows, classes
    learning_rate: float
    steps: int
    # Of the states that the model gives where the loss takes in the model's `head` too, a linear
    # layer; else None, and the model gives logits.
    features: int | None = None


@dataclass
class Run:
    """What one model has been through, step by step."""

    losses: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)


def make_loss(name: str, head: nn.Linear | None = None) -> Loss:
    """A loss of logits, or of what the head would make logits of."""
    if name == "stock":
        loss = nn.CrossEntropyLoss()
        return loss if head is None else lambda states, target: loss(head(states), target)
    # Imported here so that `--loss stock` runs on a machine where nothing has been built.
    import fused_ce

    if head is None:
        return fused_ce.CrossEntropyLoss()
    return lambda states, target: fused_ce.linear_cross_entropy(
        states, head.weight, target, linear_bias=head.bias
    )


def timed_loss(loss: Loss, output: Tensor, target: Tensor) -> tuple[float, Tensor, float]:
    """The loss, its gradient with respect to the model's output, and the milliseconds both took.
    Those of the head come as well, in its parameters' `.grad`."""
    leaf = output.detach().requires_grad_()
    start = perf_counter()
    value = loss(leaf, target)
    value.backward()
    elapsed = perf_counter() - start
    return value.item(), leaf.grad, elapsed * 1e3


def train(task: Task, names: Sequence[str], steps: int, seed: int) -> Iterator[dict[str, Run]]:
    """Yields the runs after every step; the same objects each time, one entry longer."""
    runs = {name: Run() for name in names}
    losses, models, optimizers = {}, {}, {}
    for name in names:
        torch.manual_seed(seed)
        models[name] = task.make_model()
        losses[name] = make_loss(name, models[name].head if task.features else None)
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
            output = models[name](inputs)
            optimizers[name].zero_grad()
            value, gradient, milliseconds = timed_loss(losses[name], output, target)
            output.backward(gradient)
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
