"""``linear_cross_entropy``: the loss of a linear layer's output, which never exists as a whole.

Rows are taken in chunks: one GEMM for their logits, the in-place cross entropy over them, and two
GEMMs that turn what it left there into the gradients. The mean is a sum whose class weights have
been divided by its denominator, so every chunk's gradient is final as it is written. Three
operators run the chunks and ``torch.compile`` sees no more than those; the formula that holds all
logits is left for what differentiates it further, and for what the kernels do not take.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.library import custom_op
from torch.nn import _reduction as _Reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import autograd, functional, ops

_NONE, _MEAN, _SUM = map(_Reduction.get_enum, ("none", "mean", "sum"))
_ROW_MULTIPLE = 128  # what GEMMs like their rows to be a multiple of
_TILE_BYTES = 1 << 20
_CLASSES_APART = 2  # of a row's probabilities: those that mixed-up labels have


class _Device(NamedTuple):
    """What suits a kind of device."""

    chunk_bytes: int  # of a chunk's logits, unless the caller says
    least_rows: int  # in fewer, reading the weight costs more time than the arithmetic
    widens: bool  # its GEMMs of a half type can have float32 results
    gemm_dtype: dict[torch.dtype, torch.dtype]  # instead of types that its GEMMs are slow in
    checks_targets: bool  # the host may look at the targets without waiting for the device


class _Call(NamedTuple):
    """What a call computes from: the layer as a matrix, the batch in one dimension at most."""

    input: Tensor  # [H] or [N, H]
    linear_weight: Tensor  # [V, H], V being the classes times all positions
    target: Tensor
    linear_bias: Tensor | None  # [V]
    weight: Tensor | None  # [C]
    options: dict[str, Any]  # of the loss, by their names
    logits_shape: tuple[int, ...]


_DEVICES = {
    "cpu": _Device(64 << 20, 256, False, {torch.float16: torch.float32}, True),
    "cuda": _Device(1 << 30, 2048, True, {}, False),
}


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
        max_chunk_bytes (int, optional): the most memory for a chunk, the gradients (and the float32
            sum of the weight's) apart. A row is the least. Default: 64 MiB on the CPU and 1 GiB on
            CUDA, or as much as the fewest rows take that are efficient there, 256 and 2048.
        grad_in_forward (bool): compute the gradients along with the loss, for a ``grad_output`` of
            1. They are scaled if something else arrives, and rounded once more unless that is a
            power of two. ``False`` keeps nothing until the backward, which computes the logits
            anew. So it always is with ``reduction='none'`` and in float16. Default: ``True``

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
        ValueError: for a ``chunk_size`` or ``max_chunk_bytes`` that is not positive, or both.

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
    overridden = False
    if has_torch_function_variadic(input, linear_weight, target, linear_bias, weight):
        tensors = (input, linear_weight, target, linear_bias, weight)
        overridden = any(functional._overrides(t) for t in tensors)
        if not overridden:  # a mode: a device context, say
            return handle_torch_function(
                linear_cross_entropy,
                tensors,
                *tensors[:3],
                linear_bias=linear_bias,
                weight=weight,
                reduction=reduction,
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                options=options,
                chunk_size=chunk_size,
                max_chunk_bytes=max_chunk_bytes,
                grad_in_forward=grad_in_forward,
            )
    _check_chunks(chunk_size, max_chunk_bytes)
    _check_shapes(input, linear_weight, linear_bias)
    batch = input.shape[:-1]
    classes, *positions = linear_weight.shape[:-1]
    if target.shape == (*batch, classes, *positions) and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    ignore_index = -100 if ignore_index is None else ignore_index
    if len(batch) > 1:
        target = _flat_target(target, batch, classes, positions)
        input = input.flatten(0, -2)
    linear_weight = linear_weight.flatten(0, -2)
    linear_bias = None if linear_bias is None else linear_bias.flatten()
    logits_shape = (*input.shape[:-1], classes, *positions)

    options_of_loss = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
    }
    call = _Call(input, linear_weight, target, linear_bias, weight, options_of_loss, logits_shape)
    # A subclass is given the functions that it knows.
    reason = overridden or _stock_reason(call)
    if reason == functional.INVALID:
        _raise_as_stock(call)
    if reason:
        loss = _unfused(call)
    else:
        chunks = (chunk_size, max_chunk_bytes, None)
        if options is not None and chunk_size is None and max_chunk_bytes is None:
            chunks = _chunks_of_options(options, logits_shape)
        loss = _fused(call, chunks, grad_in_forward)
    return loss if loss.dim() == 0 else loss.reshape((*batch, *positions))


def _refuse_script():
    raise RuntimeError(
        "fused_ce.linear_cross_entropy cannot be scripted; torch.jit.script takes "
        "torch.nn.functional.linear and cross_entropy, and torch.compile takes all of them."
    )


linear_cross_entropy.__prepare_scriptable__ = _refuse_script


def _check_chunks(chunk_size: int | None, max_chunk_bytes: int | None) -> None:
    for name, value in (("chunk_size", chunk_size), ("max_chunk_bytes", max_chunk_bytes)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"fused_ce: {name} must be a positive int or None, got {value!r}.")
    if chunk_size is not None and max_chunk_bytes is not None:
        raise ValueError(
            "fused_ce: chunk_size and max_chunk_bytes both say how large a chunk is; "
            "pass one of them."
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
    rows = math.prod(batch)
    for inner in (positions, [classes, *positions]):
        if target.shape == (*batch, *inner):
            return target.reshape(rows, *inner)
    raise ValueError(
        f"fused_ce: expected target of shape {(*batch, *positions)}, or "
        f"{(*batch, classes, *positions)} for probabilities, got {tuple(target.shape)}; its first "
        "dimensions are those of the input."
    )


def _chunks_of_options(options: Any, logits_shape: tuple) -> tuple:
    """What torch's LinearCrossEntropyOptions say of the chunks; nothing if they leave it open."""
    size, method = options.batch_chunk_size, options.chunking_method
    if method is None and size is None:
        size = max(logits_shape[0], 1)  # no less than all rows
    return size, None, None if method == "auto" else method


