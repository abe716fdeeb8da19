"""What cannot be right is refused in one sentence, by the function and by the raw operators."""

import functools

import pytest
import torch

import fused_ce
from fused_ce import ops

INPUT, TEACHER = torch.randn(3, 5), torch.randn(3, 5)
# name: (arguments, options, error, what it says)
CALLS = {
    "no tensor": (([1.0], TEACHER), {}, TypeError, "expected input to be a tensor, got list"),
    "no teacher": ((INPUT, None), {}, TypeError, "target_logits to be a tensor, got NoneType"),
    "whole numbers": ((INPUT, TEACHER.long()), {}, TypeError, "floating type, got torch.int64"),
    "complex": ((INPUT.to(torch.complex64), TEACHER), {}, TypeError, "got torch.complex64"),
    "scalar": ((torch.tensor(1.0),) * 2, {}, ValueError, "a dimension of classes, got a scalar"),
    "teacher of another shape": (
        (INPUT, TEACHER[:2]),
        {},
        ValueError,
        "expected target_logits of the input's shape (3, 5), got (2, 5)",
    ),
    "a teacher for all": ((INPUT, TEACHER[:1]), {}, ValueError, "got (1, 5)"),
    "no temperature": ((INPUT, TEACHER), {"temperature": 0.0}, ValueError, "to be a positive"),
    "cold": ((INPUT, TEACHER), {"temperature": -1.0}, ValueError, "got -1.0"),
    "nan": ((INPUT, TEACHER), {"temperature": float("nan")}, ValueError, "got nan"),
    "text": ((INPUT, TEACHER), {"temperature": "warm"}, ValueError, "got 'warm'"),
    "reduction": ((INPUT, TEACHER), {"reduction": "all"}, ValueError, "all is not a valid value"),
    "weights of another shape": (
        (INPUT, TEACHER),
        {"sample_weight": torch.ones(2)},
        ValueError,
        "sample_weight must have the shape (3,)",
    ),
    "a list of weights": (
        (INPUT, TEACHER),
        {"sample_weight": [1.0, 1.0, 1.0]},
        ValueError,
        "sample_weight must be a tensor",
    ),
    "denominators": (
        (INPUT, TEACHER),
        {"denominator": torch.ones(2)},
        ValueError,
        "denominator must be a number or a tensor of one element",
    ),
    "denominator of a sum": (
        (INPUT, TEACHER),
        {"denominator": 3.0, "reduction": "sum"},
        ValueError,
        "denominator is what 'mean' divides by",
    ),
}
FUNCTIONS = {
    "call": fused_ce.kl_div_with_logits,
    "explain": functools.partial(fused_ce.explain_call, fused_ce.kl_div_with_logits),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_the_error_says_what_was_expected_and_what_came(function, call):
    arguments, options, error, text = call
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    assert text in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("number", [2, torch.tensor(2.0), torch.tensor(2, dtype=torch.int32)])
def test_a_number_of_any_kind_is_a_temperature(number):
    found = fused_ce.kl_div_with_logits(INPUT, TEACHER, temperature=number)
    assert torch.equal(found, fused_ce.kl_div_with_logits(INPUT, TEACHER, temperature=2.0))


@pytest.mark.parametrize("shape", [(0, 5), (2, 5, 0)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_no_rows_have_empty_results(shape, reduction):
    input = torch.empty(shape, requires_grad=True)
    loss = fused_ce.kl_div_with_logits(input, torch.empty(shape), reduction=reduction)
    if reduction == "none":
        assert loss.shape == shape[:1] + shape[2:]
    else:
        assert loss.isnan() if reduction == "mean" else loss == 0
    loss.sum().backward()
    assert input.grad.shape == shape
    found = fused_ce.kl_div_with_logits(input, torch.empty(shape), denominator=2.0)
    assert found == 0


def test_scripting_is_refused_with_advice():
    with pytest.raises(RuntimeError, match=r"fused_ce\.kl_div_with_logits cannot be scripted"):
        torch.jit.script(fused_ce.kl_div_with_logits)


OVERLAPPING = torch.randn(5).expand(3, 5)
SHARED = torch.randn(4, 5)


@pytest.mark.parametrize("grad_in_forward", [True, False])
@pytest.mark.parametrize(
    "input, teacher, options, text",
    [
        (OVERLAPPING, TEACHER, {}, "more than one element of the written-to tensor"),
        (SHARED[:3], SHARED[1:], {}, "share no memory with the target"),
        (SHARED[:3], TEACHER, {"sample_weight": SHARED[0, :3]}, "with the sample_weight"),
    ],
    ids=["overlapping", "the teacher's", "the weights'"],
)
def test_logits_that_cannot_be_overwritten_are_refused(
    input, teacher, options, text, grad_in_forward
):
    before = input.clone()
    options = {**options, "inplace": True, "grad_in_forward": grad_in_forward}
    leaf = input.detach().requires_grad_()
    with pytest.raises(RuntimeError, match=text):
        fused_ce.kl_div_with_logits(leaf, teacher, **options)
    assert torch.equal(input, before)
    said = fused_ce.explain_call(fused_ce.kl_div_with_logits, leaf, teacher, **options)
    assert said.startswith("refused") and text in said


def forward(
    operator=ops.kl_div_with_logits_grad,
    input=INPUT,
    teacher=TEACHER,
    weights=None,
    denominator=None,
    temperature=1.0,
    reverse=False,
    reduction=1,
):
    return operator(input, teacher, weights, denominator, temperature, reverse, reduction)


def backward(operator=ops.kl_div_with_logits_backward, reverse=False, reduction=1, **other):
    loss, stats, totals, grad = forward(reverse=reverse, reduction=reduction)
    arguments = {
        "input": INPUT,
        "teacher": TEACHER,
        "stats": stats,
        "totals": totals,
        "grad_output": torch.ones_like(loss),
        "weights": None,
        "temperature": 1.0,
        "reverse": reverse,
        "reduction": reduction,
    }
    first = (other.pop("grad", grad),) if operator is ops.kl_div_with_logits_rescale_ else ()
    return operator(*first, *(arguments | other).values())


def rescale(**other):
    arguments = {"grad_output": torch.tensor(2.0)} | other
    return backward(ops.kl_div_with_logits_rescale_, **arguments)


ROWS = torch.ones(3)
RAW = {
    "temperature": (lambda: forward(temperature=-1.0), "temperature must be from"),
    "reduction": (lambda: forward(reduction=3), "reduction must be 0"),
    "indices": (lambda: forward(teacher=TEACHER[:, 0].long()), "of a floating type"),
    "teacher's shape": (lambda: forward(teacher=TEACHER[:2]), r"the input's shape \[3, 5\]"),
    "student's type": (lambda: forward(input=INPUT.long()), "input must be of a floating type"),
    "weights": (lambda: forward(weights=ROWS[:2]), r"sample_weight must have the shape \[3\]"),
    "whole weights": (lambda: forward(weights=ROWS.long()), "must be of a floating type"),
    "denominator": (lambda: forward(denominator=ROWS), "denominator must hold one value"),
    "denominator of a sum": (lambda: forward(denominator=ROWS[0], reduction=2), "goes with"),
    "statistics": (lambda: backward(stats=torch.ones(4, 4)), "stats must be what"),
    "statistics of the other direction": (
        lambda: backward(stats=torch.ones(4, 3), reverse=True),
        "stats must be what",
    ),
    "statistics' type": (lambda: backward(stats=torch.ones(4, 3).double()), "stats must be what"),
    "statistics of a wide teacher": (
        lambda: backward(teacher=TEACHER.double()),
        "stats must be what",
    ),
    "totals": (lambda: backward(totals=torch.ones(2).double()), "totals must be what"),
    "totals' type": (lambda: backward(totals=torch.ones(3)), "totals must be what"),
    "grad_output": (lambda: backward(grad_output=ROWS), "grad_output must hold one value"),
    "grad_output of rows": (
        lambda: backward(grad_output=ROWS[:2], reduction=0),
        r"grad_output must have the shape \[3\]",
    ),
    "gradient's shape": (lambda: rescale(grad=torch.ones(2, 5)), "grad must have the input's"),
    "gradient's type": (lambda: rescale(grad=INPUT.double()), "grad must have the input's type"),
    "gradient that overlaps": (lambda: rescale(grad=OVERLAPPING), "share memory"),
    "in place, overlapping": (
        lambda: forward(ops.kl_div_with_logits_grad_, input=OVERLAPPING),
        "more than one element",
    ),
    "in place, the teacher": (
        lambda: forward(ops.kl_div_with_logits_grad_, input=SHARED[:3], teacher=SHARED[1:]),
        "share no memory",
    ),
    "in place, the denominator": (
        lambda: forward(ops.kl_div_with_logits_grad_, input=SHARED[:3], denominator=SHARED[1, 1]),
        "share no memory",
    ),
    "in place, grad_output": (
        lambda: backward(
            ops.kl_div_with_logits_backward_, input=SHARED[:3], grad_output=SHARED[0, 0]
        ),
        "share no memory",
    ),
}


@pytest.mark.parametrize("call, text", RAW.values(), ids=RAW.keys())
def test_the_operators_prove_what_they_touch(call, text):
    with pytest.raises(RuntimeError, match=text):
        call()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (3, 300), (2, 70, 9)])
def test_the_operator_that_writes_over_the_logits_writes_the_gradient(shape, reverse):
    input, teacher = torch.randn(2, *shape)
    loss, *stats, _ = forward(input=input, teacher=teacher, reverse=reverse)
    rest = teacher, *stats, torch.full_like(loss, 3.0), None, 1.0, reverse, 1
    fresh = ops.kl_div_with_logits_backward(input, *rest)
    rescaled = ops.kl_div_with_logits_rescale_(torch.empty_like(input), input, *rest)
    written = ops.kl_div_with_logits_backward_(input, *rest)
    assert written is input and torch.equal(input, fresh) and torch.equal(rescaled, fresh)


@pytest.mark.parametrize("strides", [(0,), (2,)])
def test_incoming_gradients_may_have_any_strides(strides):
    grad = torch.randn(6).as_strided((3,), strides)
    found, expected = (backward(grad_output=g, reduction=0) for g in (grad, grad.clone()))
    assert torch.equal(found, expected)
