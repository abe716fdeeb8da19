"""Trains a tiny language model with a head as Gemma 2 has it: capped logits, and a z-loss.

Both go into the loss as options: the logits are never held, capped or squared as a whole. Beside it
the same model is trained by the formula in plain torch; the two curves are one. Run it with
`python examples/z_loss_softcap.py`.
"""

import torch
import torch.nn.functional as F
from torch import nn

import fused_ce

VOCABULARY, FEATURES, CONTEXT = 200, 32, 8
SOFTCAP, Z_LOSS = 30.0, 1e-4
STEPS = 60


class TinyLM(nn.Module):
    """The mean of a context's embeddings, and a layer on top; the head is the embedding itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, FEATURES)
        self.layer = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.GELU())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.layer(self.embedding(tokens).cumsum(1) / CONTEXT)


def fused_loss(hidden: torch.Tensor, head: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return fused_ce.linear_cross_entropy(hidden, head, target, softcap=SOFTCAP, z_loss=Z_LOSS)


def composed_loss(hidden: torch.Tensor, head: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    logits = SOFTCAP * torch.tanh(F.linear(hidden, head) / SOFTCAP)
    z_loss = Z_LOSS * logits.logsumexp(-1).square().mean()
    return F.cross_entropy(logits.flatten(0, 1), target.flatten()) + z_loss


def train(loss_of) -> list[float]:
    torch.manual_seed(0)
    model = TinyLM()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    # A language in which each token mostly leads to one other.
    successor = torch.randperm(VOCABULARY)
    curve = []
    for _ in range(STEPS):
        tokens = torch.randint(VOCABULARY, (16, 1))
        for _ in range(CONTEXT):
            tokens = torch.cat([tokens, successor[tokens[:, -1:]]], 1)
        hidden = model(tokens[:, :-1])
        loss = loss_of(hidden, model.embedding.weight, tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def main() -> None:
    fused, composed = train(fused_loss), train(composed_loss)
    print("step   fused  composed")
    for step in range(0, STEPS, 10):
        print(f"{step:4}  {fused[step]:.4f}    {composed[step]:.4f}")
    apart = max(abs(a - b) / b for a, b in zip(fused, composed, strict=True))
    print(f"largest relative difference: {apart:.1e}")


if __name__ == "__main__":
    main()
