"""Derivatives of the row statistics of every order, under transforms and in compiled graphs."""

import contextlib
import warnings

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from support.grids import together
from support.reference import one_thread
from support.statistics_reference import FIELDS, composed, ours, target_of
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import fused_ce
from fused_ce import ops

MAPS = [{}, {"temperature": 0.7}, {"softcap": 2.0}, {"temperature": 1.3, "softcap": 5.0}]
every_map = pytest.mark.parametrize("options", MAPS, ids=str)
# Lanes, and rows of one block.
SHAPES = [(3, 5), (2, 4, 3), (7,), (1, 70)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    torch._dynamo.reset()


def problem(shape, dtype=torch.float64):
    input = (torch.randn(shape, dtype=torch.float64) * 2).to(dtype)
    return input.requires_grad_(), target_of(input)


def floats(stats):
    return tuple(v for v in stats[:3] if v is not None)


def weighed(stats):
    """One number of all, with another slope for each row and result."""
    parts = [(v * torch.arange(1, v.numel() + 1).view(v.shape).cos()) for v in floats(stats)]
    return sum((k + 1) * (part + part.square() / 8).sum() for k, part in enumerate(parts))


def by_kernels(input, target, **options):
    return fused_ce.softmax_stats(input, target, dim=min(1, input.dim() - 1), **options)


def by_torch(input, target, **options):
    return composed(input, target, dim=min(1, input.dim() - 1), **options)


@together
@every_shape
@every_map
@one_thread()
def test_both_derivatives_are_those_of_differences(shape, options):
    input, target = problem(shape)

    def function(x):
        return floats(ours(x, target, **options))

    # Along one direction of all elements, in a tenth of the time of one after the other.
    assert torch.autograd.gradcheck(function, input, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, input, fast_mode=True)


@pytest.mark.parametrize("wanted", FIELDS)
def test_each_result_alone_has_its_own_derivatives(wanted):
    input, target = problem((3, 5))

    def function(x):
        return getattr(ours(x, target), wanted)

    assert torch.autograd.gradcheck(function, input)
    assert torch.autograd.gradgradcheck(function, input)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backward_under_create_graph_gives_the_same_gradient(dtype):
    input, target = problem((5, 70), dtype)
    grads = [
        torch.autograd.grad(weighed(by_kernels(input, target)), input, create_graph=graph)[0]
        for graph in (False, True)
    ]
    assert grads[1].requires_grad
    torch.testing.assert_close(*grads, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_what_is_not_used_is_not_computed_in_the_backward(monkeypatch):
    calls = []
    operator = ops.softmax_stats_backward
    monkeypatch.setattr(
        ops, "softmax_stats_backward", lambda *a: (calls.append(a), operator(*a))[1]
    )
    input, target = problem((3, 5))
    ours(input, target).log_prob.sum().backward()
    ((*_, of_log_prob, of_entropy, of_logsumexp, _, _, _),) = calls
    assert of_log_prob is not None and of_entropy is None and of_logsumexp is None


def test_argmax_has_no_gradient_and_stops_none():
    input, target = problem((3, 5))
    stats = ours(input, target)
    assert not stats.argmax.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(stats.argmax.sum(), input)
    torch.autograd.grad(stats.logsumexp.sum(), input)


def test_a_graph_may_be_walked_twice():
    input, target = problem((5, 70))
    total = weighed(ours(input, target))
    first = torch.autograd.grad(total, input, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(total, input)[0])


def pass_through():
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


@pytest.mark.parametrize("hooks", [None, pass_through, torch.autograd.graph.save_on_cpu])
def test_logits_that_were_edited_in_between_are_noticed(hooks):
    # Autograd compares no versions of what a hook has had.
    logits = torch.randn(4, 5, requires_grad=True) * 1
    with hooks() if hooks else contextlib.nullcontext():
        stats = fused_ce.softmax_stats(logits, torch.tensor([0, 4, 2, 1]))
    logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stats.entropy.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_give_the_same_gradient(use_reentrant):
    input, target = problem((5, 70))
    plain = torch.autograd.grad(weighed(ours(input, target)), input)[0]

    def function(x):
        return weighed(ours(x * 1, target))

    checkpoint(function, input, use_reentrant=use_reentrant).backward()
    torch.testing.assert_close(input.grad, plain)


def test_a_batch_of_gradients_is_one_gradient_after_the_other():
    input, target = problem((4, 5))
    log_prob = ours(input, target).log_prob
    rows = torch.eye(4, dtype=torch.float64)
    batched = torch.autograd.grad(log_prob, input, rows, is_grads_batched=True, retain_graph=True)[
        0
    ]
    for row, found in zip(rows, batched, strict=True):
        torch.testing.assert_close(
            torch.autograd.grad(log_prob, input, row, retain_graph=True)[0], found
        )


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, 2 * x])),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.cos(x),))[1],
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "grad of grad": lambda f, x: torch.func.grad(lambda y: torch.func.grad(f)(y).square().sum())(x),
}


