"""Logits that `inplace=True` has overwritten: what was computed from them since has no gradient.

An error says so, whether the logits themselves are used or what they are a view of. What was
computed before, hooks and kept gradients are as if nobody had written. A leaf is taken for what it
holds, as after any edit under `no_grad`.
"""

import gc
import math
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from support.devices import every_device, on_cpu
from support.grids import cases_of, crossed, together
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import BackwardHook

import fused_ce

pytestmark = [every_device, pytest.mark.filterwarnings("ignore:Full backward hook is firing")]

ROWS, CLASSES = 6, 5
REFUSED = "has overwritten these logits"

# name: from what a layer has computed, [ROWS, CLASSES], the logits
LOGITS = {
    "result": lambda base: base,
    "view": lambda base: base.view(ROWS, CLASSES),
    "nested view": lambda base: base.view(2, 3, CLASSES).view(ROWS, CLASSES),
    "strided view": lambda base: base.view(3, 2, CLASSES)[:, 1:].transpose(1, 2),
    # torch lets nobody write to these.
    "one of several": lambda base: base.split(3)[1],
    "output of a module with hooks": lambda base: BackwardHook(
        torch.nn.Identity(), [lambda *_: None], []
    ).setup_output_hook(base),
}
# name: (options, dtype)
WRITES_IN_FORWARD = {"mean": ({}, torch.float32), "sum": ({"reduction": "sum"}, torch.float32)}
WRITES_IN_BACKWARD = {
    "none": ({"reduction": "none"}, torch.float32),
    "float16": ({}, torch.float16),
    "asked to": ({"grad_in_forward": False}, torch.float32),
}
CALLS = WRITES_IN_FORWARD | WRITES_IN_BACKWARD
# name: a value of logits and of what they are a view of, whether it reads one of them or not
USES = {
    "square": lambda logits, base: logits.square().sum(),
    "sum": lambda logits, base: logits.sum(),
    "square of the base": lambda logits, base: base.square().sum(),
    "another view": lambda logits, base: base[1].exp().sum(),
    "another type": lambda logits, base: base.double().square().sum(),
    "another loss": lambda logits, base: F.cross_entropy(logits, targets(logits)),
}

every_logits = pytest.mark.parametrize("kind", LOGITS)
LOCKED = [kind for kind in LOGITS if "of " in kind]
PLAIN = [kind for kind in LOGITS if kind not in LOCKED]
every_plain_logits = pytest.mark.parametrize("kind", PLAIN)
every_call = pytest.mark.parametrize("call", CALLS)


