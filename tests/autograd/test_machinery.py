"""Whatever torch lets a user hang on a tensor, a module or the whole program works with the loss.

Hooks, modes, subclasses, wrappers, odd kinds of tensors and global switches: each gives stock's
answer or stock's error, and explain() says why where stock is asked. In place may also raise, if
torch would not allow an overwriting there; a wrong gradient it never gives.
"""

import contextlib
import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils._pytree as pytree
from support.grids import MODES, every_dtype, together
from support.layouts import target_of
from support.reference import differentiate, same_layout
from torch import nn
from torch.autograd.graph import allow_mutation_on_saved_tensors, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fused_ce
from fused_ce import ops

# name: (options of both functions, options of ours alone)
CALLS = {
    "default": ({}, {}),
    "recompute": ({}, {"grad_in_forward": False}),
    "in place": ({}, {"inplace": True}),
    "none": ({"reduction": "none"}, {}),
    "none in place": ({"reduction": "none"}, {"inplace": True}),
}
every_call = pytest.mark.parametrize("call", CALLS)


def compare(body, call="default", strict=False):
    """Runs `body(function, leaf, target)` with both functions; in place, ours may refuse.

    An error of stock's must be ours as well. `strict`: in place must not refuse either.
    """
    options, own = CALLS[call]
    input, target = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, -100])

    def run(function, extra):
        def loss(x, y, **more):
            return function(x, y, **options, **extra, **more)

        return body(loss, input.clone().requires_grad_(), target.clone())

    try:
        expected = run(F.cross_entropy, {})
    except RuntimeError as error:
        if own.get("inplace"):
            with contextlib.suppress(RuntimeError):
                run(fused_ce.cross_entropy, own)
            return
        with pytest.raises(type(error)) as caught:
            run(fused_ce.cross_entropy, own)
        assert str(caught.value) == str(error)
        return
    try:
        result = run(fused_ce.cross_entropy, own)
    except RuntimeError:
        if strict or not own.get("inplace"):
            raise
        return
    torch.testing.assert_close(result, expected)


# Hooks


def _hook_on_the_loss(loss, x, y):
    value = loss(x * 2, y)
    value.register_hook(lambda gradient: gradient * 3)
    value.sum().backward()
    return value.detach(), x.grad


def _hook_on_the_logits(loss, x, y):
    logits, seen = x * 2, []
    logits.retain_grad()
    logits.register_hook(lambda gradient: seen.append(gradient.clone()))
    logits.register_hook(lambda gradient: gradient * 3)
    loss(logits, y).sum().backward()
    return x.grad, logits.grad, seen[0]


def _hook_after_accumulation(loss, x, y):
    seen = []
    x.register_post_accumulate_grad_hook(lambda leaf: seen.append(leaf.grad.clone()))
    for _ in range(2):
        loss(x * 2, y).sum().backward()
    return x.grad, *seen


def _hooks_on_the_node(loss, x, y):
    seen = []
    total = loss(x * 2, y)
    total.grad_fn.register_prehook(lambda grads: (grads[0] * 3,))
    total.grad_fn.register_hook(lambda inputs, outputs: seen.append(outputs[0].clone()))
    total.sum().backward()
    return x.grad, seen[0]


def _hook_on_several(loss, x, y):
    other, seen = torch.ones(2, requires_grad=True), []
    torch.autograd.graph.register_multi_grad_hook(
        (x, other), lambda grads: seen.extend(g.clone() for g in grads)
    )
    (loss(x * 2, y).sum() * other.sum()).backward()
    return x.grad, other.grad, *seen


class _Criterion(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, x, y):
        return self.loss(x, y)


def _hooks_of_a_module(loss, x, y):
    seen, module = [], _Criterion(loss)
    module.register_forward_pre_hook(lambda module, args: (args[0] * 2, args[1]))
    module.register_forward_hook(lambda module, args, output: output * 3)
    value = module(x, y)
    value.sum().backward()
    return value.detach(), x.grad, *seen


