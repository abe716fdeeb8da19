"""The loss over a process group is that of the whole vocabulary, on every rank.

The ranks are threads. That the operators are right, and how near to float64, is shown in
test_shards.py; what a rank's call gives is held against them bit by bit.
"""

import copy
import pickle
import re

import pytest
import torch
import torch.distributed as dist
from support.composed import composed
from support.grids import REDUCTIONS, cases_of, together
from support.ranks import errors_of, in_ranks
from support.reference import incoming_gradient
from support.shards import at, evenly, sharded
from torch.distributed.tensor.debug import CommDebugMode

import fused_ce
from fused_ce import ops
from fused_ce.parallel import collectives

CLASSES = 11
# What the ranks have of 11 classes, how many columns that are none follow, and what a call says.
PARTITIONS = {
    "one rank": (evenly(CLASSES, 1), 0, {}),
    "even": (evenly(CLASSES, 3), 0, {"num_classes": CLASSES}),
    "an empty one": (evenly(CLASSES, 5), 0, {"num_classes": CLASSES}),  # 3, 3, 3, 2 and 0
    "padded": (at(5, 10, 11), [0, 0, 4], {"num_classes": CLASSES}),
    "uneven": (at(7, 8, 11), [0, 0, 2], {"num_classes": CLASSES, "class_offset": True}),
}
AXES = {
    "partition": tuple(PARTITIONS),
    "shape": ((5, CLASSES), (CLASSES,), (2, CLASSES, 3)),
    "kind": ("index", "probability"),
    "dtype": (torch.float32, torch.float64, torch.bfloat16),
    "reduction": REDUCTIONS,
    "inplace": (None, True, "auto"),
    "weighted": (None, "whole", "own"),
    "options": ("none", "smoothed", "mapped"),
}
OPTIONS = {
    "none": {},
    "smoothed": {"label_smoothing": 0.1, "z_loss": 0.01},
    "mapped": {"logit_scale": 0.5, "softcap": 3.0},
}


def problem(shape, kind="index", dtype=torch.float64):
    axis = 1 if len(shape) > 1 else 0
    input = torch.randn(shape).to(dtype)
    if kind == "probability":
        return input, torch.randn(shape).softmax(axis).to(dtype)
    target = torch.randint(0, shape[axis], [n for d, n in enumerate(shape) if d != axis])
    if target.dim():
        target.view(-1)[1] = -100
    return input, target


class Partition:
    """What each rank passes on."""

    def __init__(self, name):
        self.bounds, padding, self.call = PARTITIONS[name]
        self.paddings = padding if isinstance(padding, list) else [padding] * len(self.bounds)
        self.ranks = len(self.bounds)

    def own(self, tensor, rank, axis):
        first, end = self.bounds[rank]
        part = tensor.narrow(axis, first, end - first)
        shape = list(part.shape)
        shape[axis] = self.paddings[rank]
        return torch.cat([part, part.new_full(shape, torch.nan)], axis).detach()

    def place(self, rank):
        place = dict(self.call, process_group=dist.group.WORLD)
        if "class_offset" in place:
            place["class_offset"] = self.bounds[rank][0]
        return place

    def whole(self, parts, axis):
        """The classes of what each rank has."""
        owned = zip(parts, self.bounds, strict=True)
        return torch.cat([part.narrow(axis, 0, end - a) for part, (a, end) in owned], axis)


def run(partition, input, target, *, weight=None, own_weight=False, loss=None, **options):
    """Loss, gradient and gradient of probabilities of every rank, put together."""
    axis = 1 if input.dim() > 1 else 0
    function = loss or fused_ce.cross_entropy

    def of_rank(rank):
        own = partition.own(input, rank, axis).requires_grad_()
        probabilities = target.is_floating_point()
        own_target = partition.own(target, rank, axis) if probabilities else target
        own_target.requires_grad_(probabilities)
        given = weight
        if own_weight:
            first, end = partition.bounds[rank]
            given = weight[first:end]
        logits = own * 1  # no leaf, so that it may be overwritten
        found = function(logits, own_target, given, **options, **partition.place(rank))
        del logits  # and nobody's, so that it may be taken
        found.backward(incoming_gradient(found, -3.0))
        return found.detach(), own.grad, own_target.grad

    losses, grads, target_grads = zip(*in_ranks(partition.ranks, of_rank), strict=True)
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=0, atol=0, equal_nan=True)
    grad = partition.whole(grads, axis)
    if target_grads[0] is None:
        return losses[0], grad, None
    return losses[0], grad, partition.whole(target_grads, axis)


