"""`linear_cross_entropy` gives the loss and the gradients of `F.linear` and `F.cross_entropy`,
whatever the options, the shapes and the chunks, and takes its rows in the chunks it was asked for.
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.grids import DTYPES, covering, name_of, together
from support.linear_reference import (
    check_against_stock,
    chunk_sizes,
    differentiate,
    float64,
    gemms,
    in_chunks,
    ours,
    stock,
    stock_loss,
)
from torch import nn

import fused_ce
from fused_ce import linear_cross_entropy as lce
from fused_ce.linear import plan

HAS_TORCHS = hasattr(F, "linear_cross_entropy")
needs_torchs = pytest.mark.skipif(not HAS_TORCHS, reason="torch 2.13 and newer have the function")

# name: batch dimensions, and those of a K-dimensional loss
SHAPES = {
    "H": ((), ()),
    "NH": ((13,), ()),
    "BTH": ((3, 5), ()),
    "BTUH": ((2, 1, 7), ()),
    "K1": ((7,), (3,)),
    "K2": ((5,), (2, 3)),
    "BTH, K1": ((2, 3), (4,)),
}
FEATURES, CLASSES = 12, 11
# What is asked for: a single chunk, an odd last one, chunks of a row, and a budget that holds some
# rows of each dtype.
CHUNKS = {
    "default": {},
    "size 4": {"chunk_size": 4},
    "size 1": {"chunk_size": 1},
    "budget": {"max_chunk_bytes": 5 << 20},
}
AXES = {
    "shape": tuple(SHAPES),
    "dtype": DTYPES,
    "kind": (torch.int64, torch.int32, torch.uint8, "probability"),
    "reduction": ("mean", "sum", "none"),
    "smoothing": (0.0, 0.2),
    "weighted": (False, True),
    "bias": (False, True),
    "ignored": (False, True),
    "chunks": tuple(CHUNKS),
    "ahead": (True, False),
    "scale": (1.0, 0.3),
}


def valid(case):
    return not (case.get("kind") == "probability" and case.get("ignored"))


def problem(shape="NH", dtype=torch.float32, kind=torch.int64, bias=False, ignored=False):
    """Input, weight and bias of a layer, the target, and what the ignored rows are marked with."""
    batch, positions = SHAPES[shape]
    # Weights as those of a trained head: the logits spread over a few units.
    input = torch.randn(*batch, FEATURES).to(dtype)
    linear_weight = (torch.randn(CLASSES, *positions, FEATURES) / 2).to(dtype)
    linear_bias = torch.randn(CLASSES, *positions).to(dtype) if bias else None
    options = {}
    if kind == "probability":
        target = torch.randn(*batch, CLASSES, *positions).softmax(len(batch)).to(dtype)
    else:
        target = torch.randint(CLASSES, (*batch, *positions))
        if ignored:
            options["ignore_index"] = 3
            target.view(-1)[1::3] = 3
        target = target.to(kind)
    return (input, linear_weight, linear_bias), target, options


@pytest.fixture(autouse=True)
def warnings_of_other_tests():
    plan._warn_once.cache_clear()


@together
@pytest.mark.filterwarnings("ignore:fused_ce. max_chunk_bytes")
@pytest.mark.parametrize("case", covering(AXES, 2, valid), ids=name_of)
def test_loss_and_gradients_agree(case):
    layer, target, options = problem(
        case["shape"], case["dtype"], case["kind"], case["bias"], case["ignored"]
    )
    if case["weighted"]:
        options["weight"] = (torch.rand(CLASSES) + 0.5).to(case["dtype"])
    check_against_stock(
        layer,
        target,
        chunks=CHUNKS[case["chunks"]] | {"grad_in_forward": case["ahead"]},
        reduction=case["reduction"],
        label_smoothing=case["smoothing"],
        scale=case["scale"],
        **options,
    )


# A head of some width: enough terms in each sum for rounding to show. The number of rows is a power
# of two, or the rounding of what the mean divides by would favour one computation or the other.
WIDE_ROWS, WIDE_CLASSES, WIDE_FEATURES = 256, 1000, 32


def one_hot():
    return F.one_hot(torch.randint(WIDE_CLASSES, (WIDE_ROWS,)), WIDE_CLASSES).float()


# Classes spread over all, and so few that each adds many terms to its row of the weight; as
# probabilities, one class, two mixed, and what a teacher leaves open.
WIDE_TARGETS = {
    "spread": lambda: torch.randint(WIDE_CLASSES, (WIDE_ROWS,)),
    "few": lambda: torch.randint(30, (WIDE_ROWS,)),
    "one-hot": one_hot,
    "mixed": lambda: 0.7 * one_hot() + 0.3 * one_hot(),
    "soft": lambda: (4 * torch.randn(WIDE_ROWS, WIDE_CLASSES)).softmax(1),
}
# How far stock in float32 is from itself with the rows in another order: 3 % for the weight and 5 %
# for the bias, measured. In the half types the order of sums makes no difference.
ORDER_OF_SUMS = {torch.float32: 1.05, torch.bfloat16: 1.0, torch.float16: 1.0}


@functools.cache
def wide_problem(seed, dtype, targets, scale):
    """A layer and its target, and the gradients of stock and of stock in float64."""
    torch.manual_seed(seed)
    layer = (
        torch.randn(WIDE_ROWS, WIDE_FEATURES).to(dtype),
        (torch.randn(WIDE_CLASSES, WIDE_FEATURES) / 6).to(dtype),
        torch.randn(WIDE_CLASSES).to(dtype),
    )
    target = WIDE_TARGETS[targets]()
    if target.is_floating_point():
        target = target.to(dtype)
    return layer, target, stock(layer, target, scale=scale), float64(layer, target, scale=scale)


def wide_errors(dtype, targets, scale, **chunks):
    """Root mean squares over two problems, for the gradient of each of the layer's tensors: our
    errors, stock's, and those of one more rounding of each element."""
    scale = torch.tensor(scale, dtype=dtype).item()  # what all of them are given
    squares = []
    for seed in range(2):
        layer, target, theirs, exact = wide_problem(seed, dtype, targets, scale)
        mine = ours(layer, target, scale=scale, **chunks)
        for which in (1, 2, 3):
            true = exact[which]
            spacing = torch.finfo(dtype).eps * 2.0 ** true.abs().log2().floor()
            errors = (mine[which] - true, theirs[which] - true, spacing / math.sqrt(12))
            squares.append(torch.stack([error.double().square().mean() for error in errors]))
    return torch.stack(squares).view(2, 3, 3).mean(0).sqrt()


