"""`linear_cross_entropy` under torch.compile, tracing, fake tensors, subclasses and modes: a graph
holds our operators and is not made again for each number of rows, and everything else gives the
numbers of `F.linear` and `F.cross_entropy`.
"""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.grids import REDUCTIONS, covering, every_reduction, name_of, together
from support.linear_reference import WAYS, differentiate, every_way, stock_loss
from torch import nn
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, hessian, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.overrides import TorchFunctionMode

import fused_ce
from fused_ce import linear_cross_entropy as lce
from fused_ce.linear import operators
from fused_ce.options import Options

FEATURES, CLASSES = 4, 6


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    torch._dynamo.reset()


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def problem(rows=7, kind="index", dtype=torch.float32):
    layer = (
        torch.randn(rows, FEATURES, dtype=dtype),
        torch.randn(CLASSES, FEATURES, dtype=dtype),
        torch.randn(CLASSES, dtype=dtype),
    )
    if kind == "probability":
        return layer, torch.randn(rows, CLASSES, dtype=dtype).softmax(1)
    target = torch.randint(CLASSES, (rows,))
    target[1::3] = -100
    return layer, target


AXES = {
    "backend": ("eager", "aot_eager"),
    "kind": ("index", "probability"),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "reduction": REDUCTIONS,
    "way": tuple(WAYS),
}