@together
@pytest.mark.parametrize("case", cases_of(AXES, often=2, seldom=3))
def test_a_call_gives_what_the_operators_do(case):
    input, target = problem(case["shape"], case["kind"], case["dtype"])
    partition = Partition(case["partition"])
    options = {"reduction": case["reduction"], **OPTIONS[case["options"]]}
    if case["weighted"]:
        options["weight"] = (torch.rand(CLASSES) + 0.5).to(case["dtype"])
    own_weight = case["weighted"] == "own"
    loss, grad, target_grad = run(
        partition, input, target, own_weight=own_weight, inplace=case["inplace"], **options
    )
    expected = sharded(
        input,
        target,
        partition.bounds,
        padding=partition.paddings,
        scale=-3.0,
        target_grad=target_grad is not None,
        **options,
    )
    assert torch.equal(loss, expected.loss)
    assert torch.equal(grad, expected.grad_input)
    if target_grad is not None:
        assert torch.equal(target_grad, expected.grad_target)


# What has no kernel is a formula over several collectives.


def whole_gradients(function, input, *tensors):
    """The loss by float64, its gradients, and those of the squares of the first of them."""
    variables = [t.detach().clone().requires_grad_() for t in (input, *tensors)]
    loss = function(*variables)
    grads = torch.autograd.grad(loss, variables, create_graph=True)
    second = torch.autograd.grad(grads[0].square().sum(), variables)
    return loss.detach(), *(g.detach() for g in grads), *second


COMPOSED = {
    "the same as the kernels": {"label_smoothing": 0.1, "z_loss": 0.02},
    "focal": {"focal_gamma": 1.5},
    "mapped": {"logit_scale": -0.7, "softcap": 2.0, "reduction": "sum"},
    "sampled": {"sample_weight": torch.tensor([1.0, 0.5, 0.0, 2.0, 3.0]).double()},
    "divided": {"denominator": 7.0},
}


@together
@pytest.mark.parametrize("partition", ["even", "an empty one", "padded"])
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("name", COMPOSED)
def test_derivatives_of_second_order_are_those_of_the_whole(name, kind, partition):
    options, partition = COMPOSED[name], Partition(partition)
    if kind == "probability" and "focal_gamma" in options:
        pytest.skip("a focal loss is of indices")
    input, target = problem((5, CLASSES), kind)
    weight = torch.rand(CLASSES, dtype=torch.float64) + 0.5
    expected = whole_gradients(lambda x: composed(x, target, weight, **options), input)

    def of_rank(rank):
        own = partition.own(input, rank, 1).nan_to_num(7.0).requires_grad_()
        own_target = partition.own(target, rank, 1) if kind == "probability" else target
        call = options | partition.place(rank)
        loss = fused_ce.cross_entropy(own, own_target, weight, **call)
        (grad,) = torch.autograd.grad(loss, own, create_graph=True)
        group = collectives.group_of(dist.group.WORLD)
        squares = collectives.summed(grad.square().sum(), group)
        (second,) = torch.autograd.grad(squares, own)
        return loss.detach(), grad.detach(), second

    losses, grads, seconds = zip(*in_ranks(partition.ranks, of_rank), strict=True)
    found = losses[0], partition.whole(grads, 1), partition.whole(seconds, 1)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    for grad in grads:
        if partition.paddings[-1]:
            assert not partition.own(grad, 0, 1).isnan().any()


LEARNED = {
    "weight": (torch.rand(CLASSES) + 0.5, {"label_smoothing": 0.1}),
    "logit_scale": (torch.tensor(0.7), {"z_loss": 0.02}),
    "sample_weight": (torch.tensor([1.0, 0.5, 0.0, 2.0, 3.0]), {}),
    "denominator": (torch.tensor(3.0), {}),
}


@pytest.mark.parametrize("name", LEARNED)
def test_options_that_require_grad_have_the_gradient_of_the_whole(name):
    value, options = LEARNED[name]
    # An index has no gradient for the weight of its class, in stock.
    input, target = problem((5, CLASSES), "probability" if name == "weight" else "index")
    partition = Partition("even")
    variables = [input.clone().requires_grad_(), value.double().requires_grad_()]
    expected = composed(variables[0], target, **options, **{name: variables[1]})
    expected.backward()

    def of_rank(rank):
        own = partition.own(input, rank, 1).requires_grad_()
        learned = value.double().requires_grad_()
        own_target = partition.own(target, rank, 1) if name == "weight" else target
        call = options | partition.place(rank) | {name: learned}
        loss = fused_ce.cross_entropy(own, own_target, **call)
        loss.backward()
        return loss.detach(), own.grad, learned.grad

    losses, grads, learned = zip(*in_ranks(3, of_rank), strict=True)
    torch.testing.assert_close(losses[0], expected.detach())
    torch.testing.assert_close(partition.whole(grads, 1), variables[0].grad)
    for grad in learned:  # on every rank that of all classes
        torch.testing.assert_close(grad, variables[1].grad)


