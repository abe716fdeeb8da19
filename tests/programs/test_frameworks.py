"""The loss inside the programs that people train with: same curve as stock's, nothing to adapt.

DDP in two processes, and the real packages of Accelerate and Lightning with the code that the
README shows. Models are tiny, random and made here: nothing is downloaded. Transformers is
tests/integrations'.
"""

import json
import sys

import pytest
import torch
import torch.distributed as dist
from support.processes import environment, finish, in_two_processes
from support.reference import one_thread
from torch import nn

import fused_ce

PACKAGES = "not installed; requirements-dev.txt names it"
CRITERIA = {
    "default": fused_ce.CrossEntropyLoss,
    "recompute": lambda: fused_ce.CrossEntropyLoss(grad_in_forward=False),
    "in place": lambda: fused_ce.CrossEntropyLoss(inplace=True),
}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One thread, since the models are tiny, and no way to the network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    with one_thread():
        yield


def classifier():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))


def batches(count=8, size=4):
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(size, 6, generator=generator),
            torch.randint(0, 5, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def assert_same_training(curves, models):
    torch.testing.assert_close(*map(torch.tensor, curves))
    first, *others = [list(model.parameters()) for model in models]
    for other in others:
        torch.testing.assert_close(other, first)
    # It was trained: equal curves of models that stand still would prove nothing.
    fresh = list(classifier().parameters())
    if [p.shape for p in fresh] == [p.shape for p in first]:
        assert any((p - q).abs().max() > 1e-3 for p, q in zip(fresh, first, strict=True))


def train_a_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    curves = {}
    for name, criterion in {"stock": nn.CrossEntropyLoss, **CRITERIA}.items():
        criterion = criterion()
        model = nn.parallel.DistributedDataParallel(classifier())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        curve = curves[name] = []
        for step, (x, y) in enumerate(batches()[rank::2]):
            # The first of two batches is only accumulated, without a reduction over processes.
            if step % 2 == 0:
                optimizer.zero_grad()
                with model.no_sync():
                    loss = criterion(model(x), y)
                    (loss / 2).backward()
            else:
                loss = criterion(model(x), y)
                (loss / 2).backward()
                optimizer.step()
            curve.append(loss.item())
        curve.append([p.tolist() for p in model.parameters()])
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(curves, file)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_ddp_takes_the_curve_of_stock(tmp_path):
    done = finish(__file__, str(tmp_path), env=environment())
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for curves in ranks:
        stock = curves.pop("stock")
        assert set(curves) == set(CRITERIA)
        for curve in curves.values():
            torch.testing.assert_close(torch.tensor(curve[:-1]), torch.tensor(stock[:-1]))
            for mine, theirs in zip(curve[-1], stock[-1], strict=True):
                torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs))
    # Each process had its own batches, and all have one model in the end.
    assert ranks[0]["default"][0] != ranks[1]["default"][0]
    assert ranks[0]["default"][-1] == ranks[1]["default"][-1]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_takes_the_curve_of_stock(precision):
    accelerate = pytest.importorskip("accelerate", reason=PACKAGES)
    accelerate.state.AcceleratorState._reset_state(True)  # it allows one precision in a process
    curves, models = [], []
    for criterion in (nn.CrossEntropyLoss(), *(make() for make in CRITERIA.values())):
        accelerator = accelerate.Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
        )
        model = classifier()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        data = torch.utils.data.DataLoader(batches(), batch_size=None)
        model, optimizer, data = accelerator.prepare(model, optimizer, data)
        curve = []
        for x, y in data:
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    loss = criterion(model(x), y)
                assert loss.dtype == torch.float32
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(curve)
        models.append(accelerator.unwrap_model(model))
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if precision == "bf16" else {}
    for curve, model in zip(curves[1:], models[1:], strict=True):
        torch.testing.assert_close(torch.tensor(curve), torch.tensor(curves[0]), **tolerance)
        for mine, theirs in zip(model.parameters(), models[0].parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, **tolerance)
    assert curves[0][0] != curves[0][-1]


@pytest.mark.parametrize("mode", CRITERIA)
def test_lightning_takes_the_curve_of_stock(mode, tmp_path):
    lightning = pytest.importorskip("lightning", reason=PACKAGES)

    # The README's class, and what a training needs besides.
    class Classifier(lightning.LightningModule):
        def __init__(self, model, criterion):
            super().__init__()
            self.model = model
            self.criterion = criterion
            self.curve = []

        def training_step(self, batch, batch_idx):
            input, target = batch
            loss = self.criterion(self.model(input), target)
            self.curve.append(loss.item())
            return loss

        def validation_step(self, batch, batch_idx):
            input, target = batch
            self.curve.append(self.criterion(self.model(input), target).item())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    modules = []
    for criterion in (CRITERIA[mode](), nn.CrossEntropyLoss()):
        module = Classifier(classifier(), criterion)
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        data = torch.utils.data.DataLoader(batches(), batch_size=None)
        trainer.fit(module, data, data)
        modules.append(module)
    assert len(modules[0].curve) > 16
    assert_same_training([m.curve for m in modules], [m.model for m in modules])


if __name__ == "__main__":
    sys.exit(in_two_processes(train_a_rank, sys.argv[1]))
