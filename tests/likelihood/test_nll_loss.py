"""`nll_loss` is stock's in every bit, whichever memory its gradient is written to, and with
`log_softmax` before it the cross entropy.
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
from support.reference import assert_as_accurate
from torch.fx.experimental.proxy_tensor import make_fx

import fused_ce
from fused_ce.eligibility import LOGIT_DTYPES

DTYPES = sorted(LOGIT_DTYPES, key=str)
# Every number of dimensions that stock tells apart, and one without elements.
SHAPES = [(5,), (6, 5), (3, 5, 4), (2, 5, 3, 4), (2, 5, 2, 1, 3), (0, 5), (2, 5, 0)]


def problem(shape, dtype=torch.float32):
    torch.manual_seed(0)
    input = torch.randn(shape).log_softmax(1 if len(shape) > 1 else 0).to(dtype)
    target = torch.randint(0, 5, (*shape[:1], *shape[2:]) if len(shape) > 1 else ())
    return input, target


OPTIONS = {
    "plain": {},
    "weight": {"weight": torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0])},
    "ignored": {"ignore_index": 2},
    "size_average": {"size_average": False},
    "reduce": {"reduce": False},
}


@together
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_values_and_gradients_are_stocks(shape, reduction, options, all_is_large):
    for dtype in DTYPES:
        input, target = problem(shape, dtype)
        arguments = {"reduction": reduction, **OPTIONS[options]}
        if "weight" in arguments:
            arguments["weight"] = arguments["weight"].to(dtype)
        assert_same(
            derivatives(fused_ce.nll_loss, input, target, order=1, **arguments),
            derivatives(F.nll_loss, input, target, order=1, **arguments),
        )
    assert bool(all_is_large) == (len(shape) > 1)


@pytest.mark.parametrize(
    "input",
    [
        torch.randn(5, 6).t(),
        torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last),
        torch.randn(6, 1).expand(6, 5),
        torch.randn(2, 3, 5).transpose(1, 2),
    ],
    ids=["columns", "channels last", "expanded", "sequence"],
)
def test_other_layouts_are_stocks_own(input, all_is_large):
    target = torch.zeros((*input.shape[:1], *input.shape[2:]), dtype=torch.int64)
    ours = outcome(derivatives, fused_ce.nll_loss, input, target, order=1)
    assert_same(ours, outcome(derivatives, F.nll_loss, input, target, order=1))
    assert not all_is_large


X, Y = problem((6, 5))


@together
@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((X, X), {}),
        ((X, Y[:3]), {}),
        ((X, Y.float()), {}),
        ((X, Y.int()), {}),
        ((X, Y.to(torch.uint8)), {}),
        ((X, Y + 5), {}),
        ((X, Y - 5), {}),
        ((X, Y), {"reduction": "avg"}),
        ((X, Y), {"weight": torch.ones(4)}),
        ((X, Y), {"weight": torch.ones(5, dtype=torch.float64)}),
        ((X, Y), {"weight": torch.ones(5, requires_grad=True)}),
        ((X, Y), {"ignore_index": 1.5}),
        ((X, Y), {"ignore_index": None}),
        ((X.long(), Y), {}),
        ((torch.tensor(1.0), torch.tensor(0)), {}),
        ((X, None), {}),
        (([1.0], Y), {}),
        ((torch.randn(2, 5, 3, 4), torch.zeros(2, 4, 3, dtype=torch.int64)), {}),
        ((torch.randn(2, 5, 3), torch.zeros(2, 4, dtype=torch.int64)), {}),
    ],
)
def test_what_is_refused_is_refused_in_stocks_words(arguments, options, all_is_large):
    input, *others = arguments
    if isinstance(input, torch.Tensor) and input.is_floating_point():
        input = input.clone().requires_grad_()
    assert_same(
        outcome(fused_ce.nll_loss, input, *others, **options),
        outcome(F.nll_loss, input, *others, **options),
    )


def fresh_graph(nll_loss, **options):
    """Of log-probabilities that are no leaf: they come of logits."""
    torch.manual_seed(1)
    leaf = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    log_prob = leaf.log_softmax(1)
    return leaf, log_prob, nll_loss(log_prob, torch.tensor([0, 4, 4, 2]), **options)


def twice(function):
    leaf, _, loss = fresh_graph(function)
    return [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2)]


def second_and_third_derivatives(function):
    leaf, _, loss = fresh_graph(function)
    found = []
    for _ in range(3):
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        loss = grad.pow(3).sum()
        found.append(grad.detach())
    return found


def hooks_see_and_change_the_gradient(function):
    leaf, log_prob, loss = fresh_graph(function)
    log_prob.retain_grad()
    log_prob.register_hook(lambda grad: 2 * grad)
    loss.backward()
    return leaf.grad, log_prob.grad


def others_use_the_log_probabilities(function):
    leaf, log_prob, loss = fresh_graph(function)
    (loss + log_prob.exp().square().sum()).backward()
    return leaf.grad


def of_the_log_probabilities_alone(function):
    _, log_prob, loss = fresh_graph(function)
    return torch.autograd.grad(loss, log_prob)


def batched(function):
    leaf, _, loss = fresh_graph(function, reduction="none")
    return torch.autograd.grad(loss, leaf, torch.eye(4).double(), is_grads_batched=True)


def forward_mode(function):
    torch.manual_seed(1)
    with fwAD.dual_level():
        dual = fwAD.make_dual(torch.randn(4, 5), torch.randn(4, 5))
        return fwAD.unpack_dual(function(dual, torch.tensor([0, 4, 4, 2])))


def transforms(function):
    torch.manual_seed(1)
    input, target = torch.randn(4, 5), torch.tensor([0, 4, 4, 2])

    def loss(x):
        return function(x.log_softmax(1), target)

    return (
        torch.func.grad(loss)(input),
        torch.func.hessian(loss)(input),
        torch.func.jvp(loss, (input,), (input,)),
        torch.func.vmap(function)(input, target),
    )


def autocast(function):
    input = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.autocast("cpu"):
        loss = function(input.requires_grad_(), torch.tensor([0, 4, 4, 2]))
    return loss, torch.autograd.grad(loss, input)


def under_a_device(function):
    with torch.device("cpu"):
        return function(torch.ones(3, 4, requires_grad=True), torch.tensor([0, 1, 3])).detach()


USES = [
    twice,
    second_and_third_derivatives,
    hooks_see_and_change_the_gradient,
    others_use_the_log_probabilities,
    of_the_log_probabilities_alone,
    batched,
    forward_mode,
    transforms,
    autocast,
    under_a_device,
]


@together
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_whatever_is_done_with_it_has_stocks_result(use, all_is_large):
    def pair(log_prob, *arguments, **options):
        """With a log_softmax of ours before it, whose result is that of the one that was there."""
        return fused_ce.nll_loss(log_prob, *arguments, **options)

    assert_same(detached(use(pair)), detached(use(F.nll_loss)))


def detached(found):
    if isinstance(found, torch.Tensor):
        return found.detach()
    return [value if value is None else detached(value) for value in found]


def test_an_edit_between_the_two_ways_is_noticed_as_in_stock(all_is_large):
    for function in (fused_ce.nll_loss, F.nll_loss):
        leaf = torch.randn(4, 5, requires_grad=True)
        log_prob = leaf * 1
        loss = function(log_prob, torch.tensor([0, 4, 4, 2]))
        log_prob.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_the_compiled_pair_has_the_gradient_of_stock(all_is_large):
    input, target = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 3, 1])

    def pair(functions, input):
        return functions.nll_loss(functions.log_softmax(input, 1), target)

    compiled = torch.compile(pair, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(fused_ce, input), input)
    assert_same(found, torch.autograd.grad(pair(F, input), input))


def test_a_mode_that_looks_on_sees_stocks_operators(all_is_large):
    def recorded(functions):
        def step(input, target):
            loss = functions.nll_loss(functions.log_softmax(input, 1), target)
            return torch.autograd.grad(loss, input)

        return make_fx(step)(torch.randn(3, 4, requires_grad=True), torch.tensor([0, 3, 1])).code

    assert recorded(fused_ce) == recorded(F)


class Named(torch.Tensor):
    called = None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        Named.called = Named.called or function
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_subclass_is_handed_torchs_own_function():
    result = fused_ce.nll_loss(X.as_subclass(Named), Y)
    assert type(result) is Named and Named.called is F.nll_loss


def test_the_module_is_an_nn_nll_loss():
    weight = torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0])
    ours, stock = (m.NLLLoss(weight, ignore_index=2) for m in (fused_ce, torch.nn))
    assert isinstance(ours, torch.nn.NLLLoss) and repr(ours) == repr(stock)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    for same in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_same(same(X, Y), stock(X, Y))
    with pytest.raises(RuntimeError, match="cannot be scripted"):
        torch.jit.script(ours)


def test_a_program_may_put_it_in_the_place_of_torchs_own(monkeypatch):
    stock = F.nll_loss
    monkeypatch.setattr(F, "nll_loss", fused_ce.nll_loss)
    assert_same(torch.nn.NLLLoss()(X, Y), stock(X, Y))
    assert_same(torch.func.vmap(F.nll_loss)(X, Y), stock(X, Y, reduction="none"))
    assert_same(fused_ce.nll_loss(X.as_subclass(Named), Y).as_subclass(torch.Tensor), stock(X, Y))


def test_the_deprecated_arguments_warn_as_in_stock():
    texts = []
    for function in (F.nll_loss, fused_ce.nll_loss):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            function(X, Y, size_average=True, reduce=False)
            texts.append([(str(w.message), w.category) for w in found])
    assert texts[0] == texts[1] and len(texts[0]) == 1


@pytest.mark.parametrize("functions", [F, fused_ce], ids=["stock", "ours"])
def test_the_pair_is_the_cross_entropy(functions):
    torch.manual_seed(100)
    examples = [
        (torch.tensor([[2.0, 0.5, 0.1]]), torch.tensor([0]), "0.3168"),
        (torch.rand(4, 5), torch.tensor([4, 3, 3, 2]), "1.5230"),
    ]
    for input, target, printed in examples:
        pair = functions.nll_loss(functions.log_softmax(input, 1), target)
        modules = fused_ce.NLLLoss()(fused_ce.LogSoftmax(1)(input), target)
        exact = F.cross_entropy(input.double(), target)
        assert f"{pair.item():.4f}" == f"{modules.item():.4f}" == printed
        assert_as_accurate(fused_ce.cross_entropy(input, target), pair, exact)


@pytest.mark.not_on_simulator
@with_huge_pages
def test_a_large_gradient_comes_without_the_page_faults():
    input = torch.zeros(LARGE).requires_grad_()
    target = torch.arange(LARGE[0])
    says = fused_ce.explain_call(fused_ce.nll_loss, input, target)
    assert says == "stock: torch's kernel, writing into huge pages that are asked for"

    def both(function):
        return lambda: torch.autograd.grad(function(input, target), input)[0]

    of_stock, of_ours = page_faults(both(F.nll_loss)), page_faults(both(fused_ce.nll_loss))
    assert of_ours < min(of_stock / 4, 1024) or of_stock < 1024
    assert_same(both(fused_ce.nll_loss)(), both(F.nll_loss)())


def test_explain_call_says_why_stocks_function_takes_a_call(all_is_large):
    leaf = X.clone().requires_grad_()

    def says(*arguments, **options):
        return fused_ce.explain_call(fused_ce.nll_loss, *arguments, **options)

    assert says(leaf, Y).endswith("into huge pages that are asked for")
    assert "no gradient to write" in says(X, Y)
    assert "none of the usual ones" in says(leaf, Y, weight=torch.ones(5, requires_grad=True))
    assert "none of the usual ones" in says(leaf.t(), Y[:5])
    assert "overrides" in says(X.as_subclass(Named), Y)
    with torch.autocast("cpu"):
        assert "autocast" in says(leaf, Y)
    with torch.no_grad():
        assert "no gradient" in says(leaf, Y)