def test_out_of_range_targets_are_nan_where_that_is_asked_for():
    input, target = problem((5, CLASSES))
    target[3] = CLASSES
    for options in ({}, {"focal_gamma": 1.0}):  # by the kernels, and by the formula
        call = {"on_out_of_range": "nan", "reduction": "none", **options}
        loss, grad, _ = run(Partition("even"), input, target, **call)
        assert loss.isnan().tolist() == [False, False, False, True, False]
        assert grad.isnan().all(1).tolist() == [False, False, False, True, False]


def test_one_gather_and_nothing_else():
    input, target = problem((5, CLASSES))
    partition = Partition("even")

    def of_rank(rank):
        own = partition.own(input, rank, 1).requires_grad_()
        with CommDebugMode() as communication:
            fused_ce.cross_entropy(own, target, **partition.place(rank)).backward()
        counts = communication.get_comm_counts()
        return {str(operator): count for operator, count in counts.items() if count}

    counts = {"c10d_functional.all_gather_into_tensor": 1}
    assert in_ranks(3, of_rank) == [counts] * 3


def test_no_gradient_leaves_nothing_behind():
    input, target = problem((5, CLASSES))
    partition = Partition("even")

    def of_rank(rank):
        own = partition.own(input, rank, 1).requires_grad_()
        with torch.no_grad():
            loss = fused_ce.cross_entropy(own, target, inplace=True, **partition.place(rank))
        assert torch.equal(own, partition.own(input, rank, 1))
        return loss

    losses = in_ranks(3, of_rank)
    assert not losses[0].requires_grad
    torch.testing.assert_close(losses[0], composed(input, target))


def test_an_overwritten_shard_has_one_backward():
    input, target = problem((5, CLASSES))
    partition = Partition("even")

    def of_rank(rank):
        logits = partition.own(input, rank, 1).requires_grad_() * 1
        loss = fused_ce.cross_entropy(logits, target, inplace=True, **partition.place(rank))
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="can be no second one"):
            loss.backward()

    in_ranks(3, of_rank)


def test_a_rank_takes_the_logits_that_nobody_holds_there(monkeypatch):
    input, target = problem((5, CLASSES))
    partition, taken, real = Partition("even"), set(), ops.shard_backward_

    def spy(*call):
        taken.add(dist.get_rank())
        return real(*call)

    monkeypatch.setattr(ops, "shard_backward_", spy)

    def of_rank(rank, inplace, holds):
        own = partition.own(input, rank, 1).requires_grad_()
        logits = own * 1
        kept = logits if holds else None
        loss = fused_ce.cross_entropy(logits, target, inplace=inplace, **partition.place(rank))
        del logits
        loss.backward()
        assert kept is None or torch.equal(kept, own)
        return loss.detach(), own.grad

    plain = in_ranks(3, lambda rank: of_rank(rank, False, False))
    assert not taken
    mixed = in_ranks(3, lambda rank: of_rank(rank, "auto", rank == 1))
    assert taken == {0, 2}
    for found, expected in zip(mixed, plain, strict=True):
        assert all(map(torch.equal, found, expected))


# Whatever one rank finds wrong, all of them raise.


def of_all(change, *, focal_gamma=0.0):
    """Errors of three ranks of which the last one's call is changed."""
    input, target = problem((5, CLASSES))
    partition = Partition("even")

    def of_rank(rank):
        call = {"input": partition.own(input, rank, 1), "target": target}
        call |= partition.place(rank) | {"focal_gamma": focal_gamma}
        if rank == 2:
            change(call)
        return fused_ce.cross_entropy(**call)

    return errors_of(3, of_rank)


