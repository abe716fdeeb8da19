"""Gradients that hold under everything autograd can do with them.

Finite differences, any incoming gradient, a second backward, double backward, accumulation, a
gradient scaler, checkpoints, saved-tensor hooks, threads. In-place rules are in test_modes.py,
comparison with stock over all options in test_parity.py and over layouts in test_strides.py.
"""

import concurrent.futures
import gc
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from support.devices import every_device, on_cpu
from support.grids import (
    DIFFERENTIATING,
    MODES,
    REPEATABLE,
    every_options_of,
    every_reduction,
    together,
)
from support.layouts import lay_out, target_of
from support.reference import assert_as_accurate, float64, same_layout, stock, ulp
from torch.utils.checkpoint import checkpoint

import fused_ce

pytestmark = every_device


def index_problem(classes=5, dtype=torch.float64):
    """Logits (3, C, 2) that require grad, targets with two ignored ones, and weights."""
    input = torch.randn(3, classes, 2, dtype=dtype, requires_grad=True)
    target = torch.randint(0, classes, (3, 2))
    target[0, 1] = target[2, 0] = -100
    return input, target, torch.rand(classes, dtype=dtype) + 0.5


@together
@on_cpu
@every_options_of(REPEATABLE)
@every_reduction
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])  # off, usual, nothing but smoothing
@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_is_the_slope_of_the_loss(reduction, smoothing, weighted, options):
    input, target, weight = index_problem()

    def loss(input):
        return fused_ce.cross_entropy(
            input,
            target,
            weight if weighted else None,
            reduction=reduction,
            label_smoothing=smoothing,
            **options,
        )

    assert torch.autograd.gradcheck(loss, input)
    if weighted:  # the slower check, of one formula that does not branch on the weight
        assert torch.autograd.gradgradcheck(loss, input)


@together
@on_cpu
@every_options_of(REPEATABLE)
@every_reduction
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("wanted", ["input", "target", "both"])
def test_gradient_for_probabilities_is_the_slope(reduction, smoothing, wanted, options):
    # As few numbers as have three axes: the work grows with their square.
    input = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=wanted != "target")
    target = torch.rand(2, 3, 2, dtype=torch.float64, requires_grad=wanted != "input")
    weight = torch.rand(3, dtype=torch.float64) + 0.5

    def loss(input, target):
        return fused_ce.cross_entropy(
            input,
            target,
            weight,
            reduction=reduction,
            label_smoothing=smoothing,
            **options,
        )

    assert torch.autograd.gradcheck(loss, (input, target))
    if wanted == "both":
        assert torch.autograd.gradgradcheck(loss, (input, target))


@together
@every_options_of(DIFFERENTIATING)
@pytest.mark.parametrize("wanted", ["input", "target", "weight", "all"])
@every_reduction
def test_each_of_several_gradients_is_there_and_right(wanted, reduction, options):
    values = {
        "input": torch.randn(6, 5),
        "target": torch.randn(6, 5).softmax(1),
        "weight": torch.rand(5) + 0.5,
    }
    names = tuple(values) if wanted == "all" else (wanted,)
    grads = []
    for function, extra in ((fused_ce.cross_entropy, options), (F.cross_entropy, {})):
        leaves = {name: same_layout(value) for name, value in values.items()}
        for name in names:
            leaves[name].requires_grad_()
        function(**leaves, reduction=reduction, **extra).sum().backward()
        grads.append([leaf.grad for leaf in leaves.values()])
    for value, expected in zip(*grads, strict=True):
        assert (value is None) == (expected is None)
        if value is not None:
            torch.testing.assert_close(value, expected)


