"""A classifier of handwritten digits: the 1,797 images of 8 x 8 that scikit-learn carries.

The opposite end from the language model: ten classes and small batches, where a loss costs
microseconds and its overhead per call is all there is. A drop-in must not hurt here either.
"""

import torch
from torch import nn

from bench.demo.training import Task, shuffled_batches

CLASSES = 10
BATCH = 64


def make_classifier() -> nn.Module:
    # Smooth on purpose: where a ReLU or a max pool changes sides, one ulp of difference in the
    # loss becomes 1e-3, and nobody could tell such a step from a fault.
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 128),
        nn.Tanh(),
        nn.Linear(128, 64),
        nn.Tanh(),
        nn.Linear(64, CLASSES),
    )


def digits() -> Task:
    from sklearn.datasets import load_digits  # a second, which the other tasks need not wait for

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8]
    labels = torch.tensor(data.target, dtype=torch.int64)
    return Task(
        name="digits",
        about=f"two hidden layers on {len(images):,} images of handwritten digits",
        make_model=make_classifier,
        make_batches=lambda seed: shuffled_batches(images, labels, BATCH, seed),
        logits_shape=(BATCH, CLASSES),
        learning_rate=0.05,
        steps=300,
    )
