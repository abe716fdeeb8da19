"""The three operators that run the chunks, their fake kernels and their derivatives.

``torch.compile`` sees no more than these. A backward that is to be differentiated itself, or that
a transform has reached, is that of the formula with all logits.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.library import custom_op

from .. import ops, stock
from ..eager import graph_is_kept
from ..eligibility import backward_needs_stock
from ..options import NO_GRADIENTS, NONE, SCHEMA, Options, split
from .chunks import Problem
from .gradients import Gradients
from .plan import DEVICES, Limits
from .targets import batch_dims, of_one_dimension

# All of them end in a call, whose weight is [V, H]; the target's shape tells the positions. `needs`
# says which gradients of input, weight and bias are wanted; the others are empty tensors. What
# `group` and `shard` are is said in fused_ce/parallel/linear.py.
_CALL = (
    "Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, ScalarType dtype, "
    "SymInt? chunk_size, SymInt? max_chunk_bytes, str? chunking_method, str? group, int[] shard, "
    f"{SCHEMA}"
)
WHOLE = None, []  # the last two where the classes are not sharded
# The gradients of a call's arguments after the bias.
_NO_MORE_GRADIENTS = (None,) * (1 + len(Limits._fields) + len(WHOLE)) + NO_GRADIENTS


def _operator(name: str, arguments: str, returns: str) -> Callable:
    schema = f"({arguments}) -> ({returns})"
    return custom_op(f"fused_ce::{name}", mutates_args=(), schema=schema)


@contextmanager
def _no_autocast(input: Tensor) -> Iterator[None]:
    """The operators have decided on the types themselves."""
    with torch.autocast(input.device.type, enabled=False):
        yield


def _problem(
    input, linear_weight, target, linear_bias, dtype, size, bytes_, method, group, shard, *options
) -> Problem:
    limits = Limits(size, bytes_, method)
    call = input, linear_weight, target, linear_bias, dtype, limits, Options(*options)
    return Problem(*call) if group is None else _sharded().ShardedProblem(*call, group, shard)


def _sharded() -> Any:
    """The module that knows torch.distributed, which is there when a call first needs it."""
    from ..parallel import linear

    return linear


def _layer(input, linear_weight, target, linear_bias, *_) -> tuple[Tensor, Tensor, Tensor | None]:
    """What of a call has gradients."""
    return input, linear_weight, linear_bias


@_operator("linear_forward", _CALL, "Tensor")
def forward(input, *call):
    with _no_autocast(input):
        problem = _problem(input, *call)
        return problem.total(problem.losses())


@_operator("linear_forward_grad", f"bool[] needs, {_CALL}", "Tensor loss, Tensor, Tensor, Tensor")
def forward_grad(needs, input, *call):
    with _no_autocast(input):
        problem = _problem(input, *call)
        gradients = Gradients(problem, _layer(input, *call), needs)
        losses = problem.losses_and_gradients(None, gradients.add)
        return problem.total(losses), *gradients.result()


@_operator(
    "linear_backward", f"bool[] needs, Tensor grad_output, {_CALL}", "Tensor, Tensor, Tensor"
)
def backward(needs, grad_output, input, *call):
    with _no_autocast(input):
        problem = _problem(input, *call)
        gradients = Gradients(problem, _layer(input, *call), needs)
        problem.losses_and_gradients(grad_output, gradients.add)
        return tuple(gradients.result())


# The last two are what a graph's backward must be seen to depend on, or torch.compile would take
# the gradients for constants where a double backward asks for theirs, instead of refusing it.
@custom_op(
    "fused_ce::linear_scale_",
    mutates_args=("input_grad", "linear_weight_grad", "linear_bias_grad"),
    schema="(Tensor(a!) input_grad, Tensor(b!) linear_weight_grad, Tensor(c!) linear_bias_grad, "
    "Tensor grad_output, Tensor target, Tensor? sample_weight, int ignore_index, Tensor input, "
    "Tensor linear_weight) -> ()",
)
def _scale(*arguments):
    *gradients, grad_output, target, sample_weight, ignore_index, input, _ = arguments
    if DEVICES[input.device.type].checks_values and grad_output.isfinite():
        for grad in gradients:
            ops.scale_(grad, grad_output)
        return
    # The operator keeps every zero. Of a row that counts, or of a sum over such rows, a zero times
    # nan or infinity is nan.
    of_row = of_sum = grad_output.reshape(1, 1)  # with dimensions, its own type is computed in
    counts = None if target.is_floating_point() else target.long() != ignore_index
    if sample_weight is not None:
        counts = sample_weight != 0 if counts is None else counts & (sample_weight != 0)
    if counts is not None:
        counts = counts.reshape(len(counts), -1).any(1, keepdim=True)
        of_row = torch.where(counts, grad_output, 0)
        of_sum = torch.where(counts.any(), grad_output, 0).reshape(1, 1)
    input_grad, linear_weight_grad, linear_bias_grad = gradients
    for grad, factor in (
        (input_grad, of_row),
        (linear_weight_grad, of_sum),
        (linear_bias_grad, of_sum[0]),
    ):
        if grad.numel() > 0:
            grad *= factor


def _positions(target: Tensor, rows: int) -> torch.Size:
    return target.shape[batch_dims(target, rows) + target.is_floating_point() :]


def _fake_loss(
    input, linear_weight, target, linear_bias, dtype, size, bytes_, method, group, shard, *options
) -> Tensor:
    options = Options(*options)
    shape = (len(input), *_positions(target, len(input))) if options.reduction == NONE else ()
    return input.new_empty(shape, dtype=options.loss_dtype)


def _fake_gradients(layer: tuple, needs: list[bool]) -> list[Tensor]:
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        if needed
        else layer[0].new_empty(0)
        for t, needed in zip(layer, needs, strict=True)
    ]


@forward.register_fake
def _(*call):
    return _fake_loss(*call)


@forward_grad.register_fake
def _(needs, *call):
    return _fake_loss(*call), *_fake_gradients(_layer(*call), needs)


@backward.register_fake
def _(needs, grad_output, *call):
    return tuple(_fake_gradients(_layer(*call), needs))


@_scale.register_fake
def _(*_):
    return None


# Derivatives, in eager calls and in graphs alike.

_PLAN = 1 + len(Limits._fields) + len(WHOLE)  # what comes between the tensors and the options


def _save(ctx: Any, call: tuple, gradients: tuple) -> None:
    input, linear_weight, target, linear_bias, *plan = call
    option_tensors, ctx.options = split(plan[_PLAN:])
    ctx.plan = plan[:_PLAN]
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)  # of what is not differentiable, they would be made of zeros
    ctx.gradients = len(gradients)
    ctx.save_for_backward(*gradients, input, linear_weight, target, linear_bias, *option_tensors)


def _save_forward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _save(ctx, inputs, ())


def _save_forward_grad(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, *call = inputs
    _, *gradients = output
    _save(ctx, call, gradients)


def _saved_call(ctx: Any, tensors: tuple) -> tuple:
    input, linear_weight, target, linear_bias, *option_tensors = tensors
    options = (*option_tensors, *ctx.options)
    return input, linear_weight, target, linear_bias, *ctx.plan, *options


def _of_arguments(gradients: Any, needs: list[bool]) -> tuple:
    """The gradients of the layer's tensors, each where a call has the tensor."""
    input, linear_weight, linear_bias = (
        grad if needed else None for grad, needed in zip(gradients, needs, strict=True)
    )
    return input, linear_weight, None, linear_bias, *_NO_MORE_GRADIENTS


