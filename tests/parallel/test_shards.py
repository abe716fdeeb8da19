"""A vocabulary that is cut into shards has the loss and the gradient of the whole one.

No process is started here: the operators of every rank run one after another in this one. What they
give is compared with what people write in plain torch for the whole vocabulary, and with float64.
"""

import math

import pytest
import torch
from support.composed import composed
from support.grids import DTYPES, REDUCTIONS, cases_of, every_reduction, together
from support.layouts import lay_out
from support.reference import assert_as_accurate, differentiate, incoming_gradient
from support.shards import at, check, evenly, merged_by_all, options_of, sharded, shards_of
from torch.library import opcheck

import fused_ce
from fused_ce import ops
from fused_ce.options import Options

# The kernels, by shape, as in tests/loss/test_extensions.py.
ROWS = {
    "unbatched": (19,),
    "lanes": (70, 20),
    "pixels": (2, 19, 4, 5),
    "short rows": (9, 300),
    "rows of several blocks": (3, 5001),
}
# Where a vocabulary of C classes is cut, and how many columns that are none follow in each shard.
CUTS = {
    "one shard": lambda c: (evenly(c, 1), 0),
    "two, and padding": lambda c: (evenly(c, 2), 3),
    "five": lambda c: (evenly(c, 5), 0),
    # As Megatron pads: the last shard alone has columns that are no classes.
    "eight, of equal width": lambda c: (
        evenly(c, 8),
        [-(-c // 8) - (b - a) for a, b in evenly(c, 8)],
    ),
    "uneven": lambda c: (at(1, c - 2, c), 0),
    "empty ones": lambda c: (at(0, 4, 4, c, c), [0, 0, 2, 0, 0]),
}
AXES = {
    "rows": tuple(ROWS),
    "cut": tuple(CUTS),
    "dtype": DTYPES,
    "inplace": (False, True),
    "kind": ("index", "probability"),
    "reduction": REDUCTIONS,
    "weighted": (False, True),
    "label_smoothing": (0.0, 0.1, 1.0),
    "z_loss": (0.0, 1e-2),
    "logit_scale": (1.0, 0.5, -0.7),
    "softcap": (None, 4.0),
    "sampled": (False, True),
    "denominator": (None, 7.5),
    "on_all_ignored": ("nan", "zero"),
    "incoming": (1.0, -3.0),
}


def is_valid(case):
    return case.get("denominator") is None or case.get("reduction", "mean") == "mean"


def problem(shape, dtype, kind="index", scale=2.0):
    """Logits and a target, some of whose rows are ignored where it is an index."""
    input = (torch.randn(shape) * scale).to(dtype)
    axis = 1 if len(shape) > 1 else 0
    if kind == "probability":
        return input, torch.randn(shape).softmax(axis).to(dtype)
    target = torch.randint(0, shape[axis], [n for d, n in enumerate(shape) if d != axis])
    if target.dim():
        target.view(-1)[1::3] = -100
    return input, target


def check_cut(input, target, cut, **arguments):
    bounds, padding = cut(input.shape[1 if input.dim() > 1 else 0])
    return check(input, target, bounds, padding=padding, **arguments)


@together
@pytest.mark.on_simulator
@pytest.mark.parametrize("case", cases_of(AXES, often=2, seldom=3, valid=is_valid))
def test_every_option_is_that_of_the_whole_vocabulary(case):
    input, target = problem(ROWS[case["rows"]], case["dtype"], case["kind"])
    axis = 1 if input.dim() > 1 else 0
    names = "reduction label_smoothing z_loss logit_scale softcap denominator on_all_ignored"
    options = {name: case[name] for name in names.split()}
    if case["weighted"]:
        options["weight"] = (torch.rand(input.shape[axis]) + 0.5).to(input.dtype)
    if case["sampled"]:
        weight = torch.rand([n for d, n in enumerate(input.shape) if d != axis]) + 0.5
        if weight.dim():
            weight.view(-1)[2::4] = 0  # ignored
        options["sample_weight"] = weight.to(input.dtype)
    cut = CUTS[case["cut"]]
    target_grad = case["kind"] == "probability"
    check_cut(
        input,
        target,
        cut,
        scale=case["incoming"],
        inplace=case["inplace"],
        target_grad=target_grad,
        **options,
    )


@together
@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize("layout", ["every second class", "transposed", "gap after each row"])
def test_shards_are_read_as_they_lie(layout, kind):
    values, target = problem((9, 70), torch.float32)
    target = target.where(target >= 0, 200 if kind == torch.uint8 else -100).to(kind)
    ignore_index = 200 if kind == torch.uint8 else -100
    options = {"ignore_index": ignore_index, "label_smoothing": 0.1}
    bounds = evenly(70, 3)
    expected = sharded(values, target.long(), bounds, **options)
    found = sharded(lay_out(values, layout), target, bounds, **options)
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.on_simulator
@every_reduction
def test_a_confident_row_keeps_its_digits(reduction):
    # Far below the 1 of the largest logit, in its shard, and in the one beside it.
    input = torch.full((3, 12), -25.0)
    input[0, 1] = input[1, 7] = input[2, 11] = 0.0
    target = torch.tensor([1, 7, 11])
    for cut in (CUTS["five"], CUTS["uneven"]):
        result = check_cut(input, target, cut, reduction=reduction)
        assert (result.loss > 0).all()
        ours = result.grad_input[torch.arange(3), target]
        whole = 11 * math.exp(-25)
        incoming = {
            "mean": torch.full((3,), 1 / 3),
            "sum": torch.ones(3),
            "none": torch.tensor([-1.5, -0.5, 0.5]),  # reference.incoming_gradient
        }
        torch.testing.assert_close(ours, -whole * incoming[reduction], rtol=1e-5, atol=0)


@pytest.mark.on_simulator
def test_equal_logits_are_counted_in_every_shard():
    input = torch.zeros(4, 11)
    check_cut(input, torch.tensor([0, 3, 7, 10]), CUTS["five"])
    loss = sharded(input, torch.tensor([0, 3, 7, 10]), evenly(11, 5)).loss
    torch.testing.assert_close(loss.item(), math.log(11), rtol=1e-7, atol=0)


@pytest.mark.on_simulator
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [12, 300])
def test_masked_logits_are_those_of_the_whole_vocabulary(classes, label_smoothing):
    # As lanes and as rows. A shard without a finite logit, beside one of the target and in a row
    # whose target is elsewhere; a row that has none at all; a target that is masked; an infinite
    # logit; a nan among masked ones; a target among them.
    input, _ = problem((7, classes), torch.float64)
    third = classes // 3
    target = torch.tensor([0, classes - 1, 3, 8, 2, 5, third + 1])
    input[6, third : 2 * third] = -torch.inf
    input[:2, third : 2 * third] = -torch.inf
    input[2] = -torch.inf
    input[3, 8] = -torch.inf
    input[4, 6] = torch.inf
    input[5, :third] = -torch.inf
    input[5, 1] = torch.nan
    options = {"reduction": "none", "label_smoothing": label_smoothing}
    found = sharded(input, target, evenly(classes, 3), **options)
    whole = input.clone().requires_grad_()
    loss = fused_ce.cross_entropy(whole, target, **options)
    torch.testing.assert_close(found.loss, loss.detach(), equal_nan=True)
    (grad,) = torch.autograd.grad(loss, whole, incoming_gradient(loss, 1.0))
    torch.testing.assert_close(found.grad_input, grad, equal_nan=True)


@pytest.mark.on_simulator
@every_reduction
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_nothing_to_count_is_what_stock_makes_of_it(kind, reduction):
    shape = (3, 10) if kind == "index" else (0, 10)
    input, target = problem(shape, torch.float32, kind)
    if kind == "index":
        target = torch.full_like(target, -100)
    found = sharded(input, target, evenly(10, 3), reduction=reduction)
    expected = differentiate(torch.nn.functional.cross_entropy, input, target, reduction=reduction)
    torch.testing.assert_close(found.loss, expected.loss, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(found.grad_input, expected.grad_input, rtol=0, atol=0)


@pytest.mark.on_simulator
def test_ignored_rows_are_not_read():
    input, target = problem((9, 10), torch.float32)
    input[1::3] = torch.nan
    found = sharded(input, target, evenly(10, 3), reduction="none", label_smoothing=0.1)
    assert not found.loss.isnan().any()
    assert torch.equal(found.grad_input[1::3], torch.zeros(3, 10))


@pytest.mark.on_simulator
def test_a_target_that_is_no_class_may_make_its_row_nan():
    input, target = problem((6, 10), torch.float32)
    target[0], target[3] = 10, -7
    options = {"reduction": "none", "on_out_of_range": 1}
    found = sharded(input, target, evenly(10, 3), **options)
    bad = torch.tensor([True, False, False, True, False, False])
    assert torch.equal(found.loss.isnan(), bad)
    assert torch.equal(found.grad_input.isnan(), bad[:, None].expand(6, 10))


@pytest.mark.on_simulator
def test_a_target_that_is_no_class_is_one_of_weight_1_to_the_mean():
    input, target = problem((6, 10), torch.float32)
    target[0], target[3] = 10, -7
    weight, samples = torch.rand(10) + 0.5, torch.rand(6) + 0.5
    found = sharded(
        input, target, at(0, 4, 10), weight=weight, sample_weight=samples, on_out_of_range=1
    )
    options = {"weight": weight, "sample_weight": samples, "on_out_of_range": "nan"}
    whole = differentiate(fused_ce.cross_entropy, input, target, **options)
    torch.testing.assert_close(found.grad_input, whole.grad_input, equal_nan=True)


@pytest.mark.on_simulator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packets_are_merged_in_the_order_of_the_ranks_and_in_double(dtype):
    # What is far below the first rank's sum is lost where it is added to that, one by one.
    input = torch.zeros(2, 3, dtype=dtype)
    shards = shards_of(input, torch.ones_like(input), evenly(3, 3), reduction="none")
    packets = torch.cat([shard.packet() for shard in shards])
    packets[:, :, :2] = 0
    large, few = (2.0**53, 0.0) if dtype == torch.float64 else (2.0**24, 2.0)
    packets[:, 2, 0] = torch.tensor([large, 1, 1], dtype=dtype)
    shards[0].options = shards[0].options._replace(loss_dtype=torch.float64)
    loss, stats, _ = shards[0].merge(packets)
    assert loss.tolist() == [large + few, 0.0]
    assert stats.tolist() == [[0.0, 0.0], [2.0, 2.0], [0.0, 0.0]]  # three logits that are equal


def test_the_result_has_the_same_bits_for_any_number_of_threads():
    # Rows of a shard that are shared between threads, and many that are not.
    found = []
    threads = torch.get_num_threads()
    cases = [problem((1, 530000), torch.float32), problem((5000, 30), torch.float32)]
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(
                [sharded(*case, evenly(case[0].shape[1], 2), label_smoothing=0.1) for case in cases]
            )
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one.loss, three.loss)
        assert torch.equal(one.grad_input, three.grad_input)


def test_long_rows_that_threads_share_are_as_accurate():
    threads = torch.get_num_threads()
    input, target = problem((1, 530000), torch.float32)
    target[:] = 400000
    try:
        torch.set_num_threads(2)
        found = sharded(input, target, evenly(530000, 2))
    finally:
        torch.set_num_threads(threads)
    exact = differentiate(composed, input.double(), target)
    plain = differentiate(composed, input, target)
    assert_as_accurate(found.loss, plain.loss, exact.loss, "loss")
    assert_as_accurate(found.grad_input, plain.grad_input, exact.grad_input, "gradient", 2.0)


# Whatever the data, every rank gets as far as the exchange, and after it every rank raises.


def raised_by_all(shards, error, says):
    packets = torch.cat([shard.packet() for shard in shards])
    for shard in shards:
        with pytest.raises(error, match=says):
            shard.merge(packets)


@pytest.mark.parametrize("bad", [10, -1, 2**62, -(2**63)])
def test_every_rank_raises_for_a_target_that_is_no_class(bad):
    input, target = problem((6, 10), torch.float32)
    target[4] = bad
    says = rf"Target {bad} is out of bounds\."
    raised_by_all(shards_of(input, target, evenly(10, 3)), IndexError, says)


@pytest.mark.on_simulator
def test_a_bad_target_without_weight_is_not_one():
    input, target = problem((3, 10), torch.float32)
    target[:] = torch.tensor([1, 77, 3])
    weight = torch.tensor([1.0, 0.0, 2.0])
    found = sharded(input, target, evenly(10, 3), sample_weight=weight)
    kept = sharded(input[::2], target[::2], evenly(10, 3), sample_weight=weight[::2])
    torch.testing.assert_close(found.loss, kept.loss)


def test_every_rank_raises_for_different_targets():
    input, target = problem((6, 10), torch.float32)
    shards = shards_of(input, target, evenly(10, 3))
    shards[1].target = target.flip(0)
    raised_by_all(shards, ValueError, "the targets of rank 1 differ from those of rank 0")


@pytest.mark.parametrize(
    "option",
    [
        {"label_smoothing": 0.1},
        {"ignore_index": 3},
        {"z_loss": 1e-4},
        {"softcap": 30.0},
        {"reduction": "sum"},
        {"logit_scale": 0.5},
        {"denominator": 4.0},
        {"on_all_ignored": "zero"},
        {"weight": torch.ones(10)},
        {"sample_weight": torch.ones(6)},
    ],
    ids=lambda option: next(iter(option)),
)
def test_every_rank_raises_for_different_options(option):
    input, target = problem((6, 10), torch.float32)
    target[:] = 4
    shards = shards_of(input, target, evenly(10, 3))
    others = shards_of(input, target, evenly(10, 3), **option)
    raised_by_all([*shards[:2], others[2]], ValueError, "the options of rank 2 differ")


@pytest.mark.parametrize(
    "bounds, says",
    [
        ([(0, 4), (5, 10)], "of rank 1 should begin at 4, .* are 5 to 10"),
        ([(0, 6), (5, 10)], "of rank 1 should begin at 6"),
        ([(5, 10), (0, 5)], "of rank 0 should begin at 0"),
        ([(0, 4), (4, 9)], "the shards end at class 9 of 10"),
    ],
)
def test_every_rank_raises_for_shards_that_are_not_the_vocabulary(bounds, says):
    input, target = problem((6, 10), torch.float32)
    raised_by_all(shards_of(input, target, bounds), ValueError, says)


@pytest.mark.parametrize(
    "place, says",
    [
        ((0, 6, 10), "shard_classes must be from 0 to the input's 5 columns, got 6"),
        ((0, -1, 10), "shard_classes must be from 0"),
        ((6, 5, 10), "class_offset must leave the shard's classes within the 10, got 6"),
        ((-1, 5, 10), "class_offset must leave"),
        ((2**63 - 1, 5, 10), "class_offset must leave"),
        ((0, 5, 0), "num_classes must be positive, got 0"),
        ((0, 5, 4), "class_offset must leave the shard's classes within the 4"),
    ],
)
def test_a_shard_outside_of_the_vocabulary_is_refused(place, says):
    input, target = torch.randn(3, 5), torch.tensor([0, 1, 2])
    with pytest.raises(RuntimeError, match=says):
        ops.shard_forward(input, target, *place, *Options())
    stats, totals = torch.zeros(3, 3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for operator in (ops.shard_backward, ops.shard_backward_):
        with pytest.raises(RuntimeError, match=says):
            operator(input, target, stats, totals, torch.tensor(1.0), *place, *Options())


def test_what_is_not_of_these_rows_is_refused():
    input, target = problem((6, 10), torch.float32)
    (shard,) = shards_of(input, target, evenly(10, 1))
    packet = shard.packet()
    wrong = {
        "rows": packet[..., :-1].contiguous(),
        "numbers": packet[:, :3].contiguous(),
        "type": packet.double(),
        "strides": packet.expand(2, -1, -1),
        "no shard": packet[:0],
        "dimensions": packet[0],
    }
    for name, packets in wrong.items():
        with pytest.raises(RuntimeError, match="packets must be those of shard_forward"):
            shard.merge(packets)
            pytest.fail(name)
    _, stats, totals = shard.merge(packet)
    one = torch.tensor(1.0)
    for merged in ((stats[:2], totals), (stats.float(), totals), (stats[:, 1:], totals)):
        with pytest.raises(RuntimeError, match="stats must be what"):
            shard.differentiate(merged, one)
    with pytest.raises(RuntimeError, match="totals must be what"):
        shard.differentiate((stats, totals[:2]), one)
    with pytest.raises(RuntimeError, match="only a target of probabilities has a gradient"):
        shard.differentiate((stats, totals), one, of_target=True)
    with pytest.raises(RuntimeError, match="takes no focal_gamma"):
        shard.options = shard.options._replace(focal_gamma=2.0)
        shard.packet()


def test_logits_are_not_overwritten_while_they_are_read():
    memory = torch.randn(6, 10)
    target = memory.softmax(1)
    place = (0, 10, 10)
    (shard,) = shards_of(memory, target, evenly(10, 1))
    loss, *merged = shard.merge(shard.packet())
    for read in ({"target": memory}, {"input": torch.zeros(1).expand(6, 10)}):
        arguments = {"input": memory, "target": target} | read
        before = arguments["input"].clone()
        with pytest.raises(RuntimeError, match="clone"):
            ops.shard_backward_(
                arguments["input"], arguments["target"], *merged, loss, *place, *Options()
            )
        assert torch.equal(arguments["input"], before)


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("shape", [(3, 5), (2, 70, 3)])
def test_the_operators_are_what_their_schemas_and_fakes_say(shape, kind):
    input, target = problem(shape, torch.float32, kind)
    options = options_of(input, label_smoothing=0.1)
    place = (2, shape[1] - 1, shape[1] + 1)
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    opcheck(ops.shard_forward, (input, target, *place, *options), **checks)
    shards = shards_of(input, target, evenly(shape[1], 2), label_smoothing=0.1)
    packets = torch.cat([each.packet() for each in shards])
    merge = (packets, shards[0].input, shards[0].target, shape[1], *options)
    opcheck(ops.shard_merge, merge, **checks)
    _, *merged = ops.shard_merge(*merge)
    of_backward = [shards[0].target, *merged, torch.tensor(0.5), *shards[0].place]
    options = options._replace(loss_dtype=None)
    opcheck(ops.shard_backward, (shards[0].input, *of_backward, *options), **checks)
    opcheck(ops.shard_backward_, (shards[0].input.clone(), *of_backward, *options), **checks)
    if kind == "probability":
        opcheck(ops.shard_backward_target, (shards[0].input, *of_backward, *options), **checks)


@pytest.mark.on_simulator
def test_the_packet_is_what_its_description_says():
    """Ranks of different builds would have to agree on it."""
    input, target = problem((4, 6), torch.float64)
    target[:] = torch.tensor([0, 5, -100, 2])
    shards = shards_of(input, target, at(4, 6), label_smoothing=0.1)
    packet = shards[0].packet()[0]
    assert packet.shape == (4, 7)
    own = input[:, :4]
    largest = own.max(1).values
    a = torch.full((4, 4), 0.1 / 6, dtype=torch.float64)
    a[0, 0] += 0.9
    a[3, 2] += 0.9
    gaps = a * (largest[:, None] - own)
    rest = (own - largest[:, None]).exp().sum(1) - 1
    expected = torch.stack([largest, rest, gaps.sum(1), a.sum(1)])
    expected[:, 2] = 0
    torch.testing.assert_close(packet[:, :4], expected)
    # Two targets, a sum of weights that is their number, the classes 0 to 4, and no bad target.
    facts = packet[:, 4:].contiguous().view(torch.float64).view(-1)
    assert facts[:2].tolist() == [2.0, 4.0]
    assert facts[2:5].view(torch.int64).tolist() == [0, 4, 0]


@pytest.mark.on_simulator
def test_as_many_rows_as_you_like_are_counted():
    # More than one block of a device takes: what they add up to comes from several.
    rows = 16385
    input, target = torch.randn(rows, 3), torch.randint(0, 3, (rows,))
    target[::7] = -100
    weight = torch.rand(3) + 0.5
    options = {"weight": weight, "label_smoothing": 0.1}
    loss, _, totals = merged_by_all(shards_of(input, target, at(3), **options))[0]
    expected = torch.nn.functional.cross_entropy(input, target, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    counted = weight.double()[target[target >= 0]].sum().item()
    exact = [weight.double().sum().item(), counted, (target >= 0).sum().item()]
    assert totals.tolist() == pytest.approx(exact, rel=1e-12)


@pytest.mark.on_simulator
def test_all_ranks_have_the_same_bits_whatever_their_width():
    input, target = problem((50, 300), torch.bfloat16)
    merged_by_all(shards_of(input, target, at(1, 150, 150, 298, 300), reduction="none"))
