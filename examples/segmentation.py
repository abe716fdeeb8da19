"""Semantic segmentation: logits of every pixel in channels_last, masks of one byte, 255 for void.

Stock wants the masks as int64, eight times their size; here masks and logits are taken as they
come, and no copy is made. A small network finds squares and discs. Run it with
`python examples/segmentation.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ce

CLASSES, SIZE, VOID, STEPS = 3, 24, 255, 31


def scenes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images with a square and a disc each, and their masks, void where an object ends."""
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    images = 0.3 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    masks = torch.zeros(count, SIZE, SIZE, dtype=torch.uint8)
    for image, mask in zip(images, masks, strict=True):
        for label, power in ((1, 8), (2, 2)):
            centre = torch.randint(5, SIZE - 5, (2,), generator=generator)
            distance = (
                (rows - centre[0]).abs() ** power + (columns - centre[1]).abs() ** power
            ) ** (1 / power)
            image[label][distance <= 4] += 1.0
            mask[(distance > 4) & (distance <= 5)] = VOID
            mask[distance <= 4] = label
    return images.to(memory_format=torch.channels_last), masks


def stock(logits: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(logits, mask.long(), ignore_index=VOID)


def fused(logits: Tensor, mask: Tensor) -> Tensor:
    return fused_ce.cross_entropy(logits, mask, ignore_index=VOID)


def train(loss_of) -> tuple[list[float], float]:
    """The curve, and how many pixels that are not void are right in the end."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 5, padding=2), nn.Tanh(), nn.Conv2d(16, CLASSES, 3, padding=1)
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    curve = []
    for _ in range(STEPS):
        images, masks = scenes(4, generator)
        logits = model(images)  # (N, C, H, W)
        loss = loss_of(logits, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    right = (logits.argmax(1) == masks)[masks != VOID]
    return curve, right.float().mean().item()


def main() -> None:
    (stocks, _), (ours, right) = train(stock), train(fused)
    print(" step    stock    fused")
    for step in range(0, STEPS, 6):
        print(f"{step:>5} {stocks[step]:>8.4f} {ours[step]:>8.4f}")
    apart = max(abs(a - b) / a for a, b in zip(stocks, ours, strict=True))
    print(f"largest relative difference: {apart:.1e}")
    print(f"pixels that are right: {right:.2f}")


if __name__ == "__main__":
    main()
