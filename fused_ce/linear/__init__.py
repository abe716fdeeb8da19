"""``linear_cross_entropy``: the loss of a linear layer's output, which never exists as a whole.

Rows are taken in chunks: one GEMM for their logits, the cross entropy that writes its gradient over
them, and two GEMMs that turn that into the gradients of the layer. The formula that holds all
logits is left for what differentiates it further, and for what the kernels do not take.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import extensions, fallback, functional, stock
from ..eligibility import (
    INVALID,
    OVERRIDDEN,
    foreign,
    loss_dtype,
    overrides,
    stock_reason_of_logits,
)
from ..explaining import explains
from ..extensions import Extensions, requires_grad
from ..options import DEFAULTS, NONE, Options
from ..scripting import stocks_or_refusal
from ..signatures import bound, takes_arguments_of
from . import operators
from .plan import DEVICES, Limits, Sizes, check_limits, limits_of, logits_dtype
from .targets import example, flattened, of_one_dimension


class _Call(NamedTuple):
    """What a call computes from: the layer as a matrix, the batch in one dimension at most.

    Only probabilities keep several where one would take a copy of them.
    """

    input: Tensor  # [H] or [N, H]
    linear_weight: Tensor  # [V, H], V being the classes times all positions
    target: Tensor
    linear_bias: Tensor | None  # [V]
    loss_arguments: dict[str, Any]  # those of cross_entropy
    options: Options  # stock's of these, for the operators
    given: Extensions  # the others, checked
    logits_shape: tuple[int, ...]
    limits: Limits
    grad_in_forward: bool
    loss_shape: tuple[int, ...]  # with reduction='none'
    is_batched: bool  # in several dimensions
    shard: tuple = operators.WHOLE  # of the classes, as the operators have it


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    chunk_size: int | None = None,
    max_chunk_bytes: int | None = None,
    grad_in_forward: bool = True,
    dtype: torch.dtype | None = None,
    denominator: float | Tensor | None = None,
    on_all_ignored: str = "nan",
    z_loss: float = 0.0,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    sample_weight: Tensor | None = None,
    focal_gamma: float = 0.0,
    on_out_of_range: str = "assert",
    process_group: Any = None,
    num_classes: int | None = None,
    class_offset: int | None = None,
    reduce_input_grad: bool = True,
) -> Tensor:
    r"""Computes the cross entropy between ``input @ linear_weight.T + linear_bias`` and target
    without holding these logits.

    A drop-in for ``torch.nn.functional.linear_cross_entropy`` (torch 2.13 and newer), and for
    :func:`torch.nn.functional.linear` followed by :func:`torch.nn.functional.cross_entropy`. See
    :class:`fused_ce.CrossEntropyLoss` for the formula. Sums are taken in float32 at least: that of
    the losses, and that of the weight's gradient over the chunks.

    Args:
        input (Tensor): of float32, float64, bfloat16 or float16.
        linear_weight (Tensor): the layer's weight, of the input's dtype.
        target (Tensor): class indices (int64, and also int32, int16 or uint8), or class
            probabilities.
        linear_bias (Tensor, optional): the layer's bias.
        weight (Tensor, optional): a weight for each class.
        reduction (str): ``'none'`` | ``'mean'`` | ``'sum'``. Default: ``'mean'``
        ignore_index (int, optional): a class index that marks a row to leave out. Default: ``-100``
            for class indices; with probabilities there can be none.
        label_smoothing (float): within [0, 1]. Default: ``0.0``
        options (LinearCrossEntropyOptions, optional): torch's. The chunk size that it names is
            used; its other fields ask for what is always so here.
        chunk_size (int, optional): the most rows of input in a chunk. Chunks are made equal.
        max_chunk_bytes (int, optional): the most memory for a chunk. The gradients, and the float32
            sum of the weight's, come on top. A chunk has at least one row. Default: 64 MiB on the
            CPU and 1 GiB on CUDA, or more if 256 rows (on CUDA 2048) need more.
        grad_in_forward (bool): compute the gradients along with the loss, for a ``grad_output`` of
            1. They are scaled if something else arrives, and rounded once more unless that is a
            power of two. ``False`` keeps nothing until the backward, which computes the logits
            anew. That is always so with ``reduction='none'`` and in float16. Default: ``True``
        dtype, denominator, on_all_ignored, z_loss, logit_scale, softcap, sample_weight: as in
            :func:`fused_ce.cross_entropy`, of the layer's output. A ``logit_scale`` that requires
            grad is multiplied into the input.
        focal_gamma, on_out_of_range: likewise.
        process_group, num_classes, class_offset: as in :func:`fused_ce.cross_entropy`: weight and
            bias are those of this rank's classes, and the input is the same on all ranks. A chunk's
            statistics travel while the next one's logits are computed.
        reduce_input_grad (bool): with a process group, sum the gradient of the input over the
            ranks, in float32 for half types. ``False`` leaves this rank's part, for a framework
            that sums it itself. Default: ``True``

    Shape:
        - Input: :math:`(H)`, :math:`(N, H)` or :math:`(B, ..., H)`, all but the last dimension
          being the batch.
        - Linear weight: :math:`(C, H)` or :math:`(C, d_1, ..., d_K, H)` for a K-dimensional loss.
        - Linear bias: the weight's shape without :math:`H`.
        - Target: the batch dimensions, then :math:`d_1, ..., d_K`; for probabilities with
          :math:`C` between them.
        - Output: a scalar, or the shape of the class indices for ``reduction='none'``.

    Raises:
        Exception: what torch raises for the same call, among it ``IndexError`` for a target that is
            no class, before anything is computed.
        ValueError: for a ``chunk_size`` or ``max_chunk_bytes`` that is not positive, or both; and
            for an option that torch's function does not have, and that makes no sense.

    Example::

        >>> import fused_ce
        >>> import torch
        >>> hidden = torch.randn(2, 7, 16, requires_grad=True)
        >>> head = torch.nn.Linear(16, 1000, bias=False)
        >>> target = torch.randint(1000, (2, 7))
        >>> loss = fused_ce.linear_cross_entropy(hidden, head.weight, target)
        >>> loss.backward()
        >>> hidden.grad.shape, head.weight.grad.shape
        (torch.Size([2, 7, 16]), torch.Size([1000, 16]))
    """
    tensors = (input, linear_weight, target, linear_bias, weight)
    keywords = {
        "linear_bias": linear_bias,
        "weight": weight,
        "reduction": reduction,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "options": options,
        "chunk_size": chunk_size,
        "max_chunk_bytes": max_chunk_bytes,
        "grad_in_forward": grad_in_forward,
        "dtype": dtype,
        "denominator": denominator,
        "on_all_ignored": on_all_ignored,
        "z_loss": z_loss,
        "logit_scale": logit_scale,
        "softcap": softcap,
        "sample_weight": sample_weight,
        "focal_gamma": focal_gamma,
        "on_out_of_range": on_out_of_range,
    }
    place = process_group, num_classes, class_offset
    if place != (None, None, None):
        made = partial(_call, input, linear_weight, target, **keywords)
        loss, shape = _sharded()(input, made, place, reduce_input_grad)
        return loss if loss.dim() == 0 else loss.reshape(shape)
    overridden = False
    if has_torch_function_variadic(*tensors):
        overridden = any(overrides(t) for t in tensors)
        if not overridden:  # a mode: a device context, say
            return handle_torch_function(linear_cross_entropy, tensors, *tensors[:3], **keywords)
    call = _call(input, linear_weight, target, **keywords)
    # A subclass is given the functions that it knows.
    reason = OVERRIDDEN if overridden else _stock_reason(call)
    if reason in _DISTRIBUTED:
        layer = input, linear_weight, linear_bias
        reason = _distributed().head_reason(*layer, target, call.options, call.given)
        if reason is None:
            return _of_dtensors(layer, target, call, keywords)
    if reason is None:
        loss = fused(call)
    else:
        if reason == INVALID:
            try:
                _raise_as_stock(call)
            except (RuntimeError, ValueError) as error:
                _tell_exchanged(call, error)
                raise
        if call.is_batched:
            call = call._replace(target=of_one_dimension(call.target, len(call.input)))
        loss = _unfused(call)
        if fallback.is_on:  # afterwards, since stock may have refused the call
            fallback.warn("linear_cross_entropy", reason)
    return loss if loss.dim() == 0 else loss.reshape(call.loss_shape)


linear_cross_entropy.__prepare_scriptable__ = stocks_or_refusal(
    linear_cross_entropy,
    stock.own_linear_cross_entropy,
    "torch.nn.functional.linear and cross_entropy",
    "all of them",
)


@explains(linear_cross_entropy)
@takes_arguments_of(linear_cross_entropy)
def explain_linear(*args: Any, **kwargs: Any) -> str:
    """Says how :func:`linear_cross_entropy` would take this call, without computing anything.

    Returns ``"fused: "`` with the moment the gradients are computed, the chunks that all rows take
    (those that do not count get none on the CPU) and the instruction
    set in use (on CUDA the GPU's compute capability), or ``"stock: "`` with the reason why stock
    PyTorch takes the call, whose formula holds all logits.

    Example::

        >>> import fused_ce
        >>> import torch
        >>> hidden, head = torch.randn(1000, 16), torch.randn(50, 16, requires_grad=True)
        >>> target = torch.randint(50, (1000,))
        >>> said = fused_ce.explain_linear(hidden, head, target, chunk_size=300)
        >>> said.rpartition(",")[0]
        'fused: gradient in forward, 4 chunks of 256 rows, 51200 bytes each'
        >>> fused_ce.explain_linear(hidden, head, torch.rand(1000, 50, requires_grad=True))
        'stock: the target requires grad'
    """
    arguments = bound(linear_cross_entropy, args, kwargs)
    if any(overrides(value) for value in arguments.values()):
        return f"stock: {OVERRIDDEN}"
    reduce_input_grad = arguments.pop("reduce_input_grad")
    place = tuple(arguments.pop(name) for name in functional.SHARDING)
    if place != (None, None, None):
        made = partial(_call, **arguments)
        return _explained_shard(arguments["input"], made, place, reduce_input_grad)
    call = _call(**arguments)
    reason = _stock_reason(call)
    if reason in _DISTRIBUTED:
        layer = [arguments[name] for name in ("input", "linear_weight", "linear_bias")]
        of_rows = arguments["target"], call.options, call.given
        reason = _distributed().head_reason(*layer, *of_rows)
        if reason is None:
            return f"fused: {_moment(call)}, by the parts of the DTensors"
    if reason is not None:
        return f"stock: {reason}"
    return f"fused: {_moment(call)}, {_chunks(call)}, {functional.instructions(call.input)}"


# As foreign() has it.
_DISTRIBUTED = "the input is a DTensor", "the linear weight is a DTensor"


def _of_dtensors(layer: tuple, target: Tensor, call: _Call, keywords: dict[str, Any]) -> Tensor:
    """By the head of the parts of this rank."""
    dtensor = _distributed()
    local = dtensor.local_head(*layer, target, call.options, _given(keywords))
    loss = linear_cross_entropy(**keywords | local)
    input, linear_weight, _ = layer
    return dtensor.placed_head(loss, input, linear_weight, call.options.reduction)


def _distributed() -> Any:
    from ..parallel import dtensor

    return dtensor


def _given(arguments: dict[str, Any]) -> Extensions:
    return Extensions(*(arguments[name] for name in extensions.NAMES))


def _sharded() -> Any:
    """What knows torch.distributed, which is there when a call first needs it."""
    from ..parallel.linear import sharded

    return sharded


def _call(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None,
    options: Any,
    chunk_size: int | None,
    max_chunk_bytes: int | None,
    grad_in_forward: bool,
    **loss_arguments: Any,
) -> _Call:
    check_limits(chunk_size, max_chunk_bytes)
    _check_tensors(input=input, linear_weight=linear_weight, linear_bias=linear_bias)
    _check_shapes(input, linear_weight, linear_bias)
    batch = input.shape[:-1]
    classes, *positions = linear_weight.shape[:-1]
    if loss_arguments["ignore_index"] is None:
        loss_arguments["ignore_index"] = DEFAULTS.ignore_index
    elif target.shape == (*batch, classes, *positions):
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    if len(batch) > 1:
        target = _flat_target(target, batch, classes, positions)
        input = input.flatten(0, -2)
    loss_shape = (*batch, *positions)
    stocks = functional.options_of(loss_arguments)
    given = _given(loss_arguments)
    if not given.are_default:
        given = given.checked(stocks, target.is_floating_point(), loss_shape)
        if given.sample_weight is not None and len(batch) > 1:
            weight = given.sample_weight.reshape(len(input), *positions)
            given = given._replace(sample_weight=weight)
        loss_arguments |= given._asdict()
    logits_shape = (*input.shape[:-1], classes, *positions)
    limits = Limits(chunk_size, max_chunk_bytes)
    if options is not None and limits == Limits(None, None):
        limits = limits_of(options, logits_shape[0])
    return _Call(
        input,
        linear_weight.flatten(0, -2),
        target,
        None if linear_bias is None else linear_bias.flatten(),
        loss_arguments,
        stocks,
        given,
        logits_shape,
        limits,
        grad_in_forward,
        loss_shape,
        len(batch) > 1,
    )


def _check_tensors(**layer: Any) -> None:
    """Before anything is asked of them. Of a wrong target stock has its own words."""
    for name, value in layer.items():
        if isinstance(value, Tensor) or value is None or overrides(value):
            continue
        kind = type(value)
        if isinstance(value, torch.nn.Module):
            instead = "its weight, and its bias as linear_bias"
        elif kind.__module__ == "numpy":
            instead = f"torch.from_numpy({name})"
        else:
            instead = "a tensor"
        raise TypeError(
            f"fused_ce: expected {name} to be a tensor, got a {kind.__module__}.{kind.__name__}; "
            f"pass {instead}."
        )


def _check_shapes(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """What torch's function of this name checks, in its words; here for any torch."""
    if input.dim() < 1:
        raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}"
        )
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(
            f"expected linear_bias shape {tuple(linear_weight.shape[:-1])}, "
            f"got {tuple(linear_bias.shape)}"
        )
    if linear_weight.dim() > 2 and input.dim() == 1:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} "
            f"requires batched input, (N, {input.shape[-1]}), got unbatched input with shape "
            f"{tuple(input.shape)}"
        )


