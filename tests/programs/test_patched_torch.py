"""A program may put ours in the place of torch's own loss, and every answer stays what it was.

`torch.nn.functional.cross_entropy = fused_ce.cross_entropy` is how a loss gets into code that one
does not own. Whatever falls back must then reach stock's formula and not itself. Each path is tried
in a process of its own, under a limit of time and memory, with the patch set before the import of
fused_ce and after it; then the tests of the loss are run in such a process.
"""

import functools
import json
import os
import re
import resource
import signal
import sys
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.processes import ROOT, TESTS, finish
from torch import nn
from torch.overrides import TorchFunctionMode

SECONDS, BYTES = 60, 8 << 30  # for one path; address space, of which torch alone takes some
stock = F.cross_entropy


def problem():
    torch.manual_seed(0)
    return torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.arange(6) % 5


def same(function):
    """`function`, given ours and stock's, has the same answer."""

    @functools.wraps(function)
    def check():
        torch.testing.assert_close(function(F.cross_entropy), function(stock))

    return check


def raised(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def sparse_logits():
    x, y = problem()
    sparse = x.detach().to_sparse()
    expected = raised(stock, sparse, y)
    assert expected and raised(F.cross_entropy, sparse, y) == expected


def bad_arguments():
    x, y = problem()
    for arguments in ((x, y[:3]), (x, y, None, None, None), (x, y, None, None, -100, None, "avg")):
        expected = raised(stock, *arguments)
        assert expected and raised(F.cross_entropy, *arguments) == expected


@same
def second_derivative(loss):
    x, y = problem()
    (grad,) = torch.autograd.grad(loss(x, y, label_smoothing=0.1), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), x)


@same
def second_derivative_under_two_modes(loss):
    class Transparent(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Transparent(), Transparent():
        x, y = problem()
        (grad,) = torch.autograd.grad(loss(x, y), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)


@same
def second_derivative_by_the_module(_):
    x, y = problem()
    (grad,) = torch.autograd.grad(nn.CrossEntropyLoss()(x, y), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), x)


@same
def second_derivative_of_a_head(loss):
    (x, y), head = problem(), torch.linspace(-1, 1, 35, dtype=torch.float64).view(7, 5)
    value = F.linear_cross_entropy(x, head, y) if loss is F.cross_entropy else loss(x @ head.T, y)
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), x)


@same
def batched_gradient(loss):
    x, y = problem()
    value = loss(x, y, reduction="none")
    return torch.autograd.grad(value, x, torch.eye(6, dtype=x.dtype), is_grads_batched=True)


@same
def transforms(loss):
    x, y = problem()
    x = x.detach()
    return (
        torch.func.grad(loss)(x, y),
        torch.func.vmap(loss)(x, y),
        torch.func.hessian(loss)(x, y),
        torch.func.jvp(lambda x: loss(x, y), (x,), (x,)),
    )


@same
def forward_mode(loss):
    x, y = problem()
    with torch.autograd.forward_ad.dual_level():
        value = loss(torch.autograd.forward_ad.make_dual(x.detach(), x.detach()), y)
        return torch.autograd.forward_ad.unpack_dual(value).tangent


