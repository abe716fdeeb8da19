"""A bad call raises what stock raises, and before anything is written.

Each call is made to both functions and the exceptions are compared, type and text. Then the range
of the targets, which only the kernels see: in every mode, shape and kind of index, far out of
range as well, with the logits untouched afterwards.
"""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.grids import DTYPES, MODES, SHAPES, crossed, every_mode, together
from support.layouts import lay_out
from support.reference import check_against_stock

import fused_ce


def logits(*shape, dtype=torch.float32):
    return torch.randn(shape or (4, 5)).to(dtype)


def indices(*shape, dtype=torch.int64):
    return torch.zeros(shape or (4,)).to(dtype)


def meta(tensor):
    return tensor.to("meta")


# What each call is, and its arguments. Rows of the contract first, then their neighbours.
BAD_CALLS = {
    "target 7 of 5": lambda: (logits(), torch.tensor([0, 1, 7, 2])),
    "target -1": lambda: (logits(), torch.tensor([0, 1, -1, 2])),
    "target equal to C": lambda: (logits(), torch.tensor([0, 1, 5, 2])),
    "float target": lambda: (logits(), indices(dtype=torch.float32)),
    "double target": lambda: (logits(), indices(dtype=torch.float64)),
    "half target": lambda: (logits(), indices(dtype=torch.float16)),
    "int8 target": lambda: (logits(), indices(dtype=torch.int8)),
    "bool target": lambda: (logits(), indices(dtype=torch.bool)),
    "uint16 target": lambda: (logits(), indices(dtype=torch.uint16)),
    "complex target": lambda: (logits(), indices(dtype=torch.complex64)),
    "float target of positions": lambda: (logits(2, 5, 3), indices(2, 3, dtype=torch.float32)),
    "int8 target of positions": lambda: (logits(2, 5, 3), indices(2, 3, dtype=torch.int8)),
    "batch sizes": lambda: (logits(4, 5), indices(3)),
    "batch sizes of images": lambda: (logits(2, 5, 3, 4), indices(3, 3, 4)),
    "number of positions": lambda: (logits(2, 5, 3), indices(2, 4)),
    "no positions": lambda: (logits(2, 5, 3), indices(2)),
    "height and width": lambda: (logits(2, 5, 3, 4), indices(2, 4, 3)),
    "flat positions": lambda: (logits(2, 5, 3, 4), indices(2, 12)),
    "depth": lambda: (logits(2, 5, 3, 4, 2), indices(2, 3, 4, 3)),
    "multi-target": lambda: (logits(4, 5), indices(4, 1)),
    "scalar target of a batch": lambda: (logits(1, 5), indices().new_zeros(())),
    "two targets for one row": lambda: (logits(5), indices(2)),
    "no target for one row": lambda: (logits(5), indices(0)),
    "scalar logits": lambda: (torch.tensor(1.0), torch.tensor(0)),
    "scalar logits and probability": lambda: (torch.tensor(1.0), torch.tensor(1.0)),
    "no classes": lambda: (logits(2, 0), indices(2)),
    "int target of the input's shape": lambda: (logits(4, 5), indices(4, 5)),
    "uint8 target of the input's shape": lambda: (logits(4, 5), indices(4, 5, dtype=torch.uint8)),
    "int target of positions and classes": lambda: (logits(2, 5, 3), indices(2, 5, 3)),
    "probabilities of other classes": lambda: (logits(4, 5), torch.rand(4, 6)),
    "probabilities of other positions": lambda: (logits(2, 5, 3), torch.rand(2, 5, 4)),
    "probabilities for one row": lambda: (logits(4, 5), torch.rand(1, 5)),
    "ignore_index and probabilities": lambda: (logits(), torch.rand(4, 5), {"ignore_index": 0}),
    "weight of 4": lambda: (logits(), indices(), {"weight": torch.ones(4)}),
    "weight of 6": lambda: (logits(), indices(), {"weight": torch.ones(6)}),
    "weight of 4, positions": lambda: (
        logits(2, 5, 3),
        indices(2, 3),
        {"weight": torch.ones(4)},
    ),
    "weight of 4, probabilities": lambda: (logits(), torch.rand(4, 5), {"weight": torch.ones(4)}),
    "weight of 4, smoothing": lambda: (
        logits(),
        indices(),
        {"weight": torch.ones(4), "label_smoothing": 0.1},
    ),
    "scalar weight": lambda: (logits(), indices(), {"weight": torch.tensor(1.0)}),
    "column weight": lambda: (logits(), indices(), {"weight": torch.ones(5, 1)}),
    "double weight": lambda: (logits(), indices(), {"weight": torch.ones(5).double()}),
    "half weight": lambda: (logits(), indices(), {"weight": torch.ones(5).half()}),
    "int weight": lambda: (logits(), indices(), {"weight": torch.ones(5).long()}),
    "float weight for half logits": lambda: (
        logits(dtype=torch.bfloat16),
        indices(),
        {"weight": torch.ones(5)},
    ),
    "double weight, positions": lambda: (
        logits(2, 5, 3),
        indices(2, 3),
        {"weight": torch.ones(5).double()},
    ),
    "weight requires grad": lambda: (
        logits(),
        indices(),
        {"weight": torch.ones(5, requires_grad=True)},
    ),
    "weight requires grad, positions": lambda: (
        logits(2, 5, 3),
        indices(2, 3),
        {"weight": torch.ones(5, requires_grad=True), "label_smoothing": 0.1},
    ),
    "list weight": lambda: (logits(), indices(), {"weight": [1.0] * 5}),
    "smoothing 1.5": lambda: (logits(), indices(), {"label_smoothing": 1.5}),
    "smoothing 1.5, probabilities": lambda: (
        logits(),
        torch.rand(4, 5),
        {"label_smoothing": 1.5},
    ),
    "smoothing inf": lambda: (logits(), indices(), {"label_smoothing": float("inf")}),
    "smoothing None": lambda: (logits(), indices(), {"label_smoothing": None}),
    "smoothing text": lambda: (logits(), indices(), {"label_smoothing": "0.1"}),
    "reduction avg": lambda: (logits(), indices(), {"reduction": "avg"}),
    "reduction Mean": lambda: (logits(), indices(), {"reduction": "Mean"}),
    "reduction None": lambda: (logits(), indices(), {"reduction": None}),
    "reduction list": lambda: (logits(), indices(), {"reduction": ["mean"]}),
    "ignore_index float": lambda: (logits(), indices(), {"ignore_index": 1.0}),
    "ignore_index bool": lambda: (logits(), indices(), {"ignore_index": True}),
    "ignore_index None": lambda: (logits(), indices(), {"ignore_index": None}),
    "ignore_index text": lambda: (logits(), indices(), {"ignore_index": "1"}),
    "ignore_index 2**63": lambda: (logits(), indices(), {"ignore_index": 2**63}),
    "int logits": lambda: (logits(dtype=torch.int64), indices()),
    "bool logits": lambda: (logits(dtype=torch.bool), indices()),
    "complex logits": lambda: (logits(dtype=torch.complex64), indices()),
    "int logits of positions": lambda: (logits(2, 5, 3, dtype=torch.int64), indices(2, 3)),
    "int logits, probabilities": lambda: (logits(dtype=torch.int64), torch.rand(4, 5)),
    "sparse logits": lambda: (logits().to_sparse(), indices()),
    "target on another device": lambda: (logits(), meta(indices())),
    "logits on another device": lambda: (meta(logits()), indices()),
    "weight on another device": lambda: (logits(), indices(), {"weight": meta(torch.ones(5))}),
    "probabilities on another device": lambda: (logits(), meta(torch.rand(4, 5))),
    "logits None": lambda: (None, indices()),
    "logits a list": lambda: ([[1.0, 2.0]], indices()),
    "target None": lambda: (logits(), None),
    "target a number": lambda: (logits(), 3),
    "target an array": lambda: (logits(), indices().numpy()),
}


