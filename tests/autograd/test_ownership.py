"""`inplace="auto"` takes the logits' memory if the backward is their last user, and only then.

Whoever holds or needs the logits sees the bits that were there, and the gradient is stock's.
"""

import dataclasses
import gc
import random
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import fused_ce
from fused_ce import ops, ownership

ROWS, CLASSES, FEATURES = 6, 11, 4
auto = fused_ce.CrossEntropyLoss(inplace="auto")


@pytest.fixture
def taken(monkeypatch):
    """One entry for each backward that wrote over the logits."""
    written = []

    def watch(name):
        real = getattr(ops, name)

        def spy(*call):
            written.append(name)
            return real(*call)

        monkeypatch.setattr(ops, name, spy)

    for name in ("backward_", "pointwise_backward_", "kl_div_with_logits_backward_"):
        watch(name)
    return written


class Model:
    """A linear layer, whose gradient is what a loss of its output is judged by."""

    def __init__(self):
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.input = torch.randn(ROWS, FEATURES)
        self.target = torch.randint(0, CLASSES, (ROWS,))

    def __call__(self):
        return self.layer(self.input)

    def grad_of(self, loss):
        self.layer.zero_grad()
        loss.backward()
        return self.layer.weight.grad.clone()

    def check(self, loss, of=lambda logits: logits, target=None):
        grad = self.grad_of(loss)
        target = self.target if target is None else target
        expected = self.grad_of(F.cross_entropy(of(self()), target))
        torch.testing.assert_close(grad, expected)


def test_this_torch_and_this_python_can_tell():
    assert None not in ownership._counts_alone()


FREE = {
    "as it is": lambda x: x,
    "a view": lambda x: x.view(-1, CLASSES),
    "as Transformers has it": lambda x: x.view(2, 3, CLASSES).view(-1, CLASSES),
    "all but the last class": lambda x: x[:, :-1],
    "all but the last row": lambda x: x[:-1],
    "pixels": lambda x: x.view(2, 3, CLASSES).transpose(1, 2),
    "in another type": lambda x: x.bfloat16(),
    "after an operation that saves its input": lambda x: torch.sin(x),
    "of its own transposed memory": lambda x: (x.t() * 1).t(),
}


