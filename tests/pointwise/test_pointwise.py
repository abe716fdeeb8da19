"""The pointwise losses and their gradients, in every type, layout and mode, beside stock's."""

import hashlib
import itertools
import warnings

import pytest
import torch
from support.grids import DTYPES, MODES, SHAPES, cases_of, covering, every_dtype, name_of, together
from support.layouts import GEOMETRIES, OVERLAPPING, gaps_are_untouched, is_dense
from support.pointwise_reference import (
    BCE,
    FOCAL,
    LOSSES,
    check,
    check_draws,
    differentiate,
    incoming,
    reductions_of,
    tensors_of,
)

import fused_ce

every_loss = pytest.mark.parametrize("loss", LOSSES, ids=[loss.name for loss in LOSSES])

# Of a weight, how its shape comes from the input's; a vector of the last size, a number, a vector
# along the second dimension, and the whole.
WEIGHTS = {
    "none": None,
    "last": lambda shape: shape[-1:],
    "number": lambda shape: (),
    "second": lambda shape: (shape[1], *(1,) * (len(shape) - 2)) if len(shape) > 1 else shape,
    "whole": lambda shape: shape,
}
AXES = {
    "loss": tuple(range(len(LOSSES))),
    # One shape of each kind; the kernels see no more of the others than another number of axes.
    "geometry": [(shape, layout) for shape, layout in GEOMETRIES if shape in ("C", "NC", "NCHW")],
    "target": ("same", "contiguous"),
    "dtype": DTYPES,
    # Less than a vector, some of them and a rest, and more than a block of 1024.
    "classes": (3, 37, 2053),
    "reduction": ("mean", "sum", "none", "batchmean"),
    "mode": tuple(MODES),
    "weight": tuple(WEIGHTS),
    "pos_weight": tuple(WEIGHTS),
}


def is_valid(case):
    """Of a case, or of a part of one."""
    is_weighed = any(case.get(name, "none") != "none" for name in ("weight", "pos_weight"))
    of_batch = case.get("reduction") == "batchmean"
    if is_weighed and of_batch:
        return False
    if "loss" in case:
        loss = LOSSES[case["loss"]]
        if (is_weighed and loss is not BCE) or (
            of_batch and "batchmean" not in reductions_of(loss)
        ):
            return False
    shared = "geometry" in case and case["geometry"][1] in OVERLAPPING
    return not (shared and case.get("mode") == "in place")


@together
@pytest.mark.parametrize("case", cases_of(AXES, often=2, seldom=3, rare=True, valid=is_valid))
def test_loss_and_gradient_are_as_accurate_as_stock(case):
    loss, (shape, layout) = LOSSES[case["loss"]], case["geometry"]
    classes = case["classes"]
    if classes == 2053 and shape == "NCHW":
        classes = 157  # else most of the time would go into a few cases
    shape = SHAPES[shape](classes)
    target_layout = layout if case["target"] == "same" else "contiguous"

    def draw():
        return tensors_of(loss, shape, layout, case["dtype"], target_layout)

    options = {"reduction": case["reduction"]}
    for name in ("weight", "pos_weight"):
        if WEIGHTS[case[name]]:
            options[name] = (torch.rand(WEIGHTS[case[name]](shape)) * 3).to(case["dtype"])
    if case["mode"] == "no grad":
        input, target = draw()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="reduction: 'mean'")
            value = loss.function(input, target, **loss.options, **options)
        graded, _ = differentiate(loss.function, input, target, **loss.options, **options)
        assert torch.equal(value, graded)
        return
    _, grad = check_draws(loss, draw, mode=MODES[case["mode"]], **options)
    input, _ = draw()
    if is_dense(input) and case["mode"] != "in place":
        assert grad.stride() == input.stride()


# Fewer, for the simulator, which is slow: dense, of a type's own alignment and not, and strided.
FEW = {
    "loss": AXES["loss"],
    "geometry": [
        ("NC", "contiguous"),
        ("NC", "odd offset"),
        ("NC", "transposed"),
        ("NC", "every second class"),
        ("NCHW", "channels_last"),
    ],
    "target": AXES["target"],
    "dtype": DTYPES,
    "classes": (25, 70, 1029),
    "reduction": AXES["reduction"],
    "mode": ("default", "recompute", "in place"),
    "weight": ("none", "last"),
    "pos_weight": ("none", "second"),
}


