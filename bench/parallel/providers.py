"""Who is measured on the ranks: torch's loss_parallel, what people write with three all-reduces,
and ours over the process group; and on the first rank alone, with all classes, the unsharded loss.

A provider gives a call that takes this rank's logits out of their box, and answers with the loss
and their gradient.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel

from bench.common.made import Box
from bench.parallel.tensors import UNSHARDED, RankTensors

Call = Callable[[Box], tuple[Tensor, Tensor]]


def stock(tensors: RankTensors) -> Call:
    mesh = init_device_mesh("cpu", (tensors.case.ranks,))

    def call(box: Box) -> tuple[Tensor, Tensor]:
        logits = DTensor.from_local(box.pop(), mesh, [Shard(1)], run_check=False)
        with loss_parallel():
            loss = F.cross_entropy(logits, tensors.target)
            loss.backward()
        return loss.full_tensor(), box.pop()

    return call


class _ThreeReductions(torch.autograd.Function):
    """The formula of Megatron-LM: the maximum, the target's logit and the sum are all-reduced."""

    @staticmethod
    def forward(ctx, logits, target, first):
        largest = logits.amax(1)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        shifted = logits - largest.unsqueeze(1)
        own = target - first
        is_own = (own >= 0) & (own < logits.shape[1])
        own = own.where(is_own, 0)
        picked = shifted.gather(1, own.unsqueeze(1)).squeeze(1).where(is_own, 0)
        dist.all_reduce(picked)
        terms = shifted.exp_()
        total = terms.sum(1)
        dist.all_reduce(total)
        ctx.save_for_backward(terms.div_(total.unsqueeze(1)), own, is_own)
        return (total.log() - picked).mean()

    @staticmethod
    def backward(ctx, grad_output):
        grad, own, is_own = ctx.saved_tensors
        rows = torch.arange(len(own))
        grad[rows, own] -= is_own.to(grad.dtype)
        return grad.mul_(grad_output / len(own)), None, None


def three(tensors: RankTensors) -> Call:
    def call(box: Box) -> tuple[Tensor, Tensor]:
        loss = _ThreeReductions.apply(box.pop(), tensors.target, tensors.first)
        loss.backward()
        return loss.detach(), box.pop()

    return call


def _ours(tensors: RankTensors, **options: bool) -> Call:
    from fused_ce import cross_entropy

    place = {"process_group": dist.group.WORLD, "num_classes": tensors.case.classes}

    def call(box: Box) -> tuple[Tensor, Tensor]:
        loss = cross_entropy(box.pop(), tensors.target, **options, **place)
        loss.backward()
        return loss.detach(), box.pop()

    return call


def fused(tensors: RankTensors) -> Call:
    """Over the logits, since the box was all that held them."""
    return _ours(tensors)


def fresh(tensors: RankTensors) -> Call:
    """As it is where somebody else holds the logits."""
    return _ours(tensors, inplace=False)


def inplace(tensors: RankTensors) -> Call:
    return _ours(tensors, inplace=True)


def unsharded(tensors: RankTensors) -> Call | None:
    """The other ranks wait."""
    from fused_ce import cross_entropy

    if tensors.rank > 0:
        return None

    def call(box: Box) -> tuple[Tensor, Tensor]:
        loss = cross_entropy(box.pop(), tensors.target)
        loss.backward()
        return loss.detach(), box.pop()[:, : tensors.own.shape[1]]

    return call


PROVIDERS = {
    "loss_parallel": stock,
    "three": three,
    UNSHARDED: unsharded,
    "fused": fused,
    "fresh": fresh,
    "inplace": inplace,
}