@pytest.mark.parametrize("name", FREE)
def test_logits_that_nobody_holds_are_taken(name, taken):
    model, of = Model(), FREE[name]
    logits = of(model())
    target = model.target.clamp(max=CLASSES - 2)
    target = target.view(2, 3) if name == "pixels" else target[: len(logits)]
    assert fused_ce.explain(logits, target, inplace="auto").startswith("fused: in place in back")
    loss = auto(logits, target)
    del logits
    grad = model.grad_of(loss)
    assert len(taken) == 1
    expected = model.grad_of(F.cross_entropy(of(model()).float(), target))
    rtol = 0.02 if name == "in another type" else 1e-5
    torch.testing.assert_close(grad, expected, rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_every_option_goes_with_it(reduction, scale, taken):
    model = Model()
    options = {"reduction": reduction, "label_smoothing": 0.1, "weight": torch.rand(CLASSES)}
    loss = fused_ce.cross_entropy(model(), model.target, inplace="auto", z_loss=0.0, **options)
    found = model.grad_of(loss.sum() * scale)
    assert len(taken) == 1
    expected = model.grad_of(F.cross_entropy(model(), model.target, **options).sum() * scale)
    torch.testing.assert_close(found, expected)


@dataclasses.dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor


class Holder(nn.Module):
    def forward(self, logits):
        self.last = logits
        return logits * 1.5


def _generator(logits):
    yield logits.sum()
    yield logits


def _started(generator):
    next(generator)
    return generator


def _cycle(logits):
    cycle = {"logits": logits}
    cycle["cycle"] = cycle
    return weakref.ref(logits)  # the cycle alone holds them, until it is collected


def _hooked(logits):
    logits.register_hook(lambda grad: grad + 0 * logits.sum())
    return None


class SavesOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.kept = x * 2
        return ctx.kept

    @staticmethod
    def backward(ctx, grad):
        return grad * 2 + 0 * ctx.kept


# What is made of the logits and kept until after the backward, and how its bits are read then.
HELD = {
    "a variable": (lambda x: x, lambda kept: kept),
    "a list": (lambda x: [x], lambda kept: kept[0]),
    "a dict": (lambda x: {"logits": x}, lambda kept: kept["logits"]),
    "a dataclass": (lambda x: Output(None, x), lambda kept: kept.logits),
    "a closure": (lambda x: lambda: x, lambda kept: kept()),
    "a generator": (lambda x: _started(_generator(x)), lambda kept: next(kept)),
    "a view": (lambda x: x[1:, 2:], lambda kept: kept),
    "a detached alias": (lambda x: x.detach(), lambda kept: kept),
    ".data": (lambda x: x.data, lambda kept: kept),
    "numpy": (lambda x: x.detach().numpy(), torch.from_numpy),
    "__array__": (lambda x: x.detach().__array__(), torch.from_numpy),
    "dlpack": (lambda x: torch.utils.dlpack.to_dlpack(x.detach()), torch.utils.dlpack.from_dlpack),
    "its storage": (
        lambda x: x.untyped_storage(),
        lambda kept: torch.tensor([]).set_(kept, 0, (ROWS, CLASSES)),
    ),
    "a weak reference and a cycle": (_cycle, lambda kept: kept()),
    "a weak reference to its storage": (
        lambda x: weakref.ref(x.untyped_storage()),
        lambda kept: None,
    ),
    "an unbound view": (lambda x: x.unbind(0), lambda kept: torch.stack(kept)),
    "another thread": (lambda x: _in_thread(x), lambda kept: kept()),
}


def _in_thread(logits):
    ready, found = threading.Event(), []

    def hold(held):
        ready.wait(20)
        found.append(held.clone())

    thread = threading.Thread(target=hold, args=(logits,))
    thread.start()

    def read():
        ready.set()
        thread.join()
        return found[0]

    return read


@pytest.mark.parametrize("viewed", [False, True])
@pytest.mark.parametrize("name", HELD)
def test_who_holds_the_logits_sees_them(name, viewed, taken):
    hold, read = HELD[name]
    model = Model()
    logits = model()
    kept = hold(logits)
    expected = model().detach()
    loss = auto(logits.view(-1, CLASSES) if viewed else logits, model.target)
    del logits
    model.check(loss)
    assert not taken
    seen = read(kept)
    seen = seen.detach() if isinstance(seen, torch.Tensor) else seen
    if seen is not None:
        part = expected[1:, 2:] if name == "a view" else expected
        assert torch.equal(seen, part)
    gc.collect()


NEEDED = {
    "another loss before": lambda x, model: F.cross_entropy(x, model.target),
    "a square": lambda x, model: x.square().sum(),
    "an entropy": lambda x, model: (x.softmax(1) * x).sum(),
    "another of ours": lambda x, model: fused_ce.cross_entropy(x, model.target),
}


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("name", NEEDED)
def test_what_else_needs_the_logits_has_its_gradient(name, ours_first):
    model, needs = Model(), NEEDED[name]

    def total(loss):
        logits = model()
        terms = [lambda: loss(logits, model.target), lambda: needs(logits, model)]
        first, second = terms if ours_first else terms[::-1]
        return first() + second()

    found, expected = model.grad_of(total(auto)), model.grad_of(total(F.cross_entropy))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "activation", [torch.relu, torch.exp, torch.tanh, torch.sigmoid, F.softplus, SavesOutput.apply]
)
def test_an_activation_that_saves_its_output_has_its_gradient(activation):
    model = Model()
    model.check(auto(activation(model()), model.target), of=activation)


def test_two_losses_of_one_tensor_take_it_in_the_last():
    model = Model()
    logits = model()
    losses = auto(logits, model.target), auto(logits, model.target.flip(0))
    del logits
    found = model.grad_of(losses[0] + losses[1])
    logits = model()
    both = F.cross_entropy(logits, model.target) + F.cross_entropy(logits, model.target.flip(0))
    torch.testing.assert_close(found, model.grad_of(both))