def _backward_hooks_of_a_module(loss, x, y):
    seen, module = [], _Criterion(loss)
    module.register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 2,))
    module.register_full_backward_hook(
        lambda module, inputs, outputs: seen.append((inputs[0].clone(), outputs[0].clone()))
    )
    module.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 3, None))
    value = module(x * 2, y)
    value.sum().backward()
    return value.detach(), x.grad, *seen[0]


HOOKS = (
    _hook_on_the_loss,
    _hook_on_the_logits,
    _hook_after_accumulation,
    _hooks_on_the_node,
    _hook_on_several,
    _hooks_of_a_module,
    _backward_hooks_of_a_module,
)


@together
@every_call
@pytest.mark.parametrize("body", HOOKS, ids=lambda body: body.__name__.strip("_"))
def test_hook_sees_and_gives_the_gradient(body, call):
    # torch refuses any overwriting of what a module with backward hooks was given.
    compare(body, call, strict=body is not _backward_hooks_of_a_module)


# Other ways through the graph, and switches of autograd


def _gradient_edge(loss, x, y):
    logits = x * 2
    edge = get_gradient_edge(logits)
    return torch.autograd.grad(loss(logits, y).sum(), edge)


def _several_roots(loss, x, y):
    first, second = loss(x * 2, y).sum(), loss(x * 3, y).sum()
    torch.autograd.backward([first, second], [torch.tensor(0.5), torch.tensor(2.0)])
    return x.grad


def _unused_input(loss, x, y):
    unused = torch.ones(3, requires_grad=True)
    value = loss(x * 2, y).sum()
    return torch.autograd.grad(value, [unused, x], allow_unused=True, materialize_grads=True)


def _limited_inputs(loss, x, y):
    other = torch.ones_like(x).requires_grad_()
    loss(x * other, y).sum().backward(inputs=[other])
    assert x.grad is None
    return other.grad


def _one_thread(loss, x, y):
    with torch.autograd.set_multithreading_enabled(False):
        loss(x * 2, y).sum().backward()
    return x.grad


def _no_saved_tensor_hooks(loss, x, y):
    with torch.autograd.graph.disable_saved_tensors_hooks("none of them here"):
        value = loss(x * 2, y)
    value.sum().backward()
    return x.grad


def _zero_tensor(loss, x, y):
    value = loss(x * 2, y)
    return torch.autograd.grad(value, x, torch._efficientzerotensor(value.shape))


def _grad_mode_within(loss, x, y):
    with torch.no_grad():
        with torch.enable_grad():
            value = loss(x * 2, y)
        silent = loss(x, y)
    assert not silent.requires_grad
    value.sum().backward()
    return x.grad, silent


def _set_grad_disabled_in_backward(loss, x, y):
    value = loss(x * 2, y).sum() * 0.25
    with torch.no_grad():
        value.backward()
    return x.grad


def _inference_target(loss, x, y):
    with torch.inference_mode():
        y = y.clone()
    loss(x * 2, y).sum().backward()
    return x.grad


def _inference_weight(loss, x, y):
    with torch.inference_mode():
        weight = torch.ones(5)
    loss(x * 2, y, weight=weight).sum().backward()
    return x.grad


def _logits_changed_under_a_mode(loss, x, y):
    # Under this mode torch keeps a copy of what is about to be overwritten.
    with allow_mutation_on_saved_tensors():
        logits = x * 2
        value = loss(logits, y)
        logits.add_(1)
        y.fill_(0)
        (value.sum() * 0.5).backward()
    return value.detach(), x.grad


def _logits_shared_under_a_mode(loss, x, y):
    # The copy is then one for all who had saved the logits.
    with allow_mutation_on_saved_tensors():
        logits = x * 2
        others = logits.exp().sum() + logits.square().sum()
        value = loss(logits, y)
        logits.add_(1)
        (value.sum() * 0.5 + others).backward()
    return value.detach(), x.grad


def _profiled(loss, x, y):
    with torch.profiler.profile(record_shapes=True):
        loss(x * 2, y).sum().backward()
    return x.grad


