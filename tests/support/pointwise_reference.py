"""What the tests of the pointwise losses compare with: torch's functions and torchvision's form."""

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F

import fused_ce
from support.layouts import lay_out
from support.reference import (
    assert_as_accurate,
    assert_draws_as_accurate,
    one_thread,
    same_layout,
)


def composed_focal(inputs, targets, alpha=0.25, gamma=2.0, reduction="none"):
    """As torchvision composes it."""
    p = torch.sigmoid(inputs)
    ce = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    loss = ce * (1 - p_t) ** gamma
    if alpha >= 0:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    return _reduced(loss, reduction)


def _reduced(loss, reduction):
    return {"none": lambda x: x, "mean": torch.mean, "sum": torch.sum}[reduction](loss)


def _softplus(x):
    return F.softplus(x, threshold=700)  # whose derivative in torch is nan from exp's end on


def exact_bce(input, target, weight=1.0, reduction="mean", pos_weight=1.0):
    """Without a difference of nearly equal numbers, where stock's has one for a sure element."""
    loss = (1 - target) * _softplus(input) + pos_weight * target * _softplus(-input)
    return _reduced(weight * loss, reduction)


def exact_focal(inputs, targets, alpha=0.25, gamma=2.0, reduction="none"):
    """As exact_bce; and a power of a number that is 0 has a derivative of 0."""
    u = (1 - targets) * torch.sigmoid(inputs) + targets * torch.sigmoid(-inputs)
    power = torch.where(u > 0, u.clamp(min=1e-300) ** gamma, float(gamma == 0))
    a = alpha * targets + (1 - alpha) * (1 - targets) if alpha >= 0 else 1.0
    return _reduced(a * power * exact_bce(inputs, targets, reduction="none"), reduction)


class Loss(NamedTuple):
    """A function of ours, what it stands in for, and the arguments that make it this one."""

    function: object
    stock: object
    options: dict
    name: str
    exact: object  # in float64


BCE = Loss(
    fused_ce.binary_cross_entropy_with_logits,
    F.binary_cross_entropy_with_logits,
    {},
    "bce",
    exact_bce,
)
FOCAL = Loss(fused_ce.sigmoid_focal_loss, composed_focal, {}, "focal", exact_focal)
FOCAL_3 = FOCAL._replace(options={"gamma": 3.0, "alpha": -1}, name="focal_of_gamma_3")
FOCAL_HALF = FOCAL._replace(options={"gamma": 0.5, "alpha": 0.4}, name="focal_of_gamma_half")
KL = Loss(fused_ce.kl_div, F.kl_div, {}, "kl", F.kl_div)
KL_LOG = KL._replace(options={"log_target": True}, name="kl_of_logs")
LOSSES = (BCE, FOCAL, FOCAL_3, FOCAL_HALF, KL, KL_LOG)


def reductions_of(loss):
    more = ("batchmean",) if loss.function is fused_ce.kl_div else ()
    return ("mean", "sum", "none", *more)


def tensors_of(loss, shape, layout="contiguous", dtype=torch.float32, target_layout=None):
    """Inputs and targets that the loss is meant for; of both kinds of labels, a third soft."""
    if loss.function is fused_ce.kl_div:
        dim = min(1, len(shape) - 1)
        input = (torch.randn(shape) * 2).log_softmax(dim)
        target = (torch.randn(shape) * 2).softmax(dim)
        target[torch.rand(shape) < 0.1] = 0.0
        if loss.options.get("log_target"):
            target = (torch.randn(shape) * 2).log_softmax(dim)
    else:
        input = torch.randn(shape) * 4
        target = torch.randint(0, 2, shape).float()
        soft = torch.rand(shape) < 0.3
        target = torch.where(soft, torch.rand(shape), target)
    target_layout = target_layout or layout
    return lay_out(input.to(dtype), layout), lay_out(target.to(dtype), target_layout)


def incoming(value):
    """A multiple of 1/4 for each element, exact in every dtype."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-6, 7, value.shape, generator=generator).to(value.dtype) / 4


def differentiate(function, input, target, *, in_place=False, scale=1.0, **options):
    leaf = same_layout(input).requires_grad_()
    given = leaf * 1 if in_place else leaf
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="reduction: 'mean'")
        value = function(given, target, **options)
    grad_output = incoming(value) if value.dim() else torch.full_like(value, scale)
    (grad,) = torch.autograd.grad(value, leaf, grad_output)
    return value.detach(), grad


@one_thread()
def _measured(loss, input, target, mode, scale, options):
    """Ours, stock's and that in float64, of loss and gradient each."""
    options, mode = loss.options | options, mode or {}
    said = fused_ce.explain_call(loss.function, input, target, **options, **mode)
    assert said.startswith("fused"), said
    in_place = mode.get("inplace", False)
    found = differentiate(
        loss.function, input, target, in_place=in_place, scale=scale, **options, **mode
    )
    same = differentiate(loss.stock, input, target, scale=scale, **options)
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    exact = differentiate(loss.stock, input.double(), target.double(), scale=scale, **wide)
    return tuple(zip(found, same, exact, strict=True))


def check(loss, input, target, *, mode=None, scale=1.0, luck=1.0, **options):
    """Ours is no further from float64 than stock is, plus one ulp."""
    measured = _measured(loss, input, target, mode, scale, options)
    for name, values in zip(("loss", "gradient"), measured, strict=True):
        assert_as_accurate(*values, name, luck=luck)
    return tuple(values[0] for values in measured)


def check_draws(loss, draw, *, mode=None, **options):
    """As check, of what `draw()` returns, as often as assert_draws_as_accurate has it drawn."""
    return assert_draws_as_accurate(
        lambda: _measured(loss, *draw(), mode, 1.0, options), ("loss", "gradient")
    )