@together
@every_options_of(DIFFERENTIATING)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [torch.int64, "probability"], ids=str)
# 1 takes the stored gradient and nothing else may; 0 and -2.5 have no inverse and another sign;
# 65536 is a GradScaler's first factor; nan must come through; 0.25 is four accumulated batches.
@pytest.mark.parametrize("scale", [1.0, 0.0, 65536.0, -2.5, float("nan"), 0.25])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_incoming_gradient_multiplies_the_gradient(scale, reduction, kind, dtype, options):
    input = torch.randn(6, 19).to(dtype)
    target = target_of(kind, input.shape, dtype)
    grads = []
    for function, extra in ((fused_ce.cross_entropy, options), (F.cross_entropy, {})):
        leaf = same_layout(input).requires_grad_()
        loss = function(leaf, target, reduction=reduction, **extra)
        loss.backward(torch.tensor(scale, dtype=dtype))
        grads.append(leaf.grad)
    exact = float64(input, target, scale=scale, reduction=reduction).grad_input
    assert_as_accurate(*grads, exact, "gradient")


@together
@every_options_of(DIFFERENTIATING)
@pytest.mark.parametrize("form", ["each its own", "expanded", "every second", "transposed", "nan"])
@pytest.mark.parametrize("kind", [torch.int64, "probability"], ids=str)
def test_incoming_gradient_of_a_row_goes_to_that_row(form, kind, options):
    incoming = {
        "each its own": lambda: torch.randn(6, 4),
        "expanded": lambda: torch.tensor(-2.5).expand(6, 4),
        "every second": lambda: torch.randn(6, 8)[:, ::2],
        "transposed": lambda: torch.randn(4, 6).t(),
        "nan": lambda: torch.full((6, 4), 0.5).index_fill(0, torch.tensor(2), torch.nan),
    }[form]()
    input = torch.randn(6, 5, 4)
    target = target_of(kind, input.shape, torch.float32)
    grads = []
    for function, extra in ((fused_ce.cross_entropy, options), (F.cross_entropy, {})):
        leaf = same_layout(input).requires_grad_()
        function(leaf, target, reduction="none", **extra).backward(incoming)
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, equal_nan=True)


@together
@every_options_of(REPEATABLE)
@every_reduction
def test_second_backward_equals_the_first(reduction, options):
    input, target, _ = index_problem(dtype=torch.float32)
    loss = fused_ce.cross_entropy(input, target, reduction=reduction, **options).sum()
    # What the first backward handed out is then the user's, to change as well.
    loss.backward(retain_graph=True)
    first = input.grad.clone()
    input.grad.fill_(7)
    input.grad = None
    loss.backward(retain_graph=True)
    assert torch.equal(input.grad, first)
    (scaled,) = torch.autograd.grad(loss, input, torch.tensor(0.5), retain_graph=True)
    torch.testing.assert_close(scaled, first / 2)
    loss.backward()
    torch.testing.assert_close(input.grad, 2 * first)


@together
@every_options_of(DIFFERENTIATING)
@every_reduction
def test_second_backward_without_retain_graph_is_refused(reduction, options):
    messages = []
    for function, extra in ((fused_ce.cross_entropy, options), (F.cross_entropy, {})):
        input, target, _ = index_problem(dtype=torch.float32)
        loss = function(input, target, reduction=reduction, **extra)
        loss.backward(torch.ones_like(loss))
        with pytest.raises(RuntimeError) as caught:
            loss.backward(torch.ones_like(loss))
        messages.append(str(caught.value))
    if not options.get("inplace"):  # in place may say what it is about
        assert messages[0] == messages[1]


@every_options_of(REPEATABLE)
@together
@every_reduction
@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8, "probability"], ids=str)
def test_double_backward_agrees_with_stock(reduction, kind, options):
    # A gradient penalty: backward through the gradient, together with the loss itself.
    values = torch.randn(6, 5, 2)
    target = target_of(kind, values.shape, torch.float32)
    plain = target.long() if kind in (torch.int32, torch.uint8) else target
    results = []
    for function, index, extra in (
        (fused_ce.cross_entropy, target, options),
        (F.cross_entropy, plain, {}),
    ):
        leaf = same_layout(values).requires_grad_()
        loss = function(leaf, index, reduction=reduction, label_smoothing=0.1, **extra).sum()
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        assert gradient.requires_grad
        (loss + gradient.square().sum()).backward()
        results.append((gradient.detach(), leaf.grad))
    torch.testing.assert_close(*results)


def second_order(loss, leaves):
    """The gradients of a loss, and those of the loss with its gradients as a penalty."""
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    penalty = loss + sum(gradient.square().sum() for gradient in first)
    return first + torch.autograd.grad(penalty, leaves)


