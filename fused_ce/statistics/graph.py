"""The row statistics within a graph of ``torch.compile``; see ``fused_ce.graph``.

The forward operator's registered derivative is the backward operator, and that one's is the
reference's, twice.
"""

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd import Function
from torch.library import register_fake

from .. import ops
from ..eligibility import transform_is_active
from ..fakes import class_dim, empty_gradient, row_shape
from ..graph import variable
from .reference import Settings, gradient, reference

_SETTINGS = len(Settings._fields)


def statistics(
    input: Tensor, target: Tensor | None, settings: Settings, entropy: bool, argmax: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``eager.statistics``."""
    *results, _ = ops.graph_softmax_stats(input, target, *settings, entropy, argmax, True)
    return tuple(results)


def _save_forward(ctx, inputs, output) -> None:
    input, target, *settings = inputs[: 2 + _SETTINGS]
    _, entropy, _, argmax, stats = output
    ctx.settings = Settings(*settings)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(argmax, stats)
    ctx.save_for_backward(input, target, entropy, stats)


def _backward(ctx, *grads) -> tuple:
    *grads, _, _ = grads
    nothing_else = (None,) * (len(ctx.needs_input_grad) - 1)
    if all(grad is None for grad in grads):
        return None, *nothing_else
    input, target, entropy, stats = ctx.saved_tensors
    if transform_is_active():
        # A graph that runs as it was captured: the transform began only after it.
        return gradient(input, target, ctx.settings, grads), *nothing_else
    arguments = (input, target, entropy, stats, *grads, *ctx.settings)
    return ops.graph_softmax_stats_backward(*arguments), *nothing_else


def _by_reference(input, target, grads: list, settings: Settings, create_graph: bool) -> Tensor:
    """What the backward operator returns."""
    found = reference(input, target, class_dim(input), settings)
    arrived = [(v, g) for v, g in zip(found[:3], grads, strict=True) if g is not None]
    values, grads = zip(*arrived, strict=True)
    grads = [g.to(v.dtype) for v, g in arrived]
    (result,) = torch.autograd.grad(values, input, grads, create_graph=create_graph)
    return result


class _Gradient(Function):
    """The backward operator, whose derivative is the reference's."""

    @staticmethod
    def forward(ctx, input, target, entropy, stats, *others):
        grads, settings = others[:3], others[3:]
        ctx.settings = Settings(*settings)
        ctx.save_for_backward(input, target, *grads)
        with torch._C._AutoDispatchBelowAutograd():
            return ops.graph_softmax_stats_backward(input, target, entropy, stats, *others)

    @staticmethod
    def backward(ctx, grad):
        input, target, *grads = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            input, *grads = (None if t is None else variable(t) for t in (input, *grads))
            first = _by_reference(input, target, grads, ctx.settings, create_graph=True)
        wanted = [input, *(g for g in grads if g is not None)]
        found = iter(
            torch.autograd.grad(first, wanted, grad, create_graph=create_graph, allow_unused=True)
        )
        by_input = next(found)
        by_grads = (None if g is None else next(found) for g in grads)
        return by_input, None, None, None, *by_grads, *(None,) * _SETTINGS


def _autograd_kernel(*arguments):
    """What autograd runs in the place of the backward operator."""
    if forward_ad._current_level < 0:
        return _Gradient.apply(*arguments)
    input, target, _, _, *others = arguments
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        result = _by_reference(
            variable(input), target, others[:3], Settings(*others[3:]), create_graph
        )
    # The graph was made for the strides of the operator's result.
    return empty_gradient(input).copy_(result)


torch.library.register_autograd(
    "fused_ce::graph_softmax_stats", _backward, setup_context=_save_forward
)
# A kernel of our own, since what register_autograd makes would drop a tangent without a word.
_library = torch.library.Library("fused_ce", "IMPL")
_library.impl(ops.graph_softmax_stats_backward, _autograd_kernel, "Autograd")


@register_fake("fused_ce::softmax_stats")
@register_fake("fused_ce::graph_softmax_stats")
def _(input, target, temperature, softcap, ignore_index, entropy, argmax, keep_stats):
    shape = row_shape(input.shape)
    dtype = torch.promote_types(input.dtype, torch.float32)

    def rows(wanted: bool, dtype: torch.dtype = dtype) -> Tensor:
        return input.new_empty(shape if wanted else 0, dtype=dtype)

    count = input.numel() // input.shape[class_dim(input)] if keep_stats else 0
    return (
        rows(target is not None),
        rows(entropy),
        rows(True),
        rows(argmax, torch.int64),
        input.new_empty((2, count), dtype=dtype),
    )


@register_fake("fused_ce::softmax_stats_backward")
@register_fake("fused_ce::graph_softmax_stats_backward")
def _(input, *_):
    return empty_gradient(input)


@register_fake("fused_ce::softmax_stats_backward_")
def _(input, *_):
    return input
