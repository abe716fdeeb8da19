"""`torch.func`, forward mode and higher derivatives give what they give for stock's loss.

No custom operator and no `autograd.Function` of ours may be met by a transform: some of them then
return zeros without a word. Whatever is transformed, and whenever (in the forward, around a
backward alone, under `torch.compile`), the reference is the same transform of `F.cross_entropy`,
uncompiled.
"""

import re
import warnings

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from support.grids import MODES, REDUCTIONS, REPEATABLE, every_options_of, every_reduction, together
from support.layouts import target_of
from support.reference import same_layout
from torch.func import (
    functional_call,
    functionalize,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)

import fused_ce

SHAPE = (3, 4, 2)
KINDS = {"index": torch.int64, "probability": "probability"}


every_kind = pytest.mark.parametrize("kind", KINDS)


def problem(kind="index", dtype=torch.float64, shape=SHAPE):
    """Logits, targets (every third index is ignored), and options in which every term counts."""
    input = torch.randn(shape, dtype=dtype)
    target = target_of(KINDS.get(kind, kind), shape, dtype)
    if not target.is_floating_point():
        target.view(-1)[1::3] = 2
    ignored = {} if target.is_floating_point() else {"ignore_index": 2}
    weight = torch.rand(shape[1], dtype=dtype) + 0.5
    return input, target, {"weight": weight, "label_smoothing": 0.1, **ignored}


def both(body, options=None):
    """`body` called with our loss and with stock's; `options` are our own."""

    def ours(input, target, *args, **kwargs):
        return fused_ce.cross_entropy(input, target, *args, **kwargs, **(options or {}))

    return body(ours), body(F.cross_entropy)


def total(loss):
    """A scalar of unreduced losses, to which each row contributes differently."""

    def weighted(*args):
        losses = loss(*args).flatten()
        return (losses * torch.arange(1, losses.numel() + 1)).sum()

    return weighted


def step_like(tensor):
    return torch.linspace(-1, 1, tensor.numel(), dtype=tensor.dtype).view(tensor.shape)


def _cotangent(loss, x):
    return torch.full_like(loss(x), 0.25)


# name: what it makes of a loss and its logits
TRANSFORMS = {
    "grad": lambda loss, x: grad(total(loss))(x),
    "grad_and_value": lambda loss, x: grad_and_value(total(loss))(x),
    "vmap": lambda loss, x: vmap(loss)(torch.stack([x, -x, 3 * x])),
    "vmap of grad": lambda loss, x: vmap(grad(total(loss)))(torch.stack([x, -x, 3 * x])),
    "vmap of vmap": lambda loss, x: vmap(vmap(loss))(torch.stack([x, -x]).expand(3, 2, *x.shape)),
    "jvp": lambda loss, x: jvp(loss, (x,), (step_like(x),)),
    "vjp": lambda loss, x: vjp(loss, x)[1](_cotangent(loss, x)),
    "jacrev": lambda loss, x: jacrev(loss)(x),
    "jacfwd": lambda loss, x: jacfwd(loss)(x),
    "hessian": lambda loss, x: hessian(loss)(x),
    "reverse over reverse": lambda loss, x: jacrev(jacrev(loss))(x),
    "forward over forward": lambda loss, x: jacfwd(jacfwd(loss))(x),
    "forward over reverse": lambda loss, x: jvp(grad(total(loss)), (x,), (step_like(x),)),
    "reverse over forward": lambda loss, x: grad(
        lambda x: jvp(total(loss), (x,), (step_like(x),))[1]
    )(x),
    "third derivative": lambda loss, x: vmap(jacfwd(hessian(loss)))(x[:1, :, :1].unsqueeze(0)),
    "functionalize": lambda loss, x: functionalize(loss)(x),
}


@together
@pytest.mark.parametrize("transform", TRANSFORMS)
@every_kind
@every_reduction
def test_transform_agrees_with_stock(transform, kind, reduction):
    input, target, extra = problem(kind)
    options = MODES["recompute" if reduction == "sum" else "default"]

    def body(function):
        def loss(x):
            y = target[: x.shape[0], ..., : x.shape[-1]]
            return function(x, y, reduction=reduction, **extra)

        return TRANSFORMS[transform](loss, input)

    torch.testing.assert_close(*both(body, options))


# functionalize is one of the steps of compiling, and cannot be met inside it; the third derivative
# takes long, and its levels are those of the second; torch crashes on a compiled grad of a jvp,
# of stock's loss as of ours.
NOT_COMPILED = ("functionalize", "third derivative", "reverse over forward")
COMPILED = [name for name in TRANSFORMS if name not in NOT_COMPILED]


