"""The ways through autograd: backward more than once, derivatives of derivatives, transforms,
scalers, accumulation and shared weights give what they give for `F.linear` and `F.cross_entropy`.
"""

import copy
import math

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from support.grids import every_reduction, together
from support.linear_reference import WAYS, Outcome, differentiate, every_way, in_chunks, stock_loss
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import fused_ce
from fused_ce import linear_cross_entropy as lce
from fused_ce.linear import gradients, plan
from fused_ce.linear.chunks import Problem

FEATURES, CLASSES, ROWS = 4, 6, 7

every_kind = pytest.mark.parametrize("kind", ("index", "probability", "positions"))


def problem(kind="index", dtype=torch.float64):
    """A layer with a bias, targets some of which are ignored, and options that all matter."""
    inner = (2,) if kind == "positions" else ()
    layer = (
        torch.randn(ROWS, FEATURES, dtype=dtype),
        torch.randn(CLASSES, *inner, FEATURES, dtype=dtype),
        torch.randn(CLASSES, *inner, dtype=dtype),
    )
    options = {"weight": torch.rand(CLASSES, dtype=dtype) + 0.5, "label_smoothing": 0.1}
    if kind == "probability":
        return layer, torch.randn(ROWS, CLASSES, dtype=dtype).softmax(1), options
    target = torch.randint(CLASSES, (ROWS, *inner))
    target.view(-1)[1::3] = -100
    return layer, target, options


def outcomes(body, kind="index", way="ahead", dtype=torch.float64, **more):
    """`body` called with each loss, as a function of the layer, and fresh leaves."""
    layer, target, options = problem(kind, dtype)
    results = []
    for function, own in ((lce, {"chunk_size": 3, **WAYS[way]}), (stock_loss, {})):
        leaves = [t.clone().requires_grad_() for t in layer]

        def loss(input, linear_weight, linear_bias, function=function, own=own):
            return function(
                input, linear_weight, target, linear_bias=linear_bias, **options, **more, **own
            )

        results.append(body(loss, leaves))
    return results


def varied(loss):
    """An incoming gradient that differs from row to row."""
    return torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)


@together
@every_reduction
@every_way
@every_kind
def test_second_backward_equals_the_first(kind, reduction, way):
    def body(loss, leaves):
        value = loss(*leaves)
        first = torch.autograd.grad(value, leaves, 3 * varied(value), retain_graph=True)
        second = torch.autograd.grad(value, leaves, varied(value))
        return first, second

    with in_chunks():
        layer = outcomes(body, kind, way, reduction=reduction)
    torch.testing.assert_close(*layer)


@pytest.mark.parametrize("kind", ["index", "probability", "positions"])
def test_scratch_of_any_size_gives_the_same_gradient(kind, monkeypatch):
    # 24 bytes hold some classes' sums of one feature, and the terms of a few rows.
    def body(loss, leaves):
        return torch.autograd.grad(loss(*leaves), leaves)

    torch.manual_seed(0)
    expected, _ = outcomes(body, kind, dtype=torch.bfloat16)
    monkeypatch.setattr(gradients, "TILE_BYTES", 24)
    torch.manual_seed(0)
    found, _ = outcomes(body, kind, dtype=torch.bfloat16)
    assert all(map(torch.equal, found, expected))


@together
@every_reduction
@every_way
def test_second_backward_without_retain_graph_is_refused(reduction, way):
    def body(loss, leaves):
        value = loss(*leaves).sum()
        value.backward()
        with pytest.raises(RuntimeError) as error:
            value.backward()
        return str(error.value)

    mine, theirs = outcomes(body, way=way, reduction=reduction)
    assert mine == theirs


@together
@every_reduction
@every_way
@every_kind
def test_double_backward_agrees_with_stock(kind, reduction, way):
    def body(loss, leaves):
        value = loss(*leaves)
        gradients = torch.autograd.grad(value, leaves, varied(value), create_graph=True)
        penalty = value.sum() + sum(g.square().sum() for g in gradients)
        return torch.autograd.grad(penalty, leaves)

    torch.testing.assert_close(*outcomes(body, kind, way, reduction=reduction))


@every_reduction
def test_gradient_is_the_slope_of_the_loss(reduction):
    layer, target, options = problem()
    leaves = [t.requires_grad_() for t in layer]

    def loss(input, linear_weight, linear_bias):
        return lce(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            reduction=reduction,
            chunk_size=3,
            **options,
        )

    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, leaves, fast_mode=True)


@together
@every_reduction
@every_way
def test_batched_incoming_gradients_are_taken(reduction, way):
    def body(loss, leaves):
        value = loss(*leaves)
        batch = torch.stack([varied(value), torch.ones_like(value), -varied(value)])
        return torch.autograd.grad(value, leaves, batch, is_grads_batched=True)

    torch.testing.assert_close(*outcomes(body, way=way, reduction=reduction))


