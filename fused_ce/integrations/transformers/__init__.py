"""``fuse_head``: a language model of Transformers trains without its logits, with one line.

The model keeps its class, its parameters and its own loss function. What changes is the output of
its head while it is trained: a promise of logits (promise.py), which the model's loss turns into
:func:`fused_ce.linear_cross_entropy`. Transformers is not imported, and any module that has
``get_output_embeddings`` is taken.
"""

from .heads import explain_head, fuse_head, unfuse_head
from .promise import Promise

__all__ = ["Promise", "explain_head", "fuse_head", "unfuse_head"]