# 48 leaves six chunks, 128 two, whose sums are taken in another type than those of more.
@together
@pytest.mark.parametrize("dtype", ORDER_OF_SUMS)
@pytest.mark.parametrize("targets", WIDE_TARGETS)
@pytest.mark.parametrize("chunk_size", (48, 128, 256))
@pytest.mark.parametrize("scale, ahead", [(1.0, True), (0.3, False)])
def test_gradient_is_as_accurate_as_stock(dtype, targets, chunk_size, scale, ahead):
    options = {"chunk_size": chunk_size, "grad_in_forward": ahead}
    for mine, theirs, _ in wide_errors(dtype, targets, scale, **options):
        assert mine <= ORDER_OF_SUMS[dtype] * theirs


@together
@pytest.mark.parametrize("dtype", ORDER_OF_SUMS)
@pytest.mark.parametrize("chunk_size", (48, 256))
def test_scaled_gradient_is_off_by_a_rounding_at_most(dtype, chunk_size):
    # What was rounded for a grad_output of 1 is rounded once more when it is scaled.
    for mine, theirs, rounding in wide_errors(dtype, "spread", 0.3, chunk_size=chunk_size):
        assert mine <= ORDER_OF_SUMS[dtype] * torch.hypot(theirs, rounding)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_keeps_what_float32_sums_keep(dtype):
    # 64 chunks that all add the same to the weight's gradient: in a half type, the sum would stop
    # growing long before the last of them.
    rows, classes = 2048, 8
    input = torch.ones(rows, 4, dtype=dtype)
    layer = (input, torch.zeros(classes, 4, dtype=dtype), None)
    target = torch.zeros(rows, dtype=torch.long)
    _, _, grad, _ = ours(layer, target, chunk_size=32, reduction="sum")
    _, _, exact, _ = float64(layer, target, reduction="sum")
    torch.testing.assert_close(grad.double(), exact, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.filterwarnings("error")
def test_budget_is_not_spent_on_scratch_that_a_small_weight_does_not_take():
    # A budget as large as the most that this scratch may be: one row, if all of that were taken.
    input, weight = torch.randn(1000, 16), torch.randn(32, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), chunk_sizes() as sizes, in_chunks():
        lce(input, weight, torch.zeros(1000).long(), max_chunk_bytes=plan.TILE_BYTES)
    assert sizes == [1000]


@pytest.mark.parametrize("chunks", [{}, {"chunk_size": 7}])
def test_class_weights_whose_sum_is_beyond_float32_divide(chunks):
    input, linear_weight = torch.randn(40, FEATURES) / 9, torch.randn(CLASSES, FEATURES) / 9
    target, weight = torch.randint(CLASSES, (40,)), torch.full((CLASSES,), 5e37)
    weight[::2] = 1e38  # two of 40 add up to no more than float32 holds
    assert weight[target].sum() == math.inf
    layer, options = (input, linear_weight, None), {"weight": weight}
    exact = float64(layer, target, **options)
    with in_chunks():
        found = ours(layer, target, **options, **chunks)
    torch.testing.assert_close(found.loss.double(), exact.loss, rtol=1e-5, atol=0)
    for mine, theirs in zip(found[1:3], exact[1:3], strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-4, atol=1e-6)


@together
@needs_torchs
@pytest.mark.parametrize("shape", [name for name in SHAPES if not name.startswith("BT")])
@pytest.mark.parametrize("kind", (torch.int64, "probability"), ids=("index", "probability"))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_agrees_with_the_function_of_torch(shape, kind, reduction):
    layer, target, options = problem(shape, torch.float64, kind, bias=True)
    input, linear_weight, linear_bias = layer
    options |= {
        "linear_bias": linear_bias,
        "weight": torch.rand(CLASSES, dtype=torch.float64),
        "reduction": reduction,
        "label_smoothing": 0.1,
    }
    expected = F.linear_cross_entropy(input, linear_weight, target, **options)
    result = lce(input, linear_weight, target, **options)
    assert result.shape == expected.shape
    torch.testing.assert_close(result, expected)


@needs_torchs
def test_signature_is_that_of_torch():
    import inspect

    theirs = inspect.signature(F.linear_cross_entropy).parameters.values()
    mine = list(inspect.signature(lce).parameters.values())
    simple = [(p.name, p.kind, p.default) for p in theirs]
    assert [(p.name, p.kind, p.default) for p in mine[: len(simple)]] == simple
    assert all(p.kind is p.KEYWORD_ONLY for p in mine[len(simple) :])


def sizes_of(rows, classes=CLASSES, **options):
    input, linear_weight = torch.randn(rows, FEATURES), torch.randn(classes, FEATURES)
    with chunk_sizes() as sizes, in_chunks():
        lce(input.requires_grad_(), linear_weight, torch.zeros(rows).long(), **options)
    return sizes


# rows, chunk_size: chunks. As many as needed and of one size, but a multiple of 128 where the
# chunk may be that large; the last takes what is left.
@together
@pytest.mark.parametrize(
    "rows, size, chunks",
    [
        (10, 10, [10]),
        (10, 100, [10]),
        (10, 9, [5, 5]),
        (10, 4, [4, 4, 2]),
        (11, 1, [1] * 11),
        (1, 1, [1]),
        (0, 4, []),
        (1000, 600, [512, 488]),
        (1000, 300, [256, 256, 256, 232]),
    ],
)
def test_chunks_are_equal_and_as_small_as_asked_for(rows, size, chunks):
    assert sizes_of(rows, chunk_size=size) == chunks


@pytest.mark.parametrize("by", ["ignore_index", "sample_weight"])
def test_rows_that_do_not_count_get_no_logits(by):
    target, options = torch.randint(CLASSES, (20,)), {}
    counts = torch.arange(20) % 3 == 0
    if by == "ignore_index":
        target[~counts] = -100
    else:
        options["sample_weight"] = counts.float()
    layer, _, _ = problem()
    input = torch.randn(20, FEATURES)
    with chunk_sizes() as sizes, in_chunks():
        found = ours((input, *layer[1:]), target, chunk_size=4, **options)
    assert sizes == [4, 3]
    expected = stock((input[counts], *layer[1:]), target[counts])
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.grad_input[counts], expected.grad_input)
    torch.testing.assert_close(found.grad_linear_weight, expected.grad_linear_weight)
    assert not found.grad_input[~counts].any()


