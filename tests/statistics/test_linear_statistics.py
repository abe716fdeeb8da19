"""The row statistics of a linear layer, in chunks: values, gradients, memory and errors."""

import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.grids import cases_of, together
from support.memory import MEGABYTE, ONE_PROGRAM, SLACK, Measurements, reset_peak, status
from support.reference import assert_as_accurate, one_thread
from support.statistics_reference import FIELDS, composed, incoming

import fused_ce
from fused_ce.linear.plan import DEVICES
from fused_ce.statistics import linear_operators

AXES = {
    "dtype": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "batch": ((17,), (3, 7), ()),
    "chunk_size": (None, 5, 1),
    "target": (None, torch.int64, torch.uint8),
    "bias": (False, True),
    "map": ((1.0, None), (0.7, 5.0)),
    "frozen": (None, "input", "weight"),
    "wanted": (FIELDS, ("log_prob",), ("entropy",), ("logsumexp", "entropy")),
}
FEATURES, CLASSES = 12, 70


def is_possible(case):
    return not (case.get("target", 0) is None and case.get("wanted") == ("log_prob",))


def tensors_of(case):
    def draw(*shape):
        return torch.randn(shape).to(case["dtype"])

    target = None
    if case["target"] is not None:
        target = torch.randint(0, CLASSES, case["batch"])
        if case["batch"]:
            target.view(-1)[1::3] = 255
        target = target.to(case["target"])
    bias = draw(CLASSES) if case["bias"] else None
    return draw(*case["batch"], FEATURES), draw(CLASSES, FEATURES), target, bias


def in_chunks(input, weight, target, bias, **options):
    said = fused_ce.explain_linear_stats(input, weight, target, linear_bias=bias, **options)
    assert said.startswith("fused"), said
    return fused_ce.linear_softmax_stats(
        input, weight, target, linear_bias=bias, argmax=True, **options
    )


def at_once(input, weight, target, bias, chunk_size=None, **options):
    return composed(F.linear(input, weight, bias), target, dim=-1, **options)


def outcome(function, case, tensors, options):
    input, weight, target, bias = tensors
    leaves = {"input": input, "weight": weight, "bias": bias}
    leaves = {
        name: t.detach().clone().requires_grad_(name != case["frozen"])
        for name, t in leaves.items()
        if t is not None
    }
    stats = function(leaves["input"], leaves["weight"], target, leaves.get("bias"), **options)
    found = dict(zip(FIELDS, stats, strict=False))
    names = [name for name in case["wanted"] if found[name] is not None]
    values = [found[name] for name in names]
    grads = [incoming(v, FIELDS.index(name)) for v, name in zip(values, names, strict=True)]
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    of = torch.autograd.grad(values, list(wanted.values()), grads)
    return stats, dict(zip(wanted, of, strict=True))


@together
@pytest.mark.parametrize("case", cases_of(AXES, often=2, seldom=3, valid=is_possible))
@one_thread()
def test_chunks_give_the_values_and_gradients_of_all_logits(case):
    tensors = tensors_of(case)
    temperature, softcap = case["map"]
    options = {"temperature": temperature, "softcap": softcap, "ignore_index": 255}
    stats, grads = outcome(in_chunks, case, tensors, options | {"chunk_size": case["chunk_size"]})
    same, same_grads = outcome(at_once, case, tensors, options)
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
    exact, exact_grads = outcome(at_once, case, wide, options)
    for name, *values in zip(FIELDS, stats, same, exact, strict=False):
        if values[1] is not None:
            assert values[0].shape == case["batch"]
            # The GEMMs of a few rows add in another order, and round in another place.
            assert_as_accurate(*values, name, luck=3.0)
    for name, grad in grads.items():
        assert_as_accurate(grad, same_grads[name], exact_grads[name], name, luck=3.0)


def problem(dtype=torch.float64, rows=7):
    input, weight = torch.randn(rows, 4, dtype=dtype), torch.randn(9, 4, dtype=dtype)
    return input.requires_grad_(), weight.requires_grad_(), torch.randint(0, 9, (rows,))


def total(stats):
    return sum((k + 1) * (v * v / 4 + v).sum() for k, v in enumerate(stats[:3]))


def test_second_derivatives_are_those_of_the_formula():
    input, weight, target = problem(rows=4)

    def function(x, w):
        return in_chunks(x, w, target, None, chunk_size=2)[:3]

    assert torch.autograd.gradcheck(function, (input, weight))
    assert torch.autograd.gradgradcheck(function, (input, weight))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.hessian])
def test_transforms_see_all_logits(transform):
    input, weight, target = (t.detach() for t in problem(rows=3))
    found, expected = (
        transform(lambda x, f=f: total(f(x, weight, target, None)))(input)
        for f in (lambda *a: fused_ce.linear_softmax_stats(*a[:3]), at_once)
    )
    torch.testing.assert_close(found, expected)


