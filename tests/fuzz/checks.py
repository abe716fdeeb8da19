"""What must hold of a case: ours is right where stock is, and what is refused writes nothing.

The rule is looser than the tests': among hundreds of thousands of cases some have a stock result
that is nearer to the exact one than its arithmetic deserves. What a fuzzer looks for is wrong by
more than a few of the last digits.
"""

import functools
import math

import torch
import torch.nn.functional as F
from support import divergence_reference, pointwise_reference, reference
from support.composed import composed, in_float64
from support.grids import MODES
from support.pointwise_reference import BCE, FOCAL, KL
from support.reference import Outcome, ulp

import fused_ce

LUCK = 4  # times stock's error, and as many ulp


def check_loss(input, target, options, mode, scale):
    ours = reference.ours(input, target, mode=mode, scale=scale, **options)
    stock = reference.stock(input, target, scale=scale, **options)
    exact = reference.float64(input, target, scale=scale, **options)
    for what, *three in zip(Outcome._fields, ours, stock, exact, strict=True):
        if three[0] is not None:
            _check_near(what, *three)


def check_options(input, target, options, mode, scale):
    if target.is_floating_point() and "dtype" in options:
        target = target.to(options["dtype"])
    ours = reference.ours(input, target, mode=mode, scale=scale, **options)
    with reference.one_thread():
        target = target if target.is_floating_point() else target.long()
        plain = reference.differentiate(composed, input, target, scale=scale, **options)
        target = target.double() if target.is_floating_point() else target
        wide = in_float64(options) | {"dtype": None}
        exact = reference.differentiate(composed, input.double(), target, scale=scale, **wide)
    # A scaled logit is rounded, and its exp makes a relative error of that.
    largest = 1.0
    if input.numel() and options["logit_scale"] != 1.0:
        largest = max(1.0, input.abs().amax().item() * abs(options["logit_scale"]))
    for what, *three in zip(Outcome._fields, ours, plain, exact, strict=True):
        if three[0] is not None:
            _check_near(what, *three, rounded=largest)


def check_pointwise(function, input, target, options, mode, scale):
    loss = {each.function.__name__: each for each in (BCE, FOCAL, KL)}[function]
    given = MODES[mode]
    said = fused_ce.explain_call(loss.function, input, target, **options, **given)
    assert said.startswith("fused"), said
    ours = pointwise_reference.differentiate(
        loss.function,
        *(input, target),
        in_place=given.get("inplace", False),
        scale=scale,
        **options,
        **given,
    )
    with reference.one_thread():
        stock = pointwise_reference.differentiate(loss.stock, input, target, scale=scale, **options)
        wide = input.double(), target.double()
        exact = pointwise_reference.differentiate(
            loss.exact, *wide, scale=scale, **in_float64(options)
        )
    # What is rounded before it is a power is wrong by as many times as much.
    rounded = max(1.0, options.get("gamma", 0.0))
    for what, *three in zip(("loss", "gradient"), ours, stock, exact, strict=True):
        _check_near(what, *three, rounded=rounded)


def check_head(input, linear_weight, linear_bias, target, options, chunks):
    tensors = input, linear_weight, linear_bias

    def run(loss, dtype=None, **more):
        layer = [None if t is None else t.to(dtype or t.dtype).clone() for t in tensors]
        leaves = [t.requires_grad_() for t in layer if t is not None]
        weight = options.get("weight")
        own = options if weight is None else options | {"weight": weight.to(dtype or weight.dtype)}
        same = target.to(dtype) if dtype and target.is_floating_point() else target
        value = loss(layer[0], layer[1], same, linear_bias=layer[2], **own, **more)
        return value.detach(), *torch.autograd.grad(value.sum(), leaves)

    def stock(input, linear_weight, target, linear_bias, **options):
        bias = None if linear_bias is None else linear_bias.flatten()
        logits = F.linear(input, linear_weight.flatten(0, -2), bias)
        shape = (len(input), *linear_weight.shape[:-1])
        target = target if target.is_floating_point() else target.long()
        return F.cross_entropy(logits.reshape(shape), target, **options)

    ours = run(fused_ce.linear_cross_entropy, **chunks)
    for what, *three in zip(
        ("loss", "input's gradient", "weight's gradient", "bias's gradient"),
        *(ours, run(stock), run(stock, torch.float64)),
        strict=False,
    ):
        _check_near(what, *three)


