"""The head of a language model, fused: what is done to a model, and how it is undone.

In the mode "head" the layer becomes a :class:`FusedHead`, a class of its own that copies, pickles
and saves as the layer did. In the mode "logits" it gets a forward hook. A hook of the model fuses
the layer that ``resize_token_embeddings`` puts in the head's place.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ...eligibility import LOGIT_DTYPES, foreign, recording_reason
from ...explaining import explains
from ...linear.plan import DEVICES, check_limits, logits_dtype
from .promise import Head, Promise, Record

Mode = Literal["head", "logits"]


class Settings(NamedTuple):
    mode: Mode
    limits: dict[str, int | None]
    record: Record


class FusedHead(nn.Linear):
    """A linear layer whose output is a :class:`Promise` while it is trained."""

    fused: Settings

    def forward(self, input: Tensor) -> Tensor:
        if self._is_needed(input):
            return super().forward(input)
        return Promise(input, _head_of(self, input), logits_dtype(input))

    def _is_needed(self, input: Tensor) -> bool:
        """Whether the logits are: in evaluation, and for whatever the loss would not take."""
        layer = [input, self.weight] if self.bias is None else [input, self.weight, self.bias]
        return (
            not self.training
            or not torch.is_grad_enabled()
            or not any(t.requires_grad for t in layer)
            # Sharded as a unit of its own, its weight is gone when the loss is computed.
            or type(self) is not FusedHead
            or any(foreign(t, "layer") is not None for t in layer)
            or input.device.type not in DEVICES
            or input.shape[-1:] != self.weight.shape[1:]
            or any((t.device, logits_dtype(t)) != _kind(input) for t in layer)
            or logits_dtype(input) not in LOGIT_DTYPES
            or recording_reason() is not None
        )


def _kind(input: Tensor) -> tuple[torch.device, torch.dtype]:
    return input.device, logits_dtype(input)


def _head_of(layer: FusedHead, input: Tensor) -> Head:
    device = input.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    dtype, fused = logits_dtype(input), layer.fused
    return Head(layer.weight, layer.bias, dtype, autocast, fused.limits, fused.record)


class _PromiseOfOutput:
    """A forward hook: the logits, as a promise that is kept already."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def __call__(self, layer: nn.Module, args: tuple, output: Any) -> Any:
        if (
            not layer.training
            or not torch.is_grad_enabled()
            or foreign(output, "output") is not None
            or not output.requires_grad
            or output.dtype not in LOGIT_DTYPES
            or recording_reason() is not None
        ):
            return output
        head = Head(None, None, output.dtype, None, {}, self.record)
        return Promise(output, head, output.dtype)


