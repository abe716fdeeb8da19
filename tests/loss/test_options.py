"""One list of options: the operators, the functions and the modules all follow it."""

import copy
import inspect
import pickle

import pytest
import torch
from support.grids import together
from torch import nn

import fused_ce
from fused_ce import modules, ops, options
from fused_ce.linear import operators
from fused_ce.options import Options
from fused_ce.signatures import takes_arguments_of

# The operators that compute; the others take no options.
COMPUTING = (
    *("forward", "forward_stats", "forward_grad", "forward_grad_"),
    *("backward", "backward_", "backward_target", "backward_logit_scale", "rescale_"),
    *("graph_forward", "graph_backward", "graph_backward_target"),
)
OF_A_HEAD = ("forward", "forward_grad", "backward")


def described(operator):
    return [(a.name, str(a.type), a.default_value) for a in operator._schema.arguments]


@together
@pytest.mark.parametrize("name", COMPUTING)
def test_operator_ends_in_the_list(name):
    arguments = described(getattr(ops, name))[-len(Options._fields) :]
    assert [name for name, _, _ in arguments] == list(Options._fields)
    assert tuple(default for _, _, default in arguments) == options.DEFAULTS


@pytest.mark.parametrize("name", OF_A_HEAD)
def test_operator_of_a_head_ends_in_the_list_with_the_same_types(name):
    operator = getattr(operators, name)._opoverload
    count = len(Options._fields)
    assert described(operator)[-count:] == described(ops.forward)[-count:]


def test_tensors_come_first_and_a_split_list_is_put_together_again():
    tensors, numbers = options.split(tuple(Options._fields))
    assert tensors == ("weight", "denominator", "logit_scale", "sample_weight")
    assert tensors + numbers == Options._fields
    assert options.split(()) == ((), ())


@pytest.mark.parametrize(
    "explanation, function",
    [
        (fused_ce.explain, fused_ce.cross_entropy),
        (fused_ce.explain_linear, fused_ce.linear_cross_entropy),
    ],
)
def test_explanation_takes_the_arguments_of_the_function(explanation, function):
    shown, meant = inspect.signature(explanation), inspect.signature(function)
    assert shown.parameters == meant.parameters
    assert shown.return_annotation is str
    with pytest.raises(TypeError, match="unexpected keyword argument 'wieght'"):
        explanation(*[torch.randn(3, 3)] * 3, wieght=None)
    with pytest.raises(TypeError, match="missing a required argument"):
        explanation(torch.randn(3, 3))


@pytest.mark.parametrize("module", [fused_ce.CrossEntropyLoss, fused_ce.LinearCrossEntropyLoss])
def test_module_hands_on_an_option_that_it_does_not_name(module, monkeypatch):
    # A function with one option more, and a module made for it: all that the option needs.
    linear = module is fused_ce.LinearCrossEntropyLoss
    name = "linear_cross_entropy" if linear else "cross_entropy"
    function, seen = getattr(fused_ce, name), []

    def extended(*args, margin=0.5, **kwargs):
        seen.append(margin)
        return function(*args, **kwargs)

    signature = inspect.signature(function)
    more = inspect.Parameter("margin", inspect.Parameter.KEYWORD_ONLY, default=0.5)
    extended.__signature__ = signature.replace(parameters=[*signature.parameters.values(), more])
    monkeypatch.setattr(modules, name, extended)
    base = module.__mro__[1]

    @modules._with_options_of(extended, "linear_bias")
    class Loss(base):
        forward, _computed = module.forward, module._computed

    call = (torch.randn(2, 3), torch.tensor([0, 1]))
    sizes = (3, 4) if linear else ()
    loss = Loss(*sizes, margin=0.25)
    loss(*call)
    copy.deepcopy(loss)(*call)
    loss.margin = 0.125
    loss(*call)
    del loss.__dict__["margin"]  # as in a pickle from before there was the option
    loss(*call)
    assert seen == [0.25, 0.25, 0.125, 0.5]
    assert inspect.signature(Loss).parameters["margin"].default == 0.5
    with pytest.raises(TypeError, match="unexpected keyword argument 'marginn'"):
        Loss(*sizes, marginn=1)


@pytest.mark.parametrize(
    "make, changed",
    [
        (lambda **o: fused_ce.CrossEntropyLoss(**o), {"inplace": True, "grad_in_forward": False}),
        (
            lambda **o: fused_ce.LinearCrossEntropyLoss(3, 4, **o),
            {"chunk_size": 2, "max_chunk_bytes": None, "grad_in_forward": False},
        ),
    ],
)
def test_module_keeps_its_options(make, changed):
    module = make(**changed)
    for again in (module, copy.copy(module), pickle.loads(pickle.dumps(module))):
        assert {name: getattr(again, name) for name in changed} == changed
        assert set(changed) <= set(again.__constants__)
    with pytest.raises(TypeError, match="unexpected keyword argument 'linear_biass'"):
        make(linear_biass=None)


def test_module_takes_no_bias_beside_that_of_its_layer():
    assert "linear_bias" not in inspect.signature(fused_ce.LinearCrossEntropyLoss).parameters


def test_signature_is_shown_by_help_and_returns_what_the_function_does():
    def given(input, *, scale: float = 1.0) -> nn.Module: ...

    @takes_arguments_of(given)
    def shown(*args, **kwargs) -> str: ...

    assert str(inspect.signature(shown)) == "(input, *, scale: float = 1.0) -> str"
