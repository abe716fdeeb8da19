"""timm's Mixup: labels become class probabilities, which the fused loss takes as they are.

timm has SoftTargetCrossEntropy for them, in four passes over the logits; here it is the same
CrossEntropyLoss that takes class indices. A tiny network sees random images in ten colours. Run it
with `python examples/timm_mixup.py` (it needs timm).
"""

import numpy
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import nn

import fused_ce

CLASSES, STEPS = 10, 41


def train(criterion: nn.Module) -> list[float]:
    torch.manual_seed(0)
    numpy.random.seed(0)  # which timm draws from
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    colours = torch.rand(CLASSES, 3, 1, 1)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    curve = []
    for _ in range(STEPS):
        label = torch.randint(CLASSES, (32,))
        images = colours[label] + 0.1 * torch.randn(32, 3, 12, 12)
        images, probabilities = mixup(images, label)
        loss = criterion(model(images), probabilities)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def main() -> None:
    timms = train(SoftTargetCrossEntropy())
    fused = train(fused_ce.CrossEntropyLoss())  # the line
    print(" step     timm    fused")
    for step in range(0, STEPS, 8):
        print(f"{step:>5} {timms[step]:>8.4f} {fused[step]:>8.4f}")
    apart = max(abs(a - b) / a for a, b in zip(timms, fused, strict=True))
    print(f"largest relative difference: {apart:.1e}")


if __name__ == "__main__":
    main()