def test_a_compiled_call_is_one_graph():
    torch._dynamo.reset()
    input, weight, target = problem(torch.float32)

    def function(x, w):
        return total(fused_ce.linear_softmax_stats(x, w, target, chunk_size=3))

    run = torch.compile(function, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(run(input, weight), (input, weight))
    plain = torch.autograd.grad(function(input, weight), (input, weight))
    torch.testing.assert_close(found, plain)


def test_a_frozen_layer_costs_no_gemm_and_what_is_not_used_nothing(monkeypatch):
    calls = []
    operator = linear_operators.backward
    monkeypatch.setattr(linear_operators, "backward", lambda *a: (calls.append(a), operator(*a))[1])
    input, weight, target = problem()
    in_chunks(input, weight.detach(), target, None).log_prob.sum().backward()
    ((needs, of_log_prob, of_entropy, of_lse, *_),) = calls
    assert list(needs) == [True, False, False]
    assert of_log_prob is not None and of_entropy is None and of_lse is None


def test_chunks_change_no_bit_of_a_rows_statistics():
    # Integers: the GEMMs are exact, whatever their number of rows.
    input = torch.randint(-3, 4, (300, 8)).float()
    weight = torch.randint(-3, 4, (70, 8)).float() / 4
    target = torch.randint(0, 70, (300,))
    whole = in_chunks(input, weight, target, None)
    for size in (1, 7, 128):
        for value, same in zip(
            in_chunks(input, weight, target, None, chunk_size=size), whole, strict=True
        ):
            assert torch.equal(value, same)


def test_a_target_that_is_no_class_raises_before_the_first_chunk():
    input, weight, target = problem()
    target[-1] = 9
    with pytest.raises(IndexError, match="^Target 9 is out of bounds"):
        in_chunks(input, weight, target, None, chunk_size=2)


def test_autocast_computes_the_logits_in_its_type_or_a_faster_one():
    input, weight, target = problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = in_chunks(input, weight, target, None)
    computed = DEVICES["cpu"].computed_dtype(torch.bfloat16)
    expected = at_once(input.to(computed), weight.to(computed), target, None)
    torch.testing.assert_close(tuple(stats[:3]), tuple(expected[:3]), rtol=1e-5, atol=1e-5)
    grad = torch.autograd.grad(stats.entropy.sum(), weight)[0]
    assert grad.dtype == torch.float32


def test_no_rows_have_empty_results():
    stats = fused_ce.linear_softmax_stats(torch.empty(2, 0, 4), torch.randn(9, 4))
    assert stats.entropy.shape == (2, 0)


ERRORS = {
    "weight": ((torch.randn(3, 4), torch.randn(9, 5)), {}, ValueError, "shape (V, 4)"),
    "bias": (
        (torch.randn(3, 4), torch.randn(9, 4)),
        {"linear_bias": torch.randn(4)},
        ValueError,
        "linear_bias of shape (9,), got (4,)",
    ),
    "target": (
        (torch.randn(3, 4), torch.randn(9, 4), torch.zeros(2, dtype=torch.long)),
        {},
        ValueError,
        "target of shape (3,)",
    ),
    "temperature": (
        (torch.randn(3, 4), torch.randn(9, 4)),
        {"temperature": 0},
        ValueError,
        "temperature to be a positive number",
    ),
    "chunk": ((torch.randn(3, 4), torch.randn(9, 4)), {"chunk_size": 0}, ValueError, "chunk_size"),
    "input": ((torch.ones(3, 4).long(), torch.randn(9, 4)), {}, TypeError, "got torch.int64"),
}


@together
@pytest.mark.parametrize("call", ERRORS.values(), ids=ERRORS.keys())
def test_the_error_says_what_was_expected_and_what_came(call):
    arguments, options, error, text = call
    with pytest.raises(error) as caught:
        fused_ce.linear_softmax_stats(*arguments, **options)
    assert text in str(caught.value)


def test_a_fallback_is_told_once_and_by_its_own_name():
    input, weight, target = problem()
    with fused_ce.warn_on_fallback(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.func.grad(
            lambda x: fused_ce.linear_softmax_stats(x, weight.detach(), target).entropy.sum()
        )(input.detach())
    (warning,) = caught
    assert "this call of fused_ce.linear_softmax_stats:" in str(warning.message)


# 64 MiB of logits in float32, and gradients of 2 MiB.
ROWS, WIDTH, VOCABULARY = 1024, 32, 16384
BUDGET = 8 * MEGABYTE


@ONE_PROGRAM
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_stays_within_the_budget_and_the_gradients():
    measurements = Measurements(__file__)
    (extra,) = measurements.of("chunks")
    (all_logits,) = measurements.of("all")
    gradients = 4 * WIDTH * (ROWS + VOCABULARY)
    assert extra <= BUDGET + 2 * gradients + 64 * ROWS + SLACK
    assert all_logits > 3 * 4 * ROWS * VOCABULARY


def measure(name):
    def call(rows):
        input = torch.randn(rows, WIDTH, requires_grad=True)
        weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
        target = torch.randint(0, VOCABULARY, (rows,))
        before = reset_peak()
        if name == "chunks":
            stats = fused_ce.linear_softmax_stats(input, weight, target, max_chunk_bytes=BUDGET)
        else:
            stats = at_once(input, weight, target, None)
        (stats[0].sum() + stats[1].sum()).backward()
        return (status("VmHWM") - before,)

    call(8)
    return call(ROWS)
