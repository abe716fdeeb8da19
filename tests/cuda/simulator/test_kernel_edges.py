"""Guards what the CUDA kernels promise beside ordinary numbers: extreme logits, targets out of
range, ignored rows, how many launches a call is, how exact a mean of many rows is.

On the simulator, for one problem of each regime of csrc/cuda/kernels.cu.
"""

import pytest
import torch
from support.grids import DTYPES, every_dtype, together
from support.kernel_cases import (
    Case,
    assert_close,
    bits,
    check_backward,
    check_forward,
    forward,
    grad_like,
    make,
    reference,
)
from support.simulated import SimulatedDevice, SimulatorError, unwritten

REGIMES = {
    "tile": Case(10, rows=(40,)),
    "warp": Case(600),
    "block": Case(5000, dtype=torch.bfloat16),
    "cluster": Case(17001, rows=(3,)),
    "streaming": Case(17001, rows=(3,), clusters=False),
    "strided": Case(40, rows=(2, 24)),
    "kept": Case(20, rows=(2, 24)),
    "two reads": Case(70, dtype=torch.float64),
    "two reads by a block": Case(1200, layout="every second element"),
    "probabilities": Case(50, target=torch.float32),
}
INDEX_REGIMES = {name: case for name, case in REGIMES.items() if name != "probabilities"}

every_regime = pytest.mark.parametrize("case", REGIMES.values(), ids=REGIMES)
every_index_regime = pytest.mark.parametrize("case", INDEX_REGIMES.values(), ids=INDEX_REGIMES)


def rows_of(data):
    """The input as [rows, classes]."""
    return data.input.movedim(1, -1)


def run_both_ways(kernels, case, data):
    """Loss and gradient, found in forward and, from the statistics, in backward."""
    loss, stats, grad = forward(kernels, case, data, "gradient")
    again = grad_like(data)
    one = torch.ones(loss.shape, dtype=case.dtype)
    device = SimulatedDevice(has_clusters=case.clusters)
    kernels.backward(data.input, data.target, stats, one, again, device=device, **data.options)
    return loss, grad, again


# What a row may hold that is not an ordinary number, in two of its classes.
EXTREMES = {
    "masked": (-torch.inf, -torch.inf),
    "nan": (torch.nan, 0.0),
    "infinite": (torch.inf, 0.0),
    "both infinities": (torch.inf, -torch.inf),
    "large": (1e4, -1e4),
    "offset": (65504.0, 65472.0),
}


@together
@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@every_regime
def test_extreme_logits_agree_with_float64(kernels, case, extreme, smoothing):
    case = case._replace(reduction="none", smoothing=smoothing)
    data = make(case)
    rows = rows_of(data)
    rows[..., 3], rows[..., 7] = EXTREMES[extreme]
    expected_loss, expected_grad, *_ = reference(data)
    counted = torch.ones_like(expected_loss, dtype=torch.bool)
    if not data.target.is_floating_point():
        counted = data.target != data.options["ignore_index"]
        expected_grad.movedim(1, -1)[~counted] = 0  # nan in stock, where the logits are
    loss, grad, again = run_both_ways(kernels, case, data)
    finite = expected_loss[expected_loss.isfinite()].abs()
    largest = finite.max().item() if finite.numel() else 1.0
    assert_close(loss, expected_loss, case.dtype, largest, "loss")
    for value in (grad, again):
        assert_close(value, expected_grad, case.dtype, 1.0, "gradient")


@together
@pytest.mark.parametrize("value", [-torch.inf, torch.nan, torch.inf])
@every_regime
def test_row_of_nothing_but_one_extreme_is_nan(kernels, case, value):
    data = make(case._replace(reduction="none", ignored=False))
    rows_of(data)[0] = value
    loss, grad, again = run_both_ways(kernels, case._replace(reduction="none"), data)
    assert loss[0].isnan().all() and not loss[1].isnan().any()
    for gradient in (grad, again):
        assert gradient[0].isnan().all() and not gradient[1].isnan().any()


@together
@pytest.mark.parametrize("value", [-3e38, 1e30, 3e38])
@every_index_regime
def test_equal_logits_are_a_uniform_row_however_large(kernels, case, value):
    case = case._replace(reduction="none", ignored=False)
    data = make(case)
    data.input.fill_(value)
    loss, grad, again = run_both_ways(kernels, case, data)
    expected = torch.full_like(loss, case.classes, dtype=torch.float64).log()
    assert_close(loss, expected, case.dtype, 1.0, "loss")
    target = torch.nn.functional.one_hot(data.target, case.classes).movedim(-1, 1)
    for gradient in (grad, again):
        assert_close(gradient, 1 / case.classes - target.double(), case.dtype, 1.0, "gradient")


