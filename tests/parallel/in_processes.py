"""A program for two ranks that are processes: what threads cannot do, or share with one another.

torch.distributed.run starts it (test_processes.py). Each check is made on every rank.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import fused_ce

CLASSES, ROWS, FEATURES = 11, 40, 6


class Ranks:
    def __init__(self):
        dist.init_process_group("gloo")
        torch.manual_seed(0)
        self.input = torch.randn(ROWS, CLASSES, dtype=torch.float64)
        self.hidden = torch.randn(ROWS, FEATURES, dtype=torch.float64)
        self.weight = torch.randn(CLASSES, FEATURES, dtype=torch.float64)
        self.target = torch.randint(0, CLASSES, (ROWS,))
        part = -(-CLASSES // dist.get_world_size())
        self.own = slice(dist.get_rank() * part, (dist.get_rank() + 1) * part)
        self.place = {"process_group": dist.group.WORLD, "num_classes": CLASSES}
        self.loss = F.cross_entropy(self.input, self.target)

    def of_logits(self, logits, **options):
        return fused_ce.cross_entropy(logits, self.target, **self.place, **options)

    def check_logits(self, function):
        own = self.input[:, self.own].clone().requires_grad_()
        whole = self.input.clone().requires_grad_()
        loss = function(own)
        loss.backward()
        F.cross_entropy(whole, self.target).backward()
        torch.testing.assert_close(loss.detach(), self.loss)
        torch.testing.assert_close(own.grad, whole.grad[:, self.own])
        losses = [torch.empty_like(self.loss) for _ in range(dist.get_world_size())]
        dist.all_gather(losses, loss.detach())
        assert all(torch.equal(each, losses[0]) for each in losses)

    def check_head(self, function):
        layer = [t.clone().requires_grad_() for t in (self.hidden, self.weight[self.own])]
        whole = [t.clone().requires_grad_() for t in (self.hidden, self.weight)]
        loss, expected = function(*layer), F.cross_entropy(F.linear(*whole), self.target)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss.detach(), expected.detach())
        torch.testing.assert_close(layer[0].grad, whole[0].grad)
        torch.testing.assert_close(layer[1].grad, whole[1].grad[self.own])


def say(text):
    """On the first rank; two that print at a time mix their lines."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def main():
    ranks = Ranks()

    def of_logits(logits):
        return ranks.of_logits(logits * 1)

    def of_head(hidden, weight):
        return fused_ce.linear_cross_entropy(
            hidden, weight, ranks.target, chunk_size=16, **ranks.place
        )

    ranks.check_logits(of_logits)
    ranks.check_logits(lambda logits: ranks.of_logits(logits * 1, inplace="auto"))
    ranks.check_head(of_head)
    for backend in ("eager", "aot_eager", "inductor"):
        ranks.check_logits(torch.compile(of_logits, fullgraph=True, backend=backend))
        say(f"compiled by {backend}")
    ranks.check_head(torch.compile(of_head, fullgraph=True, backend="aot_eager"))
    say("a compiled head")
    for inplace in (False, True):
        ranks.check_logits(
            lambda logits, inplace=inplace: checkpoint(
                lambda x: ranks.of_logits(x * 1, inplace=inplace), logits, use_reentrant=False
            )
        )
        with save_on_cpu():
            ranks.check_logits(lambda x, inplace=inplace: ranks.of_logits(x * 1, inplace=inplace))
    say("hooks on saved tensors")
    try:
        ranks.of_logits(ranks.input[:, ranks.own], label_smoothing=0.1 * dist.get_rank())
        raise AssertionError("no error")
    except ValueError as error:
        say(f"an error of both: {error}")
    dist.barrier()
    os._exit(0)  # what is left of a group has been seen to hang


if __name__ == "__main__":
    main()
