"""A small language model whose vocabulary is sharded over processes, beside the same in one.

torch's own parallelize_module shards the head's weight by class, which makes of the logits a
DTensor that holds each rank's classes; fused_ce.cross_entropy takes it as it is, and
fused_ce.linear_cross_entropy takes the head before it has logits. The losses are those of one
process with torch's loss. Run it with
`torchrun --standalone --nproc-per-node 2 examples/tensor_parallel.py`, or alone with
`python examples/tensor_parallel.py`, which starts two processes so. Nothing leaves the machine.
"""

import copy
import os
import subprocess
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import fused_ce

VOCABULARY, WIDTH, TOKENS, STEPS = 1003, 32, 256, 10  # a vocabulary that no number of ranks divides


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.mix(self.embedding(tokens)))


def whole(model: Model, tokens: Tensor, target: Tensor) -> Tensor:
    """One process, torch's loss."""
    return F.cross_entropy(model.head(model.hidden(tokens)), target, label_smoothing=0.1)


def sharded_logits(model: Model, tokens: Tensor, target: Tensor) -> Tensor:
    logits = model.head(model.hidden(tokens))  # a DTensor: Shard(1)
    return fused_ce.cross_entropy(logits, target, label_smoothing=0.1)


def sharded_head(model: Model, tokens: Tensor, target: Tensor) -> Tensor:
    """Without the logits, of which no rank holds more than a chunk of its classes."""
    weight = model.head.weight
    hidden = DTensor.from_local(model.hidden(tokens), weight.device_mesh, [Replicate()])
    return fused_ce.linear_cross_entropy(hidden, weight, target, label_smoothing=0.1)


def shard(model: Model, mesh: DeviceMesh) -> Model:
    """The head by class; its output stays the DTensor that says so."""
    by_class = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    return parallelize_module(model, mesh, {"head": by_class})


def train(model: Model, loss_of) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=20.0)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(STEPS):
        tokens = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
        loss = loss_of(model, tokens, (tokens * 7 + 3) % VOCABULARY)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        losses.append(float(loss.full_tensor() if isinstance(loss, DTensor) else loss))
    return losses


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = Model()
    alone = train(copy.deepcopy(model), whole)
    ways = [train(shard(copy.deepcopy(model), mesh), way) for way in (sharded_logits, sharded_head)]
    apart = max(abs(a - b) for way in ways for a, b in zip(alone, way, strict=True))
    if dist.get_rank() == 0:
        print("step  one process  sharded logits  sharded head")
        for step, losses in enumerate(zip(alone, *ways, strict=True)):
            print("{:4}  {:11.6f}  {:14.6f}  {:12.6f}".format(step, *losses))
        print(f"{mesh.size()} ranks; the losses are within {apart:.1e} of one process's")
    dist.barrier()
    dist.destroy_process_group()
    if apart > 1e-5:
        sys.exit("the losses differ")


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if "RANK" in os.environ:
        main()
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        sys.exit(subprocess.call([*torchrun, "--nproc-per-node", "2", __file__]))