def _recompute(ctx: Any, grad_output: Tensor) -> tuple:
    """Logits and gradients are computed in the backward."""
    if grad_output is None:
        return (None,) * len(ctx.needs_input_grad)
    needs, call = list(_layer(*ctx.needs_input_grad)), _saved_call(ctx, ctx.saved_tensors)
    if backward_needs_stock(grad_output):
        return _of_arguments(unfused_gradients(needs, grad_output, *call), needs)
    return _of_arguments(backward(needs, grad_output, *call), needs)


def _scale_stored(ctx: Any, grad_output: Tensor, *_) -> tuple:
    """The gradients are those for a ``grad_output`` of 1, and are scaled if another arrives."""
    if grad_output is None:
        return (None,) * len(ctx.needs_input_grad)
    saved = ctx.saved_tensors
    gradients, call = list(saved[: ctx.gradients]), _saved_call(ctx, saved[ctx.gradients :])
    needs = list(_layer(*ctx.needs_input_grad[1:]))
    if backward_needs_stock(grad_output):
        return None, *_of_arguments(unfused_gradients(needs, grad_output, *call), needs)
    if torch.compiler.is_compiling() or graph_is_kept():
        gradients = [grad.clone() for grad in gradients]
    input, linear_weight, target, *_ = call
    options = Options(*call[-len(Options._fields) :])
    of_rows = target, options.sample_weight, options.ignore_index
    _scale(*gradients, grad_output, *of_rows, input, linear_weight)
    return None, *_of_arguments(gradients, needs)


forward.register_autograd(_recompute, setup_context=_save_forward)
forward_grad.register_autograd(_scale_stored, setup_context=_save_forward_grad)


def unfused_gradients(needs: list[bool], grad_output: Tensor, *call: Any) -> list[Tensor | None]:
    """Differentiates the formula with all logits, under a graph if the caller wants one.

    What may be a batch, or carry a tangent, meets only products: those of the linear layer's
    backward, written out. All is in float32 at least.
    """
    input, linear_weight, target, linear_bias, *plan = call
    group, shard = plan[_PLAN - len(WHOLE) : _PLAN]
    sharding = None if group is None else _sharded().shard_of(group, shard)
    options = Options(*plan[_PLAN:])
    dtype = torch.promote_types(input.dtype, torch.float32)
    create_graph = torch.is_grad_enabled()
    like = input, linear_weight, linear_bias
    with temporarily_clear_interpreter_stack(), torch.enable_grad(), _no_autocast(input):
        layer = [None if t is None else t.to(dtype) for t in like]
        if sharding is not None:
            layer[0] = sharding.shared(layer[0])
        logits = stock.linear(*layer)
        target = of_one_dimension(target, len(input))
        positions = _positions(target, len(input))
        classes = len(linear_weight) // max(math.prod(positions), 1)
        rows = logits.reshape(len(input), classes, *positions)
        formula = stock.loss if sharding is None else sharding.loss
        loss = formula(rows, target, options, dtype)
        (unit,) = torch.autograd.grad(loss, rows, torch.ones_like(loss), create_graph=create_graph)
    if loss.dim() > 0:
        grad_output = grad_output.unsqueeze(1)
    logits_grad = unit * grad_output
    left_out = stock.uncounted(target, options, rows)
    if left_out is not None:
        logits_grad = logits_grad.masked_fill(left_out, 0)
    logits_grad = logits_grad.reshape(logits.shape)

    def of_input() -> Tensor:
        found = logits_grad @ layer[1]
        return found if sharding is None else sharding.summed(found)

    products = (
        of_input,
        lambda: logits_grad.t() @ layer[0],
        lambda: logits_grad.sum(0),
    )
    with _no_autocast(input):
        return [
            product().to(t.dtype) if needed else None
            for product, t, needed in zip(products, like, needs, strict=True)
        ]
