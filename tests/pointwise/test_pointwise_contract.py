"""The pointwise losses are drop-ins: torch's own samples, its errors, warnings and modules."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.pointwise_reference import LOSSES, composed_focal, tensors_of

import fused_ce
from fused_ce import ops

bce, kl_div = fused_ce.binary_cross_entropy_with_logits, fused_ce.kl_div
focal = fused_ce.sigmoid_focal_loss
FUNCTIONS = {
    "nn.functional.binary_cross_entropy_with_logits": bce,
    "nn.functional.kl_div": kl_div,
}
MODULES = {"nn.BCEWithLogitsLoss": "BCEWithLogitsLoss", "nn.KLDivLoss": "KLDivLoss"}


def outcome(function, *args, **kwargs):
    """The result and the warnings, or the error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            return type(error), str(error).splitlines()[0]
    return result, [(w.category, str(w.message)) for w in caught]


def assert_same_outcome(ours, stock, *args, **kwargs):
    found, expected = outcome(ours, *args, **kwargs), outcome(stock, *args, **kwargs)
    assert found[1] == expected[1]
    if isinstance(expected[0], torch.Tensor):
        torch.testing.assert_close(found[0], expected[0], equal_nan=True)
    else:
        assert found[0] == expected[0]


# Seconds of import, which one worker alone has to wait for.
of_torchs_samples = pytest.mark.xdist_group("torch_samples")


@of_torchs_samples
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_torchs_samples_of_the_operators_give_the_same(name, dtype):
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (info for info in op_db if info.name == name)
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        leaves = [
            t.detach().clone().requires_grad_(t.requires_grad) for t in (sample.input, *sample.args)
        ]
        results = []
        for function in (FUNCTIONS[name], info.op):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = function(*leaves, **sample.kwargs)
            inputs = [leaf for leaf in leaves if leaf.requires_grad]
            results.append([value, *torch.autograd.grad(value.sum(), inputs)])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, equal_nan=True)


@of_torchs_samples
@pytest.mark.parametrize("name", MODULES)
def test_torchs_samples_of_the_modules_give_the_same(name):
    from torch.testing._internal.common_modules import module_db

    (info,) = (info for info in module_db if info.name == name)
    samples = info.module_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=True, training=True
    )
    assert samples
    for sample in samples:
        results = []
        for module in (getattr(fused_ce, MODULES[name]), info.module_cls):
            made = module(*sample.constructor_input.args, **sample.constructor_input.kwargs)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results.append(made(*sample.forward_input.args, **sample.forward_input.kwargs))
        torch.testing.assert_close(*results, equal_nan=True)


X, Y = torch.linspace(-2, 2, 12).view(3, 4), torch.linspace(0, 1, 12).view(3, 4)
GRAD = torch.ones(4, requires_grad=True)
# name: (arguments, options)
BCE_CALLS = {
    "sizes": ((X, Y[:2]), {}),
    "sizes that broadcast": ((X, Y[:1]), {}),
    "weight of more dimensions": ((X, Y, torch.ones(2, 3, 4)), {}),
    "weight of another size": ((X, Y, torch.ones(3)), {}),
    "pos_weight of another size": ((X, Y), {"pos_weight": torch.ones(3)}),
    "weight that requires grad": ((X, Y, GRAD), {}),
    "pos_weight that requires grad": ((X, Y), {"pos_weight": GRAD}),
    "whole numbers": ((X.long(), Y.long()), {}),
    "whole targets": ((X, Y.long()), {}),
    "targets of yes and no": ((X, Y > 0.5), {}),
    "weight of whole numbers": ((X, Y, torch.arange(4)), {}),
    "weight of yes and no": ((X, Y, torch.arange(4) > 1), {}),
    "complex": ((X.to(torch.complex64), Y), {}),
    "no reduction": ((X, Y), {"reduction": "most"}),
    "batchmean": ((X, Y), {"reduction": "batchmean"}),
    "elementwise_mean": ((X, Y), {"reduction": "elementwise_mean"}),
    "size_average": ((X, Y), {"size_average": False}),
    "reduce": ((X, Y), {"reduce": False, "reduction": "most"}),
    "no target": ((X, None), {}),
    "no input": ((None, Y), {}),
    "a list": ((X, [1.0]), {}),
    "float64 target": ((X, Y.double()), {}),
    "meta": ((X.to("meta"), Y), {}),
    "outside": ((X, Y * 3 - 1), {}),
}
KL_CALLS = {
    "broadcast": ((X, Y[:1]), {"reduction": "none"}),
    "broadcast input": ((X[:1], Y), {"reduction": "batchmean"}),
    "sizes": ((X, Y[:2]), {"reduction": "sum"}),
    "mean": ((X, Y), {}),
    "legacy mean": ((X, Y), {"size_average": True}),
    "legacy sum": ((X, Y), {"size_average": False, "reduction": "batchmean"}),
    "legacy none": ((X, Y), {"reduce": False, "reduction": "batchmean"}),
    "whole numbers": ((X.long(), Y.long()), {}),
    "whole targets": ((X, Y.long()), {"log_target": True}),
    "complex": ((X.to(torch.complex64), Y), {}),
    "no reduction": ((X, Y), {"reduction": "most"}),
    "elementwise_mean": ((X, Y), {"reduction": "elementwise_mean"}),
    "no target": ((X, None), {"reduction": "sum"}),
    "float64 target": ((X, Y.double()), {"reduction": "sum"}),
    "batchmean of one number": ((X[0, 0], Y[0, 0]), {"reduction": "batchmean"}),
    "negative": ((X, Y - 0.5), {"reduction": "none"}),
}


