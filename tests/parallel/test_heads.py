"""A head whose classes are sharded has the loss and the gradients of the whole one.

The ranks are threads, as in test_ranks.py; what the chunks give is compared in float64 with the
whole layer and torch's loss, and in the half types with the head on one rank.
"""

import collections
import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.composed import composed
from support.grids import REDUCTIONS, cases_of, together
from support.ranks import errors_of, in_ranks

import fused_ce
from fused_ce.parallel import collectives, linear

FEATURES, CLASSES = 6, 11
# Of 11 classes on so many ranks, how many columns follow that are none.
PADDED = {1: 0, 3: 0, 4: 1, 5: 0}
AXES = {
    "ranks": tuple(PADDED),  # of five the last has no class; of four all have three columns
    "batch": ((50,), (5, 10), ()),
    "positions": ((), (3,)),
    "kind": ("index", "probability"),
    "reduction": REDUCTIONS,
    "weighted": (False, True),
    "bias": (False, True),
    "grad_in_forward": (True, False),
    "options": ("none", "smoothed", "mapped", "focal"),
}
OPTIONS = {
    "none": {},
    "smoothed": {"label_smoothing": 0.1, "z_loss": 0.01},
    "mapped": {"logit_scale": 0.5, "softcap": 3.0},
    "focal": {"focal_gamma": 1.5},
}
ROWS = 16  # of a chunk, so that there are several


def is_valid(case):
    if case.get("batch") == () and case.get("positions"):
        return False  # torch has no such loss
    return not (case.get("kind") == "probability" and case.get("options") == "focal")


def problem(batch=(50,), positions=(), kind="index", dtype=torch.float64):
    input = torch.randn(*batch, FEATURES).to(dtype)
    weight = torch.randn(CLASSES, *positions, FEATURES).to(dtype)
    bias = torch.randn(CLASSES, *positions).to(dtype)
    if kind == "probability":
        return input, weight, bias, torch.rand(*batch, CLASSES, *positions).to(dtype)
    target = torch.randint(0, CLASSES, (*batch, *positions))
    if target.dim():
        target.view(-1)[::3] = -100
    return input, weight, bias, target


def own(tensor, rank, ranks, dim=0):
    """This rank's classes, and padding."""
    part = -(-CLASSES // ranks)
    first, end = (min(CLASSES, part * r) for r in (rank, rank + 1))
    found = tensor.narrow(dim, first, end - first)
    shape = list(found.shape)
    shape[dim] = min(PADDED[ranks], part - (end - first))
    return torch.cat([found, found.new_full(shape, 0.5)], dim).detach()


def whole(parts, ranks):
    part = -(-CLASSES // ranks)
    return torch.cat(
        [p[: max(0, min(CLASSES, part * (r + 1)) - part * r)] for r, p in enumerate(parts)]
    )


def run(ranks, input, weight, bias, target, class_weight=None, **call):
    """The loss of the first rank, and the gradients of input, weight and bias."""
    call["weight"] = class_weight
    probabilities = target.is_floating_point()

    def of_rank(rank):
        layer = [input.detach().clone()]
        layer += [None if t is None else own(t, rank, ranks) for t in (weight, bias)]
        for tensor in layer:
            if tensor is not None:
                tensor.requires_grad_()
        of_classes = input.dim() - 1
        own_target = own(target, rank, ranks, of_classes) if probabilities else target
        place = {"process_group": dist.group.WORLD, "num_classes": CLASSES}
        loss = fused_ce.linear_cross_entropy(
            layer[0], layer[1], own_target, linear_bias=layer[2], **place, **call
        )
        loss.backward(torch.full_like(loss, -2.0))
        return loss.detach(), *(None if t is None else t.grad for t in layer)

    losses, inputs, weights, biases = zip(*in_ranks(ranks, of_rank), strict=True)
    for loss, grad in zip(losses, inputs, strict=True):
        assert torch.equal(loss, losses[0]) and torch.equal(grad, inputs[0])
    return (
        losses[0],
        inputs[0],
        whole(weights, ranks),
        None if bias is None else whole(biases, ranks),
    )


def exact(input, weight, bias, target, class_weight, **options):
    """By the whole layer."""
    layer = [
        None if t is None else t.detach().clone().double().requires_grad_()
        for t in (input, weight, bias)
    ]
    batch, (classes, *positions) = input.shape[:-1], weight.shape[:-1]
    logits = F.linear(
        layer[0], layer[1].flatten(0, -2), None if bias is None else layer[2].flatten()
    )
    logits = logits.reshape(-1, classes, *positions) if batch else logits
    rows = target
    if len(batch) > 1:
        rows = target.reshape(len(logits), *target.shape[len(batch) :])
    loss = composed(logits, rows, class_weight, **options)
    loss.backward(torch.full_like(loss, -2.0))
    return loss.detach(), *(None if t is None else t.grad for t in layer)


@together
@pytest.mark.parametrize("case", cases_of(AXES, often=2, seldom=3, valid=is_valid))
def test_chunks_of_a_shard_are_those_of_the_whole(case):
    input, weight, bias, target = problem(case["batch"], case["positions"], case["kind"])
    if not case["bias"]:
        bias = None
    options = {"reduction": case["reduction"], **OPTIONS[case["options"]]}
    of_class = torch.rand(CLASSES, dtype=torch.float64) + 0.5 if case["weighted"] else None
    found = run(
        case["ranks"],
        input,
        weight,
        bias,
        target,
        of_class,
        grad_in_forward=case["grad_in_forward"],
        chunk_size=ROWS,
        **options,
    )
    expected = exact(input, weight, bias, target, of_class, **options)
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is not None:
            theirs = theirs.reshape(ours.shape)
            torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"on_out_of_range": "nan"}], ids=str)
