"""A fused head in two processes: DDP and FSDP2 train it as they train stock's, over gloo.

A program of its own, run by processes.py, whose two ranks are forked from one process that has
loaded torch. The model computes its loss itself, or leaves that to the loop.
"""

import json
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.processes import environment, finish, in_two_processes
from torch import nn

from fused_ce.integrations.transformers import explain_head, fuse_head

V, H = 23, 8
FUSED = "fused: head, float, view, cross_entropy"
WRAPPINGS = {
    "ddp": FUSED,
    "ddp that looks for unused parameters": FUSED,
    "ddp with the loss in the loop": FUSED,
    "fsdp": FUSED,
    "fsdp with the loss in the loop": FUSED,
    "fsdp in bf16": FUSED,
    # Its weight would be given back before the loss, so the logits are made at once.
    "fsdp with the head apart": "not yet",
}


class LM(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, H)
        self.layer = nn.Sequential(nn.Linear(H, H), nn.Tanh())
        self.lm_head = nn.Linear(H, V)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, tokens, labels=None):
        logits = self.lm_head(self.layer(self.embedding(tokens)))
        return {"loss": None if labels is None else loss_of(logits, labels), "logits": logits}


def loss_of(logits, labels):
    labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.float().view(-1, V), labels.reshape(-1))


def wrapped(model, wrapping):
    if wrapping.startswith("ddp"):
        unused = "unused" in wrapping
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if "bf16" in wrapping else None
    options = {"mesh": dist.init_device_mesh("cpu", (2,))}
    options |= {} if half is None else {"mp_policy": half}
    fully_shard(model.layer, **options)
    if "apart" in wrapping:
        fully_shard(model.lm_head, **options)
    return fully_shard(model, **options)


def train(model, wrapping, rank):
    """The curve, the parameters in the end, and what the head says."""
    trained = wrapped(model, wrapping)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(1 + rank)
    curve = []
    for _ in range(3):
        tokens = torch.randint(V, (2, 7), generator=generator)
        if "loop" in wrapping:
            loss = loss_of(trained(tokens)["logits"], tokens)
        else:
            loss = trained(tokens, labels=tokens)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [curve, [p.tolist() for p in whole], explain_head(model)]


def train_a_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    found = {}
    for wrapping in WRAPPINGS:
        found[wrapping] = [
            train(fuse(LM()), wrapping, rank) for fuse in (nn.Module.train, fuse_head)
        ]
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)


@pytest.mark.slow  # FSDP2 and its imports take seconds in each process
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_a_fused_head_trains_in_two_processes_as_stocks_does(tmp_path):
    done = finish(__file__, str(tmp_path), env=environment())
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for found in ranks:
        for wrapping, ((curve, parameters, _), (ours, our_parameters, said)) in found.items():
            assert said.startswith(WRAPPINGS[wrapping]), (wrapping, said)
            tolerance = 1e-2 if "bf16" in wrapping else 1e-5
            assert ours == pytest.approx(curve, rel=tolerance), wrapping
            for mine, stocks in zip(our_parameters, parameters, strict=True):
                mine, stocks = torch.tensor(mine), torch.tensor(stocks)
                torch.testing.assert_close(mine, stocks, rtol=tolerance, atol=tolerance)
    # Each process had its own batches, and all have one model in the end.
    first, other = (found["ddp"][1] for found in ranks)
    assert first[0] != other[0] and first[1] == other[1]


if __name__ == "__main__":
    sys.exit(in_two_processes(train_a_rank, sys.argv[1]))