@pytest.mark.parametrize("call", BCE_CALLS.values(), ids=BCE_CALLS.keys())
def test_a_binary_cross_entropy_answers_as_stock_does(call):
    assert_same_outcome(bce, F.binary_cross_entropy_with_logits, *call[0], **call[1])


@pytest.mark.parametrize("call", KL_CALLS.values(), ids=KL_CALLS.keys())
def test_a_divergence_answers_as_stock_does(call):
    assert_same_outcome(kl_div, F.kl_div, *call[0], **call[1])


def test_a_warning_is_given_for_the_callers_line():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kl_div(X, Y)
    assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize("alpha", [-0.5, 1.5, float("nan"), -2])
def test_a_focal_loss_refuses_what_torchvision_refuses(alpha):
    with pytest.raises(ValueError, match="alpha must be in the range"):
        focal(X, Y, alpha=alpha)
    with pytest.raises(ValueError, match="Invalid Value for arg 'reduction': 'most"):
        focal(X, Y, reduction="most")
    with pytest.raises(ValueError, match="must be the same as input size"):
        focal(X, Y[:2])


@pytest.mark.parametrize("gamma", [-1.0, torch.tensor(2.0), 2])
def test_a_focal_loss_takes_what_torchvision_takes(gamma):
    found, expected = (f(X, Y, gamma=gamma, alpha=0.3) for f in (focal, composed_focal))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "ours, stock",
    [(bce, F.binary_cross_entropy_with_logits), (kl_div, F.kl_div), (focal, composed_focal)],
    ids=["bce", "kl", "focal"],
)
def test_arguments_have_stocks_names_order_and_defaults(ours, stock):
    stocks = inspect.signature(stock).parameters
    own = inspect.signature(ours).parameters
    assert list(own) == [*stocks, "grad_in_forward", "inplace"]
    for name, parameter in stocks.items():
        assert own[name].default == parameter.default and own[name].kind == parameter.kind


def test_modules_are_stocks_and_may_be_copied():
    weight, pos_weight = torch.rand(4), torch.rand(4)
    ours = fused_ce.BCEWithLogitsLoss(weight, pos_weight=pos_weight, inplace=True)
    stock = torch.nn.BCEWithLogitsLoss(weight, pos_weight=pos_weight)
    assert isinstance(ours, torch.nn.BCEWithLogitsLoss) and ours.inplace
    assert ours.state_dict().keys() == stock.state_dict().keys()
    for made in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(made(X, Y), stock(X, Y))
    divergence = fused_ce.KLDivLoss(reduction="sum", log_target=True)
    expected = torch.nn.KLDivLoss(reduction="sum", log_target=True)
    for made in (divergence, copy.deepcopy(divergence)):
        torch.testing.assert_close(made(X, Y), expected(X, Y))
    with pytest.raises(TypeError, match="unexpected keyword argument 'gamma'"):
        divergence(X, Y, gamma=2)


