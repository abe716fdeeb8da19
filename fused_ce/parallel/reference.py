"""The loss of sharded classes by torch's operations, for derivatives of any order and every type.

The formula is that of ``stock``, with each sum over classes continued over the ranks. What follows
from a row's sums is the same on every rank. Each rank must run it alike, empty shards among them:
the sums are collectives, and their derivatives are too.
"""

import math

import torch
from torch import Tensor

from .. import stock
from ..fakes import class_dim
from ..graph import variable
from ..options import Options
from . import collectives
from .collectives import Group, shared, summed
from .partition import Place


def loss(
    input: Tensor,
    target: Tensor,
    options: Options,
    place: Place,
    group: Group,
    loss_dtype: torch.dtype,
) -> Tensor:
    """As :func:`fused_ce.stock.loss`, of a rank's columns. The class weights are those of these."""
    dtype = torch.promote_types(loss_dtype, torch.float32)
    at = class_dim(input)
    logits = input.narrow(at, 0, place.shard_classes).to(dtype)
    left_out = stock.uncounted(target, options, input)
    if left_out is not None:
        logits = logits.masked_fill(left_out, 0)
        left_out = left_out.squeeze(at)
    if options.logit_scale is not None:
        scale = options.logit_scale
        if isinstance(scale, Tensor):
            scale = shared(scale.to(dtype), group)
        logits = logits * scale
    if options.softcap > 0:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    weight = options.weight
    if weight is not None:
        weight = _along(at, weight[: place.shard_classes].to(dtype), logits)
    of_class = outside = None
    if not target.is_floating_point():
        target = target.long() if input.dim() > 1 else target.long().reshape(())
        if options.on_out_of_range:
            outside = ((target < 0) | (target >= place.num_classes)) & ~left_out
            target = target.masked_fill(outside, 0)
            nan = torch.where(outside, math.nan, 1.0).to(dtype)
            logits = logits * nan.unsqueeze(at)
    spread = options.label_smoothing / place.num_classes
    lse = _logsumexp(logits, at, group)
    gap = shared(lse, group).unsqueeze(at) - logits
    if target.is_floating_point():
        part = target.narrow(at, 0, place.shard_classes).to(dtype)
        terms = _weighted(((1 - options.label_smoothing) * part + spread) * gap, weight)
    else:
        first, own, _ = place
        classes = torch.arange(first, first + own, device=input.device)
        is_target = target.unsqueeze(at) == _along(at, classes, logits)
        picked = _weighted(torch.where(is_target, gap, 0), weight)
        terms = (1 - options.label_smoothing) * picked
        if spread > 0:
            terms = terms + spread * _weighted(gap, weight)
        if weight is not None:
            of_class = summed(_weighted(is_target.to(dtype), weight).sum(at), group)
            if outside is not None:
                of_class = of_class.masked_fill(outside, 1)
    losses = summed(terms.sum(at), group)
    if options.focal_gamma > 0:
        plain = summed(torch.where(is_target, gap, 0).sum(at), group)
        losses = losses * (-torch.expm1(-plain)) ** options.focal_gamma
    return stock.reduced(losses, lse, of_class, left_out, options)


def _along(at: int, values: Tensor, logits: Tensor) -> Tensor:
    """One value for each class, in a shape that spreads over the rows."""
    return values.reshape([-1 if d == at else 1 for d in range(logits.dim())])


def _weighted(terms: Tensor, weight: Tensor | None) -> Tensor:
    return terms if weight is None else terms * weight


def _logsumexp(logits: Tensor, at: int, group: Group) -> Tensor:
    rows = logits.shape[:at] + logits.shape[at + 1 :]
    if logits.shape[at] == 0:
        own = logits.new_full(rows, -math.inf)
    else:
        own = logits.detach().amax(at)
    max = collectives.largest(own, group)
    total = summed((logits - max.unsqueeze(at)).exp().sum(at), group)
    return max + total.log()


def gradients(
    input: Tensor,
    target: Tensor,
    options: Options,
    place: Place,
    group: Group,
    grad_output: Tensor,
    needs: tuple[bool, bool],
) -> list[Tensor | None]:
    """The gradients of input and target that are needed, under a graph if the caller wants one."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        variables = variable(input), variable(target)
        value = loss(*variables, options, place, group, grad_output.dtype)
    wanted = [t for t, needed in zip(variables, needs, strict=True) if needed]
    grad_output = grad_output.to(value.dtype)
    found = iter(torch.autograd.grad(value, wanted, grad_output, create_graph=create_graph))
    return [next(found) if needed else None for needed in needs]
