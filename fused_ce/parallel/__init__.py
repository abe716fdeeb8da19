"""``cross_entropy`` where the classes are sharded over the ranks of a process group.

Every rank calls it alike, and what one finds wrong before the exchange keeps none waiting: it takes
part with a packet that says so, and then all of them raise. ``partition`` says which classes a rank
has, ``collectives`` what moves, ``eager`` how the kernels are differentiated, and ``reference`` has
the formula for the rest.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import extensions, fallback, ops, stock
from ..eligibility import (
    INVALID,
    foreign,
    loss_dtype,
    stock_reason_of_logits,
    transform_is_active,
)
from ..extensions import Extensions, requires_grad
from ..fakes import class_dim, row_shape
from ..functional import TAKEN, instructions, mode_of
from ..options import SUM, Options
from . import eager, reference
from .collectives import Group, gathered, group_of, shared
from .partition import Place, Sharding, own_weights, place_of

_MODES = {
    "no gradient": eager.loss_alone,
    "no gradient in the graph": eager.loss_alone,
    "recomputed in backward": eager.recompute,
    "recomputed in the graph's backward": eager.recompute,
    "in place in backward": eager.overwrite_in_backward,
    TAKEN: eager.take_in_backward,
}
_GRAD_IN_FORWARD = False  # when the row's sums are still on their way


class Plan(NamedTuple):
    """How a call is taken, once its arguments have been checked."""

    place: Place
    given: Extensions
    reason: str | None  # why not by the kernels
    mode: str
    loss_dtype: torch.dtype
    weight: Tensor | None  # of the classes of this rank


def cross_entropy(
    input: Tensor,
    target: Tensor,
    options: Options,
    given: Extensions,
    sharding: tuple,
    inplace: bool | str | None,
) -> Tensor:
    """The loss, with the options as the caller gives them; the class weights may be all or ours."""
    sharding = Sharding(*sharding)
    group = group_for(sharding)
    if transform_is_active():
        raise NotImplementedError(eager.NO_TRANSFORMS)
    try:
        plan = plan_of(input, target, options, given, sharding, group, inplace)
    except Exception:
        if isinstance(input, Tensor) and speaks(input):
            refuse(*_packet_of(input), group)
        raise
    if plan.reason is not None:
        if fallback.is_on:
            fallback.warn("cross_entropy", plan.reason)
        return _by_reference(input, target, options, plan, group)
    given = plan.given
    if requires_grad(given.denominator) or requires_grad(given.sample_weight):

        def without(options: Options, given: Extensions) -> Tensor:
            return cross_entropy(input, target, options, given, sharding, inplace)

        return extensions.weighed(given, options, target, input.dtype, without)
    return _MODES[plan.mode](
        input, target, plan.place, group, *_for_operators(input, options, plan)
    )


def explain(
    input: Tensor,
    target: Tensor,
    options: Options,
    given: Extensions,
    sharding: tuple,
    inplace: bool | str | None,
) -> str:
    """As :func:`fused_ce.explain`; asks nothing of the other ranks."""
    sharding = Sharding(*sharding)
    try:
        group = group_for(sharding)
        plan = plan_of(input, target, options, given, sharding, group, inplace)
    except Exception as error:
        return f"refused: {str(error).splitlines()[0]}"
    if plan.reason is not None:
        return f"stock: {plan.reason}"
    return described(plan.mode, group.size, instructions(input))


def described(mode: str, ranks: int, made_of: str) -> str:
    return f"fused: {mode}, statistics of {ranks} ranks in one all-gather, {made_of}"


def group_for(sharding: Sharding) -> Group:
    if sharding.process_group is None:
        raise ValueError(
            "fused_ce: num_classes and class_offset are about logits that are sharded; pass "
            "process_group with them, or leave them out."
        )
    return group_of(sharding.process_group)


def plan_of(
    input: Tensor,
    target: Tensor,
    options: Options,
    given: Extensions,
    sharding: Sharding,
    group: Group,
    inplace: bool | str | None,
) -> Plan:
    for tensor, name in ((input, "logits"), (target, "target"), (options.weight, "weight")):
        reason = None if tensor is None else foreign(tensor, name)
        if reason is not None:
            raise ValueError(
                f"fused_ce: a process_group goes with plain tensors, and {reason}; pass the part "
                "of this rank (a DTensor needs no process_group)."
            )
    extensions.check_dtype(given.dtype)
    at = class_dim(input)
    if input.dim() == 0:
        stock.cross_entropy(input, target, options)  # raises what it has to say
    width = input.shape[at]
    place = place_of(width, sharding, group)
    weight = own_weights(options.weight, width, place)
    reason = _reason(input, target, options, given, place, at)
    probabilities = target.is_floating_point()
    rows = row_shape(input.shape)
    given = given.checked(options, probabilities, rows)
    if reason is None and extensions.composes(given, options, target):
        reason = extensions.COMPOSED
    extensions.check_targets(given, options, target, _whole(input, at, place).shape)
    dtype = given.dtype or input.dtype
    dtype = loss_dtype(dtype, target, options.weight) or dtype
    mode = mode_of(input, target, options.reduction, _GRAD_IN_FORWARD, inplace)
    if mode == "in place in backward" and width > 0:
        ops.check_overwritable(input, target, *Options(reduction=options.reduction))
    return Plan(place, given, reason, mode, dtype, weight)


def _reason(
    input: Tensor, target: Tensor, options: Options, given: Extensions, place: Place, at: int
) -> str | None:
    """Why the kernels cannot take this call. The question is that of the whole vocabulary."""
    whole = _whole(input, at, place)
    whole_target = _whole(target, at, place) if target.shape == input.shape else target
    weight = options.weight
    if weight is not None:
        weight = weight.new_empty(()).expand(place.num_classes)
        weight.requires_grad_(options.weight.requires_grad)
    reason = stock_reason_of_logits(
        input,
        whole.shape,
        given.dtype or input.dtype,
        whole_target,
        weight,
        options.ignore_index,
        options.label_smoothing,
    )
    if reason == INVALID:
        # torch raises what it has to say, and computes nothing on this device.
        nowhere = options._replace(weight=None if weight is None else weight.to("meta"))
        try:
            stock.cross_entropy(whole.to("meta"), whole_target.to("meta"), nowhere)
        except AssertionError:  # as torch's shapes have it where its kernels have a sentence
            raise ValueError(
                f"fused_ce: target must have the shape {tuple(row_shape(whole.shape))} of the rows "
                f"or, for probabilities, that of the logits, got {tuple(target.shape)}."
            ) from None
    if reason is not None:
        return reason
    if not input.is_cpu and not _has_kernels(input.device.type):
        return f"there are no kernels for sharded classes on {input.device.type}"
    if given.focal_gamma:
        return "there is no kernel for focal_gamma of sharded classes"
    if requires_grad(given.logit_scale):
        return "there is no kernel for the gradient of logit_scale of sharded classes"
    return given.reference_reason(input.dtype)


def _has_kernels(kind: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("fused_ce::shard_forward", kind.upper())


def _whole(tensor: Tensor, at: int, place: Place) -> Tensor:
    """In the shape that it has with all classes, without their memory."""
    shape = list(tensor.shape)
    shape[at] = place.num_classes
    return tensor.detach().new_empty(()).expand(shape)


def _for_operators(input: Tensor, options: Options, plan: Plan) -> Options:
    options = plan.given.added_to(options._replace(weight=plan.weight), input.device)
    dtype = plan.loss_dtype
    return options._replace(loss_dtype=None if dtype == input.dtype else dtype)


def _by_reference(
    input: Tensor, target: Tensor, options: Options, plan: Plan, group: Group
) -> Tensor:
    place, given, weight = plan.place, plan.given, plan.weight
    if speaks(input):
        rows, kind = _packet_of(input)
        if target.is_floating_point():
            plain = options._replace(ignore_index=-100)
            check_agreement(torch.zeros(rows, dtype=torch.int64), kind, plain, plan, group)
        else:
            check_agreement(target.reshape(-1), kind, options, plan, group)
    of_all = options.weight
    if weight is not None and of_all.shape == (place.num_classes,) and of_all.requires_grad:
        # Every rank has all of them, and uses its own.
        weight = own_weights(shared(of_all, group), input.shape[class_dim(input)], place)
    options = given.added_for_reference(options._replace(weight=weight))
    dtype = plan.loss_dtype
    found = reference.loss(input.to(given.dtype), target, options, place, group, dtype)
    return found.to(dtype)


# What every rank has to be told before the reference's collectives, and those of a head.


def speaks(input: Tensor) -> bool:
    """Whether the kernels' packet can carry what a rank has to say."""
    return input.is_cpu and not torch.compiler.is_compiling()


