"""`fuse_head` on the models of Transformers: each trains as it did without it, and without logits.

A dozen architectures here, whose loss and whose way from head to loss differ; every one that a tiny
configuration can build where there is time for it. Nothing is downloaded.
"""

import copy
import pickle
import re

import pytest
import torch
from support.pages import text_of
from support.processes import run
from support.reference import one_thread

from fused_ce.integrations.transformers import Promise, explain_head, fuse_head, unfuse_head

transformers = pytest.importorskip("transformers", reason="requirements-dev.txt names it")

from support.architectures import KINDS, NotBuilt, first_step  # noqa: E402

# One process imports the library and its models, which takes five seconds.
pytestmark = pytest.mark.xdist_group("transformers")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers.logging.set_verbosity_error()
    with one_thread():
        yield


def training_step(model, inputs, **options):
    """The loss and every parameter's gradient."""
    torch.manual_seed(3)  # of a router, say
    loss = model(**inputs, **options).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def stock_step(tiny):
    return training_step(tiny.model(), tiny.inputs)


def is_equal(found, expected):
    """As close as float32's sums in another order are, whatever a gradient's size."""
    (loss, gradients), (stocks_loss, stocks) = found, expected
    if abs(loss - stocks_loss) > 1e-6 * abs(stocks_loss) or gradients.keys() != stocks.keys():
        return False
    largest = max(gradient.norm() for gradient in stocks.values())
    return all(
        (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7 * largest
        for name, gradient in stocks.items()
    )


def verdict(kind, model_type):
    """``fused`` or ``made`` and how, ``refused`` or ``wrong`` and what, ``not built`` and why."""
    try:
        tiny, expected = first_step(kind, model_type, stock_step)
    except NotBuilt as error:
        return "not built", str(error)
    try:
        model = fuse_head(tiny.model())
    except TypeError as error:
        return "refused", str(error)
    if not is_equal(training_step(model, tiny.inputs), expected):
        return "wrong", "loss or gradients"
    said = explain_head(model)
    logits = {}
    for name, one in {"stock": tiny.model(), "ours": model}.items():
        torch.manual_seed(5)
        with torch.no_grad():
            logits[name] = one.eval()(**tiny.inputs).logits
    if not torch.equal(logits["ours"], logits["stock"]):
        return "wrong", "logits of an evaluation"
    return ("fused" if said.startswith("fused: ") else "made"), said


# Of each kind of way from head to loss one or two: a factor, a divisor, a softcap, a bias, logits
# in the loss's own type, a head tied to the embedding, auxiliary losses, no attention at all, a
# cross entropy of its own, an encoder, a sum with a buffer, and classes that are sliced away.
KINDS_OF_ANSWER = "fused", "made", "refused", "wrong"
DOZEN = {
    ("causal", "llama"): "float, view",
    ("causal", "gemma2"): "div, tanh, mul, float, view",
    ("causal", "cohere"): "mul, float, view",
    ("causal", "granite"): "div, float, view",
    ("causal", "gpt2"): "float, view",
    ("causal", "phi"): "float, view",
    ("causal", "mixtral"): "float, view",
    ("causal", "mamba"): "float, float, view",
    ("causal", "bert"): "float, view",
    ("masked", "bert"): "view",
    ("seq2seq", "t5"): "view",
    ("seq2seq", "bart"): "add, view",
    ("causal", "inkling2_text"): "float, div, tanh, mul, slice, float, view",
}


@pytest.mark.parametrize(("kind", "model_type"), DOZEN)
def test_an_architecture_trains_without_its_logits(kind, model_type):
    said = f"fused: head, {DOZEN[kind, model_type]}, cross_entropy"
    assert verdict(kind, model_type) == ("fused", said)


@pytest.mark.slow
@pytest.mark.rare
def test_every_architecture_trains_as_without_it_and_nearly_all_without_logits(capsys):
    """What a small configuration cannot build is not counted: the pages have the numbers."""
    counts = {}
    with capsys.disabled():
        for kind, names in KINDS.items():
            found = {model_type: verdict(kind, model_type) for model_type in names}
            for model_type, (what, how) in found.items():
                if what != "fused":
                    print(f"\n{kind} {model_type}: {what}: {how[:150]}", end="")
            verdicts = [what for what, _ in found.values()]
            count = {what: verdicts.count(what) for what in KINDS_OF_ANSWER}
            counts[kind] = {"built": sum(count.values()), **count}
            print(f"\n{kind}: {counts[kind]}", end="")
    assert all(count["wrong"] == 0 for count in counts.values())
    for page in ("README.md", "docs/transformers.md"):
        for kind, count in counts.items():
            said = re.search(rf"[Oo]f (\d+) {kind} \D*(\d+)", text_of(page)).groups()
            assert (count["built"], count["fused"]) == tuple(map(int, said)), (page, kind)


def llama(**options):
    sizes = {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "vocab_size": 37,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | options))


TOKENS = torch.randint(2, 37, (2, 12), generator=torch.Generator().manual_seed(2))
INPUTS = {"input_ids": TOKENS, "labels": TOKENS}


def assert_as_stock(model, stock, **options):
    found, expected = (training_step(m.train(), INPUTS, **options) for m in (model, stock))
    assert is_equal(found, expected)


