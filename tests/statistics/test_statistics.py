"""The row statistics and their gradient, in every type and layout, beside what people compose."""

import hashlib

import pytest
import torch
from support.grids import (
    DTYPES,
    PARTS_OF_301,
    SHAPES,
    cases_of,
    covering,
    every_dtype,
    name_of,
    together,
)
from support.layouts import GEOMETRIES, is_dense, lay_out
from support.reference import one_thread
from support.statistics_reference import (
    FIELDS,
    check,
    composed,
    differentiate,
    logits_of,
    ours,
    target_of,
)

import fused_ce

# One shape of each kind; the operators see no more of the others than another number of axes.
SOME = ("C", "NC", "NCHW")
AXES = {
    "geometry": [
        (shape, layout)
        for shape, layout in GEOMETRIES
        # Equal logits have a test of their own: their gradient is 0 but for what was rounded.
        if (shape in SOME or layout == "next token") and layout != "expanded classes"
    ],
    "dtype": DTYPES,
    # Lanes, of fewer classes than a block and of some; rows of less than a chunk, and of several
    # blocks with a rest.
    "classes": (5, 37, 67, 4099),
    "target": (None, torch.int64, torch.int32, torch.int16, torch.uint8),
    "map": ((1.0, None), (0.7, None), (1.0, 2.0), (1.3, 20.0)),
    "wanted": (FIELDS, ("log_prob", "entropy"), ("entropy",), ("logsumexp",)),
}


@together
@pytest.mark.parametrize("case", cases_of(AXES, often=2, seldom=3))
def test_values_and_gradient_are_as_accurate_as_the_composition(case):
    (shape, layout), kind, classes = case["geometry"], case["target"], case["classes"]
    if classes == 4099 and len(SHAPES[shape](1)) > 3:
        classes = 1029  # else most of the time would go into one case
    temperature, softcap = case["map"]
    input = logits_of(shape, layout, classes, case["dtype"])
    target = None if kind is None else target_of(input, kind)
    options = {"temperature": temperature, "softcap": softcap}
    if kind == torch.uint8:
        options["ignore_index"] = 255
    stats, grad = check(input, target, wanted=case["wanted"], **options)
    expected = composed(input, target, dim=min(1, input.dim() - 1), **options)[3]
    found = _at(input, stats[3], softcap), _at(input, expected, softcap)
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)  # a cap may make ties of neighbours
    if softcap is None and temperature == 1.0:
        assert torch.equal(stats[3], expected)
    assert grad.is_contiguous() or grad.stride() == input.stride()
    if is_dense(input):
        assert grad.stride() == input.stride()


def _at(input, argmax, softcap):
    """The logits that were found to be the largest; 0 where a row is ignored."""
    dim = min(1, input.dim() - 1)
    values = input.double().gather(dim, argmax.clamp(min=0).unsqueeze(dim)).squeeze(dim)
    values = values if softcap is None else softcap * torch.tanh(values / softcap)
    return values.masked_fill(argmax < 0, 0)


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
    "target": (None, torch.int64, torch.uint8),
}


@together
@pytest.mark.on_simulator
@pytest.mark.parametrize("case", [pytest.param(c, id=name_of(c)) for c in covering(FEW, 2)])
def test_every_device_has_the_accuracy_of_the_composition(case):
    input = logits_of(*case["geometry"], case["classes"], case["dtype"])
    kind, (temperature, softcap) = case["target"], case["map"]
    target = None if kind is None else target_of(input, kind)
    options = {"temperature": temperature, "softcap": softcap, "ignore_index": 255}
    if kind != torch.uint8:
        options["ignore_index"] = -100
    # A GPU's exp of a float is an approximation, worst where it is small beside the largest.
    check(input, target, luck=4.0, wanted=case["wanted"], **options)


@together
@pytest.mark.parametrize("dim", range(-4, 4))
def test_the_classes_may_be_in_any_dimension(dim):
    input = torch.randn(3, 70, 4, 5)
    shape = [size for d, size in enumerate(input.shape) if d != dim % 4]
    target = torch.randint(0, input.shape[dim], shape)
    options = {"dim": dim}
    stats, grad = differentiate(ours, input, target, **options)
    exact, exact_grad = differentiate(composed, input.double(), target, **options)
    for value, expected in zip([*stats, grad], [*exact, exact_grad], strict=True):
        assert value.shape == expected.shape
        torch.testing.assert_close(value, expected.to(value.dtype), rtol=1e-5, atol=1e-6)


@every_dtype
def test_results_are_in_float32_at_least(dtype):
    stats = fused_ce.softmax_stats(torch.randn(3, 5).to(dtype), torch.tensor([0, 1, 2]))
    wide = torch.promote_types(dtype, torch.float32)
    assert [v.dtype for v in stats[:3]] == [wide] * 3


