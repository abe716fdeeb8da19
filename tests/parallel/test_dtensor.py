"""The loss of a DTensor is that of the tensor that it is a part of, whatever is sharded.

The ranks are threads, as in test_ranks.py, and the whole is compared in float64.
"""

import contextlib
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.composed import composed
from support.grids import REDUCTIONS, cases_of, together
from support.ranks import in_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import loss_parallel

import fused_ce
from fused_ce import ops

ALL, ROWS, CLASSES = Replicate(), Shard(0), Shard(1)
# Of logits on a mesh of so many ranks each way.
PLACEMENTS = {
    "classes": ((3,), [CLASSES]),
    "rows": ((3,), [ROWS]),
    "all": ((2,), [ALL]),
    "rows and classes": ((2, 2), [ROWS, CLASSES]),
    "classes, and the same twice": ((2, 2), [CLASSES, ALL]),
    "pixels and classes": ((2, 2), [Shard(2), CLASSES]),
}
AXES = {
    "placed": tuple(PLACEMENTS),
    "kind": ("index", "probability"),
    "reduction": REDUCTIONS,
    "weighted": (None, "plain", "replicated", "sharded"),
    "options": ("none", "z-loss and smoothing", "focal", "sampled", "zero"),
    "inplace": (None, True, "auto"),
}
OPTIONS = {
    "none": {},
    "z-loss and smoothing": {"label_smoothing": 0.1, "z_loss": 0.05},
    "focal": {"focal_gamma": 1.5},
    "sampled": {"z_loss": 0.05},
    "zero": {"on_all_ignored": "zero"},
}


def of_rows(placements):
    """The placements of what has a value a row."""
    return [
        ALL if p in (ALL, CLASSES) else Shard(p.dim - 1 if p.dim > 1 else p.dim) for p in placements
    ]


def problem(kind="index", shape=(7, 11, 5)):
    input = torch.randn(shape, dtype=torch.float64)
    if kind == "probability":
        return input, torch.randn(shape, dtype=torch.float64).softmax(1)
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    target[:4].view(-1)[1:] = -100  # more in one part of the rows than in the other
    return input, target


def is_valid(case):
    return not (case.get("kind") == "probability" and case.get("options") == "focal")