@pytest.mark.parametrize("case", covering(AXES, 3), ids=name_of)
def test_compiled_loss_and_gradient_agree(case):
    dtype = case["dtype"]
    layer, target = problem(kind=case["kind"], dtype=dtype)
    options = {
        "weight": torch.rand(CLASSES, dtype=dtype),
        "label_smoothing": 0.1,
        "reduction": case["reduction"],
        "chunk_size": 3,
        **WAYS[case["way"]],
    }
    expected = differentiate(lce, layer, target, scale=0.25, **options)
    result = differentiate(compiled(lce, case["backend"]), layer, target, scale=0.25, **options)
    # The same operators, on memory that may be aligned otherwise.
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(result, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("shape", ("BTH", "K"))
@pytest.mark.xdist_group("inductor")  # which takes seconds to begin with
def test_inductor_gives_the_same_gradient(shape):
    # Matrix products around the loss, no more: inductor would build code for anything else.
    layer, _ = problem()
    if shape == "BTH":
        layer = (torch.randn(2, 5, FEATURES), *layer[1:])
        target = torch.randint(CLASSES, (2, 5))
    else:
        layer = (layer[0], torch.randn(CLASSES, 3, FEATURES), torch.randn(CLASSES, 3))
        target = torch.randint(CLASSES, (7, 3))
    factor = torch.randn(FEATURES, FEATURES)

    def step(function, input, *rest, **options):
        return function(input @ factor, *rest, **options)

    expected = differentiate(lambda *a, **k: step(stock_loss, *a, **k), layer, target)
    with torch._inductor.config.patch(force_disable_caches=True):
        function = compiled(lambda *a, **k: step(lce, *a, chunk_size=2, **k), "inductor")
        result = differentiate(function, layer, target)
    torch.testing.assert_close(result, expected)


def calls_of(graphs):
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    return [str(node.target) for node in nodes if node.op == "call_function"]


@every_reduction
@every_way
@pytest.mark.parametrize("needs", (True, False))
def test_graph_does_not_hold_the_logits(reduction, way, needs):
    layer, target = problem()
    backend = AotEagerAndRecordGraphs()
    function = compiled(lce, backend)
    options = {"reduction": reduction, **WAYS[way]}
    differentiate(function, layer, target, needs=(needs,) * 3, **options)
    graphs = [*backend.fw_graphs, *backend.bw_graphs]
    called = [name for name in calls_of(graphs) if "fused_ce" in name or "mm" in name]
    ahead = way == "ahead" and reduction != "none"
    if not needs:
        expected = ["fused_ce.linear_forward.default"]
    elif ahead:
        expected = ["fused_ce.linear_forward_grad.default", "auto_functionalized"]
    else:
        expected = ["fused_ce.linear_forward.default", "fused_ce.linear_backward.default"]
    assert called == expected[: len(called)]
    assert len(called) >= len(expected) - ahead
    assert not any("log_softmax" in name for name in calls_of(graphs))


@pytest.mark.parametrize("dynamic", (True, None))
@every_way
def test_new_number_of_rows_needs_no_new_graph(dynamic, way):
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(lce, counter, dynamic=dynamic)
    counts = []
    for rows in (5, 7, 64, 1000):  # none of them a size of another dimension
        layer, target = problem(rows)
        result = differentiate(function, layer, target, chunk_size=300, **WAYS[way])
        torch.testing.assert_close(result, differentiate(stock_loss, layer, target))
        counts.append(counter.frame_count)
    # The second number of rows makes the graph dynamic, if it was not made so, and so it stays.
    assert len(set(counts[dynamic is None :])) == 1


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyOptions"), reason="torch 2.13 has them")
@pytest.mark.parametrize("method", ("auto", "aspect_ratio", "aspect_ratio:2", None))
def test_options_need_no_new_graph_for_each_number_of_rows(method):
    options = nn.LinearCrossEntropyOptions(chunking_method=method)
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(lambda *layer: lce(*layer, options=options), counter, dynamic=True)
    counts = []
    for rows in (5, 9, 64):  # of which a power of two is found above, far above, and at
        (input, linear_weight, _), target = problem(rows)
        loss = function(input, linear_weight.requires_grad_(), target)
        loss.backward()
        torch.testing.assert_close(loss, stock_loss(input, linear_weight, target))
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
@every_reduction
@every_way
def test_double_backward_through_a_graph_is_right_or_refused(reduction, backend, way):
    # A graph that runs as it was captured is differentiated; AOTAutograd refuses.
    layer, target = problem(dtype=torch.float64)

    def penalty(function):
        leaves = [t.clone().requires_grad_() for t in layer[:2]]
        loss = function(*leaves, target, reduction=reduction).sum()
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        value = loss + sum(g.square().sum() for g in gradients)
        return torch.autograd.grad(value, leaves)

    def loss(*arguments, **options):
        return lce(*arguments, **options, **WAYS[way])

    if backend == "aot_eager":
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            penalty(compiled(loss, backend))
    else:
        torch.testing.assert_close(penalty(compiled(loss, backend)), penalty(stock_loss))


TRANSFORMS = {
    "grad": lambda loss, x: grad(loss)(x),
    "vmap of grad": lambda loss, x: vmap(grad(loss))(torch.stack([x, -x])),
    "jvp": lambda loss, x: jvp(loss, (x,), (torch.ones_like(x),)),
    "hessian": lambda loss, x: hessian(loss)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_compiled_transform_agrees_with_stock(transform):
    (x, linear_weight, _), target = problem(dtype=torch.float64)

    def body(function):
        return TRANSFORMS[transform](lambda x: function(x, linear_weight, target), x)

    function = compiled(lambda x: TRANSFORMS[transform](lambda x: lce(x, linear_weight, target), x))
    torch.testing.assert_close(function(x), body(stock_loss))


def test_module_does_not_break_the_graph():
    module = fused_ce.LinearCrossEntropyLoss(FEATURES, CLASSES, bias=True, max_chunk_bytes=1 << 20)
    (input, *_), target = problem()
    loss = compiled(module)(input, target)
    loss.backward()
    expected = stock_loss(
        input, module.linear.weight, target, linear_bias=module.linear.bias.requires_grad_()
    )
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(expected, list(module.parameters()))
    torch.testing.assert_close([p.grad for p in module.parameters()], list(gradients))


@pytest.mark.parametrize("inside", (False, True))
def test_autocast_under_compile_keeps_the_type(inside):
    layer, target = problem()

    def step(function, *leaves):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return function(*leaves, target)

    results = []
    for function, wrap in ((lce, compiled), (stock_loss, lambda f: f)):
        leaves = [t.clone().requires_grad_() for t in layer[:2]]
        run = wrap(lambda *leaves, function=function: step(function, *leaves))
        with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
            loss = run(*leaves)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
        assert all(t.dtype == torch.float32 for t in results[-1])
    torch.testing.assert_close(*results, rtol=0.03, atol=0.01)


@together
@pytest.mark.parametrize("kind", ("index", "probability"))
@every_reduction
@every_way
def test_operator_keeps_its_schema(kind, reduction, way):
    # torch's own check of schema, fake kernel and derivative, on what a call hands to the operator.
    layer, target = problem(kind=kind)
    needs = [True, False, True]
    layer = [t.requires_grad_(needed) for t, needed in zip(layer, needs, strict=True)]
    options = Options(
        weight=torch.rand(CLASSES),
        reduction=nn._reduction.get_enum(reduction),
        label_smoothing=0.1,
        loss_dtype=torch.float32,
    )
    call = (
        layer[0],
        layer[1],
        target,
        layer[2],
        torch.float32,
        3,
        None,
        None,
        *operators.WHOLE,
        *options,
    )
    if way == "ahead" and reduction != "none":
        # Its backward writes to copies of its results, which the partitioner of opcheck's fourth
        # check cannot place; torch.compile's own can (test_inductor_gives_another_gradient).
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")
        opcheck(operators.forward_grad, (needs, *call), test_utils=checks)
    elif way == "ahead":
        grad_output = torch.rand_like(target.sum(1) if kind == "probability" else target.float())
        call = [t.detach() if isinstance(t, torch.Tensor) else t for t in call]
        opcheck(operators.backward, (needs, grad_output, *call))
    else:
        opcheck(operators.forward, call)


@together
@pytest.mark.parametrize("kind", ("index", "probability"))
@every_reduction
def test_fake_call_returns_the_shape(kind, reduction):
    layer, target = problem(kind=kind, dtype=torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        leaves = [mode.from_tensor(t).requires_grad_() for t in layer]
        loss = lce(
            leaves[0],
            leaves[1],
            mode.from_tensor(target),
            linear_bias=leaves[2],
            reduction=reduction,
        )
        gradients = torch.autograd.grad(loss.sum(), leaves)
    real = differentiate(lce, layer, target, reduction=reduction)
    for fake, value in zip((loss, *gradients), real, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (
            value.shape,
            value.dtype,
            value.stride(),
        )


def test_meta_tensors_give_the_shape():
    layer, target = problem()
    loss = lce(layer[0].to("meta"), layer[1].to("meta"), target.to("meta"), reduction="none")
    assert (loss.shape, loss.device.type) == ((7,), "meta")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.loss = fused_ce.LinearCrossEntropyLoss(FEATURES, CLASSES)

    def forward(self, input, target):
        return self.loss(input, target)


@pytest.mark.parametrize("way", ("export", "jit.trace", "make_fx"))
def test_recorded_program_gives_the_same_loss(way):
    (input, *_), target = problem()
    model = Model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated
        if way == "export":
            program = torch.export.export(model, (input, target)).module()
        elif way == "jit.trace":
            program = torch.jit.trace(model, (input, target))
        else:
            program = make_fx(model)(input, target)
    expected = stock_loss(input, model.loss.linear.weight, target)
    torch.testing.assert_close(program(input, target), expected)


def test_jit_script_says_what_to_do():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for what in (fused_ce.LinearCrossEntropyLoss(FEATURES, CLASSES), lce):
            with pytest.raises(RuntimeError, match="cannot be scripted"):
                torch.jit.script(what)


class Plain(torch.Tensor):
    """A subclass that changes nothing."""


class Recorder(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def test_subclass_gets_the_same_result():
    (input, linear_weight, _), target = problem()
    loss = lce(input.as_subclass(Plain), linear_weight, target)
    assert type(loss) is Plain
    torch.testing.assert_close(
        loss.as_subclass(torch.Tensor), stock_loss(input, linear_weight, target)
    )


def test_parameter_is_not_taken_for_a_subclass():
    from support.linear_reference import in_chunks

    (input, linear_weight, _), target = problem()
    with in_chunks():
        lce(input, nn.Parameter(linear_weight), target)


def test_function_mode_sees_our_function():
    (input, linear_weight, _), target = problem()
    with Recorder() as recorder:
        loss = lce(input, linear_weight, target)
    assert recorder.seen[0] is lce
    torch.testing.assert_close(loss, stock_loss(input, linear_weight, target))


def test_device_context_keeps_the_chunks():
    from support.linear_reference import in_chunks

    (input, linear_weight, _), target = problem()
    with torch.device("cpu"), in_chunks():
        loss = lce(input, linear_weight, target)
    torch.testing.assert_close(loss, stock_loss(input, linear_weight, target))


def test_dtensor_gets_the_same_result(tmp_path):
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    (input, linear_weight, _), target = problem()
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "s")), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        tensors = [
            distribute_tensor(t, mesh, [Replicate()]) for t in (input, linear_weight, target)
        ]
        loss = lce(*tensors)
        assert isinstance(loss, DTensor)
        torch.testing.assert_close(loss.full_tensor(), stock_loss(input, linear_weight, target))
    finally:
        dist.destroy_process_group()


def test_deterministic_algorithms_are_taken():
    layer, target = problem()
    expected = differentiate(lce, layer, target, chunk_size=2)
    torch.use_deterministic_algorithms(True)
    try:
        result = differentiate(lce, layer, target, chunk_size=2)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_nested_tensor_is_refused_as_by_torch():
    rows = [torch.randn(2, FEATURES), torch.randn(3, FEATURES)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    errors = []
    for function in (lce, lambda x, w, y: F.cross_entropy(F.linear(x, w), y)):
        with pytest.raises(Exception) as caught:  # noqa: B017
            function(nested, torch.randn(CLASSES, FEATURES), torch.zeros(5).long())
        errors.append(caught.value)
    assert errors
