"""Any strides, without a copy of the logits and without a wrong element.

Crosses memory layouts with dtypes, targets, reductions and modes. Also guards the layout of what
comes back: a dense input's gradient has its strides and any other a contiguous one, so that a
leaf's `.grad` has stock's; in place nothing outside the logits' own elements is written.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.devices import every_device
from support.grids import DTYPES, KINDS, MODES, SHAPES, cases_of, every_reduction, together
from support.layouts import (
    GEOMETRIES,
    LAYOUTS,
    OVERLAPPING,
    gaps_are_untouched,
    is_dense,
    lay_out,
    target_of,
)
from support.reference import check_against_stock, differentiate, ours, stock

import fused_ce

pytestmark = every_device

AXES = {
    "geometry": GEOMETRIES,
    "dtype": DTYPES,
    # The widths of an index do not meet the logits' layout; test_parity.py has all of them.
    "kind": (torch.int64, torch.uint8, "probability"),
    "mode": tuple(MODES),
    # One number a row, or one for all of them.
    "reduction": ("mean", "none"),
    # 5: less than a vector. 67: four vectors of floats and three classes.
    "classes": (5, 67),
    "weighted and smooth": (False, True),
}


def is_possible(case):
    # In place, logits that overlap raise: see test_modes.py.
    _, layout = case.get("geometry", (None, None))
    return not (layout in OVERLAPPING and case.get("mode") == "in place")


@together
@pytest.mark.parametrize("case", cases_of(AXES, often=2, seldom=3, valid=is_possible))
def test_any_layout_of_the_logits_agrees_with_stock(case):
    (shape, layout), dtype, classes = case["geometry"], case["dtype"], case["classes"]
    options = {"reduction": case["reduction"]}
    if case["weighted and smooth"]:
        # The weight is itself a column of a wider table, with a stride of 2.
        options |= {"weight": torch.rand(classes, 2).to(dtype)[:, 0], "label_smoothing": 0.1}
    input = lay_out(torch.randn(SHAPES[shape](classes)).mul(3).to(dtype), layout)
    target = target_of(case["kind"], input.shape, dtype)
    result = check_against_stock(
        input,
        target,
        mode=case["mode"],
        scale=0.25,
        target_grad=case["kind"] == "probability" and case["mode"] != "no grad",
        **options,
    )
    if case["mode"] in ("default", "recompute"):
        gradient = result.grad_input
        assert is_dense(gradient)
        if is_dense(input):
            assert _meaningful_strides(gradient) == _meaningful_strides(input)
        else:
            assert gradient.is_contiguous()


def _meaningful_strides(tensor):
    return [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]


@together
@pytest.mark.parametrize(
    "shape, layout, mode",
    [
        (*geometry, mode)
        for geometry in GEOMETRIES
        for mode in ("default", "recompute", "in place")
        if is_possible({"geometry": geometry, "mode": mode})
    ],
)
def test_grad_of_a_leaf_has_the_strides_of_stock(shape, layout, mode):
    values = torch.randn(SHAPES[shape](5))
    target = target_of(torch.int64, values.shape, torch.float32)
    leaves = [lay_out(values, layout).requires_grad_() for _ in range(2)]
    fused_ce.cross_entropy(leaves[0], target, **MODES[mode]).backward()
    F.cross_entropy(leaves[1], target).backward()
    grads = [leaf.grad for leaf in leaves]
    assert _meaningful_strides(grads[0]) == _meaningful_strides(grads[1])
    torch.testing.assert_close(*grads)


@together
@pytest.mark.parametrize("shape, layout", [g for g in GEOMETRIES if g[1] not in OVERLAPPING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_in_place_writes_nothing_beside_the_logits(shape, layout, dtype, reduction):
    input = lay_out(torch.randn(SHAPES[shape](67)).to(dtype), layout).requires_grad_()
    target = target_of(torch.int64, input.shape, dtype)
    (expected,) = differentiate(F.cross_entropy, input, target, reduction=reduction)[1:2]
    loss = fused_ce.cross_entropy(input, target, reduction=reduction, inplace=True)
    multiples = torch.arange(loss.numel()).remainder(5) - 1.5 if loss.dim() else torch.ones(1)
    loss.backward(multiples.to(dtype).view(loss.shape))
    assert gaps_are_untouched(input.detach())
    tolerance = {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps}
    torch.testing.assert_close(input.detach(), expected, **tolerance)


RUNS = {
    # Short maps, several to a tile, the last tile with fewer: 64 rows that are one run of memory,
    # 24 whose longer side is the outer one, and 17, no multiple of a vector.
    "positions": ((8, 8), (12, 2), (17,)),
    "layout": ("contiguous", "every second element", "classes last", "reversed axes"),
    "dtype": DTYPES,
    # Of the targets, the layout too: what lies one way in the logits lies another way here.
    "kind": (torch.int64, *(f"probability, {each}" for each in ("contiguous", "classes last"))),
    "target type": ("the logits'", torch.bfloat16),
    "mode": tuple(MODES),
    "reduction": ("mean", "none"),
    # 70: more than are taken side by side where the classes are adjacent.
    "classes": (2, 19, 70),
    "weighted and smooth": (False, True),
}


def is_exact(case):
    # Stock smoothes a target in the target's own type, and in float64 it is the reference itself.
    of_type, dtype = case.get("target type"), case.get("dtype")
    rounds = of_type == torch.bfloat16 and dtype == torch.float64
    return not (rounds and case.get("weighted and smooth"))


@together
@pytest.mark.parametrize("case", cases_of(RUNS, often=2, seldom=3, valid=is_exact))
@pytest.mark.not_on_simulator
def test_tiles_of_several_runs_of_rows_agree_with_stock(case):
    shape, dtype = (75, case["classes"], *case["positions"]), case["dtype"]
    options = {"reduction": case["reduction"]}
    if case["weighted and smooth"]:
        options |= {"weight": torch.rand(case["classes"]).to(dtype), "label_smoothing": 0.1}
    input = lay_out(torch.randn(shape).mul(3).to(dtype), case["layout"])
    if case["kind"] == torch.int64:
        target = target_of(torch.int64, shape, dtype, ignore_index=-100)
    else:
        kind, layout = case["kind"].split(", ")
        of_type = dtype if case["target type"] == "the logits'" else case["target type"]
        target = lay_out(target_of(kind, shape, of_type), layout)
    check_against_stock(
        input,
        target,
        mode=case["mode"],
        scale=0.25,
        target_grad=case["kind"] != torch.int64 and case["mode"] != "no grad",
        **options,
    )


@together
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("place", [(0, 0, 1), (5, 7, 0), (74, 7, 7)], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.not_on_simulator
def test_a_target_out_of_range_is_found_in_any_run_of_a_tile(weighted, place, mode):
    input = lay_out(torch.randn(75, 3, 8, 8), "every second element")
    target = torch.randint(3, (8, 8, 75)).permute(2, 0, 1)  # no tile is one run in it
    target[place] = 3
    with pytest.raises(IndexError, match="Target 3 is out of bounds"):
        ours(input, target, mode=mode, weight=torch.rand(3) if weighted else None)


@pytest.mark.parametrize("layout", ["every second element", "classes last"])
@pytest.mark.parametrize("kind", [torch.int64, "probability"], ids=str)
@pytest.mark.not_on_simulator
def test_tiles_of_several_runs_have_the_same_bits_for_any_number_of_threads(layout, kind):
    torch.manual_seed(0)
    input = lay_out(torch.randn(300, 3, 8, 8), layout)
    target = target_of(kind, input.shape, torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ours(input, target, target_grad=kind == "probability"))
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            assert one is None or torch.equal(one, other)


# Only probabilities are many numbers to a row.
@together
@pytest.mark.parametrize(
    "kind",
    [*KINDS[:-1], pytest.param("probability", marks=pytest.mark.on_simulator)],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_the_target_agrees_with_stock(kind, layout):
    if kind != "probability":
        # Index targets have no class axis: lay out a tensor that has, and take one class of it.
        def target_in(layout, shape):
            classes = shape[1]
            values = torch.randint(0, classes, shape).double()
            return lay_out(values, layout).nan_to_num(0).to(kind)[:, 0]
    else:

        def target_in(layout, shape):
            return lay_out(torch.rand(shape), layout)

    for shape in LAYOUTS[layout][1]:
        if shape == "C":
            continue
        input = torch.randn(SHAPES[shape](19))
        for mode in ("default", "recompute", "in place"):
            check_against_stock(
                input,
                target_in(layout, input.shape),
                mode=mode,
                target_grad=kind == "probability",
                label_smoothing=0.1,
            )


# Classes that one thread may have to add up by itself: 150 as in segmentation, 4000 far beyond it.
@pytest.mark.parametrize("classes", [150, 4000])
@pytest.mark.parametrize("kind", [torch.int64, "probability"], ids=str)
@pytest.mark.on_simulator
def test_many_strided_classes_keep_their_digits(kind, classes):
    input = torch.randn(1, classes, 24)
    targets = [target_of(kind, input.shape, torch.float32)]
    if kind == "probability":
        targets.append(torch.rand(input.shape))  # a mass far from 1
    for target in targets:
        for mode in MODES:
            for label_smoothing in (0.0, 0.1):
                check_against_stock(
                    input, target, mode=mode, reduction="none", label_smoothing=label_smoothing
                )


@every_reduction
def test_expanded_and_strided_index_targets_are_read_right(reduction):
    input = torch.randn(6, 5, 4)
    targets = {
        "one for all rows": torch.randint(0, 5, (1, 4)).expand(6, 4),
        "one for all": torch.tensor(3).expand(6, 4),
        "transposed": torch.randint(0, 5, (4, 6)).t(),
        "every second": torch.randint(0, 5, (6, 8))[:, ::2],
        "odd offset": torch.randint(0, 5, (25,))[1:].view(6, 4),
    }
    for target in targets.values():
        for kind in (torch.int64, torch.int32, torch.uint8):
            index = target if kind == torch.int64 else target.to(kind)
            for mode in MODES:
                check_against_stock(input, index, mode=mode, reduction=reduction)


@together
@pytest.mark.parametrize("weight", ["every second", "expanded", "odd offset"])
@pytest.mark.parametrize("kind", [torch.int64, "probability"], ids=str)
def test_strided_weight_is_read_right(weight, kind):
    weight = {
        "every second": torch.rand(34)[::2],
        "expanded": torch.tensor(0.5).expand(17),
        "odd offset": torch.rand(18)[1:],
    }[weight]
    input = torch.randn(6, 17)
    target = target_of(kind, input.shape, torch.float32)
    for mode in MODES:
        check_against_stock(input, target, mode=mode, weight=weight, label_smoothing=0.1)


@st.composite
def strided_views(draw):
    """A view of nan-filled storage: any order of axes, any step and offset along each of them."""
    rank = draw(st.integers(1, 5))
    shape = [draw(st.integers(1, 4)) for _ in range(rank)]
    shape[0 if rank == 1 else 1] = draw(st.integers(1, 20))
    order = draw(st.permutations(range(rank)))
    steps = [draw(st.integers(1, 3)) for _ in range(rank)]
    starts = [draw(st.integers(0, 2)) for _ in range(rank)]
    sizes = [start + step * size for start, step, size in zip(starts, steps, shape, strict=True)]
    base = torch.full([sizes[axis] for axis in order], torch.nan)
    inverse = [order.index(axis) for axis in range(rank)]
    index = tuple(slice(start, None, step) for start, step in zip(starts, steps, strict=True))
    view = base.permute(inverse)[index]
    torch.manual_seed(draw(st.integers(0, 2**16)))
    return view.copy_(torch.randn(shape))


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(
    view=strided_views(),
    mode=st.sampled_from(sorted(MODES)),
    kind=st.sampled_from([torch.int64, "probability"]),
    reduction=st.sampled_from(["mean", "none"]),
)
def test_any_view_gets_the_same_loss_and_gradient(view, mode, kind, reduction):
    target = target_of(kind, view.shape, torch.float32)
    # Is it the right element? How exact it is, the other tests ask: in a row of three classes
    # stock's error is a matter of luck, and no measure for ours.
    options = {"reduction": reduction, "label_smoothing": 0.1}
    result, expected = ours(view, target, mode=mode, **options), stock(view, target, **options)
    for value, reference in zip(result[:2], expected[:2], strict=True):
        if value is not None:
            torch.testing.assert_close(value, reference)


def test_unreduced_loss_of_a_permuted_input_is_laid_out_as_in_stock():
    target = torch.randint(0, 5, (2, 3, 4))
    for layout in ("channels_last", "reversed axes", "classes last"):
        input = lay_out(torch.randn(2, 5, 3, 4), layout)
        loss = ours(input, target, mode="no grad", reduction="none").loss
        assert loss.stride() == F.cross_entropy(input, target, reduction="none").stride()
