"""The promise of logits on a head alone: what it records, what it makes good, and what it refuses.

Each function stands between a head and torch's loss, and has stock's value and gradients. The real
models are test_fuse_head.py's.
"""

import copy
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.reference import one_thread
from torch import nn

import fused_ce
from fused_ce.integrations.transformers import Promise, explain_head, fuse_head, unfuse_head

V, H = 13, 6
BATCH = 2, 5
MASK = torch.tensor([[True, False, True, True, False], [False, True, False, True, True]])


class LM(nn.Module):
    """Rows of hidden states, as if a model had made them, and a head."""

    def __init__(self, bias=True, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Embedding(V, H, dtype=dtype)
        self.lm_head = nn.Linear(H, V, bias=bias, dtype=dtype)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, tokens):
        return self.lm_head(self.body(tokens))


@pytest.fixture(autouse=True)
def alone():
    with one_thread():
        yield


def tokens():
    return torch.randint(V, BATCH, generator=torch.Generator().manual_seed(1))


def outcome(model, between, loss=F.cross_entropy, **options):
    """The loss of what stands between head and loss, and all gradients."""
    model.zero_grad()
    found = between(model(tokens()))
    target = torch.arange(len(found)) % found.shape[-1]
    target[::4] = options.get("ignore_index", -100)
    value = loss(found, target, **options)
    value.backward()
    return value.detach(), [p.grad.clone() for p in model.parameters()]


def assert_as_stock(between, model=LM, **options):
    expected = outcome(model(), between, **options)
    fused = fuse_head(model())
    torch.testing.assert_close(outcome(fused, between, **options), expected)
    return explain_head(fused)


BIAS = torch.linspace(-1, 1, V)
RECORDED = {
    "float, view": lambda z: z.float().view(-1, V),
    "view": lambda z: z.view(z.shape[0] * z.size(1), -1),
    "reshape": lambda z: z.reshape((-1, z.shape[-1])),
    "flatten": lambda z: torch.flatten(z, 0, -2),
    "div, flatten": lambda z: (z / 3).flatten(0, 1),
    "mul, flatten": lambda z: (0.5 * z).flatten(0, 1),
    "mul, mul, div, flatten": lambda z: torch.div(torch.mul(z * 2, 3.0), 4).flatten(0, 1),
    "div, tanh, mul, flatten": lambda z: (torch.tanh(z / 0.3) * 0.3).flatten(0, 1),
    "mul, tanh, mul, mul, flatten": lambda z: ((z * 2).tanh() * 3 * 0.5).flatten(0, 1),
    "tanh, flatten": lambda z: F.tanh(z).flatten(0, 1),
    "add, flatten": lambda z: (z + BIAS.view(1, 1, V)).flatten(0, 1),
    "add, mul, flatten": lambda z: ((BIAS + z) * 2).flatten(0, 1),
    "slice, contiguous, view": lambda z: z[..., :-1, :].contiguous().view(-1, V),
    "slice, reshape": lambda z: z[:, 1:].reshape(-1, V),
    "slice, to": lambda z: z[:, -1].to(torch.float32),
    "slice": lambda z: z[MASK],
    "slice, to, slice": lambda z: z[1].type(torch.float32)[:],
    "slice, slice": lambda z: z[torch.tensor([1, 0]), 2:4][:, 0],
    "slice, slice, flatten": lambda z: z[None][0, :, ::2, :].flatten(0, 1),
    "slice, flatten": lambda z: z[..., : V - 2].flatten(0, 1),
    "slice, add, slice": lambda z: (z[0, ..., 1 : V - 1] + BIAS[2:])[1:],
    "to, to, flatten": lambda z: z.to(z.device).to(BIAS, non_blocking=True).flatten(0, 1),
}


@pytest.mark.parametrize("trail", RECORDED)
def test_what_stands_between_head_and_loss_is_recorded(trail):
    said = assert_as_stock(RECORDED[trail])
    assert said == f"fused: head, {trail}, cross_entropy"


def edited(z):
    z[..., 3] = -1.0
    z[0] *= 2
    return (z / 2).flatten(0, 1)


