"""`CrossEntropyLoss` is an `nn.CrossEntropyLoss` in everything but its arithmetic.

Constructor, attributes, buffer, state_dict, repr, copies and pickles, and moving from one dtype to
another; bad options raise when the module is called, as in stock, and not when it is made.
"""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
import torch.nn as nn
from support.grids import MODES, every_dtype, every_mode, together
from support.reference import differentiate

import fused_ce

OPTIONS = (
    {},
    {"weight": [1.0, 2.0, 0.5, 0.0, 3.0]},
    {"ignore_index": 2},
    {"reduction": "sum"},
    {"reduction": "none", "label_smoothing": 0.1},
    {"weight": [1.0, 2.0, 0.5, 1.0, 3.0], "ignore_index": 0, "label_smoothing": 0.3},
)


def build(kind, options, **extra):
    """A module of `kind`, with a weight tensor of its own."""
    options = dict(options)
    if "weight" in options:
        options["weight"] = torch.tensor(options["weight"])
    return kind(**options, **extra)


def problem(dtype=torch.float32):
    return torch.randn(6, 5).to(dtype), torch.tensor([0, 1, 2, 3, 4, 2])


def assert_same(module, expected, dtype=torch.float32):
    assert_close = torch.testing.assert_close
    input, target = problem(dtype)
    half = dtype in (torch.bfloat16, torch.float16)
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if half else {}
    assert_close(
        differentiate(module, input, target), differentiate(expected, input, target), **tolerance
    )


@together
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@every_mode
@every_dtype
def test_module_gives_the_same_loss_and_gradient(options, mode, dtype):
    module = build(fused_ce.CrossEntropyLoss, options, **MODES[mode]).to(dtype)
    expected = build(nn.CrossEntropyLoss, options).to(dtype)
    if mode == "no grad":
        input, target = problem(dtype)
        with torch.no_grad():
            loss = module(input, target)
        torch.testing.assert_close(loss, expected(input, target), rtol=3e-2, atol=3e-2)
    else:
        assert_same(module, expected, dtype)


def test_signatures_agree_up_to_our_own_options():
    for mine, theirs in (
        (fused_ce.CrossEntropyLoss.__init__, nn.CrossEntropyLoss.__init__),
        (fused_ce.cross_entropy, nn.functional.cross_entropy),
    ):
        mine = list(inspect.signature(mine).parameters.values())
        theirs = list(inspect.signature(theirs).parameters.values())
        ours, rest = mine[: len(theirs)], mine[len(theirs) :]
        for parameter, expected in zip(ours, theirs, strict=True):
            assert parameter.name == expected.name
            assert parameter.default == expected.default
            assert parameter.kind == expected.kind
        assert [(p.name, p.default, p.kind) for p in rest] == [
            (name, default, inspect.Parameter.KEYWORD_ONLY)
            for name, default in (
                ("grad_in_forward", True),
                ("inplace", None),
                ("dtype", None),
                ("denominator", None),
                ("on_all_ignored", "nan"),
                ("z_loss", 0.0),
                ("logit_scale", 1.0),
                ("softcap", None),
                ("sample_weight", None),
                ("focal_gamma", 0.0),
                ("on_out_of_range", "assert"),
                ("process_group", None),
                ("num_classes", None),
                ("class_offset", None),
            )
        ]


def test_positional_arguments_land_where_they_should():
    arguments = (torch.rand(5), None, 2, None, "sum", 0.1)
    assert_same(fused_ce.CrossEntropyLoss(*arguments), nn.CrossEntropyLoss(*arguments))


@together
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_module_can_take_the_place_of_stocks(options):
    module, expected = (build(k, options) for k in (fused_ce.CrossEntropyLoss, nn.CrossEntropyLoss))
    assert isinstance(module, nn.CrossEntropyLoss)
    assert repr(module) == repr(expected)
    assert module.extra_repr() == expected.extra_repr()
    assert module.reduction == expected.reduction
    assert module.ignore_index == expected.ignore_index
    assert module.label_smoothing == expected.label_smoothing
    assert [name for name, _ in module.named_buffers()] == [
        name for name, _ in expected.named_buffers()
    ]
    assert not list(module.parameters())
    assert module.state_dict().keys() == expected.state_dict().keys()


@pytest.mark.parametrize("strict", [True, False])
def test_state_dict_loads_in_both_directions(strict):
    weighted = {"weight": [1.0, 2.0, 3.0, 4.0, 5.0]}
    for source, destination in (
        (fused_ce.CrossEntropyLoss, nn.CrossEntropyLoss),
        (nn.CrossEntropyLoss, fused_ce.CrossEntropyLoss),
    ):
        saved = build(source, weighted)
        loaded = build(destination, {"weight": [0.0] * 5})
        loaded.load_state_dict(saved.state_dict(), strict=strict)
        assert torch.equal(loaded.weight, saved.weight)
        assert_same(loaded, saved)


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@together
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("extra", MODES.values(), ids=MODES.keys())
def test_copy_keeps_every_option(copied, extra):
    module = build(fused_ce.CrossEntropyLoss, OPTIONS[-1], **extra)
    twin = copied(module)
    assert type(twin) is fused_ce.CrossEntropyLoss
    assert (twin.grad_in_forward, twin.inplace) == (module.grad_in_forward, module.inplace)
    assert torch.equal(twin.weight, module.weight)
    assert_same(twin, build(nn.CrossEntropyLoss, OPTIONS[-1]))


