"""Derivatives of the pointwise losses of every order, under transforms, hooks and in graphs."""

import warnings

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from support.grids import DIFFERENTIATING, REPEATABLE
from support.pointwise_reference import BCE, FOCAL, KL, KL_LOG, LOSSES, incoming, tensors_of
from support.reference import one_thread
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import fused_ce
from fused_ce import ops

every_loss = pytest.mark.parametrize("loss", LOSSES, ids=[loss.name for loss in LOSSES])
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
every_repeatable_mode = pytest.mark.parametrize("mode", REPEATABLE.values(), ids=REPEATABLE.keys())
# A divergence is linear in its input: of second derivatives there are those of what arrives.
CURVED = [loss for loss in LOSSES if loss not in (KL, KL_LOG)]
every_curved_loss = pytest.mark.parametrize("loss", CURVED, ids=[loss.name for loss in CURVED])


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def no_warning_of_a_mean():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="reduction: 'mean'")
        yield


def problem(loss, shape=(4, 5), dtype=torch.float64, **options):
    """Input, target and the arguments, for a binary cross entropy with both weights."""
    torch.manual_seed(0)
    input, target = tensors_of(loss, shape, dtype=dtype)
    options = loss.options | options
    if loss is BCE:
        options |= {"weight": torch.rand(shape[-1]).to(dtype)}
        options |= {"pos_weight": 3 * torch.rand(shape[:1] + (1,) * (len(shape) - 1)).to(dtype)}
    return input.requires_grad_(), target, options


def weighed(value):
    """One number of all, with another slope for each element."""
    return (value * torch.arange(1, value.numel() + 1).view(value.shape).cos()).sum()


@every_loss
@every_reduction
@every_repeatable_mode
@one_thread()
def test_both_derivatives_are_those_of_differences(loss, reduction, mode):
    input, target, options = problem(loss, reduction=reduction)

    def function(x):
        return loss.function(x, target, **options, **mode)

    assert torch.autograd.gradcheck(function, input)
    assert torch.autograd.gradgradcheck(function, input)


@every_curved_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_derivatives_are_those_of_stock_in_float64(loss, dtype):
    input, target, options = problem(loss, (4, 70), dtype, reduction="sum")
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    found = []
    for function, x, y, given in (
        (loss.function, input, target, options),
        (loss.stock, input.detach().double().requires_grad_(), target.double(), wide),
    ):
        (grad,) = torch.autograd.grad(function(x, y, **given), x, create_graph=True)
        found.append(torch.autograd.grad(weighed(grad), x)[0].double())
    rtol = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(*found, rtol=rtol, atol=rtol / 10)


@every_loss
@every_repeatable_mode
def test_a_graph_may_be_walked_twice(loss, mode):
    input, target, options = problem(loss, reduction="sum")
    value = loss.function(input, target, **options, **mode)
    first, second = (torch.autograd.grad(value, input, retain_graph=True)[0] for _ in range(2))
    third = torch.autograd.grad(2 * value, input)[0]
    assert torch.equal(first, second)
    torch.testing.assert_close(third, 2 * first)


@every_loss
@every_repeatable_mode
def test_an_input_that_was_edited_in_between_is_noticed(loss, mode):
    input, target, options = problem(loss, reduction="sum")
    given = input * 1
    value = loss.function(given, target, **options, **mode)
    given.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    with torch.autograd.graph.save_on_cpu():
        given = input * 1
        value = loss.function(given, target, **options, **mode)
    torch.autograd.grad(value, input)


def test_an_edit_that_a_hook_hides_is_noticed():
    input, target, options = problem(BCE, reduction="sum")
    given = input * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        value = BCE.function(given, target, **options)
    given.mul_(2)
    with pytest.raises(RuntimeError, match="logits of fused_ce.binary_cross_entropy_with_logits"):
        value.backward()


@every_loss
@pytest.mark.parametrize("mode", DIFFERENTIATING.values(), ids=DIFFERENTIATING.keys())
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_give_the_same_gradient(loss, mode, use_reentrant):
    input, target, options = problem(loss, reduction="sum")
    (plain,) = torch.autograd.grad(loss.function(input, target, **options), input)

    def function(x):
        return loss.function(x * 1, target, **options, **mode)

    checkpoint(function, input, use_reentrant=use_reentrant).backward()
    torch.testing.assert_close(input.grad, plain)