def edited_beneath_a_view(z):
    view = z.view(-1, V)
    z.mul_(0.5)
    return view


def grown(z):
    z += 1
    z.div_(2)
    return z.flatten(0, 1)


MADE = {
    "transpose": lambda z: z.transpose(1, 2)[..., 0],
    "cat": lambda z: torch.cat([z[:, :2], z[:, 3:].float()], 1).flatten(0, 1),
    "add": lambda z: (z + 1.5).flatten(0, 1),
    "add, after a factor": lambda z: (z * 2 + BIAS).flatten(0, 1),
    "add, to rows": lambda z: (z + torch.ones(BATCH[1], 1)).flatten(0, 1),
    "add, of another type": lambda z: (z + BIAS.double()).flatten(0, 1),
    "cross_entropy, of a negative cap": lambda z: (z.tanh() * -2.0).flatten(0, 1),
    "mean": lambda z: (z - z.mean(-1, keepdim=True)).flatten(0, 1),
    "__rsub__": lambda z: (2 - z).flatten(0, 1),
    "__neg__": lambda z: (-z).flatten(0, 1),
    "mul": lambda z: (z * BIAS).flatten(0, 1),
    "div": lambda z: (z / torch.tensor(2.0)).flatten(0, 1),
    "tanh": lambda z: z.tanh().tanh().flatten(0, 1),
    "__getitem__": lambda z: z[..., ::2].flatten(0, 1),
    "masked_fill": lambda z: z.masked_fill(BIAS > 0.5, -9.0).flatten(0, 1),
    "__setitem__": edited,
    "mul_": edited_beneath_a_view,
    "__iadd__": grown,
    "to": lambda z: z.to(torch.bfloat16).float().flatten(0, 1),
    "view": lambda z: z.view(BATCH[0], V, BATCH[1])[..., 0],
    "where": lambda z: torch.where(MASK[..., None], z, 0.1).flatten(0, 1),
    "mT": lambda z: z.mT[..., 1],
    "__matmul__": lambda z: (z @ torch.eye(V)).flatten(0, 1),
}


@pytest.mark.parametrize("by", MADE)
def test_anything_else_makes_the_logits_with_autograd(by):
    said = assert_as_stock(MADE[by])
    assert said.startswith(f"logits: made by {by.partition(',')[0]}, after head")


def test_logits_that_were_made_stay_the_losss():
    def looked_at(z):
        with torch.inference_mode():
            assert z.softmax(-1).shape == (*BATCH, V)
        with torch.no_grad():
            assert z.argmax(-1).shape == BATCH
        return z.float().flatten(0, 1)

    assert assert_as_stock(looked_at) == "logits: made by argmax, after head"


@pytest.mark.parametrize(
    "options",
    [
        {"weight": BIAS + 2, "reduction": "sum"},
        {"label_smoothing": 0.1, "ignore_index": 3},
        {"reduction": "sum", "label_smoothing": 0.2, "weight": BIAS + 1.5},
    ],
)
@pytest.mark.parametrize("trail", ["view", "div, tanh, mul, flatten"])
def test_the_losss_own_options_are_kept(trail, options):
    assert assert_as_stock(RECORDED[trail], **options) == f"fused: head, {trail}, cross_entropy"


def test_probabilities_and_losses_of_rows_and_the_legacy_arguments_are_stocks():
    def of_probabilities(z, target):
        return F.cross_entropy(z, F.one_hot(target % V, V).float() * 0.9 + 0.1 / V)

    def of_rows(z, target):
        return (F.cross_entropy(input=z, target=target, reduction="none") * BIAS[:10]).sum()

    def legacy(z, target):
        with pytest.warns(UserWarning, match="deprecated"):
            return F.cross_entropy(z, target, size_average=False)

    def by_module(z, target):
        return nn.CrossEntropyLoss(BIAS + 2)(z, target)

    def of_one_row(z, target):
        return F.cross_entropy(z[4], target[1])

    for loss in (of_probabilities, of_rows, legacy, by_module, of_one_row):
        assert_as_stock(RECORDED["view"], loss=loss)