def over_input(leaves, loss):
    input, *others = (t.detach() for t in leaves)
    return input, lambda x: loss(x, *others)


# name: what it makes of a loss of the input, and the input
TRANSFORMS = {
    "grad": lambda loss, x: grad(lambda x: loss(x).sum())(x),
    "vmap": lambda loss, x: vmap(loss)(torch.stack([x, -x])),
    "vmap of grad": lambda loss, x: vmap(grad(lambda x: loss(x).sum()))(torch.stack([x, -x])),
    "jvp": lambda loss, x: jvp(loss, (x,), (torch.ones_like(x),)),
    "vjp": lambda loss, x: vjp(loss, x)[1](varied(loss(x))),
    "jacrev": lambda loss, x: jacrev(loss)(x),
    "jacfwd": lambda loss, x: jacfwd(loss)(x),
    "hessian": lambda loss, x: hessian(lambda x: loss(x).sum())(x),
    "dual level": lambda loss, x: _dual(loss, x),
}


def _dual(function, x):
    with fwAD.dual_level():
        return tuple(fwAD.unpack_dual(function(fwAD.make_dual(x, torch.ones_like(x)))))


@together
@pytest.mark.parametrize("transform", TRANSFORMS)
@every_kind
@every_reduction
def test_transform_agrees_with_stock(transform, kind, reduction):
    def body(loss, leaves):
        x, of_input = over_input(leaves, loss)
        return TRANSFORMS[transform](of_input, x)

    torch.testing.assert_close(*outcomes(body, kind, reduction=reduction))


# What may begin only after the forward, which was then an ordinary, fused call.
LATE = {
    "dual level": lambda back, v: _dual(back, v),
    "jvp": lambda back, v: jvp(back, (v,), (torch.ones_like(v),)),
    "vmap": lambda back, v: vmap(back)(torch.stack([v, 2 * v, -v])),
    "jacfwd": lambda back, v: jacfwd(back)(v),
}


@together
@pytest.mark.parametrize("transform", LATE)
@every_reduction
@every_way
def test_transform_of_a_backward_alone_is_right_or_refused(transform, reduction, way):
    def body(loss, leaves):
        value = loss(*leaves)

        def back(incoming):
            return torch.autograd.grad(value, leaves[1], incoming, retain_graph=True)[0]

        return LATE[transform](back, varied(value))

    torch.testing.assert_close(*outcomes(body, way=way, reduction=reduction))


def test_transforms_of_a_module_agree():
    loss = fused_ce.LinearCrossEntropyLoss(FEATURES, CLASSES, bias=True).double()
    (input, *_), target, _ = problem()
    parameters = dict(loss.named_parameters())

    def value(parameters, x, y):
        return functional_call(loss, parameters, (x.unsqueeze(0), y.unsqueeze(0)))

    per_sample = vmap(grad(value), (None, 0, 0))(parameters, input[::3], target[::3])
    for i, (x, y) in enumerate(zip(input[::3], target[::3], strict=True)):
        expected = stock_loss(x, loss.linear.weight, y, linear_bias=loss.linear.bias)
        names = torch.autograd.grad(expected, list(parameters.values()))
        for name, gradient in zip(parameters, names, strict=True):
            torch.testing.assert_close(per_sample[name][i], gradient)


@pytest.fixture(params=["read", "left on the device"])
def incoming(request, monkeypatch):
    """Whether the host looks at the incoming gradient, or must not wait for it, as on CUDA."""
    if request.param != "read":
        cpu = plan.DEVICES["cpu"]._replace(checks_values=False)
        monkeypatch.setitem(plan.DEVICES, "cpu", cpu)


def with_zeros(kind, ignored):
    """A layer and a target with exact zeros in each gradient of rows that count: a feature that is
    always 0, a class without weight, and one that no row has any probability of."""
    input, linear_weight = torch.randn(ROWS, FEATURES), torch.randn(CLASSES, FEATURES)
    input[:, 0], linear_weight[:, 1] = 0, 0
    linear_bias = torch.zeros(CLASSES)
    linear_bias[-1] = -1e4
    if kind == "probability":
        target = torch.randn(ROWS, CLASSES).softmax(1)
        target[:, -1] = 0
    else:
        target = torch.randint(CLASSES - 1, (ROWS,))
        target[{"some": slice(1, None, 3), "all": slice(None)}[ignored]] = -100
    return (input, linear_weight, linear_bias), target


