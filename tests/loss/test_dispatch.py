"""When the kernels run and when stock does: fusion is neither lost nor forced.

Device contexts keep it on; subclasses that override torch's functions are handed torch's own;
autocast gives stock's dtypes; options that only stock serves go there, with stock's answer.
"""

import fractions

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.grids import KINDS, MODES, SHAPES, every_mode, together
from support.layouts import target_of
from support.reference import differentiate, same_layout
from torch.overrides import TorchFunctionMode

import fused_ce
from fused_ce import ops

ALL_OPTIONS = {
    "weight": torch.rand(5),
    "size_average": None,
    "ignore_index": -1,
    "reduce": None,
    "reduction": "sum",
    "label_smoothing": 0.1,
}


def problem():
    return torch.randn(6, 5, requires_grad=True), torch.randint(0, 5, (6,))


def is_fused(*args, **options):
    return fused_ce.explain(*args, **options).startswith("fused: ")


@together
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@every_mode
def test_ordinary_call_is_fused(shape, kind, mode):
    input = torch.randn(SHAPES[shape](5), requires_grad=mode != "no grad")
    target = target_of(kind, input.shape, torch.float32)
    for options in ({}, {"reduction": "none"}, {"label_smoothing": 0.1}, ALL_OPTIONS):
        assert is_fused(input, target, **options, **MODES[mode])


NUMBERS = {
    "ignore_index": (
        *(np.int64(3), np.int16(3), np.uint8(3), np.array(3)),
        *(torch.tensor(3), torch.tensor([3], dtype=torch.uint8)),
    ),
    "label_smoothing": (
        *(np.float64(0.1), np.float32(0.1), np.float16(0.1), 0, np.int64(1), True),
        *(torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64), torch.tensor(1)),
    ),
}


@together
@pytest.mark.parametrize(
    "option, value", [(option, value) for option, values in NUMBERS.items() for value in values]
)
def test_numbers_that_stock_takes_keep_fusion(option, value):
    input, target = problem()
    options = {option: value}
    assert is_fused(input, target, **options)
    expected = F.cross_entropy(input, target, **options)
    torch.testing.assert_close(fused_ce.cross_entropy(input, target, **options), expected)
    head = torch.randn(5, 5)
    assert fused_ce.explain_linear(input, head, target, **options).startswith("fused: ")
    loss = fused_ce.linear_cross_entropy(input, head, target, **options)
    torch.testing.assert_close(loss, F.cross_entropy(input @ head.T, target, **options))


@together
@pytest.mark.parametrize(
    "options",
    [
        {"ignore_index": True},
        {"ignore_index": 3.0},
        {"ignore_index": 2**70},
        {"ignore_index": torch.tensor(3.0)},
        {"ignore_index": torch.tensor(True)},
        {"ignore_index": torch.tensor([1, 2])},
        {"label_smoothing": torch.tensor([0.1])},
        {"label_smoothing": torch.tensor(0.1, requires_grad=True)},
        {"label_smoothing": torch.tensor(0.1j)},
        {"label_smoothing": fractions.Fraction(1, 10)},
        {"label_smoothing": -(10**400)},
    ],
    ids=str,
)
def test_numbers_that_stock_refuses_are_refused(options):
    input, target = problem()
    with pytest.raises(Exception) as expected:  # noqa: PT011
        F.cross_entropy(input, target, **options)
    with pytest.raises(type(expected.value)) as raised:
        fused_ce.cross_entropy(input, target, **options)
    assert str(raised.value).splitlines()[0] == str(expected.value).splitlines()[0]
    # Which of the arguments it would be is stock's to say: it takes some that are new to us.
    said = "stock: the kernels do not know these arguments, which stock takes or refuses"
    assert fused_ce.explain(input, target, **options) == said
    assert fused_ce.explain_linear(input, torch.randn(5, 5), target, **options) == said


