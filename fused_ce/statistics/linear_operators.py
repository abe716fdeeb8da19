"""The two operators that find the statistics of a linear layer's output chunk by chunk.

The forward keeps no logits; the backward computes those of each chunk again, writes their gradient
over them and hands it to the two GEMMs of the layer. ``torch.compile`` sees no more than these two.
"""

from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.library import custom_op

from .. import ops, stock
from ..eligibility import backward_needs_stock
from ..linear.chunks import Problem
from ..linear.gradients import Gradients
from ..linear.plan import Limits
from ..options import SUM, Options
from .reference import Settings, gradient

_CALL = (
    "Tensor input, Tensor linear_weight, Tensor? target, Tensor? linear_bias, ScalarType dtype, "
    "SymInt? chunk_size, SymInt? max_chunk_bytes, float temperature, float softcap, "
    "int ignore_index"
)
_SWITCHES = ("entropy", "argmax", "keep_stats")
_RESULTS = "Tensor log_prob, Tensor entropy, Tensor logsumexp, Tensor argmax, Tensor stats"


class _EveryRow(Problem):
    """A row without a target has statistics too."""

    def rows_that_count(self, left_out: Tensor) -> None:
        pass


def _problem(
    input, linear_weight, target, linear_bias, dtype, chunk_size, max_chunk_bytes, *settings
) -> Problem:
    if target is None:  # any will do: nothing is asked for it
        target = input.new_zeros((), dtype=torch.int64).expand(len(input))
    options = Options(reduction=SUM, ignore_index=Settings(*settings).ignore_index)
    limits = Limits(chunk_size, max_chunk_bytes)
    return _EveryRow(input, linear_weight, target, linear_bias, dtype, limits, options)


@custom_op(
    "fused_ce::linear_softmax_stats",
    mutates_args=(),
    schema=f"({_CALL}, bool entropy, bool argmax, bool keep_stats) -> ({_RESULTS})",
)
def forward(input, *call):
    *call, entropy, argmax, keep_stats = call
    _, target, _, _, _, _, *settings = call
    parts = []
    with torch.autocast(input.device.type, enabled=False):
        problem = _problem(input, *call)
        for rows, _, logits in problem.chunks():
            of_rows = None if target is None else target[rows]
            switches = entropy, argmax, keep_stats
            parts.append(ops.softmax_stats(logits, of_rows, *settings, *switches))
    return tuple(torch.cat(part, -1) for part in zip(*parts, strict=True))


@custom_op(
    "fused_ce::linear_softmax_stats_backward",
    mutates_args=(),
    schema="(bool[] needs, Tensor? grad_log_prob, Tensor? grad_entropy, Tensor? grad_logsumexp, "
    f"Tensor entropy, Tensor stats, {_CALL}) -> (Tensor, Tensor, Tensor)",
)
def backward(needs, grad_log_prob, grad_entropy, grad_logsumexp, entropy, stats, input, *call):
    linear_weight, target, linear_bias, *_ = call
    settings = call[-len(Settings._fields) :]
    arrived = grad_log_prob, grad_entropy, grad_logsumexp
    with torch.autocast(input.device.type, enabled=False):
        problem = _problem(input, *call)
        gradients = Gradients(problem, (input, linear_weight, linear_bias), needs)
        for rows, of_input, logits in problem.chunks():
            of_target, *grads = (None if t is None else t[rows] for t in (target, *arrived))
            found = entropy[rows], stats[:, rows].contiguous()
            ops.softmax_stats_backward_(logits, of_target, *found, *grads, *settings)
            gradients.add(rows, of_input, logits)
        return tuple(gradients.result())


@forward.register_fake
def _(input, linear_weight, target, *call):
    *_, entropy, argmax, keep_stats = call
    dtype = torch.promote_types(input.dtype, torch.float32)
    count = len(input)

    def rows(wanted: bool, dtype: torch.dtype = dtype) -> Tensor:
        return input.new_empty(count if wanted else 0, dtype=dtype)

    return (
        rows(target is not None),
        rows(entropy),
        rows(True),
        rows(argmax, torch.int64),
        input.new_empty((2, count if keep_stats else 0), dtype=dtype),
    )


@backward.register_fake
def _(needs, grad_log_prob, grad_entropy, grad_logsumexp, entropy, stats, input, *call):
    linear_weight, _, linear_bias, *_ = call
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if needed else input.new_empty(0)
        for t, needed in zip((input, linear_weight, linear_bias), needs, strict=True)
    )


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    input, linear_weight, target, linear_bias, *plan = inputs[: -len(_SWITCHES)]
    _, entropy, _, argmax, stats = output
    ctx.plan = plan
    ctx.mark_non_differentiable(argmax, stats)
    ctx.set_materialize_grads(False)  # what is not used costs nothing
    ctx.save_for_backward(entropy, stats, input, linear_weight, target, linear_bias)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple:
    *grads, _, _ = grads
    nothing = (None,) * len(ctx.needs_input_grad)
    if all(grad is None for grad in grads):
        return nothing
    entropy, stats, input, linear_weight, target, linear_bias = ctx.saved_tensors
    of_input, of_weight, _, of_bias = ctx.needs_input_grad[:4]
    needs = [of_input, of_weight, of_bias]
    layer = input, linear_weight, linear_bias
    if any(grad is not None and backward_needs_stock(grad) for grad in grads):
        found = _unfused(needs, grads, layer, target, Settings(*ctx.plan[3:]))
    else:
        call = input, linear_weight, target, linear_bias, *ctx.plan
        found = backward(needs, *grads, entropy, stats, *call)
    input, linear_weight, linear_bias = (
        grad if needed else None for grad, needed in zip(found, needs, strict=True)
    )
    return input, linear_weight, None, linear_bias, *nothing[4:]


forward.register_autograd(_differentiate, setup_context=_save)


def _unfused(
    needs: list[bool], grads: list, layer: tuple, target: Tensor | None, settings: Settings
) -> list[Tensor | None]:
    """Differentiates the formula with all logits, under a graph if the caller wants one.

    What may be a batch, or carry a tangent, meets only products: those of the linear layer's
    backward, written out.
    """
    dtype = torch.promote_types(layer[0].dtype, torch.float32)
    autocast = torch.autocast(layer[0].device.type, enabled=False)
    with temporarily_clear_interpreter_stack(), torch.enable_grad(), autocast:
        wide = [None if t is None else t.to(dtype) for t in layer]
        logits = stock.linear(*wide)
    with autocast:
        logits_grad = gradient(logits, target, settings, grads)
        products = (
            lambda: logits_grad @ wide[1],
            lambda: logits_grad.t() @ wide[0],
            lambda: logits_grad.sum(0),
        )
        return [
            product().to(t.dtype) if needed else None
            for product, t, needed in zip(products, layer, needs, strict=True)
        ]