def test_positions_behind_the_classes_are_not_taken_for_rows():
    target = torch.randint(5, (2, V))
    expected = F.cross_entropy(LM()(tokens()), target)
    torch.testing.assert_close(F.cross_entropy(fuse_head(LM())(tokens()), target), expected)


def test_our_loss_of_a_promise_and_a_patched_torch_are_the_same():
    between = RECORDED["view"]
    expected = outcome(LM(), between)
    with fused_ce.patch():
        model = fuse_head(LM())
        torch.testing.assert_close(outcome(model, between), expected)
        assert explain_head(model) == "fused: head, view, cross_entropy"
    torch.testing.assert_close(outcome(model, between, fused_ce.cross_entropy), expected)
    assert explain_head(model) == "fused: head, view, cross_entropy"
    for options in (
        {"z_loss": 0.1, "denominator": 7, "inplace": True, "grad_in_forward": False},
        {"logit_scale": 0.5, "softcap": 2.0, "sample_weight": torch.rand(10)},
        {"dtype": torch.float32, "focal_gamma": 2.0},
    ):
        expected = outcome(LM(), between, fused_ce.cross_entropy, **options)
        for mode in ("head", "logits"):
            fuse_head(model, mode=mode)
            found = outcome(model, between, fused_ce.cross_entropy, **options)
            torch.testing.assert_close(found, expected)
            assert explain_head(model) == "fused: head, view, cross_entropy"
    scaled = RECORDED["div, flatten"]
    found, expected = (
        outcome(m, scaled, fused_ce.cross_entropy, logit_scale=0.5) for m in (model, LM())
    )
    torch.testing.assert_close(found, expected)
    assert explain_head(model).startswith("logits: made by cross_entropy")


def test_errors_of_the_loss_are_stocks():
    for shape, high in (((7,), V), ((10,), 3 * V)):
        target = torch.full(shape, high - 1)
        said = []
        for model in (LM(), fuse_head(LM())):
            with pytest.raises((ValueError, IndexError)) as error:
                F.cross_entropy(model(tokens()).view(-1, V), target)
            said.append((error.type, str(error.value)))
        assert said[0] == said[1]
    for shape in ((2, 5, V + 1), (10, V - 1), (3, -1, V), (-1, V + 1)):
        with pytest.raises(RuntimeError, match="is invalid for input of size 130"):
            fuse_head(LM())(tokens()).view(shape)


@pytest.mark.usefixtures("bfloat16_in_itself")  # or nothing of it would be rounded as in stock
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("widened", [True, False])
@pytest.mark.parametrize("head", ["autocast", torch.bfloat16])
def test_half_types_have_the_type_and_the_numbers_of_stock(head, widened, inside):
    """The head under autocast or of a half type, its loss in the same place or in the other."""
    autocast = torch.autocast("cpu", torch.bfloat16)
    plain = torch.autocast("cpu", enabled=False)
    heads, losses = [], []
    for fuse in (lambda model: model, fuse_head):
        model = fuse(LM(dtype=torch.float32 if head == "autocast" else head))
        with autocast if head == "autocast" else plain:
            logits = model(tokens())
        assert logits.dtype == torch.bfloat16
        heads.append(logits)
        logits = logits.float() if widened else logits
        with autocast if inside == (head == "autocast") else plain:
            loss = F.cross_entropy(logits.view(-1, V), torch.arange(10))
        loss.backward()
        losses.append((loss, [p.grad for p in model.parameters()]))
    (stock, stocks), (ours, mine) = losses
    assert explain_head(model).startswith("fused")
    assert ours.dtype == stock.dtype
    half = 2**-8
    exact = F.cross_entropy(heads[0].view(-1, V).double(), torch.arange(10))
    spacing = exact * torch.finfo(ours.dtype).eps
    assert (ours - exact).abs() <= (stock - exact).abs() + spacing
    for one, other in zip(mine, stocks, strict=True):
        # Some of the sums' terms are rounded elsewhere, by a unit of the half type each.
        torch.testing.assert_close(one, other, rtol=2 * half, atol=2 * half * other.abs().max())


