"""Distils a small classifier from a larger one: the student learns the teacher's soft answers.

The loss is that of Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network (2015):
the divergence of two distributions at a temperature, times its square. Beside it the same student
is trained by the composition that people write; the two curves are one. Run it with
`python examples/distillation.py`.
"""

import torch
import torch.nn.functional as F
from torch import nn

import fused_ce

FEATURES, CLASSES, ROWS = 16, 50, 256
TEMPERATURE = 2.0
STEPS = 120


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, width), nn.GELU(), nn.Linear(width, CLASSES))


def batch(centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around the centres of their classes, some of which lie close together."""
    target = torch.randint(CLASSES, (ROWS,))
    return centres[target] + torch.randn(ROWS, FEATURES), target


def fused_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return fused_ce.kl_div_with_logits(
        student,
        teacher,
        temperature=TEMPERATURE,
        denominator=len(student) / TEMPERATURE**2,  # a mean, times the square
    )


def composed_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    log_p = F.log_softmax(student / TEMPERATURE, 1)
    log_q = F.log_softmax(teacher / TEMPERATURE, 1)
    divergence = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return divergence * TEMPERATURE**2


def train_teacher(centres: torch.Tensor) -> nn.Module:
    torch.manual_seed(0)
    teacher = network(256)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for _ in range(STEPS):
        input, target = batch(centres)
        loss = fused_ce.cross_entropy(teacher(input), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return teacher.requires_grad_(False)


def train_student(teacher: nn.Module, centres: torch.Tensor, loss_of) -> list[float]:
    torch.manual_seed(1)
    student = network(24)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    curve = []
    for _ in range(STEPS):
        input, _ = batch(centres)
        loss = loss_of(student(input), teacher(input))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def main() -> None:
    torch.manual_seed(2)
    centres = torch.randn(CLASSES, FEATURES) * 1.5
    teacher = train_teacher(centres)
    fused, composed = (
        train_student(teacher, centres, loss_of) for loss_of in (fused_loss, composed_loss)
    )
    print("step   fused  composed")
    for step in (*range(0, STEPS, 20), STEPS - 1):
        print(f"{step:4}  {fused[step]:.4f}    {composed[step]:.4f}")
    apart = max(abs(a - b) / b for a, b in zip(fused, composed, strict=True))
    print(f"largest relative difference: {apart:.1e}")


if __name__ == "__main__":
    main()