# Each reduction and kind of target with some of the transforms: compiling takes long.
@together
@pytest.mark.parametrize(
    "transform, kind, reduction",
    [
        (transform, list(KINDS)[i % 2], REDUCTIONS[i % 3])
        for i, transform in enumerate((*COMPILED, "vmap of grad", "hessian", "grad"))
    ],
)
def test_compiled_transform_agrees_with_stock(transform, kind, reduction):
    input, target, extra = problem(kind)

    def loss_of(function):
        return lambda x: function(x, target, reduction=reduction, **extra)

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: TRANSFORMS[transform](loss_of(fused_ce.cross_entropy), x),
        backend="aot_eager",
        fullgraph=True,
    )
    expected = TRANSFORMS[transform](loss_of(F.cross_entropy), input)
    torch.testing.assert_close(compiled(input), expected)


# name: (in_dims for logits, target, weight)
BATCHES = {
    "logits": (0, None, None),
    "logits, last axis": (-1, None, None),
    "target": (None, 0, None),
    "weight": (None, None, 0),
    "logits and target": (0, 0, None),
    "all": (0, 0, 0),
}


def batched_arguments(kind, in_dims):
    values = [problem("index" if kind == "int32" else kind)[:2] for _ in range(3)]
    weights = [torch.rand(SHAPE[1], dtype=torch.float64) for _ in values]
    columns = zip(*((x, y, w) for (x, y), w in zip(values, weights, strict=True)), strict=True)
    return [
        column[0] if axis is None else torch.stack(column, axis)
        for column, axis in zip(columns, in_dims, strict=True)
    ]


@together
@pytest.mark.parametrize("in_dims", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("kind", ["index", "int32", "probability"])
# Stock cannot smooth for a batch of index targets.
@pytest.mark.parametrize(
    "form, smoothing", [("vmap", 0.0), ("vmap", 0.1), ("vmap of grad", 0.1), ("chunks", 0.0)]
)
def test_batch_over_an_argument_agrees_with_stock(form, smoothing, kind, in_dims):
    arguments = batched_arguments(kind, in_dims)

    def body(function):
        args = list(arguments)
        if kind == "int32" and function is not F.cross_entropy:
            args[1] = args[1].int()

        def loss(x, y, w):
            return function(x, y, w, label_smoothing=smoothing)

        if form == "vmap of grad":
            return vmap(grad(loss), in_dims)(*args)
        return vmap(loss, in_dims, chunk_size=2 if form == "chunks" else None)(*args)

    try:
        expected = body(F.cross_entropy)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error)[:60])):
            body(fused_ce.cross_entropy)
    else:
        torch.testing.assert_close(body(fused_ce.cross_entropy), expected)


@pytest.mark.parametrize(
    "kind, batch", [("index", "logits and target"), ("int32", "target"), ("probability", "all")]
)
def test_compiled_batch_agrees_with_stock(kind, batch):
    in_dims = BATCHES[batch]
    x, y, w = batched_arguments(kind, in_dims)
    expected = vmap(F.cross_entropy, in_dims)(x, y, w)
    torch._dynamo.reset()
    compiled = torch.compile(
        vmap(fused_ce.cross_entropy, in_dims), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(x, y.int() if kind == "int32" else y, w), expected)


def test_batch_of_unbatched_rows_agrees_with_stock():
    # How per-sample gradients are usually written: the loss sees one row and a 0-d target.
    input, target = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, -100])

    def body(function):
        return vmap(grad_and_value(lambda x, y: function(x, y, reduction="sum")))(input, target)

    torch.testing.assert_close(*both(body))


@together
@every_kind
@every_reduction
def test_derivative_for_target_and_weight_agrees_with_stock(kind, reduction):
    input, target, extra = problem(kind)
    weight = extra.pop("weight")
    wanted = (0, 1, 2) if kind == "probability" else (0,)
    for transform in (jacrev, jacfwd, hessian):

        def body(function, transform=transform):
            def loss(x, y, w):
                return function(x, y, w, reduction=reduction, **extra)

            return transform(loss, argnums=wanted)(input, target, weight)

        torch.testing.assert_close(*both(body))


