"""Trains on data in which some classes are rare: weights for classes, and for positive labels.

A loss that counts every row alike learns the frequent classes first, and may never come to the
rare ones. `weight` of the cross entropy and `pos_weight` of the binary one give each class the same
say. Two tables show which share of each class is found (its recall), with the weights and without.
Run it with `python examples/imbalanced.py`.
"""

import torch
from sklearn.datasets import load_digits, make_multilabel_classification
from torch import Tensor, nn

import fused_ce

STEPS = 200
RARE = 8  # that many of each digit from 5 on are kept, of some 180


def trained(criterion: nn.Module, input: Tensor, target: Tensor, outputs: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(input.shape[1], outputs)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        criterion(model(input), target).backward()
        optimizer.step()
    return model


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images and their digits; of some digits the training has only a few."""
    data = load_digits()
    input, target = torch.tensor(data.data).float() / 16, torch.tensor(data.target)
    is_test = torch.arange(len(target)) % 3 == 0
    kept = [
        (target.eq(digit) & ~is_test).nonzero().flatten()[: RARE if digit >= 5 else None]
        for digit in range(10)
    ]
    training = torch.cat(kept)
    return input[training], target[training], input[is_test], target[is_test]


def recalls_of_digits(weight: Tensor | None) -> Tensor:
    input, target, test_input, test_target = digits()
    model = trained(fused_ce.CrossEntropyLoss(weight), input, target, 10)
    found = model(test_input).argmax(1)
    return torch.stack([(found[test_target == c] == c).float().mean() for c in range(10)])


def labels() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Documents by the counts of their words, each with any of six topics, or none."""
    input, target = make_multilabel_classification(
        3000, n_features=20, n_classes=6, n_labels=1, length=60, random_state=3
    )
    input, target = torch.tensor(input).float() / 10, torch.tensor(target).float()
    return input[:2000], target[:2000], input[2000:], target[2000:]


def recalls_of_labels(pos_weight: Tensor | None) -> Tensor:
    input, target, test_input, test_target = labels()
    model = trained(fused_ce.BCEWithLogitsLoss(pos_weight=pos_weight), input, target, 6)
    found = (model(test_input) > 0).float()
    return (found * test_target).sum(0) / test_target.sum(0)


def print_table(title: str, counts: Tensor, without: Tensor, having: Tensor) -> None:
    print(f"{title}\nclass  rows  recall  weighted")
    for c, (count, one, other) in enumerate(zip(counts.tolist(), without, having, strict=True)):
        print(f"{c:5}  {count:4.0f}  {one:6.2f}  {other:8.2f}")
    print(f" mean        {without.mean():6.2f}  {having.mean():8.2f}")


def main() -> None:
    counts = digits()[1].bincount(minlength=10)
    weight = counts.sum() / (10 * counts)
    both = recalls_of_digits(None), recalls_of_digits(weight)
    print_table("digits: CrossEntropyLoss(weight)", counts, *both)

    target = labels()[1]
    positive = target.sum(0)
    pos_weight = (len(target) - positive) / positive
    both = recalls_of_labels(None), recalls_of_labels(pos_weight)
    print_table("\ntopics: BCEWithLogitsLoss(pos_weight)", positive, *both)


if __name__ == "__main__":
    main()