@together
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize("options", [MAPS[0], MAPS[3]], ids=str)
def test_transforms_see_the_composition(transform, options):
    input, target = problem((3, 4))
    input = input.detach()
    found, expected = (
        transform(lambda x, f=f: weighed(f(x, target, **options)), input)
        for f in (by_kernels, by_torch)
    )
    torch.testing.assert_close(found, expected)


def test_forward_mode_carries_the_tangent():
    input, target = problem((3, 4))
    with fwAD.dual_level():
        dual = fwAD.make_dual(input.detach(), torch.cos(input.detach()))
        found, expected = (
            fwAD.unpack_dual(weighed(f(dual, target))).tangent for f in (by_kernels, by_torch)
        )
    assert found is not None
    torch.testing.assert_close(found, expected)


def test_a_masked_class_leaves_second_derivatives_finite():
    input, target = problem((3, 5))
    with torch.no_grad():
        input[:, 4] = -torch.inf
    target = target.clamp(max=3)
    total = weighed(by_kernels(input, target))
    (grad,) = torch.autograd.grad(total, input, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), input)
    assert grad.isfinite().all() and second.isfinite().all()
    assert not grad[:, 4].any() and not second[:, 4].any()


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


@together
@every_map
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_call_is_one_graph_of_our_operators(options, dtype):
    input, target = problem((5, 70), dtype)
    backend = AotEagerAndRecordGraphs()
    function = compiled(lambda x, t: by_kernels(x, t, argmax=True, **options), backend)
    stats = function(input, target)
    (grad,) = torch.autograd.grad(weighed(stats), input)
    plain = ours(input, target, **options)
    for value, expected in zip(stats, plain, strict=True):
        assert torch.equal(value, expected)
    assert torch.equal(grad, torch.autograd.grad(weighed(plain), input)[0])
    code = "".join(graph.code for graph in (*backend.fw_graphs, *backend.bw_graphs))
    assert "graph_softmax_stats." in code and "graph_softmax_stats_backward" in code
    assert "log_softmax" not in code


def test_a_compiled_call_without_target_or_gradient():
    input, _ = problem((5, 70), torch.float32)
    function = compiled(lambda x: fused_ce.softmax_stats(x, entropy=False).logsumexp)
    torch.testing.assert_close(function(input.detach()), input.detach().logsumexp(-1))
    with torch.no_grad():
        torch.testing.assert_close(function(input), input.detach().logsumexp(-1))


def test_one_dynamic_graph_serves_every_batch_size():
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(lambda x, t: by_kernels(x, t, temperature=0.7), counter, dynamic=True)
    graphs = set()
    for rows, classes in ((5, 70), (6, 80), (17, 300)):
        input, target = problem((rows, classes), torch.float32)
        expected = by_kernels(input, target, temperature=0.7)
        torch.testing.assert_close(floats(function(input, target)), floats(expected))
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


