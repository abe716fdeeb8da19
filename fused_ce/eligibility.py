"""Why stock PyTorch takes a call, or a backward, in the place of the kernels.

A call that stock would refuse goes to stock as well, so that the error is the installed torch's
own; what is asked here is only what is valid. The logits are described by a shape, a dtype and a
tensor of their device, since those of a linear layer do not exist when the question is put. All of
it runs before every call and takes as long as a small one: a tensor's attribute is read once.
"""

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import ops
from .stock import INDEX_DTYPES

INVALID = "the kernels do not know these arguments, which stock takes or refuses"
DISTRIBUTED = "the logits are a DTensor"  # as foreign() has it
OVERRIDDEN = "an argument overrides __torch_function__"
_STRIDED = torch.strided
_HALF_DTYPES = frozenset({torch.bfloat16, torch.float16})
LOGIT_DTYPES = frozenset({torch.float32, torch.float64}) | _HALF_DTYPES
MAX_DIMS = 25  # kMaxRowDims and the class dimension
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1


def overrides(argument: object) -> bool:
    """Whether a subclass has a ``__torch_function__`` of its own."""
    implementation = getattr(type(argument), "__torch_function__", None)
    return (
        implementation is not None
        and implementation is not torch._C._disabled_torch_function_impl
        and implementation is not Tensor.__torch_function__
        and getattr(implementation, "__func__", None) is not Tensor.__torch_function__.__func__
    )


def transform_is_active() -> bool:
    """Whether a ``torch.func`` transform or forward-mode differentiation is under way."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def backward_needs_stock(grad_output: Tensor) -> bool:
    """Whether the gradient itself is to be differentiated, or comes as a batch of gradients.

    An operator would drop a tangent and refuse a batch, and a transform may have begun only after
    the forward.
    """
    if torch.compiler.is_compiling():
        return False
    return (
        torch.is_grad_enabled()
        or transform_is_active()
        or torch._C._functorch.is_legacy_batchedtensor(grad_output)
    )


def stock_reason(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> str | None:
    """Why the kernels cannot take this call; None if they can."""
    if type(input) is not Tensor or input.layout is not _STRIDED or input.is_nested:
        reason = foreign(input, "logits")
        if reason is not None:
            return reason
    return stock_reason_of_logits(
        input, input.shape, input.dtype, target, weight, ignore_index, label_smoothing
    )


def stock_reason_of_logits(
    device_of: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> str | None:
    """The same for logits of this shape and dtype, on the device of a tensor that is at hand."""
    if type(target) is not Tensor or target.layout is not _STRIDED or target.is_nested:
        reason = foreign(target, "target")
        if reason is not None:
            return reason
    if weight is not None:
        reason = foreign(weight, "weight")
        if reason is not None:
            return reason
    reason = recording_reason()
    if reason is not None:
        return reason
    if not device_of.is_cpu:
        reason = ops.lacking(device_of.device.type, device_of.get_device())
        if reason is not None:
            return reason
    if dtype not in LOGIT_DTYPES:
        return f"there are no kernels for {dtype} logits"
    if _is_invalid(device_of, shape, dtype, target, weight, ignore_index, label_smoothing):
        return INVALID
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        return "the weight requires grad"
    return None


def recording_reason() -> str | None:
    """Which transform or recording is under way that must see torch's own operations, if any."""
    if transform_is_active():
        return "a torch.func transform or forward-mode differentiation is active"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is recording"
    if torch.compiler._is_exporting_flag:  # is_exporting() holds in any graph of torch 2.10
        return "torch.export is recording"
    return None


def foreign(tensor: object, name: str) -> str | None:
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


def _is_invalid(device_of, shape, dtype, target, weight, ignore_index, label_smoothing) -> bool:
    """Whether stock might refuse the call. The range of the targets is checked by the operators."""
    target_shape, target_dtype = target.shape, target.dtype
    dims = len(shape)
    if not 0 < dims <= MAX_DIMS:
        return True
    if type(ignore_index) is not int or not _INT64_MIN <= ignore_index <= _INT64_MAX:
        return True
    if type(label_smoothing) is not float or label_smoothing > 1.0:
        return True
    if is_elsewhere(target, device_of):
        return True
    classes = shape[1 if dims > 1 else 0]
    if classes == 0:
        return True
    if target_shape == shape:
        if target_dtype not in LOGIT_DTYPES or ignore_index >= 0:
            return True
    elif target_dtype not in INDEX_DTYPES:
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
    if is_elsewhere(weight, device_of) or weight.dtype not in LOGIT_DTYPES:
        return True
    if weight.shape != (classes,):
        return True
    if weight.dtype == dtype or target_dtype not in INDEX_DTYPES:
        return False
    device = device_of.device.type
    return computed_dtype(weight.dtype, device) != computed_dtype(dtype, device)


def is_elsewhere(tensor: Tensor, device_of: Tensor) -> bool:
    """Whether two tensors are on different devices, in the cheapest way to ask."""
    if device_of.is_cpu:
        return not tensor.is_cpu
    return tensor.device != device_of.device


def computed_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype that stock computes with: under autocast, float32 for the half types."""
    if dtype in _HALF_DTYPES and torch.is_autocast_enabled(device):
        return torch.float32
    return dtype


def loss_dtype(dtype: torch.dtype, target: Tensor, weight: Tensor | None) -> torch.dtype | None:
    """The loss's dtype for logits of this one, or None where it is the logits' own."""
    probabilities = target.dtype in LOGIT_DTYPES
    if not probabilities and dtype not in _HALF_DTYPES:
        return None
    device = target.device.type
    found = computed_dtype(dtype, device)
    if probabilities:
        found = torch.promote_types(found, computed_dtype(target.dtype, device))
        if weight is not None:
            found = torch.promote_types(found, computed_dtype(weight.dtype, device))
    return found if found != dtype else None
