"""`warn_on_fallback` warns once for each reason and line; `explain_linear` tells a head's way.

The warnings name the caller's line, through modules, modes and compiled functions alike, and there
are none where the kernels run, where stock refuses a call, or where nobody asked.
"""

import threading
import warnings

import pytest
import torch
from support.grids import together
from torch import nn

import fused_ce
from fused_ce import fallback

INPUT, TARGET = torch.randn(6, 5), torch.arange(6) % 5
HEAD = torch.randn(5, 5)


@pytest.fixture(autouse=True)
def switched_off():
    yield
    fused_ce.warn_on_fallback(False)


def caught(function):
    """The warnings of a call, though Python would hide a repeated one."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        function()
    return found


def fall_back():
    torch.func.grad(fused_ce.cross_entropy)(INPUT, TARGET)


def test_nothing_is_said_unless_asked_for():
    assert caught(fall_back) == []


def test_nothing_is_said_where_the_kernels_run():
    fused_ce.warn_on_fallback()
    leaf = INPUT.clone().requires_grad_()
    assert caught(lambda: fused_ce.cross_entropy(leaf, TARGET).backward()) == []
    assert caught(lambda: fused_ce.linear_cross_entropy(leaf, HEAD, TARGET).backward()) == []


def test_each_line_and_reason_is_named_once():
    weight = torch.ones(5, requires_grad=True)

    def on_one_line(loss):
        return loss(INPUT, INPUT.softmax(1), weight)

    def lines():
        for _ in range(3):
            on_one_line(fused_ce.cross_entropy)
            on_one_line(torch.func.grad(fused_ce.cross_entropy))
            fall_back()

    with fused_ce.warn_on_fallback():
        found = caught(lines)
    lines = [f.__code__.co_firstlineno + 1 for f in (on_one_line, on_one_line, fall_back)]
    assert [w.lineno for w in found] == lines
    assert ["the weight requires grad" in str(w.message) for w in found] == [True, False, False]
    assert {w.filename for w in found} == {__file__}


@pytest.mark.parametrize(
    "call",
    [
        lambda x: fused_ce.cross_entropy(x, TARGET),
        lambda x: fused_ce.CrossEntropyLoss()(x, TARGET),
        lambda x: nn.Sequential(fused_ce.LinearCrossEntropyLoss(5, 5))[0](x, TARGET),
        lambda x: fused_ce.linear_cross_entropy(x, HEAD, TARGET),
    ],
    ids=["function", "module", "head module", "head"],
)
def test_line_is_the_callers(call):
    def lines():
        with torch.autograd.forward_ad.dual_level(), torch.device("cpu"):
            call(INPUT)

    fused_ce.warn_on_fallback()
    (found,) = caught(lines)
    assert (found.filename, found.lineno) == (__file__, call.__code__.co_firstlineno)
    assert "a torch.func transform or forward-mode differentiation is active" in str(found.message)


def test_a_head_is_named_as_one_and_its_inner_loss_is_not():
    fused_ce.warn_on_fallback()
    target = INPUT.softmax(1).requires_grad_()
    (found,) = caught(lambda: fused_ce.linear_cross_entropy(INPUT, HEAD, target))
    said = fused_ce.explain_linear(INPUT, HEAD, target)
    expected = f"stock PyTorch takes this call of fused_ce.linear_cross_entropy: {said[7:]}"
    assert str(found.message) == expected


class Overriding(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


def test_an_overriding_subclass_is_named():
    fused_ce.warn_on_fallback()
    input = INPUT.as_subclass(Overriding)
    (found,) = caught(lambda: fused_ce.cross_entropy(input, TARGET))
    assert "overrides __torch_function__" in str(found.message)


def test_a_refused_call_only_raises():
    fused_ce.warn_on_fallback()

    def refused():
        with pytest.raises(ValueError, match="batch_size"):
            fused_ce.cross_entropy(INPUT, TARGET[:3])

    assert caught(refused) == []


def test_context_puts_back_what_was_set():
    for before in (False, True):
        fused_ce.warn_on_fallback(before)
        with fused_ce.warn_on_fallback(not before):
            assert fallback.is_on is not before
        assert fallback.is_on is before
    with pytest.raises(ZeroDivisionError), fused_ce.warn_on_fallback(False):
        raise ZeroDivisionError
    assert fallback.is_on


def test_switching_on_again_says_it_again():
    def twice():
        for _ in range(2):
            with fused_ce.warn_on_fallback():
                fall_back()

    assert len(caught(twice)) == 2


def test_threads_share_one_warning():
    fused_ce.warn_on_fallback()
    barrier = threading.Barrier(8)

    def work():
        barrier.wait()
        for _ in range(20):
            fall_back()

    def run():
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert len(caught(run)) == 1


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_call_is_named_too(fullgraph):
    torch._dynamo.reset()
    step = torch.compile(
        torch.func.grad(fused_ce.cross_entropy), fullgraph=fullgraph, backend="eager"
    )
    fused_ce.warn_on_fallback()
    found = [w for w in caught(lambda: step(INPUT, TARGET)) if "fused_ce" in str(w.message)]
    assert len(found) == 1


# What `explain_linear` says of calls; None where torch's shapes do not fit.
def head(rows=10, features=3, classes=5, grad=True, dtype=torch.float32):
    input = torch.randn(rows, features, dtype=dtype)
    return input, torch.randn(classes, features, dtype=dtype, requires_grad=grad)


@together
@pytest.mark.parametrize(
    "options, grad, moment, chunks",
    [
        ({}, True, "gradient in forward", "1 chunk of 10 rows, 200 bytes"),
        ({"chunk_size": 4}, True, "gradient in forward", "3 chunks of 4 rows, 80 bytes each"),
        ({"max_chunk_bytes": 100}, True, "gradient in forward", "2 chunks of 5 rows, 100 bytes"),
        ({"reduction": "none"}, True, "recomputed in backward", "1 chunk"),
        ({"grad_in_forward": False}, True, "recomputed in backward", "1 chunk"),
        ({}, False, "no gradient", "1 chunk"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:fused_ce. max_chunk_bytes")
def test_head_is_explained(options, grad, moment, chunks):
    from support.linear_reference import chunk_sizes

    input, weight = head(grad=grad)
    target = torch.arange(10) % 5
    said = fused_ce.explain_linear(input, weight, target, **options)
    assert said.startswith(f"fused: {moment}, {chunks}")
    assert said.endswith(fused_ce.explain(input, target % 3).rpartition(", ")[2])
    with chunk_sizes() as sizes:
        fused_ce.linear_cross_entropy(input, weight, target, **options)
    assert said.split(", ")[1].split()[0] == str(len(sizes))
    assert said.split(", ")[1].split()[3] == str(sizes[0])


@pytest.mark.usefixtures("bfloat16_in_itself")
def test_half_types_of_a_head_are_explained():
    target = torch.arange(10) % 5
    said = fused_ce.explain_linear(*head(dtype=torch.bfloat16), target)
    assert "gradient in forward, 1 chunk of 10 rows, 100 bytes" in said
    # Float16 has float32 logits on the CPU, and a gradient scaler's factor before the rounding.
    said = fused_ce.explain_linear(*head(dtype=torch.float16), target)
    assert "recomputed in backward, 1 chunk of 10 rows, 200 bytes" in said


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (lambda: (*head(), torch.rand(10, 5, requires_grad=True)), "the target requires grad"),
        (lambda: (*head(), torch.arange(10).float()), "do not know"),
        (
            lambda: (head()[0].double(), head()[1], torch.arange(10) % 5),
            "differ in device or dtype",
        ),
        (lambda: (*(t.to("meta") for t in head()), torch.arange(10)), "no kernels for meta"),
        (lambda: (head()[0].as_subclass(Overriding), head()[1], torch.arange(10)), "overrides"),
    ],
)
def test_head_left_to_stock_is_explained(arguments, reason):
    said = fused_ce.explain_linear(*arguments())
    assert said.startswith("stock: ")
    assert reason in said


def test_unbatched_head_is_explained():
    input, weight = head()
    said = fused_ce.explain_linear(input[0], weight, torch.tensor(1), reduction="sum")
    assert "gradient in forward, 1 chunk of 1 row, 20 bytes" in said


def test_explaining_a_head_computes_nothing():
    input, weight = head()
    assert "fused" in fused_ce.explain_linear(input, weight, torch.full((10,), 99))