def test_scripting_is_refused_in_one_sentence():
    with pytest.raises(RuntimeError, match=r"fused_ce\.BCEWithLogitsLoss cannot be scripted"):
        torch.jit.script(fused_ce.BCEWithLogitsLoss())


def test_ours_in_the_place_of_torchs_own_reaches_stock(monkeypatch):
    leaf = X.clone().requires_grad_()
    calls = [
        lambda: F.binary_cross_entropy_with_logits(X, Y.double()),
        lambda: torch.func.grad(F.binary_cross_entropy_with_logits)(X, Y),
        lambda: torch.autograd.grad(
            F.binary_cross_entropy_with_logits(leaf, Y), leaf, create_graph=True
        )[0].detach(),
        lambda: F.kl_div(X, Y[:1], reduction="sum"),
        lambda: torch.func.grad(lambda x: F.kl_div(x, Y, reduction="batchmean"))(X),
        lambda: torch.nn.BCEWithLogitsLoss()(X, Y),
        lambda: torch.nn.KLDivLoss(reduction="sum")(X, Y),
        lambda: fused_ce.BCEWithLogitsLoss()(X, Y.double()),
    ]
    expected = [call() for call in calls]
    for function in (bce, kl_div):
        monkeypatch.setattr(F, function.__name__, function)
    for call, value in zip(calls, expected, strict=True):
        torch.testing.assert_close(call(), value)