def raised_by(function, input, target, **options):
    with pytest.raises(Exception) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function(input, target, **options)
    return caught.value


@every_mode
@together
@pytest.mark.parametrize("call", BAD_CALLS)
def test_bad_call_raises_what_stock_raises(call, mode):
    input, target, *rest = BAD_CALLS[call]()
    options = rest[0] if rest else {}
    differentiable = isinstance(input, torch.Tensor) and input.dtype.is_floating_point
    before = input.clone() if differentiable and not input.is_meta else None
    if mode == "no grad":
        if isinstance(options.get("weight"), torch.Tensor):
            options["weight"] = options["weight"].detach()
            if call.startswith("weight requires grad"):
                return  # nothing wrong with it there: see test_edges.py
        with torch.no_grad():
            expected = raised_by(F.cross_entropy, input, target, **options)
            error = raised_by(fused_ce.cross_entropy, input, target, **options)
    else:
        if differentiable:
            input.requires_grad_()
        expected = raised_by(F.cross_entropy, input, target, **options)
        error = raised_by(fused_ce.cross_entropy, input, target, **options, **MODES[mode])
    assert type(error) is type(expected)
    assert str(error) == str(expected)
    if before is not None:
        assert torch.equal(input.to_dense(), before.to_dense())


# The message that the contract quotes, so that a change of stock's own is noticed too.
QUOTED = {
    "target 7 of 5": (IndexError, "Target 7 is out of bounds."),
    "target -1": (IndexError, "Target -1 is out of bounds."),
    "float target": (
        RuntimeError,
        # torch before 2.12 only says this.
        "but found Float"
        if torch.__version__.startswith(("2.10.", "2.11."))
        else "expected target dtype to be Long or Byte, but got Float",
    ),
    "batch sizes": (
        ValueError,
        "Expected input batch_size (4) to match target batch_size (3).",
    ),
    "number of positions": (RuntimeError, "Expected target size [2, 3], got [2, 4]"),
    "weight of 4": (
        RuntimeError,
        "weight tensor should be defined either for all 5 classes or no classes but got weight "
        "tensor of shape: [4]",
    ),
    "int target of the input's shape": (
        RuntimeError,
        "Expected floating point type for target with class probabilities, got Long",
    ),
    "ignore_index and probabilities": (
        RuntimeError,
        "ignore_index is not supported for floating point target",
    ),
    "double weight": (RuntimeError, "expected scalar type Float but found Double"),
    "smoothing 1.5": (RuntimeError, "label_smoothing must be between 0.0 and 1.0. Got: 1.5"),
    "reduction avg": (ValueError, "avg is not a valid value for reduction"),
    "ignore_index float": (TypeError, "must be int, not float"),
    "ignore_index bool": (TypeError, "must be int, not bool"),
    "ignore_index None": (TypeError, "must be int, not NoneType"),
    "int logits": (
        NotImplementedError,
        "\"log_softmax_lastdim_kernel_impl\" not implemented for 'Long'",
    ),
    "complex logits": (
        NotImplementedError,
        "\"log_softmax_lastdim_kernel_impl\" not implemented for 'ComplexFloat'",
    ),
    "weight requires grad": (RuntimeError, "not differentiable with respect to argument 'weight'"),
    "target on another device": (RuntimeError, "is not on the expected device"),
}