class _Keeper:
    """A forward pre-hook of the model."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __call__(self, model: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling():
            return
        head = model.get_output_embeddings()
        if head is not None and not _is_fused(head) and _refusal(head, self.settings.mode) is None:
            _fuse(head, self.settings)


def fuse_head(
    model: nn.Module,
    *,
    mode: Mode = "head",
    chunk_size: int | None = None,
    max_chunk_bytes: int | None = None,
) -> nn.Module:
    r"""Lets a language model train without its logits: they stay a promise until they are needed.

    In training with grad the output of ``model.get_output_embeddings()`` is a promise of logits. It
    records what models put between head and loss: a factor, a softcap, ``float()``, other shapes
    and slices of the rows. :func:`torch.nn.functional.cross_entropy` of it, which is what the
    model's own loss calls, is :func:`fused_ce.linear_cross_entropy`. Whatever else is done with it,
    an addition or ``log_softmax``, makes the logits, once and with autograd, and goes on; the
    logger ``fused_ce`` says so at debug level, once for each operation, and :func:`explain_head`
    says what the last loss came to. Evaluation, ``generate`` and everything without grad have the
    logits as before.

    The model stays what it is: its class, parameters, ``state_dict`` and loss. It can be copied,
    pickled, compiled, saved and wrapped (DDP, FSDP2, accelerate, PEFT, the Trainer). A head that
    ``resize_token_embeddings`` makes is fused in the next forward.

    Args:
        model (nn.Module): a ``PreTrainedModel`` of Transformers, or any module whose
            ``get_output_embeddings()`` is the layer that its forward calls.
        mode (str): ``'head'``: no logits. ``'logits'``: logits in the type that the head gives, of
            which the loss is :func:`fused_ce.cross_entropy`, without copies for the float32, the
            factor and the softcap; for a head that is no plain linear layer. Default: ``'head'``
        chunk_size, max_chunk_bytes (int, optional): as in :func:`fused_ce.linear_cross_entropy`.

    Returns:
        the model.

    Raises:
        TypeError: for a model without output embeddings, and for a head that is not exactly a
            :class:`torch.nn.Linear` (quantised, wrapped or replaced by an adapter).
        ValueError: for another mode, and for sizes as in :func:`fused_ce.linear_cross_entropy`.

    Example::

        >>> import torch
        >>> import torch.nn.functional as F
        >>> from fused_ce.integrations.transformers import explain_head, fuse_head
        >>> class LM(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embedding = torch.nn.Embedding(50, 16)
        ...         self.lm_head = torch.nn.Linear(16, 50, bias=False)
        ...     def get_output_embeddings(self):
        ...         return self.lm_head
        ...     def forward(self, tokens):
        ...         logits = self.lm_head(self.embedding(tokens))[:, :-1].float() / 8.0
        ...         return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        >>> model = fuse_head(LM())
        >>> model(torch.randint(50, (2, 7))).backward()
        >>> explain_head(model)
        'fused: head, slice, float, div, flatten, cross_entropy'
    """
    head = _head_or_refusal(model, mode, chunk_size, max_chunk_bytes)
    if isinstance(head, Exception):
        raise head
    unfuse_head(model)
    limits = {"chunk_size": chunk_size, "max_chunk_bytes": max_chunk_bytes}
    settings = Settings(mode, limits, Record())
    _fuse(head, settings)
    model._fused_ce_keeper = model.register_forward_pre_hook(_Keeper(settings))
    return model


def unfuse_head(model: nn.Module) -> nn.Module:
    """Undoes :func:`fuse_head`; of no effect where nothing is fused. Returns the model."""
    keeper = vars(model).pop("_fused_ce_keeper", None)
    if keeper is not None:
        keeper.remove()
    head = _output_embeddings(model)
    if head is not None and _is_fused(head):
        handle = vars(head).pop("_fused_ce_hook", None)
        if handle is not None:
            handle.remove()
        else:
            head.__class__ = nn.Linear
        del head.fused
    return model


def explain_head(model: nn.Module) -> str:
    """Says what the last training loss of a fused head came to.

    Returns ``"fused: "`` and what stood between head and loss, ``"logits: made by "`` and the first
    operation that needed them, ``"not yet: "`` before the first loss, or ``"not fused: "`` and why
    for a model that :func:`fuse_head` has not been called with. Compiled graphs say nothing.
    ``fused_ce.explain_call(fuse_head, model)`` says what it could do for a model.
    """
    head = _output_embeddings(model)
    if head is None:
        return "not fused: the model has no output embeddings"
    if not _is_fused(head):
        return f"not fused: the head is a {type(head).__name__}"
    return head.fused.record.text


@explains(fuse_head)
def _explain(
    model: nn.Module,
    *,
    mode: Mode = "head",
    chunk_size: int | None = None,
    max_chunk_bytes: int | None = None,
) -> str:
    head = _head_or_refusal(model, mode, chunk_size, max_chunk_bytes)
    if isinstance(head, Exception):
        return f"refused: {head}"
    if mode == "logits":
        return f"fused: the loss of the logits of a {type(head).__name__}"
    return f"fused: a head of {head.out_features} classes and {head.in_features} features"


def _head_or_refusal(
    model: nn.Module, mode: Mode, chunk_size: int | None, max_chunk_bytes: int | None
) -> nn.Module | Exception:
    if mode not in ("head", "logits"):
        return ValueError(f"fused_ce: mode must be 'head' or 'logits', got {mode!r}.")
    try:
        check_limits(chunk_size, max_chunk_bytes)
    except ValueError as error:
        return error
    head = _output_embeddings(model)
    if head is None:
        return TypeError(
            "fused_ce: expected a language model whose get_output_embeddings() is its head, got a "
            f"{type(model).__name__} without; of a wrapper pass the model in it."
        )
    return _refusal(head, mode) or head


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return None if getter is None else getter()


def _is_fused(head: nn.Module) -> bool:
    return "fused" in vars(head) and isinstance(head.fused, Settings)


def _refusal(head: nn.Module, mode: Mode) -> Exception | None:
    if mode == "logits":
        return None
    if type(head) not in (nn.Linear, FusedHead):
        return TypeError(
            "fused_ce: expected a head that is exactly a torch.nn.Linear, got a "
            f"{type(head).__module__}.{type(head).__name__}; call fuse_head before an adapter or a "
            "sharding library wraps the head, or pass mode='logits'."
        )
    if "forward" in vars(head):
        return TypeError(
            "fused_ce: expected a head with the forward of its class, got one whose forward was "
            "replaced, as accelerate does for a device_map; pass mode='logits'."
        )
    return None


def _fuse(head: nn.Module, settings: Settings) -> None:
    if settings.mode == "logits":
        head._fused_ce_hook = head.register_forward_hook(_PromiseOfOutput(settings.record))
    else:
        head.__class__ = FusedHead
    head.fused = settings
