"""The divergence and its gradient, in every type, layout and mode, beside what people compose."""

import hashlib

import pytest
import torch
import torch.nn.functional as F
from support.divergence_reference import (
    check,
    check_draws,
    composed,
    fused,
    in_float64,
    logits_of,
    ours,
    weights_of,
)
from support.grids import (
    DTYPES,
    MODES,
    PARTS_OF_301,
    REDUCTIONS,
    SHAPES,
    cases_of,
    covering,
    every_dtype,
    every_mode,
    name_of,
    together,
)
from support.layouts import (
    GEOMETRIES,
    LAYOUTS,
    OVERLAPPING,
    gaps_are_untouched,
    is_dense,
    lay_out,
)
from support.reference import Outcome

import fused_ce

both_directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])

# One shape of each kind; the operators see no more of the others than another number of axes.
SOME = ("C", "NC", "NCHW")


def layouts_of(shape):
    return [name for name, (_, shapes) in LAYOUTS.items() if shape in shapes]


AXES = {
    "geometry": [
        (shape, layout)
        for shape, layout in GEOMETRIES
        # Equal logits have a test of their own: their divergence is 0 but for what was rounded.
        if (shape in SOME or layout == "next token") and layout != "expanded classes"
    ],
    # The teacher's; where the shape has no such layout its logits are contiguous.
    "teacher's layout": ("contiguous", "every second class", "classes last", "transposed"),
    "dtype": DTYPES,
    "teacher's dtype": DTYPES,
    # Lanes, of fewer classes than a vector and of some; rows of less than a chunk, and of several
    # blocks with a rest.
    "classes": (5, 37, 67, 4099),
    "temperature": (1.0, 2.0, 0.7),
    "reverse": (False, True),
    "reduction": REDUCTIONS,
    "weights": (None, "sample_weight", "denominator", "both"),
    "mode": tuple(MODES),
}


def is_valid(case):
    if "denominator" in str(case.get("weights")) or case.get("weights") == "both":
        if case.get("reduction", "mean") != "mean":
            return False
    overlapping = case.get("geometry", ("", ""))[1] in OVERLAPPING
    return not (overlapping and case.get("mode") == "in place")


def problem(case):
    (shape, layout), classes = case["geometry"], case["classes"]
    if classes == 4099 and len(SHAPES[shape](1)) > 3:
        classes = 1029  # else most of the time would go into one case
    input = logits_of(shape, layout, classes, case["dtype"])
    other = case["teacher's layout"]
    other = other if other in layouts_of(shape) else "contiguous"
    teacher = logits_of(shape, other, classes, case["teacher's dtype"])
    options = {name: case[name] for name in ("temperature", "reverse", "reduction")}
    if case["weights"] in ("sample_weight", "both"):
        options["sample_weight"] = weights_of(input)
    if case["weights"] in ("denominator", "both"):
        options["denominator"] = 3.5
    return input, teacher, options


@together
@pytest.mark.parametrize("case", cases_of(AXES, often=2, seldom=3, rare=True, valid=is_valid))
def test_value_and_gradient_are_as_accurate_as_the_composition(case):
    # A power of two, in which a gradient that is scaled after its rounding keeps its digits.
    found = check_draws(lambda: problem(case), mode=case["mode"], scale=4.0)
    input, teacher, _ = problem(case)
    wide = torch.promote_types(torch.promote_types(input.dtype, teacher.dtype), torch.float32)
    assert found.loss.dtype == wide
    if is_dense(input) and found.grad_input is not None:
        assert found.grad_input.stride() == input.stride()


def test_it_is_what_kl_div_adds_up():
    input, teacher = torch.randn(2, 12, 70) * 3
    for temperature in (1.0, 2.0):
        log_p, log_q = ((t / temperature).log_softmax(1) for t in (input, teacher))
        found = fused_ce.kl_div_with_logits(input, teacher, temperature=temperature)
        expected = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        torch.testing.assert_close(found, expected)
        found = fused_ce.kl_div_with_logits(input, teacher, temperature=temperature, reverse=True)
        expected = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        torch.testing.assert_close(found, expected)


NEAR = {
    # name: (logits of the teacher, what the student's differ by)
    "a vocabulary": (lambda: torch.randn(32, 32000) * 2, 1e-3),
    "few classes": (lambda: torch.randn(500, 10) * 2, 1e-3),
    "far from zero": (lambda: torch.randn(32, 3000) * 2 + 40, 1e-2),
    "confident rows": (lambda: torch.randn(32, 3000) + 15 * torch.eye(32, 3000), 1e-2),
}