@together
@pytest.mark.parametrize("focal_gamma", [0.0, 2.0])  # the kernels, and the formula
@pytest.mark.parametrize(
    "change, says",
    [
        ({"target": torch.tensor([0, 1, 2, 3, 4])}, "the targets of rank 2 differ"),
        ({"ignore_index": 0}, "the options of rank 2 differ"),
        ({"z_loss": 0.1}, "the options of rank 2 differ"),
        ({"input": torch.zeros(5, 2, dtype=torch.float64)}, "the shards end at class 10 of 11"),
        ({"class_offset": 7}, "of rank 2 should begin at 8, .* are 7 to 10"),
        ({"num_classes": 12}, "the options of rank 2 differ|the shards end at class 11 of 12"),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_every_rank_raises_where_they_do_not_agree(change, says, focal_gamma):
    for kind, text in of_all(lambda call: call.update(change), focal_gamma=focal_gamma):
        assert kind is ValueError and re.search(says, text), text


@pytest.mark.parametrize("focal_gamma", [0.0, 2.0])
def test_every_rank_raises_for_a_target_that_is_no_class(focal_gamma):
    def of_rank(rank):
        input, target = torch.zeros(5, 4), torch.tensor([0, 1, 12, 3, 4])
        group = {"process_group": dist.group.WORLD, "focal_gamma": focal_gamma}
        return fused_ce.cross_entropy(input, target, **group)

    assert errors_of(3, of_rank) == [(IndexError, "Target 12 is out of bounds.")] * 3


@pytest.mark.parametrize(
    "change, kind, says",
    [
        ({"softcap": -1.0}, ValueError, "softcap must be from"),
        ({"class_offset": -4}, ValueError, "class_offset must be an int from 0 on, got -4"),
        ({"num_classes": 0}, ValueError, "num_classes must be an int from 1 on, got 0"),
        ({"weight": torch.ones(5)}, ValueError, "of all 11 classes or of this rank's 3"),
        ({"label_smoothing": 2.0}, RuntimeError, "label_smoothing"),
        ({"target": torch.zeros(5, 2, 2)}, ValueError, "must have the shape (5,) of the rows"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, ValueError, "batch_size"),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_who_refuses_its_arguments_keeps_nobody_waiting(change, kind, says):
    *others, refused = of_all(lambda call: call.update(change))
    assert refused[0] is kind and says in refused[1]
    text = "fused_ce: rank 2 refused its arguments; its own error says why"
    assert others == [(ValueError, text)] * 2


def test_a_group_and_its_options_are_checked():
    def of_rank(rank):
        input, target = torch.zeros(5, 4), torch.zeros(5, dtype=torch.int64)
        with pytest.raises(TypeError, match="must be a torch.distributed.ProcessGroup, got str"):
            fused_ce.cross_entropy(input, target, process_group="tp")
        with pytest.raises(ValueError, match="pass process_group with them"):
            fused_ce.cross_entropy(input, target, num_classes=8)
        world = {"process_group": dist.group.WORLD}
        with pytest.raises(NotImplementedError, match="cannot be transformed by torch.func"):
            torch.func.grad(lambda x: fused_ce.cross_entropy(x, target, **world))(input)
        sparse = input.to_sparse()
        with pytest.raises(ValueError, match="plain tensors, and the logits are sparse"):
            fused_ce.cross_entropy(sparse, target, **world)

    in_ranks(2, of_rank)


def test_explain_says_how_the_ranks_meet():
    def of_rank(rank):
        input, target = torch.zeros(5, 4).requires_grad_(), torch.zeros(5, dtype=torch.int64)
        world = {"process_group": dist.group.WORLD}
        explain = fused_ce.explain
        plain = explain(input, target, **world)
        start = "fused: recomputed in backward, statistics of 2 ranks in one all-gather, "
        assert plain.startswith(start)
        assert explain(input, target, inplace=True, **world).startswith("fused: in place")
        assert explain(input, target, inplace="auto", **world) == plain  # of a leaf
        taken = explain(input * 1, target, inplace="auto", **world)
        assert taken.startswith("fused: in place in backward if nobody else holds the logits, ")
        large, targets = torch.zeros(65536, 4).requires_grad_() * 1, torch.zeros(65536).long()
        assert explain(large, targets, **world) == taken
        assert explain(large, targets, inplace=False, **world) == plain
        assert explain(input, target, inplace="yes", **world).startswith("refused: fused_ce: inpl")
        assert explain(input, target, focal_gamma=1.0, **world).startswith("stock: there is no")
        assert explain(input, target, softcap=-1.0, **world).startswith("refused: fused_ce: soft")
        assert explain(input, target, num_classes=8).startswith("refused: ")

    in_ranks(2, of_rank)


def test_a_module_shares_its_group_and_is_not_pickled():
    input, target = problem((5, CLASSES))
    partition = Partition("even")

    def of_rank(rank):
        criterion = fused_ce.CrossEntropyLoss(label_smoothing=0.1, **partition.place(rank))
        copied = copy.deepcopy(criterion)
        assert copied.process_group is criterion.process_group
        with pytest.raises(TypeError, match="with a process_group cannot be pickled"):
            pickle.dumps(criterion)
        return copied(partition.own(input, rank, 1), target)

    plain = fused_ce.CrossEntropyLoss(label_smoothing=0.1)
    assert pickle.loads(pickle.dumps(plain)).label_smoothing == 0.1
    torch.testing.assert_close(in_ranks(3, of_rank)[0], plain(input, target))