@together
@every_index_regime
def test_confident_row_keeps_its_digits(kernels, case):
    """Where the target leads by far, the loss is all in terms that a plain sum would lose."""
    case = case._replace(reduction="none", ignored=False)
    data = make(case)
    rows_of(data).clamp_(-2, 2)
    rows_of(data).scatter_(-1, data.target.long().unsqueeze(-1), 22.0)
    expected_loss, expected_grad, *_ = reference(data)
    loss, grad, again = run_both_ways(kernels, case, data)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=5e-6, atol=0)
    for gradient in (grad, again):
        rtol = max(1e-5, torch.finfo(case.dtype).eps)
        torch.testing.assert_close(gradient.double(), expected_grad, rtol=rtol, atol=0)


@together
@every_index_regime
def test_ignored_rows_are_zero_whatever_they_hold(kernels, case):
    case = case._replace(reduction="mean", smoothing=0.1)
    data = make(case)
    expected_loss, expected_grad, *_ = reference(data)
    ignored = data.target == data.options["ignore_index"]
    rows_of(data)[ignored] = torch.nan
    loss, grad, again = run_both_ways(kernels, case, data)
    assert_close(loss, expected_loss, case.dtype, 1.0, "loss")
    for gradient in (grad, again):
        assert (gradient.movedim(1, -1)[ignored] == 0).all()
        scale = expected_grad.abs().max().item()
        assert_close(gradient, expected_grad, case.dtype, scale, "gradient")


@together
@pytest.mark.parametrize("reduction, expected", [("mean", torch.nan), ("sum", 0.0), ("none", 0.0)])
@every_index_regime
def test_nothing_but_ignored_rows_is_nan_or_zero(kernels, case, reduction, expected):
    case = case._replace(reduction=reduction, smoothing=0.1)
    data = make(case)
    data.target.fill_(data.options["ignore_index"])
    loss, grad, again = run_both_ways(kernels, case, data)
    torch.testing.assert_close(loss, torch.full_like(loss, expected), equal_nan=True)
    assert (grad == 0).all() and (again == 0).all()


@together
@every_index_regime
def test_zero_total_weight_is_nan(kernels, case):
    for smoothing in (0.0, 0.1):
        changed = case._replace(smoothing=smoothing, weight=True, ignored=False)
        data = make(changed)
        data.options["weight"].zero_()
        loss, grad, again = run_both_ways(kernels, changed, data)
        assert loss.isnan().all() and grad.isnan().all() and again.isnan().all()