def test_a_copy_that_was_taken_before_an_edit_is_refused():
    z = fuse_head(LM())(tokens())
    copied, viewed = z * 2, z.view(-1, V)
    z[0] = 1.0
    assert torch.equal(viewed.detach()[:5], torch.ones(5, V))
    with pytest.raises(RuntimeError, match=r"edited in place after mul\(\) had copied"):
        copied.detach()


def test_a_promise_says_of_itself_what_needs_no_logits():
    z = fuse_head(LM())(tokens())
    assert isinstance(z, Promise) and repr(z).startswith("<promise of logits, shape=(2, 5, 13)")
    assert (z.shape, z.size(), z.size(-1), len(z)) == ((2, 5, V), (2, 5, V), V, 2)
    assert (z.ndim, z.dim(), z.numel()) == (3, 3, 130)
    assert z.requires_grad and z.is_floating_point() and z.device.type == "cpu"
    assert not hasattr(z, "nothing") and not hasattr(z, "__nothing__")
    assert hasattr(z, "argmax") and z._made is None
    assert z.grad_fn is not None and z._made is not None
    assert pickle.loads(pickle.dumps(z.detach())).shape == z.shape
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(z)  # as stock's says of what is no leaf


def test_who_made_the_logits_is_logged_once(monkeypatch):
    model, said = fuse_head(LM()), []
    logger, listener = logging.getLogger("fused_ce"), logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(logger, "handlers", [listener])
    monkeypatch.setattr(logger, "level", logging.DEBUG)
    logger.manager._clear_cache()  # of which levels are on
    for _ in range(2):
        model(tokens()).log_softmax(-1)
        model(tokens()).sum()
    logger.manager._clear_cache()
    assert said == [f"fuse_head: the logits were made by {by}" for by in ("log_softmax", "sum")]