def _computed_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a linear layer takes the tensor: under autocast, that of autocast."""
    device = tensor.device.type
    if tensor.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def _stand_in(call: _Call) -> Tensor:
    """Logits for the checks: their shape, dtype and device, in the memory of one number."""
    dtype, device = _computed_dtype(call.input), call.input.device
    return torch.empty((), dtype=dtype, device=device).expand(call.logits_shape)


def _stock_reason(call: _Call) -> str | None:
    """Why the formula with all logits takes this call; None if the chunks can."""
    input, target = call.input, call.target
    layer = [t for t in (input, call.linear_weight, call.linear_bias) if t is not None]
    for tensor, name in zip(layer, ("input", "linear weight", "linear bias"), strict=False):
        reason = functional._foreign(tensor, name)
        if reason is not None:
            return reason
    if input.device.type not in _DEVICES:
        return f"there are no kernels for {input.device.type}"
    for tensor in layer:
        if (tensor.device, _computed_dtype(tensor)) != (input.device, _computed_dtype(input)):
            return "the layer's tensors differ in device or dtype"
    if 0 in call.logits_shape[2:]:
        return "the loss has no positions"
    reason = functional._stock_reason(_stand_in(call), target, call.weight, **call.options)
    if reason is None and target.requires_grad and torch.is_grad_enabled():
        return "the target requires grad"
    return reason


def _raise_as_stock(call: _Call) -> None:
    """Has stock raise what it would, before it computes: first for the options, then for the
    shapes and dtypes. What it finds later still comes from the whole formula."""
    one = torch.zeros((1, 1)), torch.zeros(1, dtype=torch.long)
    functional._stock(*one, None, **call.options)
    target, options = call.target, call.options
    if target.shape != call.logits_shape:
        if target.dtype in functional._INDEX_DTYPES:
            target = target.long()
        F.nll_loss(
            _stand_in(call),
            target,
            call.weight,
            ignore_index=options["ignore_index"],
            reduction=options["reduction"],
        )


def _unfused(call: _Call) -> Tensor:
    """The formula with all logits."""
    logits = F.linear(call.input, call.linear_weight, call.linear_bias).reshape(call.logits_shape)
    return functional.cross_entropy(logits, call.target, call.weight, **call.options)


def _fused(call: _Call, chunks: tuple, grad_in_forward: bool) -> Tensor:
    """Chooses when the gradient is computed."""
    input, linear_weight, target, linear_bias, weight, options, _ = call
    stand_in = _stand_in(call)
    dtype = stand_in.dtype
    loss_dtype = functional._loss_dtype(stand_in, target, weight) or dtype
    if input.dim() == 1:
        input = input.unsqueeze(0)
        target = target.reshape(1, -1) if target.is_floating_point() else target.reshape(1)
    arguments = (
        *(input, linear_weight, target, linear_bias, weight),
        _Reduction.get_enum(options["reduction"]),
        options["ignore_index"],
        float(options["label_smoothing"]),
        *(dtype, loss_dtype),
        *chunks,
    )
    layer = (input, linear_weight, linear_bias)
    needs = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in layer]
    # A gradient rounded to float16 may have lost what a gradient scaler was to save.
    ahead = grad_in_forward and options["reduction"] != "none" and dtype != torch.float16
    if ahead and any(needs):
        return _forward_grad(*arguments, *needs)[0]
    return _forward(*arguments)


# The chunks.


class _Problem:
    """One call: its tensors in the types that are computed with, and the chunks."""

    def __init__(
        self,
        input: Tensor,  # [N, H]
        linear_weight: Tensor,  # [V, H], V being the classes times all positions
        target: Tensor,  # [N, d1, ..., dK] or [N, C, d1, ..., dK]
        linear_bias: Tensor | None,  # [V]
        weight: Tensor | None,  # [C]
        reduction: int,
        ignore_index: int,
        label_smoothing: float,
        dtype: torch.dtype,
        loss_dtype: torch.dtype,
        chunk_size: int | None,
        max_chunk_bytes: int | None,
        chunking_method: str | None,
    ) -> None:
        device = _DEVICES[input.device.type]
        self.device = device
        self.dtype = device.gemm_dtype.get(dtype, dtype)
        self.input, self.target = input, target
        self.linear_weight = linear_weight.to(self.dtype)
        self.linear_bias = None if linear_bias is None else linear_bias.to(self.dtype)
        self.probabilities = probabilities = target.is_floating_point()
        self.positions = target.shape[2 if probabilities else 1 :]
        self.classes = linear_weight.shape[0] // max(math.prod(self.positions), 1)
        self.reduction, self.loss_dtype = reduction, loss_dtype
        self.weight = weight
        if not probabilities and device.checks_targets:
            _check_range(target, self.classes, ignore_index)
        if reduction == _MEAN:
            self.weight, self.unit = self._mean_weight(weight, probabilities, ignore_index)
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        if chunking_method is not None:
            chunk_size = self._rows_by_aspect_ratio(chunking_method, chunk_size)
        self.rows = self._chunk_rows(chunk_size, max_chunk_bytes)

    @property
    def options(self) -> tuple:
        """The options that all operators of a chunk share, but for the loss's dtype."""
        reduction = _NONE if self.reduction == _NONE else _SUM
        return self.weight, None, reduction, self.ignore_index, self.label_smoothing

    def scale(self, factor: Tensor) -> None:
        """Multiplies a reduced loss, through the class weights: before any gradient is rounded."""
        wide = torch.promote_types(self.dtype, torch.float32)
        weight = self.weight
        if weight is None:
            weight = torch.ones(self.classes, dtype=wide, device=factor.device)
        self.weight = weight.to(wide) * factor.to(wide)

    def _mean_weight(self, weight, probabilities, ignore_index) -> tuple[Tensor, Tensor]:
        """The class weights over the mean's denominator, and 1 over it; no number visits the
        host."""
        target = self.target
        exact = {"dtype": torch.float64, "device": target.device}
        if weight is None:
            weight = torch.ones(self.classes, **exact)  # counting is exact
        if probabilities:
            denominator = torch.full((), target.numel() // self.classes, **exact)
        else:
            target = target.long()
            counted = target != ignore_index
            weights = weight[target.masked_fill(~counted, 0)]
            denominator = weights.masked_fill(~counted, 0).sum(dtype=torch.float64)
        wide = torch.promote_types(self.dtype, torch.float32)
        return weight.to(wide) / denominator, 1 / denominator

    def _chunk_rows(self, chunk_size: int | None, max_chunk_bytes: int | None) -> int:
        rows, row_bytes = self.input.shape[0], self.linear_weight.shape[0] * self.dtype.itemsize
        if chunk_size is None:
            budget = max_chunk_bytes or self.device.chunk_bytes
            chunk_size = max((budget - self._tile_bytes()) // max(row_bytes, 1), 1)
            least = self.device.least_rows
            if max_chunk_bytes is None:
                chunk_size = max(chunk_size, least)
            elif chunk_size < min(least, rows):
                _warn_of_small_chunks(max_chunk_bytes, chunk_size, least)
        count = -(-rows // chunk_size)
        equal = -(-rows // max(count, 1))
        rounded = -(-equal // _ROW_MULTIPLE) * _ROW_MULTIPLE
        return max(rounded if rounded <= chunk_size else equal, 1)

    def _rows_by_aspect_ratio(self, method: str, size: int | None) -> int:
        """As torch has it: a chunk's logits take the input's memory, or a part of that."""
        rows, features = self.input.shape
        _, _, factor = method.partition(":")
        ratio = -(-self.classes // max(features, 1))
        even = 1 << (max(-(-rows // ratio), 1) - 1).bit_length()
        found = max(1, min(even // int(factor or 1), rows))
        if size is not None and size != found:
            raise ValueError(
                f"batch_chunk_size (={size}) and chunking_method ('{method}') give different "
                f"chunk sizes ({size} vs {found}); pass only one."
            )
        return found

    @property
    def has_tiles(self) -> bool:
        """Whether the GEMMs of the weight's gradient have narrow results, to be summed apart."""
        return self.dtype.itemsize == 2 and not self.device.widens

    def _tile_bytes(self) -> int:
        return _TILE_BYTES if self.has_tiles else 0

    def tiles(self) -> Iterator[slice]:
        """Parts of the weight whose gradient in the GEMMs' type is a piece of scratch."""
        classes, features = self.linear_weight.shape
        size = max(_TILE_BYTES // (max(features, 1) * self.dtype.itemsize), 1)
        for start in range(0, classes, size):
            yield slice(start, min(start + size, classes))

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Which rows, these rows of the input, and their logits in memory that all chunks share."""
        count, classes = self.input.shape[0], self.linear_weight.shape[0]
        memory = _fresh((min(self.rows, count), classes), self.input, self.dtype)
        for start in range(0, count, self.rows):
            rows = slice(start, min(start + self.rows, count))
            input = self.input[rows].to(self.dtype)
            logits = memory[: input.shape[0]]
            if self.linear_bias is None:
                torch.mm(input, self.linear_weight.t(), out=logits)
            else:
                torch.addmm(self.linear_bias, input, self.linear_weight.t(), out=logits)
            yield rows, input, logits

    def columns_of_targets(self, rows: slice) -> Tensor:
        """Where in a row of logits those of its targets are, or of the two most probable classes;
        any place for an ignored one."""
        target = self.target[rows]
        if self.probabilities:
            found = target.topk(min(_CLASSES_APART, self.classes), 1).indices
        else:
            found = target.long().masked_fill(target == self.ignore_index, 0).unsqueeze(1)
        found = found.reshape(*found.shape[:2], -1)
        count = found.shape[2]
        return (found * count + torch.arange(count, device=found.device)).flatten(1)

    def shaped(self, logits: Tensor) -> Tensor:
        return logits.view(-1, self.classes, *self.positions)

    def total(self, losses: list[Tensor]) -> Tensor:
        """The loss, from those of the chunks in float64."""
        if self.reduction == _NONE:
            empty = self.input.new_empty((0, *self.positions), dtype=torch.float64)
            return torch.cat([empty, *losses]).to(self.loss_dtype)
        loss = self.input.new_zeros((), dtype=torch.float64)
        for part in losses:
            loss += part
        if self.reduction == _MEAN:
            loss += 0 * self.unit  # nan if nothing was counted
        return loss.to(self.loss_dtype)


def _fresh(shape: tuple, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory that a GEMM writes whole; on the CPU without most of its page faults."""
    memory = like.new_empty(shape, dtype=dtype)
    ops.advise_huge_pages(memory)
    return memory


def _check_range(target: Tensor, classes: int, ignore_index: int) -> None:
    """Before the first chunk, since the operators see each no more than their own."""
    target = target.long()
    outside = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if outside.any():
        raise IndexError(f"Target {target[outside][0].item()} is out of bounds.")


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def _warn_of_small_chunks(max_chunk_bytes: int, rows: int, least: int) -> None:
    _warn_once(
        f"fused_ce: max_chunk_bytes={max_chunk_bytes} leaves {rows} rows for a chunk; with fewer "
        f"than {least} most of the time goes into reading the weight."
    )


class _Gradients:
    """The gradients of the layer's tensors that need one, as chunk after chunk adds to them."""

    def __init__(self, problem: _Problem, like: tuple, needs: tuple) -> None:
        self.problem = problem
        self.like = like
        self.needs = needs
        input, linear_weight, linear_bias = like
        self.input = (
            torch.empty_like(input, memory_format=torch.contiguous_format) if needs[0] else None
        )
        # Little is lost by summing in the GEMMs' own type where one of them gives the whole, or
        # where narrow results of two are added and rounded once.
        terms = -(-len(input) // problem.rows)
        exact = terms <= 1 or (terms == 2 and problem.has_tiles)
        same = linear_weight.dtype == problem.dtype
        wide = torch.promote_types(problem.dtype, torch.float32)
        self.sum_dtype = problem.dtype if exact and same else wide
        self.linear_weight = self.linear_bias = None
        # A GEMM's narrow results are rounded before they are added, which stock's one GEMM is not.
        # What the targets' logits contribute is most of many, so it goes into the sum by itself.
        self.targets_apart = problem.has_tiles and terms > 1
        self.targets = []  # of each chunk, the columns of the logits and the gradients there

    def add(self, rows: slice, input: Tensor, logits_grad: Tensor) -> None:
        problem = self.problem
        if self.needs[0]:
            _mm(logits_grad, problem.linear_weight, self.input[rows], problem.device.widens)
        if self.needs[2]:
            self._add_bias(logits_grad)
        if self.needs[1]:
            if self.targets_apart:
                self._take_targets(rows, logits_grad)
            self._add_weight(logits_grad.t(), input)

    def _add_weight(self, logits_grad: Tensor, input: Tensor) -> None:
        problem, first = self.problem, self.linear_weight is None
        if first:
            shape = problem.linear_weight.shape
            self.linear_weight = _fresh(shape, input, self.sum_dtype)
        total = self.linear_weight
        if problem.has_tiles and (not first or total.dtype != problem.dtype):
            for tile in problem.tiles():
                part = torch.mm(logits_grad[tile], input)
                total[tile].copy_(part) if first else total[tile].add_(part)
        elif total.dtype != problem.dtype:
            if first:
                torch.mm(logits_grad, input, out_dtype=total.dtype, out=total)
            else:
                torch.addmm(total, logits_grad, input, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, logits_grad, input, beta=0 if first else 1, out=total)

    def _take_targets(self, rows: slice, logits_grad: Tensor) -> None:
        columns = self.problem.columns_of_targets(rows)
        each = torch.arange(len(columns), device=columns.device).unsqueeze(1)
        self.targets.append((columns, logits_grad[each, columns]))
        logits_grad[each, columns] = 0

    def _add_targets(self) -> None:
        """Adds what was taken out: all that belongs to a row of the weight before it is rounded."""
        total, input = self.linear_weight, self.problem.input
        columns, values = map(torch.cat, zip(*self.targets, strict=True))  # [N, positions]
        found, places = columns.flatten().unique(return_inverse=True)
        wide = torch.promote_types(total.dtype, torch.float32)
        values = values.to(wide).unsqueeze(2)
        size = max(_TILE_BYTES // (len(places) * wide.itemsize), 1)
        for start in range(0, input.shape[1], size):
            some = slice(start, start + size)
            terms = values * input[:, some].to(self.problem.dtype).unsqueeze(1)
            sums = total[found, some].to(wide).index_add_(0, places, terms.flatten(0, 1))
            total[found, some] = sums.to(total.dtype)

    def _add_bias(self, logits_grad: Tensor) -> None:
        wide = torch.promote_types(self.problem.dtype, torch.float32)
        if self.linear_bias is None:
            self.linear_bias = logits_grad.new_zeros(logits_grad.shape[1], dtype=torch.float64)
        # By parts, since a sum in another type makes a copy in that type on the CPU.
        size = max(_TILE_BYTES // (max(len(logits_grad), 1) * wide.itemsize), 1)
        for total, part in zip(
            self.linear_bias.split(size), logits_grad.split(size, dim=1), strict=True
        ):
            total += part.sum(0, dtype=wide)

    def result(self) -> list[Tensor]:
        """In the types of what they are gradients of; where none is needed, an empty tensor."""
        if self.targets:
            self._add_targets()
        found = (self.input, self.linear_weight, self.linear_bias)
        gradients = []
        for like, grad, needed in zip(self.like, found, self.needs, strict=True):
            if not needed:
                gradients.append(self.like[0].new_empty(0))
            elif grad is None:  # there were no rows
                gradients.append(torch.zeros_like(like, memory_format=torch.contiguous_format))
            else:
                gradients.append(grad.to(like.dtype))
        return gradients


def _mm(a: Tensor, b: Tensor, out: Tensor, widens: bool) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif widens and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(a, b))


def _through_chunks(
    problem: _Problem, gradients: _Gradients, cross_entropy: Callable[[Tensor, slice], Any]
) -> list:
    """What ``cross_entropy`` returns for each chunk, in whose logits it leaves their gradient.

    Their memory is free again on return, before what the gradients take to be finished.
    """
    found = []
    for rows, input, logits in problem.chunks():
        found.append(cross_entropy(problem.shaped(logits), rows))
        gradients.add(rows, input, logits)
    return found


@contextmanager
def _no_autocast(input: Tensor) -> Iterator[None]:
    """The operators have decided on the types themselves."""
    with torch.autocast(input.device.type, enabled=False):
        yield


# The operators. Their arguments after the tensors are the options of a call, and after these, which
# of input, weight and bias need a gradient. The weight is [V, H] and the target's shape tells the
# positions; gradients that nobody needs are empty tensors.

_CALL = (
    "Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight, "
    "{} int reduction, int ignore_index, float label_smoothing, ScalarType dtype, "
    "ScalarType loss_dtype, SymInt? chunk_size, SymInt? max_chunk_bytes, str? chunking_method"
)
_NEEDS = "bool needs_input, bool needs_linear_weight, bool needs_linear_bias"
_TENSORS, _OPTIONS = 5, 8


def _operator(name: str, arguments: str, returns: str) -> Callable:
    schema = f"({arguments}) -> ({returns})"
    return custom_op(f"fused_ce::{name}", mutates_args=(), schema=schema)


@_operator("linear_forward", _CALL.format(""), "Tensor")
def _forward(*arguments):
    with _no_autocast(arguments[0]):
        problem = _Problem(*arguments)
        return problem.total(
            [
                ops.forward(
                    problem.shaped(logits), problem.target[rows], *problem.options, torch.float64
                )
                for rows, _, logits in problem.chunks()
            ]
        )


@_operator(
    "linear_forward_grad", f"{_CALL.format('')}, {_NEEDS}", "Tensor loss, Tensor, Tensor, Tensor"
)
def _forward_grad(*arguments):
    call, needs = arguments[:-3], arguments[-3:]
    with _no_autocast(arguments[0]):
        problem = _Problem(*call)
        gradients = _Gradients(problem, _layer(call), needs)

        def cross_entropy(logits: Tensor, rows: slice) -> Tensor:
            target = problem.target[rows]
            return ops.forward_grad_(logits, target, None, *problem.options, torch.float64)

        losses = _through_chunks(problem, gradients, cross_entropy)
        return problem.total(losses), *gradients.result()


@_operator(
    "linear_backward",
    f"{_CALL.format('Tensor grad_output,')}, {_NEEDS}",
    "Tensor, Tensor, Tensor",
)
def _backward(*arguments):
    call = (*arguments[:_TENSORS], *arguments[_TENSORS + 1 : -3])
    grad_output = arguments[_TENSORS]
    with _no_autocast(arguments[0]):
        problem = _Problem(*call)
        gradients = _Gradients(problem, _layer(call), arguments[-3:])
        if problem.reduction != _NONE:
            problem.scale(grad_output)

        def cross_entropy(logits: Tensor, rows: slice) -> None:
            target = problem.target[rows]
            if problem.reduction == _NONE:
                _, *stats = ops.forward_stats(logits, target, *problem.options)
                ops.backward_(logits, target, *stats, grad_output[rows], *problem.options)
            else:
                ops.forward_grad_(logits, target, None, *problem.options)

        _through_chunks(problem, gradients, cross_entropy)
        return tuple(gradients.result())


# The last two are what a graph's backward must be seen to depend on, or torch.compile would take
# the gradients for constants where a double backward asks for theirs, instead of refusing it.
@custom_op(
    "fused_ce::linear_scale_",
    mutates_args=("input_grad", "linear_weight_grad", "linear_bias_grad"),
    schema="(Tensor(a!) input_grad, Tensor(b!) linear_weight_grad, Tensor(c!) linear_bias_grad, "
    "Tensor grad_output, Tensor input, Tensor linear_weight) -> ()",
)
def _scale(input_grad, linear_weight_grad, linear_bias_grad, grad_output, input, linear_weight):
    for grad in (input_grad, linear_weight_grad, linear_bias_grad):
        ops.scale_(grad, grad_output)


def _layer(call: tuple) -> tuple[Tensor, Tensor, Tensor | None]:
    input, linear_weight, _, linear_bias, *_ = call
    return input, linear_weight, linear_bias


def _fake_loss(*arguments) -> Tensor:
    input, _, target, _, _, reduction, _, _, _, loss_dtype, *_ = arguments
    inner = target.shape[2 if target.is_floating_point() else 1 :]
    return input.new_empty((len(input), *inner) if reduction == _NONE else (), dtype=loss_dtype)


def _fake_gradients(layer: tuple, needs: tuple) -> list[Tensor]:
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        if needed
        else layer[0].new_empty(0)
        for t, needed in zip(layer, needs, strict=True)
    ]


@_forward.register_fake
def _(*arguments):
    return _fake_loss(*arguments)


@_forward_grad.register_fake
def _(*arguments):
    return _fake_loss(*arguments[:-3]), *_fake_gradients(_layer(arguments), arguments[-3:])


@_backward.register_fake
def _(*arguments):
    return tuple(_fake_gradients(_layer(arguments), arguments[-3:]))


@_scale.register_fake
def _(*arguments):
    return None


# Their derivatives, in eager calls and in graphs alike. A backward that is to be differentiated
# itself, or that a transform has reached, is the unfused formula's.


def _save(ctx: Any, inputs: tuple, output: Tensor | tuple) -> None:
    more = output[1:] if isinstance(output, tuple) else ()
    ctx.mark_non_differentiable(*more)
    ctx.set_materialize_grads(False)  # of what is not differentiable, they would be made of zeros
    ctx.save_for_backward(*inputs[:_TENSORS], *more)
    ctx.options = inputs[_TENSORS : _TENSORS + _OPTIONS]


def _recompute(ctx: Any, grad_output: Tensor, *_) -> tuple:
    """Logits and gradients are computed in the backward."""
    if grad_output is None:
        return (None,) * len(ctx.needs_input_grad)
    tensors = ctx.saved_tensors
    if autograd._needs_stock(grad_output):
        return _unfused_gradients(ctx, grad_output, tensors)
    gradients = _backward(*tensors, grad_output, *ctx.options, *_needs(ctx))
    return _in_place_of_arguments(ctx, gradients)


def _hand_out(ctx: Any, grad_output: Tensor, *_) -> tuple:
    """The gradients are those for a ``grad_output`` of 1, and are scaled if another arrives."""
    if grad_output is None:
        return (None,) * len(ctx.needs_input_grad)
    *tensors, input, linear_weight, linear_bias = ctx.saved_tensors
    if autograd._needs_stock(grad_output):
        return _unfused_gradients(ctx, grad_output, tensors)
    gradients = input, linear_weight, linear_bias
    if torch.compiler.is_compiling() or autograd._graph_is_kept():
        gradients = [grad.clone() for grad in gradients]
    _scale(*gradients, grad_output, *tensors[:2])
    return _in_place_of_arguments(ctx, gradients)


_forward.register_autograd(_recompute, setup_context=_save)
_forward_grad.register_autograd(_hand_out, setup_context=_save)


def _needs(ctx: Any) -> tuple[bool, bool, bool]:
    return _layer(ctx.needs_input_grad)


def _in_place_of_arguments(ctx: Any, gradients: Any) -> tuple:
    """The gradients of input, weight and bias, where the arguments of a call have these."""
    input, linear_weight, linear_bias = (
        grad if needed else None for grad, needed in zip(gradients, _needs(ctx), strict=True)
    )
    rest = len(ctx.needs_input_grad) - 4
    return input, linear_weight, None, linear_bias, *(None,) * rest


def _unfused_gradients(ctx: Any, grad_output: Tensor, tensors: list) -> tuple:
    """Differentiates the formula with all logits, under a graph if the caller wants one.

    What may be a batch, or carry a tangent, meets only products: those of the linear layer's
    backward, written out. All is in float32 at least.
    """
    input, linear_weight, target, linear_bias, weight = tensors
    reduction, ignore_index, label_smoothing, *_ = ctx.options
    dtype = torch.promote_types(input.dtype, torch.float32)
    create_graph = torch.is_grad_enabled()
    positions = target.shape[2 if target.is_floating_point() else 1 :]
    with temporarily_clear_interpreter_stack(), torch.enable_grad(), _no_autocast(input):
        layer = [None if t is None else t.to(dtype) for t in (input, linear_weight, linear_bias)]
        logits = F.linear(*layer)
        rows = logits.reshape(len(input), -1, *positions)
        options = autograd.Options(weight, None, reduction, ignore_index, label_smoothing, None)
        loss = autograd.stock_loss(rows, target, weight, options, dtype)
        (unit,) = torch.autograd.grad(loss, rows, torch.ones_like(loss), create_graph=create_graph)
    if loss.dim() > 0:
        grad_output = grad_output.unsqueeze(1)
    logits_grad = unit * grad_output
    if not target.is_floating_point():
        ignored = autograd._ignored(target, ignore_index, rows)
        logits_grad = logits_grad.masked_fill(ignored, 0)
    logits_grad = logits_grad.reshape(logits.shape)
    products = (
        lambda: logits_grad @ layer[1],
        lambda: logits_grad.t() @ layer[0],
        lambda: logits_grad.sum(0),
    )
    like = (input, linear_weight, linear_bias)
    with _no_autocast(input):
        gradients = [
            product().to(t.dtype) if needed else None
            for product, t, needed in zip(products, like, _needs(ctx), strict=True)
        ]
    return _in_place_of_arguments(ctx, gradients)
