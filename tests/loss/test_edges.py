"""Values at the edge: nothing to average, nothing finite, nothing counted.

One test for each row of the contract's table of values that is not an error, against stock where
stock is right, and against the definition where ours differs and the README says so: ignored rows
are never read, integers of every width are indices, half types are summed in float.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from support.devices import every_device, on_cpu
from support.grids import (
    DIFFERENTIATING,
    DTYPES,
    KINDS,
    MODES,
    REDUCTIONS,
    SHAPES,
    crossed,
    every_differentiating_mode,
    every_dtype,
    every_mode,
    every_reduction,
    together,
)
from support.layouts import target_of
from support.reference import (
    assert_as_accurate,
    check_against_stock,
    differentiate,
    float64,
    ours,
    stock,
)

import fused_ce

pytestmark = every_device

NAN, INF = math.nan, math.inf


@together
@crossed(shape=SHAPES, smoothing=(0.0, 0.1), reduction=REDUCTIONS, dtype=DTYPES, mode=MODES)
def test_all_rows_ignored_give_the_value_of_stock(shape, smoothing, reduction, dtype, mode):
    # nan, 0, or zeros; and a gradient of zeros, also from the nan.
    input = torch.randn(SHAPES[shape](5)).to(dtype)
    target = torch.full(input.shape[:1] + input.shape[2:] if input.dim() > 1 else (), -100)
    for weight, scale in ((None, 1.0), (torch.rand(5).to(dtype), 0.25)):
        result = check_against_stock(
            input,
            target,
            mode=mode,
            scale=scale,
            reduction=reduction,
            weight=weight,
            label_smoothing=smoothing,
        )
        value = torch.full_like(result.loss, NAN if reduction == "mean" else 0.0)
        torch.testing.assert_close(result.loss, value, rtol=0, atol=0, equal_nan=True)
        if result.grad_input is not None:
            assert (result.grad_input == 0).all()


# No rows, with every rank; and rows without positions.
EMPTY = ((0, 5), (0, 5, 3), (0, 5, 3, 4), (0, 5, 1, 2, 2), (2, 5, 0))


@together
@crossed(shape=EMPTY, reduction=REDUCTIONS, dtype=DTYPES, mode=MODES)
def test_empty_batch_gives_the_value_of_stock(shape, reduction, dtype, mode):
    for kind in KINDS:
        check_against_stock(
            torch.randn(shape).to(dtype),
            target_of(kind, shape, dtype),
            mode=mode,
            reduction=reduction,
            target_grad=kind == "probability",
            label_smoothing=0.1,
        )


@together
@every_mode
@every_reduction
def test_no_classes_and_nothing_counted_is_no_error(reduction, mode):
    input, target = torch.randn(2, 0), torch.full((2,), -100)
    expected = differentiate(F.cross_entropy, input, target, reduction=reduction)
    options = {"reduction": reduction, **MODES[mode]}
    result = differentiate(fused_ce.cross_entropy, input, target, **options)
    torch.testing.assert_close(result, expected, equal_nan=True)


@together
@crossed(smoothing=(0.0, 0.1), reduction=REDUCTIONS, dtype=DTYPES, mode=MODES)
@pytest.mark.on_simulator
def test_total_weight_of_zero_gives_the_value_of_stock(smoothing, reduction, dtype, mode):
    # The counted rows weigh nothing: 0 / 0, and the gradient is nan as well; sums are just 0.
    input, target = torch.randn(4, 5).to(dtype), torch.tensor([0, 1, 1, 0])
    weight = torch.tensor([0, 0, 1, 2, 3]).to(dtype)
    check_against_stock(
        input,
        target,
        mode=mode,
        reduction=reduction,
        weight=weight,
        label_smoothing=smoothing,
    )
    check_against_stock(
        input, target, mode=mode, reduction=reduction, weight=torch.zeros_like(weight)
    )


@together
@every_mode
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", [torch.int64, "probability"], ids=str)
def test_weighted_mean_divides_by_the_counted_weight(kind, smoothing, ignored, mode):
    # By the weight of the targets that are counted; for probabilities by the number of rows.
    input, weight = torch.randn(6, 5, 4, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    target = target_of(kind, input.shape, torch.float64, ignore_index=-100 if ignored else None)
    result = check_against_stock(input, target, mode=mode, weight=weight, label_smoothing=smoothing)
    log_p = F.log_softmax(input, dim=1)
    counted = torch.ones(6, 4, dtype=torch.bool) if kind == "probability" else target != -100
    if kind == "probability":
        hard, divisor = target, 24.0
    else:
        hard = F.one_hot(target.clamp(min=0), 5).movedim(-1, 1).double()
        divisor = weight[target[counted]].sum()
    soft = (1 - smoothing) * hard + smoothing / 5
    losses = -(soft * weight.view(1, 5, 1) * log_p).sum(1)
    torch.testing.assert_close(result.loss, losses[counted].sum() / divisor)


@together
@crossed(reduction=REDUCTIONS, dtype=DTYPES, mode=MODES)
def test_unbatched_input_takes_both_forms_of_target(reduction, dtype, mode):
    input = torch.randn(19).to(dtype)
    for index, kind in itertools.product((3, -100), (torch.int64, torch.int32, torch.int16)):
        target = torch.tensor(index, dtype=kind)
        options = {"mode": mode, "reduction": reduction}
        alone = check_against_stock(input, target, **options)
        assert alone.loss.shape == ()
        # Stock's forward takes a target of size 1 too; its backward then fails, and ours need not.
        listed = ours(input, target.view(1), **options)
        torch.testing.assert_close(listed, alone, rtol=0, atol=0, equal_nan=True)
    # A float target of the input's shape is a distribution, not nineteen indices.
    probability = torch.rand(19).to(dtype)
    check_against_stock(input, probability, mode=mode, reduction=reduction)


@together
@crossed(offset=(1000.0, -1000.0, 30000.0), dtype=DTYPES, mode=MODES)
def test_large_logits_keep_their_digits(offset, dtype, mode):
    # Shifting all logits of a row changes nothing, if they are exact: eighths in float.
    step = 8 if dtype in (torch.float64, torch.float32) else 2**-5
    values = torch.randint(-40, 40, (6, 19)) / step
    input = (values + offset).to(dtype)
    target = torch.randint(0, 19, (6,))
    for reduction in REDUCTIONS:
        check_against_stock(input, target, mode=mode, reduction=reduction)
    shifted = (input.double() - offset).to(dtype)
    if torch.equal(shifted.double() + offset, input.double()):
        there = ours(input, target, mode=mode)
        here = ours(shifted, target, mode=mode)
        assert torch.equal(there.loss, here.loss)


@together
@every_dtype
@every_mode
@pytest.mark.parametrize("classes", [5, 300])  # lanes; a row with whole vectors and a rest
def test_confident_row_keeps_all_its_digits(dtype, mode, classes):
    # p - 1 in float is 0 beyond 17 nats; the other classes' sum is still exact.
    gaps = (1.0, 5.0, 10.0, 20.0, 40.0, 80.0)
    input = torch.zeros(len(gaps), classes)
    input[:, 2] = torch.tensor(gaps)
    input, target = input.to(dtype), torch.full((len(gaps),), 2)
    result = ours(input, target, mode=mode, reduction="none")
    # Without the cancellation of p - 1: n exp(-gap) / (1 + n exp(-gap)) for n other classes.
    others = [(classes - 1) * math.exp(-gap) for gap in gaps]
    losses = torch.tensor([math.log1p(x) for x in others], dtype=torch.float64)
    info = torch.finfo(dtype)
    tolerance = {"rtol": 4 * max(info.eps, 1e-15), "atol": info.tiny * info.eps}
    torch.testing.assert_close(result.loss.double(), losses, **tolerance)
    if result.grad_input is not None:
        expected = torch.tensor([-x / (1 + x) for x in others], dtype=torch.float64)
        # Of the incoming gradients -1.5, -0.5, ... in `incoming_gradient`.
        expected *= torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5, -1.5])
        torch.testing.assert_close(result.grad_input[:, 2].double(), expected, **tolerance)


@together
@every_mode
@every_dtype
# 65504 is fp16's largest number; in the others the difference to the smallest overflows.
@pytest.mark.parametrize("largest", ["65504", "the dtype's largest"])
def test_largest_finite_logits_do_not_overflow(largest, dtype, mode):
    bound = 65504.0 if largest == "65504" else torch.finfo(dtype).max
    input = torch.zeros(4, 19)
    input = input.to(dtype)
    input[0, 3], input[1] = bound, -bound
    input[2, 3], input[2, 4], input[3, 3], input[3, 4] = bound, -bound, bound / 4, -bound / 4
    check_against_stock(input, torch.tensor([3, 3, 3, 3]), mode=mode, reduction="none")
    gradient = ours(input, torch.tensor([3, 3, 4, 4]), mode="default", reduction="sum").grad_input
    assert gradient.isfinite().all()


# In blocks and vectors of several sizes: first and last class of a row, within and beyond one
# vector, and in the second block of a long row.
POSITIONS = ((5, 0), (5, 4), (19, 17), (4097, 0), (4097, 2048), (4097, 4096))


# Which value, where, and in which type meet in the code.
@together
@crossed(
    often=3,
    value=(NAN, INF, -INF),
    place=POSITIONS,
    smoothing=(0.0, 0.1),
    dtype=DTYPES,
    mode=MODES,
)
def test_nonfinite_logit_stays_in_its_row(value, place, smoothing, dtype, mode):
    classes, position = place
    # In the target's own class and in another one; the other rows stay as they are.
    input = torch.randn(4, classes).to(dtype)
    input[1, position] = input[2, position] = value
    target = torch.tensor([0, position, (position + 1) % classes, classes - 1])
    options = {"reduction": "none", "label_smoothing": smoothing}
    result = ours(input, target, mode=mode, **options)
    expected = stock(input, target, **options)
    exact = float64(input, target, **options)
    for mine, plain, reference in zip(result, expected, exact, strict=True):
        if mine is not None:
            assert_as_accurate(mine, plain, reference)
    if value == -INF and smoothing == 0:
        assert result.loss[2].isfinite()
        if result.grad_input is not None:
            assert result.grad_input[2, position] == 0


# Quiet and signalling, of either sign, with low bits: memory full of ones is the last.
@together
@crossed(
    bits=(0x7FC00001, 0x7F800001, 0x7FFFFFFF, -1),
    place=POSITIONS,
    layout=("rows", "lanes"),
    mode=MODES,
)
def test_nan_with_a_payload_stays_nan(bits, place, layout, mode):
    classes, position = place
    input = torch.randn(4, classes)
    input.view(torch.int32)[1, position] = bits
    if layout == "lanes":
        input = input.t().contiguous().t()
    target = torch.tensor([0, (position + 1) % classes, 2, classes - 1])
    result = check_against_stock(input, target, mode=mode, reduction="none")
    assert result.loss[1].isnan()


@together
@crossed(
    value=(NAN, INF, -INF),
    smoothing=(0.0, 0.1),
    kind=(torch.int64, "probability"),
    reduction=REDUCTIONS,
    mode=MODES,
)
@pytest.mark.on_simulator
def test_row_of_nothing_finite_stays_by_itself(value, smoothing, kind, reduction, mode):
    input = torch.randn(4, 19)
    input[1] = value
    target = target_of(kind, input.shape, torch.float32)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    check_against_stock(input, target, mode=mode, **options)


@together
@crossed(
    often=3,
    place=(*POSITIONS, (66, 0), (66, 65)),
    value=(NAN, INF, -INF),
    dtype=DTYPES,
    mode=DIFFERENTIATING,
)
def test_target_gradient_beside_a_nonfinite_logit_agrees(place, value, dtype, mode):
    classes, position = place
    input = torch.randn(3, classes).to(dtype)
    input[1, position] = value
    target = torch.rand(3, classes).softmax(1).to(dtype)
    check_against_stock(input, target, mode=mode, reduction="sum", target_grad=True)


@every_mode
def test_zero_probability_of_minus_infinity_is_nan(mode):
    # 0 * log 0: stock gives nan for the loss and a finite gradient.
    input = torch.randn(4, 5)
    input[0, 1] = -INF
    target = F.one_hot(torch.tensor([0, 1, 2, 3]), 5).float()
    result = check_against_stock(input, target, mode=mode, reduction="none")
    assert result.loss[0].isnan()


@together
@every_mode
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.on_simulator
def test_unusual_weight_gives_the_value_of_stock(smoothing, mode):
    input, target = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    for value in (-1.5, NAN, INF, 0.0):
        weight = torch.tensor([1.0, value, 2.0, 0.5, 3.0])
        for reduction in REDUCTIONS:
            check_against_stock(
                input,
                target,
                mode=mode,
                weight=weight,
                reduction=reduction,
                label_smoothing=smoothing,
            )


@together
@every_mode
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.on_simulator
def test_unusual_probabilities_are_taken_as_they_are(smoothing, mode):
    # Stock checks nothing: negative, larger than 1, not summing to 1, all zero, nan.
    input = torch.randn(5, 19)
    target = torch.randn(5, 19) * 3
    target[1], target[2, 4], target[3, 0] = 0, NAN, INF
    for reduction in REDUCTIONS:
        check_against_stock(
            input, target, mode=mode, reduction=reduction, label_smoothing=smoothing
        )


@together
@crossed(
    shape=((6, 19), (6, 4097), (3, 19, 7), (2, 19, 5, 5)),
    value=(NAN, INF, -INF),
    reduction=REDUCTIONS,
    dtype=DTYPES,
    mode=MODES,
)
def test_ignored_row_that_holds_nan_is_not_read(shape, value, reduction, dtype, mode):
    # Stock's gradient is nan there. Ours has the loss and gradient of the row being anything else.
    input = torch.randn(shape).to(dtype)
    target = target_of(torch.int64, shape, dtype, ignore_index=-100)
    ignored = target == -100
    clean = input.clone()
    clean.movedim(1, -1)[ignored] = 0
    input.movedim(1, -1)[ignored] = value
    options = {
        "reduction": reduction,
        "label_smoothing": 0.1,
        "weight": torch.rand(shape[1]).to(dtype),
    }
    for scale in (1.0, 0.25):
        result = ours(input, target, mode=mode, scale=scale, **options)
        expected = ours(clean, target, mode=mode, scale=scale, **options)
        assert torch.equal(result.loss, expected.loss)
        if result.grad_input is not None:
            assert torch.equal(result.grad_input, expected.grad_input)
            assert (result.grad_input.movedim(1, -1)[ignored] == 0).all()
            assert (result.grad_input.movedim(1, -1)[~ignored] != 0).any()


@every_differentiating_mode
def test_incoming_nan_spares_an_ignored_row(mode):
    # 0 stands for "not looked at"; a nan that arrives belongs to the rows that were.
    target = torch.tensor([0, -100, 2])
    gradient = ours(torch.randn(3, 5), target, mode=mode, scale=NAN).grad_input
    assert (gradient[1] == 0).all()
    assert gradient[[0, 2]].isnan().all()


@every_mode
def test_ignore_index_of_another_width_is_no_class(mode):
    # -100 is 156 as a uint8 and 65436 as an unsigned short: neither may be ignored for it.
    input = torch.randn(4, 200)
    check_against_stock(input, torch.tensor([0, 156, 199, 156], dtype=torch.uint8), mode=mode)
    check_against_stock(input, torch.tensor([0, -100, 199, 156], dtype=torch.int16), mode=mode)
    # And numbers that only agree with a class, or with -100, in their lower bits.
    for kind, index in itertools.product(
        (torch.int64, torch.int32, torch.int16, torch.uint8), (2**32, 2**16 + 1, 2**8, -(2**40))
    ):
        target = torch.tensor([0, 1, 2, 156 if kind == torch.uint8 else 3]).to(kind)
        check_against_stock(input, target, mode=mode, ignore_index=index)


@together
@crossed(shape=SHAPES, kind=KINDS[:-1], mode=MODES)
def test_narrow_indices_are_taken_everywhere(shape, kind, mode):
    input = torch.randn(SHAPES[shape](19))
    target = target_of(kind, input.shape, torch.float32)
    for reduction in REDUCTIONS:
        check_against_stock(input, target, mode=mode, reduction=reduction, ignore_index=2)


@together
@every_mode
@pytest.mark.parametrize("smoothing", [-0.1, NAN, -INF, 0, 1, True])
@pytest.mark.parametrize("kind", [torch.int64, "probability"], ids=str)
@pytest.mark.on_simulator
def test_unusual_smoothing_is_taken_as_by_stock(kind, smoothing, mode):
    # Stock takes what is not positive for 0, without a word.
    input = torch.randn(6, 5)
    target = target_of(kind, input.shape, torch.float32)
    grads = differentiate(F.cross_entropy, input, target, label_smoothing=smoothing)
    options = {"label_smoothing": smoothing, **MODES[mode]}
    result = differentiate(fused_ce.cross_entropy, input, target, **options)
    torch.testing.assert_close(result, grads)


@every_mode
def test_deprecated_name_of_the_mean_is_taken(mode):
    input, target = torch.randn(6, 5), torch.randint(0, 5, (6,))
    with pytest.warns(UserWarning, match="elementwise_mean"):
        check_against_stock(input, target, mode=mode, reduction="elementwise_mean")


@together
@every_mode
@every_reduction
@pytest.mark.parametrize("wide", ["target", "weight", "input", "half target", "half weight"])
def test_mixed_dtypes_with_probabilities_promote_as_in_stock(wide, reduction, mode):
    values = {"input": torch.randn(6, 5), "target": torch.rand(6, 5), "weight": torch.rand(5)}
    dtype = torch.bfloat16 if wide.startswith("half") else torch.float64
    name = wide.removeprefix("half ")
    values[name] = values[name].to(dtype)
    expected = differentiate(F.cross_entropy, **values, reduction=reduction)
    options = {"reduction": reduction, **MODES[mode]}
    result = differentiate(fused_ce.cross_entropy, **values, **options)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_weight_that_requires_grad_is_taken_where_nothing_is_differentiated():
    input, target = torch.randn(6, 5), torch.randint(0, 5, (6,))
    weight = torch.rand(5, requires_grad=True)
    with torch.no_grad():
        loss = fused_ce.cross_entropy(input, target, weight)
        torch.testing.assert_close(loss, F.cross_entropy(input, target, weight))


@together
@every_mode
@every_reduction
def test_negative_ignore_index_is_taken_with_probabilities(reduction, mode):
    input, target = torch.randn(6, 5), torch.rand(6, 5)
    check_against_stock(input, target, mode=mode, reduction=reduction, ignore_index=-1)


@together
@on_cpu
@every_mode
@pytest.mark.parametrize("kind", ["numpy", "tensor"])
def test_numbers_of_other_libraries_are_taken(kind, mode):
    # As ignore_index and label_smoothing stock takes whatever is a number of the right sort.
    convert = torch.tensor if kind == "tensor" else lambda value: torch.tensor(value).numpy()[()]
    input, target = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 2])
    options = {"ignore_index": convert(2), "label_smoothing": convert(0.1)}
    expected = differentiate(F.cross_entropy, input, target, **options)
    result = differentiate(fused_ce.cross_entropy, input, target, **options, **MODES[mode])
    torch.testing.assert_close(result, expected)


# Far from zero, float64 has few digits left for the differences; C as a block and as several.
@together
@pytest.mark.parametrize("offset", [1e6, 1e9])
@pytest.mark.parametrize("classes", [10, 1000, 4097])
@pytest.mark.parametrize("kind", ["smoothing", "probabilities"])
def test_float64_offset_costs_the_loss_no_digits(offset, classes, kind):
    input = torch.randn(3, classes, dtype=torch.float64) + offset
    near = input - input.max(1, keepdim=True).values  # exact
    if kind == "smoothing":
        target, options = torch.tensor([0, 5, 7]), {"label_smoothing": 0.3}
    else:
        target, options = torch.rand(3, classes, dtype=torch.float64), {}
    expected = F.cross_entropy(near, target, **options)
    loss = fused_ce.cross_entropy(input, target, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)


def test_input_of_the_most_dimensions_agrees():
    # 25 dimensions of which none merge, by way of a permutation; one more goes to stock.
    shape = [2, 3] + [2 if d % 3 == 0 else 1 for d in range(23)]
    order = [0, 1, *reversed(range(2, 25))]
    input = torch.randn(shape).permute(order)
    target = torch.randint(0, 3, input.shape[:1] + input.shape[2:])
    assert fused_ce.explain(input, target).startswith("fused")
    torch.testing.assert_close(
        fused_ce.cross_entropy(input, target, reduction="none"),
        F.cross_entropy(input.flatten(2), target.flatten(1), reduction="none").view(target.shape),
    )
    assert fused_ce.explain(input[..., None], target[..., None]).startswith("stock")
    torch.testing.assert_close(
        fused_ce.cross_entropy(input[..., None], target[..., None]),
        F.cross_entropy(input.flatten(2), target.flatten(1)),
    )


# More than a hundred tiles, the last of a run a short one.
@together
@pytest.mark.parametrize("shape", [(90011, 10), (2, 21, 150, 457)], ids=str)
@every_differentiating_mode
@pytest.mark.not_on_simulator
def test_short_tile_at_the_end_of_a_run_keeps_its_rows(shape, mode):
    torch.set_num_threads(2)
    input = torch.randn(shape)
    target = torch.randint(0, shape[1], shape[:1] + shape[2:])
    ours_ = ours(input, target, mode=mode, reduction="sum")
    exact = float64(input, target, reduction="sum")
    torch.testing.assert_close(ours_.loss.double(), exact.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours_.grad_input.double(), exact.grad_input, rtol=1e-4, atol=1e-6)