def test_budget_is_kept():
    row = 4 * CLASSES
    with pytest.warns(UserWarning, match=f"max_chunk_bytes={7 * row} leaves 7 rows"):
        assert sizes_of(20, max_chunk_bytes=7 * row) == [7, 7, 6]


def test_budget_of_less_than_a_row_is_taken():
    with pytest.warns(UserWarning, match="leaves 1 rows"):
        assert sizes_of(3, max_chunk_bytes=1) == [1, 1, 1]


@pytest.mark.filterwarnings("error")
def test_budget_that_holds_all_rows_does_not_warn():
    assert sizes_of(20, max_chunk_bytes=20 * 4 * CLASSES) == [20]


def test_same_budget_warns_once(recwarn):
    for _ in range(2):
        sizes_of(20, max_chunk_bytes=300)
    assert len(recwarn) == 1


@pytest.mark.filterwarnings("error")
def test_default_leaves_enough_rows_and_does_not_warn():
    # 100000 classes: the budget of 64 MiB holds 167 rows, fewer than are worth a pass.
    assert sizes_of(600, classes=100_000) == [256, 256, 88]


def test_default_keeps_its_budget():
    assert sizes_of(2048, classes=32_000) == [512] * 4


@together
@needs_torchs
@pytest.mark.parametrize(
    "options, size",
    [
        ({"batch_chunk_size": 6}, 6),
        ({"batch_chunk_size": 6, "chunking_method": None}, 6),
        ({"batch_chunk_size": 1000}, 40),
        ({"chunking_method": None}, 40),
        ({"chunking_method": "aspect_ratio"}, 16),
        ({"chunking_method": "aspect_ratio:4"}, 4),
        ({"chunking_method": "aspect_ratio:100"}, 1),
        ({"chunking_method": "aspect_ratio", "batch_chunk_size": 16}, 16),
        ({"acc_policy": "compact", "allow_retain_graph": True}, 40),
    ],
)
def test_chunk_size_of_the_options_is_used(options, size):
    # 40 rows of 12 features and 48 classes: a quarter of the rows, 10, and the next power of two.
    sizes = sizes_of(40, classes=48, options=nn.LinearCrossEntropyOptions(**options))
    assert sizes[0] == -(-40 // -(-40 // size))


@needs_torchs
def test_our_own_argument_comes_first():
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    assert sizes_of(9, options=options, chunk_size=3) == [3, 3, 3]


@needs_torchs
def test_contradiction_within_the_options_is_refused():
    input, target = torch.randn(40, 12), torch.zeros(40).long()
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=3, chunking_method="aspect_ratio")
    for function in (F.linear_cross_entropy, lce):
        with pytest.raises(ValueError, match="give different chunk sizes"):
            function(input, torch.randn(48, 12), target, options=options)