def _counted(loss, x, y):
    with FlopCounterMode(display=False):
        loss(x * 2, y).sum().backward()
    return x.grad


def _deterministic(loss, x, y):
    # Memory that is allocated and not yet written then holds nan.
    torch.use_deterministic_algorithms(True)
    try:
        value = loss(x * 2, y)
        (value.sum() * 0.5).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    return value.detach(), x.grad


def _anomaly(loss, x, y):
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        value = loss(x * 2, y)
        (value.sum() * 0.5).backward()
    return value.detach(), x.grad


WAYS = (
    _gradient_edge,
    _several_roots,
    _unused_input,
    _limited_inputs,
    _one_thread,
    _no_saved_tensor_hooks,
    _zero_tensor,
    _grad_mode_within,
    _set_grad_disabled_in_backward,
    _inference_target,
    _inference_weight,
    _logits_changed_under_a_mode,
    _logits_shared_under_a_mode,
    _profiled,
    _counted,
    _deterministic,
    _anomaly,
)


@together
@every_call
@pytest.mark.parametrize("body", WAYS, ids=lambda body: body.__name__.strip("_"))
def test_every_way_through_autograd_leads_to_the_gradient(body, call):
    compare(body, call)


@together
@every_call
@pytest.mark.parametrize("default", [torch.float64, torch.float16], ids=str)
@every_dtype
@pytest.mark.parametrize("kind", [torch.int64, "probability"], ids=str)
def test_default_dtype_changes_nothing(kind, dtype, default, call):
    options, own = CALLS[call]
    input = torch.randn(6, 5).to(dtype)
    target = target_of(kind, input.shape, dtype)
    options = {"weight": torch.rand(5).to(dtype), "label_smoothing": 0.1, **options, **own}
    expected = differentiate(fused_ce.cross_entropy, input, target, **options)
    torch.set_default_dtype(default)
    try:
        result = differentiate(fused_ce.cross_entropy, input, target, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@every_call
def test_copy_of_a_loss_is_equal(call):
    options, own = CALLS[call]
    input, target = torch.randn(6, 5), torch.randint(0, 5, (6,))
    loss = fused_ce.cross_entropy(input, target, **options, **own)
    assert torch.equal(copy.deepcopy(loss), loss)

    # A graph is copied by nobody.
    def body(loss, x, y):
        return copy.deepcopy(loss(x, y))

    compare(body, "default" if own.get("inplace") else call)


def test_copied_model_shares_nothing():
    model = nn.ModuleDict(
        {
            "layer": nn.Linear(6, 5),
            "criterion": fused_ce.CrossEntropyLoss(weight=torch.rand(5), label_smoothing=0.1),
        }
    )
    x, y = torch.randn(8, 6), torch.randint(0, 5, (8,))
    twin, expected = copy.deepcopy(model), copy.deepcopy(model)
    twin["criterion"](twin["layer"](x), y).backward()
    weight = model["criterion"].weight
    F.cross_entropy(expected["layer"](x), y, weight, label_smoothing=0.1).backward()
    assert all(p.grad is None for p in model.parameters())
    assert twin["criterion"].weight.data_ptr() != weight.data_ptr()
    for mine, theirs in zip(twin.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


# Modes


class Replace(TorchFunctionMode):
    """Answers for the loss itself, and says with what it was called."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is fused_ce.cross_entropy:
            return len(args), sorted(kwargs or {})
        return function(*args, **(kwargs or {}))


class Forward(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@every_call
def test_function_modes_keep_the_result(call):
    def body(loss, x, y):
        with Forward(), Forward(), torch.device("cpu"):
            value = loss(x * 2, y)
        value.sum().backward()
        return value.detach(), x.grad

    compare(body, call, strict=True)


def test_function_mode_may_take_the_call():
    input, target = torch.randn(6, 5), torch.randint(0, 5, (6,))
    with Replace():
        count, names = fused_ce.cross_entropy(input, target, inplace=True)
    assert count + len(names) >= 3
    assert "inplace" in names
    with Replace(), torch._C.DisableTorchFunction():
        loss = fused_ce.cross_entropy(input, target)
    torch.testing.assert_close(loss, F.cross_entropy(input, target))


class Listen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@every_call
def test_dispatch_mode_sees_our_operators(call):
    options, own = CALLS[call]
    input, target = torch.randn(6, 5, requires_grad=True), torch.randint(0, 5, (6,))
    with Listen() as mode:
        fused_ce.cross_entropy(input, target, **options, **own).sum().backward()
    ours = [name for name in mode.names if name.startswith("fused_ce.")]
    assert len(ours) == {"none in place": 3}.get(call, 2)
    assert not any("softmax" in name for name in mode.names)


# Subclasses


class Plain(torch.Tensor):
    """A subclass that changes nothing."""


class Wrapper(torch.Tensor):
    """Holds another tensor; every operator is run on that one. torch cannot take it apart."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            dtype=inner.dtype,
            device=inner.device,
            requires_grad=requires_grad,
        )

    def __init__(self, inner, requires_grad=False):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = pytree.tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        return pytree.tree_map_only(torch.Tensor, cls, function(*args, **kwargs))


@together
@every_call
@pytest.mark.parametrize("which", ["input", "target", "weight"])
def test_plain_subclass_gets_the_same_result(which, call):
    options, own = CALLS[call]
    values = {
        "input": torch.randn(6, 5),
        "target": torch.randint(0, 5, (6,)),
        "weight": torch.rand(5),
    }
    results = []
    for function, extra in ((fused_ce.cross_entropy, own), (F.cross_entropy, {})):
        arguments = dict(values, **{which: values[which].clone().as_subclass(Plain)})
        leaf = arguments["input"] = arguments["input"].detach().clone().requires_grad_()
        loss = function(**arguments, **options, **extra)
        loss.sum().backward()
        results.append((type(loss), loss.detach().as_subclass(torch.Tensor), leaf.grad))
    assert results[0][0] is results[1][0]
    torch.testing.assert_close(
        results[0][1:], results[1][1:], check_device=False, check_layout=False
    )


@together
@every_call
@pytest.mark.parametrize("which", ["input", "target", "all"])
def test_wrapper_gets_the_same_result(which, call):
    options, own = CALLS[call]
    input, target, weight = torch.randn(6, 5), torch.randint(0, 5, (6,)), torch.rand(5)
    leaf = input.clone()
    if which != "target":
        leaf = Wrapper(leaf)
    leaf.requires_grad_()
    wrap = (lambda t: t) if which == "input" else Wrapper
    loss = fused_ce.cross_entropy(leaf, wrap(target), wrap(weight), **options, **own)
    loss.sum().backward()
    expected = differentiate(
        lambda x, y: F.cross_entropy(x, y, weight, **options).sum(), input, target
    )
    inner = [t.inner if isinstance(t, Wrapper) else t for t in (loss.detach(), leaf.grad)]
    torch.testing.assert_close(inner[0].sum(), expected.loss)
    torch.testing.assert_close(inner[1], expected.grad_input)


@every_call
@pytest.mark.parametrize("compiled", [False, True])
def test_wrapper_that_torch_takes_apart_gets_the_same_result(compiled, call):
    options, own = CALLS[call]
    first, second = torch.randn(2, 6, 5).unbind()
    target = torch.randint(0, 5, (6,))
    leaf = TwoTensor(first.clone(), second.clone()).requires_grad_()
    assert "TwoTensor" in fused_ce.explain(leaf, target)

    def step(x, y):
        return fused_ce.cross_entropy(x, y, **options, **own)

    if compiled:
        torch._dynamo.reset()
        step = torch.compile(step, backend="aot_eager", fullgraph=True)
    loss = step(leaf, target)
    loss.sum().backward()
    for part, values in (("a", first), ("b", second)):
        expected = differentiate(
            lambda x, y: F.cross_entropy(x, y, **options).sum(), values, target
        )
        torch.testing.assert_close(getattr(leaf.grad, part), expected.grad_input)
        torch.testing.assert_close(getattr(loss.detach(), part).sum(), expected.loss)


@every_call
def test_parameter_and_buffer_get_the_same_result(call):
    options, own = CALLS[call]

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.logits = nn.Parameter(torch.randn(6, 5))
            self.target = nn.Buffer(torch.randint(0, 5, (6,)))
            self.weight = nn.Buffer(torch.rand(5))

    results = []
    for function, extra in ((fused_ce.cross_entropy, own), (F.cross_entropy, {})):
        table = Table()
        loss = function(table.logits, table.target, table.weight, **options, **extra)
        loss.sum().backward()
        results.append((loss.detach(), table.logits.grad))
    torch.testing.assert_close(*results)
    assert type(table.logits.grad) is torch.Tensor


@pytest.fixture
def one_process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@every_call
def test_dtensor_gets_the_same_result(call, one_process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    options, own = CALLS[call]
    mesh = init_device_mesh("cpu", (1,))
    input, target = torch.randn(6, 5), torch.randint(0, 5, (6,))
    expected = differentiate(lambda x, y: F.cross_entropy(x, y, **options).sum(), input, target)
    for placement in (Replicate(), Shard(0)):
        leaf = distribute_tensor(input.clone(), mesh, [placement]).requires_grad_()
        y = distribute_tensor(target, mesh, [placement])
        assert fused_ce.explain(leaf, y).startswith("fused: ")
        loss = fused_ce.cross_entropy(leaf, y, **options, **own).sum()
        loss.backward()
        torch.testing.assert_close(loss.detach().full_tensor(), expected.loss)
        torch.testing.assert_close(leaf.grad.full_tensor(), expected.grad_input)


# Tensors that the kernels cannot take, or only after torch has looked at them


def _jagged():
    parts = [torch.randn(2, 5), torch.randn(3, 5)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


X, Y, W = torch.randn(4, 5), torch.tensor([0, 1, 2, 3]), torch.rand(5)
# name: (arguments, a word of explain()'s reason)
STRANGE = {
    "sparse logits": (lambda: (X.to_sparse(), Y), "sparse"),
    "compressed logits": (lambda: (X.to_sparse_csr(), Y), "sparse"),
    "mkldnn logits": (lambda: (X.to_mkldnn(), Y), "mkldnn"),
    "sparse target": (lambda: (X, Y.to_sparse()), "the target is sparse"),
    "sparse weight": (lambda: (X, Y, W.to_sparse()), "the weight is sparse"),
    "quantized": (lambda: (torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), Y), "qint8"),
    "nested": (lambda: (torch.nested.nested_tensor([X, X]), Y), "nested"),
    "jagged": (lambda: (_jagged(), Y), "__torch_function__"),
    "complex": (lambda: (X.to(torch.complex64), Y), "complex64"),
    "int64": (lambda: (X.long(), Y), "int64"),
    "bool": (lambda: (X > 0, Y), "bool"),
    "float8": (lambda: (X.to(torch.float8_e4m3fn), Y), "float8"),
    "meta": (lambda: (X.to("meta"), Y.to("meta")), "meta"),
    "target elsewhere": (lambda: (X, Y.to("meta")), "do not know"),
    "complex target": (lambda: (X, X.to(torch.complex64)), "do not know"),
    "bool target": (lambda: (X, Y > 1), "do not know"),
    "int8 target": (lambda: (X, Y.to(torch.int8)), "do not know"),
    "uint16 target": (lambda: (X, Y.to(torch.uint16)), "do not know"),
    "int64 weight": (lambda: (X, Y, torch.ones(5).long()), "do not know"),
    "list": (lambda: ([[1.0, 2.0]], Y), "not a tensor"),
    "no target": (lambda: (X, None), "not a tensor"),
    "numpy target": (lambda: (X, Y.numpy()), "not a tensor"),
    "weight with gradient": (lambda: (X, Y, W.clone().requires_grad_()), "requires grad"),
}


@together
@pytest.mark.filterwarnings("ignore")  # sparse, quantized and nested tensors all have theirs
@pytest.mark.parametrize("name", STRANGE)
def test_strange_tensor_gets_the_answer_of_stock(name):
    make, reason = STRANGE[name]
    said = fused_ce.explain(*make())
    assert said.startswith("stock: ")
    assert reason in said
    try:
        expected = F.cross_entropy(*make())
    except Exception as error:  # whatever it is, ours must be it
        with pytest.raises(type(error)) as caught:
            fused_ce.cross_entropy(*make())
        assert str(caught.value) == str(error)
    else:
        torch.testing.assert_close(fused_ce.cross_entropy(*make()), expected)


@together
@every_call
@pytest.mark.parametrize("which", ["logits", "gradient", "target", "weight"])
def test_negative_view_is_read_with_its_sign(which, call):
    # The imaginary part of a conjugate: memory holds the opposite of what the tensor says.
    def negative(values):
        view = torch.complex(values, -values).conj().imag
        assert view.is_neg()
        return view

    def body(loss, x, y):
        logits = x * 2
        if which == "logits":
            logits = torch.complex(logits, -logits).conj().imag
            assert logits.is_neg()
        if which == "target":
            y = negative(torch.linspace(0, 1, 30).view(6, 5))
        weight = negative(torch.linspace(0.5, 1, 5)) if which == "weight" else None
        value = loss(logits, y, weight=weight)
        incoming = torch.full_like(value, -0.5)
        value.backward(negative(incoming) if which == "gradient" else incoming)
        return value.detach(), x.grad

    compare(body, call)


def test_operator_writes_to_a_negative_view():
    # Torch hands it a copy and copies its first result back; without one, memory it does not own.
    input, target = torch.randn(6, 5), torch.arange(6) % 5
    _, *stats, grad = ops.forward_grad(input, target)
    half = torch.tensor(0.5)
    for operator, values, arguments in (
        (ops.backward_, input, (target, *stats, half)),
        (ops.rescale_, grad, (half, input, target, *stats)),
        (ops.scale_, grad, (half,)),
    ):
        view = torch.complex(values, -values).conj().imag
        assert view.is_neg()
        assert operator(view, *arguments).data_ptr() == view.data_ptr()
        torch.testing.assert_close(view.resolve_neg(), grad / 2)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_negative_view_is_not_written_in_place(reduction):
    # The operator that computes the loss has no result but that for torch to copy back.
    values = torch.randn(6, 5, requires_grad=True)
    logits = torch.complex(values, -values).conj().imag
    how = fused_ce.explain(logits, torch.arange(6) % 5, reduction=reduction, inplace=True)
    assert logits.is_neg() and "in place" not in how


# Autocast


@together
@pytest.mark.parametrize("inside", [True, False])
@every_call
def test_autocast_in_backward_keeps_the_gradient(call, inside):
    # Some run the backward inside the region as well, which torch advises against.
    options, own = CALLS[call]
    input, target = torch.randn(6, 5).bfloat16(), torch.randint(0, 5, (6,))
    results = []
    for function, extra in ((fused_ce.cross_entropy, own), (F.cross_entropy, {})):
        leaf = same_layout(input).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total = (function(leaf * 1, target, **options, **extra) * 0.5).sum()
            if inside:
                total.backward()
        if not inside:
            total.backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results, rtol=2**-7, atol=2**-9)


def test_autocast_double_backward_agrees_with_stock():
    input, target = torch.randn(6, 5).bfloat16(), torch.randint(0, 5, (6,))
    results = []
    for function in (fused_ce.cross_entropy, F.cross_entropy):
        leaf = same_layout(input).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = function(leaf, target, label_smoothing=0.1)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        gradient.float().square().sum().backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results, rtol=2**-6, atol=2**-9)


def test_ordinary_program_prints_no_warning():
    # Nothing that an ordinary program does may warn, in any mode.
    input, target = torch.randn(6, 5), torch.randint(0, 5, (6,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in MODES.values():
            loss = fused_ce.cross_entropy(input.clone().requires_grad_(), target, **options)
            (loss * 2).backward()
