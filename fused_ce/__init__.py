"""Fused cross entropy for PyTorch: a drop-in for ``nn.CrossEntropyLoss``, forward and backward."""

from .divergence import kl_div_with_logits
from .explaining import explain_call
from .fallback import warn_on_fallback
from .functional import cross_entropy, explain
from .likelihood import log_softmax, nll_loss
from .linear import explain_linear, linear_cross_entropy
from .modules import (
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    KLDivLoss,
    LinearCrossEntropyLoss,
    LogSoftmax,
    NLLLoss,
)
from .patching import patch, unpatch
from .pointwise import binary_cross_entropy_with_logits, kl_div, sigmoid_focal_loss
from .statistics import SoftmaxStats, explain_stats, softmax_stats
from .statistics.linear import explain_linear_stats, linear_softmax_stats

__version__ = "0.1.0"
__all__ = [
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "KLDivLoss",
    "LinearCrossEntropyLoss",
    "LogSoftmax",
    "NLLLoss",
    "SoftmaxStats",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "explain",
    "explain_call",
    "explain_linear",
    "explain_linear_stats",
    "explain_stats",
    "kl_div",
    "kl_div_with_logits",
    "linear_cross_entropy",
    "linear_softmax_stats",
    "log_softmax",
    "nll_loss",
    "patch",
    "sigmoid_focal_loss",
    "softmax_stats",
    "unpatch",
    "warn_on_fallback",
]