def test_deepcopy_has_a_weight_of_its_own():
    module = build(fused_ce.CrossEntropyLoss, OPTIONS[1])
    copy.deepcopy(module).weight.zero_()
    assert module.weight.sum() > 0


def test_attributes_are_read_at_each_call():
    module, expected = fused_ce.CrossEntropyLoss(), nn.CrossEntropyLoss()
    for name, value in (
        ("weight", torch.rand(5)),
        ("ignore_index", 2),
        ("label_smoothing", 0.2),
        ("reduction", "sum"),
        ("reduction", "none"),
        ("weight", None),
    ):
        setattr(module, name, value)
        setattr(expected, name, value)
        assert_same(module, expected)
    input, target = problem()
    leaf = input.clone().requires_grad_()
    module.inplace, module.reduction = True, "mean"
    module(leaf, target)
    assert not torch.equal(leaf.detach(), input)


def test_weight_moves_with_the_module():
    module = build(fused_ce.CrossEntropyLoss, OPTIONS[1])
    assert module.double().weight.dtype == torch.float64
    assert module.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert module.to("meta").weight.is_meta
    assert build(fused_ce.CrossEntropyLoss, OPTIONS[1]).half().weight.dtype == torch.float16


@together
@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "avg"},
        {"reduction": None},
        {"label_smoothing": 1.5},
        {"ignore_index": 1.0},
        {"ignore_index": None},
        {"ignore_index": True},
        {"weight": torch.ones(4)},
        {"weight": torch.ones(5, dtype=torch.float64)},
    ],
    ids=str,
)
def test_bad_option_raises_when_and_what_stock_raises(options):
    module, expected = fused_ce.CrossEntropyLoss(**options), nn.CrossEntropyLoss(**options)
    input, target = problem()
    errors = []
    for loss in (module, expected):
        with pytest.raises(Exception) as caught:
            loss(input, target)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


@together
@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_legacy_arguments_choose_the_same_reduction(size_average, reduce):
    made = []
    for kind in (fused_ce.CrossEntropyLoss, nn.CrossEntropyLoss):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module = kind(size_average=size_average, reduce=reduce)
        made.append((module.reduction, [(w.category, str(w.message)) for w in caught]))
    assert made[0] == made[1]


def test_module_works_in_any_container():
    # As a member of a model: buffers under its name, train and eval, apply, zero_grad.
    class Classifier(nn.Module):
        def __init__(self, loss):
            super().__init__()
            self.layer = nn.Linear(3, 5)
            self.loss = loss

        def forward(self, x, y):
            return self.loss(self.layer(x), y)

    models = []
    for kind in (fused_ce.CrossEntropyLoss, nn.CrossEntropyLoss):
        torch.manual_seed(1)
        models.append(Classifier(build(kind, OPTIONS[1])))
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    x, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 3, 4, 2])
    for training in (True, False):
        losses = [model.train(training)(x, y) for model in models]
        torch.testing.assert_close(*losses)


def test_scripting_says_what_to_script_instead():
    with pytest.raises(RuntimeError, match="torch.jit.script takes torch.nn.CrossEntropyLoss"):
        torch.jit.script(torch.nn.Sequential(fused_ce.CrossEntropyLoss()))


def test_a_module_shows_what_was_chosen_beyond_stocks_options():
    module = fused_ce.CrossEntropyLoss(softcap=30.0, inplace=True, label_smoothing=0.1)
    assert repr(module) == "CrossEntropyLoss(inplace=True, softcap=30.0)"
    module.logit_scale = nn.Parameter(torch.ones(()))
    assert "logit_scale=tensor()" in module.extra_repr()
    head = fused_ce.LinearCrossEntropyLoss(4, 6, chunk_size=8)
    assert head.extra_repr().endswith("options=None, chunk_size=8")
    assert repr(fused_ce.KLDivLoss(grad_in_forward=False)) == "KLDivLoss(grad_in_forward=False)"


def test_a_module_says_how_it_would_take_a_call():
    input, target = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2])
    module = fused_ce.CrossEntropyLoss(grad_in_forward=False)
    said = fused_ce.explain(input, target, grad_in_forward=False)
    assert "recomputed in backward" in said
    assert module.explain(input, target) == said
    assert fused_ce.explain(module, input, target) == said
    assert fused_ce.explain_call(module, input, target) == said
    assert fused_ce.explain_call(module, input, target, grad_in_forward=True) != said
    head = fused_ce.LinearCrossEntropyLoss(5, 7)
    assert "1 chunk of 3 rows" in head.explain(input, target)
    assert fused_ce.BCEWithLogitsLoss().explain(input, torch.rand(3, 5)).startswith("fused")
    assert fused_ce.KLDivLoss().explain(input, torch.rand(3, 5)).startswith("fused")
    with pytest.raises(TypeError, match="expected a function of fused_ce"):
        fused_ce.explain(nn.CrossEntropyLoss(), input, target)


def test_a_heads_module_refuses_chunks_of_nothing_when_it_is_made():
    with pytest.raises(ValueError, match="chunk_size must be a positive int or None, got -1"):
        fused_ce.LinearCrossEntropyLoss(4, 6, chunk_size=-1)
