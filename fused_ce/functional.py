"""``cross_entropy`` with the signature of ``torch.nn.functional``'s, and the way that a call takes.

``eligibility`` says whether the kernels can take it or why stock PyTorch does; ``_mode`` says when
the gradient is computed.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import _reduction as _Reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import eager, fallback, graph, ops, stock
from .eligibility import INVALID, OVERRIDDEN, loss_dtype, overrides, stock_reason
from .options import DEFAULTS, NONE, Options, integer, real
from .scripting import refusal
from .signatures import bound, takes_arguments_of


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
            shares their memory. There is one backward, not differentiable. What is computed from
            overwritten logits, or from what they are a view of, cannot be differentiated; only a
            leaf is taken for what it then holds, as after any edit under ``no_grad``. Without grad
            mode the logits are left alone. Under ``torch.compile``, which plans memory itself, the
            option has no effect. In bfloat16 a ``grad_output`` that is no power of two rounds the
            gradient once more, but not with ``grad_in_forward=False``. Default: ``False``

    Shape:
        - Input: :math:`(C)`, :math:`(N, C)` or :math:`(N, C, d_1, ..., d_K)`.
        - Target: the input's shape without :math:`C`, or the input's shape for probabilities.
        - Output: a scalar, or the shape without :math:`C` for ``reduction='none'``.

    Raises:
        Exception: what torch raises for the same call, among it ``IndexError`` for a target that is
            no class. Nothing has been written by then. On CUDA such a target is torch's device-side
            assertion, noticed when the device is next waited for.
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
        )
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    reduction = _Reduction.get_enum(reduction)
    if type(ignore_index) is not int:
        ignore_index = integer(ignore_index)
    if type(label_smoothing) is not float:
        label_smoothing = real(label_smoothing)
    reason = stock_reason(input, target, weight, ignore_index, label_smoothing)
    if reason is not None:
        options = Options(
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
        return _by_stock(input, target, options, reason)
    dtype = loss_dtype(input.dtype, target, weight)
    # In a plain tuple, since making Options takes a while.
    options = (weight, None, None, reduction, ignore_index, label_smoothing, 0.0, dtype)
    if weight is None and options == DEFAULTS:
        options = ()  # an operator takes as long to read them
    mode = _mode(input, target, reduction, grad_in_forward, inplace)
    return _RUN[mode](input, target, *options)


cross_entropy.__prepare_scriptable__ = refusal(
    "cross_entropy", "torch.nn.functional.cross_entropy", "both"
)


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
    call = bound(cross_entropy, args, kwargs)
    input, target = call["input"], call["target"]
    if any(overrides(t) for t in (input, target, call["weight"])):
        return f"stock: {OVERRIDDEN}"
    reduction, legacy = call["reduction"], (call["size_average"], call["reduce"])
    if legacy != (None, None):
        reduction = _Reduction.legacy_get_string(*legacy, emit_warning=False)
    try:
        options = options_of(call | {"reduction": reduction})
    except ValueError:
        return f"stock: {INVALID}"
    reason = stock_reason(
        input, target, options.weight, options.ignore_index, options.label_smoothing
    )
    if reason is not None:
        return f"stock: {reason}"
    mode = _mode(input, target, options.reduction, call["grad_in_forward"], call["inplace"])
    if mode.startswith("in place"):
        try:
            ops.check_overwritable(input, target, *options)
        except RuntimeError as error:
            return f"refused: {str(error).splitlines()[0]}"
    return f"fused: {mode}, {instructions(input)}"


def options_of(arguments: Mapping[str, Any]) -> Options:
    """The options among the arguments of a function, as the operators have them."""
    given = {name: value for name, value in arguments.items() if name in Options._fields}
    given["reduction"] = _Reduction.get_enum(given["reduction"])
    convert = {int: integer, float: real}
    for name, kind in Options.__annotations__.items():
        if name in given and kind in convert:
            given[name] = convert[kind](given[name])
    return Options(**given)


def instructions(input: Tensor) -> str:
    """What the kernels for this tensor are made of."""
    if input.is_cpu:
        return ops.instruction_set()
    return "cuda {}.{}".format(*torch.cuda.get_device_capability(input.device))


def _overridden(input, target, weight, *, grad_in_forward, inplace, **arguments):
    """A subclass gets the function that it knows, torch's; a mode (a device context, say) ours."""
    tensors = (input, target, weight)
    if any(overrides(t) for t in tensors):
        loss = stock.overridden(*tensors, **arguments)
        if fallback.is_on:
            fallback.warn("cross_entropy", OVERRIDDEN)
        return loss
    arguments |= {"grad_in_forward": grad_in_forward, "inplace": inplace}
    return handle_torch_function(cross_entropy, tensors, *tensors, **arguments)


def _by_stock(input, target, options: Options, reason: str) -> Tensor:
    loss = stock.cross_entropy(input, target, options)
    if fallback.is_on:  # afterwards, since stock may have refused the call
        fallback.warn("cross_entropy", reason)
    return loss


def _mode(input, target, reduction: int, grad_in_forward: bool, inplace: bool) -> str:
    """When the gradient is computed; a key of _RUN."""
    if not torch.is_grad_enabled() or not (input.requires_grad or target.requires_grad):
        return "no gradient in the graph" if torch.compiler.is_compiling() else "no gradient"
    if torch.compiler.is_compiling():
        return "recomputed in the graph's backward"
    # AOTAutograd makes a graph of the backward too, without operators that write to an argument.
    if not input.requires_grad or type(input) is FunctionalTensor:
        return "recomputed in backward"
    defers = reduction == NONE or target.requires_grad
    # For an operator that writes to a negative view torch materialises the view, and expects to
    # find it as the first result, where forward_grad_ has the loss.
    if inplace and not input.is_neg():
        # What runs a function again for its saved tensors must find the logits in their place.
        defers = defers or not grad_in_forward or input.dtype == torch.float16
        if defers or eager.hooks_are_active():
            return "in place in backward"
        return "in place in forward"
    return "recomputed in backward" if defers or not grad_in_forward else "gradient in forward"


_RUN = {
    "no gradient": ops.eager.forward,
    "no gradient in the graph": ops.forward,
    "gradient in forward": eager.grad_in_forward,
    "recomputed in backward": eager.recompute,
    "recomputed in the graph's backward": graph.graph_loss,
    "in place in forward": eager.overwrite_in_forward,
    "in place in backward": eager.overwrite_in_backward,
}
