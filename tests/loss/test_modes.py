"""The four moments at which a gradient can be computed, and what each does to memory.

Default and recompute leave the logits alone; in place overwrites them, once, and refuses whatever
would need them again; without grad nothing is written. Tensors that someone else changes between
forward and backward give stock's gradient or autograd's error, never a wrong gradient.
"""

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from support.devices import every_device
from support.grids import (
    MODES,
    REDUCTIONS,
    SHAPES,
    every_differentiating_mode,
    every_dtype,
    every_reduction,
    together,
)
from support.layouts import GEOMETRIES, OVERLAPPING, lay_out, target_of
from support.reference import assert_as_accurate, float64, ours, same_layout, stock
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fused_ce

pytestmark = every_device


def problem(dtype=torch.float32, shape=(6, 19)):
    return torch.randn(shape).to(dtype), target_of(torch.int64, shape, dtype)


def overwrites_in_forward(reduction, dtype):
    # The others wait for grad_output: it belongs to a row, or must come before fp16's rounding.
    return reduction != "none" and dtype != torch.float16


def test_modes_can_be_told_apart():
    input, target = problem()
    input.requires_grad_()
    said = {fused_ce.explain(input, target, **options) for options in MODES.values()}
    with torch.no_grad():
        said.add(fused_ce.explain(input, target))
    assert len(said) == 4
    assert all(text.startswith("fused: ") for text in said)
    # The instruction set comes last and is the same for all of them.
    assert len({text.rsplit(", ", 1)[1] for text in said}) == 1


@together
@every_dtype
@every_reduction
@pytest.mark.parametrize("mode", ["default", "recompute"])
def test_logits_are_left_alone_unless_asked(mode, reduction, dtype):
    input, target = problem(dtype)
    leaf = input.clone().requires_grad_()
    loss = fused_ce.cross_entropy(leaf, target, reduction=reduction, **MODES[mode])
    loss.backward(torch.full_like(loss, 0.25))
    assert torch.equal(leaf.detach(), input)
    assert leaf._version == 0
    assert leaf.grad.data_ptr() != leaf.data_ptr()


@together
@every_dtype
@every_reduction
@pytest.mark.parametrize("is_leaf", [True, False])
@pytest.mark.on_simulator
def test_in_place_gradient_is_where_the_logits_were(reduction, dtype, is_leaf):
    input, target = problem(dtype)
    leaf = input.clone().requires_grad_()
    logits = leaf if is_leaf else leaf * 1
    logits.retain_grad()
    loss = fused_ce.cross_entropy(logits, target, reduction=reduction, inplace=True)
    # The moment of the writing, and the version counter that tells autograd of it.
    early = overwrites_in_forward(reduction, dtype)
    assert torch.equal(logits.detach(), input) != early
    assert (logits._version > 0) == early
    loss.sum().backward()
    assert logits._version > 0
    total = "sum" if reduction == "none" else reduction
    options = {"reduction": total}
    exact = float64(input, target, **options).grad_input
    assert_as_accurate(logits.detach(), stock(input, target, **options).grad_input, exact)
    assert torch.equal(leaf.grad, logits.detach())
    if is_leaf:
        assert leaf.grad.data_ptr() == leaf.data_ptr()


@pytest.mark.on_simulator
def test_in_place_in_backward_is_rounded_once():
    # 0.3 is no power of two, so that scaling a gradient already in bfloat16 would round it again.
    input, target = problem(torch.bfloat16)

    def gradient(**mode):
        leaf = input.clone().requires_grad_()
        loss = fused_ce.cross_entropy(leaf, target, grad_in_forward=False, **mode)
        (loss * 0.3).backward()
        return leaf.grad

    assert torch.equal(gradient(inplace=True), gradient())