@every_loss
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_in_place_there_is_one_backward_and_no_second_derivative(loss, reduction):
    for again in (False, True):
        input, target, options = problem(loss, reduction=reduction)
        value = weighed(loss.function(input * 1, target, **options, inplace=True))
        if again:
            value.backward(retain_graph=True)
            with pytest.raises(RuntimeError, match="there can be no second one"):
                value.backward()
        else:
            with pytest.raises(RuntimeError, match="cannot be differentiated or batched"):
                torch.autograd.grad(value, input, create_graph=True)


@every_loss
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_in_place_what_reads_the_input_afterwards_is_refused(loss, reduction):
    input, target, options = problem(loss, reduction=reduction)
    given = input * 1
    kept = given.square()
    value = loss.function(given, target, **options, inplace=True)
    if reduction == "sum":
        with pytest.raises(RuntimeError, match="modified by an inplace|overwritten these logits"):
            (given.exp().sum() + value.sum()).backward()
    else:
        value.sum().backward()
        with pytest.raises(RuntimeError, match="modified by an inplace"):
            kept.sum().backward()


@every_loss
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_in_place_hooks_see_the_gradient(loss, reduction):
    input, target, options = problem(loss, reduction=reduction)
    (expected,) = torch.autograd.grad(weighed(loss.function(input, target, **options)), input)
    seen = []
    given = input * 1
    given.retain_grad()
    given.register_hook(lambda grad: seen.append(grad.clone()))
    weighed(loss.function(given, target, **options, inplace=True)).backward()
    for found in (given.grad, input.grad, *seen):
        torch.testing.assert_close(found, expected)
    assert len(seen) == 1


@every_loss
def test_a_batch_of_gradients_is_one_gradient_after_the_other(loss):
    input, target, options = problem(loss, (3, 2), reduction="none")
    for mode in REPEATABLE.values():
        value = loss.function(input, target, **options, **mode)
        rows = torch.eye(6, dtype=value.dtype).view(6, 3, 2)
        batched = torch.autograd.grad(value, input, rows, is_grads_batched=True, retain_graph=True)[
            0
        ]
        for row, found in zip(rows, batched, strict=True):
            (one,) = torch.autograd.grad(value, input, row, retain_graph=True)
            torch.testing.assert_close(one, found)


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, 2 * x])),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.cos(x),))[1],
    "hessian": lambda f, x: torch.func.hessian(f)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@every_loss
def test_transforms_see_torchs_formula(transform, loss):
    input, target, options = problem(loss, (3, 4), reduction="none")
    found, expected = (
        transform(lambda x, f=f: weighed(f(x, target, **options)), input.detach())
        for f in (loss.function, loss.stock)
    )
    torch.testing.assert_close(found, expected)


@every_loss
def test_forward_mode_carries_the_tangent(loss):
    input, target, options = problem(loss, (3, 4), reduction="none")
    with fwAD.dual_level():
        dual = fwAD.make_dual(input.detach(), torch.cos(input.detach()))
        found, expected = (
            fwAD.unpack_dual(f(dual, target, **options)).tangent
            for f in (loss.function, loss.stock)
        )
    assert found is not None
    torch.testing.assert_close(found, expected)


@every_loss
def test_a_target_that_requires_grad_has_its_gradient(loss):
    input, target, options = problem(loss, reduction="sum")
    target.requires_grad_()
    found, expected = (
        torch.autograd.grad(f(input, target, **options), (input, target))
        for f in (loss.function, loss.stock)
    )
    for grads in zip(found, expected, strict=True):
        torch.testing.assert_close(*grads, equal_nan=True)
    with torch.no_grad():
        assert fused_ce.explain_call(loss.function, input, target, **options).startswith("fused")


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


@every_loss
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_compiled_call_is_one_graph_of_our_operators(loss, reduction):
    input, target, options = problem(loss, (5, 70), torch.float32, reduction=reduction)
    backend = AotEagerAndRecordGraphs()
    function = compiled(lambda x, y: loss.function(x, y, **options), backend)
    value = function(input, target)
    (grad,) = torch.autograd.grad(value, input, incoming(value))
    plain = loss.function(input, target, **options)
    assert torch.equal(value, plain)
    assert torch.equal(grad, torch.autograd.grad(plain, input, incoming(plain))[0])
    code = "".join(graph.code for graph in (*backend.fw_graphs, *backend.bw_graphs))
    assert "graph_pointwise." in code and "graph_pointwise_backward" in code