@together
@pytest.mark.on_simulator
@pytest.mark.parametrize(
    "case", [pytest.param(c, id=name_of(c)) for c in covering(FEW, 2, is_valid)]
)
def test_every_device_has_the_accuracy_of_stock(case):
    loss, (shape, layout) = LOSSES[case["loss"]], case["geometry"]
    shape = SHAPES[shape](min(case["classes"], 70 if shape == "NCHW" else 1029))
    target_layout = layout if case["target"] == "same" else "contiguous"
    input, target = tensors_of(loss, shape, layout, case["dtype"], target_layout)
    options = {"reduction": case["reduction"]}
    for name in ("weight", "pos_weight"):
        if WEIGHTS[case[name]]:
            options[name] = (torch.rand(WEIGHTS[case[name]](shape)) * 3).to(case["dtype"])
    # A GPU's exp of a float is an approximation.
    check(loss, input, target, mode=MODES[case["mode"]], luck=4.0, **options)


@together
@every_loss
@pytest.mark.parametrize("scale", [0.25, 3.0, 4096.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_grad_output_comes_before_the_rounding(loss, scale, dtype):
    input, target = tensors_of(loss, (64, 70), dtype=dtype)
    for mode in MODES.values():
        check(loss, input, target, mode=mode, scale=scale, reduction="mean")


def test_a_means_gradient_has_no_error_that_all_elements_share():
    def error_of_float(n):
        return abs(torch.tensor(1 / n).double().item() * n - 1)

    n = max(range(3996, 4096), key=error_of_float)
    assert error_of_float(n) > 5e-8
    y, x = torch.rand(n) + 0.5, torch.randn(n, requires_grad=True)
    (grad,) = torch.autograd.grad(fused_ce.kl_div(x, y, reduction="batchmean"), x)
    exact = y.double() / -n  # each element is rounded, to either side
    assert abs(((grad - exact) / exact).mean()) < 5e-9


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_infinite_slope_stays_one_whatever_a_mean_divides_by(sign):
    for n in range(1, 20):
        x, y = torch.zeros(n, requires_grad=True), torch.zeros(n)
        y[-1] = 1000.0  # whose exp is infinite
        value = fused_ce.kl_div(x, y, reduction="batchmean", log_target=True)
        (grad,) = torch.autograd.grad(sign * value, x)
        assert grad[-1] == -sign * torch.inf
        torch.testing.assert_close(grad[:-1], torch.full((n - 1,), -sign / n))


# A few ulp at most of each element, where stock's formulas lose all digits of some.
def test_a_confident_element_keeps_its_digits():
    x = torch.linspace(-90, 90, 3001)
    for y in (0.0, 1.0):
        target = torch.full_like(x, y)
        for loss in (BCE, FOCAL):
            options = loss.options | {"reduction": "none"}
            found = differentiate(loss.function, x, target, **options)
            wide = x.double()
            p, q = torch.sigmoid(wide), torch.sigmoid(-wide)
            u, slope = (p, p) if y == 0 else (q, -q)
            ce = torch.nn.functional.softplus(wide if y == 0 else -wide, threshold=1000)
            if loss is BCE:
                exact, exact_grad = ce, slope
            else:
                a = 0.75 if y == 0 else 0.25
                exact = a * u**2 * ce
                exact_grad = a * (u**2 * slope + 2 * u * (1 - 2 * y) * p * q * ce)
            seen = exact > 1e-37
            torch.testing.assert_close(found[0].double()[seen], exact[seen], rtol=1e-6, atol=0)
            exact_grad = exact_grad * incoming(found[0]).double()
            seen = exact_grad.abs() > 1e-37
            torch.testing.assert_close(found[1].double()[seen], exact_grad[seen], rtol=1e-6, atol=0)


def infinities(dtype):
    inf = torch.inf
    x = torch.tensor([-inf, -inf, inf, inf, torch.nan, torch.nan], dtype=dtype)
    return x, torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0], dtype=dtype)