def test_logits_are_made_at_once_where_no_loss_is_learned():
    model = fuse_head(LM())
    with torch.no_grad():
        assert type(model(tokens())) is torch.Tensor
    assert type(model.eval()(tokens())) is torch.Tensor
    model.train().requires_grad_(False)
    assert type(model(tokens())) is torch.Tensor
    model.lm_head.bias.requires_grad_()
    assert type(model(tokens())) is Promise
    traced = torch.jit.trace(model, tokens())
    assert torch.equal(traced(tokens()), LM()(tokens()))
    for wrong in (torch.randn(2, 5, H + 1), torch.randn(2, 5, H, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="shapes|dtype"):
            model.lm_head(wrong)


def test_transforms_differentiate_stocks_formula():
    def loss(parameters, model):
        z = torch.func.functional_call(model, parameters, (tokens(),))
        return F.cross_entropy(z.flatten(0, 1), torch.arange(10))

    models = LM(), fuse_head(LM())
    found = [torch.func.grad(loss)(dict(m.named_parameters()), m) for m in models]
    torch.testing.assert_close(*found)


def test_second_derivatives_are_stocks():
    found = []
    for model in (LM(), fuse_head(LM())):
        value = F.cross_entropy(model(tokens()).view(-1, V), torch.arange(10))
        grads = torch.autograd.grad(value, list(model.parameters()), create_graph=True)
        total = sum(g.square().sum() for g in grads)
        found.append(torch.autograd.grad(total, list(model.parameters())))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("trail", ["float, view", "div, tanh, mul, flatten"])
def test_the_mode_logits_spares_the_copies(trail):
    expected = outcome(LM(), RECORDED[trail])
    model = fuse_head(LM(), mode="logits")
    torch.testing.assert_close(outcome(model, RECORDED[trail]), expected)
    assert explain_head(model) == f"fused: head, {trail}, cross_entropy"
    for by in ("add", "slice, flatten", "__setitem__"):
        between = (MADE | RECORDED)[by]
        torch.testing.assert_close(outcome(model, between), outcome(LM(), between))
        assert explain_head(model).startswith("logits: made by")
    with torch.no_grad():
        assert type(model(tokens())) is torch.Tensor
    assert outcome(unfuse_head(model), RECORDED[trail])[0] == expected[0]
    assert type(model(tokens())) is torch.Tensor


class Wider(nn.Linear):
    pass


def without_a_head():
    return nn.Linear(2, 2)


def with_head(head):
    model = LM()
    model.lm_head = head
    return model


def with_another_forward():
    model = LM()
    model.lm_head.forward = model.lm_head.forward
    return model


@pytest.mark.parametrize(
    ("make", "mode", "error", "said"),
    [
        (without_a_head, "head", TypeError, "got a Linear without; of a wrapper pass the model"),
        (lambda: with_head(None), "head", TypeError, "got a LM without"),
        (lambda: with_head(Wider(H, V)), "head", TypeError, "Wider; call fuse_head before"),
        (with_another_forward, "head", TypeError, "got one whose forward was replaced"),
        (LM, "both", ValueError, "mode must be 'head' or 'logits', got 'both'"),
    ],
)
def test_what_it_does_not_know_is_refused_in_a_sentence(make, mode, error, said):
    with pytest.raises(error, match=said):
        fuse_head(make(), mode=mode)
    assert fused_ce.explain_call(fuse_head, make(), mode=mode).startswith("refused: fused_ce: ")
    assert explain_head(make()).startswith("not fused: ")


def test_sizes_of_chunks_reach_the_loss():
    with pytest.raises(ValueError, match="chunk_size must be a positive int"):
        fuse_head(LM(), chunk_size=0)
    model = fuse_head(LM(), chunk_size=3)
    between = RECORDED["view"]
    torch.testing.assert_close(outcome(model, between), outcome(LM(), between))
    assert model(tokens())._head.limits["chunk_size"] == 3


def test_any_head_may_have_its_logits_fused():
    model = fuse_head(with_head(Wider(H, V)), mode="logits")
    assert type(model(tokens())) is Promise
    said = fused_ce.explain_call(fuse_head, model, mode="logits")
    assert said == "fused: the loss of the logits of a Wider"


def test_fusing_twice_is_fusing_once_and_can_be_undone():
    model = LM()
    said = "fused: a head of 13 classes and 6 features"
    assert fused_ce.explain_call(fuse_head, model) == said
    assert fuse_head(fuse_head(model)) is model
    assert fused_ce.explain_call(fuse_head, model) == said
    assert fuse_head(fuse_head(model, mode="logits")) is model
    assert len(model._forward_pre_hooks) == 1 and not model.lm_head._forward_hooks
    assert explain_head(model).startswith("not yet")
    assert unfuse_head(unfuse_head(model)) is model
    assert type(model.lm_head) is nn.Linear and not model._forward_pre_hooks
    assert vars(model.lm_head).keys() == vars(LM().lm_head).keys()


@pytest.mark.parametrize("mode", ["head", "logits"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_fused_and_undone_by_themselves(copied, mode):
    model = fuse_head(LM(), mode=mode)
    other = copied(model)
    assert list(other.state_dict()) == list(LM().state_dict())
    torch.testing.assert_close(outcome(other, RECORDED["view"]), outcome(model, RECORDED["view"]))
    assert type(unfuse_head(other)(tokens())) is torch.Tensor
    assert not other._forward_pre_hooks
    assert type(model(tokens())) is Promise


@pytest.mark.parametrize("mode", ["head", "logits"])
def test_a_head_that_is_put_in_its_place_is_fused_in_the_next_forward(mode):
    model = fuse_head(LM(), mode=mode)
    model.lm_head = nn.Linear(H, V + 3)
    assert explain_head(model) == "not fused: the head is a Linear"
    assert type(model(tokens())) is Promise
    model.lm_head = nn.Sequential(nn.Linear(H, V))
    found = model(tokens())
    assert type(found) is (Promise if mode == "logits" else torch.Tensor)


@pytest.mark.parametrize("trail", ["div, tanh, mul, flatten", "slice, reshape"])
def test_a_compiled_model_is_one_graph_with_the_heads_loss_in_it(trail):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = fuse_head(LM())

    def loss(tokens):
        found = RECORDED[trail](model(tokens))
        return F.cross_entropy(found, torch.arange(found.shape[0]))

    expected = loss(tokens())
    found = torch.compile(loss, fullgraph=True, backend=backend)(tokens())
    torch.testing.assert_close(found, expected)
    (graph,) = graphs
    assert "linear_forward" in graph.code and "torch._C._nn.linear(" not in graph.code
