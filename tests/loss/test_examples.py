"""Worked examples: numbers anyone can check with a calculator, and two everyday uses.

Expected values come from the definition, -log(exp(x[t]) / sum(exp(x))), in plain Python floats;
each is also computed as log_softmax followed by nll_loss, the pair that the loss replaces.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from support.grids import every_mode, together
from support.reference import check_against_stock, ours


def by_definition(logits, targets):
    """The loss of each row, in float64, summed with no more rounding than `math.fsum` has."""
    return [
        math.log(math.fsum(math.exp(x) for x in row)) - row[t]
        for row, t in zip(logits, targets, strict=True)
    ]


def gradient_by_definition(logits, targets):
    """Of the mean: (softmax - one hot) / N."""
    rows = []
    for row, t in zip(logits, targets, strict=True):
        total = math.fsum(math.exp(x) for x in row)
        rows.append([(math.exp(x) / total - (c == t)) / len(logits) for c, x in enumerate(row)])
    return rows


def seeded_rand():
    torch.manual_seed(100)
    return torch.rand(4, 5).tolist()


# logits, targets, and the mean as it is printed where these examples are found, some rounded and
# some cut off. The last one is widely copied with 0.2384, which is wrong:
# log(1 + exp(-1.5) + exp(-1.9)) = 0.3168.
EXAMPLES = {
    "two right rows": ([[2.0, 1.0, 0.1], [0.5, 2.0, 0.3]], [0, 1], None),
    "one wrong row": ([[2.0, 1.0, 0.1], [1.2, 2.5, 0.3]], [0, 2], 1.4707),
    "torch.rand(4, 5)": (seeded_rand(), [4, 3, 3, 2], 1.5230),
    "one row": ([[2.0, 0.5, 0.1]], [0], 0.3168),
}


@together
@every_mode
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("example", EXAMPLES)
def test_worked_example_has_its_value(example, dtype, mode):
    logits, targets, printed = EXAMPLES[example]
    losses = by_definition(logits, targets)
    mean = math.fsum(losses) / len(losses)
    if printed is not None:
        assert abs(mean - printed) < 1e-4
    input, target = torch.tensor(logits, dtype=dtype), torch.tensor(targets)
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}

    result = ours(input, target, mode=mode)
    torch.testing.assert_close(result.loss, torch.tensor(mean, dtype=dtype), **tolerance)
    torch.testing.assert_close(
        result.loss, F.nll_loss(F.log_softmax(input, dim=1), target), **tolerance
    )
    if result.grad_input is not None:
        gradient = torch.tensor(gradient_by_definition(logits, targets), dtype=dtype)
        torch.testing.assert_close(result.grad_input, gradient, **tolerance)

    rows = ours(input, target, mode=mode, reduction="none").loss
    torch.testing.assert_close(rows, torch.tensor(losses, dtype=dtype), **tolerance)
    total = ours(input, target, mode=mode, reduction="sum").loss
    torch.testing.assert_close(total, torch.tensor(math.fsum(losses), dtype=dtype), **tolerance)


@pytest.mark.parametrize("example", EXAMPLES)
def test_one_hot_probabilities_agree_with_indices(example):
    logits, targets, _ = EXAMPLES[example]
    input, target = torch.tensor(logits), torch.tensor(targets)
    one_hot = F.one_hot(target, input.shape[1]).float()
    result = ours(input, one_hot)
    torch.testing.assert_close(result.loss, ours(input, target).loss)
    torch.testing.assert_close(result.grad_input, ours(input, target).grad_input)


def test_smoothing_agrees_with_its_definition():
    # (1 - e) * -log p[t] + e / C * sum of -log p, weights multiplying each term's class.
    logits, targets, weights, smoothing = [[2.0, 1.0, 0.1], [1.2, 2.5, 0.3]], [0, 2], [1, 2, 4], 0.1
    numerator = denominator = 0.0
    for row, t in zip(logits, targets, strict=True):
        total = math.log(math.fsum(math.exp(x) for x in row))
        losses = [weight * (total - x) for weight, x in zip(weights, row, strict=True)]
        numerator += (1 - smoothing) * losses[t] + smoothing / len(row) * math.fsum(losses)
        denominator += weights[t]
    result = ours(
        torch.tensor(logits),
        torch.tensor(targets),
        weight=torch.tensor(weights, dtype=torch.float32),
        label_smoothing=smoothing,
    )
    expected = torch.tensor(numerator / denominator)
    torch.testing.assert_close(result.loss, expected, rtol=1e-6, atol=0)


@every_mode
def test_segmentation_agrees_with_stock(mode):
    # Eight classes, a border of one pixel marked 255 as in Pascal VOC, rare classes weighted.
    input = torch.randn(2, 8, 24, 32).contiguous(memory_format=torch.channels_last)
    target = torch.full((2, 24, 32), 255)
    target[:, 1:-1, 1:-1] = torch.randint(0, 8, (2, 22, 30))
    options = {"weight": torch.linspace(0.5, 4, 8), "ignore_index": 255}
    result = check_against_stock(input, target, mode=mode, **options)
    rows = F.log_softmax(input, dim=1)
    torch.testing.assert_close(result.loss, F.nll_loss(rows, target, **options))
    if result.grad_input is not None:
        border = target.eq(255).unsqueeze(1).expand_as(input)
        assert (result.grad_input[border] == 0).all()
        assert result.grad_input.is_contiguous(memory_format=torch.channels_last)


@every_mode
def test_masked_language_model_agrees_with_stock(mode):
    # Sentences of four lengths padded to 12; position t predicts token t + 1.
    vocabulary, lengths = 101, (12, 7, 3, 1)
    tokens = torch.randint(0, vocabulary, (4, 12))
    for row, length in zip(tokens, lengths, strict=True):
        row[length:] = -100
    logits = torch.randn(4, 12, vocabulary)
    shifted, labels = logits[:, :-1], tokens[:, 1:]

    result = check_against_stock(shifted.transpose(1, 2), labels, mode=mode)
    counted = labels != -100
    losses = F.nll_loss(F.log_softmax(shifted[counted], dim=1), labels[counted], reduction="none")
    assert counted.sum() == sum(length - 1 for length in lengths)
    torch.testing.assert_close(result.loss, losses.mean())
    if result.grad_input is not None:
        assert (result.grad_input.transpose(1, 2)[~counted] == 0).all()

    flat = ours(shifted.reshape(-1, vocabulary), labels.reshape(-1), mode=mode)
    torch.testing.assert_close(flat.loss, result.loss)
