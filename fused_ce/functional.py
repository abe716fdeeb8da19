"""``cross_entropy`` with the signature of ``torch.nn.functional``'s, and what decides its path.

One function, ``_stock_reason``, says whether the kernels can take a call or why stock PyTorch does.
A call that stock would refuse goes to stock as well, so that the error is the installed torch's
own; the tests below are therefore about what is valid, and cheap.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction as _Reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import autograd, graph, ops

_STRIDED = torch.strided
_HALF_DTYPES = frozenset({torch.bfloat16, torch.float16})
_LOGIT_DTYPES = frozenset({torch.float32, torch.float64}) | _HALF_DTYPES
_INDEX_DTYPES = frozenset({torch.int64, torch.int32, torch.int16, torch.uint8})
_MAX_DIMS = 25  # kMaxRowDims and the class dimension
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1
INVALID = "the arguments are not valid, and stock says why"


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
    inplace: bool = False,
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
        inplace (bool): write the gradient over the logits. No memory of their size is taken, but
            **whoever reads the logits after the loss reads gradients**, and a leaf's ``.grad``
            shares their memory. There is one backward, not differentiable. Without grad mode the
            logits are left alone. Under ``torch.compile``, which plans memory itself, the option
            has no effect. Default: ``False``

    Shape:
        - Input: :math:`(C)`, :math:`(N, C)` or :math:`(N, C, d_1, ..., d_K)`.
        - Target: the input's shape without :math:`C`, or the input's shape for probabilities.
        - Output: a scalar, or the shape without :math:`C` for ``reduction='none'``.

    Raises:
        Exception: what torch raises for the same call, among it ``IndexError`` for a target that is
            no class. Nothing has been written by then. On CUDA such a target is torch's device-side
            assertion, noticed when the device is next waited for.
        RuntimeError: with ``inplace=True``, for logits whose elements share memory, for a second
            backward, and for a backward with ``create_graph=True``.

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
        )
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    if _stock_reason(input, target, weight, ignore_index, reduction, label_smoothing):
        return _stock(input, target, weight, ignore_index, reduction, label_smoothing)

    arguments = _arguments(input, target, weight, ignore_index, reduction, label_smoothing)
    mode = _mode(input, target, reduction, grad_in_forward, inplace)
    return _RUN[mode](input, target, *arguments)


def _refuse_script():
    raise RuntimeError(
        "fused_ce.cross_entropy cannot be scripted; torch.jit.script takes "
        "torch.nn.functional.cross_entropy, and torch.compile takes both."
    )


cross_entropy.__prepare_scriptable__ = _refuse_script


def explain(
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
    inplace: bool = False,
) -> str:
    """Says how :func:`cross_entropy` would take this call, without computing anything.

    Returns ``"fused: "`` with the moment the gradient is computed and the instruction set in use
    (on CUDA the GPU's compute capability), or ``"stock: "`` with the reason why stock PyTorch's
    function takes the call.

    Example::

        >>> import fused_ce
        >>> import torch
        >>> input = torch.randn(3, 5)
        >>> fused_ce.explain(input.to_sparse(), torch.tensor([0, 1, 2]))
        'stock: the logits are sparse'
        >>> fused_ce.explain(input, torch.tensor([0, 1, 2])).split(",")[0]
        'fused: no gradient'
    """
    if any(_overrides(t) for t in (input, target, weight)):
        return "stock: an argument overrides __torch_function__"
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce, emit_warning=False)
    reason = _stock_reason(input, target, weight, ignore_index, reduction, label_smoothing)
    if reason:
        return f"stock: {reason}"
    mode = _mode(input, target, reduction, grad_in_forward, inplace)
    return f"fused: {mode}, {_instructions(input)}"


def _instructions(input: Tensor) -> str:
    if input.is_cpu:
        return ops.instruction_set()
    return "cuda {}.{}".format(*torch.cuda.get_device_capability(input.device))


def _overrides(argument: object) -> bool:
    implementation = getattr(type(argument), "__torch_function__", None)
    return (
        implementation is not None
        and implementation is not torch._C._disabled_torch_function_impl
        and implementation is not Tensor.__torch_function__
        and getattr(implementation, "__func__", None) is not Tensor.__torch_function__.__func__
    )


def _overridden(input, target, weight, *, grad_in_forward, inplace, **options):
    """A subclass gets the function that it knows, torch's; a mode (a device context, say) ours."""
    if any(_overrides(t) for t in (input, target, weight)):
        return F.cross_entropy(input, target, weight, **options)
    return handle_torch_function(
        cross_entropy,
        (input, target, weight),
        input,
        target,
        weight,
        grad_in_forward=grad_in_forward,
        inplace=inplace,
        **options,
    )


def _stock(input, target, weight, ignore_index, reduction, label_smoothing):
    if (
        isinstance(target, Tensor)
        and isinstance(input, Tensor)
        and target.dtype in _INDEX_DTYPES
        and target.shape != input.shape
    ):
        target = target.long()
    return F.cross_entropy(
        input,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def _stock_reason(input, target, weight, ignore_index, reduction, label_smoothing) -> str | None:
    """Why the kernels cannot take this call; None if they can.

    This runs before every call and takes as long as a small one: a tensor's attribute is read once.
    """
    reason = _foreign(input, "logits") or _foreign(target, "target")
    if reason is None and weight is not None:
        reason = _foreign(weight, "weight")
    if reason is not None:
        return reason
    if autograd.transform_is_active():
        return "a torch.func transform or forward-mode differentiation is active"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is recording"
    if torch.compiler._is_exporting_flag:  # is_exporting() holds in any graph of torch 2.10
        return "torch.export is recording"
    if not input.is_cpu:
        reason = ops.lacking(input.device.type, input.get_device())
        if reason is not None:
            return reason
    if input.dtype not in _LOGIT_DTYPES:
        return f"there are no kernels for {input.dtype} logits"
    if _is_invalid(input, target, weight, ignore_index, reduction, label_smoothing):
        return INVALID
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        return "the weight requires grad"
    return None


def _foreign(tensor: object, name: str) -> str | None:
    """Why this argument is not a tensor of plain strided memory; None if it is."""
    if not isinstance(tensor, Tensor):
        what = "not a tensor"
    elif tensor.is_nested:
        what = "nested"
    elif tensor.layout is not _STRIDED:
        what = "sparse" if "sparse" in str(tensor.layout) else f"of the layout {tensor.layout}"
    elif type(tensor) is not Tensor and is_traceable_wrapper_subclass(tensor):
        what = f"a {type(tensor).__name__}"
    else:
        return None
    return f"the {name} {'are' if name == 'logits' else 'is'} {what}"


def _is_invalid(input, target, weight, ignore_index, reduction, label_smoothing) -> bool:
    """Whether stock might refuse the call. The range of the targets is checked by the operators."""
    shape, target_shape, target_dtype = input.shape, target.shape, target.dtype
    dims = len(shape)
    if not 0 < dims <= _MAX_DIMS:
        return True
    if type(ignore_index) is not int or not _INT64_MIN <= ignore_index <= _INT64_MAX:
        return True
    if type(label_smoothing) not in (float, int) or label_smoothing > 1.0:
        return True
    if reduction not in ("mean", "sum", "none", "elementwise_mean"):
        return True
    if _is_elsewhere(target, input):
        return True
    classes = shape[1 if dims > 1 else 0]
    if classes == 0:
        return True
    if target_shape == shape:
        if target_dtype not in _LOGIT_DTYPES or ignore_index >= 0:
            return True
    elif target_dtype not in _INDEX_DTYPES:
        return True
    elif dims == 1:
        if len(target_shape) > 1 or target.numel() != 1:
            return True
    elif len(target_shape) != dims - 1 or target_shape[0] != shape[0]:
        return True
    elif dims > 2 and target_shape[1:] != shape[2:]:
        return True
    if weight is None:
        return False
    if _is_elsewhere(weight, input) or weight.dtype not in _LOGIT_DTYPES:
        return True
    if weight.shape != (classes,):
        return True
    mixes = weight.dtype != input.dtype and target_dtype in _INDEX_DTYPES
    return mixes and _computed_dtype(weight) != _computed_dtype(input)


def _is_elsewhere(tensor: Tensor, input: Tensor) -> bool:
    """Whether the tensor is on another device than the logits, in the cheapest way to ask."""
    if input.is_cpu:
        return not tensor.is_cpu
    return tensor.device != input.device


def _computed_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that stock computes with: under autocast, float32 for the half types."""
    dtype = tensor.dtype
    if dtype in _HALF_DTYPES and torch.is_autocast_enabled(tensor.device.type):
        return torch.float32
    return dtype


def _loss_dtype(input: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype | None:
    """The loss's dtype, or None where it is the logits' own."""
    own = input.dtype
    probabilities = target.dtype in _LOGIT_DTYPES
    if not probabilities and own not in _HALF_DTYPES:
        return None
    dtype = _computed_dtype(input)
    if probabilities:
        dtype = torch.promote_types(dtype, _computed_dtype(target))
        if weight is not None:
            dtype = torch.promote_types(dtype, _computed_dtype(weight))
    return dtype if dtype != own else None


def _arguments(input, target, weight, ignore_index, reduction, label_smoothing) -> tuple:
    """The operators' arguments after the first two, or none of them where they are the defaults."""
    loss_dtype = _loss_dtype(input, target, weight)
    reduction = _Reduction.get_enum(reduction)
    options = (weight, None, reduction, ignore_index, label_smoothing, loss_dtype)
    if weight is None and options == ops.DEFAULTS:
        return ()
    return options


def _mode(input, target, reduction: str, grad_in_forward: bool, inplace: bool) -> str:
    """When the gradient is computed; a key of _RUN."""
    if not torch.is_grad_enabled() or not (input.requires_grad or target.requires_grad):
        return "no gradient in the graph" if torch.compiler.is_compiling() else "no gradient"
    if torch.compiler.is_compiling():
        return "recomputed in the graph's backward"
    if not input.requires_grad:
        return "recomputed in backward"
    defers = reduction == "none" or target.requires_grad
    # For an operator that writes to a negative view torch materialises the view, and expects to
    # find it as the first result, where forward_grad_ has the loss.
    if inplace and not input.is_neg():
        if defers or input.dtype == torch.float16:
            return "in place in backward"
        return "in place in forward"
    return "recomputed in backward" if defers or not grad_in_forward else "gradient in forward"


_RUN = {
    "no gradient": ops.eager.forward,
    "no gradient in the graph": ops.forward,
    "gradient in forward": autograd.grad_in_forward,
    "recomputed in backward": autograd.recompute,
    "recomputed in the graph's backward": graph.graph_loss,
    "in place in forward": autograd.overwrite_in_forward,
    "in place in backward": autograd.overwrite_in_backward,
}
