"""What the tests of log_softmax and nll_loss compare and count."""

import functools
import mmap
import resource

import pytest
import torch

LARGE = (320, 32768)  # 40 MiB of float32


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


def page_faults(function):
    """Those of a second call."""
    function()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    result = function()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    del result
    return after - before


@functools.cache
def gives_huge_pages():
    """Whether this system does so for memory that asks."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    bytes = 1 << 25

    def touch():
        memory = mmap.mmap(-1, bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory[:: mmap.PAGESIZE] = b"1" * (bytes // mmap.PAGESIZE)
        return memory

    return page_faults(touch) < bytes // mmap.PAGESIZE // 4


with_huge_pages = pytest.mark.skipif(not gives_huge_pages(), reason="there are no huge pages here")
