"""Fused cross entropy for PyTorch: a drop-in for ``nn.CrossEntropyLoss``, forward and backward."""

from .functional import cross_entropy, explain
from .modules import CrossEntropyLoss

__version__ = "0.1.0"
__all__ = ["CrossEntropyLoss", "cross_entropy", "explain"]