@both_directions
@pytest.mark.parametrize("case", NEAR.values(), ids=NEAR.keys())
def test_rows_that_are_nearly_equal_keep_their_digits(case, reverse):
    make, distance = case
    teacher = make()
    input = teacher + distance * torch.randn_like(teacher)
    options = {"reverse": reverse, "reduction": "none"}
    exact = in_float64(input, teacher, **options).loss

    def error(losses):
        return ((losses.double() - exact) / exact).abs().max().item()

    found, other = (error(f(input, teacher, **options)) for f in (_loss, composed))
    print(f"ours {found:.1e}, composed {other:.1e}")
    # A gap is what is left of two differences, each rounded to its own size.
    assert found <= 1e-3
    assert other > 100 * found


def _loss(input, teacher, **options):
    return ours(input, teacher, mode="no grad", **options).loss


@together
@both_directions
@pytest.mark.parametrize("classes", [3, 70, 4099])
@every_dtype
def test_no_divergence_is_negative(dtype, classes, reverse):
    teacher = (torch.randn(300, classes) * 4).to(dtype)
    # Differences of one unit in the last place, and of rows as wholes, in which nothing differs.
    eps = torch.finfo(dtype).eps
    for input in (teacher, teacher * (1 + eps), teacher + 0.3, teacher * (1 - 8 * eps)):
        losses = _loss(input, teacher, reverse=reverse, reduction="none")
        assert losses.min() >= 0
    equal = ours(teacher, teacher.clone(), reverse=reverse, reduction="none")
    assert not equal.loss.any()
    assert equal.grad_input.abs().max() <= eps


def rows_of(input, teacher, *, mode, **options):
    """The divergence of each row, and the gradient of their sum, which may come with the sum."""
    losses = _loss(input, teacher, reduction="none", **options)
    if mode == "no grad":
        return Outcome(losses)
    return Outcome(losses, ours(input, teacher, reduction="sum", mode=mode, **options).grad_input)


def exact_rows_of(input, teacher, **options):
    losses, _, _ = in_float64(input, teacher, reduction="none", **options)
    return Outcome(losses, in_float64(input, teacher, reduction="sum", **options).grad_input)