def test_stock_has_a_reason():
    input, target = problem()
    reasons = {
        fused_ce.explain(input.to_sparse(), target),
        fused_ce.explain(input.to("meta"), target.to("meta")),
        fused_ce.explain(input, target, reduction="avg"),
        fused_ce.explain(input, target[:3]),
    }
    for text in reasons:
        assert text.startswith("stock: ")
        assert len(text) > len("stock: ")


@pytest.mark.parametrize(
    "kind, built, runs, reason",
    [
        ("xpu", True, True, "no kernels for xpu"),
        ("cuda", False, True, "no kernels for cuda in this build"),
        ("cuda", True, False, "no kernels for this GPU's architecture"),
        ("cuda", True, True, None),
    ],
)
def test_device_without_kernels_goes_to_stock_with_a_reason(kind, built, runs, reason, monkeypatch):
    asked = []
    monkeypatch.setattr(ops, "has_cuda_kernels", built)
    monkeypatch.setattr(ops, "has_cuda_code", lambda index: asked.append(index) or runs)
    monkeypatch.setattr(ops, "_cuda_devices", {})
    for _ in range(2):
        said = ops.lacking(kind, 1)
        assert said is None if reason is None else reason in said
    assert asked == ([1] if kind == "cuda" and built else [])  # once for each device


def test_every_function_can_be_asked_how_it_takes_a_call():
    input, target = problem()
    hidden, head = torch.randn(6, 3), torch.randn(5, 3)
    calls = {
        fused_ce.cross_entropy: (input, target),
        fused_ce.linear_cross_entropy: (hidden, head, target),
        fused_ce.softmax_stats: (input, target),
        fused_ce.linear_softmax_stats: (hidden, head, target),
    }
    for function, arguments in calls.items():
        assert fused_ce.explain_call(function, *arguments).startswith("fused: ")
    sparse = fused_ce.explain_call(fused_ce.cross_entropy, input.to_sparse(), target=target)
    assert sparse == "stock: the logits are sparse"
    for other in (F.cross_entropy, [], None):
        with pytest.raises(TypeError, match="expected a function of fused_ce"):
            fused_ce.explain_call(other, input, target)


def test_explaining_computes_and_writes_nothing():
    input, target = problem()
    before = input.detach().clone()
    assert is_fused(input, target, inplace=True)
    assert torch.equal(input.detach(), before)
    # Nor does it look at the values: a target out of range is the call's affair.
    assert is_fused(input, torch.full((6,), 99))


def test_default_device_keeps_fusion_on():
    input, target = problem()
    expected = differentiate(F.cross_entropy, input, target)
    with torch.device("cpu"):
        assert is_fused(input, target)
        torch.testing.assert_close(differentiate(fused_ce.cross_entropy, input, target), expected)
    torch.set_default_device("cpu")
    try:
        assert is_fused(input, target)
        torch.testing.assert_close(differentiate(fused_ce.cross_entropy, input, target), expected)
    finally:
        torch.set_default_device(None)
    with torch.device("meta"):  # where new tensors go says nothing about these
        torch.testing.assert_close(fused_ce.cross_entropy(input, target), expected.loss)


def test_parameters_and_buffers_keep_fusion_on():
    input, target = problem()
    parameter = torch.nn.Parameter(input.detach().clone())
    assert is_fused(parameter, target)
    fused_ce.cross_entropy(parameter, target).backward()
    torch.testing.assert_close(
        parameter.grad, differentiate(F.cross_entropy, input, target).grad_input
    )


class Plain(torch.Tensor):
    """A subclass that only inherits."""


@pytest.mark.parametrize("which", range(3))
def test_a_subclass_that_only_inherits_keeps_fusion_on(which):
    values = [torch.randn(6, 5), torch.randint(0, 5, (6,)), torch.rand(5)]
    values[which] = values[which].as_subclass(Plain)
    assert fused_ce.explain(*values).startswith("fused")