@pytest.mark.parametrize("chunk_size", [None, 5])  # one chunk, three
@pytest.mark.parametrize("ahead", [True, False])
def test_bfloat16_in_float32_products_is_rounded_once(ahead, chunk_size, monkeypatch):
    # As on processors whose own products of it are slow: nothing but the results is rounded.
    wide = {torch.bfloat16: torch.float32}
    monkeypatch.setitem(plan.DEVICES, "cpu", plan.DEVICES["cpu"]._replace(gemm_dtype=wide))
    layer, target, _ = problem(dtype=torch.bfloat16, bias=True)
    found = ours(layer, target, chunk_size=chunk_size, grad_in_forward=ahead)
    exact = stock([t.double() for t in layer], target)
    for mine, right in zip(found, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.double(), right, rtol=1.01 * 2**-8, atol=1e-7)


@pytest.mark.parametrize("takes", [True, False])
def test_bfloat16_is_computed_in_float32_where_onednn_does_not_take_it(takes, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: takes)
    assert plan._slow_in_gemms() == (torch.float16, torch.bfloat16)[: 2 - takes]


# Stock: nan for a mean over nothing, and gradients of exactly zero.
@together
@pytest.mark.parametrize("smoothing", (0.0, 0.1))
@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("ahead", (True, False))
def test_gradient_of_ignored_rows_is_exactly_zero(reduction, weighted, smoothing, ahead):
    layer, target, _ = problem(bias=True)
    weight = torch.rand(CLASSES) + 0.5 if weighted else None
    loss, *gradients = ours(
        layer,
        torch.full_like(target, -100),
        weight=weight,
        reduction=reduction,
        label_smoothing=smoothing,
        chunk_size=5,
        grad_in_forward=ahead,
        scale=3.0,
    )
    assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
    assert all((grad == 0).all() for grad in gradients)


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_ignored_row_is_not_used(reduction):
    # A row of nan spoils nothing of the others, nor its own gradient; in stock the weight's.
    layer, target, _ = problem()
    target[4] = -100
    expected = ours(layer, target, reduction=reduction, chunk_size=3)
    layer[0][4] = math.nan
    result = ours(layer, target, reduction=reduction, chunk_size=3)
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(result.grad_input, expected.grad_input)
    torch.testing.assert_close(result.grad_linear_weight, expected.grad_linear_weight)
    assert (result.grad_input[4] == 0).all()


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_total_weight_of_zero_is_nan(smoothing):
    layer, _, _ = problem()
    weight = torch.ones(CLASSES)
    weight[2] = 0
    arguments = (layer, torch.full((13,), 2))
    options = {"weight": weight, "label_smoothing": smoothing}
    result, expected = ours(*arguments, chunk_size=4, **options), stock(*arguments, **options)
    assert expected.loss.isnan()
    assert result.loss.isnan()
    assert result.grad_input.isnan().all()
    assert result.grad_linear_weight.isnan().all()