def test_one_dynamic_graph_serves_every_batch_size():
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(
        lambda x, y: KL.function(x, y, reduction="batchmean"), counter, dynamic=True
    )
    graphs = set()
    for rows, classes in ((5, 70), (6, 80), (17, 300)):
        input, target, _ = problem(KL, (rows, classes), torch.float32)
        expected = KL.stock(input, target, reduction="batchmean")
        torch.testing.assert_close(function(input, target), expected)
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


@every_curved_loss
def test_a_compiled_graph_can_be_differentiated_twice(loss):
    input, target, options = problem(loss, (3, 5), reduction="sum")
    found = []
    for function in (compiled(loss.function, "eager"), loss.stock):
        value = function(input, target, **options)
        (grad,) = torch.autograd.grad(value, input, create_graph=True)
        found.append(torch.autograd.grad(grad.cos().sum(), input)[0])
    torch.testing.assert_close(*found)


def test_a_compiled_call_without_gradient():
    input, target, options = problem(FOCAL, (5, 70), torch.float32)
    function = compiled(lambda x, y: FOCAL.function(x, y, **options))
    with torch.no_grad():
        torch.testing.assert_close(function(input, target), FOCAL.stock(input, target, **options))


@pytest.mark.slow
@every_loss
def test_inductor_gives_the_same(loss):
    input, target, options = problem(loss, (5, 70), torch.float32, reduction="sum")
    function = compiled(lambda x, y: loss.function(x, y, **options), "inductor")
    (grad,) = torch.autograd.grad(function(input, target), input)
    (plain,) = torch.autograd.grad(loss.function(input, target, **options), input)
    torch.testing.assert_close(grad, plain)


def test_export_records_operations_of_torch():
    class Module(torch.nn.Module):
        def forward(self, input, target):
            return (
                fused_ce.binary_cross_entropy_with_logits(input, target),
                fused_ce.sigmoid_focal_loss(input, target),
                fused_ce.kl_div(input, target, reduction="batchmean"),
            )

    input, target, _ = problem(BCE, (5, 7), torch.float32)
    program = torch.export.export(Module(), (input.detach(), target))
    assert "fused_ce" not in str(program.graph)
    torch.testing.assert_close(program.module()(input.detach(), target), Module()(input, target))


@every_loss
def test_the_operators_are_what_their_schemas_and_fakes_say(loss):
    kind = {"bce": 0, "focal": 1, "kl": 2, "kl_of_logs": 3}.get(loss.name, 1)
    input, target, _ = problem(loss, (4, 7), torch.float32)
    input = input.detach()
    weight = torch.rand(7)
    tests = ("test_schema", "test_faketensor")
    for reduction in range(4):
        numbers = (kind, reduction, 0.25, 1.5)
        tensors = (input, target, weight, weight if kind == 0 else None)
        for operator in (ops.pointwise, ops.graph_pointwise, ops.pointwise_grad):
            for dtype in (None, torch.float64):
                opcheck(operator, (*tensors, *numbers, dtype), test_utils=tests)
        grad = torch.rand(4, 7) if reduction == 0 else torch.tensor(2.0)
        for operator in (ops.pointwise_backward, ops.graph_pointwise_backward):
            opcheck(operator, (*tensors, grad, *numbers), test_utils=tests)


def test_a_default_device_does_not_switch_the_kernels_off():
    input, target, _ = problem(BCE)
    with torch.device("cpu"), fused_ce.warn_on_fallback(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for loss in (BCE, FOCAL, KL):
            value = loss.function(input, target, reduction="sum")
            assert "GradInForward" in type(value.grad_fn).__name__


@every_loss
def test_a_subclass_that_overrides_torch_sees_its_functions(loss):
    seen = []

    class Logits(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(getattr(function, "__name__", ""))
            return super().__torch_function__(function, types, args, kwargs or {})

    input, target, options = problem(loss, reduction="sum")
    value = loss.function(input.detach().as_subclass(Logits), target, **options)
    assert {"binary_cross_entropy_with_logits", "kl_div"} & set(seen)
    torch.testing.assert_close(
        value.as_subclass(torch.Tensor), loss.stock(input.detach(), target, **options)
    )
