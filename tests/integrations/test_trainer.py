"""The Trainer of Transformers with a fused head, beside the model as it comes: one curve.

The example and the page's loss in every run; of the ten configurations and of what the Trainer
does besides training there is more time for where it is slow.
"""

import re
import runpy

import pytest
import torch
import torch.nn.functional as F
from support.pages import text_of
from support.processes import ROOT
from support.reference import one_thread

import fused_ce
from fused_ce.integrations.transformers import explain_head, fuse_head

PACKAGES = "requirements-dev.txt names it"
transformers = pytest.importorskip("transformers", reason=PACKAGES)
pytest.importorskip("accelerate", reason=PACKAGES)
pytestmark = pytest.mark.xdist_group("transformers")
V = 37


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers.logging.set_verbosity_error()
    with one_thread():
        yield


def data(rows=16, length=12):
    generator = torch.Generator().manual_seed(2)
    found = []
    for row in range(rows):
        tokens = torch.randint(2, V, (length,), generator=generator)
        labels = tokens.clone()
        labels[: row % 4] = -100  # prompts, which are not learned
        found.append({"input_ids": tokens, "labels": labels})
    return found


def trainer_of(model, folder, **options):
    own = {
        name: options.pop(name)
        for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")
        if name in options
    }
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    arguments = transformers.TrainingArguments(str(folder), **settings | options)
    trainer = transformers.Trainer(
        model, arguments, train_dataset=data(), eval_dataset=data(6), **own
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def curve_of(trainer, **options):
    trainer.train(**options)
    history = trainer.state.log_history
    return [line[name] for line in history for name in ("loss", "grad_norm") if name in line]


LLAMA = {"num_key_value_heads": 1}
GEMMA = {"head_dim": 8, "final_logit_softcapping": 2.0, "attention_dropout": 0.0, **LLAMA}
CONFIGS = {
    "LlamaForCausalLM": ("LlamaConfig", LLAMA),
    "Gemma2ForCausalLM": ("Gemma2Config", GEMMA),
    "CohereForCausalLM": ("CohereConfig", {"logit_scale": 0.25, **LLAMA}),
    "GraniteForCausalLM": ("GraniteConfig", {"logits_scaling": 4.0, **LLAMA}),
    "GPT2LMHeadModel": ("GPT2Config", {"n_positions": 16}),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"d_ff": 32, "d_kv": 8, "decoder_start_token_id": 0},
    ),
}


def tiny(name, **more):
    config_class, sizes = CONFIGS[name]
    common = {
        "vocab_size": V,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    config = getattr(transformers, config_class)(**common | sizes | more)
    for key in vars(config):
        if "drop" in key or key.endswith("_pdrop"):
            setattr(config, key, 0.0)
    torch.manual_seed(1)
    return getattr(transformers, name)(config)


def assert_same_curve(name, folder, said, tolerance=1e-5, **options):
    curves = []
    for fuse in (lambda model: model, fuse_head):
        model = fuse(tiny(name))
        curves.append(curve_of(trainer_of(model, folder, **options)))
    stock, fused = curves
    assert len(stock) == 8 and stock[0] != stock[-2]
    assert fused == pytest.approx(stock, rel=tolerance)
    assert explain_head(model) == said


def test_the_example_takes_the_curve_of_stock(capsys):
    runpy.run_path(str(ROOT / "examples" / "transformers_trainer.py"), run_name="__main__")
    printed = capsys.readouterr().out
    (apart,) = re.findall(r"largest relative difference: (\S+)", printed)
    assert float(apart) < 1e-5
    losses = [float(loss) for loss in re.findall(r"^ *\d+ +(\d\.\d+)", printed, re.M)]
    assert len(losses) == 5 and losses[-1] < losses[0] - 1.5
    assert "fused: head, float, view, cross_entropy" in printed
    assert "'the cat " in printed


def test_the_pages_loss_takes_the_curve_of_the_models_own(tmp_path):
    (code,) = re.findall(r"(def compute_loss.*?)\n\n\n", text_of("docs/transformers.md"), re.S)
    names = {"fused_ce": fused_ce, "F": F}
    exec(code, names)
    curves = [
        curve_of(trainer_of(tiny("LlamaForCausalLM"), tmp_path, max_steps=2, **options))
        for options in ({"compute_loss_func": names["compute_loss"]}, {})
    ]
    assert len(curves[0]) == 4
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


CAUSAL = "fused: head, float, view, cross_entropy"
RUNS = {
    "llama": ("LlamaForCausalLM", CAUSAL, {"gradient_accumulation_steps": 4}),
    "llama without accumulation": ("LlamaForCausalLM", CAUSAL, {"gradient_accumulation_steps": 1}),
    "softcap": (
        "Gemma2ForCausalLM",
        "fused: head, div, tanh, mul, float, view, cross_entropy",
        {"gradient_accumulation_steps": 4},
    ),
    "factor": ("CohereForCausalLM", "fused: head, mul, float, view, cross_entropy", {}),
    "divisor": ("GraniteForCausalLM", "fused: head, div, float, view, cross_entropy", {}),
    "tied": ("GPT2LMHeadModel", CAUSAL, {"gradient_accumulation_steps": 4}),
    "encoder and decoder": ("T5ForConditionalGeneration", "fused: head, view, cross_entropy", {}),
    "bf16": ("LlamaForCausalLM", CAUSAL, {"bf16": True, "tolerance": 5e-3}),
    "label smoothing": (
        "LlamaForCausalLM",
        "logits: made by log_softmax, after head, slice, contiguous",
        {"label_smoothing_factor": 0.1},
    ),
    "checkpointing": ("LlamaForCausalLM", CAUSAL, {"gradient_checkpointing": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_a_run_of_the_trainer_takes_the_curve_of_stock(run, tmp_path):
    name, said, options = RUNS[run]
    assert_same_curve(name, tmp_path, said, **options)


@pytest.mark.slow
def test_what_the_trainer_does_besides_training_is_as_with_stock(tmp_path):
    """Evaluation with metrics and without, prediction, and a run that goes on where it was cut."""

    def accuracy(predictions):
        found = predictions.predictions[:, :-1] == predictions.label_ids[:, 1:]
        return {"accuracy": float(found.mean())}

    results = []
    for fuse in (lambda model: model, fuse_head):
        folder = tmp_path / str(len(results))
        options = {
            "compute_metrics": accuracy,
            "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
        }
        trainer = trainer_of(fuse(tiny("LlamaForCausalLM")), folder, **options)
        whole = curve_of(trainer)
        found = {k: v for k, v in trainer.evaluate().items() if k in ("eval_loss", "eval_accuracy")}
        found["predicted"] = trainer.predict(data(4)).predictions.tolist()
        resumed = trainer_of(fuse(tiny("LlamaForCausalLM")), folder, **options)
        found["resumed"] = curve_of(resumed, resume_from_checkpoint=f"{folder}/checkpoint-2")
        assert found["resumed"] == pytest.approx(whole, rel=1e-6)
        only = trainer_of(resumed.model, folder, prediction_loss_only=True)
        found["alone"] = only.evaluate()["eval_loss"]
        results.append(found)
    stock, ours = results
    assert ours.pop("predicted") == stock.pop("predicted")
    assert ours.pop("resumed") == pytest.approx(stock.pop("resumed"), rel=1e-5)
    assert ours == pytest.approx(stock, rel=1e-5)
    assert explain_head(resumed.model) == CAUSAL
