"""What the tests compare with, and the rule by which they compare.

Each call is run three times: ours, stock PyTorch in the same dtype, and stock in float64 on the
same (exactly converted) values. Ours may be no further from the float64 result than stock is,
plus one ulp, where an ulp is the spacing of the tensor's dtype at the largest magnitude of the
float64 result: for a loss scalar its own ulp, for a gradient that of its largest element.
"""

import contextlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

import fused_ce
from support.grids import MODES


class Outcome(NamedTuple):
    loss: torch.Tensor
    grad_input: torch.Tensor | None = None
    grad_target: torch.Tensor | None = None


@contextlib.contextmanager
def one_thread():
    """For what is compared with: on a busy machine a test would mostly wait for threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def same_layout(tensor):
    """A detached copy with the same strides and storage offset, gaps and overlaps included."""
    storage = tensor.detach().untyped_storage().clone()
    copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return copy.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def incoming_gradient(loss, scale):
    """`scale` for a scalar; for unreduced losses a different multiple of it in each row.

    The multiples are -1.5, -0.5, 0.5, 1.5 and 2.5, exact in every dtype, so that the three
    computations that are compared receive the same gradient.
    """
    if loss.dim() == 0:
        return torch.full_like(loss, scale)
    multiples = torch.arange(loss.numel(), device=loss.device).remainder(5) - 1.5
    return (multiples * scale).to(loss.dtype).view(loss.shape)


def differentiate(function, input, target, *, scale=1.0, target_grad=False, **options):
    """The loss and the gradients as autograd hands them out, with the strides they come with."""
    leaves = [same_layout(input).requires_grad_()]
    if target_grad:
        target = same_layout(target).requires_grad_()
        leaves.append(target)
    loss = function(leaves[0], target, **options)
    value = loss.detach().clone()
    return Outcome(value, *torch.autograd.grad(loss, leaves, incoming_gradient(loss, scale)))


def ours(input, target, *, mode="default", scale=1.0, target_grad=False, **options):
    """`fused_ce.cross_entropy` in one of `MODES`; fails if it would fall back to stock."""
    options = {**options, **MODES[mode]}

    def fused(input, target, **options):
        reason = fused_ce.explain(input, target, **options)
        assert reason.startswith("fused"), reason
        return fused_ce.cross_entropy(input, target, **options)

    if mode == "no grad":
        with torch.no_grad():
            return Outcome(fused(same_layout(input), target, **options))
    return differentiate(fused, input, target, scale=scale, target_grad=target_grad, **options)


@one_thread()
def stock(input, target, *, scale=1.0, target_grad=False, **options):
    """`F.cross_entropy`; integer targets as int64, the only kind it takes for every shape."""
    target = target if target.is_floating_point() else target.long()
    return differentiate(
        F.cross_entropy, input, target, scale=scale, target_grad=target_grad, **options
    )


@one_thread()
def float64(input, target, *, weight=None, **options):
    """Stock's formula on the same numbers in float64."""
    return stock(
        input.double(),
        target.double() if target.is_floating_point() else target,
        weight=None if weight is None else weight.double(),
        **options,
    )


def ulp(reference, dtype):
    """The spacing of `dtype` at the largest finite magnitude of `reference`."""
    finite = reference[reference.isfinite()].abs()
    magnitude = finite.max().item() if finite.numel() else 0.0
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(magnitude, info.tiny)))


def _errors(value, reference):
    difference = value.double() - reference
    return difference.abs().max().item(), difference.square().mean().sqrt().item()


@one_thread()
def assert_as_accurate(ours, stock, reference, what="value", luck=1.0):
    """The rule at the top of this file; infinities and nans must be where float64 has them.

    `luck` is how much larger than stock's the maximum error may be: that of a GEMM depends on the
    order of its sums, which differs from one number of rows to the next.
    """
    assert ours.dtype == stock.dtype, what
    assert ours.shape == stock.shape, what
    if ours.numel() == 0:
        return
    if ours.dtype == torch.float64:
        # Stock is itself the reference: what differs is the order of additions. The absolute
        # term is for elements that are small differences of larger numbers (p - 1, p - e / C).
        scale = ulp(reference, torch.float64)
        torch.testing.assert_close(ours, stock, rtol=1e-12, atol=64 * scale, equal_nan=True)
        return
    expected = reference.to(ours.dtype)  # where a half type ends, so does the finite answer
    finite = expected.isfinite()
    torch.testing.assert_close(ours[~finite], expected[~finite], equal_nan=True, msg=what)
    if not finite.any():
        return
    spacing = ulp(reference[finite], ours.dtype)
    values = reference[finite]
    values = values[values != 0]  # which is exact where a row is ignored
    is_one_value = bool((values == values[:1]).all())
    errors = _errors(ours[finite], reference[finite])
    allowed = _errors(stock[finite], reference[finite])
    for name, error, limit in zip(("maximum", "rms"), errors, allowed, strict=True):
        limit = limit if math.isfinite(limit) else 0.0  # stock overflowed; ours has no excuse
        # Of one value alone, however often it is there, the rms error is the largest one.
        limit *= luck if name == "maximum" or is_one_value else 1.0
        assert error <= limit + spacing, (
            f"{name} error of the {what}: {error:.3e}; stock's {limit:.3e}, and {spacing:.3e}"
        )


MOST_DRAWS = 25


def _joined(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def assert_draws_as_accurate(measure, names):
    """The rule for what `measure()` finds of numbers that it draws, each time others.

    It returns ours, stock's and the exact result for each of `names`. Of few numbers stock's result
    is now and then the exact one by luck. Where ours is further away, more are drawn, and all are
    judged together: what is wrong of one draw stays wrong of them all. Returns the last of ours.
    """
    draws = []
    while True:
        draws.append(measure())
        for ours, stock, _ in draws[-1]:
            assert ours.shape == stock.shape
        try:
            for i, name in enumerate(names):
                of_one = zip(*(draw[i] for draw in draws), strict=True)
                assert_as_accurate(*map(_joined, of_one), name)
            return tuple(ours for ours, _, _ in draws[-1])
        except AssertionError:
            if len(draws) == MOST_DRAWS:
                raise


def check_against_stock(input, target, *, mode="default", scale=1.0, target_grad=False, **options):
    """Run the call three times, compare everything it returns, and return ours."""
    result = ours(input, target, mode=mode, scale=scale, target_grad=target_grad, **options)
    same = stock(input, target, scale=scale, target_grad=target_grad, **options)
    exact = float64(input, target, scale=scale, target_grad=target_grad, **options)
    for what, value, plain, reference in zip(Outcome._fields, result, same, exact, strict=True):
        if value is not None:
            assert_as_accurate(value, plain, reference, what.replace("_", " of the "))
    return result