def test_leaves_and_views_of_leaves_are_never_taken(taken):
    target = torch.randint(0, CLASSES, (ROWS,))
    for of in (lambda leaf: leaf, lambda leaf: leaf.view(-1, CLASSES), lambda leaf: leaf[:, 1:]):
        leaf = torch.randn(ROWS, CLASSES, requires_grad=True)
        before = leaf.detach().clone()
        auto(of(leaf), target.clamp(max=CLASSES - 2)).backward()
        assert torch.equal(leaf, before)
    assert not taken


def test_a_graph_that_is_kept_is_not_consumed(taken):
    model = Model()
    loss = auto(model(), model.target)
    first = torch.autograd.grad(loss, model.layer.weight, retain_graph=True)
    again = torch.autograd.grad(loss, model.layer.weight, retain_graph=True)
    assert not taken and torch.equal(first[0], again[0])
    last = torch.autograd.grad(loss, model.layer.weight)
    assert len(taken) == 1
    torch.testing.assert_close(last, first)


def test_a_second_derivative_is_stocks(taken):
    model = Model()

    def second(loss):
        (grad,) = torch.autograd.grad(
            loss(model(), model.target), model.layer.weight, create_graph=True
        )
        return torch.autograd.grad(grad.square().sum(), model.layer.weight)[0]

    torch.testing.assert_close(second(auto), second(F.cross_entropy))
    assert not taken


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_recomputes_what_it_had(reentrant):
    model = Model()
    model.input.requires_grad_()
    target = model.target

    def through(input):
        return auto(model.layer(input), target)

    model.check(checkpoint(through, model.input, use_reentrant=reentrant))
    captured = model()
    loss = checkpoint(lambda x: auto(x * 1, target), captured, use_reentrant=reentrant)
    model.check(loss)
    with save_on_cpu():
        loss = auto(model(), target)
    model.check(loss)


def test_hooks_and_kept_gradients_see_the_gradient(taken):
    model, seen = Model(), []
    logits = model()
    logits.register_hook(lambda grad: seen.append(grad.clone()))
    loss = auto(logits, model.target)
    del logits
    model.check(loss)
    assert len(taken) == 1
    whole = model().detach().requires_grad_()
    F.cross_entropy(whole, model.target).backward()
    torch.testing.assert_close(seen[0], whole.grad)
    logits = model()
    _hooked(logits)  # whose closure holds them
    loss = auto(logits, model.target)
    del logits
    model.check(loss)
    assert len(taken) == 1


def test_a_module_that_keeps_its_input_has_it():
    holder, model = Holder(), Model()
    loss = auto(holder(model()), model.target)
    model.check(loss, of=lambda x: x * 1.5)
    assert torch.equal(holder.last, model())


def test_memory_that_processes_share_is_not_taken(taken):
    model = Model()
    logits = model()
    with torch.no_grad():
        logits.share_memory_()
    loss = auto(logits, model.target)
    del logits
    model.check(loss)
    assert not taken


class GivesOut(torch.autograd.Function):
    """A view of what it computes without autograd, as a DTensor's ``to_local`` does."""

    @staticmethod
    def forward(ctx, x, keeps):
        within = x.detach() * 1
        if keeps is not None:
            keeps.append(within)
        return within.view_as(within)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@pytest.mark.parametrize("keeps", [None, []], ids=["and forgets it", "and keeps it"])
def test_a_view_that_a_function_gives_out_is_its_users(keeps, taken):
    model = Model()
    for viewed in (False, True):
        logits = GivesOut.apply(model(), keeps)
        loss = auto(logits.view(-1, CLASSES) if viewed else logits, model.target)
        del logits
        model.check(loss)
    assert len(taken) == (2 if keeps is None else 0)
    assert keeps is None or torch.equal(keeps[1], model())