def test_weight_of_an_index_target_gets_the_derivative_of_stock():
    # Stock has none: zero or an error, whichever way it is asked for.
    input, target, extra = problem()
    weight = extra.pop("weight")
    for transform in (grad, jacfwd):
        outcomes = []
        for function in (fused_ce.cross_entropy, F.cross_entropy):
            try:
                loss = lambda w, function=function: function(input, target, w)  # noqa: E731
                outcomes.append(transform(loss)(weight))
            except RuntimeError as error:
                outcomes.append(str(error))
        if isinstance(outcomes[1], str):
            assert outcomes[0] == outcomes[1]
        else:
            torch.testing.assert_close(*outcomes)


def test_ensemble_of_models_trains_as_with_stock():
    # The criterion is part of each model, with its weight among the stacked buffers.
    x, y = torch.randn(8, 6), torch.randint(0, 5, (8,))

    class Model(torch.nn.Module):
        def __init__(self, criterion):
            super().__init__()
            self.layer = torch.nn.Linear(6, 5)
            self.criterion = criterion(weight=torch.rand(5), label_smoothing=0.1)

        def forward(self, x, y):
            return self.criterion(self.layer(x), y)

    results = []
    for criterion in (fused_ce.CrossEntropyLoss, torch.nn.CrossEntropyLoss):
        torch.manual_seed(1)
        models = [Model(criterion) for _ in range(3)]
        parameters, buffers = stack_module_state(models)

        def loss(parameters, buffers, model=models[0]):
            return functional_call(model, (parameters, buffers), (x, y))

        results.append(vmap(grad_and_value(loss))(parameters, buffers))
    torch.testing.assert_close(*results)


def test_linearized_loss_has_the_same_tangent():
    input, target, extra = problem()

    def body(function):
        value, tangent = linearize(lambda x: function(x, target, **extra), input)
        return value, tangent(step_like(input)), tangent(input)

    torch.testing.assert_close(*both(body))


def test_in_place_leaves_logits_that_are_transformed():
    input, target, extra = problem()
    before = input.clone()
    for transform in TRANSFORMS.values():

        def loss(x):
            return fused_ce.cross_entropy(
                x, target[: x.shape[0], ..., : x.shape[-1]], inplace=True, **extra
            )

        transform(loss, input)
        assert torch.equal(input, before)


@pytest.mark.parametrize("level", ["grad", "vmap", "jvp", "dual level"])
def test_reason_for_stock_is_told(level):
    input, target = torch.randn(3, 5), torch.randint(0, 5, (3,))
    said = []

    def loss(x):
        said.append(fused_ce.explain(x, target))
        return x.sum()

    if level == "dual level":
        with fwAD.dual_level():
            loss(input)
    else:
        TRANSFORMS[level](loss, input)
    reason = "forward-mode" if level == "dual level" else "torch.func"
    assert all(text.startswith("stock: ") and reason in text for text in said)
    assert said
    # And afterwards it is over.
    assert fused_ce.explain(input, target).startswith("fused")


@together
@every_kind
@every_reduction
@pytest.mark.parametrize("wanted", ["input", "target", "weight", "all", "none"])
def test_tangent_agrees_with_stock(kind, reduction, wanted):
    input, target, extra = problem(kind)
    values = {"input": input, "target": target, "weight": extra.pop("weight")}
    names = tuple(values) if wanted == "all" else (wanted,)
    outcomes = []
    for function in (fused_ce.cross_entropy, F.cross_entropy):
        with fwAD.dual_level():
            arguments = {
                name: fwAD.make_dual(value, step_like(value) + 1)
                if name in names and value.is_floating_point()
                else value
                for name, value in values.items()
            }
            try:
                loss = function(**arguments, reduction=reduction, **extra)
                outcomes.append(tuple(fwAD.unpack_dual(loss)))
            except (RuntimeError, NotImplementedError) as error:
                outcomes.append((type(error), str(error)))
    for value, expected in zip(*outcomes, strict=True):
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(value, expected)
        else:
            assert value == expected


@together
@every_kind
@every_reduction
def test_forward_over_reverse_keeps_the_tangent(kind, reduction):
    input, target, extra = problem(kind)

    def body(function):
        with fwAD.dual_level():
            leaf = same_layout(input).requires_grad_()
            dual = fwAD.make_dual(leaf, step_like(input))
            loss = function(dual, target, reduction=reduction, **extra)
            (gradient,) = torch.autograd.grad(loss, dual, torch.full_like(loss, 0.25))
            return tuple(fwAD.unpack_dual(gradient))

    torch.testing.assert_close(*both(body))