def targets(logits):
    return torch.arange(logits.numel() // CLASSES).view(logits.shape[0], *logits.shape[2:]) % 5


def layer(kind, dtype=torch.float32):
    """A leaf, what is computed from it by a node that saves nothing, and the logits."""
    leaf = torch.randn(ROWS, CLASSES).to(dtype).requires_grad_()
    base = leaf * 2
    return leaf, base, LOGITS[kind](base)


def loss_of(logits, call, inplace=True):
    options, _ = CALLS[call]
    if not inplace:
        options = {name: value for name, value in options.items() if name == "reduction"}
        return F.cross_entropy(logits, targets(logits), **options).sum()
    return fused_ce.cross_entropy(logits, targets(logits), inplace=True, **options).sum()


def compared(body, kind, call):
    """What `body` finds with stock's loss and with ours."""
    results = []
    for inplace in (False, True):
        torch.manual_seed(0)
        leaf, base, logits = layer(kind, CALLS[call][1])
        results.append(body(leaf, base, logits, lambda z, i=inplace: loss_of(z, call, i)))
    # In float16, stock rounds several times.
    loose = {"rtol": 1e-2, "atol": 1e-2} if CALLS[call][1] == torch.float16 else {}
    torch.testing.assert_close(*results, **loose)


def refused(call):
    """The error, and no other."""
    with pytest.raises(RuntimeError, match=REFUSED):
        call()


@together
@crossed(with_loss=[False, True], use=USES, kind=PLAIN, call=WRITES_IN_FORWARD)
def test_use_after_the_loss_has_no_gradient(with_loss, use, kind, call):
    leaf, base, logits = layer(kind)
    loss = loss_of(logits, call)
    value = USES[use](logits, base)
    refused((value + loss if with_loss else value).backward)
    assert leaf.grad is None


@together
@crossed(use=USES, kind=PLAIN, call=CALLS)
def test_use_after_the_backward_has_no_gradient(use, kind, call):
    _, base, logits = layer(kind, CALLS[call][1])
    loss_of(logits, call).backward()
    refused(USES[use](logits, base).backward)


@together
@every_call
@pytest.mark.parametrize("kind", LOCKED)
def test_use_of_a_view_that_nobody_may_write_to_has_no_gradient(kind, call):
    # It is torch that refuses the use.
    _, base, logits = layer(kind, CALLS[call][1])
    loss_of(logits, call).backward()
    with pytest.raises(RuntimeError):
        logits.sum().backward()
    refused(base.sum().backward)


@together
@every_call
@every_logits
def test_logits_of_any_kind_have_the_gradient(kind, call):
    def body(leaf, base, logits, loss):
        (loss(logits) * 3).backward()
        return leaf.grad

    compared(body, kind, call)


@together
@every_call
@every_logits
def test_use_before_the_loss_has_its_gradient(kind, call):
    # Of values that do not save the logits: torch refuses the others, as their memory changes.
    def body(leaf, base, logits, loss):
        value = logits.sum() + base.double().square().sum() + base[1].mean()
        (loss(logits) + value).backward()
        return leaf.grad

    compared(body, kind, call)


@together
@pytest.mark.parametrize("call", WRITES_IN_BACKWARD)
@every_logits
def test_use_before_the_writing_has_its_gradient(kind, call):
    def body(leaf, base, logits, loss):
        value = loss(logits)
        (value + logits.square().sum() + base.exp().sum()).backward()
        return leaf.grad

    compared(body, kind, call)


@together
@crossed(scale=[1.0, 3.0], kind=LOGITS, call=CALLS)
def test_hook_sees_the_gradient_wherever_it_was_registered(scale, kind, call):
    late = kind in PLAIN  # torch refuses hooks on the other views once they are changed
    orders = []

    def body(leaf, base, logits, loss):
        seen = {}
        orders.append([])

        def hook(name, factor):
            def run(gradient):
                orders[-1].append(name)
                seen[name] = gradient.clone()
                return gradient * factor

            return run

        logits.register_hook(hook("early", 2))
        base.register_hook(hook("early of the base", 3))
        value = loss(logits) * scale
        if late:
            logits.register_hook(hook("late", 5))
            base.register_hook(hook("late of the base", 7))
        value.backward()
        return leaf.grad, seen

    compared(body, kind, call)
    assert orders[0] == orders[1]
    assert len(orders[0]) == 2 + 2 * late


KEPT = {"asked": ("before", "after", "both"), "kind": tuple(LOGITS), "call": tuple(CALLS)}


def is_taken(case):
    """torch lets nobody ask for the gradient of a locked view once it is overwritten."""
    late = case.get("asked") in ("after", "both")
    return not (late and case.get("kind") in LOCKED and case.get("call") in WRITES_IN_FORWARD)


@together
@pytest.mark.parametrize("case", cases_of(KEPT, often=2, valid=is_taken))
def test_kept_gradient_is_kept_whenever_it_was_asked_for(case):
    asked, kind, call = case.values()

    def body(leaf, base, logits, loss):
        if asked != "after":
            logits.retain_grad(), base.retain_grad()
        value = loss(logits)
        if asked != "before":
            logits.retain_grad(), base.retain_grad()
        value.backward()
        return leaf.grad, logits.grad, base.grad

    compared(body, kind, call)


@every_call
def test_kept_gradient_adds_to_the_one_before(call):
    def body(leaf, base, logits, loss):
        logits.retain_grad()
        (logits * 3).sum().backward(retain_graph=True)
        loss(logits).backward()
        return logits.grad

    compared(body, "result", call)


@together
@every_call
@every_logits
def test_gradient_for_an_edge_from_before_is_there(kind, call):
    def body(leaf, base, logits, loss):
        edges = get_gradient_edge(logits), get_gradient_edge(base)
        return torch.autograd.grad(loss(logits), edges)

    compared(body, kind, call)


@together
@every_call
@every_plain_logits
def test_hook_can_be_registered_after_the_backward(kind, call):
    # On a view whose memory has changed, torch crashes unless it has found its node.
    leaf, base, logits = layer(kind, CALLS[call][1])
    loss_of(logits, call).backward()
    logits.register_hook(lambda gradient: None)
    base.register_hook(lambda gradient: None)
    refused(logits.sum().backward)


@together
@every_call
@pytest.mark.parametrize("viewed", [False, True])
def test_leaf_is_taken_for_what_it_holds(viewed, call):
    leaf = torch.randn(ROWS, CLASSES).to(CALLS[call][1]).requires_grad_()
    logits = leaf.view(ROWS, CLASSES) if viewed else leaf
    seen = []
    logits.register_hook(lambda gradient: seen.append(gradient.shape))
    loss_of(logits, call).backward()
    assert len(seen) == 1
    held = leaf.detach().clone()
    assert torch.equal(leaf.grad, held)
    assert leaf.grad.data_ptr() == leaf.data_ptr()
    (gradient,) = torch.autograd.grad(logits.square().sum(), leaf)
    assert torch.equal(gradient, 2 * held)
    # And written again, it is trained again.
    with torch.no_grad():
        leaf.copy_(torch.randn(ROWS, CLASSES))
    leaf.grad = None
    values = leaf.detach().clone().requires_grad_()
    loss_of(logits, call).backward()
    loss_of(values, call, inplace=False).backward()
    torch.testing.assert_close(leaf.grad, values.grad)


@together
@crossed(reentrant=[False, True], kind=PLAIN, call=CALLS)
def test_use_after_a_checkpoint_has_no_gradient(kind, reentrant, call):
    # The function runs again in the backward. A reentrant one has no gradient for the logits if it
    # has captured them, and writes all the same.
    def body(leaf, base, logits, loss):
        anchor = torch.ones((), requires_grad=True)  # a reentrant checkpoint wants an argument
        value = checkpoint(lambda one: loss(logits) * one, anchor, use_reentrant=reentrant)
        value.backward()
        return leaf.grad

    compared(body, kind, call)
    leaf, base, logits = layer(kind, CALLS[call][1])
    body(leaf, base, logits, lambda z: loss_of(z, call))
    refused(base.sum().backward)


@together
@every_call
@every_plain_logits
def test_overwritten_logits_are_let_go(kind, call):
    # By reference counting alone: no node holds what holds it.
    gc.collect()
    gc.disable()
    try:
        leaf, base, logits = layer(kind, CALLS[call][1])
        watched = [weakref.ref(logits), weakref.ref(base)]
        loss = loss_of(logits, call)
        del logits, base
        loss.backward()
        del loss
        assert [w() for w in watched] == [None, None]

        leaf, base, logits = layer(kind, CALLS[call][1])
        watched = [weakref.ref(logits), weakref.ref(base), weakref.ref(leaf)]
        logits.register_hook(lambda gradient: None)
        loss = loss_of(logits, call)
        logits.retain_grad()
        torch.autograd.grad(loss, leaf)
        del logits, base, loss, leaf
        assert [w() for w in watched] == [None, None, None]
    finally:
        gc.enable()


@on_cpu  # on a device the host does not look at what arrives
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["index", "probability", "sample_weight", "binary", "divergence"])
def test_what_arrives_of_no_number_reaches_the_zeros_of_rows_that_count(kind, value):
    # Logits so far apart that most of the gradient is zero, and of the first row all of it.
    logits = 1000 * torch.eye(4, 6)
    target, options = torch.tensor([0, 3, -100, 1]), {}
    function = fused_ce.cross_entropy
    left_out = target == -100
    if kind != "index":
        target, left_out = F.one_hot(target % 6, 6).float(), torch.zeros(4, dtype=torch.bool)
    if kind in ("sample_weight", "divergence"):
        options["sample_weight"] = torch.tensor([1.0, 2.0, 1.0, 0.0])
        left_out = options["sample_weight"] == 0
    if kind == "divergence":
        function, target = fused_ce.kl_div_with_logits, 1000 * target
    if kind == "binary":
        function = fused_ce.binary_cross_entropy_with_logits
    leaf = logits.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = function(leaf * 1, target, inplace=True, **options)
    loss.backward(torch.tensor(value))
    assert not leaf.grad[~left_out].isfinite().any()
    assert not leaf.grad[left_out].any()


