"""What the README and the pages of docs/ write for Transformers runs, with the real package."""

import pytest
import torch
import torch.nn.functional as F
from support.pages import blocks, pages, text_of

import fused_ce
from fused_ce.integrations.transformers import explain_head

transformers = pytest.importorskip("transformers", reason="requirements-dev.txt names it")
pytest.importorskip("accelerate", reason="requirements-dev.txt names it")
pytestmark = pytest.mark.xdist_group("transformers")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model, as from_pretrained reads it, and its configuration."""
    config = transformers.LlamaConfig(
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        hidden_size=16,
        intermediate_size=32,
        vocab_size=37,
    )
    folder = str(tmp_path_factory.mktemp("model"))
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder, config


@pytest.mark.parametrize("page", [page for page in pages() if "fuse_head(" in text_of(page)])
def test_every_example_of_a_page_trains_without_logits(page, saved, tmp_path):
    folder, config = saved
    names = {
        "fused_ce": fused_ce,
        "transformers": transformers,
        "F": F,
        "name": folder,
        "config": config,
        "tokens": torch.randint(2, 37, (2, 12)),
        "arguments": transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]),
    }
    for block in blocks(page):
        if "transformers" in block.code or "explain_head" in block.code:
            block.run(names)
    model, tokens = names["model"].train(), names["tokens"]
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert explain_head(model) == "fused: head, float, view, cross_entropy"