@together
@pytest.mark.parametrize("rows", (0, 1, 2))
@pytest.mark.parametrize("kind", (torch.int64, "probability"), ids=("index", "probability"))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("ahead", (True, False))
def test_few_and_no_rows_agree(rows, kind, reduction, ahead):
    layer, target, _ = problem(kind=kind, bias=True)
    input, *others = layer
    arguments = ((input[:rows], *others), target[:rows])
    result = ours(*arguments, reduction=reduction, chunk_size=1, grad_in_forward=ahead)
    expected = stock(*arguments, reduction=reduction)
    for value, plain in zip(result, expected, strict=True):
        torch.testing.assert_close(value, plain, equal_nan=True)


# Sizes of zero, of which reshape(-1, ...) cannot tell what is left.
@together
@pytest.mark.parametrize("batch", ((5,), (2, 3)))
@pytest.mark.parametrize("positions, features", [((), 0), ((2,), 0), ((0,), 4), ((3, 0), 4)])
@pytest.mark.parametrize("probability", (False, True))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_no_features_and_no_positions_are_taken(batch, positions, features, probability, reduction):
    shape = (CLASSES, *positions)
    layer = (torch.randn(*batch, features), torch.randn(*shape, features), torch.randn(shape))
    target = torch.randint(CLASSES, (*batch, *positions))
    if probability:
        target = torch.randn(*batch, *shape).softmax(len(batch))
    options = {"reduction": reduction, "weight": torch.rand(CLASSES), "label_smoothing": 0.1}
    result = differentiate(lce, layer, target, chunk_size=2, **options)
    torch.testing.assert_close(result, stock(layer, target, **options), equal_nan=True)