def test_what_is_not_asked_for_is_none():
    input, target = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2])
    for given in (input, input.detach()):
        stats = fused_ce.softmax_stats(given, entropy=False)
        assert stats.log_prob is None and stats.entropy is None and stats.argmax is None
        assert stats.logsumexp.shape == (3,)
        stats = fused_ce.softmax_stats(given, target, argmax=True)
        assert all(v.shape == (3,) for v in stats)
        assert stats.argmax.dtype == torch.int64 and not stats.argmax.requires_grad


@pytest.mark.on_simulator
@pytest.mark.parametrize("classes", [5, 70, 4099])
def test_a_class_masked_with_minus_infinity_has_no_part_in_anything(classes):
    input = torch.randn(6, classes)
    input[:, 1::2] = -torch.inf
    target = torch.zeros(6, dtype=torch.long)
    stats, grad = differentiate(ours, input, target)
    few, few_grad = differentiate(ours, input[:, ::2].contiguous(), target)
    for value, expected in zip(stats[:3], few[:3], strict=True):
        torch.testing.assert_close(value, expected, rtol=2e-7, atol=2e-7)
    assert torch.equal(grad[:, 1::2], torch.zeros_like(grad[:, 1::2]))
    torch.testing.assert_close(grad[:, ::2], few_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.on_simulator
@pytest.mark.parametrize("classes", [5, 70, 4099])
def test_a_masked_target_has_a_log_prob_of_minus_infinity(classes):
    input = torch.randn(2, classes)
    input[:, 1] = -torch.inf
    stats, grad = differentiate(ours, input, torch.tensor([1, 1]), wanted=("log_prob",))
    assert torch.equal(stats[0], torch.full((2,), -torch.inf))
    exact = differentiate(composed, input.double(), torch.tensor([1, 1]), wanted=("log_prob",))[1]
    torch.testing.assert_close(grad, exact.float(), rtol=1e-5, atol=1e-6)


@together
@pytest.mark.on_simulator
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("classes", [5, 70, 4099])
def test_rows_without_a_finite_maximum_are_what_torch_makes_of_them(classes, layout):
    input = torch.randn(6, classes)
    input[0] = -torch.inf
    input[1, classes // 2] = torch.inf
    input[2, 3], input[2, 4] = torch.nan, torch.inf
    input[3] = torch.nan
    input[4, 1:3] = torch.inf
    input = lay_out(input, layout)
    target = torch.full((6,), 2)
    stats = ours(input, target)
    expected = composed(input, target)
    for name, value, same in zip(stats._fields, stats, expected, strict=True):
        torch.testing.assert_close(value, same, equal_nan=True, msg=name)
    grad = differentiate(ours, input, target)[1]
    assert grad[:5].isnan().any(1).all() and grad[5].isfinite().all()


@together
@pytest.mark.on_simulator
@pytest.mark.parametrize("classes", [5, 70, 4099])
@every_dtype
def test_equal_logits_have_the_entropy_of_a_choice_among_all(dtype, classes):
    input = torch.full((4, 1), 3.25, dtype=dtype).expand(4, classes)
    stats, grad = differentiate(ours, input, torch.tensor([0, 1, 2, 3]), wanted=("entropy",))
    wide = stats[1].dtype
    torch.testing.assert_close(stats[1], torch.full((4,), classes, dtype=wide).log())
    torch.testing.assert_close(stats[0], -torch.full((4,), classes, dtype=wide).log())
    assert grad.abs().max() <= torch.finfo(wide).eps * 8 / classes


@together
@pytest.mark.on_simulator
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("classes", [5, 70, 4099, 9000])
def test_argmax_is_the_first_of_the_largest(classes, layout):
    input = torch.randint(0, 3, (40, classes)).float()
    input[0] = 1.0
    input[1] = torch.arange(classes)  # every block has a larger one
    input = lay_out(input, layout)
    assert torch.equal(ours(input, None).argmax, input.argmax(1))


@together
@pytest.mark.on_simulator
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("classes", [5, 70, 4099])
def test_nothing_of_an_ignored_row_is_used(classes, layout):
    input = torch.randn(9, classes)
    target = torch.randint(0, classes, (9,))
    target[::2] = -100
    clean = lay_out(input, layout)
    input = input.clone()
    input[0], input[2], input[4] = torch.nan, torch.inf, -torch.inf
    with_nan = lay_out(input, layout)
    stats, grad = differentiate(ours, with_nan, target)
    same, same_grad = differentiate(ours, clean, target)
    for value, expected in zip([*stats, grad], [*same, same_grad], strict=True):
        assert torch.equal(value, expected)
    for value, zero in zip(stats, (0, 0, 0, -1), strict=True):
        assert torch.equal(value[::2], torch.full_like(value[::2], zero))
    assert not grad[::2].any()
    # Even if what arrives for it is nan.
    leaf = with_nan.clone().requires_grad_()
    ignoring = ours(leaf, target)
    arriving = torch.where(target == -100, torch.nan, 1.0)
    (grad,) = torch.autograd.grad(ignoring.entropy, leaf, arriving)
    assert not grad[::2].any() and grad[1::2].isfinite().all()


@together
@pytest.mark.parametrize("shape", [(9, 300), (9, 4099), (300, 7), (2, 70, 9)])
@pytest.mark.parametrize("bad", [-1, 1 << 20])
def test_a_target_that_is_no_class_raises_before_anything_is_written(shape, bad):
    input = torch.randn(shape)
    target = target_of(input)
    target.view(-1)[-2] = bad
    with pytest.raises(IndexError, match=f"^Target {bad} is out of bounds"):
        ours(input, target)


def peaked(gap, rows=64, classes=3000):
    """Rows whose largest logit is so far from the others that little entropy is left."""
    input = torch.randn(rows, classes)
    input[:, 7] = input.max(1).values + gap
    return input


@pytest.mark.parametrize(
    "input, allowed",
    [
        (lambda: torch.randn(64, 32000) * 2, 1e-7),
        (lambda: torch.randn(512, 512) * 2 + 40, 2**-23),  # an ulp
        # x - M has the rounding of its own size, and exp makes that a relative error.
        (lambda: peaked(12.0), 3e-7),
    ],
    ids=["a vocabulary", "few classes", "a confident row"],
)
def test_entropy_has_digits_that_the_difference_of_large_numbers_has_not(input, allowed):
    torch.manual_seed(1)
    input = input()
    exact = composed(input.double(), None)[1]

    def error(entropy):
        return ((entropy.double() - exact) / exact).abs().max().item()

    lse = input.logsumexp(1)
    difference = lse - (input.softmax(1) * input).sum(1)
    found = error(ours(input, None).entropy)
    print(f"ours {found:.1e}, logsumexp - sum p x {error(difference):.1e}")
    assert found <= allowed
    assert error(difference) > 5 * found


@together
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("classes", [5, 70, 4099])
def test_a_confident_row_keeps_its_digits(classes, layout):
    # 1 - p_t, which the rounding of p_t would lose, and the terms beside the 1 of the largest.
    input = torch.randn(6, classes)
    target = torch.randint(0, classes, (6,))
    input[torch.arange(6), target] = 22.0
    input = lay_out(input, layout)
    stats, grad = differentiate(ours, input, target, wanted=("log_prob",))
    exact, exact_grad = differentiate(composed, input.double(), target, wanted=("log_prob",))
    torch.testing.assert_close(stats[0].double(), exact[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(stats[1].double(), exact[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=0)


def digest(tensors):
    state = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            state.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


@together
@pytest.mark.parametrize("shape", [(7001, 10), (701, 300), (33, 4099), (4, 70, 33, 65)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(shape, dtype):
    input = torch.randn(shape).to(dtype)
    target = target_of(input)
    found = set()
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        stats, grad = differentiate(ours, input, target)
        found.add(digest([*stats, grad]))
    assert len(found) == 1


@together
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("classes", [3, 64, 65, 300, 4099])
@every_dtype
def test_a_rows_results_do_not_depend_on_how_many_rows_come_with_it(dtype, classes, masked):
    rows = 301  # more than a tile of any kind
    input = torch.randn(rows, classes).mul(4).to(dtype)
    if masked:  # which an exp without subnormal results cannot take
        input[::5, 1] = -torch.inf
    target = torch.randint(0, classes, (rows,))

    stats, grad = differentiate_rows(input, target, 0)
    for row, count in PARTS_OF_301:
        some = slice(row, row + count)
        part, part_grad = differentiate_rows(input[some], target[some], row)
        for value, whole in zip((*part, part_grad), (*stats, grad), strict=True):
            assert torch.equal(value, whole[some]), (row, count)


def differentiate_rows(input, target, first):
    """What arrives for a row depends on its number in the whole batch."""
    leaf = input.clone().requires_grad_()
    stats = ours(leaf, target)
    number = torch.arange(first, first + len(input)).to(stats.entropy.dtype)
    number = number.view(-1, *[1] * (input.dim() - 2)).expand_as(stats.entropy)
    grads = [torch.sin(number + k) for k in range(3)]
    (grad,) = torch.autograd.grad(stats[:3], leaf, grads)
    return [v.detach() for v in stats], grad


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 31)])
def test_an_images_pixels_do_not_depend_on_how_many_images_come_with_it(size):
    input = torch.randn(5, 100, *size)
    target = torch.randint(0, 100, (5, *size))
    stats, grad = differentiate_rows(input, target, 0)
    for image in range(5):
        one = input[image : image + 1], target[image : image + 1]
        found, found_grad = differentiate_rows(*one, image)
        for value, whole in zip((*found, found_grad), (*stats, grad), strict=True):
            assert torch.equal(value[0], whole[image])


@one_thread()
def test_the_logits_are_left_as_they_are():
    input = torch.randn(70, 300, requires_grad=True)
    before = input.detach().clone()
    stats = ours(input, torch.zeros(70, dtype=torch.long), temperature=0.5, softcap=3.0)
    sum(v.sum() for v in stats[:3]).backward()
    assert torch.equal(input.detach(), before)