@together
@pytest.mark.parametrize("case", cases_of(AXES, often=2, seldom=3, valid=is_valid))
def test_the_loss_of_a_part_is_that_of_the_whole(case):
    size, placements = PLACEMENTS[case["placed"]]
    input, target = problem(case["kind"])
    call = {"reduction": case["reduction"], **OPTIONS[case["options"]]}
    weight = torch.rand(11, dtype=torch.float64) + 0.5 if case["weighted"] else None
    samples = None
    if case["options"] == "sampled":
        samples = torch.rand(7, 5, dtype=torch.float64) + 0.5
        samples[3] = 0
    whole = input.clone().requires_grad_()
    expected = composed(whole, target, weight, sample_weight=samples, **call)
    expected.sum().backward()

    def of_rank(rank):
        mesh = init_device_mesh("cpu", size)
        own = distribute_tensor(input.clone(), mesh, placements).requires_grad_()
        rows = of_rows(placements)
        of_target = placements if case["kind"] == "probability" else rows
        own_target = distribute_tensor(target, mesh, of_target)
        given = weight
        if case["weighted"] in ("replicated", "sharded"):
            of_weight = [
                Shard(0) if p == CLASSES and case["weighted"] == "sharded" else ALL
                for p in placements
            ]
            given = distribute_tensor(weight, mesh, of_weight)
        own_call = dict(call, inplace=case["inplace"])
        if samples is not None:
            own_call["sample_weight"] = distribute_tensor(samples, mesh, rows)
        loss = fused_ce.cross_entropy(own * 1, own_target, given, **own_call)
        loss.sum().backward()
        assert own.grad.placements == tuple(placements)
        if case["reduction"] == "none":
            assert loss.placements == tuple(rows)
        else:
            assert loss.placements == tuple(Partial() if p.is_shard() else p for p in rows)
        return loss.full_tensor().detach(), own.grad.full_tensor()

    # The context is of no consequence, and the same for all threads.
    with loss_parallel() if case["inplace"] else contextlib.nullcontext():
        found = in_ranks(math.prod(size), of_rank)
    for loss, grad in found:
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(grad, whole.grad, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("placement", [CLASSES, ROWS], ids=str)
def test_logits_that_nobody_holds_are_taken(placement, monkeypatch):
    """By the counts of the part that the DTensor holds, and with it whoever holds the DTensor."""
    input, target = problem(shape=(6, 11))
    taken = set()
    for name in ("backward_", "shard_backward_"):
        real = getattr(ops, name)

        def spy(*call, real=real):
            taken.add(dist.get_rank())
            return real(*call)

        monkeypatch.setattr(ops, name, spy)
    holders = {
        "nobody": lambda logits: None,
        "a variable": lambda logits: logits,
        "a part": lambda logits: logits.to_local(),
        "a loss": lambda logits: logits.square().sum(),
    }

    def of_rank(rank, hold):
        mesh = init_device_mesh("cpu", (2,))
        own = distribute_tensor(input.clone(), mesh, [placement]).requires_grad_()
        own_target = distribute_tensor(target, mesh, of_rows([placement]))
        logits = own * 1
        kept = hold(logits)
        before = logits.to_local().detach().clone()
        loss = fused_ce.cross_entropy(logits, own_target, inplace="auto")
        del logits
        loss.backward()
        if isinstance(kept, torch.Tensor) and kept.dim() > 1:
            seen = kept.to_local() if isinstance(kept, DTensor) else kept
            assert torch.equal(seen, before)
        return own.grad.full_tensor()

    expected = input.clone().requires_grad_()
    F.cross_entropy(expected, target).backward()
    for name, hold in holders.items():
        taken.clear()
        for grad in in_ranks(2, lambda rank, hold=hold: of_rank(rank, hold)):
            torch.testing.assert_close(grad, expected.grad)
        assert taken == ({0, 1} if name == "nobody" else set()), name


def test_rows_on_no_rank_that_count_leave_the_mean_alone():
    input, target = problem(shape=(6, 11))
    target[:] = torch.tensor([-100, -100, -100, 1, 2, 3])  # of two ranks the first has none

    def of_rank(rank):
        mesh = init_device_mesh("cpu", (2,))
        own = distribute_tensor(input, mesh, [ROWS])
        loss = fused_ce.cross_entropy(own, distribute_tensor(target, mesh, [ROWS]))
        return loss.full_tensor()

    for loss in in_ranks(2, of_rank):
        torch.testing.assert_close(loss, F.cross_entropy(input, target))


def test_what_travels():
    input, target = problem(shape=(6, 11))

    def of_rank(rank):
        mesh = init_device_mesh("cpu", (2, 2))
        own = distribute_tensor(input, mesh, [ROWS, CLASSES]).requires_grad_()
        own_target = distribute_tensor(target, mesh, [ROWS, ALL])
        with CommDebugMode() as communication:
            fused_ce.cross_entropy(own, own_target).backward()
        counts = communication.get_comm_counts()
        return {str(operator).rpartition(".")[2]: n for operator, n in counts.items() if n}

    # The statistics of the classes, and the denominator of the rows.
    assert in_ranks(4, of_rank)[0] == {"all_gather_into_tensor": 1, "all_reduce": 1}


@pytest.mark.parametrize("shape", [(8, 16), (8, 16, 12)], ids=str)
def test_what_torch_tests_of_loss_parallel_holds(shape):
    """The cases of torch's own test, on as many ranks: one collective where it counts three."""
    input, target = torch.rand(shape), torch.randint(16, (shape[0], *shape[2:]))
    weight = torch.rand(16)

    def of_rank(rank):
        mesh = init_device_mesh("cpu", (4,))
        for dim in range(len(shape)):
            for reduction in REDUCTIONS:
                whole = input.clone().requires_grad_()
                expected = F.cross_entropy(whole, target, weight, reduction=reduction)
                logits = distribute_tensor(input.clone(), mesh, [Shard(dim)]).requires_grad_()
                if dim != 1:
                    with pytest.raises(ValueError, match="loss_parallel"):
                        fused_ce.cross_entropy(logits, target, reduction=reduction)
                    continue
                with CommDebugMode() as communication:
                    loss = fused_ce.cross_entropy(logits, target, weight, reduction=reduction)
                assert communication.get_total_counts() == 1
                assert loss.placements == (ALL,)
                torch.testing.assert_close(loss.to_local(), expected)
                with CommDebugMode() as communication:
                    loss.sum().backward()
                assert communication.get_total_counts() == 0
                expected.sum().backward()
                assert logits.grad.placements == (CLASSES,)
                torch.testing.assert_close(logits.grad.full_tensor(), whole.grad)

    with loss_parallel():
        in_ranks(4, of_rank)


def test_a_plain_target_is_taken_where_it_would_be_whole():
    input, target = problem(shape=(6, 11))

    def of_rank(rank):
        mesh = init_device_mesh("cpu", (2,))
        own = distribute_tensor(input, mesh, [CLASSES])
        assert fused_ce.explain(own, target).startswith("fused: no gradient, statistics of 2 ranks")
        return fused_ce.cross_entropy(own, target).full_tensor()

    for loss in in_ranks(2, of_rank):
        torch.testing.assert_close(loss, F.cross_entropy(input, target))


def test_explain_names_what_goes_to_stock():
    input, target = problem(shape=(8, 12))

    def of_rank(rank):
        mesh, other = init_device_mesh("cpu", (2, 2)), init_device_mesh("cpu", (4,))
        whole = distribute_tensor(target, mesh, [ALL, ALL])

        def reason(placements, target=whole, **options):
            logits = DTensor.from_local(input, mesh, placements, run_check=False)
            said = fused_ce.explain(logits, target, **options)
            assert said.startswith("stock: "), said
            return said.removeprefix("stock: ")

        partial = "the logits are a DTensor with the placement Partial(sum)"
        assert reason([Partial(), CLASSES]) == partial.replace("Partial(sum)", str(Partial()))
        assert reason([CLASSES, CLASSES]) == "two mesh dimensions shard the classes of the logits"
        elsewhere = distribute_tensor(target, other, [ALL])
        assert reason([ALL, CLASSES], elsewhere) == "the target is on another mesh than the logits"
        says = "the target is no DTensor, and would be sharded as the logits would"
        assert reason([ROWS, CLASSES], target) == says
        scale = torch.tensor(1.0, requires_grad=True)
        says = "the logits are a DTensor, and the logit_scale requires grad"
        assert reason([ALL, CLASSES], logit_scale=scale) == says

        def fused(placements, **options):
            logits = distribute_tensor(input, mesh, placements).requires_grad_()
            return fused_ce.explain(logits, whole, **options).rpartition(",")[0]

        gathered = "statistics of 2 ranks in one all-gather"
        assert fused([ROWS, CLASSES]) == f"fused: recomputed in backward, {gathered}"
        assert fused([ROWS, ALL]) == "fused: gradient in forward"
        assert fused([ROWS, ALL], inplace=True) == "fused: in place in forward"
        says = "stock: there is no kernel for focal_gamma of sharded classes"
        logits = distribute_tensor(input, mesh, [ROWS, CLASSES])
        assert fused_ce.explain(logits, whole, focal_gamma=1.0) == says

    in_ranks(4, of_rank)


# Heads.

HEADS = {
    "tensor parallel": ((3,), [ALL], [Shard(0)]),
    "sequence parallel": ((3,), [Shard(1)], [Shard(0)]),
    "rows and classes": ((2, 2), [ROWS, ALL], [ALL, Shard(0)]),
    "rows, sequence and classes": ((2, 2), [ROWS, Shard(1)], [ALL, Shard(0)]),
    "rows": ((2,), [ROWS], [ALL]),
}


@together
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("placed", HEADS)
def test_a_head_of_parts_is_that_of_the_whole(placed, reduction, kind):
    size, of_input, of_weight = HEADS[placed]
    input = torch.randn(4, 6, 5, dtype=torch.float64)
    weight, bias = torch.randn(11, 5, dtype=torch.float64), torch.randn(11, dtype=torch.float64)
    target = torch.randint(0, 11, (4, 6))
    target[:2, 1:] = -100
    if kind == "probability":
        target = torch.rand(4, 6, 11, dtype=torch.float64)
    layer = [t.clone().requires_grad_() for t in (input, weight, bias)]
    rows = F.linear(*layer).flatten(0, 1)
    expected = F.cross_entropy(rows, target.flatten(0, 1), reduction=reduction)
    expected.sum().backward()

    def of_rank(rank):
        mesh = init_device_mesh("cpu", size)
        own = [
            distribute_tensor(t.clone(), mesh, placements).requires_grad_()
            for t, placements in ((input, of_input), (weight, of_weight), (bias, of_weight))
        ]
        of_target = [
            (Shard(2) if kind == "probability" else ALL) if w == Shard(0) else i
            for i, w in zip(of_input, of_weight, strict=True)
        ]
        own_target = distribute_tensor(target, mesh, of_target)
        call = {"linear_bias": own[2], "reduction": reduction, "chunk_size": 4}
        assert fused_ce.explain_linear(*own[:2], own_target, **call).startswith("fused: ")
        loss = fused_ce.linear_cross_entropy(*own[:2], own_target, **call)
        loss.sum().backward()
        assert own[0].grad.placements == own[0].placements
        return loss.full_tensor().detach(), *(t.grad.full_tensor() for t in own)

    wanted = expected.detach(), *(t.grad for t in layer)
    for found in in_ranks(math.prod(size), of_rank):
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours.reshape(theirs.shape), theirs)