@pytest.mark.parametrize("form", ["default", "recompute", "compiled"])
@together
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@every_reduction
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_double_backward_does_not_read_ignored_rows(form, smoothing, reduction, bad):
    # The gradients are those of stock for finite numbers there: zero in the row itself, and finite
    # for what the loss is multiplied with. Stock's own are nan in the row.
    values = torch.randn(6, 5, 2)
    target = torch.randint(0, 5, (6, 2))
    target[1] = target[4, 0] = -100
    spoilt = values.clone()
    spoilt[1], spoilt[4, 2, 0] = bad, bad
    function = fused_ce.cross_entropy
    if form == "compiled":  # a graph that can be differentiated twice
        torch._dynamo.reset()
        function = torch.compile(function, backend="eager", fullgraph=True)
    results = []
    for call, logits, extra in (
        (function, spoilt, REPEATABLE.get(form, {})),
        (F.cross_entropy, values, {}),
    ):
        leaf, factor = logits.clone().requires_grad_(), torch.tensor(1.5, requires_grad=True)
        loss = call(leaf, target, reduction=reduction, label_smoothing=smoothing, **extra).sum()
        results.append(second_order(loss * factor, (leaf, factor)))
    torch.testing.assert_close(*results)
    for gradient in results[0][::2]:
        assert (gradient[1] == 0).all() and (gradient[4, :, 0] == 0).all()


@every_options_of(REPEATABLE)
@pytest.mark.parametrize("kind, index", [(torch.uint8, -100), (torch.int16, 2**16 + 156)], ids=str)
def test_double_backward_compares_the_whole_ignore_index(kind, index, options):
    # Class 156 is what both indices become in the target's own type.
    values, target = torch.randn(3, 200), torch.tensor([156, 0, 199])
    results = []
    for function, classes, extra in (
        (fused_ce.cross_entropy, target.to(kind), options),
        (F.cross_entropy, target, {}),
    ):
        leaf = values.clone().requires_grad_()
        results.append(second_order(function(leaf, classes, ignore_index=index, **extra), (leaf,)))
    torch.testing.assert_close(*results)


@every_options_of(REPEATABLE)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_batched_incoming_gradients_are_taken(reduction, options):
    input, target, _ = index_problem(dtype=torch.float32)
    results = []
    for function, extra in ((fused_ce.cross_entropy, options), (F.cross_entropy, {})):
        loss = function(input, target, reduction=reduction, **extra)
        batch = torch.arange(4 * loss.numel()).view(4, *loss.shape).float()
        results.append(torch.autograd.grad(loss, input, batch, is_grads_batched=True))

        def rows(input, function=function, extra=extra):
            return function(input, target, reduction="none", **extra)

        jacobian = torch.autograd.functional.jacobian
        results[-1] += (jacobian(rows, input), jacobian(rows, input, vectorize=True))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("target_kind", ["ignored", "counted"])
@every_options_of(REPEATABLE)
def test_small_fp16_gradients_survive_under_a_scaler(target_kind, options, device):
    # A mean over 4096 rows: many gradients are below fp16's smallest number, 6e-8, and are
    # carried only if the scaler's factor is applied before they are rounded.
    input = torch.randn(4096, 64).mul(3).half()
    target = torch.randint(0, 64, (4096,))
    if target_kind == "ignored":
        target[::2] = -100
    scaler = torch.amp.GradScaler(device, init_scale=2.0**15)
    leaf = same_layout(input).requires_grad_()
    scaler.scale(fused_ce.cross_entropy(leaf, target, **options)).backward()
    exact = float64(input, target, scale=2.0**15).grad_input
    assert_every_element_is_rounded_once(leaf.grad, exact)
    zero_unscaled = float64(input, target).grad_input.half() == 0
    assert zero_unscaled.sum() > 1000 + (leaf.grad == 0).sum()


