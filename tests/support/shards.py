"""A sharded vocabulary in one process: the operators of every rank, one after another."""

import torch

from fused_ce import ops
from fused_ce.options import MEAN, NONE, SUM, Options
from support.composed import composed, in_float64
from support.reference import (
    Outcome,
    assert_as_accurate,
    differentiate,
    incoming_gradient,
    one_thread,
)

REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}


def options_of(input, *, reduction="mean", softcap=None, on_all_ignored="nan", **options):
    """The operators' options, by the names and values of the function's."""
    for name in ("denominator", "logit_scale"):
        if options.get(name) is not None:
            options[name] = torch.as_tensor(options[name], dtype=torch.float64)
    return Options(
        reduction=REDUCTIONS[reduction],
        softcap=softcap or 0.0,
        on_all_ignored=int(on_all_ignored == "zero"),
        loss_dtype=input.dtype,
        **options,
    )


def evenly(classes, ranks):
    """The bounds that torch.chunk and DTensor give the shards, of which the last may be empty."""
    width = -(-classes // ranks)
    return [(min(classes, r * width), min(classes, (r + 1) * width)) for r in range(ranks)]


def at(*stops):
    """The bounds of shards that end there."""
    return list(zip((0, *stops[:-1]), stops, strict=True))


def _bits(tensor):
    return tensor.reshape(-1).view(torch.uint8)  # so that nan is nan


class Shard:
    """What one rank has: its columns, and after them `padding` that are no classes."""

    def __init__(self, input, target, bounds, padding, num_classes, options):
        self.axis = 1 if input.dim() > 1 else 0
        self.place = (bounds[0], bounds[1] - bounds[0], num_classes)
        self.input = self._columns(input, padding)
        self.target = self._columns(target, padding) if target.is_floating_point() else target
        if options.weight is not None:
            weight = options.weight[bounds[0] : bounds[1]]
            options = options._replace(weight=torch.cat([weight, weight.new_full((padding,), 7)]))
        self.options = options

    def _columns(self, tensor, padding):
        """Cut out as a view, unless something is to come after it."""
        first, width, _ = self.place
        columns = tensor.narrow(self.axis, first, width)
        if padding == 0:
            return columns
        shape = list(columns.shape)
        shape[self.axis] = padding
        return torch.cat([columns, columns.new_full(shape, torch.nan)], self.axis)

    def packet(self):
        return ops.shard_forward(self.input, self.target, *self.place, *self.options)

    def merge(self, packets):
        _, _, num_classes = self.place
        return ops.shard_merge(packets, self.input, self.target, num_classes, *self.options)

    def gradient(self, merged, grad_output, *, inplace=False, of_target=False):
        """With the padding's."""
        operator = ops.shard_backward_target if of_target else ops.shard_backward
        input = self.input
        if inplace:
            operator, input = ops.shard_backward_, input.clone()
        options = self.options._replace(loss_dtype=None)
        grad = operator(input, self.target, *merged, grad_output, *self.place, *options)
        assert not inplace or grad is input or grad.data_ptr() == input.data_ptr()
        return grad

    def differentiate(self, merged, grad_output, **how):
        grad = self.gradient(merged, grad_output, **how)
        _, width, _ = self.place
        rest = grad.narrow(self.axis, width, grad.shape[self.axis] - width)
        assert torch.equal(rest, torch.zeros_like(rest)), "padding has a gradient"
        return grad.narrow(self.axis, 0, width)


def shards_of(input, target, bounds, *, padding=0, **options):
    """One for each of the bounds; `padding` columns after each, or as many as a list says."""
    classes = input.shape[1 if input.dim() > 1 else 0]
    paddings = padding if isinstance(padding, list) else [padding] * len(bounds)
    options = options_of(input, **options)
    return [
        Shard(input, target, of_one, columns, classes, options)
        for of_one, columns in zip(bounds, paddings, strict=True)
    ]


def merged_by_all(shards):
    """What every rank has after the exchange; fails unless the losses have the same bits."""
    packets = torch.cat([shard.packet() for shard in shards])
    merged = [shard.merge(packets) for shard in shards]
    for one in merged[1:]:
        for ours, theirs in zip(one, merged[0], strict=True):
            assert torch.equal(_bits(ours), _bits(theirs))
    return merged


def sharded(
    input, target, bounds, *, padding=0, scale=1.0, target_grad=False, inplace=False, **options
):
    """As `reference.ours`, with the classes cut at the bounds; the gradients are put together."""
    shards = shards_of(input, target, bounds, padding=padding, **options)
    merged = merged_by_all(shards)
    loss = merged[0][0]
    grad_output = incoming_gradient(loss, scale)

    def put_together(**of):
        parts = [
            shard.differentiate(each[1:], grad_output, **of)
            for shard, each in zip(shards, merged, strict=True)
        ]
        return torch.cat(parts, 1 if input.dim() > 1 else 0)

    of_target = put_together(of_target=True) if target_grad else None
    return Outcome(loss, put_together(inplace=inplace), of_target)


@one_thread()
def check(
    input,
    target,
    bounds,
    *,
    padding=0,
    scale=1.0,
    inplace=False,
    target_grad=False,
    luck=1.0,
    **options,
):
    """As accurate as what people write in plain torch for the whole vocabulary; returns ours."""
    same = {"scale": scale, "target_grad": target_grad}
    result = sharded(input, target, bounds, padding=padding, inplace=inplace, **same, **options)
    plain = differentiate(composed, input, target, **same, **options)
    wide = target.double() if target.is_floating_point() else target
    exact = differentiate(composed, input.double(), wide, **same, **in_float64(options))
    found = zip(Outcome._fields, result, plain, exact, strict=True)
    for what, ours, theirs, reference in found:
        if ours is not None:
            of = max(luck, 2.0) if what == "grad_input" else luck
            assert_as_accurate(ours, theirs, reference, what.replace("_", " of the "), of)
    return result