@together
@pytest.mark.parametrize("call", QUOTED)
def test_message_is_the_one_in_the_contract(call):
    input, target, *rest = BAD_CALLS[call]()
    kind, message = QUOTED[call]
    with pytest.raises(kind, match=re.escape(message)):
        fused_ce.cross_entropy(input, target, **(rest[0] if rest else {}))


@together
@crossed(shape=SHAPES, mode=MODES, dtype=DTYPES, reduction=("mean", "none"))
def test_target_out_of_range_is_refused_and_nothing_written(shape, mode, dtype, reduction):
    # Each kind of index has its own nearest and farthest wrong values; 5 is C itself. A far index
    # leaves the process at once if it is followed; -100 is no class if it is not ignored.
    wrong = {
        torch.int64: (5, -1, -100, 2**40, -(2**63)),
        torch.int32: (5, -1, 2**31 - 1, -(2**31)),
        torch.int16: (5, -1, 2**15 - 1),
        torch.uint8: (5, 255),
    }
    for kind, values in wrong.items():
        for value in values:
            for options in (
                {},
                {"label_smoothing": 0.1},
                {"weight": torch.ones(5, dtype=dtype)},
            ):
                input = logits(*SHAPES[shape](5), dtype=dtype)
                target = torch.zeros(input.shape[:1] + input.shape[2:] if input.dim() > 1 else ())
                target = target.to(kind)
                target.view(-1)[-1] = value
                before = input.clone()
                if mode != "no grad":
                    input.requires_grad_()
                with pytest.raises(IndexError) as caught:
                    fused_ce.cross_entropy(
                        input,
                        target,
                        reduction=reduction,
                        ignore_index=-7,
                        **options,
                        **MODES[mode],
                    )
                assert str(caught.value) == f"Target {value} is out of bounds."
                assert torch.equal(input, before)