@pytest.mark.parametrize("viewed", [False, True])
def test_memory_that_torch_has_not_allocated_is_not_taken(viewed, taken):
    model = Model()
    lent = model().detach().numpy().copy()  # who lends it is among no counts
    logits = torch.from_numpy(lent)
    logits.copy_(model())
    loss = auto(logits.view(-1, CLASSES) if viewed else logits, model.target)
    del logits
    model.check(loss)
    assert not taken
    assert torch.equal(torch.from_numpy(lent), model())


def test_where_the_counts_tell_nothing_nothing_is_taken(taken, monkeypatch):
    monkeypatch.setattr(ownership, "_counts_alone", lambda: (None, None, None))
    model = Model()
    model.check(auto(model(), model.target))
    assert not taken


@pytest.mark.parametrize("kind", ownership._KINDS)
def test_holders_that_look_like_nobody_are_noticed(kind, monkeypatch):
    real = ownership._counts
    monkeypatch.setattr(ownership, "_counts", lambda saved: real(saved)[:1])
    assert ownership._calibrated(kind) is None


@pytest.mark.parametrize("wrong", ["yes", 2])
def test_what_is_no_answer_is_refused(wrong):
    model = Model()
    says = "inplace must be True, False or 'auto', got "
    with pytest.raises(ValueError, match=says):
        fused_ce.cross_entropy(model(), model.target, inplace=wrong)
    for function, arguments in SIBLINGS.values():
        with pytest.raises(ValueError, match=says):
            function(model(), **arguments, inplace=wrong)


# The losses beside the cross entropy, and their arguments.
LABELS = (torch.arange(ROWS * CLASSES).view(ROWS, CLASSES) % 3 == 0).float()
SIBLINGS = {
    "BCE": (
        fused_ce.binary_cross_entropy_with_logits,
        {"target": LABELS, "pos_weight": torch.arange(1.0, CLASSES + 1)},
    ),
    "focal": (fused_ce.sigmoid_focal_loss, {"targets": LABELS, "reduction": "sum"}),
    "kl_div": (fused_ce.kl_div, {"target": LABELS.softmax(1), "reduction": "batchmean"}),
    "divergence": (
        fused_ce.kl_div_with_logits,
        {"target_logits": LABELS * 2, "temperature": 2.0},
    ),
}


@pytest.mark.parametrize("name", SIBLINGS)
def test_the_other_losses_take_what_nobody_holds(name, taken):
    function, arguments = SIBLINGS[name]
    model = Model()
    for of in (FREE["as it is"], FREE["a view"], FREE["of its own transposed memory"]):
        for scale in (1.0, 0.25):
            logits = of(model())
            said = fused_ce.explain_call(function, logits, **arguments, inplace="auto")
            assert said.startswith("fused: in place in backward if nobody else holds the logits, ")
            loss = function(logits, **arguments, inplace="auto")
            del logits
            grad = model.grad_of(loss * scale)
            assert len(taken) == 1
            taken.clear()
            expected = function(of(model()), **arguments, grad_in_forward=False)
            assert torch.equal(grad, model.grad_of(expected * scale))


@pytest.mark.parametrize("name", SIBLINGS)
def test_the_other_losses_leave_what_is_held_or_needed(name, taken):
    function, arguments = SIBLINGS[name]
    model = Model()
    expected = model.grad_of(function(model(), **arguments, grad_in_forward=False))
    for held in ("a variable", "a view", "a detached alias", "numpy", "its storage"):
        hold, read = HELD[held]
        logits = model()
        kept, before = hold(logits), logits.detach().clone()
        loss = function(logits, **arguments, inplace="auto")
        del logits
        assert torch.equal(model.grad_of(loss), expected)
        seen = read(kept)
        assert torch.equal(seen.detach(), before[1:, 2:] if held == "a view" else before)
    loss = function(model(), **arguments, inplace="auto")
    kept = torch.autograd.grad(loss, model.layer.weight, retain_graph=True)
    assert torch.equal(kept[0], expected)
    (second,) = torch.autograd.grad(loss, model.layer.weight, create_graph=True)
    torch.testing.assert_close(second, expected)
    with save_on_cpu():
        loss = function(model(), **arguments, inplace="auto")
    torch.testing.assert_close(model.grad_of(loss), expected)
    leaf = model().detach().requires_grad_()
    before = leaf.detach().clone()
    function(leaf, **arguments, inplace="auto").backward()
    assert torch.equal(leaf, before)
    assert not taken