def test_target_of_one_element_for_one_row_is_taken():
    (input, linear_weight, _), target, _ = problem("H")
    options = {"reduction": "none"}
    expected = stock_loss(input, linear_weight, target, **options)
    result = lce(input, linear_weight, target.reshape(1), **options)
    assert result.shape == ()
    torch.testing.assert_close(result, expected)


@together
@pytest.mark.parametrize("order", ("transposed weight", "every second row", "expanded input"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_layout_changes_nothing(order, dtype):
    (input, linear_weight, _), target, _ = problem(dtype=dtype)
    if order == "transposed weight":
        linear_weight = linear_weight.t().contiguous().t()
    elif order == "every second row":
        input = torch.stack([input, input], 1).flatten(0, 1)[::2]
    else:
        input = input[:1].expand_as(input)
    plain = (input.contiguous(), linear_weight.contiguous(), None)

    def run(*layer):
        leaves = [t.detach().requires_grad_() for t in layer[:2]]
        loss = lce(*leaves, target, chunk_size=4)
        return loss, *torch.autograd.grad(loss, leaves)

    for value, expected in zip(run(input, linear_weight), run(*plain), strict=True):
        torch.testing.assert_close(value, expected)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(0, 40),
    st.integers(1, 9),
    st.integers(1, 30),
    st.integers(1, 45),
    st.sampled_from(("mean", "sum", "none")),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_chunks_change_nothing(rows, features, classes, chunk_size, reduction, ahead, random):
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    input = torch.randn(rows, features, dtype=torch.float64, generator=generator)
    linear_weight = torch.randn(classes, features, dtype=torch.float64, generator=generator)
    target = torch.randint(classes, (rows,), generator=generator)
    target[torch.rand(rows, generator=generator) < 0.2] = -100
    arguments = ((input, linear_weight, None), target)
    result = ours(*arguments, reduction=reduction, chunk_size=chunk_size, grad_in_forward=ahead)
    expected = stock(*arguments, reduction=reduction)
    for value, plain in zip(result, expected, strict=True):
        if value is not None:
            torch.testing.assert_close(value, plain, equal_nan=True, rtol=1e-10, atol=1e-12)


@together
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_bits_are_the_same_in_every_run(reduction, dtype):
    layer, target, _ = problem(dtype=dtype, bias=True)
    first, second = (ours(layer, target, reduction=reduction, chunk_size=5) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@together
@pytest.mark.parametrize("reduction, count", [("mean", 3), ("none", 4)])
@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True), (False, False)])
def test_frozen_tensor_costs_no_gemm(reduction, count, needs):
    (input, linear_weight, _), target, _ = problem()
    input.requires_grad_(needs[0])
    linear_weight.requires_grad_(needs[1])
    with gemms() as shapes:
        loss = lce(input, linear_weight, target, reduction=reduction)
        if any(needs):
            loss.sum().backward()
    logits = count - 2 if any(needs) else 1
    expected = logits * [(13, CLASSES)] + needs[0] * [(13, FEATURES)]
    assert sorted(shapes) == sorted(expected + needs[1] * [(CLASSES, FEATURES)])
    assert [t.grad is not None for t in (input, linear_weight)] == list(needs)


def test_no_grad_computes_no_gradient():
    (input, linear_weight, _), target, _ = problem()
    for t in (input, linear_weight):
        t.requires_grad_()
    for context in (torch.no_grad, torch.inference_mode):
        with gemms() as shapes, context():
            loss = lce(input, linear_weight, target, chunk_size=7)
        assert shapes == [(7, CLASSES), (6, CLASSES)]
        assert not loss.requires_grad
        torch.testing.assert_close(loss, stock_loss(input, linear_weight, target).detach())


# The module.


