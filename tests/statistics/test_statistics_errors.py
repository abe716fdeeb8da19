"""What cannot be right is refused in one sentence, by the functions and by the raw operators."""

import pytest
import torch
from support.grids import together

import fused_ce
from fused_ce import ops

INPUT, TARGET = torch.randn(3, 5), torch.tensor([0, 1, 2])
# name: (arguments, options, error, what it says)
CALLS = {
    "no tensor": (([1.0],), {}, TypeError, "expected input to be a tensor, got list"),
    "whole numbers": ((TARGET,), {}, TypeError, "logits of a floating type, got torch.int64"),
    "complex": ((INPUT.to(torch.complex64),), {}, TypeError, "got torch.complex64"),
    "scalar": ((torch.tensor(1.0),), {}, ValueError, "a dimension of classes, got a scalar"),
    "dim": ((INPUT,), {"dim": 2}, IndexError, "range of [-2, 1], but got 2"),
    "target of another shape": (
        (INPUT, TARGET[:2]),
        {},
        ValueError,
        "expected target of shape (3,), one index for each row of logits, got (2,)",
    ),
    "target over another dimension": ((INPUT, TARGET), {"dim": 0}, ValueError, "shape (5,)"),
    "probabilities": (
        (INPUT, INPUT),
        {},
        TypeError,
        "class indices (int64, int32, int16 or uint8)",
    ),
    "list of targets": ((INPUT, [0, 1, 2]), {}, TypeError, "target to be a tensor, got list"),
    "no temperature": ((INPUT,), {"temperature": 0.0}, ValueError, "temperature to be a positive"),
    "cold": ((INPUT,), {"temperature": -1.0}, ValueError, "got -1.0"),
    "nan": ((INPUT,), {"temperature": float("nan")}, ValueError, "got nan"),
    "hot": ((INPUT,), {"temperature": float("inf")}, ValueError, "got inf"),
    "text": ((INPUT,), {"temperature": "warm"}, ValueError, "got 'warm'"),
    "temperatures": ((INPUT,), {"temperature": torch.ones(2)}, ValueError, "tensor of shape (2,)"),
    "softcap": ((INPUT,), {"softcap": 0.0}, ValueError, "softcap to be a positive"),
    "negative softcap": ((INPUT,), {"softcap": -3.0}, ValueError, "or None, got -3.0"),
    "ignore_index": ((INPUT,), {"ignore_index": 0.5}, TypeError, "ignore_index to be an int"),
}


@together
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("function", [fused_ce.softmax_stats, fused_ce.explain_stats])
def test_the_error_says_what_was_expected_and_what_came(function, call):
    arguments, options, error, text = call
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    assert text in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("number", [2, torch.tensor(2.0), torch.tensor(2, dtype=torch.int32)])
def test_a_number_of_any_kind_is_a_temperature(number):
    stats = fused_ce.softmax_stats(INPUT, TARGET, temperature=number)
    assert torch.equal(stats.entropy, fused_ce.softmax_stats(INPUT, temperature=2.0).entropy)
    assert fused_ce.explain_stats(INPUT, TARGET, temperature=number).startswith("fused")


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_no_rows_have_empty_results(shape):
    input = torch.empty(shape, requires_grad=True)
    stats = fused_ce.softmax_stats(input, torch.empty(shape[:-1], dtype=torch.long), argmax=True)
    assert all(v.shape == shape[:-1] for v in stats)
    stats.entropy.sum().backward()
    assert input.grad.shape == shape


def test_scripting_is_refused_with_advice():
    with pytest.raises(RuntimeError, match=r"fused_ce\.softmax_stats cannot be scripted"):
        torch.jit.script(fused_ce.softmax_stats)


def forward(input=INPUT, target=TARGET, temperature=1.0, softcap=0.0):
    return ops.softmax_stats(input, target, temperature, softcap, -100, True, True, True)


def backward(input=INPUT, target=TARGET, grads=(None, None, None), **other):
    _, entropy, _, _, stats = forward()
    entropy, stats = other.get("entropy", entropy), other.get("stats", stats)
    return ops.softmax_stats_backward(input, target, entropy, stats, *grads, 1.0, 0.0, -100)


ROWS = torch.ones(3)
RAW = {
    "temperature": (lambda: forward(temperature=-1.0), "temperature must be from"),
    "softcap": (lambda: forward(softcap=-1.0), "softcap must be from"),
    "target's shape": (lambda: forward(target=TARGET[:2]), r"target must have the shape \[3\]"),
    "probabilities": (lambda: forward(target=INPUT), "target must hold class indices"),
    "statistics": (lambda: backward(stats=torch.ones(2, 4)), "stats must be what"),
    "entropy": (
        lambda: backward(entropy=ROWS[:1], grads=(None, ROWS, None)),
        r"entropy must have the shape \[3\]",
    ),
    "gradient's shape": (lambda: backward(grads=(ROWS[:2], None, None)), "must have the shape"),
    "gradient's type": (lambda: backward(grads=(TARGET, None, None)), "of a floating type"),
    "no target": (lambda: backward(target=None, grads=(ROWS, None, None)), "needs the target"),
}


@together
@pytest.mark.parametrize("call, text", RAW.values(), ids=RAW.keys())
def test_the_operators_prove_what_they_touch(call, text):
    with pytest.raises(RuntimeError, match=text):
        call()


def test_the_operator_that_writes_over_the_logits_reads_nothing_of_theirs():
    memory = torch.randn(4, 5)
    _, entropy, _, _, stats = forward(memory[:3])
    arguments = (memory[:3], TARGET, entropy, stats, memory[0, :3], None, None, 1.0, 0.0, -100)
    with pytest.raises(RuntimeError, match="share no memory"):
        ops.softmax_stats_backward_(*arguments)


@pytest.mark.parametrize("shape", [(3, 5), (3, 300), (2, 70, 9)])
def test_the_operator_that_writes_over_the_logits_writes_the_gradient(shape):
    input = torch.randn(shape)
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    _, entropy, lse, _, stats = forward(input, target)
    grads = [torch.randn_like(lse) for _ in range(3)]
    fresh = ops.softmax_stats_backward(input, target, entropy, stats, *grads, 1.0, 0.0, -100)
    written = ops.softmax_stats_backward_(input, target, entropy, stats, *grads, 1.0, 0.0, -100)
    assert written is input and torch.equal(input, fresh)


@pytest.mark.parametrize("strides", [(0,), (2,)])
def test_incoming_gradients_may_have_any_strides(strides):
    _, entropy, lse, _, stats = forward()
    grad = torch.randn(6).as_strided((3,), strides)
    found, expected = (
        ops.softmax_stats_backward(INPUT, TARGET, entropy, stats, g, g, g, 1.0, 0.0, -100)
        for g in (grad, grad.clone())
    )
    assert torch.equal(found, expected)
