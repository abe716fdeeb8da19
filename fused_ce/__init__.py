"""Fused cross entropy for PyTorch: a drop-in for ``nn.CrossEntropyLoss``, forward and backward."""

from .fallback import warn_on_fallback
from .functional import cross_entropy, explain
from .linear import explain_linear, linear_cross_entropy
from .modules import CrossEntropyLoss, LinearCrossEntropyLoss

__version__ = "0.1.0"
__all__ = [
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "cross_entropy",
    "explain",
    "explain_linear",
    "linear_cross_entropy",
    "warn_on_fallback",
]
