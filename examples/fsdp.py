"""A language model under FSDP2, with its tied and sharded head in the loss.

fully_shard gathers a weight for the forward of the module that it was given, and frees it after
the backward. So the loss belongs into that forward: there the head's weight is a plain tensor, and
its gradient is reduced and sharded like any other. Of a weight that is sharded when the loss is
called, pass `weight.full_tensor()`. The losses are those of one process with torch's loss. Run it
with `torchrun --standalone --nproc-per-node 2 examples/fsdp.py`, or alone with
`python examples/fsdp.py`, which starts two processes so. Nothing leaves the machine.
"""

import copy
import os
import subprocess
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fused_ce

VOCABULARY, WIDTH, ROWS, TOKENS, STEPS = 1003, 32, 8, 32, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(self.mix(self.norm(hidden)))


class Model(nn.Module):
    """Its forward returns the loss, of which `fused` says whether the logits are made."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, target: Tensor, fused: bool) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        if fused:
            return fused_ce.linear_cross_entropy(hidden, self.head.weight, target)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), target.flatten())


def train(model: Model, rank: int, ranks: int, fused: bool) -> list[float]:
    """On every rank-th part of each batch; all of it has the same number of tokens a part."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(STEPS):
        tokens = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=generator)
        target = (tokens * 7 + 3) % VOCABULARY
        loss = model(tokens[rank::ranks], target[rank::ranks], fused)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    torch.manual_seed(0)
    model = Model()
    alone = train(copy.deepcopy(model), 0, 1, fused=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # the embedding and the head, and the loss
    losses = torch.tensor(train(model, rank, ranks, fused=True), dtype=torch.float64)
    dist.all_reduce(losses)
    losses = (losses / ranks).tolist()  # each rank has the mean of its own rows
    apart = max(abs(a - b) for a, b in zip(alone, losses, strict=True))
    if rank == 0:
        print("step  one process  sharded")
        for step, pair in enumerate(zip(alone, losses, strict=True)):
            print("{:4}  {:11.6f}  {:7.6f}".format(step, *pair))
        print(f"{ranks} ranks; the losses are within {apart:.1e} of one process's")
    dist.barrier()
    dist.destroy_process_group()
    if apart > 1e-4:
        sys.exit("the losses differ")


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if "RANK" in os.environ:
        main()
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        sys.exit(subprocess.call([*torchrun, "--nproc-per-node", "2", __file__]))
