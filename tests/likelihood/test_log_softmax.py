"""`log_softmax` is stock's in every bit, whichever memory it is written to.

Small tensors are sent along the way of large ones, which are too slow for a grid; a few of 40 MiB
show that they take it by themselves, and what it saves.
"""

import copy
import pickle
import warnings

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from support.grids import together
from support.likelihood import (
    LARGE,
    assert_same,
    derivatives,
    outcome,
    page_faults,
    with_huge_pages,
)

import fused_ce
from fused_ce.eligibility import LOGIT_DTYPES

DTYPES = sorted(LOGIT_DTYPES, key=str)

LAYOUTS = {
    "a vector": lambda: torch.randn(7),
    "rows": lambda: torch.randn(6, 5),
    "columns": lambda: torch.randn(5, 6).t(),
    "an image": lambda: torch.randn(2, 3, 4, 5),
    "channels last": lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "expanded": lambda: torch.randn(6, 1).expand(6, 4),
    "no rows": lambda: torch.randn(0, 4),
    "masked": lambda: torch.randn(4, 5).masked_fill(torch.eye(4, 5, dtype=torch.bool), -torch.inf),
    "masked as a whole": lambda: torch.full((2, 3), -torch.inf),
    "nan": lambda: torch.tensor([[1.0, torch.nan], [2.0, 3.0]]),
}


@together
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_layout_and_gradients_are_stocks(layout, dtype, all_is_large):
    input = LAYOUTS[layout]().to(dtype)
    for dim in range(-1, input.dim()):
        for other in (None, torch.float32, torch.bfloat16):
            options = {"dim": dim, "dtype": other}
            assert_same(
                derivatives(fused_ce.log_softmax, input, order=2, **options),
                derivatives(F.log_softmax, input, order=2, **options),
            )
            assert_same(fused_ce.log_softmax(input, **options), F.log_softmax(input, **options))
    assert all_is_large
    leaf = input.requires_grad_()
    for function in (fused_ce.log_softmax, F.log_softmax):
        leaf.grad = None
        function(leaf, 0).exp().sum().backward()
    assert leaf.grad.stride() == leaf.stride() or not leaf.is_contiguous()


@together
@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((torch.randn(3, 4), 2), {}),
        ((torch.randn(3, 4), -3), {}),
        ((torch.randn(3, 4), 1.0), {}),
        ((torch.randn(3, 4), 1), {"dtype": torch.int64}),
        ((torch.arange(4), 0), {}),
        ((torch.arange(4), 0), {"dtype": torch.float32}),
        ((torch.tensor(2.0), 0), {}),
        ((torch.randn(3, 4).to_sparse(), 1), {}),
        ((torch.randn(3, 4, dtype=torch.complex64), 1), {}),
        ((torch.randn(3, 4, device="meta"), 1), {"dtype": torch.int8}),
        (([1.0, 2.0], 0), {}),
    ],
    ids=[
        *("dim 2", "dim -3", "dim 1.0", "to int64", "integers", "integers to float32", "a number"),
        *("sparse", "complex", "meta", "a list"),
    ],
)
def test_what_is_refused_is_refused_in_stocks_words(arguments, options, all_is_large):
    expected = outcome(F.log_softmax, *arguments, **options)
    found = outcome(fused_ce.log_softmax, *arguments, **options)
    if isinstance(expected, tuple):
        assert found == expected
    elif expected.is_sparse:
        assert_same(found.to_dense(), expected.to_dense())
    else:
        assert_same(found, expected)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4), (2, 3, 4, 5)], ids=str)
def test_without_dim_torch_chooses_it_and_warns_of_the_callers_line(shape):
    input, caught = torch.randn(shape), []
    for function in (F.log_softmax, fused_ce.log_softmax):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            caught.append((function(input), [(str(w.message), w.filename) for w in found]))
    (expected, of_stock), (result, of_ours) = caught
    assert_same(result, expected)
    assert of_ours == of_stock and of_ours[0][1] == __file__
    for module in (torch.nn.LogSoftmax(), fused_ce.LogSoftmax()):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            assert_same(module(input), expected)
            caught.append([(str(w.message), w.filename, w.lineno) for w in found])
    assert caught[-1] == caught[-2]


def fresh_graph(function, dtype=torch.float64):
    torch.manual_seed(1)
    leaf = torch.randn(4, 5, dtype=dtype, requires_grad=True)
    return leaf, function(leaf * 1, 1)