def test_a_compiled_graph_can_be_differentiated_twice():
    input, target = problem((3, 5))
    found = []
    for function in (compiled(by_kernels, "eager"), by_torch):
        total = weighed(function(input, target))
        (grad,) = torch.autograd.grad(total, input, create_graph=True)
        found.append(torch.autograd.grad(grad.cos().sum(), input)[0])
    torch.testing.assert_close(*found)


@pytest.mark.slow
def test_inductor_gives_the_same():
    input, target = problem((5, 70), torch.float32)
    function = compiled(lambda x, t: weighed(by_kernels(x, t)), "inductor")
    (grad,) = torch.autograd.grad(function(input, target), input)
    (plain,) = torch.autograd.grad(weighed(by_kernels(input, target)), input)
    torch.testing.assert_close(grad, plain)


def test_export_records_operations_of_torch():
    class Module(torch.nn.Module):
        def forward(self, input, target):
            return floats(fused_ce.softmax_stats(input, target))

    input, target = problem((5, 70), torch.float32)
    program = torch.export.export(Module(), (input.detach(), target))
    assert "fused_ce" not in str(program.graph)
    torch.testing.assert_close(program.module()(input.detach(), target), Module()(input, target))


@pytest.mark.parametrize("with_target", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (2, 70, 3)])
def test_the_operators_are_what_their_schemas_and_fakes_say(shape, with_target):
    input, target = problem(shape, torch.float32)
    target = target if with_target else None
    for operator in (ops.softmax_stats, ops.graph_softmax_stats):
        for switches in ((True, True, True), (False, False, False)):
            arguments = (input.detach(), target, 0.7, 3.0, -100, *switches)
            opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    _, entropy, lse, _, stats = ops.softmax_stats(input, target, 0.7, 0.0, -100, True, False, True)
    arguments = (input.detach(), target, entropy, stats, None, torch.ones_like(lse), None)
    for operator in (ops.softmax_stats_backward, ops.graph_softmax_stats_backward):
        tests = ("test_schema", "test_faketensor")
        opcheck(operator, (*arguments, 0.7, 0.0, -100), test_utils=tests)


def test_a_default_device_does_not_switch_the_kernels_off():
    input, target = problem((3, 5))
    with torch.device("cpu"), fused_ce.warn_on_fallback(), warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = fused_ce.softmax_stats(input, target)
    assert "Statistics" in type(stats.entropy.grad_fn).__name__


def test_a_subclass_that_overrides_torch_sees_its_functions():
    seen = []

    class Logits(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(getattr(function, "__name__", ""))
            return super().__torch_function__(function, types, args, kwargs or {})

    input, target = problem((3, 5))
    stats = fused_ce.softmax_stats(input.detach().as_subclass(Logits), target)
    assert "log_softmax" in seen
    torch.testing.assert_close(
        stats.entropy.as_subclass(torch.Tensor), ours(input.detach(), target).entropy
    )


def test_a_learned_temperature_has_a_gradient():
    input, target = problem((3, 5))
    temperature = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    said = fused_ce.explain_stats(input, target, temperature=temperature)
    assert said == "stock: the temperature is a tensor"
    found, expected = (
        torch.autograd.grad(weighed(f(input, target, temperature=temperature)), temperature)[0]
        for f in (by_kernels, by_torch)
    )
    torch.testing.assert_close(found, expected)


def test_a_fallback_is_told_where_that_was_asked_for():
    input, target = problem((3, 5))
    with fused_ce.warn_on_fallback(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.func.grad(lambda x: weighed(fused_ce.softmax_stats(x, target)))(input.detach())
    (warning,) = caught
    assert "this call of fused_ce.softmax_stats: a torch.func transform" in str(warning.message)
    assert warning.filename == __file__
