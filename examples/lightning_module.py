"""A LightningModule with the fused loss: it is a module like torch's, and goes where that was.

A classifier of points around five centres, trained once with each loss; the curves are the same.
Run it with `python examples/lightning_module.py` (it needs lightning).
"""

import logging
import tempfile
import warnings

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fused_ce

CLASSES = 5


class Classifier(lightning.LightningModule):
    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, CLASSES))
        self.criterion = criterion
        self.curve: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        points, label = batch
        loss = self.criterion(self.model(points), label)
        self.curve.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.02)


def train(criterion: nn.Module) -> Classifier:
    generator = torch.Generator().manual_seed(1)
    label = torch.randint(CLASSES, (320,), generator=generator)
    angle = 2 * torch.pi * label / CLASSES
    noise = 0.2 * torch.randn(320, 2, generator=generator)
    points = torch.stack([angle.cos(), angle.sin()], 1) + noise
    module = Classifier(criterion)
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            devices=1,
            accumulate_grad_batches=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(module, DataLoader(TensorDataset(points, label), batch_size=16))
    return module


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    stock = train(nn.CrossEntropyLoss(label_smoothing=0.1)).curve
    fused = train(fused_ce.CrossEntropyLoss(label_smoothing=0.1)).curve  # the line
    print(" batch    stock    fused")
    for step in range(0, len(stock), 13):
        print(f"{step + 1:>6} {stock[step]:>8.4f} {fused[step]:>8.4f}")
    apart = max(abs(a - b) / a for a, b in zip(stock, fused, strict=True))
    print(f"largest relative difference: {apart:.1e}")


if __name__ == "__main__":
    main()