# What may happen around a backward whose forward was an ordinary, fused call. A custom operator
# drops a tangent without a word, so each of these must be kept from it.
LATE = {
    "dual level": lambda back, v: tuple(_dual(back, v)),
    "jvp": lambda back, v: jvp(back, (v,), (step_like(v) + 0.5,)),
    "vmap": lambda back, v: vmap(back)(torch.stack([v, 2 * v, -v])),
    "jacfwd": lambda back, v: jacfwd(back)(v),
    "vmap of jvp": lambda back, v: vmap(lambda t: jvp(back, (v,), (t,)))(torch.stack([v, 2 * v])),
    "grad": lambda back, v: grad(lambda v: back(v, create_graph=True).square().sum())(v).detach(),
    "vjp": lambda back, v: [
        t.detach() for t in vjp(lambda v: back(v, create_graph=True).sin().sum(), v)[1](v.sum())
    ],
}


def _dual(back, v):
    with fwAD.dual_level():
        yield from fwAD.unpack_dual(back(fwAD.make_dual(v, step_like(v) + 0.5)))


@together
@pytest.mark.parametrize("transform", LATE)
@every_kind
@every_reduction
@every_options_of(REPEATABLE)
def test_transform_of_a_backward_alone_is_right_or_refused(transform, kind, reduction, options):
    input, target, extra = problem(kind)

    def body(function):
        leaf = same_layout(input).requires_grad_()
        loss = function(leaf, target, reduction=reduction, **extra)

        def back(incoming, create_graph=False):
            return torch.autograd.grad(
                loss, leaf, incoming, retain_graph=True, create_graph=create_graph
            )[0]

        with warnings.catch_warnings():
            # torch says so when an operator of ours is run once for each element of a batch.
            warnings.filterwarnings("error", message=".*batching rule for fused_ce")
            return LATE[transform](back, torch.full_like(loss, 0.5).detach())

    torch.testing.assert_close(*both(body, options))


@together
@pytest.mark.parametrize("transform", LATE)
def test_transform_of_a_backward_in_place_is_right_or_refused(transform):
    # There the logits are gone: an error, or the right answer, and no zeros.
    input, target, extra = problem()

    def body(function):
        leaf = same_layout(input).requires_grad_()
        loss = function(leaf, target, **extra)

        def back(incoming, create_graph=False):
            return torch.autograd.grad(
                loss, leaf, incoming, retain_graph=True, create_graph=create_graph
            )[0]

        return LATE[transform](back, torch.full_like(loss, 0.5).detach())

    expected = body(F.cross_entropy)
    try:
        result = body(lambda *args, **kwargs: fused_ce.cross_entropy(*args, inplace=True, **kwargs))
    except RuntimeError:
        return
    torch.testing.assert_close(result, expected)


@together
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
@pytest.mark.parametrize("form", ["create_graph", "is_grads_batched", "vmap", "dual level"])
@pytest.mark.parametrize(
    "kind, reduction", [("index", "mean"), ("index", "none"), ("probability", "sum")]
)
def test_nonfinite_incoming_gradient_spares_an_ignored_row(kind, reduction, form, value):
    # Where it goes when stock's formula is at work: nowhere but where it goes in stock.
    input, target, extra = problem(kind)

    def body(function):
        leaf = same_layout(input).requires_grad_()
        loss = function(leaf, target, reduction=reduction, **extra)
        incoming = torch.full_like(loss.detach(), value)

        def back(incoming, **options):
            return torch.autograd.grad(loss, leaf, incoming, retain_graph=True, **options)[0]

        if form == "vmap":
            return vmap(back)(torch.stack([incoming, incoming]))
        if form == "is_grads_batched":
            return back(torch.stack([incoming, incoming]), is_grads_batched=True)
        if form == "dual level":
            return tuple(_dual(back, incoming))
        return back(incoming, create_graph=True).detach()

    results, expected = ([t] if isinstance(t, torch.Tensor) else t for t in both(body))
    for mine, theirs in zip(results, expected, strict=True):
        # Whether a counted row's is nan or infinite is a matter of which term comes first.
        assert torch.equal(mine.isfinite(), theirs.isfinite())
        torch.testing.assert_close(mine[mine.isfinite()], theirs[mine.isfinite()])