@every_options_of(DIFFERENTIATING)
def test_small_fp16_gradients_survive_under_autocast_and_a_scaler(options, device):
    # Autocast makes the loss a float, which can take the scaler's 65536 that fp16 cannot hold.
    input = torch.randn(4096, 64).mul(3).half()
    target = torch.randint(0, 64, (4096,))
    scaler = torch.amp.GradScaler(device, init_scale=65536.0)
    leaf = same_layout(input).requires_grad_()
    with torch.autocast(device, dtype=torch.float16):
        loss = fused_ce.cross_entropy(leaf, target, **options)
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    exact = float64(input, target, scale=65536.0).grad_input
    assert_every_element_is_rounded_once(leaf.grad, exact)


@every_reduction
def test_small_fp16_gradients_survive_in_place(reduction):
    input = torch.randn(4096, 64).mul(3).half()
    target = torch.randint(0, 64, (4096,))
    scale = {"mean": 2.0**15, "sum": 2.0**-10, "none": 2.0**-10}[reduction]
    leaf = same_layout(input).requires_grad_()
    loss = fused_ce.cross_entropy(leaf, target, reduction=reduction, inplace=True)
    loss.backward(torch.full_like(loss, scale))
    total = "sum" if reduction == "none" else reduction
    exact = float64(input, target, scale=scale, reduction=total).grad_input
    assert_every_element_is_rounded_once(leaf.grad, exact)


def assert_every_element_is_rounded_once(gradient, exact):
    info = torch.finfo(gradient.dtype)
    half_an_ulp = 0.51 * (info.eps * exact.abs()).clamp(min=info.eps * info.tiny)
    slack = 4 * ulp(exact, torch.float32)
    assert ((gradient.double() - exact).abs() <= half_an_ulp + slack).all()


@every_options_of(REPEATABLE)
def test_scaler_steps_follow_stock(options, device):
    # Scale, unscale, step: the weights after three steps, one of them with accumulation.
    inputs, targets = torch.randn(4, 8, 6), torch.randint(0, 5, (4, 8))
    finals = []
    for function, extra in ((fused_ce.cross_entropy, options), (F.cross_entropy, {})):
        torch.manual_seed(1)
        model = torch.nn.Linear(6, 5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler(device, init_scale=1024.0)
        for step, (x, y) in enumerate(zip(inputs, targets, strict=True)):
            scaler.scale(function(model(x), y, **extra) / 2).backward()
            if step != 0:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        finals.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*finals)


@together
@every_options_of(REPEATABLE)
@every_reduction
def test_accumulation_into_grad_adds_and_shares_nothing(reduction, options):
    # Twice the same leaf, in two losses and in one graph; neither may see the other's memory.
    input, target, _ = index_problem(dtype=torch.float32)
    other = torch.randint(0, 5, (3, 2))
    grads = []
    for function, extra in ((fused_ce.cross_entropy, options), (F.cross_entropy, {})):
        leaf = same_layout(input).requires_grad_()
        function(leaf, target, reduction=reduction, **extra).sum().backward()
        function(leaf, other, reduction=reduction, **extra).sum().backward()
        one = function(leaf, target, reduction=reduction, **extra).sum()
        two = function(leaf, other, reduction=reduction, **extra).sum()
        (one + two + leaf.square().sum()).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


@together
@every_options_of(DIFFERENTIATING)
@every_reduction
def test_gradient_reaches_what_made_the_logits(reduction, options):
    # Logits that are not a leaf, of a layer whose own tensors autograd has saved.
    x, target = torch.randn(6, 4, 3), torch.randint(0, 5, (6, 4))
    grads = []
    for function, extra in ((fused_ce.cross_entropy, options), (F.cross_entropy, {})):
        torch.manual_seed(1)
        layer = torch.nn.Linear(3, 5)
        logits = layer(x).view(-1, 5)
        function(logits, target.view(-1), reduction=reduction, **extra).sum().backward()
        grads.append([p.grad for p in layer.parameters()])
    torch.testing.assert_close(*grads)