def _flat_target(target: Tensor, batch: tuple, classes: int, positions: list) -> Tensor:
    """The target of several batch dimensions, as that of one.

    torch takes no such input. A target that fits only after flattening would be a silent mistake.
    """
    for inner in (positions, [classes, *positions]):
        if target.shape == (*batch, *inner):
            return flattened(target, len(batch))
    raise RuntimeError(
        f"fused_ce: expected target of shape {(*batch, *positions)}, or "
        f"{(*batch, classes, *positions)} for probabilities, got {tuple(target.shape)}; its first "
        "dimensions are those of the input."
    )


def layer_reason(call: _Call) -> str | None:
    """Why the chunks cannot take a call with these tensors of a layer."""
    input = call.input
    layer = [t for t in (input, call.linear_weight, call.linear_bias) if t is not None]
    for tensor, name in zip(layer, ("input", "linear weight", "linear bias"), strict=False):
        reason = foreign(tensor, name)
        if reason is not None:
            return reason
    if input.device.type not in DEVICES:
        return f"there are no kernels for {input.device.type}"
    dtype = logits_dtype(input)
    for tensor in layer:
        if (tensor.device, logits_dtype(tensor)) != (input.device, dtype):
            return "the layer's tensors differ in device or dtype"
    if 0 in call.logits_shape[2:]:
        return "the loss has no positions"
    return None


