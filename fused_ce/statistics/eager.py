"""The row statistics as a ``torch.autograd.Function``, for eager calls; see ``fused_ce.eager``."""

from torch import Tensor
from torch.autograd import Function

from .. import ops
from ..eager import check_version, version_of
from ..eligibility import backward_needs_stock
from .reference import Settings, gradient


class Statistics(Function):
    """Keeps two numbers a row, and the entropy that it returns; the backward reads the logits."""

    @staticmethod
    def forward(ctx, input, target, settings, entropy, argmax):
        *results, stats = ops.softmax_stats(input, target, *settings, entropy, argmax, True)
        ctx.settings = settings
        ctx.save_for_backward(input, target, results[1], stats)
        ctx.version = version_of(input)
        # What arrives for nothing costs nothing, if it need not be made of zeros.
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(results[3])
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads):
        *grads, _ = grads
        nothing_else = (None,) * 4
        if all(grad is None for grad in grads):
            return None, *nothing_else
        input, target, entropy, stats = ctx.saved_tensors
        check_version(ctx, input, "softmax_stats")
        if any(grad is not None and backward_needs_stock(grad) for grad in grads):
            return gradient(input, target, ctx.settings, grads), *nothing_else
        arguments = (input, target, entropy, stats, *grads, *ctx.settings)
        return ops.softmax_stats_backward(*arguments), *nothing_else


def statistics(
    input: Tensor, target: Tensor | None, settings: Settings, entropy: bool, argmax: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With a gradient; what is not asked for is an empty tensor."""
    return Statistics.apply(input, target, settings, entropy, argmax)