@together
@pytest.mark.parametrize("reentrant", [False, True])
@every_options_of(DIFFERENTIATING)
@every_reduction
def test_gradient_through_a_checkpoint_is_right(reentrant, reduction, options):
    x, target = torch.randn(6, 3), torch.randint(0, 5, (6,))
    grads = []
    for function, extra in ((fused_ce.cross_entropy, options), (F.cross_entropy, {})):
        torch.manual_seed(1)
        layer = torch.nn.Linear(3, 5)
        leaf = same_layout(x).requires_grad_()

        def run(x, layer=layer, function=function, extra=extra):
            return function(layer(x), target, reduction=reduction, **extra)

        checkpoint(run, leaf, use_reentrant=reentrant).sum().backward()
        grads.append([leaf.grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(*grads)


def contiguous_copies():
    """What a hook that stores tensors elsewhere does to their strides."""
    return torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor.clone(memory_format=torch.contiguous_format),
        lambda tensor: tensor,
    )


@together
@pytest.mark.parametrize(
    "hooks", [contiguous_copies, torch.autograd.graph.save_on_cpu], ids=lambda hooks: hooks.__name__
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "reversed axes", "odd offset"])
@every_options_of(REPEATABLE)
@every_reduction
@pytest.mark.parametrize("kind", [torch.int64, "probability"], ids=str)
def test_saved_tensors_may_come_back_with_other_strides(hooks, layout, reduction, kind, options):
    values = torch.randn(2, 5, 3, 4)
    input = lay_out(values, layout)
    target = lay_out(target_of("probability", values.shape, torch.float32), layout)
    if kind != "probability":
        target = lay_out(torch.randint(0, 5, values.shape).float(), layout)[:, 0].long()
    for scale in (1.0, 0.25):
        grads = []
        for function, extra in ((fused_ce.cross_entropy, options), (F.cross_entropy, {})):
            leaf = same_layout(input).requires_grad_()
            with hooks():
                loss = function(leaf, target, reduction=reduction, **extra)
            loss.backward(torch.full_like(loss, scale))
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads)


def pass_through():
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


@together
@pytest.mark.parametrize("hooks", [pass_through, torch.autograd.graph.save_on_cpu])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@every_options_of(DIFFERENTIATING)
@on_cpu  # where save_on_cpu hands back the tensor itself
def test_logits_edited_under_saved_tensor_hooks_are_noticed(hooks, scale, options):
    # Autograd compares no versions of what a hook has had.
    leaf = torch.randn(4, 5, requires_grad=True)
    logits = leaf * 1
    with hooks():
        loss = fused_ce.cross_entropy(logits, torch.tensor([0, 4, 2, 1]), **options)
    logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(torch.tensor(scale))


@together
@pytest.mark.parametrize("hooks", [contiguous_copies, torch.autograd.graph.save_on_cpu])
@every_reduction
def test_in_place_under_saved_tensor_hooks_is_right_or_refused(hooks, reduction):
    # Hooks hand backward a copy of the logits: the right gradient or an error, nothing else.
    input, target = torch.randn(2, 5, 3, 4), torch.randint(0, 5, (2, 3, 4))
    for scale in (1.0, 0.25):
        leaf = lay_out(input, "channels_last").requires_grad_()
        try:
            with hooks():
                loss = fused_ce.cross_entropy(leaf, target, reduction=reduction, inplace=True)
            loss.backward(torch.full_like(loss, scale))
        except RuntimeError:
            continue
        total = "sum" if reduction == "none" else reduction
        expected = stock(input, target, scale=scale, reduction=total).grad_input
        torch.testing.assert_close(leaf.grad, expected)


# Enough work for several threads in each: rows, long rows, an image, rows that three threads share.
SHARED_WORK = ((5000, 10), (33, 4097), (2, 21, 65, 67), (2, 400003))