# In no class's place, though its neighbours are; the value is the one that PyTorch names.
@together
@pytest.mark.parametrize("bad", ["classes", -1, -(2**40)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@every_index_regime
def test_target_out_of_range_is_an_assertion(kernels, case, bad, reduction):
    data = make(case._replace(reduction=reduction, weight=True))
    data.target.flatten()[2] = case.classes if bad == "classes" else bad
    with pytest.raises(SimulatorError, match=r"Assertion `t >= 0 && t < n_classes' failed"):
        forward(kernels, case, data, "gradient")


@together
@every_index_regime
def test_backward_checks_targets_too(kernels, case):
    case = case._replace(reduction="sum", weight=True)
    data = make(case)
    _, stats, _ = forward(kernels, case, data, "statistics")
    data.target.flatten()[2] = case.classes
    grad = grad_like(data)
    device = SimulatedDevice(has_clusters=case.clusters)
    with pytest.raises(SimulatorError, match=r"Assertion `t >= 0 && t < n_classes' failed"):
        kernels.backward(
            data.input, data.target, stats, torch.ones(()), grad, device=device, **data.options
        )


@together
@pytest.mark.parametrize("ignored", [3, 10**12])
@every_index_regime
def test_any_index_may_be_the_ignored_one(kernels, case, ignored):
    data = make(case)
    data.target[data.target == data.options["ignore_index"]] = ignored
    data.options["ignore_index"] = ignored
    expected_loss, expected_grad, *_ = reference(data)
    loss, grad, again = run_both_ways(kernels, case, data)
    assert_close(loss, expected_loss, case.dtype, 1.0, "loss")
    for gradient in (grad, again):
        assert_close(gradient, expected_grad, case.dtype, 1.0, "gradient")


@together
@pytest.mark.parametrize("reduction, expected", [("mean", torch.nan), ("sum", 0.0), ("none", None)])
@pytest.mark.parametrize("target", [torch.int64, torch.float32])
def test_no_rows_is_nan_or_zero(kernels, reduction, expected, target):
    input = torch.empty(0, 7)
    targets = torch.empty((0,) if target == torch.int64 else (0, 7), dtype=target)
    loss, _ = kernels.forward(input, targets, reduction=reduction, keeps_stats=True)
    if expected is None:
        assert loss.shape == (0,)
    else:
        torch.testing.assert_close(loss, torch.tensor(expected), equal_nan=True)


# Beyond this many rows a single block would take too long to count them.
MANY_ROWS = 20000


@together
@every_regime
def test_small_call_is_two_launches_and_one(kernels, case):
    for reduction, most in (("none", 1), ("sum", 2), ("mean", 2)):
        changed = case._replace(reduction=reduction)
        data = make(changed)
        loss, stats, _ = forward(kernels, changed, data, "gradient")
        assert kernels.launches <= most
        grad, one = grad_like(data), torch.ones(loss.shape, dtype=case.dtype)
        kernels.backward(data.input, data.target, stats, one, grad, **data.options)
        assert kernels.launches == 1


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduction_of_many_rows_is_rounded_once(kernels, reduction, weight):
    """Groups of blocks add up apart here, and the counting takes several blocks."""
    case = Case(2, rows=(300_000,), dtype=torch.bfloat16, reduction=reduction, weight=weight)
    data = make(case)
    expected = reference(data)[0]
    wide, _ = kernels.forward(data.input, data.target, loss_dtype=torch.float32, **data.options)
    torch.testing.assert_close(wide.double(), expected, rtol=1e-6, atol=0)
    assert kernels.launches == 2 + (reduction == "mean")
    narrow, _ = kernels.forward(data.input, data.target, seed=3, **data.options)
    assert narrow == wide.bfloat16()


@together
@every_dtype
@every_regime
def test_grad_output_of_one_leaves_the_gradient_alone(kernels, case, dtype):
    data = make(case)
    _, stats, _ = forward(kernels, case, data, "statistics")
    device = SimulatedDevice(has_clusters=case.clusters)
    arguments = data.options | {"device": device, "unless_one": True}
    grad = grad_like(data)
    before = bits(grad)
    one = torch.tensor(1.0, dtype=dtype)
    kernels.backward(data.input, data.target, stats, one, grad, **arguments)
    assert bits(grad) == before
    half = torch.tensor(0.5, dtype=dtype)
    kernels.backward(data.input, data.target, stats, half, grad, **arguments)
    expected = reference(data, 0.5)[1]
    assert_close(grad, expected, case.dtype, expected.abs().max().item(), "gradient")


@together
@every_regime
def test_totals_are_kept_with_the_statistics(kernels, case):
    for reduction in ("none", "sum", "mean"):
        changed = case._replace(reduction=reduction, weight=True, smoothing=0.1)
        data = make(changed)
        _, (_, totals), _ = forward(kernels, changed, data, "statistics")
        weight = data.options["weight"].double()
        expected = 1.0
        if reduction == "mean" and data.target.is_floating_point():
            expected = data.input.numel() / case.classes
        elif reduction == "mean":
            counted = data.target[data.target != data.options["ignore_index"]]
            expected = weight[counted.long()].sum().item()
        assert totals[1].item() == pytest.approx(expected, rel=1e-6)
        if not data.target.is_floating_point():
            assert totals[0].item() == pytest.approx(weight.sum().item(), rel=1e-6)


@together
@every_dtype
@pytest.mark.parametrize("layout", ["dense", "strided", "many"])
def test_scale_multiplies_what_is_not_zero(kernels, dtype, layout):
    shape = (3, 20000) if layout == "many" else (3, 5, 7)
    values = torch.randn(shape).to(dtype)
    values[0, 0] = 0
    values[1, 1] = torch.nan
    tensor = torch.full((3, 5, 9), 7.0, dtype=dtype)[..., :7] if layout == "strided" else values
    tensor.copy_(values)
    for factor in (1.0, -0.375, torch.nan):
        before = tensor.clone()
        kernels.scale(tensor, torch.tensor(factor, dtype=dtype))
        expected = torch.where(before == 0, before, before * factor)
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0, equal_nan=True)
    if layout == "strided":
        gaps = tensor.as_strided((3, 5, 2), (45, 9, 1), 7)
        assert (gaps == 7).all()


@together
@every_regime
def test_losses_may_be_of_another_type(kernels, case):
    """Under autocast a half input has a float32 loss; a raw call may ask for any."""
    data = make(case._replace(reduction="none"))
    exact, _ = kernels.forward(data.input, data.target, loss_dtype=torch.float64, **data.options)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        loss, _ = kernels.forward(data.input, data.target, loss_dtype=dtype, **data.options)
        torch.testing.assert_close(loss, exact.to(dtype), rtol=0, atol=0)


def test_weight_of_all_classes_is_shared_out_by_smoothing(kernels):
    """Whichever regime takes it: the weights of all classes are a read of their own."""
    for case in REGIMES.values():
        weighted = case._replace(weight=True, smoothing=0.25)
        check_forward(kernels, weighted, "gradient")
        check_backward(kernels, weighted)


def test_unwritten_memory_is_noticed():
    """The comparisons above rest on it: what no kernel has written is far from every result."""
    for dtype in DTYPES:
        value = unwritten([4], dtype)
        with pytest.raises(AssertionError):
            assert_close(value, torch.zeros(4, dtype=torch.float64), dtype, 1.0, "nothing")
