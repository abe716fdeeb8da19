"""Heads of several batch dimensions take targets in whatever memory they are.

Probabilities that no view makes one batch dimension of, as `probabilities[:, 1:]`, reach the chunks
row by row; test_linear_memory.py has what they take.
"""

import pytest
import torch
from support.grids import cases_of, together
from support.linear_reference import WAYS, differentiate, in_chunks, ours, stock, stock_loss

import fused_ce
from fused_ce import linear_cross_entropy as lce
from fused_ce.linear import targets

FEATURES, CLASSES = 4, 6
# name: from dense targets of one more than is asked for in each batch dimension, (4, 8, 3, ...),
# those of a call
LAYOUTS = {
    "dense": lambda t: t.clone()[0],
    "next token": lambda t: t[0, :, 1:],
    "every other": lambda t: t[0, ::2, :2],
    "transposed": lambda t: t[0].transpose(0, 1),
    "three dimensions": lambda t: t[1:, ::2, 1:],
    "three in another order": lambda t: t.permute(2, 0, 1, *range(3, t.dim()))[:, 1:],
    "dimensions of 1": lambda t: t[:1, ::3, :, None].transpose(0, 3),
    "a single row": lambda t: t[:1, :1],
    "expanded": lambda t: t[0, 0].expand(5, *t.shape[2:]),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def problem(layout, kind="probability", positions=(), dtype=torch.float32):
    """Input, weight and no bias, and a target in that layout."""
    shape = (4, 8, 3, CLASSES, *positions)
    dense = torch.randn(shape).softmax(3).to(dtype)
    dims = LAYOUTS[layout](dense).dim() - 1 - len(positions)
    target = LAYOUTS[layout](torch.randint(CLASSES, shape[:3] + positions))
    if kind == "probability":
        target = LAYOUTS[layout](dense)
    input = torch.randn(*target.shape[:dims], FEATURES).to(dtype)
    weight = torch.randn(CLASSES, *positions, FEATURES).to(dtype)
    return (input, weight, None), target


AXES = {
    "layout": tuple(LAYOUTS),
    "kind": ("index", "probability"),
    "positions": ((), (2,)),
    # A row, parts of the inner dimensions, more than one of the outer, all.
    "rows": (1, 2, 5, 7, 1000),
    "reduction": ("mean", "none"),
    "way": tuple(WAYS),
}


@together
@pytest.mark.parametrize("case", cases_of(AXES, often=2, seldom=3))
def test_targets_in_any_memory_give_the_same_loss(case):
    layout, kind, positions, rows, reduction, way = case.values()
    layer, target = problem(layout, kind, positions)
    before = target.clone()
    result = ours(layer, target, chunk_size=rows, reduction=reduction, scale=0.3, **WAYS[way])
    torch.testing.assert_close(result, stock(layer, target, reduction=reduction, scale=0.3))
    assert torch.equal(target, before)


def test_narrow_sums_find_the_most_probable_classes_of_each_row():
    # In bfloat16 these rows are asked for twice a chunk.
    layer, target = problem("next token", dtype=torch.bfloat16)
    dense = target.contiguous()
    result = ours(layer, target, chunk_size=5)
    torch.testing.assert_close(result, ours(layer, dense, chunk_size=5), rtol=0, atol=0)


@together
@every_layout
def test_only_what_no_view_flattens_keeps_its_dimensions(layout):
    target = LAYOUTS[layout](torch.rand(4, 8, 3, CLASSES))
    dims = target.dim() - 1
    found = targets.flattened(target, dims)
    try:
        expected = target.view(-1, CLASSES)
    except RuntimeError:
        assert found.dim() > 2
    else:
        assert found.shape == expected.shape
    assert found.data_ptr() == target.data_ptr()
    assert targets.example(found, target[..., 0].numel()).shape == target.reshape(-1, CLASSES).shape
    flat = targets.of_one_dimension(found, target[..., 0].numel())
    assert torch.equal(flat, target.reshape(-1, CLASSES))


@together
@every_layout
def test_rows_are_those_of_the_flat_target(layout):
    target = LAYOUTS[layout](torch.rand(4, 8, 3, CLASSES))
    flat, dims = target.reshape(-1, CLASSES), target.dim() - 1
    inner = target.shape[dims - 1]
    found = targets.Rows(target, dims)
    for start in range(len(flat)):
        for stop in range(start + 1, len(flat) + 1):
            part = found[start:stop]
            assert torch.equal(part, flat[start:stop])
            within_one = start // inner == (stop - 1) // inner
            if within_one:  # then it is a view
                assert part.untyped_storage().data_ptr() == target.untyped_storage().data_ptr()


def test_wrong_shape_is_refused_in_any_memory():
    (input, weight, _), target = problem("next token")
    for wrong in (target[:, :-1], target[..., :-1], target.transpose(0, 1)):
        with pytest.raises(RuntimeError, match="expected target of shape"):
            lce(input, weight, wrong)


def test_stock_is_given_the_flat_target():
    # What differentiates further, and a target with a gradient, holds all logits.
    layer, target = problem("next token", dtype=torch.float64)
    results = []
    for function in (lce, stock_loss):
        leaves = [t.clone().requires_grad_() for t in layer[:2]]
        of_target = target.detach().requires_grad_()
        loss = function(*leaves, of_target)
        first = torch.autograd.grad(loss, [*leaves, of_target])
        loss = function(*leaves, target)
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)
        results.append((*first, *gradients, *second))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dynamic", [False, True])
def test_graph_takes_targets_in_any_memory(dynamic):
    torch._dynamo.reset()
    function = torch.compile(lce, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for layout in ("next token", "transposed", "three dimensions"):
        layer, target = problem(layout)
        result = differentiate(function, layer, target, chunk_size=5)
        torch.testing.assert_close(result, differentiate(stock_loss, layer, target))


@pytest.mark.filterwarnings("ignore:fused_ce. max_chunk_bytes")
def test_explained_chunks_are_those_that_are_computed():
    # Of 16 rows, each of which takes 6 * 4 bytes of logits, and as much for a copy of its target.
    (input, weight, _), target = problem("next token")
    said = [
        fused_ce.explain_linear(input, weight, t, max_chunk_bytes=240)
        for t in (target, target.contiguous())
    ]
    assert "4 chunks of 4 rows" in said[0] and "2 chunks of 8 rows" in said[1]
    with in_chunks():
        lce(input, weight, target, max_chunk_bytes=240)