@every_call
@pytest.mark.parametrize("kind", ["result", "nested view"])
@pytest.mark.parametrize("name", ["exp", "relu"])
def test_a_layer_that_needs_its_own_result_is_named(name, kind, call):
    leaf = torch.randn(ROWS, CLASSES).to(CALLS[call][1]).requires_grad_()
    loss = loss_of(LOGITS[kind](getattr(leaf, name)()), call)
    with pytest.raises(RuntimeError, match=f"fused_ce: .* the result of {name.title()}Backward0"):
        loss.backward()


def exp_and_logits():
    leaf = torch.randn(ROWS, CLASSES, requires_grad=True)
    expected = torch.autograd.grad(F.cross_entropy(leaf.exp(), targets(leaf)), leaf)
    return leaf, leaf.exp(), expected


def test_the_gradient_up_to_a_layer_that_needs_its_own_result_is_there():
    _, logits, _ = exp_and_logits()
    edge = get_gradient_edge(logits)
    expected = torch.autograd.grad(F.cross_entropy(logits, targets(logits)), logits)
    found = torch.autograd.grad(loss_of(logits, "mean"), edge)
    torch.testing.assert_close(found, expected)


def test_auto_sees_a_layer_that_needs_its_own_result():
    leaf, logits, expected = exp_and_logits()
    loss = fused_ce.cross_entropy(logits, targets(logits), inplace="auto")
    del logits
    torch.testing.assert_close(torch.autograd.grad(loss, leaf), expected)


def test_a_result_that_hooks_have_packed_elsewhere_is_as_it_was():
    leaf, _, expected = exp_and_logits()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda kept: kept):
        logits = leaf.exp()
    torch.testing.assert_close(torch.autograd.grad(loss_of(logits, "mean"), leaf), expected)


def test_a_layer_that_needs_its_own_result_is_let_go_at_once():
    leaf, logits, _ = exp_and_logits()
    freed = []
    weakref.finalize(logits.grad_fn.metadata.setdefault("kept", Kept()), freed.append, True)
    loss = loss_of(logits, "mean")
    gc.disable()
    try:
        del logits, loss
        assert freed
    finally:
        gc.enable()


class Kept:
    """What a node holds, and what tells that it is gone."""