@together
@on_cpu
@pytest.mark.parametrize("shape", SHARED_WORK, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [torch.int64, "probability"], ids=str)
@every_options_of(DIFFERENTIATING)
@pytest.mark.not_on_simulator
def test_bits_are_the_same_for_all_threads_and_runs(shape, dtype, kind, options):
    input = torch.randn(shape).to(dtype)
    target = target_of(kind, shape, dtype, ignore_index=-100)
    if kind == "probability":
        target.requires_grad_()
    weight = torch.rand(shape[1]).to(dtype)
    # 3: a number that divides none of the sizes.
    results = []
    for threads, reduction in itertools.product((1, 2, 2, 3), ("mean", "sum")):
        torch.set_num_threads(threads)
        leaf, target.grad = same_layout(input).requires_grad_(), None
        loss = fused_ce.cross_entropy(
            leaf, target, weight, reduction=reduction, label_smoothing=0.1, **options
        )
        loss.backward()
        results.append((loss.detach(), leaf.grad, target.grad))
    for same in zip(results[::2], results[1::2], strict=True):
        for mine, first in zip(same, results[:2], strict=True):
            for value, expected in zip(mine, first, strict=True):
                assert (value is None and expected is None) or torch.equal(value, expected)


@on_cpu
@pytest.mark.parametrize("shape", SHARED_WORK, ids=str)
@pytest.mark.not_on_simulator
def test_statistics_are_the_same_for_all_threads(shape):
    # Also those of ignored rows, which nothing reads: an operator's results are compared whole.
    input = torch.randn(shape)
    target = target_of(torch.int64, shape, torch.float32, ignore_index=-100)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(torch.ops.fused_ce.forward_stats(input, target)[1:])
    for stats in results[1:]:
        torch.testing.assert_close(stats, results[0], rtol=0, atol=0, equal_nan=True)


@on_cpu
@every_options_of(DIFFERENTIATING)
@pytest.mark.not_on_simulator
def test_concurrent_losses_leave_each_other_alone(options):
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        input = torch.randn(300, 101, generator=generator, requires_grad=True)
        target = torch.randint(0, 101, (300,), generator=generator)
        loss = fused_ce.cross_entropy(input, target, **options)
        loss.backward()
        return loss.detach(), input.grad

    expected = [run(seed) for seed in range(16)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, range(16)))
    for value, alone in zip(results, expected, strict=True):
        assert torch.equal(value[0], alone[0]) and torch.equal(value[1], alone[1])


@together
@every_options_of(DIFFERENTIATING)
@every_reduction
def test_backward_in_another_thread_is_right(reduction, options):
    input, target, _ = index_problem(dtype=torch.float32)
    total = "sum" if reduction == "none" else reduction
    expected = stock(input, target, reduction=total).grad_input
    loss = fused_ce.cross_entropy(input, target, reduction=reduction, **options).sum()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result()
    torch.testing.assert_close(input.grad, expected)


@every_options_of(DIFFERENTIATING)
def test_anomaly_mode_is_taken(options):
    input, target, _ = index_problem(dtype=torch.float32)
    expected = stock(input, target).grad_input
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        fused_ce.cross_entropy(input, target, **options).backward()
    torch.testing.assert_close(input.grad, expected)


@every_options_of(MODES)
def test_inference_mode_gives_the_same_loss(options):
    with torch.inference_mode():
        input, target = torch.randn(6, 5), torch.randint(0, 5, (6,))
        loss = fused_ce.cross_entropy(input, target, **options)
        torch.testing.assert_close(loss, F.cross_entropy(input, target))


@every_options_of(DIFFERENTIATING)
def test_gradient_of_an_ignored_row_is_exactly_zero(options):
    input, target = torch.randn(40, 19, requires_grad=True), torch.randint(0, 19, (40,))
    target[::3] = -100
    fused_ce.cross_entropy(input, target, label_smoothing=0.1, **options).backward()
    assert (input.grad[::3] == 0).all()
    assert (input.grad[1::3] != 0).all()


@together
@every_options_of(DIFFERENTIATING)
@pytest.mark.parametrize("after_backward", [False, True])
def test_graph_lets_the_logits_go(options, after_backward):
    # Reference counting alone must free everything: a cycle would hold logits until a collection.
    input, target = torch.randn(6, 5, requires_grad=True), torch.randint(0, 5, (6,))
    logits = input * 1
    watch = weakref.ref(logits)
    gc.collect()
    gc.disable()
    try:
        loss = fused_ce.cross_entropy(logits, target, **options)
        if after_backward:
            loss.backward()
        del logits, loss
        assert watch() is None
    finally:
        gc.enable()
