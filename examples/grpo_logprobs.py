"""A policy-gradient step on tokens: log-probabilities of policy and reference, an entropy bonus.

TRL computes these from the logits in several copies of them (selective_log_softmax, and
entropy_from_logits beside it); here they are written out, and fused_ce.softmax_stats gives the same
numbers in one pass. The loss is GRPO's: a clipped ratio with the group's advantages, minus what KL
divergence and entropy ask for. Run it with `python examples/grpo_logprobs.py`.
"""

import torch
from torch import Tensor, nn

import fused_ce

VOCABULARY, WIDTH, GROUP, TOKENS = 2000, 32, 8, 24
TEMPERATURE, CLIP, KL, BONUS = 0.9, 0.2, 0.04, 0.01


class Policy(nn.Module):
    """The smallest model that has logits: each token's embedding, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)))  # (B, T, V)


def composed(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy as TRL has them."""
    logits = logits / TEMPERATURE
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), entropy


def fused(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    stats = fused_ce.softmax_stats(logits, tokens, temperature=TEMPERATURE)
    return stats.log_prob, stats.entropy


def grpo_loss(
    log_prob: Tensor, entropy: Tensor, old: Tensor, reference: Tensor, advantage: Tensor
) -> Tensor:
    ratio = (log_prob - old).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    distance = reference - log_prob
    kl = distance.exp() - distance - 1
    return -(gain - KL * kl + BONUS * entropy).mean()


def main() -> None:
    torch.manual_seed(0)
    policy, reference_policy = Policy(), Policy()
    reference_policy.load_state_dict(policy.state_dict())
    tokens = torch.randint(VOCABULARY, (GROUP, TOKENS + 1))
    prompts, answers = tokens[:, :-1], tokens[:, 1:]
    # Answers with many even tokens are the good ones.
    reward = (answers % 2 == 0).float().mean(1)
    advantage = ((reward - reward.mean()) / (reward.std() + 1e-4)).unsqueeze(1)
    with torch.no_grad():  # neither needs a gradient, nor an entropy
        logits = reference_policy(prompts)
        stats = fused_ce.softmax_stats(logits, answers, temperature=TEMPERATURE, entropy=False)
    old = reference = stats.log_prob

    gradients = []
    for function in (composed, fused):
        loss = grpo_loss(*function(policy(prompts), answers), old, reference, advantage)
        gradients.append(torch.autograd.grad(loss, list(policy.parameters())))
        print(f"{function.__name__:>8}: loss {loss.item():.6f}")
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    print("   the gradients agree")

    optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
    for step in range(31):
        log_prob, entropy = fused(policy(prompts), answers)
        loss = grpo_loss(log_prob, entropy, old, reference, advantage)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            gained = (advantage * (log_prob - old)).mean().item()
            print(f" step {step:>2}: gain {gained:.4f}, entropy {entropy.mean().item():.4f}")


if __name__ == "__main__":
    main()
