"""A bad call of `linear_cross_entropy` raises what torch raises, before anything is computed.

Torch's own function is asked where there is one (2.13 and newer), else `F.linear` followed by
`F.cross_entropy`. What torch has no words for has a sentence of ours.
"""

import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.grids import together
from support.linear_reference import gemms, stock_loss
from torch import nn

from fused_ce import linear_cross_entropy as lce

TORCHS = getattr(F, "linear_cross_entropy", None)


def layer(*, rows=4, features=3, classes=5, dtype=torch.float32):
    return torch.randn(rows, features).to(dtype), torch.randn(classes, features).to(dtype)


def indices(*shape, dtype=torch.int64):
    return torch.zeros(shape or (4,)).to(dtype)


# What each call is: input, weight, target, options. Without a comment, stock raises it in F.linear
# or F.cross_entropy; nothing may have been multiplied by then.
BAD_CALLS = {
    "target 7 of 5": lambda: (*layer(), torch.tensor([0, 7, 1, 2])),
    "target -1": lambda: (*layer(), torch.tensor([0, 1, -1, 2])),
    "target 7 of 5, smoothed": lambda: (
        *layer(),
        torch.tensor([0, 7, 1, 2]),
        {"label_smoothing": 0.1, "weight": torch.ones(5)},
    ),
    "target 7 of 5, half": lambda: (*layer(dtype=torch.bfloat16), torch.tensor([0, 7, 1, 2])),
    "batch sizes": lambda: (*layer(), indices(3)),
    "positions": lambda: (torch.randn(4, 3), torch.randn(5, 2, 3), indices(4, 3)),
    "no positions": lambda: (torch.randn(4, 3), torch.randn(5, 2, 3), indices(4)),
    "multi-target": lambda: (*layer(), indices(4, 1)),
    "float target": lambda: (*layer(), indices(dtype=torch.float32)),
    "int8 target": lambda: (*layer(), indices(dtype=torch.int8)),
    "int target of the logits' shape": lambda: (*layer(), indices(4, 5)),
    "probabilities of other classes": lambda: (*layer(), torch.rand(4, 6)),
    "two targets for one row": lambda: (torch.randn(3), torch.randn(5, 3), indices(2)),
    "weight of 4": lambda: (*layer(), indices(), {"weight": torch.ones(4)}),
    "weight of 4, smoothed": lambda: (
        *layer(),
        indices(),
        {"weight": torch.ones(4), "label_smoothing": 0.1},
    ),
    "double weight": lambda: (*layer(), indices(), {"weight": torch.ones(5).double()}),
    "smoothing 1.5": lambda: (*layer(), indices(), {"label_smoothing": 1.5}),
    "smoothing text": lambda: (*layer(), indices(), {"label_smoothing": "0.1"}),
    "reduction avg": lambda: (*layer(), indices(), {"reduction": "avg"}),
    "ignore_index float": lambda: (*layer(), indices(), {"ignore_index": 1.0}),
    "double input": lambda: (layer()[0].double(), layer()[1], indices()),
    "half bias": lambda: (*layer(), indices(), {"linear_bias": torch.ones(5).half()}),
    "target elsewhere": lambda: (*layer(), indices().to("meta")),
}
# Raised by torch's function of this name before the two that it stands for; in 2.10 by nobody.
TORCHS_OWN = {
    "scalar input": lambda: (torch.tensor(1.0), torch.randn(5, 3), indices()),
    "weight of one dimension": lambda: (layer()[0], torch.randn(3), indices()),
    "features": lambda: (layer()[0], torch.randn(5, 4), indices()),
    "bias of 4": lambda: (*layer(), indices(), {"linear_bias": torch.ones(4)}),
    "bias without positions": lambda: (
        torch.randn(4, 3),
        torch.randn(5, 2, 3),
        indices(4, 2),
        {"linear_bias": torch.ones(5)},
    ),
    "unbatched and positions": lambda: (torch.randn(3), torch.randn(5, 2, 3), indices(2)),
    "ignore_index and probabilities": lambda: (
        *layer(),
        torch.rand(4, 5),
        {"ignore_index": -100},
    ),
}


def raised_by(function, *tensors, **options):
    with pytest.raises(Exception) as caught:  # noqa: B017
        function(*tensors, **options)
    return type(caught.value), str(caught.value)


def unpack(call):
    *tensors, last = call()
    return (tensors, last) if isinstance(last, dict) else ((*tensors, last), {})


@together
@pytest.mark.parametrize("call", BAD_CALLS)
@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("requires_grad", (True, False))
def test_bad_call_raises_what_stock_raises(call, reduction, requires_grad):
    tensors, options = unpack(BAD_CALLS[call])
    options = {"reduction": reduction, **options}
    expected = raised_by(TORCHS or stock_loss, *tensors, **options)
    for t in tensors[:2]:
        t.requires_grad_(requires_grad)
    with gemms() as shapes:
        assert raised_by(lce, *tensors, chunk_size=2, **options) == expected
    assert shapes == []


