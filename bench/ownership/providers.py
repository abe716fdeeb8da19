"""Who is measured: stock, the same compiled, and fused_ce in three modes.

A provider gives a loss of logits and target. Whoever calls it holds the logits or does not.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common.made import Box
from bench.ownership.cases import HELD
from bench.ownership.tensors import StepTensors

Loss = Callable[[Tensor, Tensor], Tensor]


def stock() -> Loss:
    return F.cross_entropy


def compiled() -> Loss:
    return torch.compile(F.cross_entropy, fullgraph=True, dynamic=False)


def _ours(inplace: bool | str) -> Loss:
    from fused_ce import CrossEntropyLoss

    return CrossEntropyLoss(inplace=inplace)


PROVIDERS: dict[str, Callable[[], Loss]] = {
    "stock": stock,
    "compile": compiled,
    "fused": lambda: _ours(False),
    "auto": lambda: _ours("auto"),
    "inplace": lambda: _ours(True),
}
OURS = "fused", "auto", "inplace"


def step(
    name: str, tensors: StepTensors, loop: str, grad_output: float
) -> Callable[[Box], tuple[Tensor, Tensor]]:
    """The loss of a training step and its backward; answers with the loss and the gradient."""
    loss_of, target = PROVIDERS[name](), tensors.target
    # None is what loss.backward() passes; it stands for 1.
    arriving = None if grad_output == 1.0 else torch.tensor(grad_output)

    def free(box: Box) -> tuple[Tensor, Tensor]:
        loss = loss_of(box.pop(), target)
        loss.backward(arriving)
        return loss.detach(), box.pop()

    def held(box: Box) -> tuple[Tensor, Tensor]:
        logits = box.pop()
        loss = loss_of(logits, target)
        loss.backward(arriving)
        return loss.detach(), box.pop()

    return held if loop == HELD else free