@same
def weight_with_a_gradient(loss):
    (x, _), weight = problem(), torch.ones(5, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(loss(x, x.detach().softmax(1), weight), (x, weight))


@same
def jit_trace(loss):
    x, y = problem()
    return torch.jit.trace(lambda x, y: loss(x, y), (x.detach(), y))(x.detach(), y)


@same
def export(loss):
    x, y = problem()

    class Loss(nn.Module):
        def forward(self, x, y):
            return loss(x, y)

    return torch.export.export(Loss(), (x.detach(), y)).module()(x.detach(), y)


@same
def compiled(loss):
    x, y = problem()
    step = torch.compile(lambda x, y: loss(x, y), fullgraph=True, backend="aot_eager")
    value = step(x, y)
    return value, torch.autograd.grad(value, x)


@same
def compiled_module(_):
    x, y = problem()
    step = torch.compile(
        lambda x, y: nn.CrossEntropyLoss()(x, y), fullgraph=True, backend="aot_eager"
    )
    return torch.autograd.grad(step(x, y), x)


@same
def compiled_transform(loss):
    x, y = problem()
    step = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
    return step(x.detach(), y)


class Overriding(torch.Tensor):
    handed = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.handed.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def overriding_subclass():
    """It is handed what its table, made when torch was loaded, has; where nobody hid that."""
    x, y = problem()
    value = F.cross_entropy(x.detach().as_subclass(Overriding), y)
    torch.testing.assert_close(value.as_subclass(torch.Tensor), stock(x.detach(), y))
    assert F.cross_entropy not in Overriding.handed
    assert stock in Overriding.handed or sys.argv[1] == "before_the_import"


def jagged_tensor():
    x, y = problem()
    jagged = torch.nested.nested_tensor([x.detach()[:2], x.detach()[2:]], layout=torch.jagged)
    assert raised(F.cross_entropy, jagged, y) == raised(stock, jagged, y)


def unfused_head():
    """With logits that the kernels do not take, `F.linear` being somebody else's too."""
    import fused_ce

    x, y = problem()
    x, head = x.detach().to(torch.complex64), torch.randn(5, 5, dtype=torch.complex64)
    expected = raised(stock, x @ head.T, y)
    linear, F.linear = F.linear, None
    try:
        assert expected and raised(fused_ce.linear_cross_entropy, x, head, y) == expected
    finally:
        F.linear = linear


PATHS = {
    path.__name__: path
    for path in (
        sparse_logits,
        bad_arguments,
        second_derivative,
        second_derivative_under_two_modes,
        second_derivative_by_the_module,
        second_derivative_of_a_head,
        batched_gradient,
        transforms,
        forward_mode,
        weight_with_a_gradient,
        jit_trace,
        export,
        compiled,
        compiled_module,
        compiled_transform,
        overriding_subclass,
        jagged_tensor,
        unfused_head,
    )
}


def after_the_import():
    import fused_ce

    F.cross_entropy = fused_ce.cross_entropy
    F.linear_cross_entropy = fused_ce.linear_cross_entropy


def before_the_import():
    def cross_entropy(*args, **kwargs):
        import fused_ce

        return fused_ce.cross_entropy(*args, **kwargs)

    def linear_cross_entropy(*args, **kwargs):
        import fused_ce

        return fused_ce.linear_cross_entropy(*args, **kwargs)

    F.cross_entropy, F.linear_cross_entropy = cross_entropy, linear_cross_entropy


def before_the_import_by_a_wrapper():
    before_the_import()
    F.cross_entropy = functools.wraps(stock)(F.cross_entropy)


def without_the_function_beneath():
    """In a torch that has it elsewhere, the operator does as well."""
    genuine = torch._C._nn.cross_entropy_loss
    del torch._C._nn.cross_entropy_loss
    after_the_import()
    torch._C._nn.cross_entropy_loss = genuine  # stock, to compare with, calls it


# Which paths are tried with each.
PATCHES = {
    after_the_import: tuple(PATHS),
    before_the_import: tuple(PATHS),
    before_the_import_by_a_wrapper: ("second_derivative", "overriding_subclass"),
    without_the_function_beneath: ("second_derivative", "transforms", "compiled_transform"),
}
CASES = {patch.__name__: paths for patch, paths in PATCHES.items()}


def main(patch):
    """Prints what became of each path, in lines of JSON."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    globals()[patch]()

    def out_of_time(*_):
        raise TimeoutError(f"not done after {SECONDS} s")

    signal.signal(signal.SIGALRM, out_of_time)
    for name in CASES[patch]:
        signal.alarm(SECONDS)
        try:
            PATHS[name]()
            found = "done"
        except BaseException:
            found = traceback.format_exc(limit=-3)
        signal.alarm(0)
        print(json.dumps((name, found)), flush=True)


@functools.cache
def outcomes(patch):
    done = finish(__file__, patch, env={**os.environ, "PYTHONPATH": f"{ROOT}:{TESTS}"})
    ended = f"the process ended with {done.returncode}: {done.stderr[-500:]}"
    return dict.fromkeys(CASES[patch], ended) | dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.xdist_group("patched")  # one process for each patch
@pytest.mark.parametrize("patch, path", [(patch, path) for patch in CASES for path in CASES[patch]])
def test_answers_are_the_same_where_torchs_loss_is_ours(patch, path):
    assert outcomes(patch)[path] == "done", outcomes(patch)[path]


# The tests that meet the most of stock's formula; by default all but the slowest of each file.
CHOSEN = {
    "loss/test_errors.py": "default and not out_of_range and not writes_rows",
    "autograd/test_transforms.py": "not compile and not jit",
    "autograd/test_gradients.py": "default and (twice or create_graph or double)",
    "autograd/test_machinery.py": "function_mode or subclass or wrapper or strange",
}


def test_tests_pass_where_torchs_loss_is_ours():
    chosen = (f"({Path(file).name} and ({names}))" for file, names in CHOSEN.items())
    run(*CHOSEN, choose=" or ".join(chosen))


@pytest.mark.slow
@pytest.mark.parametrize("file", CHOSEN)
def test_all_tests_pass_where_torchs_loss_is_ours(file):
    run(file)


def run(*files, choose=""):
    options = ("-p", "support.patched_torch", "-p", "no:cacheprovider", "--tb=short")
    chosen = ("-m", "not cuda", "-k", choose, *(str(TESTS / file) for file in files))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{TESTS}"}
    done = finish("-m", "pytest", *options, *chosen, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    for file in files:  # of each, some
        assert re.search(rf"^tests/{file} [.]", done.stdout, re.M), done.stdout


if __name__ == "__main__":
    main(sys.argv[1])