@together
@every_kind
@every_reduction
@every_options_of(REPEATABLE)
def test_second_derivatives_agree_with_stock(kind, reduction, options):
    # Blocks of the Hessian by hand: every pair of logits, probabilities and incoming gradient.
    input, target, extra = problem(kind)

    def body(function):
        leaves = [same_layout(input).requires_grad_()]
        y = target
        if kind == "probability":
            leaves.append(y := same_layout(target).requires_grad_())
        loss = function(leaves[0], y, reduction=reduction, **extra)
        incoming = (step_like(loss.detach()) + 1.5).requires_grad_()
        grads = torch.autograd.grad(loss, leaves, incoming, create_graph=True)
        total = sum((g * step_like(g.detach())).sum() + g.square().sum() for g in grads)
        seconds = torch.autograd.grad(total, [*leaves, incoming], create_graph=True)
        third = sum((s * step_like(s.detach())).sum() for s in seconds)
        return (*grads, *seconds, *torch.autograd.grad(third, [*leaves, incoming]))

    torch.testing.assert_close(*both(body, options))


@together
@every_kind
@every_reduction
@every_options_of(REPEATABLE)
def test_retained_graph_gives_the_same_second_derivative(kind, reduction, options):
    # First and second derivatives in turns, from one graph that all of them share.
    input, target, extra = problem(kind)

    def body(function):
        leaf = same_layout(input).requires_grad_()
        loss = function(leaf, target, reduction=reduction, **extra).sum()
        results = []
        for scale in (1.0, 0.5):
            incoming = torch.tensor(scale, dtype=loss.dtype)
            (first,) = torch.autograd.grad(loss, leaf, incoming, retain_graph=True)
            (again,) = torch.autograd.grad(loss, leaf, incoming, create_graph=True)
            penalty = again.square().sum()
            (second,) = torch.autograd.grad(penalty, leaf, retain_graph=True)
            (third,) = torch.autograd.grad(penalty + loss, leaf, retain_graph=True)
            results += [first, again.detach(), second, third]
        loss.backward()
        return (*results, leaf.grad)

    torch.testing.assert_close(*both(body, options))


FUNCTIONALS = {
    "hessian": lambda loss, x: torch.autograd.functional.hessian(loss, x),
    "vectorized hessian": lambda loss, x: torch.autograd.functional.hessian(
        loss, x, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "hvp": lambda loss, x: torch.autograd.functional.hvp(loss, x, step_like(x)),
    "vhp": lambda loss, x: torch.autograd.functional.vhp(loss, x, step_like(x)),
    "jvp": lambda loss, x: torch.autograd.functional.jvp(loss, x, step_like(x)),
    "forward jacobian": lambda loss, x: torch.autograd.functional.jacobian(
        loss, x, strategy="forward-mode", vectorize=True
    ),
    "differentiable jacobian": lambda loss, x: torch.autograd.functional.jacobian(
        loss, x.requires_grad_(), create_graph=True
    ),
}


@together
@pytest.mark.parametrize("name", FUNCTIONALS)
@every_kind
@every_options_of(REPEATABLE)
def test_functional_derivative_agrees_with_stock(name, kind, options):
    input, target, extra = problem(kind)

    def body(function):
        loss = FUNCTIONALS[name](lambda x: function(x, target, **extra), same_layout(input))
        return loss

    torch.testing.assert_close(*both(body, options))


@together
@pytest.mark.parametrize(
    "kind, reduction", [("index", "mean"), ("index", "none"), ("probability", "none")]
)
@every_options_of(REPEATABLE)
def test_derivatives_are_slopes_in_every_mode_of_autograd(kind, reduction, options):
    # Forward mode, batched gradients and forward over reverse, all against finite differences.
    input, target, extra = problem(kind, shape=(2, 3, 1))
    input.requires_grad_()

    def loss(x):
        return fused_ce.cross_entropy(x, target, reduction=reduction, **extra, **options)

    assert torch.autograd.gradcheck(
        loss,
        input,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_undefined_grad=True,
    )
    assert torch.autograd.gradgradcheck(
        loss, input, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True
    )


@together
@pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_logits_that_a_transform_left_behind_keep_their_gradient(kind, options):
    input, target, arguments = problem(kind)
    input.requires_grad_()

    def loss_and_gradient(loss, **options):
        leaked = []
        grad(lambda x: (leaked.append(x * 2), x.sum())[1])(input)
        value = loss(leaked[0], target, **arguments, **options)
        return value.detach(), *torch.autograd.grad(value.sum(), input)

    ours = loss_and_gradient(fused_ce.cross_entropy, **options)
    torch.testing.assert_close(ours, loss_and_gradient(F.cross_entropy))