def twice(function):
    leaf, value = fresh_graph(function)
    loss = value.square().sum()
    return [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2)]


def hooks_see_and_change_the_gradient(function):
    leaf, value = fresh_graph(function)
    value.retain_grad()
    value.register_hook(lambda grad: 2 * grad)
    value.square().sum().backward()
    return leaf.grad, value.grad


def batched(function):
    leaf, value = fresh_graph(function)
    return torch.autograd.grad(value[0], leaf, torch.eye(5).double(), is_grads_batched=True)


def used_twice(function):
    leaf, value = fresh_graph(function)
    (value[:, 0].sum() + value.exp().square().sum()).backward()
    return leaf.grad


def forward_mode(function):
    torch.manual_seed(1)
    with fwAD.dual_level():
        dual = fwAD.make_dual(torch.randn(4, 5), torch.randn(4, 5))
        return fwAD.unpack_dual(function(dual, 1))


def transforms(function):
    torch.manual_seed(1)
    input = torch.randn(4, 5)
    return (
        torch.func.vmap(lambda row: function(row, 0))(input),
        torch.func.jacrev(lambda row: function(row, 0))(input[0]),
        torch.func.hessian(lambda row: function(row, 0).square().sum())(input[0]),
        torch.func.jvp(lambda x: function(x, 1), (input,), (input,))[1],
    )


def a_transform_that_begins_after_the_forward(function):
    leaf, value = fresh_graph(function)

    def backward(incoming):
        return torch.autograd.grad(value, leaf, incoming, retain_graph=True)[0]

    return torch.func.vmap(backward)(torch.eye(20).double().view(20, 4, 5))


def a_checkpoint(function):
    torch.manual_seed(1)
    leaf = torch.randn(4, 5, requires_grad=True)
    value = torch.utils.checkpoint.checkpoint(lambda x: function(x, 1), leaf, use_reentrant=False)
    return torch.autograd.grad(value.square().sum(), leaf)


def inference(function):
    with torch.inference_mode():
        return function(torch.ones(3, 4), 1).clone()


def autocast(function):
    with torch.autocast("cpu"):
        return function(torch.ones(3, 4, dtype=torch.bfloat16), 1), function(torch.ones(3, 4), 1)


def under_a_device(function):
    with torch.device("cpu"):
        return function(torch.ones(3, 4), 1)


def a_parameter(function):
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3))
    return torch.autograd.grad(function(weight, 1)[:, 0].sum(), weight)


def traced(function):
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        return torch.jit.trace(lambda x: function(x, 1), torch.randn(3, 4))(torch.ones(3, 4))


USES = [
    twice,
    hooks_see_and_change_the_gradient,
    batched,
    used_twice,
    forward_mode,
    transforms,
    a_transform_that_begins_after_the_forward,
    a_checkpoint,
    inference,
    autocast,
    under_a_device,
    a_parameter,
    traced,
]


@together
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_whatever_is_done_with_it_has_stocks_result(use, all_is_large):
    assert_same(use(fused_ce.log_softmax), use(F.log_softmax))


def test_an_edit_of_the_result_is_noticed_as_in_stock(all_is_large):
    for function in (fused_ce.log_softmax, F.log_softmax):
        leaf, value = fresh_graph(function)
        loss = value.sum()
        value.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        leaf, value = fresh_graph(function)  # the logits are free, as in stock
        with torch.no_grad():
            leaf.zero_()
        value.sum().backward()


def test_compiled_and_exported_graphs_hold_stocks_operators(all_is_large):
    input = torch.randn(3, 4, requires_grad=True)
    compiled = torch.compile(fused_ce.log_softmax, fullgraph=True, backend="aot_eager")
    value = compiled(input, 1)
    (grad,) = torch.autograd.grad(value.square().sum(), input)
    assert_same([value.detach(), grad], derivatives_of_square(input))

    class Model(torch.nn.Module):
        def forward(self, x):
            return fused_ce.log_softmax(x, 1)

    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(Model(), (input.detach(),), dynamic_shapes={"x": {0: batch}})
    assert "log_softmax" in str(exported.graph) and "fused_ce" not in str(exported.graph)
    larger = torch.randn(6, 4)
    assert_same(exported.module()(larger), F.log_softmax(larger, 1))


def derivatives_of_square(input):
    value = F.log_softmax(input, 1)
    return [value.detach(), *torch.autograd.grad(value.square().sum(), input)]


