"""Derivatives of the divergence of every order, under transforms and in compiled graphs."""

import warnings

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from support.divergence_reference import composed, fused, weights_of
from support.grids import MODES, REPEATABLE, every_differentiating_mode
from support.reference import one_thread
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import fused_ce
from fused_ce import ops

OPTIONS = [
    {},
    {"temperature": 2.0, "reverse": True},
    {"reduction": "none", "temperature": 0.7},
    {"reduction": "none", "reverse": True},
    {"denominator": 3.0},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)
# Lanes, and rows of one block.
SHAPES = [(3, 5), (2, 4, 3), (7,), (1, 70)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_repeatable_mode = pytest.mark.parametrize("mode", REPEATABLE)


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    torch._dynamo.reset()


def problem(shape, dtype=torch.float64):
    input, teacher = ((torch.randn(shape, dtype=torch.float64) * 2).to(dtype) for _ in range(2))
    return input.requires_grad_(), teacher


def weighed(losses):
    """One number of all, with another slope for each row."""
    slopes = torch.arange(1, losses.numel() + 1).view(losses.shape).cos().to(losses.dtype)
    return (losses * slopes + losses.square() / 8).sum()


@every_shape
@every_option
@every_repeatable_mode
@one_thread()
def test_both_derivatives_are_those_of_differences(shape, options, mode):
    input, teacher = problem(shape)

    def function(x):
        return fused(x, teacher, **options, **MODES[mode])

    # Along one direction of all elements, in a tenth of the time of one after the other.
    assert torch.autograd.gradcheck(function, input, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, input, fast_mode=True)


@every_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backward_under_create_graph_gives_the_same_gradient(dtype, options):
    input, teacher = problem((5, 70), dtype)
    grads = [
        torch.autograd.grad(weighed(fused(input, teacher, **options)), input, create_graph=graph)[0]
        for graph in (False, True)
    ]
    assert grads[1].requires_grad
    torch.testing.assert_close(*grads, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@every_repeatable_mode
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_graph_may_be_walked_twice(scale, mode):
    input, teacher = problem((5, 70))
    loss = fused(input, teacher, **MODES[mode]) * scale
    first = torch.autograd.grad(loss, input, retain_graph=True)[0]
    kept = first.clone()
    assert torch.equal(kept, torch.autograd.grad(loss, input)[0]) and torch.equal(kept, first)


@every_differentiating_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_scaled_loss_has_a_scaled_gradient(dtype, mode):
    input, teacher = problem((5, 70), dtype)
    (expected,) = torch.autograd.grad(composed(input, teacher) * 1024, input)
    logits = input * 1
    (fused(logits, teacher, **MODES[mode]) * 1024).backward()
    torch.testing.assert_close(input.grad, expected)


@every_repeatable_mode
def test_logits_that_were_edited_in_between_are_noticed(mode):
    input, teacher = problem((5, 70))
    logits = input * 1
    loss = fused(logits, teacher, **MODES[mode])
    logits.data_ptr()
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_differentiating_mode
def test_saved_tensors_may_go_through_hooks(mode):
    input, teacher = problem((5, 70))
    (expected,) = torch.autograd.grad(fused(input, teacher), input)
    logits = input * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        loss = fused(logits, teacher, **MODES[mode])
    (grad,) = torch.autograd.grad(loss, input)
    torch.testing.assert_close(grad, expected)


@every_differentiating_mode
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_give_the_same_gradient(use_reentrant, mode):
    input, teacher = problem((5, 70))
    plain = torch.autograd.grad(fused(input, teacher), input)[0]

    def function(x):
        return fused_ce.kl_div_with_logits(x * 1, teacher, **MODES[mode])

    checkpoint(function, input, use_reentrant=use_reentrant).backward()
    torch.testing.assert_close(input.grad, plain)


def test_a_batch_of_gradients_is_one_gradient_after_the_other():
    input, teacher = problem((4, 5))
    losses = fused(input, teacher, reduction="none")
    rows = torch.eye(4, dtype=torch.float64)
    options = {"is_grads_batched": True, "retain_graph": True}
    (batched,) = torch.autograd.grad(losses, input, rows, **options)
    for row, found in zip(rows, batched, strict=True):
        torch.testing.assert_close(
            torch.autograd.grad(losses, input, row, retain_graph=True)[0], found
        )


def test_in_place_there_is_one_backward():
    input, teacher = problem((5, 70))
    for options in ({}, {"grad_in_forward": False}):
        logits = input * 1
        loss = fused(logits, teacher, inplace=True, **options)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="through kl_div_with_logits.inplace=True"):
            loss.backward()


def test_overwritten_logits_cannot_be_differentiated():
    input, teacher = problem((5, 70))
    logits = input * 1
    loss = fused(logits, teacher, inplace=True)
    with pytest.raises(RuntimeError, match="inplace=True has overwritten these logits"):
        logits.sum().backward()
    loss.backward()
    assert input.grad is not None


@every_option
@pytest.mark.parametrize("wanted", ["teacher", "sample_weight", "denominator", "temperature"])
def test_what_else_requires_grad_has_its_gradient(wanted, options):
    input, teacher = problem((4, 5))
    arguments = dict(options)
    if wanted == "teacher":
        leaf = teacher.requires_grad_()
    elif wanted == "sample_weight":
        leaf = arguments["sample_weight"] = (
            weights_of(input, torch.float64).add(0.5).requires_grad_()
        )
    else:
        leaf = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
        arguments[wanted] = leaf
    if "denominator" in arguments and arguments.get("reduction", "mean") != "mean":
        pytest.skip("a denominator goes with a mean")
    found, expected = (
        torch.autograd.grad(weighed(f(input, teacher, **arguments)), (input, leaf))
        for f in (fused_ce.kl_div_with_logits, composed)
    )
    torch.testing.assert_close(found, expected)


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, 2 * x])),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.cos(x),))[1],
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "grad of grad": lambda f, x: torch.func.grad(lambda y: torch.func.grad(f)(y).square().sum())(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@every_option
def test_transforms_see_the_composition(transform, options):
    input, teacher = problem((3, 4))
    input = input.detach()
    found, expected = (
        transform(lambda x, f=f: weighed(f(x, teacher, **options)), input)
        for f in (fused_ce.kl_div_with_logits, composed)
    )
    torch.testing.assert_close(found, expected)


def test_forward_mode_carries_the_tangent():
    input, teacher = problem((3, 4))
    with fwAD.dual_level():
        dual = fwAD.make_dual(input.detach(), torch.cos(input.detach()))
        found, expected = (
            fwAD.unpack_dual(f(dual, teacher)).tangent
            for f in (fused_ce.kl_div_with_logits, composed)
        )
    assert found is not None
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_masked_class_leaves_second_derivatives_finite(reverse):
    input, teacher = problem((3, 5))
    with torch.no_grad():
        input[:, 4] = teacher[:, 4] = -torch.inf
    loss = fused(input, teacher, reverse=reverse)
    (grad,) = torch.autograd.grad(loss, input, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), input)
    assert grad.isfinite().all() and second.isfinite().all()
    assert not grad[:, 4].any() and not second[:, 4].any()


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