def test_a_mean_divides_by_the_weights_of_the_targets_on_all_ranks(options):
    input, weight, bias, target = problem()
    of_class = torch.rand(CLASSES, dtype=torch.float64) + 0.5
    found = run(4, input, weight, bias, target, of_class, chunk_size=ROWS, **options)
    expected = exact(input, weight, bias, target, of_class)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_types_are_as_near_as_on_one_rank(dtype):
    input, weight, bias, target = problem(dtype=dtype)
    expected = exact(input, weight, bias, target, None)
    one, four = (run(ranks, input, weight, bias, target, chunk_size=ROWS) for ranks in (1, 4))
    for alone, sharded, theirs in zip(one, four, expected, strict=True):
        error = (alone.double() - theirs).norm()
        ulp = torch.finfo(dtype).eps * theirs.norm()
        assert (sharded.double() - theirs).norm() <= error + ulp


def test_a_framework_may_sum_the_gradient_of_the_input():
    input, weight, bias, target = problem()
    expected = exact(input, weight, bias, target, None)[1] / -2

    def of_rank(rank):
        hidden = input.clone().requires_grad_()
        place = {"process_group": dist.group.WORLD, "num_classes": CLASSES}
        loss = fused_ce.linear_cross_entropy(
            hidden,
            own(weight, rank, 3),
            target,
            linear_bias=own(bias, rank, 3),
            reduce_input_grad=False,
            **place,
        )
        loss.backward()
        return hidden.grad

    torch.testing.assert_close(sum(in_ranks(3, of_rank)), expected)


@pytest.mark.parametrize("reduce_input_grad", [True, False])
@pytest.mark.parametrize("name", ["logit_scale", "sample_weight", "denominator"])
def test_options_that_require_grad_have_the_gradient_of_the_whole(name, reduce_input_grad):
    input, weight, bias, target = problem()
    value = torch.rand(50) if name == "sample_weight" else torch.tensor(0.7)
    learned = value.double().requires_grad_()
    composed(F.linear(input, weight, bias), target, **{name: learned}).backward()

    def of_rank(rank):
        given = value.double().requires_grad_()
        place = {"process_group": dist.group.WORLD, "num_classes": CLASSES}
        layer = input.clone().requires_grad_(), own(weight, rank, 3)
        call = {name: given, "linear_bias": own(bias, rank, 3), **place}
        call["reduce_input_grad"] = reduce_input_grad
        fused_ce.linear_cross_entropy(*layer, target, **call).backward()
        return given.grad

    for grad in in_ranks(3, of_rank):
        torch.testing.assert_close(grad, learned.grad)


@pytest.mark.parametrize("grad_in_forward", [True, False])
def test_derivatives_of_second_order_are_those_of_the_whole(grad_in_forward):
    input, weight, _, target = problem()
    layer = [t.clone().requires_grad_() for t in (input, weight)]
    loss = F.cross_entropy(F.linear(*layer), target, label_smoothing=0.1)
    (first,) = torch.autograd.grad(loss, layer[0], create_graph=True)
    expected = torch.autograd.grad(first.square().sum(), layer)

    def of_rank(rank):
        layer = [t.requires_grad_() for t in (input.clone(), own(weight, rank, 3))]
        place = {"process_group": dist.group.WORLD, "num_classes": CLASSES}
        call = {"label_smoothing": 0.1, "grad_in_forward": grad_in_forward, **place}
        loss = fused_ce.linear_cross_entropy(*layer, target, **call)
        (first,) = torch.autograd.grad(loss, layer[0], create_graph=True)
        return torch.autograd.grad(first.square().sum(), layer)

    inputs, weights = zip(*in_ranks(3, of_rank), strict=True)
    torch.testing.assert_close(inputs[0], expected[0])
    torch.testing.assert_close(whole(weights, 3), expected[1])


