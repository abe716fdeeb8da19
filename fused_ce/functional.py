"""``cross_entropy`` with the signature of ``torch.nn.functional``'s, and the way that a call takes.

``eligibility`` says whether the kernels can take it or why stock PyTorch does; ``mode_of`` says
when the gradient is computed.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import _reduction as _Reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import eager, extensions, fallback, graph, ops, stock
from .eligibility import (
    DISTRIBUTED,
    INVALID,
    OVERRIDDEN,
    foreign,
    loss_dtype,
    overrides,
    stock_reason,
    stock_reason_of_logits,
)
from .explaining import explain_call, explains
from .extensions import Extensions, requires_grad
from .fakes import row_shape
from .options import DEFAULTS, NONE, Options, integer, real
from .scripting import stocks_or_refusal
from .signatures import bound, takes_arguments_of

# The defaults as objects, for a call to see at once that nothing but them was given.
_ZERO, _ONE, _NAN, _ASSERT = 0.0, 1.0, "nan", "assert"


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    grad_in_forward: bool = True,
    inplace: bool | str | None = None,
    dtype: torch.dtype | None = None,
    denominator: float | Tensor | None = None,
    on_all_ignored: str = _NAN,
    z_loss: float = _ZERO,
    logit_scale: float | Tensor = _ONE,
    softcap: float | None = None,
    sample_weight: Tensor | None = None,
    focal_gamma: float = _ZERO,
    on_out_of_range: str = _ASSERT,
    process_group: Any = None,
    num_classes: int | None = None,
    class_offset: int | None = None,
) -> Tensor:
    r"""Computes the cross entropy between logits and target, in one fused pass.

    The loss and all gradients are those of :func:`torch.nn.functional.cross_entropy`; see
    :class:`fused_ce.CrossEntropyLoss` for the formula. No copy of the logits is made in any layout,
    and no log-softmax is stored.

    Args:
        input (Tensor): logits, of float32, float64, bfloat16 or float16, in any strides.
        target (Tensor): class indices (int64, and also int32, int16 or uint8), or class
            probabilities of the input's shape.
        weight (Tensor, optional): a weight for each class.
        size_average, reduce: deprecated, as in torch.
        ignore_index (int): a class index that marks a row to leave out. Nothing of such a row is
            used: its loss and gradient are zero even where its logits are nan. Default: ``-100``
        reduction (str): ``'none'`` | ``'mean'`` | ``'sum'``. Default: ``'mean'``
        label_smoothing (float): within [0, 1]. Default: ``0.0``
        grad_in_forward (bool): compute the gradient along with the loss, for a ``grad_output`` of
            1. Pass ``False`` if the loss is scaled before its backward, as in gradient accumulation
            or with a gradient scaler: then the gradient is computed once, in the backward. With
            ``reduction='none'`` that is always so. Default: ``True``
        inplace (bool or str): write the gradient over the logits. ``'auto'`` does so in the
            backward, and only if nobody else holds them or needs them, which is proved by counts
            of references; else the gradient is computed into fresh memory. Either way it is
            computed there, as with ``grad_in_forward=False``. The usual
            ``loss(model(x), y).backward()`` then takes none of the logits' size. It does not see
            who knows the address alone, as another CUDA stream (see
            :meth:`torch.Tensor.record_stream`) or process may. Of a process group each rank looks
            for itself. With ``True`` no memory is taken ever, but **whoever reads the logits after
            the loss reads gradients**, and a leaf's ``.grad`` shares their memory. There is one
            backward, not differentiable. What is computed from overwritten logits, or from what
            they are a view of, cannot be differentiated; only a leaf is taken for what it then
            holds, as after any edit under ``no_grad``. Without grad mode the logits are left alone.
            Under ``torch.compile``, which plans memory itself, the option has no effect. In
            bfloat16 a ``grad_output`` that is no power of two rounds the gradient once more, but
            not with ``grad_in_forward=False``. Default: ``None``, which on the CPU is
            ``'auto'`` for logits of 1 MiB and more whose gradient is computed in the backward
            anyway, and else ``False``
        dtype (torch.dtype, optional): compute the loss in this dtype, as
            :func:`torch.nn.functional.log_softmax` does; the gradient keeps the input's. With
            ``torch.float32`` half types need no copy of the logits. Default: the input's
        denominator (float or Tensor, optional): what ``'mean'`` divides by, instead of the weight
            of the rows that count. A tensor has one element, or a second for the z-losses, and is
            not waited for.
        on_all_ignored (str): what ``'mean'`` is if no row counts: ``'nan'``, as in stock, or
            ``'zero'``, with a gradient of zero. Default: ``'nan'``
        z_loss (float): adds :math:`z\,\mathrm{lse}^2` to the loss of each row that counts, with its
            mean over those rows (`PaLM <https://arxiv.org/abs/2204.02311>`__). Class weights and
            smoothing leave it alone. Default: ``0.0``
        logit_scale (float or Tensor): a factor of the logits, the inverse of a temperature. A
            tensor has one element, is not waited for, and may require grad. Default: ``1.0``
        softcap (float, optional): replaces each scaled logit :math:`x` by
            :math:`\mathrm{cap} \tanh(x / \mathrm{cap})`, as `Gemma 2
            <https://arxiv.org/abs/2408.00118>`__ does. A logit of -inf becomes
            :math:`-\mathrm{cap}`, and its class counts again.
        sample_weight (Tensor, optional): a factor for the loss of each row, in the shape of the
            loss with ``reduction='none'``. ``'mean'`` divides by the weights' sum, each times that
            of its class. A row of weight 0 is ignored. Weights that sum to about 0, as advantages
            do, want a ``denominator`` or ``'sum'``.
        focal_gamma (float): multiplies a row's loss by :math:`(1 - p_t)^\gamma` (`Focal Loss
            <https://arxiv.org/abs/1708.02002>`__), its class weights being :math:`\alpha`. For
            class indices without smoothing. Default: ``0.0``
        on_out_of_range (str): what a target does that is no class: ``'assert'``, the error below;
            ``'nan'``, the loss and the gradient of its row are nan; ``'raise'``, an ``IndexError``
            on CUDA too, which waits for the device, and names the row (in a graph of
            ``torch.compile`` it is ``'assert'``). Default: ``'assert'``
        process_group (ProcessGroup, optional): the ranks over which the classes are sharded, as
            with tensor parallelism. The input is this rank's classes; the target has indices of the
            whole vocabulary and is the same on all ranks, as all options are. Probabilities are
            sharded like the input, and class weights are those of all classes or of this rank's.
            The loss has the same bits on all ranks, and ``grad_output`` must be the same too. One
            all-gather of 16 bytes a row is all that moves. Every rank raises where one finds an
            error. The gradient is computed in the backward.
        num_classes (int, optional): the size of the sharded vocabulary. Columns beyond it are
            padding: they take no part, and their gradient is 0. Default: the ranks' columns
        class_offset (int, optional): which class this rank's first is. Default: that of
            :func:`torch.chunk` and ``DTensor``; for padded shards, rank times columns

    Shape:
        - Input: :math:`(C)`, :math:`(N, C)` or :math:`(N, C, d_1, ..., d_K)`.
        - Target: the input's shape without :math:`C`, or the input's shape for probabilities.
        - Output: a scalar, or the shape without :math:`C` for ``reduction='none'``.

    Raises:
        Exception: what torch raises for the same call, among it ``IndexError`` for a target that is
            no class. Nothing has been written by then. On CUDA such a target is torch's device-side
            assertion, noticed when the device is next waited for.
        ValueError: for an option that torch's function does not have, and that makes no sense; on
            every rank of a process group, where the shards, options or targets do not agree.
        RuntimeError: with ``inplace=True``, for logits whose elements share memory, for a second
            backward, for a backward with ``create_graph=True``, and for a backward through what was
            computed from overwritten logits.

    Example::

        >>> import fused_ce
        >>> import torch
        >>> input = torch.tensor([[2.0, 1.0, 0.1], [0.5, 2.0, 0.3]], requires_grad=True)
        >>> loss = fused_ce.cross_entropy(input, torch.tensor([0, 1]))
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}")
        0.3788
    """
    if has_torch_function_variadic(input, target, weight):
        return _overridden(
            input,
            target,
            weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
            grad_in_forward=grad_in_forward,
            inplace=inplace,
            dtype=dtype,
            denominator=denominator,
            on_all_ignored=on_all_ignored,
            z_loss=z_loss,
            logit_scale=logit_scale,
            softcap=softcap,
            sample_weight=sample_weight,
            focal_gamma=focal_gamma,
            on_out_of_range=on_out_of_range,
            process_group=process_group,
            num_classes=num_classes,
            class_offset=class_offset,
        )
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    reduction = _Reduction.get_enum(reduction)
    if type(ignore_index) is not int:
        ignore_index = integer(ignore_index)
    if type(label_smoothing) is not float:
        label_smoothing = real(label_smoothing)
    is_whole = process_group is num_classes is class_offset is None
    if not (
        is_whole
        and z_loss is focal_gamma is _ZERO
        and logit_scale is _ONE
        and dtype is denominator is softcap is sample_weight is None
        and on_all_ignored is _NAN
        and on_out_of_range is _ASSERT
    ):
        given = Extensions(
            dtype,
            denominator,
            on_all_ignored,
            z_loss,
            logit_scale,
            softcap,
            sample_weight,
            focal_gamma,
            on_out_of_range,
        )
        options = Options(
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
        if not is_whole:
            place = process_group, num_classes, class_offset
            return _sharded().cross_entropy(input, target, options, given, place, inplace)
        if not given.are_default:
            return _extended(input, target, options, given, grad_in_forward, inplace)
    reason = stock_reason(input, target, weight, ignore_index, label_smoothing)
    if reason is not None:
        options = Options(
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
        if reason == DISTRIBUTED:
            reason = _distributed().reason(input, target, options, Extensions())
            if reason is None:
                return _of_dtensor(input, target, options, Extensions(), grad_in_forward, inplace)
        return _by_stock(input, target, options, reason)
    dtype = loss_dtype(input.dtype, target, weight)
    # In a plain tuple, since making Options takes a while.
    options = (weight, *_NO_TENSORS, reduction, ignore_index, label_smoothing, *_NO_NUMBERS, dtype)
    if weight is None and options == DEFAULTS:
        options = ()  # an operator takes as long to read them
    mode = mode_of(input, target, reduction, grad_in_forward, inplace)
    return _RUN[mode](input, target, *options)


# The defaults of what stands after the weight, and after label_smoothing, among the options.
_NO_TENSORS = DEFAULTS[1 : Options._fields.index("reduction")]
_NO_NUMBERS = DEFAULTS[Options._fields.index("softcap") : -1]


cross_entropy.__prepare_scriptable__ = stocks_or_refusal(
    cross_entropy, stock.own_cross_entropy, "torch.nn.functional.cross_entropy", "both"
)


@explains(cross_entropy)
@takes_arguments_of(cross_entropy)
def explain(*args: Any, **kwargs: Any) -> str:
    """Says how :func:`cross_entropy` would take this call, without computing anything.

    Returns ``"fused: "`` with the moment the gradient is computed and the instruction set in use
    (on CUDA the GPU's compute capability), or ``"stock: "`` with the reason why stock PyTorch's
    function takes the call, or ``"refused: "`` with the error of logits that cannot be overwritten.
    Whether the targets are classes would have to be read, and is not asked.

    Example::

        >>> import fused_ce
        >>> import torch
        >>> input = torch.randn(3, 5)
        >>> fused_ce.explain(input.to_sparse(), torch.tensor([0, 1, 2]))
        'stock: the logits are sparse'
        >>> fused_ce.explain(input, torch.tensor([0, 1, 2])).split(",")[0]
        'fused: no gradient'
    """
    if args and isinstance(args[0], torch.nn.Module):
        return explain_call(*args, **kwargs)
    call = bound(cross_entropy, args, kwargs)
    input, target = call["input"], call["target"]
    given = Extensions(*(call[name] for name in extensions.NAMES))
    place = tuple(call[name] for name in SHARDING)
    if any(overrides(t) for t in (input, target, call["weight"])):
        return f"stock: {OVERRIDDEN}"
    reduction, legacy = call["reduction"], (call["size_average"], call["reduce"])
    if legacy != (None, None):
        reduction = _Reduction.legacy_get_string(*legacy, emit_warning=False)
    try:
        options = options_of(call | {"reduction": reduction})
    except ValueError:
        return f"stock: {INVALID}"
    if place != (None, None, None):
        return _sharded().explain(input, target, options, given, place, call["inplace"])
    try:
        reason = _reason(input, target, options, given)
        if reason == DISTRIBUTED:
            reason = _distributed().reason(input, target, options, given)
            if reason is None:
                modes = call["grad_in_forward"], call["inplace"]
                return _distributed().explain(input, target, options, given, *modes)
        if reason is not None:
            return f"stock: {reason}"
        given = given.checked(options, target.is_floating_point(), row_shape(input.shape))
    except ValueError as error:
        return f"refused: {error}"
    if extensions.composes(given, options, target):
        return f"stock: {extensions.COMPOSED}"
    options = given.added_to(options, input.device)
    mode = mode_of(
        input,
        target,
        options.reduction,
        call["grad_in_forward"],
        call["inplace"],
        options.logit_scale,
    )
    if mode in OVERWRITES:
        try:
            ops.check_overwritable(input, target, *options)
        except RuntimeError as error:
            return f"refused: {str(error).splitlines()[0]}"
    return f"fused: {mode}, {instructions(input)}"


SHARDING = "process_group", "num_classes", "class_offset"


def _sharded() -> Any:
    """The package that knows torch.distributed, which is there when a call first needs it."""
    from . import parallel

    return parallel


def _distributed() -> Any:
    """The same of what knows DTensor, whose import takes longer."""
    from .parallel import dtensor

    return dtensor


def _of_dtensor(
    input,
    target,
    options: Options,
    given: Extensions,
    grad_in_forward: bool,
    inplace: bool | str | None,
) -> Tensor:
    """By the loss of the parts of this rank."""
    dtensor = _distributed()
    loss = cross_entropy(
        **dtensor.local_arguments(input, target, options, given),
        ignore_index=options.ignore_index,
        reduction=REDUCTIONS[options.reduction],
        label_smoothing=options.label_smoothing,
        grad_in_forward=grad_in_forward,
        inplace=inplace,
    )
    return dtensor.placed(loss, input, options.reduction)


REDUCTIONS = {_Reduction.get_enum(name): name for name in ("none", "mean", "sum")}


def _options_of_stock() -> dict[str, Callable[[Any], Any]]:
    """Those that torch's loss has too, and how a caller's value becomes the operators'."""
    kinds = {int: integer, float: real}
    found = {
        name: kinds.get(kind, lambda value: value)
        for name, kind in Options.__annotations__.items()
        if name not in (*extensions.NAMES, "loss_dtype")
    }
    return found | {"reduction": _Reduction.get_enum}


_OPTIONS_OF_STOCK = _options_of_stock()


def options_of(arguments: Mapping[str, Any]) -> Options:
    """The options among the arguments of a function, as the operators have them."""
    return Options(
        **{name: of(arguments[name]) for name, of in _OPTIONS_OF_STOCK.items() if name in arguments}
    )


def instructions(input: Tensor) -> str:
    """What the kernels for this tensor are made of."""
    if input.is_cpu:
        return ops.instruction_set()
    return "cuda {}.{}".format(*torch.cuda.get_device_capability(input.device))


def _overridden(input, target, weight, *, grad_in_forward, inplace, **arguments):
    """A subclass gets the function that it knows, torch's; a mode (a device context, say) ours."""
    tensors = (input, target, weight)
    ours = getattr(type(input), "__fused_cross_entropy__", None)
    if ours is not None:  # logits that do not exist yet
        arguments |= {"grad_in_forward": grad_in_forward, "inplace": inplace}
        return ours(*tensors, **arguments)
    if any(overrides(t) for t in tensors):
        if any(arguments.pop(name) is not None for name in SHARDING):
            raise ValueError(
                "fused_ce: a process_group goes with plain tensors, got one that overrides "
                "__torch_function__; pass the tensor that it holds."
            )
        given = Extensions(*(arguments.pop(name) for name in extensions.NAMES))
        if given.are_default:
            loss = stock.overridden(*tensors, **arguments)
        else:
            legacy = arguments.pop("size_average"), arguments.pop("reduce")
            if legacy != (None, None):
                arguments["reduction"] = _Reduction.legacy_get_string(*legacy)
            options = options_of(arguments | {"weight": weight})
            loss = _by_reference(input, target, options, given, OVERRIDDEN)
        if fallback.is_on:
            fallback.warn("cross_entropy", OVERRIDDEN)
        return loss
    arguments |= {"grad_in_forward": grad_in_forward, "inplace": inplace}
    return handle_torch_function(cross_entropy, tensors, *tensors, **arguments)


def _extended(
    input,
    target,
    options: Options,
    given: Extensions,
    grad_in_forward: bool,
    inplace: bool | str | None,
) -> Tensor:
    """A call with options that stock does not have."""
    reason = _reason(input, target, options, given)
    if reason == DISTRIBUTED:
        reason = _distributed().reason(input, target, options, given)
        if reason is None:
            return _of_dtensor(input, target, options, given, grad_in_forward, inplace)
    if reason is None:
        given = given.checked(options, target.is_floating_point(), row_shape(input.shape))
        if extensions.composes(given, options, target):
            reason = extensions.COMPOSED
    if reason is not None:
        loss = _by_reference(input, target, options, given, reason)
        if fallback.is_on:
            fallback.warn("cross_entropy", reason)
        return loss
    if requires_grad(given.denominator) or requires_grad(given.sample_weight):

        def without(options: Options, given: Extensions) -> Tensor:
            return _extended(input, target, options, given, grad_in_forward, inplace)

        return extensions.weighed(given, options, target, input.dtype, without)
    extensions.check_targets(given, options, target, input.shape)
    dtype = given.dtype or input.dtype
    found = loss_dtype(dtype, target, options.weight) or dtype
    options = given.added_to(options, input.device)
    options = options._replace(loss_dtype=None if found == input.dtype else found)
    scale = options.logit_scale
    mode = mode_of(input, target, options.reduction, grad_in_forward, inplace, scale)
    return _RUN[mode](input, target, *options)


def _reason(input, target, options: Options, given: Extensions) -> str | None:
    """Why the kernels cannot take this call; None if they can."""
    extensions.check_dtype(given.dtype)
    reason = foreign(input, "logits")
    if reason is not None:
        return reason
    of_stock = options.weight, options.ignore_index, options.label_smoothing
    if given.are_default:
        return stock_reason(input, target, *of_stock)
    dtype = given.dtype or input.dtype
    return stock_reason_of_logits(
        input, input.shape, dtype, target, *of_stock
    ) or given.reference_reason(input.dtype)


def _by_reference(input, target, options: Options, given: Extensions, reason: str) -> Tensor:
    """The formula that has every option, for a call that the kernels cannot take."""
    dtype = given.dtype or input.dtype
    if reason == INVALID:
        stock.cross_entropy(input.to(dtype), target, options)  # raises what it has to say
    probabilities = target.is_floating_point()
    given = given.checked(options, probabilities, row_shape(input.shape))
    extensions.check_targets(given, options, target, input.shape)
    options = given.added_for_reference(options)
    dtype = loss_dtype(dtype, target, options.weight) or dtype
    return stock.loss(input.to(given.dtype), target, options, dtype).to(dtype)


def _by_stock(input, target, options: Options, reason: str) -> Tensor:
    loss = stock.cross_entropy(input, target, options)
    if fallback.is_on:  # afterwards, since stock may have refused the call
        fallback.warn("cross_entropy", reason)
    return loss


TAKEN = "in place in backward if nobody else holds the logits"
OVERWRITES = "in place in forward", "in place in backward"  # whoever holds the logits
_WORTH_ASKING_FOR = 1 << 20  # bytes; to ask who holds fewer takes longer than fresh ones


def mode_of(
    input,
    target,
    reduction: int,
    grad_in_forward: bool,
    inplace: bool | str | None,
    logit_scale: Tensor | None = None,
) -> str:
    """When the gradient is computed; a key of _RUN."""
    learns_scale = logit_scale is not None and logit_scale.requires_grad
    if not torch.is_grad_enabled() or not (
        input.requires_grad or target.requires_grad or learns_scale
    ):
        return "no gradient in the graph" if torch.compiler.is_compiling() else "no gradient"
    if torch.compiler.is_compiling():
        return "recomputed in the graph's backward"
    # AOTAutograd makes a graph of the backward too, without operators that write to an argument.
    if not input.requires_grad or type(input) is FunctionalTensor:
        return "recomputed in backward"
    defers = reduction == NONE or target.requires_grad or not grad_in_forward
    if inplace:
        overwrites = inplace is True
        if not overwrites and inplace != "auto":
            raise ValueError(f"fused_ce: inplace must be True, False or 'auto', got {inplace!r}.")
        # For an operator that writes to a negative view torch materialises the view, and expects to
        # find it as the first result, where forward_grad_ has the loss.
        if overwrites and not input.is_neg():
            # What runs a function again for its saved tensors must find the logits in their place.
            defers = defers or input.dtype == torch.float16 or learns_scale
            if defers or eager.hooks_are_active():
                return "in place in backward"
            return "in place in forward"
        if not overwrites and _may_become_free(input, target):
            return TAKEN
    if not defers:
        return "gradient in forward"
    # It is read twice either way. On CUDA another stream may still read what nobody holds.
    takes = inplace is None and type(input) is Tensor and input.is_cpu
    takes = takes and input.nbytes >= _WORTH_ASKING_FOR
    return TAKEN if takes and _may_become_free(input, target) else "recomputed in backward"


def _may_become_free(input: Tensor, target: Tensor) -> bool:
    """Whether the backward is to look who holds the logits. A leaf is somebody's, and of what a
    hook on saved tensors has had there may be another copy."""
    if input.is_leaf or type(input) is not Tensor or input.is_neg() or eager.hooks_are_active():
        return False
    try:
        ops.check_overwritable(input, target)
    except RuntimeError:
        return False
    return True


_RUN = {
    "no gradient": ops.eager.forward,
    "no gradient in the graph": ops.forward,
    "gradient in forward": eager.grad_in_forward,
    "recomputed in backward": eager.recompute,
    "recomputed in the graph's backward": graph.graph_loss,
    "in place in forward": eager.overwrite_in_forward,
    "in place in backward": eager.overwrite_in_backward,
    TAKEN: eager.take_in_backward,
}