@pytest.mark.parametrize(
    "options, dtype", [*((o, torch.float32) for o in OPTIONS), ({}, torch.bfloat16)], ids=str
)
def test_a_compiled_call_is_one_graph_of_our_operators(options, dtype):
    input, teacher = problem((5, 70), dtype)
    weights = weights_of(input) if "denominator" in options else None
    options = {**options, "sample_weight": weights}
    backend = AotEagerAndRecordGraphs()
    function = compiled(
        lambda x, t: fused_ce.kl_div_with_logits(x, t, inplace=True, **options), backend
    )
    loss = function(input, teacher)
    (grad,) = torch.autograd.grad(weighed(loss), input)
    plain = fused(input, teacher, grad_in_forward=False, **options)
    assert torch.equal(loss, plain)
    assert torch.equal(grad, torch.autograd.grad(weighed(plain), input)[0])
    code = "".join(graph.code for graph in (*backend.fw_graphs, *backend.bw_graphs))
    assert "graph_kl_div_with_logits." in code and "graph_kl_div_with_logits_backward" in code
    assert "log_softmax" not in code


def test_a_compiled_call_without_gradient():
    input, teacher = problem((5, 70), torch.float32)
    function = compiled(lambda x, t: fused_ce.kl_div_with_logits(x, t))
    expected = composed(input, teacher).detach()
    torch.testing.assert_close(function(input.detach(), teacher), expected)
    with torch.no_grad():
        torch.testing.assert_close(function(input, teacher), expected)


def test_one_dynamic_graph_serves_every_batch_size():
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(
        lambda x, t: fused_ce.kl_div_with_logits(x, t, temperature=2.0), counter, dynamic=True
    )
    graphs = set()
    for rows, classes in ((5, 70), (6, 80), (17, 300)):
        input, teacher = problem((rows, classes), torch.float32)
        expected = fused(input, teacher, temperature=2.0)
        torch.testing.assert_close(function(input, teacher), expected)
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


@every_option
def test_a_compiled_graph_can_be_differentiated_twice(options):
    input, teacher = problem((3, 5))
    found = []
    for function in (compiled(fused_ce.kl_div_with_logits, "eager"), composed):
        total = weighed(function(input, teacher, **options))
        (grad,) = torch.autograd.grad(total, input, create_graph=True)
        found.append(torch.autograd.grad(grad.cos().sum(), input)[0])
    torch.testing.assert_close(*found)


