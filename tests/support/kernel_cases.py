"""Problems for the CUDA kernels on the simulator, and how their results are compared.

The reference is stock PyTorch in float64 on the same (exactly converted) values.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from support.layouts import lay_out
from support.simulated import SimulatedDevice, unwritten

IGNORE = -100


class Case(NamedTuple):
    classes: int
    rows: tuple[int, ...] = (5,)
    dtype: torch.dtype = torch.float32
    target: torch.dtype = torch.int64  # a floating one: probabilities
    layout: str = "contiguous"
    reduction: str = "mean"
    smoothing: float = 0.0
    weight: bool = False
    ignored: bool = True
    spread: float = 3.0  # of the logits
    offset: float = 0.0  # of the logits
    clusters: bool = True  # whether the device has any

    def __str__(self):
        changed = [
            str(value).removeprefix("torch.").replace(" ", "")
            for value, default in zip(self[1:], self._field_defaults.values(), strict=True)
            if value != default
        ]
        return "-".join([f"C{self.classes}", *changed])


class Data(NamedTuple):
    input: torch.Tensor
    target: torch.Tensor
    options: dict


def make(case):
    generator = torch.Generator().manual_seed(1)
    shape = (case.rows[0], case.classes, *case.rows[1:])
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    input = lay_out((values * case.spread + case.offset).to(case.dtype), case.layout)
    if case.target.is_floating_point:
        target = torch.rand(shape, generator=generator, dtype=torch.float64)
        target = lay_out((target / target.sum(1, keepdim=True)).to(case.target), case.layout)
    else:
        most = min(case.classes, torch.iinfo(case.target).max - 1)
        target = torch.randint(most, case.rows, generator=generator).to(case.target)
    options = {"reduction": case.reduction, "label_smoothing": case.smoothing}
    if not case.target.is_floating_point:
        # An index that no class has, in a type that has no negative ones too.
        options["ignore_index"] = 255 if case.target == torch.uint8 else IGNORE
        if case.ignored:
            target.flatten()[1::3] = options["ignore_index"]
    if case.weight:
        kept = torch.float64 if case.dtype == torch.float64 else torch.float32
        options["weight"] = torch.rand(case.classes, generator=generator).to(kept) + 0.25
    return Data(input, target, options)


def reference(data, grad_output=1.0):
    """Loss and gradients of stock PyTorch in float64."""
    input = data.input.double().contiguous().clone().requires_grad_()
    target = data.target
    if target.is_floating_point():
        target = target.double().contiguous().clone().requires_grad_()
    else:
        target = target.long()
    options = dict(data.options)
    if "weight" in options:
        options["weight"] = options["weight"].double()
    loss = F.cross_entropy(input, target, **options)
    leaves = [input, target] if target.is_floating_point() else [input]
    grads = torch.autograd.grad(loss, leaves, torch.as_tensor(grad_output).double().expand_as(loss))
    return loss.detach(), *grads


# The error that a result may have beside its rounding to the type it is stored in: of the loss for
# each of its terms' magnitudes, of the gradient relative to the row's scale and to the value.
ARITHMETIC = {torch.float64: 1e-13, torch.float32: 1e-6}


def assert_close(value, expected, dtype, scale, what):
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    error = (value.double() - expected).abs()
    rounding = torch.finfo(value.dtype)
    allowed = (
        (rounding.eps / 2 + 3 * ARITHMETIC[kept]) * expected.abs()
        + ARITHMETIC[kept] * scale
        + rounding.tiny * rounding.eps / 2
    )
    allowed = torch.where(expected.isnan() & value.isnan(), torch.inf, allowed)
    bad = ~((error <= allowed) | (value.double() == expected) | allowed.isinf())
    assert not bad.any(), (
        f"{what}: {bad.sum()} of {bad.numel()} wrong, first {value[bad][0].item()} "
        f"instead of {expected[bad][0].item()} at {bad.nonzero()[0].tolist()}"
    )


def bits(tensor):
    return None if tensor is None else bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def loss_type(case):
    """Wide enough to see the arithmetic, rather than the rounding of the result."""
    return torch.float64 if case.dtype == torch.float64 else torch.float32


def grad_like(data, in_place=False):
    if not in_place:
        return unwritten(None, layout=data.input)
    copy = data.input.untyped_storage().clone()
    base = torch.empty(0, dtype=data.input.dtype).set_(copy)
    return base.as_strided(data.input.shape, data.input.stride(), data.input.storage_offset())


def assert_gaps_untouched(grad, before):
    """Whether a kernel left alone what lies between the rows."""
    own = torch.zeros(before.untyped_storage().nbytes() // before.element_size(), dtype=torch.bool)
    own.as_strided(before.shape, before.stride(), before.storage_offset()).fill_(True)
    now, then = (
        torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).view(len(own), -1)
        for t in (grad, before)
    )
    assert torch.equal(now[~own], then[~own])


def forward(kernels, case, data, mode, seed=0):
    """Runs forward in one of the modes; returns loss, statistics and gradient."""
    grad = None
    input = data.input
    if mode == "gradient":
        grad = grad_like(data)
    elif mode == "in place":
        grad = input = grad_like(data, in_place=True)
    loss, stats = kernels.forward(
        input,
        data.target,
        grad=grad,
        keeps_stats=mode in ("statistics", "gradient"),
        loss_dtype=loss_type(case),
        device=SimulatedDevice(has_clusters=case.clusters),
        seed=seed,
        **data.options,
    )
    return loss, stats, grad


def check_forward(kernels, case, mode):
    data = make(case)
    expected_loss, expected_grad, *_ = reference(data)
    loss, stats, grad = forward(kernels, case, data, mode)
    denominator = 1.0 if case.reduction != "sum" else expected_loss.numel() * len(data.target)
    assert_close(loss, expected_loss, case.dtype, denominator, "loss")
    if grad is not None:
        scale = expected_grad.abs().max().item()
        assert_close(grad, expected_grad, case.dtype, scale, "gradient")
        assert_gaps_untouched(grad, grad_like(data, in_place=mode == "in place"))
    again = forward(kernels, case, data, mode, seed=7)
    results = loss, *(stats or ()), grad
    loss, stats, grad = again
    for one, other in zip(results, (loss, *(stats or ()), grad), strict=True):
        assert bits(one) == bits(other), "another order of threads, another result"


def check_backward(kernels, case, in_place=False):
    data = make(case)
    loss, stats, _ = forward(kernels, case, data, "statistics")
    grad_output = torch.tensor(-0.75, dtype=case.dtype)
    if case.reduction == "none":
        grad_output = torch.arange(loss.numel()).remainder(5).sub(1.5).to(case.dtype)
        grad_output = grad_output.view(loss.shape)
    _, expected, *expected_target = reference(data, grad_output)
    device = SimulatedDevice(has_clusters=case.clusters)
    results = []
    for seed in (0, 11):
        grad = grad_like(data, in_place)
        kernels.backward(
            grad if in_place else data.input,
            *(data.target, stats, grad_output, grad),
            **(data.options | {"device": device, "seed": seed}),
        )
        results.append(bits(grad))
    assert_close(grad, expected, case.dtype, expected.abs().max().item(), "gradient")
    assert results[0] == results[1]
    assert_gaps_untouched(grad, grad_like(data, in_place))
    if expected_target:
        target_grad = unwritten(None, layout=data.target)
        kernels.backward_target(
            data.input, data.target, stats, grad_output, target_grad, **data.options
        )
        scale = expected_target[0].abs().max().item()
        assert_close(target_grad, expected_target[0], case.dtype, scale, "target's gradient")