@together
@every_dtype
@pytest.mark.parametrize("gamma", [None, 2.0, 0.5, 0.0, 3.0])
def test_infinite_logits_have_the_limit_and_a_nan_stays_one(dtype, gamma):
    x, y = infinities(dtype)
    x.requires_grad_()
    if gamma is None:
        value = fused_ce.binary_cross_entropy_with_logits(x, y, reduction="none")
        factor = 1.0, 1.0
    else:
        value = fused_ce.sigmoid_focal_loss(x, y, gamma=gamma)
        factor = 0.75, 0.25
    (grad,) = torch.autograd.grad(value.sum(), x)
    inf, nan = torch.inf, torch.nan
    expected = torch.tensor([0, inf, inf, 0, nan, nan], dtype=dtype)
    torch.testing.assert_close(value.detach(), expected, equal_nan=True)
    expected = torch.tensor([0, -factor[1], factor[0], 0, nan, nan], dtype=dtype)
    torch.testing.assert_close(grad, expected, equal_nan=True)


@pytest.mark.parametrize("log_target", [False, True])
@every_dtype
def test_special_probabilities_are_stocks(log_target, dtype):
    inf, nan = torch.inf, torch.nan
    values = torch.tensor([0.0, -0.5, inf, -inf, nan, 1.0, 0.3, 2.0, 6e-8], dtype=dtype)
    pairs = list(itertools.product(values.tolist()[3:], values.tolist()))
    x, y = torch.tensor(pairs, dtype=dtype).unbind(1)
    # An infinite probability is none: its loss is inf or nan.
    x, y = (t[y != inf] for t in (x, y))
    ours, theirs = (
        differentiate(f, x, y, reduction="none", log_target=log_target)
        for f in (fused_ce.kl_div, torch.nn.functional.kl_div)
    )
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)


@together
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_gamma_has_a_finite_gradient_that_is_the_compositions(gamma, dtype):
    input, target = tensors_of(FOCAL, (40, 70), dtype=dtype)
    check(FOCAL, input, target, gamma=gamma, reduction="sum", luck=1.5)
    sure = torch.tensor([-200.0, 200.0, -900.0, 900.0], dtype=dtype, requires_grad=True)
    value = fused_ce.sigmoid_focal_loss(
        sure, torch.tensor([0.0, 1, 0, 1], dtype=dtype), gamma=gamma
    )
    (grad,) = torch.autograd.grad(value.sum(), sure)
    assert not value.any() or dtype == torch.float64 or gamma == 0
    assert grad.isfinite().all() and (grad.abs() < 1e-30).all()


@pytest.mark.parametrize("gamma", [2.0, 3.0, 4.0])
def test_targets_outside_of_0_and_1_are_taken_as_stock_takes_them(gamma):
    input = torch.randn(40, 70)
    target = torch.randn(40, 70) * 3
    check(BCE, input, target, reduction="none")
    # The power's error is that of its logarithm, times gamma.
    check(FOCAL, input, target, gamma=gamma, reduction="none", luck=gamma)


@every_loss
def test_what_has_no_elements_is_as_in_stock(loss):
    for shape, reduction in itertools.product([(0,), (0, 4), (3, 0)], reductions_of(loss)):
        empty = torch.empty(shape)
        options = loss.options | {"reduction": reduction}
        ours, theirs = (
            differentiate(f, empty, empty, **options) for f in (loss.function, loss.stock)
        )
        for found, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(found, expected, equal_nan=True)


@every_loss
def test_one_number_may_have_no_dimension(loss):
    for reduction in reductions_of(loss):
        input, target = tensors_of(loss, (1,))
        options = loss.options | {"reduction": reduction}
        one, no = (differentiate(loss.function, input[i], target[i], **options) for i in (..., 0))
        assert no[0].dim() == no[1].dim() == 0
        assert torch.equal(one[0].reshape(()), no[0])
        assert reduction == "none" or torch.equal(one[1].reshape(()), no[1])


MIXED = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float16),
    (torch.float32, torch.bfloat16),
]