def test_what_travels(monkeypatch):
    input, weight, _, target = problem()
    counts = collections.Counter()

    def counted(name):
        function = getattr(collectives, name)

        def count(*call):
            counts[name] += 1
            return function(*call)

        for module in (collectives, linear):
            monkeypatch.setattr(module, name, count)

    counted("started_gather")
    counted("started_sum")

    def of_one(needs_gradient):
        place = {"process_group": dist.group.WORLD, "num_classes": CLASSES, "chunk_size": ROWS}
        layer = input.clone().requires_grad_(), own(weight, 0, 1)
        with torch.set_grad_enabled(needs_gradient):
            loss = fused_ce.linear_cross_entropy(*layer, target, **place)
        if needs_gradient:
            loss.backward()

    # What the ranks agree on; of four chunks the statistics, and the gradient of the input.
    in_ranks(1, lambda rank: of_one(True))
    assert counts == {"started_gather": 1 + 4, "started_sum": 4}
    counts.clear()
    in_ranks(1, lambda rank: of_one(False))
    assert counts == {"started_gather": 1 + 1}


@pytest.mark.filterwarnings("ignore:fused_ce. max_chunk_bytes=")
def test_chunks_follow_from_what_all_ranks_know():
    # Rank 2 has one class for the others' five: chunks of its own would have other rows.
    input, weight, _, target = problem()

    def of_rank(rank):
        ends = (5, 10, CLASSES)
        first = (0, *ends)[rank]
        place = {"process_group": dist.group.WORLD, "num_classes": CLASSES, "class_offset": first}
        part = weight[first : ends[rank]]
        budget = {"max_chunk_bytes": 20 * 8 * 8}
        said = fused_ce.explain_linear(input, part, target, **place, **budget)
        return said, fused_ce.linear_cross_entropy(input, part, target, **place, **budget)

    found = in_ranks(3, of_rank)
    assert len({said.partition("chunks of")[0] for said, _ in found}) == 1
    torch.testing.assert_close(found[0][1], F.cross_entropy(F.linear(input, weight), target))


@together
@pytest.mark.parametrize("focal_gamma", [0.0, 2.0])  # the chunks, and the formula
@pytest.mark.parametrize(
    "change, says",
    [
        ({"label_smoothing": 2.0}, "rank 2 refused its arguments"),
        ({"softcap": -1.0}, "rank 2 refused its arguments"),
        ({"chunk_size": 0}, "rank 2 refused its arguments"),
        ({"num_classes": 12}, "the options of rank 2 differ"),
        ({"class_offset": 7}, "of rank 2 should begin at 8"),
        # Their mean divides by another number, too.
        ({"target": torch.arange(50) % CLASSES}, "of rank 2 differ from those of rank 0"),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_every_rank_raises(change, says, focal_gamma):
    input, weight, _, target = problem()

    def of_rank(rank):
        call = {"target": target, "process_group": dist.group.WORLD, "num_classes": CLASSES}
        if rank == 2:
            call |= change
        target_ = call.pop("target")
        return fused_ce.linear_cross_entropy(
            input, own(weight, rank, 3), target_, focal_gamma=focal_gamma, **call
        )

    *others, _ = errors_of(3, of_rank)
    for kind, text in others:
        assert kind is ValueError and says in text


def test_every_rank_raises_for_a_target_that_is_no_class():
    input, weight, _, target = problem()
    target[1] = CLASSES

    def of_rank(rank):
        place = {"process_group": dist.group.WORLD, "num_classes": CLASSES}
        return fused_ce.linear_cross_entropy(input, own(weight, rank, 3), target, **place)

    assert errors_of(3, of_rank) == [(IndexError, f"Target {CLASSES} is out of bounds.")] * 3


def test_a_module_has_the_classes_of_its_rank():
    input, weight, bias, target = problem()
    expected = fused_ce.linear_cross_entropy(input, weight, target, linear_bias=bias)

    def of_rank(rank):
        call = {"bias": True, "dtype": torch.float64, "process_group": dist.group.WORLD}
        head = fused_ce.LinearCrossEntropyLoss(FEATURES, CLASSES, **call)
        own_weight, own_bias = own(weight, rank, 3), own(bias, rank, 3)
        head.load_state_dict({"linear.weight": own_weight, "linear.bias": own_bias})
        assert copy.deepcopy(head).process_group is head.process_group
        return head(input, target)

    for loss in in_ranks(3, of_rank):
        torch.testing.assert_close(loss, expected)