def _packet_of(input: Tensor) -> tuple[int, torch.dtype]:
    """Rows and type of the packet that the others wait for."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return math.prod(row_shape(input.shape)), dtype


def refuse(rows: int, dtype: torch.dtype, group: Group) -> None:
    """Has the others raise too, who wait for the packet of this rank."""
    nothing = torch.zeros((rows, 0), dtype=dtype)
    target = torch.zeros(rows, dtype=torch.int64)
    gathered(ops.shard_forward(nothing, target, eager.REFUSED, 0, 1), group)


def check_agreement(
    rows: Tensor, dtype: torch.dtype, options: Options, plan: Plan, group: Group
) -> None:
    """Raises on every rank what the kernels would, from packets of logits that are all 0.

    `rows` are the targets of so many, as indices.
    """
    place, given = plan.place, plan.given
    weight = given.sample_weight
    zeros = torch.zeros((), dtype=dtype).expand(len(rows), place.shard_classes)
    plain = options._replace(
        weight=None,
        reduction=SUM,
        sample_weight=None if weight is None else weight.detach().reshape(-1)[: len(rows)],
        z_loss=given.z_loss,
        softcap=given.softcap or 0.0,
        on_out_of_range=extensions.ON_OUT_OF_RANGE[given.on_out_of_range],
    )
    eager.loss(zeros, rows, place, group, *plain)