def test_the_batchs_count_and_the_logits_that_are_asked_for_are_stocks():
    model = fuse_head(llama())
    assert_as_stock(model, llama(), num_items_in_batch=torch.tensor(40))
    model.zero_grad()
    output = model(**INPUTS)
    assert type(output.logits) is Promise
    torch.testing.assert_close(output.logits.detach(), llama()(**INPUTS).logits.detach())
    assert explain_head(model) == "logits: made by detach, after head"
    # And then the loss is that of somebody else, as a distillation's.
    logits = [m(**INPUTS).logits for m in (model, llama())]
    torch.testing.assert_close(*(z.log_softmax(-1).square().mean().detach() for z in logits))


def test_it_generates_as_before_in_training_too():
    model, stock = fuse_head(llama()), llama()
    for mode in (True, False):
        found = [
            m.train(mode).generate(TOKENS[:, :5], max_new_tokens=4, do_sample=False)
            for m in (model, stock)
        ]
        assert torch.equal(*found)


def test_what_it_saves_is_the_models_and_loads_into_one(tmp_path):
    model = fuse_head(llama())
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.lm_head) is torch.nn.Linear
    assert_as_stock(fuse_head(loaded), llama())
    assert_as_stock(pickle.loads(pickle.dumps(model)), llama())
    model.zero_grad()
    assert_as_stock(copy.deepcopy(model), llama())
    assert type(unfuse_head(model)(**INPUTS).logits) is torch.Tensor


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_of_another_size_is_fused_as_well(tied):
    models = [llama(tie_word_embeddings=tied) for _ in range(2)]
    fuse_head(models[0])
    for size in (50, 33):
        for model in models:
            torch.manual_seed(4)
            model.resize_token_embeddings(size)
            model.zero_grad()
        inputs = {name: tokens.clamp(max=size - 1) for name, tokens in INPUTS.items()}
        assert is_equal(*(training_step(model, inputs) for model in models))
        assert explain_head(models[0]) == "fused: head, float, view, cross_entropy"
        head = models[0].lm_head
        assert head.out_features == size
        assert (head.weight is models[0].get_input_embeddings().weight) == tied


def test_gradient_checkpointing_and_frozen_parts_are_stocks():
    models = fuse_head(llama()), llama()
    for model in models:
        model.gradient_checkpointing_enable()
        model.lm_head.requires_grad_(False)
    assert_as_stock(*models)
    for model in models:
        model.zero_grad()
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)
    assert_as_stock(*models)
    assert models[0].lm_head.weight.grad is not None


@pytest.mark.slow  # test_promise.py compiles a head alone
def test_a_compiled_model_is_one_graph():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = fuse_head(llama())
    expected = training_step(llama(), INPUTS)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    loss = compiled(**INPUTS).loss
    loss.backward()
    found = loss.detach(), {n: p.grad for n, p in model.named_parameters()}
    assert is_equal(found, expected)
    assert len(graphs) == 1 and "linear_forward" in graphs[0].code


@pytest.mark.parametrize("mode", ["head", "logits"])
def test_peft_leaves_the_head_fused_or_makes_the_logits_that_it_changes(mode):
    peft = pytest.importorskip("peft", reason="requirements-dev.txt names it")
    for options, said in (
        ({"target_modules": ["q_proj"]}, "fused: head, float, view"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "fused: head, float"),
        ({"target_modules": ["q_proj", "lm_head"]}, "logits: made by add, after head"),
    ):
        if mode == "logits" and "made" in said:
            continue
        models = []
        for fuse in (lambda model, **_: model, fuse_head):
            model = fuse(llama(), mode=mode)
            torch.manual_seed(4)
            wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, **options))
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
            models.append(wrapped)
        stock, model = models
        assert is_equal(training_step(model, INPUTS), training_step(stock, INPUTS))
        heads = [m for m in model.modules() if "fused" in vars(m)]
        said_of = [m.fused.record.text for m in heads]
        assert any(text.startswith(said) for text in said_of), said_of
    with pytest.raises(TypeError, match="call fuse_head before an adapter"):
        fuse_head(peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["lm_head"])))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_trains_as_with_stock(precision):
    accelerate = pytest.importorskip("accelerate", reason="requirements-dev.txt names it")
    accelerate.state.AcceleratorState._reset_state(True)  # it allows one precision in a process
    curves = []
    for model in (llama(), fuse_head(llama())):
        accelerator = accelerate.Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
        )
        prepared = accelerator.prepare(model)
        optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.5))
        curve = []
        for _ in range(4):
            with accelerator.accumulate(prepared):
                loss = prepared(**INPUTS).loss
                assert loss.dtype == torch.float32
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(curve)
    assert explain_head(model).startswith("fused: head")
    assert curves[0][0] > curves[0][-1] + 0.01
    tolerance = 1e-5 if precision == "no" else 2e-3
    assert curves[1] == pytest.approx(curves[0], rel=tolerance)


def test_the_library_is_not_imported_by_ours():
    assert run("-c", "import sys, fused_ce; print('transformers' in sys.modules)") == "False\n"
    code = "import sys, fused_ce.integrations.transformers; print('transformers' in sys.modules)"
    assert run("-c", code) == "False\n"
