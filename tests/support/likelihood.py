"""What the tests of log_softmax and nll_loss share: every size as if it were large."""

import pytest
import torch

from fused_ce import huge_pages


@pytest.fixture
def all_is_large(monkeypatch):
    """Small tensors take the way of those of 32 MiB, and their memory is counted."""
    taken = []
    fresh = huge_pages.fresh

    def counted(*arguments):
        taken.append(arguments[0])
        return fresh(*arguments)

    monkeypatch.setattr(huge_pages, "LEAST_BYTES", 0)
    monkeypatch.setattr(huge_pages, "fresh", counted)
    return taken


def assert_same(ours, stock):
    """The same numbers, bit for bit, in the same layout."""
    assert type(ours) is type(stock)
    if isinstance(ours, (tuple, list)):
        assert len(ours) == len(stock)
        for one, other in zip(ours, stock, strict=True):
            assert_same(one, other)
        return
    if not isinstance(ours, torch.Tensor):
        assert ours == stock
        return
    torch.testing.assert_close(ours, stock, rtol=0, atol=0, equal_nan=True, check_stride=True)


def outcome(function, *arguments, **options):
    """What a call gives, or how it is refused."""
    try:
        return function(*arguments, **options)
    except Exception as error:
        return type(error), str(error)


def derivatives(function, input, *others, order=3, **options):
    """The value and the gradients with respect to the input, up to this order."""
    leaf = input.detach().requires_grad_()
    value = function(leaf, *others, **options)
    found = [value.detach()]
    torch.manual_seed(0)
    for _ in range(order):
        incoming = torch.randn_like(value)
        (value,) = torch.autograd.grad(value, leaf, incoming, create_graph=order > 1)
        found.append(value.detach())
        if not value.requires_grad:
            break
    return found