def test_explain_says_that_logits_cannot_be_overwritten():
    logits = torch.randn(1, 5, requires_grad=True).expand(4, 5)
    target = torch.arange(4)
    with pytest.raises(RuntimeError) as raised:
        fused_ce.cross_entropy(logits, target, inplace=True)
    said = fused_ce.explain(logits, target, inplace=True)
    assert said == f"refused: {str(raised.value).splitlines()[0]}"
    with torch.no_grad():
        assert fused_ce.explain(logits, target, inplace=True).startswith("fused: no gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.on_simulator
def test_in_place_waits_for_a_target_gradient(dtype):
    # The target's gradient is made of log-probabilities: the logits must last until backward.
    input = torch.randn(6, 19).to(dtype)
    target = target_of("probability", input.shape, dtype)
    leaf = same_layout(input).requires_grad_()
    loss = fused_ce.cross_entropy(leaf, target.clone().requires_grad_(), inplace=True)
    assert torch.equal(leaf.detach(), input)
    loss.backward()
    assert leaf.grad.data_ptr() == leaf.data_ptr()


@together
@every_reduction
@every_dtype
@pytest.mark.parametrize("reason", ["no_grad", "inference_mode", "no input grad", "target grad"])
@pytest.mark.on_simulator
def test_in_place_writes_nothing_where_no_gradient_is_wanted(reason, dtype, reduction):
    input, target = problem(dtype)
    values = input.clone()
    if reason == "target grad":
        target = target_of("probability", input.shape, dtype).requires_grad_()
    context = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
    }.get(reason, torch.enable_grad)
    with context():
        if reason == "no_grad":
            input.requires_grad_()
        loss = fused_ce.cross_entropy(input, target, reduction=reduction, inplace=True)
    if loss.requires_grad:
        loss.sum().backward()
        expected = stock(values, target, target_grad=True, reduction=reduction)
        torch.testing.assert_close(loss.detach(), expected.loss, rtol=1e-2, atol=1e-2)
    assert torch.equal(input, values)


@together
@pytest.mark.parametrize("shape, layout", [g for g in GEOMETRIES if g[1] in OVERLAPPING])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.on_simulator
def test_in_place_refuses_logits_that_share_memory(shape, layout, reduction, dtype):
    input = lay_out(torch.randn(SHAPES[shape](5)).to(dtype), layout).requires_grad_()
    before = input.detach().clone()
    target = target_of(torch.int64, input.shape, dtype)
    with pytest.raises(RuntimeError):
        fused_ce.cross_entropy(input, target, reduction=reduction, inplace=True)
    assert torch.equal(input, before)
    # Nothing is to be written without grad, so nothing is wrong with it either.
    ours(input.detach(), target, mode="no grad", reduction=reduction, inplace=True)


@together
@every_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.on_simulator
def test_in_place_goes_back_once(hooked, reduction, dtype):
    # What hooks have stored has no version for autograd to compare.
    input, target = problem(dtype)
    input.requires_grad_()
    with torch.autograd.graph.save_on_cpu() if hooked else contextlib.nullcontext():
        loss = fused_ce.cross_entropy(input, target, reduction=reduction, inplace=True).sum()
    loss.backward(retain_graph=True)
    gradient = input.grad.clone()
    with pytest.raises(RuntimeError):
        loss.backward()
    assert torch.equal(input.grad, gradient)


@together
@every_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.on_simulator
def test_in_place_refuses_to_be_differentiated_twice(reduction, dtype):
    input, target = problem(dtype)
    input.requires_grad_()
    loss = fused_ce.cross_entropy(input, target, reduction=reduction, inplace=True).sum()
    with pytest.raises(RuntimeError):
        torch.autograd.grad(loss, input, create_graph=True)


@together
@every_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.on_simulator
def test_in_place_is_noticed_by_a_node_that_saved_the_logits(reduction, dtype):
    input, target = problem(dtype)
    logits = input.requires_grad_() * 1
    penalty = logits.square().sum()  # saves the logits
    loss = fused_ce.cross_entropy(logits, target, reduction=reduction, inplace=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + penalty).backward()


