"""A training script that knows nothing of this package: plain PyTorch, as one finds it.

With stock's loss: `python examples/train_script_unchanged.py`. With the fused one:
`python -m fused_ce run examples/train_script_unchanged.py --steps 40`. The printed losses are the
same; the model learns which letter follows two others.
"""

import argparse

import torch
import torch.nn as nn
import torch.nn.functional as F

TEXT = "the cat sat on the mat and the cat ran to the mat where the cat sat and the rat sat on it. "


class Model(nn.Module):
    def __init__(self, vocabulary: int, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens, targets=None):
        pairs = torch.cat([tokens[:, :-1], tokens[:, 1:]], 1).view(len(tokens), 2, -1)
        mixed = torch.tanh(self.mix(self.embedding(pairs).transpose(1, 2).flatten(2)))
        logits = self.head(mixed)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    letters = sorted(set(TEXT))
    data = torch.tensor([letters.index(letter) for letter in TEXT])
    model = Model(len(letters))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    for step in range(steps):
        starts = torch.randint(len(data) - 17, (8,))
        batch = torch.stack([data[i : i + 17] for i in starts])
        _, loss = model(batch[:, :-1], batch[:, 2:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
