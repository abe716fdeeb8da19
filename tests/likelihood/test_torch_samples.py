"""torch's own samples of log_softmax and nll_loss, and of what they refuse, give ours what they
give stock's: values, gradients and second gradients, in every type that they are for.
"""

import pytest
import torch
from support.likelihood import assert_same, outcome

import fused_ce

pytest.importorskip("expecttest", reason="torch's samples need it; requirements-dev.txt names it")

OURS = {
    ("log_softmax", ""): fused_ce.log_softmax,
    ("log_softmax", "with_dtype"): fused_ce.log_softmax,
    ("nn.functional.nll_loss", ""): fused_ce.nll_loss,
}


@pytest.fixture(scope="module")
def operators():
    # Seconds of import, which only a worker with these tests has to wait for.
    from torch.testing._internal.common_methods_invocations import op_db

    found = {(op.name, op.variant_test_name): op for op in op_db}
    return {key: found[key] for key in OURS}


def gradients(value, leaves, order):
    """The first gradients, and of their squares the second, where there are any."""
    if not value.requires_grad:
        return []
    incoming = torch.ones_like(value) * 0.7
    found = torch.autograd.grad(value, leaves, incoming, create_graph=order > 1, allow_unused=True)
    rest = []
    if order > 1:
        total = sum(g.square().sum() for g in found if g is not None)
        rest = gradients(total, leaves, order - 1)
    return [*(None if g is None else g.detach() for g in found), *rest]


@pytest.mark.xdist_group("torch_samples")
@pytest.mark.parametrize("key", OURS, ids=str)
def test_samples(key, operators, all_is_large):
    operator, count = operators[key], 0
    for dtype in sorted(operator.supported_dtypes("cpu"), key=str):
        differentiable = dtype.is_floating_point
        for sample in operator.sample_inputs("cpu", dtype, requires_grad=differentiable):
            count += 1
            results = []
            for function in (OURS[key], operator.op):
                found = []
                for order in (1, 2):
                    value = function(sample.input, *sample.args, **sample.kwargs)
                    found += [value.detach(), *gradients(value, [sample.input], order)]
                results.append(found)
            assert_nested(*results)
    assert count >= 28 and all_is_large


def assert_nested(ours, stock):
    assert len(ours) == len(stock)
    for one, other in zip(ours, stock, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_same(one, other)


@pytest.mark.xdist_group("torch_samples")
@pytest.mark.parametrize("key", OURS, ids=str)
def test_error_inputs(key, operators, all_is_large):
    operator = operators[key]
    if operator.error_inputs_func is None:
        pytest.skip("torch has none")
    for error in operator.error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            OURS[key](sample.input, *sample.args, **sample.kwargs)


@pytest.mark.xdist_group("torch_samples")
@pytest.mark.parametrize("name", ["LogSoftmax", "NLLLoss"])
def test_module_samples(name, all_is_large):
    from torch.testing._internal.common_modules import module_db

    (info,) = (info for info in module_db if info.name == f"nn.{name}")
    ours, count = getattr(fused_ce, name), 0
    for dtype in info.dtypes:
        options = {"device": "cpu", "dtype": dtype, "requires_grad": True, "training": True}
        for sample in info.module_inputs_func(info, **options):
            if sample.forward_input is None:
                continue
            count += 1
            made, call = sample.constructor_input, sample.forward_input
            pair = [kind(*made.args, **made.kwargs) for kind in (ours, info.module_cls)]
            results = []
            for module in pair:
                value = module.to(dtype)(*call.args, **call.kwargs)
                results.append([value.detach(), *gradients(value, [call.args[0]], order=1)])
            assert_nested(*results)
            if sample.reference_fn is not None:
                expected = sample.reference_fn(pair[0], *call.args, **call.kwargs)
                torch.testing.assert_close(results[0][0], expected.detach())
    assert count >= 4
    if info.module_error_inputs_func is not None:
        for error in info.module_error_inputs_func(info, **options):
            made = error.module_error_input
            made, call = made.constructor_input, made.forward_input
            module = ours(*made.args, **made.kwargs)
            assert_same(
                outcome(module, *call.args, **call.kwargs),
                outcome(info.module_cls(*made.args, **made.kwargs), *call.args, **call.kwargs),
            )