@pytest.mark.parametrize("positions", ((), (3, 2)))
@pytest.mark.parametrize("bias", (False, True))
def test_module_agrees_with_the_function(positions, bias):
    loss = fused_ce.LinearCrossEntropyLoss(
        FEATURES,
        CLASSES,
        out_features=positions,
        bias=bias,
        weight=torch.rand(CLASSES),
        label_smoothing=0.1,
        reduction="sum",
        chunk_size=2,
    )
    input, target = torch.randn(5, FEATURES), torch.randint(CLASSES, (5, *positions))
    layer = loss.linear
    shape = (CLASSES, *positions)
    with chunk_sizes() as sizes:
        result = loss(input, target)
    assert sizes == [2, 2, 1]
    result.backward()
    expected = stock_loss(
        input,
        layer.weight.reshape(*shape, FEATURES),
        target,
        linear_bias=layer.bias.reshape(shape) if bias else None,
        weight=loss.weight,
        label_smoothing=0.1,
        reduction="sum",
    )
    torch.testing.assert_close(result, expected)
    gradients = torch.autograd.grad(expected, list(layer.parameters()))
    for parameter, grad in zip(layer.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@needs_torchs
def test_module_loads_what_the_one_of_torch_saved():
    arguments = {"in_features": 4, "num_classes": 6, "bias": True, "weight": torch.rand(6)}
    theirs = nn.LinearCrossEntropyLoss(**arguments)
    mine = fused_ce.LinearCrossEntropyLoss(**arguments)
    assert isinstance(mine, nn.LinearCrossEntropyLoss)
    assert mine.load_state_dict(theirs.state_dict())
    input, target = torch.randn(3, 4), torch.tensor([0, 5, 2])
    torch.testing.assert_close(mine(input, target), theirs(input, target))
    assert mine.extra_repr() == theirs.extra_repr()


@needs_torchs
def test_signature_of_the_module_is_that_of_torch():
    import inspect

    theirs = list(inspect.signature(nn.LinearCrossEntropyLoss).parameters.values())
    mine = list(inspect.signature(fused_ce.LinearCrossEntropyLoss).parameters.values())
    simple = {p.name: (p.kind, p.default) for p in mine}
    assert {p.name: (p.kind, p.default) for p in theirs}.items() <= simple.items()


def test_module_is_the_same_where_torch_has_none(monkeypatch):
    # Without nn.LinearCrossEntropyLoss the constructor is ours; it must be the same module.
    import copy
    import importlib.util

    spec = importlib.util.find_spec("fused_ce.modules")
    monkeypatch.delattr(nn, "LinearCrossEntropyLoss", raising=False)
    older = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(older)
    torch.manual_seed(0)
    loss = older.LinearCrossEntropyLoss(4, 6, bias=True, weight=torch.rand(6), ignore_index=2)
    torch.manual_seed(0)
    now = fused_ce.LinearCrossEntropyLoss(4, 6, bias=True, weight=torch.rand(6), ignore_index=2)
    assert repr(loss).replace(", ", ",").split(",") == repr(now).replace(", ", ",").split(",")
    assert loss.state_dict().keys() == now.state_dict().keys()
    input, target = torch.randn(3, 4), torch.tensor([0, 5, 2])
    torch.testing.assert_close(copy.deepcopy(loss)(input, target), now(input, target))
    for wrong in ({"weight": torch.ones(5)}, {"label_smoothing": 1.5}, {"label_smoothing": -0.1}):
        texts = []
        for module in (older, fused_ce):
            with pytest.raises(RuntimeError) as error:
                module.LinearCrossEntropyLoss(4, 6, **wrong)
            texts.append(str(error.value))
        assert texts[0] == texts[1]


@pytest.mark.parametrize("grad_in_forward", [True, False])
def test_warning_of_small_chunks_names_the_line_that_called(grad_in_forward):
    layer = torch.randn(300, 4), torch.randn(30, 4, requires_grad=True)
    options = {"max_chunk_bytes": 1000, "grad_in_forward": grad_in_forward}
    with pytest.warns(UserWarning, match="max_chunk_bytes=1000 leaves 8 rows") as caught:
        lce(*layer, torch.randint(30, (300,)), **options).backward()
    assert [warning.filename for warning in caught] == [__file__]