def _stock_reason(call: _Call) -> str | None:
    """Why the formula with all logits takes this call; None if the chunks can."""
    reason = layer_reason(call)
    if reason is not None:
        return reason
    input, target, dtype = call.input, call.target, logits_dtype(call.input)
    if call.is_batched:
        target = example(target, len(input))
    options, given = call.options, call.given
    of_stock = options.weight, options.ignore_index, options.label_smoothing
    computed = given.dtype or dtype
    reason = stock_reason_of_logits(input, call.logits_shape, computed, target, *of_stock)
    if reason is None and not given.are_default:
        reason = given.reference_reason(dtype)
    if reason is None and extensions.composes(given, options, target):
        return extensions.COMPOSED
    if reason is None and call.target.requires_grad and torch.is_grad_enabled():
        return "the target requires grad"
    return reason


def _raise_as_stock(call: _Call) -> None:
    """Has stock raise what it would, before it computes: first for the options, then for the
    shapes and dtypes. What it finds later still comes from the whole formula."""
    one = torch.zeros((1, 1)), torch.zeros(1, dtype=torch.long)
    stock.cross_entropy(*one, call.options._replace(weight=None))
    target = example(call.target, len(call.input)) if call.is_batched else call.target
    if target.shape != call.logits_shape:
        dtype, device = logits_dtype(call.input), call.input.device
        logits = torch.empty((), dtype=dtype, device=device).expand(call.logits_shape)
        stock.nll_loss(logits, target, call.options)


