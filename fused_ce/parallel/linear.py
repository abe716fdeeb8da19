"""``linear_cross_entropy`` where weight and bias are sharded by class, and the input is not.

A chunk's packet travels while the logits of the next are made, so two chunks are held at a time;
how many rows they have follows from what all ranks know, or these would not meet. The gradient of
the input is a sum over the ranks, and that of one chunk travels while the next is worked on.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import fallback, functional, linear, ops, stock
from ..eligibility import transform_is_active
from ..extensions import requires_grad
from ..linear.chunks import Problem
from ..linear.plan import Sizes, logits_dtype
from ..linear.targets import example, of_one_dimension
from ..options import NONE, Options
from . import check_agreement, eager, group_for, plan_of, reference, refuse, speaks
from .collectives import Group, shared, started_gather, started_sum, summed, total, waited
from .partition import Place, Sharding


class Shard(NamedTuple):
    """What the operators of a head are told of a sharded one, as a name and numbers."""

    group: Group
    place: Place
    reduce_input_grad: bool

    @property
    def held(self) -> int:
        """Chunks at a time, where gradients are computed."""
        return 2

    @property
    def classes(self) -> int:
        """Those of a rank if all had as many: what the ranks' chunks follow from."""
        return -(-self.place.num_classes // self.group.size)

    def packed(self) -> tuple[str, list[int]]:
        name, *of_group = self.group
        return name, [*of_group, *self.place, int(self.reduce_input_grad)]

    def shared(self, input: Tensor) -> Tensor:
        """The input, for the formula."""
        return shared(input, self.group) if self.reduce_input_grad else input

    def summed(self, input_grad: Tensor) -> Tensor:
        return summed(input_grad, self.group) if self.reduce_input_grad else input_grad

    def loss(self, logits: Tensor, target: Tensor, options: Options, dtype: torch.dtype) -> Tensor:
        """As :func:`fused_ce.stock.loss`."""
        return reference.loss(logits, target, options, self.place, self.group, dtype)


def shard_of(name: str, numbers: list[int]) -> Shard:
    size, rank, *place, reduces = numbers
    return Shard(Group(name, size, rank), Place(*place), bool(reduces))


class ShardedProblem(Problem):
    """As the problem of a whole layer, of which this rank has some classes."""

    def __init__(self, *call: Any) -> None:
        *call, group, numbers = call
        self.shard = shard_of(group, numbers)
        self.input_grads: list[tuple[Tensor, Tensor]] = []  # of a chunk, and its sum on its way
        super().__init__(*call)

    def whole(self, classes: int) -> int:
        return self.shard.place.num_classes

    def check_range(self, left_out: Tensor) -> None:
        """It is done where the ranks meet, for all of them."""

    def rows_that_count(self, left_out: Tensor) -> None:
        """All: the chunks must be the same before the ranks know each other's targets."""

    def sizes(self, columns: int, copied_bytes: int) -> Sizes:
        part = self.shard.classes
        columns = part * self.positions.numel()
        copies = self.input.dtype != self.dtype
        return Sizes(*self.input.shape, part, columns, copies, copied_bytes, self.shard.held)

    def own_class(self, target: Tensor) -> Tensor:
        return target - self.shard.place.class_offset

    def weights_of(self, weight: Tensor, classes: Tensor) -> Tensor:
        first, own, _ = self.shard.place
        found = weight.new_zeros(classes.shape)
        if own > 0:
            at = classes - first
            is_own = (at >= 0) & (at < own)
            found = torch.where(is_own, weight[at.clamp(0, own - 1)], 0)
        return total(found, self.shard.group)

    def _packet(self, rows: slice, logits: Tensor) -> Tensor:
        place = self.shard.place
        return ops.shard_forward(self.shaped(logits), self.target[rows], *place, *self._of(rows))

    def _of(self, rows: slice) -> Options:
        return self.options_of(rows)

    def _merged(self, packets: Tensor, rows: slice, logits: Tensor) -> tuple:
        classes = self.shard.place.num_classes
        logits = self.shaped(logits)
        return ops.shard_merge(packets, logits, self.target[rows], classes, *self._of(rows))

    def losses(self) -> list[Tensor]:
        """The packets of all chunks travel together."""
        packets, chunks = [], []
        for rows, _, logits in self.chunks():
            packets.append(self._packet(rows, logits))
            chunks.append((rows, logits.new_empty(()).expand(logits.shape)))
        if not packets:
            return []
        flat = torch.cat([packet.flatten() for packet in packets]).unsqueeze(0)
        gathered = waited(started_gather(flat, self.shard.group))
        parts = gathered.split([packet.numel() for packet in packets], 1)
        losses = []
        for part, packet, (rows, like) in zip(parts, packets, chunks, strict=True):
            of_ranks = part.reshape(-1, *packet.shape[1:]).contiguous()
            losses.append(self._merged(of_ranks, rows, like)[0])
        return losses

    def losses_and_gradients(
        self, grad_output: Tensor | None, take: Callable[[slice, Tensor, Tensor], Any]
    ) -> list[Tensor]:
        losses = []
        if grad_output is None:
            grad_output = self.input.new_ones((), dtype=torch.float64)

        def finish(rows: slice, input: Tensor, logits: Tensor, packets: Tensor) -> None:
            loss, *stats = self._merged(waited(packets), rows, logits)
            losses.append(loss)
            of_rows = grad_output[rows] if self.reduction == NONE else grad_output
            options = self._of(rows)._replace(loss_dtype=None)
            call = self.target[rows], *stats, of_rows, *self.shard.place, *options
            ops.shard_backward_(self.shaped(logits), *call)
            take(rows, input, logits)

        before = None
        for rows, input, logits in self.chunks(self.shard.held):
            packets = started_gather(self._packet(rows, logits), self.shard.group)
            if before is not None:
                try:
                    finish(*before)
                except Exception:
                    waited(packets)  # nobody else will
                    raise
            before = rows, input, logits, packets
        if before is not None:
            finish(*before)
        self._finish_input_grads(0)
        return losses

    def input_grad_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Summed over the ranks before it is rounded."""
        return torch.promote_types(dtype, torch.float32) if self.shard.reduce_input_grad else dtype

    def take_input_grad(self, grad: Tensor) -> None:
        if self.shard.reduce_input_grad:
            self.input_grads.append((grad, started_sum(grad, self.shard.group)))
            self._finish_input_grads(1)

    def _finish_input_grads(self, left: int) -> None:
        while len(self.input_grads) > left:
            grad, of_ranks = self.input_grads.pop(0)
            grad.copy_(waited(of_ranks))


def sharded(
    input: Tensor,
    make_call: Callable[[], Any],
    sharding: tuple,
    reduce_input_grad: bool,
    explains: bool = False,
) -> Any:
    """The loss, and the shape that it has if it is of rows; or what is to be explained."""
    sharding = Sharding(*sharding)
    group = group_for(sharding)
    if transform_is_active():
        raise NotImplementedError(eager.NO_TRANSFORMS)
    try:
        call = make_call()
        plan = _planned(call, sharding, group)
    except Exception:
        if not explains and isinstance(input, Tensor) and speaks(input):
            refuse(0, torch.float32, group)
        raise
    place, reason = plan.place, plan.reason
    shard = Shard(group, place, reduce_input_grad)
    if explains:
        return call, shard, reason
    if speaks(input):
        # Before the first chunk: the ranks' targets come with those.
        none = torch.zeros(0, dtype=torch.int64)
        check_agreement(none, torch.float32, call.options, plan, group)
    given = plan.given._replace(on_out_of_range=_past_the_check(plan.given.on_out_of_range))
    if reason is not None:
        if fallback.is_on:
            fallback.warn("linear_cross_entropy", reason)
        return _unfused(call, sharding, shard), call.loss_shape
    options = call.options._replace(weight=plan.weight)
    call = call._replace(options=options, given=given, shard=shard.packed())
    if requires_grad(given.logit_scale):
        call = _scaled(call, shard)
    return linear.fused(call), call.loss_shape


def _scaled(call: Any, shard: Shard) -> Any:
    """The same with the logits' factor in input and bias. What a rank finds of its gradient is a
    part where the other factor is this rank's own, or its gradient is."""
    scale = call.given.logit_scale.reshape(())
    of_rank = shared(scale, shard.group)
    of_input, bias = scale if shard.reduce_input_grad else of_rank, call.linear_bias
    return call._replace(
        input=call.input * of_input.to(call.input.dtype),
        linear_bias=None if bias is None else bias * of_rank.to(bias.dtype),
        given=call.given._replace(logit_scale=1.0),
    )


def _past_the_check(on_out_of_range: str) -> str:
    return "assert" if on_out_of_range == "raise" else on_out_of_range


def _planned(call: Any, sharding: Sharding, group: Group) -> Any:
    """As of the logits, which are not there."""
    reason = linear.layer_reason(call)
    input, target, given = call.input, call.target, call.given
    if reason is not None:
        raise ValueError(
            f"fused_ce: a process_group goes with a layer that the kernels can take, and {reason}."
        )
    if call.is_batched:
        target = example(target, len(input))
    dtype = logits_dtype(input)
    logits = input.detach().new_empty((), dtype=dtype).expand(call.logits_shape)
    if requires_grad(given.logit_scale):
        given = given._replace(logit_scale=given.logit_scale.detach())
    plan = plan_of(logits, target, call.options, given, sharding, group, False)
    if plan.reason is None and call.target.requires_grad and torch.is_grad_enabled():
        plan = plan._replace(reason="the target requires grad")
    return plan._replace(given=plan.given._replace(logit_scale=call.given.logit_scale))


def _unfused(call: Any, sharding: Sharding, shard: Shard) -> Tensor:
    """The formula with all logits of this rank."""
    logits = stock.linear(shard.shared(call.input), call.linear_weight, call.linear_bias)
    target = call.target
    if call.is_batched:
        target = of_one_dimension(target, len(call.input))
    return functional.cross_entropy(
        logits.reshape(call.logits_shape),
        target,
        **call.loss_arguments,
        **sharding._asdict(),
    )