# The bad target comes last, after rows that other threads have long finished.
@together
@crossed(
    shape=((5000, 10), (65, 4097), (2, 21, 33, 67)),
    dtype=DTYPES,
    reduction=("mean", "none"),
    layout=("contiguous", "gap after each row"),
)
def test_in_place_writes_nothing_where_a_target_is_bad(shape, dtype, reduction, layout):
    torch.set_num_threads(3)
    input = lay_out(logits(*shape, dtype=dtype), layout).requires_grad_()
    before = input.detach().clone()
    target = indices(*shape[:1], *shape[2:])
    for position in (0, target.numel() // 2, -1):
        target.zero_().view(-1)[position] = shape[1]
        with pytest.raises(IndexError):
            fused_ce.cross_entropy(input, target, reduction=reduction, inplace=True)
        assert torch.equal(input, before)
    # And the same logits are still good for a right call.
    fused_ce.cross_entropy(input, target.zero_(), reduction=reduction, inplace=True)


@together
@every_mode
@pytest.mark.parametrize("value", [7, -1, -100, 2**40, -(2**63)])
def test_ignored_value_may_be_out_of_range(mode, value):
    target = torch.tensor([0, value, 4, value])
    check_against_stock(logits(4, 5), target, mode=mode, ignore_index=value)


@every_mode
def test_first_of_several_bad_targets_is_named(mode):
    # Stock names the first of them, whatever the number of threads.
    target = torch.zeros(3000, dtype=torch.int64)
    target[[10, 1500, 2999]] = torch.tensor([17, -3, 99])
    input = torch.randn(3000, 10, requires_grad=mode != "no grad")
    expected = raised_by(F.cross_entropy, input, target)
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        error = raised_by(fused_ce.cross_entropy, input, target, **MODES[mode])
        assert (type(error), str(error)) == (type(expected), str(expected))


@pytest.mark.parametrize("option", ["grad_in_forward", "inplace"])
def test_options_of_our_own_are_taken_by_name_alone(option):
    with pytest.raises(TypeError):
        fused_ce.cross_entropy(logits(), indices(), None, None, -100, None, "mean", 0.0, True)
    fused_ce.cross_entropy(logits(), indices(), **{option: True})


# Both legacy arguments, alone and together, and over a reduction that they override.
LEGACY = [
    {"size_average": True},
    {"size_average": False},
    {"reduce": True},
    {"reduce": False},
    {"size_average": False, "reduce": True},
    {"size_average": True, "reduce": False},
    {"size_average": False, "reduction": "none"},
    {"size_average": True, "reduction": "avg"},
    {"reduction": "elementwise_mean"},
]


@every_mode
@together
@pytest.mark.parametrize("options", LEGACY, ids=str)
def test_legacy_arguments_mean_and_warn_the_same(options, mode):
    input, target = logits(), torch.tensor([0, 1, 2, 3])
    input.requires_grad_(mode != "no grad")
    losses, messages = [], []
    # Stock comes first: in place the logits are gone afterwards.
    for function, extra in ((F.cross_entropy, {}), (fused_ce.cross_entropy, MODES[mode])):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            losses.append(function(input, target, **options, **extra).detach().clone())
        messages.append([(w.category, str(w.message)) for w in caught])
    torch.testing.assert_close(*losses)
    assert len(messages[0]) == 1
    assert messages[1] == messages[0]


@every_mode
@pytest.mark.parametrize("freed", ["input", "target", "weight"])
def test_storage_that_was_freed_is_not_read(freed, mode):
    # As sharded training does between uses: the sizes stay, the memory goes.
    tensors = {
        "input": torch.randn(400, 500),
        "target": torch.zeros(400, dtype=torch.int64),
        "weight": torch.ones(500),
    }
    tensors[freed].untyped_storage().resize_(0)
    for function, options in ((F.cross_entropy, {}), (fused_ce.cross_entropy, MODES[mode])):
        with pytest.raises(RuntimeError, match="its data is not allocated yet"):
            function(**tensors, **options)