@together
@every_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.on_simulator
def test_in_place_forward_is_noticed_by_another_node(reduction, dtype):
    # The other node goes back first: from the logits if they are still there, else not at all.
    input, target = problem(dtype)
    logits = input.requires_grad_() * 1
    penalty = logits.square().sum()
    loss = fused_ce.cross_entropy(logits, target, reduction=reduction, inplace=True).sum()
    if overwrites_in_forward(reduction, dtype):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            penalty.backward()
    else:
        penalty.backward(retain_graph=True)
        assert torch.equal(input.grad, 2 * input.detach())
        loss.backward()


@together
@pytest.mark.parametrize("first", REDUCTIONS)
@pytest.mark.parametrize("second", REDUCTIONS)
@pytest.mark.on_simulator
def test_two_losses_in_place_on_the_same_logits_are_refused(first, second):
    input, target = problem()
    input.requires_grad_()
    one = fused_ce.cross_entropy(input, target, reduction=first, inplace=True).sum()
    two = fused_ce.cross_entropy(input, target, reduction=second, inplace=True).sum()
    with pytest.raises(RuntimeError):
        (one + two).backward()


@together
@every_reduction
@pytest.mark.parametrize("kind", [torch.int64, torch.int32, "probability"], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.25])
@every_differentiating_mode
@pytest.mark.parametrize("changed", ["input", "target", "weight", "ancestor"])
def test_tensor_changed_before_backward_gives_no_wrong_gradient(
    changed, mode, scale, kind, reduction
):
    values = {
        "input": torch.randn(6, 5),
        "target": target_of(kind, (6, 5), torch.float32),
        "weight": torch.rand(5) + 0.5,
    }
    options = {"reduction": reduction, "label_smoothing": 0.1}
    expected = stock(**values, scale=scale, **options).grad_input
    tensors = {name: same_layout(value) for name, value in values.items()}
    # The logits are a view of another tensor, through which they may be changed as well.
    ancestor = torch.cat([tensors["input"], torch.zeros(1, 5)])
    tensors["input"] = ancestor[:-1].detach().requires_grad_()
    tensors["ancestor"] = ancestor
    loss = fused_ce.cross_entropy(
        tensors["input"], tensors["target"], tensors["weight"], **options, **MODES[mode]
    )
    with torch.no_grad():
        tensors[changed].fill_(0)
    multiples = torch.arange(loss.numel()).remainder(5) - 1.5 if loss.dim() else torch.ones(())
    try:
        (gradient,) = torch.autograd.grad(loss, tensors["input"], multiples * scale)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(gradient, expected)


@together
@pytest.mark.parametrize("scale", [1.0, 0.25])
@every_reduction
def test_in_place_in_a_checkpoint_finds_the_logits_in_their_place(reduction, scale):
    # The function runs a second time in the backward, with logits that it has not made itself.
    leaf, target = torch.randn(6, 5), torch.randint(0, 5, (6,))
    gradients = []
    for function, extra in ((fused_ce.cross_entropy, {"inplace": True}), (F.cross_entropy, {})):
        input = leaf.clone().requires_grad_()
        logits = input * 2

        def run(logits=logits, function=function, extra=extra):
            return function(logits, target, reduction=reduction, **extra)

        loss = checkpoint(run, use_reentrant=False)
        loss.backward(torch.full_like(loss, scale))
        gradients.append(input.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("inplace", [False, True])
def test_selective_checkpoint_that_keeps_our_operators_is_right(inplace):
    leaf, target = torch.randn(6, 5), torch.randint(0, 5, (6,))

    def keeps_ours(context, operator, *args, **kwargs):
        ours = operator.namespace == "fused_ce"
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, keeps_ours)
    gradients = []
    for function, extra in ((fused_ce.cross_entropy, {"inplace": inplace}), (F.cross_entropy, {})):
        input = leaf.clone().requires_grad_()

        def run(input, function=function, extra=extra):
            return function(input * 2, target, **extra)

        try:
            checkpoint(run, input, use_reentrant=False, context_fn=contexts).backward()
        except RuntimeError:
            assert inplace  # refused, and nothing wrong
            return
        gradients.append(input.grad)
    torch.testing.assert_close(*gradients)