def test_what_falls_back_says_so():
    with fused_ce.warn_on_fallback(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bce(X, Y.double())
        kl_div(X, Y[:1], reduction="sum")
        focal(X, Y.double())
    names = ["binary_cross_entropy_with_logits", "kl_div", "sigmoid_focal_loss"]
    assert len(caught) == 3
    for name, warning in zip(names, caught, strict=True):
        assert f"this call of fused_ce.{name}" in str(warning.message)
        assert warning.filename == __file__


def test_explain_call_names_the_moment_and_the_reason():
    leaf = X.clone().requires_grad_()

    def explain(*args, **kwargs):
        return fused_ce.explain_call(*args, **kwargs).rsplit(", ", 1)[0]

    assert explain(bce, X, Y) == "fused: no gradient"
    assert explain(bce, leaf, Y) == "fused: gradient in forward"
    assert explain(bce, leaf, Y, reduction="none") == "fused: recomputed in backward"
    assert explain(focal, leaf, Y, reduction="sum", inplace=True) == "fused: in place in forward"
    assert explain(kl_div, leaf, Y, reduction="batchmean") == "fused: gradient in forward"
    assert explain(bce, X, GRAD.expand(3, 4)) == "stock: the target requires grad"
    assert explain(bce, X.to_sparse(), Y) == "stock: the input is sparse"
    assert explain(bce, X, Y.double()) == "stock: one of input and target is in float64"
    overlapping = X[:1].expand(3, 4).requires_grad_()
    assert explain(bce, overlapping, Y, inplace=True).startswith("refused: unsupported operation")
    assert explain(focal, X, Y, alpha=7).startswith("refused: Invalid alpha")


# What nobody should say to the raw operators: each would read or write where it must not.

BIG = torch.randn(8, 8)
RAW = {
    "target's shape": (lambda: ops.pointwise(X, Y[:2], None, None, 0, 1, -1.0, 0.0), "shape"),
    "target's type": (lambda: ops.pointwise(X, Y.long(), None, None, 0, 1, -1.0, 0.0), "floating"),
    "weight's shape": (
        lambda: ops.pointwise(X, Y, torch.ones(3), None, 0, 1, -1.0, 0.0),
        "weight must expand",
    ),
    "weight's dimensions": (
        lambda: ops.pointwise(X, Y, torch.ones(1, 3, 4), None, 0, 1, -1.0, 0.0),
        "weight must expand",
    ),
    "pos_weight's type": (
        lambda: ops.pointwise(X, Y, None, torch.arange(4), 0, 1, -1.0, 0.0),
        "pos_weight must be of a floating",
    ),
    "pos_weight elsewhere": (
        lambda: ops.pointwise(X, Y, None, torch.ones(4), 2, 1, -1.0, 0.0),
        "pos_weight goes with",
    ),
    "loss": (lambda: ops.pointwise(X, Y, None, None, 4, 1, -1.0, 0.0), "no pointwise loss 4"),
    "negative loss": (lambda: ops.pointwise(X, Y, None, None, -1, 1, -1.0, 0.0), "no pointwise"),
    "reduction": (lambda: ops.pointwise(X, Y, None, None, 0, 9, -1.0, 0.0), "reduction must be"),
    "alpha": (lambda: ops.pointwise(X, Y, None, None, 1, 1, float("nan"), 0.0), "alpha must be"),
    "gamma": (lambda: ops.pointwise(X, Y, None, None, 1, 1, 0.5, -1.0), "gamma must be"),
    "infinite gamma": (
        lambda: ops.pointwise(X, Y, None, None, 1, 1, 0.5, float("inf")),
        "gamma must be",
    ),
    "input's type": (lambda: ops.pointwise(X.long(), Y, None, None, 0, 1, -1.0, 0.0), "floating"),
    "input's dimensions": (
        lambda: ops.pointwise(X.view(*(1,) * 24, 12), Y, None, None, 0, 1, -1.0, 0.0),
        "0 to 24 dimensions",
    ),
    "grad_output's shape": (
        lambda: ops.pointwise_backward(X, Y, None, None, Y[:2], 0, 0, -1.0, 0.0),
        "grad_output must have the shape",
    ),
    "grad_output's size": (
        lambda: ops.pointwise_backward(X, Y, None, None, Y, 0, 1, -1.0, 0.0),
        "grad_output must hold one value",
    ),
    "gradient's shape": (
        lambda: ops.pointwise_rescale_(BIG, torch.tensor(2.0), X, Y, None, None, 0, 1, -1.0, 0.0),
        "grad must have the input's shape",
    ),
    "gradient's type": (
        lambda: ops.pointwise_rescale_(
            X.double(), torch.tensor(2.0), X, Y, None, None, 0, 1, -1.0, 0.0
        ),
        "grad must have the input's type",
    ),
    "overlapping input": (
        lambda: ops.pointwise_grad_(X[:1].expand(3, 4), Y, None, None, 0, 1, -1.0, 0.0),
        "more than one element",
    ),
    "input over target": (
        lambda: ops.pointwise_grad_(BIG[:3], BIG[1:4], None, None, 0, 1, -1.0, 0.0),
        "share no memory with the target",
    ),
    "input over weight": (
        lambda: ops.pointwise_grad_(BIG[:3], BIG[4:7], BIG[2], None, 0, 1, -1.0, 0.0),
        "share no memory with the weight",
    ),
    "input over pos_weight": (
        lambda: ops.pointwise_grad_(BIG[:3], BIG[4:7], None, BIG[2], 0, 1, -1.0, 0.0),
        "share no memory with the pos_weight",
    ),
    "input over grad_output": (
        lambda: ops.pointwise_backward_(BIG[:3], BIG[4:7], None, None, BIG[0, 0], 0, 1, -1.0, 0.0),
        "share no memory with the incoming gradient",
    ),
}


@pytest.mark.parametrize("call, text", RAW.values(), ids=RAW.keys())
def test_the_operators_prove_what_they_touch(call, text):
    before = BIG.clone()
    with pytest.raises(RuntimeError, match=text):
        call()
    assert torch.equal(BIG, before)


def test_a_storage_that_was_taken_away_is_not_read():
    for position in range(4):
        tensors = [torch.rand(3, 4) for _ in range(4)]
        tensors[position].untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="not allocated yet"):
            ops.pointwise(*tensors, 0, 1, -1.0, 0.0)


@pytest.mark.parametrize("loss", LOSSES, ids=[loss.name for loss in LOSSES])
def test_incoming_gradients_may_have_any_strides(loss):
    input, target = tensors_of(loss, (5, 70))
    for strides in ((0, 0), (0, 1), (140, 2), (1, 5)):
        grad = torch.randn(700).as_strided((5, 70), strides)
        grads = []
        for given in (grad, grad.contiguous()):
            leaf = input.clone().requires_grad_()
            value = loss.function(leaf, target, **loss.options | {"reduction": "none"})
            grads.append(torch.autograd.grad(value, leaf, given)[0])
        assert torch.equal(*grads)