def test_a_graph_asks_nothing_of_a_size():
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(fused_ce.log_softmax, fullgraph=True, dynamic=True, backend=backend)
    for shape in ((3, 4), (2100, 2000)):  # fewer elements than 4 Mi, and more
        input = torch.randn(shape)
        torch.testing.assert_close(compiled(input, 1), F.log_softmax(input, 1))
    assert len(graphs) == 1 and "fused_ce" not in str(graphs[0].graph)


class Named(torch.Tensor):
    called = ()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        Named.called = (*Named.called, function)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_subclass_is_handed_torchs_own_function():
    Named.called = ()
    result = fused_ce.log_softmax(torch.randn(2, 3).as_subclass(Named), 1)
    assert type(result) is Named and Named.called[0] is F.log_softmax
    assert fused_ce.explain_call(
        fused_ce.log_softmax, torch.randn(2, 3).as_subclass(Named), 1
    ).endswith("overrides __torch_function__")


def test_the_module_is_an_nn_log_softmax():
    module = fused_ce.LogSoftmax(dim=1)
    assert isinstance(module, torch.nn.LogSoftmax) and repr(module) == "LogSoftmax(dim=1)"
    for same in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same(same(torch.eye(3)), torch.nn.LogSoftmax(dim=1)(torch.eye(3)))
    with pytest.raises(RuntimeError, match="cannot be scripted"):
        torch.jit.script(module)


def test_a_program_may_put_it_in_the_place_of_torchs_own(monkeypatch):
    stock = F.log_softmax
    monkeypatch.setattr(F, "log_softmax", fused_ce.log_softmax)
    input = torch.randn(4, 5, requires_grad=True)
    assert_same(torch.nn.LogSoftmax(1)(input), fused_ce.LogSoftmax(1)(input))
    assert_same(torch.func.vmap(lambda row: F.log_softmax(row, 0))(input), stock(input, 1))
    assert type(F.log_softmax(input.as_subclass(Named), 1)) is Named


@pytest.mark.not_on_simulator
@with_huge_pages
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_results_come_without_the_page_faults(dtype):
    input = torch.zeros(LARGE, dtype=dtype).requires_grad_()
    incoming = torch.zeros(LARGE)
    options = {"dim": 1, "dtype": torch.float32}
    says = fused_ce.explain_call(fused_ce.log_softmax, input, **options)
    assert says == "stock: torch's kernel, writing into huge pages that are asked for"

    def both(function):
        return lambda: torch.autograd.grad(function(input, **options), input, incoming)

    of_stock, of_ours = page_faults(both(F.log_softmax)), page_faults(both(fused_ce.log_softmax))
    # The ends of blocks are no whole huge pages. In stock all of a block may be, on a system that
    # gives them to everyone.
    assert of_ours < min(of_stock / 4, 4096) or of_stock < 4096
    assert_same(fused_ce.log_softmax(input[:300], 1), F.log_softmax(input[:300], 1))


@together
@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (lambda: torch.empty(8, 10), {}, "finds memory at hand"),
        (lambda: torch.empty(LARGE, device="meta"), {}, "not the CPU's own"),
        (lambda: torch.empty(LARGE).to(torch.int32), {}, "none of the usual ones"),
        (lambda: torch.empty(LARGE), {"dim": 2}, "none of the usual ones"),
        (lambda: torch.empty(LARGE), {"dim": 1}, "into huge pages"),
        (lambda: torch.empty(LARGE), {}, "into huge pages"),
        (lambda: torch.empty(LARGE, dtype=torch.bfloat16), {"dim": 1}, "finds memory at hand"),
        (lambda: torch.empty(LARGE, dtype=torch.bfloat16), {"dtype": torch.float32}, "into huge"),
    ],
)
def test_explain_call_says_where_a_result_is_written(make, options, reason):
    says = fused_ce.explain_call(fused_ce.log_softmax, make(), **options)
    assert says.startswith("stock: ") and reason in says


def test_explain_call_knows_what_is_under_way():
    input = torch.empty(LARGE)
    torch.use_deterministic_algorithms(True)
    try:
        assert "deterministic" in fused_ce.explain_call(fused_ce.log_softmax, input, 1)
    finally:
        torch.use_deterministic_algorithms(False)
    with fwAD.dual_level():
        assert "forward-mode" in fused_ce.explain_call(fused_ce.log_softmax, input, 1)
