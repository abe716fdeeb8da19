"""The evaluation of a text under a language model: its perplexity, and whether it is greedy.

An evaluation harness takes log_softmax of all logits, gathers the tokens' and compares with
argmax; fused_ce.linear_softmax_stats has both from the hidden states, and no logits exist as a
whole. The model learns which letter follows two others. Run it with
`python examples/perplexity.py`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ce

TEXT = "the cat sat on the mat and the cat ran to the mat where the cat sat and the rat sat on it. "
WIDTH = 64


class TinyLM(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary * vocabulary, WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary)
        self.vocabulary = vocabulary

    def forward(self, tokens: Tensor) -> Tensor:
        """The hidden states from which the third token on is predicted."""
        return self.embedding(tokens[..., :-2] * self.vocabulary + tokens[..., 1:-1])


def harness(model: TinyLM, tokens: Tensor) -> tuple[Tensor, bool]:
    """With all log-probabilities, as lm-eval has it."""
    log_p = model.head(model(tokens)).log_softmax(-1)
    target = tokens[2:]
    log_prob = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1).sum()
    return log_prob, bool((log_p.argmax(-1) == target).all())


def evaluate(model: TinyLM, tokens: Tensor) -> tuple[Tensor, bool]:
    target = tokens[2:]
    stats = fused_ce.linear_softmax_stats(
        model(tokens),
        model.head.weight,
        target,
        linear_bias=model.head.bias,
        entropy=False,
        argmax=True,
    )
    return stats.log_prob.sum(), bool((stats.argmax == target).all())


def main() -> None:
    torch.manual_seed(0)
    letters = sorted(set(TEXT))
    tokens = torch.tensor([letters.index(letter) for letter in TEXT])
    model = TinyLM(len(letters))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(60):
        loss = F.cross_entropy(model.head(model(tokens)), tokens[2:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        for text in ("and", "the cat sat on the mat", "attention"):
            part = torch.tensor([letters.index(letter) for letter in text])
            log_prob, is_greedy = evaluate(model, part)
            expected, same = harness(model, part)
            torch.testing.assert_close(log_prob, expected)
            assert is_greedy == same
            perplexity = math.exp(-log_prob.item() / (len(text) - 2))
            print(f"{text!r}: perplexity {perplexity:.2f}, greedy: {is_greedy}")


if __name__ == "__main__":
    main()
