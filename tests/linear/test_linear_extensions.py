"""The options that torch's loss does not have, in `linear_cross_entropy`: those of `cross_entropy`
on the layer's output, in any chunks."""

import pytest
import torch
import torch.nn.functional as F
from support.grids import cases_of, together
from support.reference import incoming_gradient

import fused_ce
from fused_ce.linear.plan import DEVICES

FEATURES, CLASSES = 6, 11
SHAPES = {"H": ((), ()), "NH": ((13,), ()), "BTH": ((3, 5), ()), "K1": ((7,), (3,))}
AXES = {
    "shape": tuple(SHAPES),
    "kind": ("index", "probability"),
    "reduction": ("mean", "sum", "none"),
    "chunks": (None, 4),
    "ahead": (True, False),
    "weighted": (False, True),
    "label_smoothing": (0.0, 0.1),
    "z_loss": (0.0, 0.05),
    "logit_scale": (1.0, 0.5, "learned"),
    "softcap": (None, 4.0),
    "sampled": (False, True, "learned"),
    "focal_gamma": (0.0, 2.0),
    "denominator": (None, 7.5, "learned"),
    "on_all_ignored": ("nan", "zero"),
    "bad": (False, True),
}


def is_valid(case):
    focal = case.get("focal_gamma", 0.0) > 0
    if focal and (case.get("kind") == "probability" or case.get("label_smoothing", 0.0) > 0):
        return False
    if case.get("bad") and case.get("kind") == "probability":
        return False
    return case.get("denominator") is None or case.get("reduction", "mean") == "mean"


@together
@pytest.mark.parametrize("case", cases_of(AXES, often=2, seldom=3, valid=is_valid))
def test_options_are_those_of_the_loss_on_the_layers_output(case):
    batch, positions = SHAPES[case["shape"]]
    double = torch.float64
    hidden = torch.randn(*batch, FEATURES, dtype=double)
    head = torch.randn(CLASSES, *positions, FEATURES, dtype=double)
    bias = torch.randn(CLASSES, *positions, dtype=double)
    shape = (*batch, *positions)
    if case["kind"] == "probability":
        target = torch.randn(*batch, CLASSES, *positions, dtype=double).softmax(len(batch))
    else:
        target = torch.randint(0, CLASSES, shape)
        if target.dim():
            target.view(-1)[1::3] = -100
            if case["bad"]:
                target.view(-1)[3] = CLASSES
    names = "reduction label_smoothing z_loss softcap focal_gamma on_all_ignored"
    options = {name: case[name] for name in names.split()}
    if case["bad"]:
        options["on_out_of_range"] = "nan"
    if case["weighted"]:
        options["weight"] = torch.rand(CLASSES, dtype=double) + 0.5
    leaves = [hidden, head, bias]
    learned = {}
    for name, value in (("logit_scale", 0.7), ("denominator", 5.0)):
        if case[name] == "learned":
            learned[name] = torch.tensor(value, dtype=double)
        else:
            options[name] = case[name]
    if case["sampled"]:
        weight = torch.rand(shape, dtype=double) + 0.5
        if weight.dim():
            weight.view(-1)[2::4] = 0
        (learned if case["sampled"] == "learned" else options)["sample_weight"] = weight

    def run(function):
        variables = [t.clone().requires_grad_() for t in (*leaves, *learned.values())]
        given = dict(zip(learned, variables[3:], strict=True))
        loss = function(*variables[:3], **given)
        gradients = torch.autograd.grad(loss, variables, incoming_gradient(loss, 0.3))
        return loss.detach(), *gradients

    def ours(hidden, head, bias, **given):
        return fused_ce.linear_cross_entropy(
            hidden,
            head,
            target,
            linear_bias=bias,
            chunk_size=case["chunks"],
            grad_in_forward=case["ahead"],
            **options,
            **given,
        )

    def unfused(hidden, head, bias, **given):
        rows = hidden.reshape(-1, FEATURES) if len(batch) > 1 else hidden
        logits = F.linear(rows, head.flatten(0, -2), bias.flatten())
        logits = logits.reshape(*rows.shape[:-1], CLASSES, *positions)
        flat = target.reshape(len(rows), *target.shape[len(batch) :]) if len(batch) > 1 else target
        both = {**options, **given}
        if "sample_weight" in both and len(batch) > 1:
            both["sample_weight"] = both["sample_weight"].reshape(len(rows), *positions)
        loss = fused_ce.cross_entropy(logits, flat, **both)
        return loss if loss.dim() == 0 else loss.reshape(shape)

    for found, expected in zip(run(ours), run(unfused), strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)


@together
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("denominator", [None, 0.0])
@pytest.mark.parametrize("rows", [0, 6])
def test_a_mean_of_no_rows_is_zero_where_that_is_asked_for(sampled, denominator, rows):
    hidden = torch.randn(rows, 4, requires_grad=True)
    head = torch.randn(5, 4, requires_grad=True)
    target = torch.full((rows,), 2 if sampled else -100)
    options = {"denominator": denominator, "on_all_ignored": "zero", "z_loss": 0.1}
    if sampled:
        options["sample_weight"] = torch.zeros(rows)
    loss = fused_ce.linear_cross_entropy(hidden, head, target, chunk_size=4, **options)
    assert loss == 0
    loss.backward()
    assert (hidden.grad == 0).all() and (head.grad == 0).all()


def test_a_float32_loss_of_half_types_keeps_its_digits():
    hidden, head = (
        torch.randn(40, 8, dtype=torch.bfloat16),
        torch.randn(30, 8, dtype=torch.bfloat16),
    )
    target = torch.randint(0, 30, (40,))
    loss = fused_ce.linear_cross_entropy(hidden, head, target, dtype=torch.float32)
    computed = DEVICES["cpu"].computed_dtype(torch.bfloat16)
    logits = F.linear(hidden.to(computed), head.to(computed))
    exact = F.cross_entropy(logits.double(), target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


def test_a_module_takes_options_at_each_call_and_learns_its_scale():
    loss = fused_ce.LinearCrossEntropyLoss(6, 11, z_loss=0.1)
    loss.logit_scale = torch.nn.Parameter(torch.tensor(0.5))
    hidden, target = torch.randn(7, 6), torch.randint(0, 11, (7,))
    weight = torch.rand(7)
    found = loss(hidden, target, sample_weight=weight, denominator=3)
    found.backward()
    assert "logit_scale" in dict(loss.named_parameters()) and loss.logit_scale.grad != 0
    expected = fused_ce.cross_entropy(
        F.linear(hidden, loss.linear.weight),
        target,
        logit_scale=0.5,
        z_loss=0.1,
        sample_weight=weight,
        denominator=3,
    )
    torch.testing.assert_close(found, expected)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sampleweight'"):
        loss(hidden, target, sampleweight=weight)