@together
@pytest.mark.parametrize(
    "kind, ignored", [("index", "some"), ("index", "all"), ("probability", "")]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@every_way
def test_incoming_nan_and_infinity_reach_what_they_reach_in_stock(
    kind, ignored, value, way, incoming
):
    layer, target = with_zeros(kind, ignored)
    found = []
    for function, own in ((lce, {"chunk_size": 3, **WAYS[way]}), (stock_loss, {})):
        leaves = [t.clone().requires_grad_() for t in layer]
        loss = function(*leaves[:2], target, linear_bias=leaves[2], reduction="sum", **own)
        found.append(torch.autograd.grad(loss, leaves, torch.tensor(value)))
    for mine, theirs in zip(*found, strict=True):
        # An infinite one gives infinities here, where stock has nan from the difference of two.
        assert torch.equal(mine.isfinite(), theirs.isfinite())
        assert torch.equal(mine[mine.isfinite()], theirs[mine.isfinite()])
        assert math.isinf(value) or torch.equal(mine.isnan(), theirs.isnan())


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_gradient_is_the_same_whether_the_host_reads_what_arrives(kind, dtype, scale, monkeypatch):
    layer, target = with_zeros(kind, "some")
    layer = [t.to(dtype) for t in layer]
    # Who reads knows as well which rows need no logits; other chunks have other sums.
    monkeypatch.setattr(Problem, "rows_that_count", lambda *_: None)
    found = []
    for reads in (True, False):
        cpu = plan.DEVICES["cpu"]._replace(checks_values=reads)
        monkeypatch.setitem(plan.DEVICES, "cpu", cpu)
        with in_chunks():
            found.append(differentiate(lce, layer, target, scale=scale, chunk_size=3))
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


def test_gradient_for_target_and_weight_is_there():
    # Left to the formula with all logits, which stock can differentiate.
    layer, target, options = problem("probability")
    results = []
    for function in (lce, stock_loss):
        target, weight = (t.clone().requires_grad_() for t in (target, options["weight"]))
        input, linear_weight, _ = (t.clone().requires_grad_() for t in layer)
        loss = function(input, linear_weight, target, weight=weight, label_smoothing=0.1)
        results.append(torch.autograd.grad(loss, (input, linear_weight, target, weight)))
    torch.testing.assert_close(*results)


# Without the scaler's factor folded in before rounding, these gradients would be zero in float16.
@together
@pytest.mark.parametrize("autocast", (False, True))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_small_fp16_gradients_survive_under_a_scaler(reduction, autocast):
    rows, classes, factor = 64, 500, 32768.0  # float16 ends at 65504
    torch.manual_seed(0)
    wide = [torch.randn(rows, 8) * 1e-5, torch.randn(classes, 8) * 1e-5]
    target = torch.randint(classes, (rows,))
    leaves = [t.to(torch.float32 if autocast else torch.float16).requires_grad_() for t in wide]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    with torch.autocast("cpu", torch.float16, enabled=autocast), in_chunks():
        loss = lce(*leaves, target, reduction=reduction, chunk_size=20)
    reference = stock_loss(*exact, target, reduction=reduction)
    scale = factor / rows if reduction == "none" else factor
    scale = scale / rows**2 if reduction == "sum" else scale
    gradients = torch.autograd.grad(loss, leaves, torch.full_like(loss, scale))
    expected = torch.autograd.grad(reference, exact, torch.full_like(reference, scale))
    for leaf, ours, theirs in zip(leaves, gradients, expected, strict=True):
        assert ours.dtype == leaf.dtype
        assert (ours.double() - theirs).abs().max() < 2e-3 * theirs.abs().max()


def test_scaler_steps_follow_stock():
    # Three steps of a model under autocast with a gradient scaler, which looks for overflow.
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(5, FEATURES), nn.GELU())
    head = nn.Linear(FEATURES, 40, bias=False)
    x, target = torch.randn(30, 5), torch.randint(40, (30,))
    trained = []
    for function in (lce, stock_loss):
        model = copy.deepcopy(nn.ModuleList([body, head]))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = function(model[0](x), model[1].weight, target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        trained.append([p.detach() for p in model.parameters()])
        assert not torch.equal(trained[-1][-1], head.weight)
    torch.testing.assert_close(*trained, rtol=2e-3, atol=2e-3)


@every_way
def test_accumulation_into_grad_adds_and_shares_nothing(way):
    def body(loss, leaves):
        for factor in (0.25, 1.0, 0.75):
            (loss(*leaves) * factor).backward()
        return [t.grad for t in leaves]

    torch.testing.assert_close(*outcomes(body, way=way))


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_tied_weight_gets_all_of_its_gradient(dtype):
    torch.manual_seed(0)
    plain = nn.Embedding(20, 8)
    tokens = torch.randint(20, (3, 6))
    gradients = []
    for function in (lce, stock_loss):
        embedding = copy.deepcopy(plain).to(dtype)
        hidden = embedding(tokens).tanh()
        function(hidden[:, :-1], embedding.weight, tokens[:, 1:]).backward()
        gradients.append(embedding.weight.grad)
    rounding = max(4 * torch.finfo(dtype).eps, 1e-12)
    torch.testing.assert_close(*gradients, rtol=rounding, atol=rounding)


def test_tied_weight_of_the_module_is_not_copied():
    embedding = nn.Embedding(CLASSES, FEATURES)
    loss = fused_ce.LinearCrossEntropyLoss(FEATURES, CLASSES)
    loss.linear.weight = embedding.weight
    loss(embedding(torch.tensor([0, 3])), torch.tensor([1, 2])).backward()
    assert embedding.weight.grad is loss.linear.weight.grad
    assert (embedding.weight.grad != 0).all()


@together
@pytest.mark.parametrize("reentrant", (False, True))
@every_reduction
def test_gradient_through_a_checkpoint_is_right(reduction, reentrant):
    def body(loss, leaves):
        value = checkpoint(lambda *layer: loss(*layer), *leaves, use_reentrant=reentrant)
        value.backward(varied(value))
        return [t.grad for t in leaves]

    torch.testing.assert_close(*outcomes(body, reduction=reduction))


@every_way
def test_saved_tensors_may_lie_elsewhere(way):
    def body(loss, leaves):
        with torch.autograd.graph.save_on_cpu():
            value = loss(*leaves)
        first = torch.autograd.grad(value, leaves, 3 * varied(value), retain_graph=True)
        return first, torch.autograd.grad(value, leaves, varied(value))

    torch.testing.assert_close(*outcomes(body, way=way))


@every_way
@pytest.mark.parametrize("which", (0, 1))
def test_tensor_changed_before_the_backward_is_noticed(which, way):
    layer, target, _ = problem()
    leaves = [t.requires_grad_() for t in layer[:2]]
    loss = lce(*leaves, target, **WAYS[way])
    with torch.no_grad():
        leaves[which].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradient_reaches_what_made_the_input():
    def body(loss, leaves):
        input, *others = leaves
        value = loss(input.tanh(), *(t * 2 for t in others))
        return torch.autograd.grad(value, leaves)

    torch.testing.assert_close(*outcomes(body))


def test_backward_fills_no_memory_with_zeros():
    # Of the gradients that the forward has computed, none is made anew, not even of zeros.
    (input, linear_weight, _), target, _ = problem()
    loss = lce(input, linear_weight.requires_grad_(), target)
    with torch.profiler.profile(record_shapes=True) as profile:
        loss.backward()
    shape = list(linear_weight.shape)
    called = {event.name for event in profile.events() if shape in event.input_shapes}
    assert called  # the weight's gradient is seen on its way
    assert not any("fill" in name or "zero" in name for name in called)


def test_gradient_lets_the_graph_go():
    (input, linear_weight, _), target, _ = problem()
    leaves = [input.requires_grad_(), linear_weight.requires_grad_()]
    gradients = torch.autograd.grad(lce(*leaves, target), leaves)
    assert not any(t.requires_grad for t in gradients)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("inside", ("autocast", "autocast around the backward"))
def test_autocast_keeps_type_and_value(dtype, inside):
    # The parameter is float32; its gradient comes from the float32 sum, not through bfloat16.
    layer, target, _ = problem(dtype=torch.float32)
    layer = (layer[0].to(dtype), *layer[1:])
    results = []
    for function in (lce, stock_loss):
        leaves = [t.clone().requires_grad_() for t in layer]
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(leaves[0], leaves[1], target, linear_bias=leaves[2])
            if "backward" in inside:
                loss.backward()
        if "backward" not in inside:
            loss.backward()
        results.append(Outcome(loss.detach(), *(t.grad for t in leaves)))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.03, atol=0.01)


def test_autocast_does_not_round_the_gradient_of_a_float32_parameter():
    (input, linear_weight, _), target, _ = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = lce(input, linear_weight.requires_grad_(), target, chunk_size=3)
    (gradient,) = torch.autograd.grad(loss, linear_weight)
    assert not torch.equal(gradient.bfloat16().float(), gradient)


@every_reduction
def test_threads_leave_each_other_alone(reduction):
    from concurrent.futures import ThreadPoolExecutor

    layer, target, options = problem()

    def run(scale):
        return differentiate(
            lce, layer, target, scale=scale, reduction=reduction, chunk_size=2, **options
        )

    expected = [run(float(i)) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for ours, alone in zip(pool.map(run, map(float, range(8))), expected, strict=True):
            torch.testing.assert_close(ours, alone)