class Recorder(torch.Tensor):
    """A subclass that writes down which functions it was handed."""

    calls = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.calls.append((function, kwargs))
        return super().__torch_function__(function, types, args, kwargs or {})


@together
@pytest.mark.parametrize("which", ["input", "target", "weight"])
@pytest.mark.parametrize("extra", [{}, {"inplace": True}, {"grad_in_forward": False}], ids=str)
def test_subclass_is_handed_the_function_of_torch(which, extra):
    values = {"input": torch.randn(6, 5), "target": torch.tensor([0, 1, 2, 3, 4, -1])}
    values |= {"weight": torch.rand(5)}
    expected = F.cross_entropy(**(ALL_OPTIONS | values))
    values[which] = values[which].as_subclass(Recorder)
    Recorder.calls = []
    loss = fused_ce.cross_entropy(**(ALL_OPTIONS | values), **extra)
    handed = [kwargs for function, kwargs in Recorder.calls if function is F.cross_entropy]
    assert len(handed) == 1
    assert not {"inplace", "grad_in_forward"} & set(handed[0])
    assert all(function is not fused_ce.cross_entropy for function, _ in Recorder.calls)
    assert isinstance(loss, Recorder)
    torch.testing.assert_close(loss.as_subclass(torch.Tensor), expected)
    assert not is_fused(**(ALL_OPTIONS | values), **extra)


def test_function_mode_sees_our_function():
    class Seen(TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.functions = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.functions.append(function)
            return function(*args, **(kwargs or {}))

    input, target = problem()
    expected = F.cross_entropy(input, target)
    with Seen() as mode:
        loss = fused_ce.cross_entropy(input, target)
    assert fused_ce.cross_entropy in mode.functions
    torch.testing.assert_close(loss, expected)


@together
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32, "probability"], ids=str)
@every_mode
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_the_dtypes_and_numbers_of_stock(
    autocast, weighted, mode, kind, dtype, device
):
    input = torch.randn(6, 5).to(dtype)
    target = target_of(kind, input.shape, dtype)
    plain = target.long() if kind == torch.int32 else target
    options = {"weight": torch.rand(5).to(dtype)} if weighted else {}
    results = []
    for function, index, extra in (
        (fused_ce.cross_entropy, target, MODES[mode]),
        (F.cross_entropy, plain, {}),
    ):
        leaf = same_layout(input).requires_grad_(mode != "no grad")
        with torch.autocast(device, dtype=autocast):
            loss = function(leaf, index, **options, **extra)
        if leaf.requires_grad:
            loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert results[0][0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Gradients of the half types are rounded to them, in stock from a rounded softmax.
    rounding = torch.finfo(dtype).eps
    tolerance = {"rtol": max(rounding, 1e-6), "atol": max(rounding, 1e-6)}
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    if mode != "no grad":
        torch.testing.assert_close(results[0][1], results[1][1], **tolerance)


def test_autocast_under_a_model_follows_stock():
    # The logits of a linear layer are bfloat16 there, and its weights' gradients float.
    x, y = torch.randn(8, 6), torch.randint(0, 5, (8,))
    grads = []
    for function, extra in (
        (fused_ce.cross_entropy, {}),
        (fused_ce.cross_entropy, {"inplace": True}),
        (F.cross_entropy, {}),
    ):
        torch.manual_seed(1)
        layer = torch.nn.Linear(6, 5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = layer(x)
            assert logits.dtype == torch.bfloat16
            loss = function(logits, y, **extra)
        assert loss.dtype == torch.float32
        loss.backward()
        grads.append([p.grad for p in layer.parameters()])
    torch.testing.assert_close(grads[0], grads[2], rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(grads[1], grads[2], rtol=2e-2, atol=2e-3)


def test_deterministic_algorithms_are_taken():
    input, target = problem()
    expected = differentiate(F.cross_entropy, input, target)
    torch.use_deterministic_algorithms(True)
    try:
        result = differentiate(fused_ce.cross_entropy, input, target)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(result, expected)