@pytest.mark.slow
def test_inductor_gives_the_same():
    input, teacher = problem((5, 70), torch.float32)
    function = compiled(lambda x, t: fused_ce.kl_div_with_logits(x, t), "inductor")
    (grad,) = torch.autograd.grad(function(input, teacher), input)
    (plain,) = torch.autograd.grad(fused(input, teacher), input)
    torch.testing.assert_close(grad, plain)


def test_export_records_operations_of_torch():
    class Module(torch.nn.Module):
        def forward(self, input, teacher):
            return fused_ce.kl_div_with_logits(input, teacher, temperature=2.0)

    input, teacher = problem((5, 70), torch.float32)
    program = torch.export.export(Module(), (input.detach(), teacher))
    assert "fused_ce" not in str(program.graph)
    torch.testing.assert_close(program.module()(input.detach(), teacher), Module()(input, teacher))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("reduction", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5), (2, 70, 3)])
def test_the_operators_are_what_their_schemas_and_fakes_say(shape, dtype, reduction, reverse):
    input, teacher = problem(shape, torch.float32)
    input, teacher = input.detach(), teacher.to(dtype)
    weights = weights_of(input)
    denominator = torch.tensor(3.0) if reduction == 1 else None
    settings = 0.7, reverse, reduction
    tests = ("test_schema", "test_faketensor")
    call = input, teacher, weights, denominator, *settings
    for operator in (
        ops.kl_div_with_logits,
        ops.kl_div_with_logits_stats,
        ops.kl_div_with_logits_grad,
        ops.kl_div_with_logits_grad_,
        ops.graph_kl_div_with_logits,
    ):
        opcheck(operator, tuple(t.clone() if t is input else t for t in call), test_utils=tests)
    loss, *stats, grad = ops.kl_div_with_logits_grad(*call)
    rest = teacher, *stats, torch.full_like(loss, 2.0), weights, *settings
    for operator in (
        ops.kl_div_with_logits_backward,
        ops.kl_div_with_logits_backward_,
        ops.graph_kl_div_with_logits_backward,
    ):
        opcheck(operator, (input.clone(), *rest), test_utils=tests)
    if reduction == 1:  # of which alone there is a gradient in forward
        opcheck(ops.kl_div_with_logits_rescale_, (grad, input, *rest), test_utils=tests)


def test_a_default_device_does_not_switch_the_kernels_off():
    input, teacher = problem((3, 5))
    with torch.device("cpu"), fused_ce.warn_on_fallback(), warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = fused_ce.kl_div_with_logits(input, teacher)
    assert "GradInForward" in type(loss.grad_fn).__name__


def test_a_subclass_that_overrides_torch_sees_its_functions():
    seen = []

    class Logits(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(getattr(function, "__name__", ""))
            return super().__torch_function__(function, types, args, kwargs or {})

    input, teacher = problem((3, 5))
    loss = fused_ce.kl_div_with_logits(input.detach().as_subclass(Logits), teacher)
    assert "log_softmax" in seen
    torch.testing.assert_close(loss.as_subclass(torch.Tensor), fused(input.detach(), teacher))


def test_a_fallback_is_told_where_that_was_asked_for():
    input, teacher = problem((3, 5))
    with fused_ce.warn_on_fallback(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.func.grad(lambda x: fused_ce.kl_div_with_logits(x, teacher))(input.detach())
    (warning,) = caught
    assert "this call of fused_ce.kl_div_with_logits: a torch.func tran" in str(warning.message)
    assert warning.filename == __file__


REASONS = {
    "sparse": (lambda i, t: (i.detach().to_sparse(), t), {}, "the logits are sparse"),
    "teacher": (lambda i, t: (i, t.requires_grad_()), {}, "the target_logits require grad"),
    "float8": (
        lambda i, t: (i, t.to(torch.float8_e4m3fn)),
        {},
        "there are no kernels for torch.float8_e4m3fn logits",
    ),
    "temperature": (
        lambda i, t: (i, t),
        {"temperature": torch.tensor(2.0, requires_grad=True)},
        "the temperature is a tensor",
    ),
    "empty": (lambda i, t: (i[:0], t[:0]), {}, "there are no logits"),
}


@pytest.mark.parametrize("case", REASONS.values(), ids=REASONS.keys())
def test_explain_call_says_why_plain_operations_take_a_call(case):
    make, options, reason = case
    call = make(*problem((3, 5)))
    said = fused_ce.explain_call(fused_ce.kl_div_with_logits, *call, **options)
    assert said == f"stock: {reason}"
