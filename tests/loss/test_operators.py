"""Guards what the operators take and `cross_entropy` does not pass: a denominator, and the incoming
gradient in the forward. The heads of language models are computed with both."""

import pytest
import torch
import torch.nn.functional as F
from support.devices import every_device
from support.grids import together
from support.reference import assert_as_accurate, incoming_gradient, one_thread

import fused_ce
from fused_ce import ops
from fused_ce.options import MEAN, NONE, SUM, Options

pytestmark = every_device

# One for each kernel: rows side by side, of adjacent classes short and long, and any row at all.
SHAPES = [
    ((70, 10), torch.float32),  # short rows, many at a time
    ((5, 300), torch.bfloat16),  # rows of a warp
    ((3, 9001), torch.float32),  # of a cluster, on the CPU of several blocks
    ((2, 19, 4, 5), torch.float16),  # pixels
    ((4, 130), torch.float64),
]


def problem(shape, dtype, kind):
    input = torch.randn(shape, dtype=dtype)
    if kind == "probability":
        return input, torch.randn(shape, dtype=dtype).softmax(1)
    rows = shape[:1] + shape[2:]
    target = torch.randint(0, shape[1], rows)
    target.view(-1)[1::3] = -100
    return input, target


@one_thread()
def summed(input, target, weight, smoothing, dtype, reduction="sum"):
    """Stock's loss in a type, as a function of its logits."""
    leaf = input.to(dtype).requires_grad_()
    target = target.to(dtype) if target.is_floating_point() else target
    weight = None if weight is None else weight.to(dtype)
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    return F.cross_entropy(leaf, target, **options), leaf


@together
@pytest.mark.parametrize("smoothing, weighted", [(0.0, False), (0.1, False), (0.1, True)])
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("shape, dtype", SHAPES, ids=str)
@pytest.mark.on_simulator
def test_a_mean_divides_by_the_denominator(shape, dtype, kind, smoothing, weighted):
    input, target = problem(shape, dtype, kind)
    weight = torch.rand(shape[1], dtype=dtype) + 0.5 if weighted else None
    denominator = torch.tensor([37.5])
    options = Options(weight=weight, denominator=denominator, label_smoothing=smoothing)
    incoming = torch.tensor(-3.0, dtype=dtype)

    results = {}
    for name, kept in (("stock", dtype), ("exact", torch.float64)):
        loss, leaf = summed(input, target, weight, smoothing, kept)
        loss = loss / 37.5
        results[name] = loss.detach(), *torch.autograd.grad(loss, leaf, incoming.to(kept))
    loss, *stats, grad = ops.forward_grad(input, target, *options)
    ops.rescale_(grad, incoming, input, target, *stats, *options)
    recomputed = ops.backward(input, target, *stats, incoming, *options)
    for value in (loss, ops.forward(input, target, *options)):
        assert_as_accurate(value, results["stock"][0], results["exact"][0], "loss")
    for value in (grad, recomputed):
        assert_as_accurate(value, results["stock"][1], results["exact"][1], "gradient")
    assert stats[1].tolist()[1] == 37.5


@together
@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("shape, dtype", SHAPES, ids=str)
@pytest.mark.on_simulator
def test_the_gradient_in_forward_is_that_for_the_incoming_one(shape, dtype, kind, reduction):
    input, target = problem(shape, dtype, kind)
    options = Options(reduction=reduction, label_smoothing=0.1)
    loss, *stats = ops.forward_stats(input, target, *options)
    incoming = incoming_gradient(loss, -3.0)

    name = {NONE: "none", MEAN: "mean", SUM: "sum"}[reduction]
    gradients = []
    for kept in (dtype, torch.float64):
        value, leaf = summed(input, target, None, 0.1, kept, name)
        gradients += torch.autograd.grad(value, leaf, incoming.to(kept))
    written = input.clone()
    again = ops.forward_grad_(written, target, incoming, *options)
    torch.testing.assert_close(again, loss, rtol=0, atol=0)
    assert_as_accurate(written, *gradients, "gradient")


@pytest.mark.parametrize(
    "denominator, reduction, message",
    [
        (torch.ones(3), MEAN, "denominator must hold one value or two"),
        (torch.ones((), dtype=torch.int64), MEAN, "denominator must be of a floating type"),
        (torch.ones(()), SUM, "goes with the reduction 1"),
        (torch.ones(()), NONE, "goes with the reduction 1"),
    ],
)
@pytest.mark.on_simulator
def test_a_denominator_of_no_use_is_refused(denominator, reduction, message):
    input, target = problem((4, 5), torch.float32, "index")
    with pytest.raises(RuntimeError, match=message):
        ops.forward(input, target, *Options(denominator=denominator, reduction=reduction))


@pytest.mark.parametrize("what", ["gradient", "statistics", "totals", "factor"])
def test_what_a_kernel_reads_is_not_overwritten(what):
    input, target = torch.randn(4, 6, dtype=torch.float64), torch.arange(4)
    _, stats, totals = ops.forward_stats(input, target)
    incoming = torch.tensor(0.5, dtype=torch.float64)
    if what == "gradient":
        incoming = input[0, 0]
        with pytest.raises(RuntimeError, match="share no memory"):
            ops.forward_grad_(input, target, incoming)
    elif what == "factor":
        before = input.clone()
        with pytest.raises(RuntimeError, match="share no memory"):
            ops.scale_(input, input[2, 3])
        assert torch.equal(input, before)
        return
    elif what == "statistics":
        stats = input.view(-1)[:8].view(2, 4)
    else:
        totals = input[0, :3]
    with pytest.raises(RuntimeError, match="share no memory"):
        ops.backward_(input, target, stats, totals, incoming)


def test_a_loss_wider_than_the_logits_keeps_its_digits():
    # Stock's log-probabilities are rounded to float32, their products with the targets are not.
    input, target = torch.randn(2000, 11) * 3, torch.rand(2000, 11, dtype=torch.float64)
    exact = F.cross_entropy(input.double(), target, reduction="none")
    errors = [
        (function(input, target, reduction="none") - exact).square().mean().sqrt().item()
        for function in (fused_ce.cross_entropy, F.cross_entropy)
    ]
    assert errors[0] <= 1.1 * errors[1]
