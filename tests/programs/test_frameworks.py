"""The loss inside the programs that people train with: same curve as stock's, nothing to adapt.

DDP in two processes, and the real packages of Accelerate, Lightning and the Transformers Trainer
with the code that the README shows. Models are tiny, random and made here: nothing is downloaded.
"""

import json
import os
import signal
import sys
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.processes import SECONDS, environment, finish
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


def main(folder):
    """Both processes, forked from this one, which has loaded torch and done nothing more."""
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            signal.alarm(SECONDS // 2)  # one may wait for the other
            code = 1
            try:
                train_a_rank(rank, folder)
                code = 0
            except BaseException:
                traceback.print_exc()
            # Taking the group down can wait for gloo's threads for ever, which says nothing of the
            # loss.
            os._exit(code)
        children.append(child)
    return int(any(os.waitpid(child, 0)[1] for child in children))


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


def trainer_history(transformers, folder, model, **options):
    """The losses of a few steps of transformers' own training loop."""
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
    )
    trainer = transformers.Trainer(model, arguments, **options)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_transformers_trainer_takes_the_curve_of_stock(tmp_path):
    pytest.importorskip("accelerate", reason=PACKAGES)
    transformers = pytest.importorskip("transformers", reason=PACKAGES)
    generator = torch.Generator().manual_seed(2)
    data = []
    for _ in range(16):
        tokens = torch.randint(0, 37, (12,), generator=generator)
        data.append({"input_ids": tokens, "labels": tokens.clone()})
        data[-1]["labels"][:3] = -100  # a prompt, which is not learned

    def loss_with(function, **options):
        # The README's function, with the loss as a parameter.
        def compute_loss(outputs, labels, num_items_in_batch=None):
            logits = outputs.logits[:, :-1].transpose(1, 2)  # (B, V, T), not copied
            total = function(logits, labels[:, 1:], reduction="sum", **options)
            return total / num_items_in_batch

        return compute_loss

    histories, models = [], []
    for compute_loss in (
        loss_with(fused_ce.cross_entropy, grad_in_forward=False),
        loss_with(fused_ce.cross_entropy),
        loss_with(F.cross_entropy),
        None,  # the model's own loss
    ):
        torch.manual_seed(1)
        config = transformers.GPT2Config(
            n_layer=1,
            n_head=2,
            n_embd=16,
            vocab_size=37,
            n_positions=16,
            bos_token_id=0,
            eos_token_id=0,
        )
        model = transformers.GPT2LMHeadModel(config)
        options = {"train_dataset": data, "compute_loss_func": compute_loss}
        histories.append(trainer_history(transformers, tmp_path, model, **options))
        models.append(model)
    assert len(histories[0]) == 4
    assert histories[0][0] != histories[0][-1]
    for history, model in zip(histories[1:], models[1:], strict=True):
        torch.testing.assert_close(torch.tensor(history), torch.tensor(histories[0]))
        # Adam makes a step of full size of any gradient, and so of what is left by rounding.
        for mine, theirs in zip(model.parameters(), models[0].parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-4)


class HeadlessLM(nn.Module):
    # The README's class.
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, labels, num_items_in_batch=None, **inputs):
        hidden = self.model.base_model(input_ids, **inputs).last_hidden_state
        loss = fused_ce.linear_cross_entropy(
            hidden[:, :-1],  # (B, T - 1, H): each position predicts the next token
            self.model.lm_head.weight,
            labels[:, 1:],
            reduction="mean" if num_items_in_batch is None else "sum",
        )
        return {"loss": loss if num_items_in_batch is None else loss / num_items_in_batch}


def causal_lm(transformers, kind):
    torch.manual_seed(1)
    common = {"vocab_size": 37, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "GPT2":  # its head is its embedding
        config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=16, **common)
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        hidden_size=16,
        intermediate_size=32,
        **common,
    )
    return transformers.LlamaForCausalLM(config)


def sequences(rows):
    tokens = torch.randint(0, 37, (rows, 12), generator=torch.Generator().manual_seed(2))
    labels = tokens.clone()
    labels[:, :3] = -100  # a prompt, which is not learned
    return tokens, labels


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_model_without_its_head_has_the_same_gradient(kind):
    transformers = pytest.importorskip("transformers", reason=PACKAGES)
    model = causal_lm(transformers, kind).eval()
    tokens, labels = sequences(4)
    outcomes = []
    for loss_of in (HeadlessLM(model), model):
        model.zero_grad()
        loss = loss_of(input_ids=tokens, labels=labels)["loss"]
        loss.backward()
        outcomes.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*outcomes)


def test_trainer_takes_the_same_curve_without_the_head(tmp_path):
    pytest.importorskip("accelerate", reason=PACKAGES)
    transformers = pytest.importorskip("transformers", reason=PACKAGES)
    data = [{"input_ids": x, "labels": y} for x, y in zip(*sequences(16), strict=True)]
    histories = []
    for wrap in (HeadlessLM, lambda model: model):
        model = wrap(causal_lm(transformers, "Llama"))
        histories.append(trainer_history(transformers, tmp_path, model, train_dataset=data))
    assert len(histories[0]) == 4
    assert histories[0][0] != histories[0][-1]
    torch.testing.assert_close(*map(torch.tensor, histories))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
