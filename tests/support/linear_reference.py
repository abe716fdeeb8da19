"""What the tests of `linear_cross_entropy` compare with: `F.linear`, then `F.cross_entropy`.

The rule is that of `reference`: ours, stock in the same dtype, and stock in float64 are run on the
same values, and ours may be no further from float64 than stock is, plus one ulp. The maximum over
the results of a GEMM is a matter of luck, and may be twice as large.
"""

import contextlib
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import fused_ce
from fused_ce import linear, ops
from fused_ce.linear import operators
from support.reference import assert_as_accurate, incoming_gradient, one_thread

# Whether the gradients are computed in forward.
WAYS = {"ahead": {}, "recompute": {"grad_in_forward": False}}
every_way = pytest.mark.parametrize("way", WAYS)


class Outcome(NamedTuple):
    loss: torch.Tensor
    grad_input: torch.Tensor | None = None
    grad_linear_weight: torch.Tensor | None = None
    grad_linear_bias: torch.Tensor | None = None


def stock_loss(input, linear_weight, target, *, linear_bias=None, ignore_index=None, **options):
    """The definition, for every shape that ours takes."""
    batch, (classes, *positions) = input.shape[:-1], linear_weight.shape[:-1]
    if len(batch) > 1:
        input = input.flatten(0, -2)
        target = target.reshape(len(input), *target.shape[len(batch) :])
    logits = F.linear(
        input,
        linear_weight.flatten(0, -2),
        None if linear_bias is None else linear_bias.flatten(),
    ).reshape(*input.shape[:-1], classes, *positions)
    if target.dtype in (torch.int32, torch.int16, torch.uint8):  # ours alone takes them
        target = target.long()
    ignored = {} if ignore_index is None else {"ignore_index": ignore_index}
    loss = F.cross_entropy(logits, target, **ignored, **options)
    return loss if loss.dim() == 0 else loss.reshape(*batch, *positions)


def differentiate(function, layer, target, *, scale=1.0, needs=(True, True, True), **options):
    """The loss, and the gradients of those of input, weight and bias that need one."""
    layer = [
        None if t is None else t.detach().clone().requires_grad_(needed)
        for t, needed in zip(layer, needs, strict=True)
    ]
    input, linear_weight, linear_bias = layer
    loss = function(input, linear_weight, target, linear_bias=linear_bias, **options)
    value = loss.detach().clone()
    leaves = [t for t in layer if t is not None and t.requires_grad]
    if not leaves:
        return Outcome(value)
    gradients = iter(torch.autograd.grad(loss, leaves, incoming_gradient(loss, scale)))
    wanted = [t is not None and t.requires_grad for t in layer]
    return Outcome(value, *(next(gradients) if w else None for w in wanted))


@contextlib.contextmanager
def in_chunks():
    """Fails where a call is left to the formula that holds all logits."""

    def refuse(*_, **__):
        raise AssertionError("the unfused formula was used")

    with (
        mock.patch.object(linear, "_unfused", refuse),
        mock.patch.object(operators, "unfused_gradients", refuse),
    ):
        yield


def ours(layer, target, **options):
    with in_chunks():
        return differentiate(fused_ce.linear_cross_entropy, layer, target, **options)


@one_thread()
def stock(layer, target, **options):
    return differentiate(stock_loss, layer, target, **options)


def _double(value):
    floating = torch.is_tensor(value) and value.is_floating_point()
    return value.double() if floating else value


def float64(layer, target, **options):
    options = {name: _double(value) for name, value in options.items()}
    return stock([_double(t) for t in layer], _double(target), **options)


def check_against_stock(layer, target, *, chunks=None, **options):
    """Run the call three times, compare everything it returns, and return ours."""
    result = ours(layer, target, **(chunks or {}), **options)
    same = stock(layer, target, **options)
    exact = float64(layer, target, **options)
    for what, value, plain, reference in zip(Outcome._fields, result, same, exact, strict=True):
        assert (value is None) == (plain is None), what
        if value is not None:
            what = what.replace("_", " of the ", 1)
            assert_as_accurate(value, plain, reference, what, luck=2.0)
    return result


@contextlib.contextmanager
def chunk_sizes():
    """Records the rows of each chunk that a kernel is given."""
    sizes = []

    def spy(operator):
        def record(logits, *arguments):
            sizes.append(len(logits))
            return operator(logits, *arguments)

        return record

    names = ("forward", "forward_stats", "forward_grad_")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(ops, name, spy(getattr(ops, name))))
        yield sizes


@contextlib.contextmanager
def gemms():
    """Records the shapes of the results of all matrix products."""
    shapes = []

    def spy(function):
        def record(*arguments, **options):
            result = function(*arguments, **options)
            shapes.append(tuple(result.shape))
            return result

        return record

    with (
        mock.patch.object(torch, "mm", spy(torch.mm)),
        mock.patch.object(torch, "addmm", spy(torch.addmm)),
    ):
        yield shapes