@together
@both_directions
@pytest.mark.parametrize("mode", ["default", "recompute"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("classes", [5, 70, 4099])
def test_confident_rows_keep_their_digits(classes, layout, mode, reverse):
    # What the two leave to the other classes, which beside the 1 of the largest would be lost.
    input, teacher = torch.randn(2, 6, classes)
    largest = torch.randint(0, classes, (6,))
    input[torch.arange(6), largest] = 20.0
    teacher[torch.arange(6), largest] = 24.0
    input = lay_out(input, layout)
    found = rows_of(input, teacher, mode=mode, reverse=reverse)
    exact = exact_rows_of(input, teacher, reverse=reverse)
    torch.testing.assert_close(found.loss.double(), exact.loss, rtol=2e-5, atol=0)
    at = torch.arange(6), largest
    torch.testing.assert_close(
        found.grad_input[at].double(), exact.grad_input[at], rtol=2e-5, atol=0
    )


@together
@both_directions
@every_mode
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("classes", [6, 70, 4100])
def test_a_class_that_both_mask_has_no_part_in_anything(classes, layout, mode, reverse):
    input, teacher = torch.randn(2, 6, classes)
    input[:, 1::2] = teacher[:, 1::2] = -torch.inf
    if classes == 4100:  # a block of rows in which there is nothing else
        input[1, :2048] = teacher[1, :2048] = -torch.inf
    keep = torch.arange(0, classes, 2)
    parts = lay_out(input, layout), lay_out(teacher, layout)
    found = rows_of(*parts, mode=mode, reverse=reverse)
    exact = exact_rows_of(
        input[:, keep].nan_to_num(neginf=-1e3),
        teacher[:, keep].nan_to_num(neginf=-1e3),
        reverse=reverse,
    )
    torch.testing.assert_close(found.loss, exact.loss.float(), rtol=1e-5, atol=1e-7)
    if mode == "no grad":
        return
    expected = torch.zeros(6, classes)
    expected[:, keep] = exact.grad_input.float()
    torch.testing.assert_close(found.grad_input, expected, rtol=1e-4, atol=2e-7)
    assert not found.grad_input[:, 1::2].any()


@together
@both_directions
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("classes", [6, 70, 4100])
def test_one_mask_alone_counts_as_the_definition_says(classes, layout, reverse):
    first, second = torch.randn(2, 6, classes)
    # Where the first has no probability the second's does not matter; where the second has none
    # the divergence is infinite.
    first[:3, 1::2] = -torch.inf
    second[3:, 1::2] = -torch.inf
    student, teacher = (first, second) if reverse else (second, first)
    losses = _loss(lay_out(student, layout), teacher, reverse=reverse, reduction="none")
    log_f, log_s = (t[:3].double().log_softmax(1) for t in (first, second))
    keep = torch.arange(0, classes, 2)
    gaps = (log_f - log_s)[:, keep]
    expected = (log_f[:, keep].exp() * gaps).sum(1)
    torch.testing.assert_close(losses[:3], expected.float(), rtol=1e-5, atol=1e-7)
    assert torch.equal(losses[3:], torch.full((3,), torch.inf))
    for mode in ("default", "recompute"):
        parts = lay_out(student[:3].clone(), layout), teacher[:3]
        grad = ours(*parts, reverse=reverse, reduction="sum", mode=mode).grad_input
        found = log_s.exp() - log_f.exp()
        if reverse:
            found = torch.zeros_like(log_f)
            found[:, keep] = log_f[:, keep].exp() * (gaps - expected[:, None])
        torch.testing.assert_close(grad, found.float(), rtol=1e-4, atol=5e-7)


@both_directions
def test_a_whole_block_that_the_first_alone_masks_has_no_part(reverse):
    first, second = torch.randn(2, 3, 4100)
    first[:, :2048] = -torch.inf  # before any class that has a part
    student, teacher = (first, second) if reverse else (second, first)
    log_f, log_s = (t.double().log_softmax(1) for t in (first, second))
    gaps = (log_f - log_s)[:, 2048:]
    expected = (log_f[:, 2048:].exp() * gaps).sum(1)
    expected_grad = log_s.exp() - log_f.exp()
    if reverse:
        expected_grad = torch.zeros_like(log_f)
        expected_grad[:, 2048:] = log_f[:, 2048:].exp() * (gaps - expected[:, None])
    for mode in ("default", "recompute"):
        found = rows_of(student, teacher, mode=mode, reverse=reverse)
        torch.testing.assert_close(found.loss, expected.float(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.grad_input, expected_grad.float(), rtol=1e-4, atol=5e-7)


@together
@both_directions
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [5, 70, 4099])
def test_extreme_logits_have_the_composition_s_divergence(classes, dtype, reverse):
    input, teacher = torch.randn(2, 40, classes, dtype=torch.float64).mul(100).to(dtype)
    input[:4] *= 1e30  # whose differences no exp has a result for
    teacher[4:8] *= 1e30
    input[8:12] = torch.finfo(dtype).min / 4
    input[8:12, 2] = 0
    teacher[8:12, 2] = 3
    for mode in ("default", "recompute"):
        found = rows_of(input, teacher, mode=mode, reverse=reverse)
        exact = exact_rows_of(input, teacher, reverse=reverse)
        finite = exact.loss.isfinite()
        assert finite.sum() >= 28
        torch.testing.assert_close(
            found.loss[finite].double(), exact.loss[finite], rtol=1e-5, atol=1e-6
        )
        rows = finite & exact.grad_input.isfinite().all(1)
        # A gradient in reverse is a probability times a difference from the mean, which may be
        # what is left of numbers as large as the divergence.
        scale = 1 + (exact.loss[rows, None] if reverse else 0)
        difference = (found.grad_input[rows].double() - exact.grad_input[rows]) / scale
        assert difference.abs().max() <= 1e-5


@together
@both_directions
@every_mode
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("classes", [5, 70, 4099])
def test_rows_without_a_distribution_are_nan_and_harm_no_other(classes, layout, mode, reverse):
    input, teacher = torch.randn(2, 8, classes)
    good = rows_of(lay_out(input, layout), teacher, mode=mode, reverse=reverse)
    input[0] = -torch.inf
    teacher[1] = -torch.inf
    input[2, 3] = torch.nan
    teacher[3, 4] = torch.nan
    input[4, 2] = torch.inf
    teacher[5, 2] = torch.inf
    found = rows_of(lay_out(input, layout), teacher, mode=mode, reverse=reverse)
    assert found.loss[:6].isnan().all()
    assert torch.equal(found.loss[6:], good.loss[6:])
    if mode != "no grad":
        assert found.grad_input[:6].isnan().any(1).all()
        assert torch.equal(found.grad_input[6:], good.grad_input[6:])


@together
@both_directions
@every_mode
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("classes", [5, 70, 4099])
def test_nothing_of_a_row_without_weight_is_used(classes, layout, reduction, mode, reverse):
    input, teacher = torch.randn(2, 9, classes)
    weights = weights_of(input)
    options = {"sample_weight": weights, "reverse": reverse, "reduction": reduction, "mode": mode}
    clean = ours(lay_out(input, layout), teacher, **options)
    input[1], teacher[4], input[7] = torch.nan, torch.inf, -torch.inf
    found = ours(lay_out(input, layout), teacher, **options)
    assert torch.equal(found.loss, clean.loss)
    if reduction == "none":
        assert not found.loss[1::3].any()
    if mode != "no grad":
        assert torch.equal(found.grad_input, clean.grad_input)
        assert not found.grad_input[1::3].any()


def test_weights_of_any_type_and_strides_are_taken():
    input, teacher = torch.randn(2, 6, 70)
    expected = _loss(input, teacher, sample_weight=torch.tensor([1.0, 0, 2, 3, 0, 1]))
    for weights in (
        torch.tensor([1, 0, 2, 3, 0, 1]),
        torch.tensor([1, 0, 2, 3, 0, 1], dtype=torch.bfloat16),
        torch.tensor([[1.0, 9], [0, 9], [2, 9], [3, 9], [0, 9], [1, 9]])[:, 0],
    ):
        assert torch.equal(_loss(input, teacher, sample_weight=weights), expected)


def test_no_weight_at_all_is_a_mean_of_nothing():
    input, teacher = torch.randn(2, 6, 70)
    found = ours(input, teacher, sample_weight=torch.zeros(6))
    assert found.loss.isnan() and not found.grad_input.any()
    found = ours(input, teacher, sample_weight=torch.zeros(6), denominator=2.0)
    assert found.loss == 0 and not found.grad_input.any()


@pytest.mark.parametrize("denominator", [3, 3.0, torch.tensor(3.0), torch.tensor([3])])
def test_a_denominator_of_any_kind_divides_the_sum(denominator):
    input, teacher = torch.randn(2, 6, 70)
    found = ours(input, teacher, denominator=denominator)
    summed = ours(input, teacher, reduction="sum")
    torch.testing.assert_close(found.loss, summed.loss / 3)
    torch.testing.assert_close(found.grad_input, summed.grad_input / 3)


@together
@both_directions
@every_mode
@pytest.mark.parametrize("classes", [5, 300])
def test_a_denominator_of_zero_divides_as_any_other(classes, mode, reverse):
    input, teacher = torch.randn(2, 3, classes)
    found = ours(input, teacher, denominator=0.0, mode=mode, reverse=reverse)
    assert found.loss == torch.inf
    if mode != "no grad":  # inf - inf, in the composition as well
        assert not found.grad_input.isfinite().any()
    assert ours(input, input.clone(), denominator=0.0, mode="no grad").loss.isnan()


def test_a_denominator_of_rows_over_t_squared_is_hinton_s_loss():
    input, teacher = torch.randn(2, 6, 70) * 3
    found = ours(input, teacher, temperature=2.0, denominator=6 / 4)
    plain = ours(input, teacher, temperature=2.0)
    torch.testing.assert_close(found.loss, 4 * plain.loss)
    torch.testing.assert_close(found.grad_input, 4 * plain.grad_input)


@pytest.mark.parametrize("layout", ["gap after each row", "every second class"])
@pytest.mark.parametrize("classes", [5, 70, 4099])
def test_in_place_writes_to_the_logits_alone(classes, layout):
    input = logits_of("NC", layout, classes, torch.float32)
    teacher = logits_of("NC", layout, classes, torch.bfloat16)
    before = teacher.clone()
    expected = ours(input, teacher).grad_input
    loss = fused_ce.kl_div_with_logits(input.requires_grad_(), teacher, inplace=True)
    assert torch.equal(input.detach(), expected)
    assert gaps_are_untouched(input.detach()) and torch.equal(teacher, before)
    loss.backward()
    assert torch.equal(input.grad, expected)


def digest(tensors):
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


@together
@both_directions
@pytest.mark.parametrize("shape", [(7001, 10), (701, 300), (33, 4099), (4, 70, 33, 65)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(shape, dtype, reverse):
    input, teacher = (torch.randn(shape).to(dtype) for _ in range(2))
    weights = weights_of(input)
    found = set()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            options = {"reverse": reverse, "sample_weight": weights}
            outcomes = [ours(input, teacher, mode=m, **options) for m in ("default", "recompute")]
            found.add(digest(t for outcome in outcomes for t in outcome[:2]))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


@together
@both_directions
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("classes", [3, 64, 65, 300, 4099])
@every_dtype
def test_a_rows_bits_do_not_depend_on_how_many_rows_come_with_it(dtype, classes, masked, reverse):
    rows = 301  # more than a tile of any kind
    input, teacher = (torch.randn(rows, classes).mul(4).to(dtype) for _ in range(2))
    if masked:  # which an exp without subnormal results cannot take
        input[::5, 1] = teacher[::5, 1] = -torch.inf

    def of(first, last, mode):
        """Of some rows, for what arrives at each by its number among all."""
        leaf = input[first:last].clone().requires_grad_()
        number = torch.arange(first, last).to(torch.promote_types(dtype, torch.float32))
        options = {"reverse": reverse, "reduction": "none", "sample_weight": number % 7}
        options["temperature"] = 0.7  # whose inverse has two parts
        losses = fused(leaf, teacher[first:last], **MODES[mode], **options)
        return losses.detach(), torch.autograd.grad(losses, leaf, torch.sin(number))[0]

    for mode in ("recompute", "in place"):
        whole = of(0, rows, mode)
        for row, count in PARTS_OF_301:
            part = of(row, row + count, mode)
            for value, all_values in zip(part, whole, strict=True):
                assert torch.equal(value, all_values[row : row + count]), (row, count)


@together
@both_directions
@pytest.mark.parametrize("classes", [3, 64, 65, 300, 4099])
@every_dtype
def test_nor_do_they_where_the_gradient_comes_with_the_loss(dtype, classes, reverse):
    input, teacher = (torch.randn(301, classes).mul(4).to(dtype) for _ in range(2))
    options = {"reverse": reverse, "reduction": "sum"}
    whole = ours(input, teacher, **options)
    for row, count in PARTS_OF_301:
        some = slice(row, row + count)
        part = ours(input[some], teacher[some], **options)
        assert torch.equal(part.grad_input, whole.grad_input[some]), (row, count)


@both_directions
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 31)])
def test_an_images_pixels_do_not_depend_on_how_many_images_come_with_it(size, reverse):
    input, teacher = torch.randn(2, 5, 100, *size)
    whole = ours(input, teacher, reverse=reverse, reduction="sum").grad_input
    losses = _loss(input, teacher, reverse=reverse, reduction="none")
    for image in range(5):
        parts = input[image : image + 1], teacher[image : image + 1]
        found = ours(*parts, reverse=reverse, reduction="sum").grad_input
        assert torch.equal(found[0], whole[image])
        found = _loss(*parts, reverse=reverse, reduction="none")
        assert torch.equal(found[0], losses[image])


@both_directions
@pytest.mark.parametrize("classes", [10, 70, 4099])
def test_a_gradient_in_forward_has_the_bits_of_a_sum_s(classes, reverse):
    """However the rows are reduced, and whoever computes the gradient when."""
    input, teacher = torch.randn(2, 6, classes)
    found = [
        ours(input, teacher, reverse=reverse, reduction="sum", mode=mode).grad_input
        for mode in ("default", "in place")
    ]
    assert torch.equal(*found)
    again = ours(input, teacher, reverse=reverse, reduction="sum", mode="recompute").grad_input
    torch.testing.assert_close(again, found[0], rtol=1e-5, atol=2e-7)


# Fewer, for the simulator, which is slow: each kind of rows, with less than a warp, a warp and a
# block for one.
FEW = AXES | {
    "geometry": [
        ("C", "contiguous"),
        ("NC", "contiguous"),
        ("NC", "transposed"),
        ("NC", "every second class"),
        ("NCHW", "contiguous"),
        ("NCd", "next token"),
    ],
    "classes": (5, 70, 1029),
}


@together
@pytest.mark.on_simulator
@pytest.mark.parametrize(
    "case", [pytest.param(c, id=name_of(c)) for c in covering(FEW, 2, is_valid)]
)
def test_every_device_has_the_accuracy_of_the_composition(case):
    input, teacher, options = problem(case)
    # A GPU's exp of a float is an approximation, worst where it is small beside the largest.
    check(input, teacher, mode=case["mode"], scale=4.0, luck=4.0, **options)
