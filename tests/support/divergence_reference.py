"""What the tests of the divergence compare with: the composition that people write."""

import torch
import torch.nn.functional as F

import fused_ce
from support.grids import MODES, SHAPES
from support.layouts import class_axis, lay_out
from support.reference import (
    Outcome,
    assert_as_accurate,
    assert_draws_as_accurate,
    incoming_gradient,
    one_thread,
    same_layout,
)


def composed(
    input,
    target_logits,
    *,
    temperature=1.0,
    reverse=False,
    reduction="mean",
    sample_weight=None,
    denominator=None,
):
    """In the wider type of the logits, or in float32 for the half types."""
    dim = class_axis(input)
    wide = torch.promote_types(input.dtype, target_logits.dtype)
    wide = torch.promote_types(wide, torch.float32)
    log_p, log_q = (
        (logits.to(wide) / temperature).log_softmax(dim) for logits in (input, target_logits)
    )
    pair = (log_q, log_p) if reverse else (log_p, log_q)
    losses = F.kl_div(*pair, reduction="none", log_target=True).sum(dim)
    if sample_weight is not None:
        losses = losses * sample_weight.to(wide)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if denominator is None:
        denominator = losses.numel() if sample_weight is None else sample_weight.to(wide).sum()
    return losses.sum() / denominator


def differentiate(function, input, target_logits, *, scale=1.0, **options):
    """The loss, and the student's gradient with the strides that autograd hands out."""
    leaf = same_layout(input).requires_grad_()
    loss = function(leaf, target_logits, **options)
    value = loss.detach().clone()
    return Outcome(value, *torch.autograd.grad(loss, leaf, incoming_gradient(loss, scale)))


def fused(input, target_logits, **options):
    """`fused_ce.kl_div_with_logits`; fails where the kernels do not take the call."""
    call = fused_ce.kl_div_with_logits, input, target_logits
    said = fused_ce.explain_call(*call, **options)
    assert said.startswith("fused"), said
    return fused_ce.kl_div_with_logits(input, target_logits, **options)


def ours(input, target_logits, *, mode="default", scale=1.0, **options):
    """The same in one of `MODES`, with its gradient."""
    options = {**options, **MODES[mode]}
    if mode == "no grad":
        with torch.no_grad():
            return Outcome(fused(same_layout(input), target_logits, **options))
    return differentiate(fused, input, target_logits, scale=scale, **options)


@one_thread()
def in_float64(input, target_logits, *, sample_weight=None, **options):
    """The composition on the same numbers in float64."""
    weight = None if sample_weight is None else sample_weight.double()
    return differentiate(
        composed, input.double(), target_logits.double(), sample_weight=weight, **options
    )


@one_thread()
def _measured(input, target_logits, mode, scale, options):
    """Ours, the composition's and that in float64, of loss and, where there is one, gradient."""
    found = ours(input, target_logits, mode=mode, scale=scale, **options)
    same = differentiate(composed, input, target_logits, scale=scale, **options)
    exact = in_float64(input, target_logits, scale=scale, **options)
    return tuple(each for each in zip(found, same, exact, strict=True) if each[0] is not None)


def check(input, target_logits, *, mode="default", scale=1.0, luck=1.0, **options):
    """Ours is no further from float64 than the composition is, plus one ulp."""
    measured = _measured(input, target_logits, mode, scale, options)
    for what, values in zip(Outcome._fields, measured, strict=False):
        assert_as_accurate(*values, what, luck=luck)
    return Outcome(*(values[0] for values in measured))


def check_draws(draw, *, mode="default", scale=1.0):
    """As check, of what `draw()` returns, as often as assert_draws_as_accurate has it drawn."""

    def measure():
        input, target_logits, options = draw()
        return _measured(input, target_logits, mode, scale, options)

    names = Outcome._fields[: 1 if mode == "no grad" else 2]
    return Outcome(*assert_draws_as_accurate(measure, names))


def logits_of(shape, layout, classes, dtype, scale=3.0):
    return lay_out((torch.randn(SHAPES[shape](classes)) * scale).to(dtype), layout)


def weights_of(input, dtype=torch.float32):
    """A weight for each row, in eighths, every third of them 0."""
    shape = [size for d, size in enumerate(input.shape) if d != class_axis(input)]
    weights = torch.randint(1, 16, shape).to(dtype) / 8
    if shape:
        weights.view(-1)[1::3] = 0
    return weights