def check_divergence(input, teacher, options, mode, scale):
    if not input.numel():  # there are no kernels for it
        return
    fused = functools.partial(fused_ce.kl_div_with_logits, **MODES[mode])
    if mode == "no grad":
        with torch.no_grad():
            ours = Outcome(fused(input, teacher, **options))
    else:
        ours = divergence_reference.differentiate(fused, input, teacher, scale=scale, **options)
    with reference.one_thread():
        plain = divergence_reference.differentiate(
            divergence_reference.composed, input, teacher, scale=scale, **options
        )
        exact = divergence_reference.in_float64(input, teacher, scale=scale, **options)
    axis, temperature = min(1, input.dim() - 1), options["temperature"]
    # What an exp takes is rounded, and so is each gap between the two; a divergence is a difference
    # of two means of those, and a gradient one of two probabilities, or a probability times one.
    largest = max(1.0, *(t.abs().max().item() / temperature for t in (input, teacher)))
    gaps = (teacher.double() - input.double()) / temperature
    gap = max(1.0, (gaps.amax(axis) - gaps.amin(axis)).max().item())
    weights = options.get("sample_weight", torch.ones_like(gaps.select(axis, 0)))
    share, rows = weights.max().item(), weights.numel()
    if options["reduction"] == "mean":
        share /= options.get("denominator", weights.sum().item())
    if options["reduction"] == "none":
        rows = 1
    _check_near("loss", ours.loss, plain.loss, exact.loss, largest, share * rows * gap)
    if ours.grad_input is not None:
        difference = share * abs(scale) / temperature * (gap if options["reverse"] else 1.0)
        grads = (each.grad_input for each in (ours, plain, exact))
        _check_near("gradient", *grads, largest, difference)


def check_operator(operator, arguments):
    tensors = {k: v for k, v in arguments.items() if torch.is_tensor(v) and _has_memory(v)}
    before = {name: _bytes(tensor) for name, tensor in tensors.items()}
    try:
        operator(**arguments)
    except Exception:
        for name, tensor in tensors.items():
            assert torch.equal(before[name], _bytes(tensor)), f"{name} was written before the error"


def _has_memory(tensor):
    return tensor.layout is torch.strided and tensor.device.type == "cpu"


def _bytes(tensor):
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return whole.clone()


def _check_near(what, ours, stock, exact, rounded=1.0, difference=0.0):
    """Of a result of two steps, or of a difference, the error is that of what comes before it.

    `rounded` is the size of what is rounded before it is the argument of an exp, `difference` that
    of the numbers whose difference is taken.
    """
    assert ours.dtype == stock.dtype and ours.shape == stock.shape, what
    expected = exact.to(ours.dtype)
    finite = expected.isfinite()
    torch.testing.assert_close(ours[~finite], expected[~finite], equal_nan=True, msg=what)
    if not finite.any():
        return
    ours, stock, exact = (t[finite].double() for t in (ours, stock, exact))
    spacing = ulp(exact, expected.dtype)
    error, limit = ((t - exact).abs().max().item() for t in (ours, stock))
    limit = limit if math.isfinite(limit) else 0.0
    if rounded > 1.0:
        limit = max(limit, spacing * rounded)
    limit = max(limit, difference * torch.finfo(expected.dtype).eps)
    if expected.dtype == torch.float64:
        # Stock is itself the reference, of differences of numbers near 1 and of other products.
        limit = 1e-13 * max(1.0, exact.abs().max().item()) * rounded
    assert error <= LUCK * (limit + spacing), (
        f"the {what} is {error:.3e} off, stock's {limit:.3e}; an ulp is {spacing:.3e}"
    )


CHECKS = {
    "loss": check_loss,
    "options": check_options,
    "pointwise": check_pointwise,
    "divergence": check_divergence,
    "head": check_head,
    "operator": check_operator,
}