def program(seed, model, loss):
    """A small program that keeps or drops what it makes of the logits; the loss of all, and the
    bits that are still held after the backward."""
    draw, kept, terms = random.Random(seed), [], []
    tensors = [model()]
    for _ in range(draw.randint(1, 6)):
        x = draw.choice(tensors)
        step = draw.randrange(9)
        if step == 0:
            tensors.append(x.view(x.shape))
        elif step == 1:
            tensors.append(draw.choice([torch.relu, torch.sin, torch.exp, torch.tanh])(x) * 0.5)
        elif step == 2:
            kept.append(draw.choice([x, x.detach(), x[:2], x.detach().numpy()]))
        elif step == 3 and len(tensors) > 1:
            tensors.pop(draw.randrange(len(tensors)))
        elif step == 4:
            terms.append(x.square().mean())
        elif step == 5:
            terms.append(loss(x, model.target))
        elif step == 6:
            tensors.append(x.t().contiguous().t())
        elif step == 7:
            x.register_hook(lambda grad: grad * 1.0)
        else:
            tensors.append(x + 0)
    terms.append(loss(draw.choice(tensors), model.target))
    if draw.random() < 0.7:
        del tensors, x
    grad = model.grad_of(torch.stack(terms).sum())
    bits = [k.clone() if isinstance(k, torch.Tensor) else torch.tensor(k) for k in kept]
    return grad, bits


@pytest.mark.parametrize("part", range(4))
def test_random_programs_see_what_they_see_with_stock(part, taken):
    model = Model()
    for seed in range(part * 100, part * 100 + 100):
        grad, bits = program(seed, model, auto)
        expected, held = program(seed, model, F.cross_entropy)
        torch.testing.assert_close(grad, expected, msg=lambda text, seed=seed: f"{seed}: {text}")
        assert all(torch.equal(a, b) for a, b in zip(bits, held, strict=True)), seed
    assert len(taken) > 10


# name: the call of logits that nobody holds, whose gradient waits for the backward
WAITING = {
    "none": lambda x, t: fused_ce.cross_entropy(x, t, reduction="none").sum(),
    "recomputed": lambda x, t: fused_ce.cross_entropy(x, t, grad_in_forward=False),
    "an option": lambda x, t: fused_ce.cross_entropy(x, t, grad_in_forward=False, z_loss=0.1),
    "binary": lambda x, t: fused_ce.binary_cross_entropy_with_logits(
        x, F.one_hot(t, x.shape[1]).float(), reduction="none"
    ).sum(),
}


@pytest.mark.parametrize("name", WAITING)
def test_large_logits_that_nobody_holds_are_taken_by_default(name, taken):
    layer, input = nn.Linear(4, 512), torch.randn(512, 4)  # 1 MiB of logits, the least
    target = torch.randint(0, 512, (512,))
    WAITING[name](layer(input), target).backward()
    assert len(taken) == 1
    WAITING[name](layer(input[:511]), target[:511]).backward()
    held = layer(input)
    before = held.detach().clone()
    WAITING[name](held, target).backward()
    assert len(taken) == 1
    assert torch.equal(held, before)


def test_large_logits_are_not_taken_by_default_where_the_gradient_comes_first_or_false_is_given(
    taken,
):
    layer, input = nn.Linear(4, 512), torch.randn(512, 4)
    target = torch.randint(0, 512, (512,))
    fused_ce.cross_entropy(layer(input), target).backward()
    for options in ({"reduction": "none"}, {"grad_in_forward": False}):
        fused_ce.cross_entropy(layer(input), target, inplace=False, **options).sum().backward()
    assert not taken