def _tell_exchanged(call: _Call, error: Exception) -> None:
    """A note beneath stock's words where the weight came first, as other libraries have it."""
    rows, weights = len(call.input), len(call.linear_weight)
    if rows != weights == len(call.target) and hasattr(error, "add_note"):  # Python 3.11
        error.add_note("fused_ce: input comes first, then linear_weight; are they exchanged?")


def _unfused(call: _Call) -> Tensor:
    """The formula with all logits."""
    logits = stock.linear(call.input, call.linear_weight, call.linear_bias)
    logits = logits.reshape(call.logits_shape)
    return functional.cross_entropy(logits, call.target, **call.loss_arguments)


def _needs(call: _Call) -> list[bool]:
    layer = (call.input, call.linear_weight, call.linear_bias)
    return [t is not None and t.requires_grad and torch.is_grad_enabled() for t in layer]


def _moment(call: _Call) -> str:
    """When the gradients are computed."""
    if not any(_needs(call)):
        return "no gradient"
    # A gradient rounded to float16 may have lost what a gradient scaler was to save.
    defers = call.options.reduction == NONE or logits_dtype(call.input) == torch.float16
    return "recomputed in backward" if defers or not call.grad_in_forward else "gradient in forward"


def _explained_shard(input: Tensor, make_call: Callable, place: tuple, reduce: bool) -> str:
    try:
        call, shard, reason = _sharded()(input, make_call, place, reduce, explains=True)
    except Exception as error:
        return f"refused: {str(error).splitlines()[0]}"
    if reason is not None:
        return f"stock: {reason}"
    chunks = _chunks(call, shard.classes, shard.held)
    ranks = f"statistics of {shard.group.size} ranks in one all-gather each"
    return f"fused: {_moment(call)}, {chunks}, {ranks}, {functional.instructions(call.input)}"