@together
@every_dtype
@pytest.mark.parametrize("classes", [10, 300])  # tiles of rows, and rows by themselves
@pytest.mark.parametrize("kind", [torch.int64, "probability"], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.on_simulator
def test_every_backward_of_a_kept_graph_has_the_same_bits(dtype, classes, kind, scale):
    input = torch.randn(50, classes).to(dtype).requires_grad_()
    target = target_of(kind, input.shape, dtype)
    loss = fused_ce.cross_entropy(input, target)
    first, second = (
        torch.autograd.grad(loss, input, torch.tensor(scale, dtype=dtype), retain_graph=retain)
        for retain in (True, False)
    )
    assert torch.equal(*first, *second)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.on_simulator
def test_stored_gradient_belongs_to_one_graph_and_stays(reduction, scale):
    # Two losses that share their logits, then each gone back through more than once, in turns.
    input, target = problem()
    other = target.flip(0)
    input.requires_grad_()
    losses = [fused_ce.cross_entropy(input, t, reduction=reduction) for t in (target, other)]
    expected = [
        stock(input, t, reduction=reduction, scale=scale).grad_input for t in (target, other)
    ]
    for retain in (True, True, False):
        for loss, gradient in zip(losses, expected, strict=True):
            (value,) = torch.autograd.grad(loss, input, torch.tensor(scale), retain_graph=retain)
            torch.testing.assert_close(value, gradient)
            value.fill_(7)  # whoever got a gradient may do what they like with it


@every_differentiating_mode
def test_hook_that_changes_the_gradient_changes_this_one_alone(mode):
    input, target = problem()
    input.requires_grad_()
    seen = []
    input.register_hook(lambda gradient: seen.append(gradient.clone()) or gradient * 2)
    fused_ce.cross_entropy(input, target, **MODES[mode]).backward()
    torch.testing.assert_close(input.grad, 2 * seen[0])


@every_reduction
@pytest.mark.on_simulator
def test_training_in_place_follows_stock(reduction):
    # A linear classifier, three steps with accumulation over two batches.
    x, y = torch.randn(3, 2, 8, 6), torch.randint(0, 5, (3, 2, 8))
    finals = []
    for function, extra in ((fused_ce.cross_entropy, {"inplace": True}), (F.cross_entropy, {})):
        torch.manual_seed(1)
        model = torch.nn.Linear(6, 5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for inputs, targets in zip(x, y, strict=True):
            for input, target in zip(inputs, targets, strict=True):
                loss = function(model(input), target, reduction=reduction, **extra)
                (loss.sum() / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        finals.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*finals)


def test_weight_in_the_memory_of_the_logits_is_refused():
    input = torch.randn(4, 5)
    before = input.clone()
    leaf = input.requires_grad_()
    with pytest.raises(RuntimeError, match="share no memory"):
        fused_ce.cross_entropy(leaf, torch.tensor([0, 1, 2, 3]), leaf.detach()[0], inplace=True)
    assert torch.equal(leaf.detach(), before)


def test_incoming_gradient_in_the_memory_of_the_logits_is_refused():
    # Many rows, so that some are computed after the first were overwritten.
    leaf = torch.randn(2000, 5).half().requires_grad_()
    before = leaf.detach().clone()
    loss = fused_ce.cross_entropy(leaf, torch.randint(0, 5, (2000,)), reduction="sum", inplace=True)
    with pytest.raises(RuntimeError, match="share no memory"):
        loss.backward(leaf.detach()[0, 0])
    assert torch.equal(leaf.detach(), before)