@together
@pytest.mark.skipif(TORCHS is None, reason="torch 2.13 and newer have the function")
@pytest.mark.parametrize("call", TORCHS_OWN)
def test_bad_layer_raises_what_torch_raises(call):
    tensors, options = unpack(TORCHS_OWN[call])
    assert raised_by(lce, *tensors, **options) == raised_by(TORCHS, *tensors, **options)


def test_bad_layer_is_refused():
    # As above, in torch's words, for a torch that has none.
    messages = {
        "scalar input": "expected input with dimensionality 1 or 2, got 0",
        "weight of one dimension": "expected linear_weight with dimensionality at least 2, got 1",
        "features": "expected equal input and linear_weight last dimensions",
        "bias of 4": "expected linear_bias shape (5,), got (4,)",
        "bias without positions": "expected linear_bias shape (5, 2), got (5,)",
        "unbatched and positions": "requires batched input, (N, 3), got unbatched input",
        "ignore_index and probabilities": "ignore_index cannot be specified when target contains",
    }
    assert messages.keys() == TORCHS_OWN.keys()
    for call, message in messages.items():
        tensors, options = unpack(TORCHS_OWN[call])
        with pytest.raises(RuntimeError, match=re.escape(message)):
            lce(*tensors, **options)


# The last of several chunks holds the bad target; the first bad one is named.
@together
@pytest.mark.parametrize("dtype", (torch.int64, torch.int32, torch.uint8))
@pytest.mark.parametrize("classes", (5, 300))
def test_chunks_before_a_bad_target_are_not_computed(dtype, classes):
    input, linear_weight = layer(rows=20, classes=classes)
    target = torch.zeros(20, dtype=dtype)
    if dtype == torch.uint8 and classes > 255:
        lce(input, linear_weight, target.fill_(255), chunk_size=3)  # every value is a class
        return
    target[17], target[19] = (classes, 200) if dtype == torch.uint8 else (-1, classes)
    first = target[17].item()
    with gemms() as shapes, pytest.raises(IndexError, match=f"Target {first} is out of bounds."):
        lce(input, linear_weight, target, chunk_size=3)
    assert shapes == []


@pytest.mark.parametrize("shape", [(3, 2), (6,), (2, 4), (2, 3, 5, 1)])
def test_target_of_another_batch_shape_is_refused(shape):
    # Torch takes no input of three dimensions, so there is no error of its own. (3, 2) would fit
    # a batch of (2, 3) after flattening, with every target in the wrong place.
    with pytest.raises(RuntimeError, match=re.escape("expected target of shape (2, 3)")):
        lce(torch.randn(2, 3, 4), torch.randn(5, 4), indices(*shape))


@together
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "4"])
@pytest.mark.parametrize("name", ("chunk_size", "max_chunk_bytes"))
def test_chunk_of_nothing_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive int or None, got {value!r}"):
        lce(*layer(), indices(), **{name: value})


def test_two_sizes_of_a_chunk_are_refused():
    with pytest.raises(ValueError, match="pass one of them"):
        lce(*layer(), indices(), chunk_size=2, max_chunk_bytes=100)


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        (
            "linear_weight",
            nn.Linear(3, 5),
            "got a torch.nn.modules.linear.Linear; pass its weight, ",
        ),
        ("input", np.zeros((4, 3)), "got a numpy.ndarray; pass torch.from_numpy(input)."),
        ("linear_bias", [0.0] * 5, "got a builtins.list; pass a tensor."),
        ("options", {"chunk_size": 2}, "LinearCrossEntropyOptions or None, got {'chunk_size': 2}"),
    ],
)
def test_what_is_no_tensor_is_refused_with_what_to_pass(name, wrong, said):
    input, linear_weight = layer()
    arguments = {"input": input, "linear_weight": linear_weight, "target": indices(), name: wrong}
    with pytest.raises(TypeError, match=f"fused_ce: expected {name} to be .*" + re.escape(said)):
        lce(**arguments)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="an error has no notes in Python 3.10")
def test_exchanged_arguments_are_told_beneath_stocks_error():
    input, linear_weight = layer()
    with pytest.raises(ValueError, match=r"Expected input batch_size \(5\)") as error:
        lce(linear_weight, input, indices())
    assert "input comes first" in error.value.__notes__[0]
    with pytest.raises(ValueError, match="Expected input batch_size") as error:
        lce(input, linear_weight, indices(3))
    assert not hasattr(error.value, "__notes__")