def _chunks(call: _Call, classes: int | None = None, held: int = 1) -> str:
    """Of so many classes, if not of the layer's own."""
    columns, features = call.linear_weight.shape
    count = call.logits_shape[0] if call.input.dim() > 1 else 1
    device = DEVICES[call.input.device.type]
    dtype = device.computed_dtype(logits_dtype(call.input))
    if classes is None:
        classes = call.logits_shape[1 if call.input.dim() > 1 else 0]
    else:
        columns = classes * math.prod(call.logits_shape[2:])
    copies = call.is_batched and len(call.target) != count
    copied = call.target.dtype.itemsize if copies else 0
    sizes = Sizes(count, features, classes, columns, call.input.dtype != dtype, copied, held)
    rows = sizes.chunk_rows(call.limits, dtype, device)
    chunks, rows = -(-count // rows), min(rows, count)
    size = rows * columns * dtype.itemsize
    if chunks == 1:
        return f"1 chunk of {rows} row{'s' * (rows != 1)}, {size} bytes"
    return f"{chunks} chunks of {rows} row{'s' * (rows != 1)}, {size} bytes each"


def fused(call: _Call) -> Tensor:
    given = call.given
    if requires_grad(given.denominator) or requires_grad(given.sample_weight):

        def without(options: Options, given: Extensions) -> Tensor:
            return fused(call._replace(options=options, given=given))

        dtype = logits_dtype(call.input)
        return extensions.weighed(given, call.options, call.target, dtype, without)
    if requires_grad(given.logit_scale):
        call = _scaled(call)
        given = call.given
    extensions.check_targets(given, call.options, call.target, call.logits_shape)
    input, target, dtype = call.input, call.target, logits_dtype(call.input)
    if input.dim() == 1:
        input = input.unsqueeze(0)
        target = target.reshape(1, -1) if target.is_floating_point() else target.reshape(1)
    computed = given.dtype or dtype
    options = given.added_to(call.options, input.device)
    options = options._replace(
        loss_dtype=loss_dtype(computed, target, options.weight) or computed,
    )
    if call.input.dim() == 1 and options.sample_weight is not None:
        options = options._replace(sample_weight=options.sample_weight.reshape(1))
    layer = (input, call.linear_weight, target, call.linear_bias)
    arguments = (*layer, dtype, *call.limits, *call.shard, *options)
    if _moment(call) == "gradient in forward":
        return operators.forward_grad(_needs(call), *arguments)[0]
    return operators.forward(*arguments)


def _scaled(call: _Call) -> _Call:
    """The same with the logits' factor in the layer's input and bias, where autograd finds its
    gradient in what is no larger than they are."""
    scale = call.given.logit_scale.reshape(())
    bias = call.linear_bias
    return call._replace(
        input=call.input * scale.to(call.input.dtype),
        linear_bias=None if bias is None else bias * scale.to(bias.dtype),
        given=call.given._replace(logit_scale=1.0),
    )
