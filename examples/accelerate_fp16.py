"""Accelerate in float16 with a gradient scaler: the factor comes before the rounding.

The scaler multiplies the loss by thousands, so that small gradients survive in float16. A gradient
of the forward would have lost them already: where such a factor arrives, the fused loss computes
its gradient anew in the backward, and nothing has to be said. Run it with
`python examples/accelerate_fp16.py` (it needs accelerate).
"""

import accelerate
import torch
from torch import nn

import fused_ce

CLASSES, STEPS = 100, 31


def train(criterion: nn.Module) -> list[float]:
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(mixed_precision="fp16")
    device = accelerator.device.type
    # On a CPU Accelerate leaves float16 out without a word; torch has both of these there as well.
    scaler = accelerator.scaler or torch.amp.GradScaler(device)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, CLASSES))
    model = accelerator.prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(CLASSES, 16, generator=generator)
    curve = []
    for _ in range(STEPS):
        label = torch.randint(CLASSES, (64,), generator=generator)
        input = centres[label] + 0.1 * torch.randn(64, 16, generator=generator)
        with torch.autocast(device, torch.float16):
            logits = model(input.to(device))
            loss = criterion(logits, label.to(device))
        assert logits.dtype == torch.float16 and loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve


def main() -> None:
    stock = train(nn.CrossEntropyLoss())
    fused = train(fused_ce.CrossEntropyLoss())  # the line
    print(" step    stock    fused")
    for step in range(0, STEPS, 6):
        print(f"{step:>5} {stock[step]:>8.4f} {fused[step]:>8.4f}")
    apart = max(abs(a - b) / a for a, b in zip(stock, fused, strict=True))
    print(f"largest relative difference: {apart:.1e}")


if __name__ == "__main__":
    main()
