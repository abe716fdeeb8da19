"""Fused cross entropy for PyTorch: a drop-in for ``nn.CrossEntropyLoss``, forward and backward."""

from .functional import cross_entropy, explain
from .linear import linear_cross_entropy
from .modules import CrossEntropyLoss, LinearCrossEntropyLoss

__version__ = "0.1.0"
__all__ = [
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "cross_entropy",
    "explain",
    "linear_cross_entropy",
]