@together
@every_loss
@pytest.mark.parametrize("dtypes", MIXED, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_target_of_another_type_gives_a_loss_of_stocks_type(loss, dtypes, autocast):
    input, target = tensors_of(loss, (5, 70))
    input, target = input.to(dtypes[0]), target.to(dtypes[1])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        check(loss, input, target, reduction="sum")


@together
@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_a_loss_in_float32(loss, dtype):
    input, target = tensors_of(loss, (5, 70), dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        value, grad = check(loss, input, target, reduction="none")
    assert value.dtype == torch.float32 and grad.dtype == dtype


def test_a_float16_loss_of_many_elements_is_finite():
    input, target = torch.zeros(1000, 200, dtype=torch.float16), torch.ones(1000, 200).half()
    value = fused_ce.binary_cross_entropy_with_logits(input, target)
    torch.testing.assert_close(value, torch.tensor(2.0).log().half())


def test_weights_may_be_of_another_type():
    input, target = tensors_of(BCE, (5, 70))
    for dtype in DTYPES:
        for name in ("weight", "pos_weight"):
            check(BCE, input, target, reduction="sum", **{name: torch.rand(70).to(dtype)})


# Tiles of long runs, of short ones, and blocks of several tiles; threads may share them.
@together
@every_loss
@pytest.mark.parametrize("shape", [(40, 3000), (3000, 40), (120_000,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_are_the_same_for_every_number_of_threads(loss, shape, dtype):
    input, target = tensors_of(loss, shape, dtype=dtype)
    options = {"reduction": "sum"} | loss.options
    if loss is BCE:
        options["pos_weight"] = torch.rand(shape[-1:])
    hashes = set()
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        value, grad = differentiate(loss.function, input, target, **options)
        bits = value.float().numpy().tobytes() + grad.float().numpy().tobytes()
        hashes.add(hashlib.sha256(bits).hexdigest())
    assert len(hashes) == 1


@together
@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "layout", ["contiguous", "gap after each row", "every second class", "transposed"]
)
def test_in_place_the_gradient_lies_where_the_input_was(loss, dtype, layout):
    for reduction in reductions_of(loss):
        input, target = tensors_of(loss, (37, 70), layout, dtype)
        options = loss.options | {"reduction": reduction}
        _, expected = differentiate(loss.function, input, target, **options)
        leaf = input.requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = loss.function(leaf, target, **options, inplace=True)
        grad_output = incoming(value) if value.dim() else torch.ones_like(value)
        value.backward(grad_output)
        assert torch.equal(leaf.grad, expected) and torch.equal(leaf, expected)
        # A leaf whose elements leave holes gets a copy, which is autograd's own.
        assert leaf.grad.data_ptr() == leaf.data_ptr() or not is_dense(leaf)
        assert gaps_are_untouched(leaf.detach())


def test_a_sum_of_many_equal_losses_is_exact():
    input = torch.full((3, 1_000_003), 0.3)
    target = torch.zeros_like(input)
    value = fused_ce.binary_cross_entropy_with_logits(input, target, reduction="sum")
    one = torch.nn.functional.softplus(torch.tensor(0.3, dtype=torch.float64)).float().item()
    torch.testing.assert_close(value.item(), one * input.numel(), rtol=1e-7, atol=0)


def test_a_layout_that_no_dimension_merges_in_is_as_right():
    values = torch.randn(4, 5, 6, 7, 3)
    for order in [(0, 1, 2, 3, 4), (4, 2, 0, 3, 1), (3, 4, 1, 0, 2), (1, 3, 4, 2, 0)]:
        input = values.permute(order).contiguous().permute(*torch.tensor(order).argsort().tolist())
        target = torch.rand(4, 6, 5, 7, 3).transpose(1, 2)
        for weight in (torch.rand(5, 1, 7, 1), torch.rand(4, 1, 6, 1, 3)):
            check(BCE, input, target, reduction="sum", weight=weight, pos_weight=weight + 1)


def test_many_dimensions_are_left_to_stock():
    shape = (*(1,) * 22, 3, 4)
    input, target = torch.randn(shape), torch.rand(shape)
    check(BCE, input, target, reduction="sum")
    wide = input[None]
    said = fused_ce.explain_call(BCE.function, wide, target[None])
    assert said.startswith("stock")
    torch.testing.assert_close(BCE.function(wide, target[None]), BCE.stock(wide, target[None]))
