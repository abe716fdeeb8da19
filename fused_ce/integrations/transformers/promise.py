"""A promise of logits: what a head's output is in training, until somebody asks for a number.

It records what models put between head and loss: scale ``a`` and softcap ``b tanh(a z)``, a wider
type, other shapes of the rows, some of the rows or the first classes. ``cross_entropy`` of it is
the loss of hidden states and weight. Whatever else it meets is given the logits, made once, with
autograd, by the same operations that stock would have run.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import stock
from ...eligibility import foreign
from ...extensions import computes_as
from ...functional import cross_entropy
from ...linear import linear_cross_entropy

_log = logging.getLogger("fused_ce")


class Record:
    """What became of a head's last promise, for a reader of :func:`explain_head`."""

    def __init__(self) -> None:
        self.text = "not yet: no loss of this head has been computed in training"
        self.told: set[str] = set()

    def fused(self, trail: list[str]) -> None:
        self.text = f"fused: head, {', '.join(trail)}"

    def made(self, trail: list[str], by: str) -> None:
        self.text = f"logits: made by {by}, after {', '.join(['head', *trail])}"
        if by not in self.told:
            self.told.add(by)
            _log.debug("fuse_head: the logits were made by %s", by)


class Head(NamedTuple):
    """What a promise's logits would be computed from, besides the rows."""

    weight: Tensor | None  # [V, H]; None where the rows are the logits
    bias: Tensor | None  # [V]
    dtype: torch.dtype  # of the logits as stock has them
    autocast: torch.dtype | None  # under which the head was called
    limits: dict[str, int | None]  # of linear_cross_entropy's chunks
    record: Record


class LogitMap(NamedTuple):
    """``scale * z``, or ``cap * tanh(scale * z)``."""

    scale: float = 1.0
    cap: float | None = None

    def times(self, factor: float) -> LogitMap:
        if self.cap is None:
            return LogitMap(self.scale * factor)
        return LogitMap(self.scale, self.cap * factor)

    @property
    def arguments(self) -> dict[str, float | None]:
        """As the losses have it: ``softcap * tanh(logit_scale * z / softcap)``."""
        if self.cap is None:
            return {"logit_scale": self.scale}
        return {"logit_scale": self.scale * self.cap, "softcap": self.cap}


IDENTITY = LogitMap()


class Promise:
    """Logits that do not exist yet: what the head of a fused model returns in training.

    ``logits()`` makes them, and so does any operation of torch that is not recorded. It is no
    :class:`torch.Tensor`, and what asks for one by ``isinstance`` will not know it.
    """

    def __init__(
        self,
        rows: Tensor,
        head: Head,
        dtype: torch.dtype,
        map: LogitMap = IDENTITY,
        before: Promise | None = None,
        step: tuple = (),
    ) -> None:
        self._rows = rows  # [..., H], or [..., V] where these are the logits
        self._head = head
        self._map = map
        self._before = before  # the promise that this one was derived from, and by what:
        self._step = step  # a method's name, arguments, keywords
        self._made: Tensor | None = None
        self._version = 0  # of what was made, as it was made
        self.dtype = dtype

    # What can be told without the logits.

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self._rows.shape[:-1], self._classes))

    @property
    def _classes(self) -> int:
        weight = self._head.weight
        return self._rows.shape[-1] if weight is None else weight.shape[0]

    @property
    def device(self) -> torch.device:
        return self._rows.device

    @property
    def requires_grad(self) -> bool:
        return True

    @property
    def ndim(self) -> int:
        return self._rows.dim()

    def dim(self) -> int:
        return self._rows.dim()

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        return True

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<promise of logits, shape={tuple(self.shape)}, dtype={self.dtype}>"

    # What is recorded. A method that cannot record what it is given makes the logits.

    def _derived(
        self,
        step: tuple,
        rows: Tensor | None = None,
        map: LogitMap | None = None,
        dtype: torch.dtype | None = None,
        head: Head | None = None,
    ) -> Any:
        if self._exists():  # nothing is saved, and in-place edits are seen
            name, args, kwargs = step
            return getattr(self.logits(name), name)(*args, **kwargs)
        return Promise(
            self._rows if rows is None else rows,
            self._head if head is None else head,
            self.dtype if dtype is None else dtype,
            self._map if map is None else map,
            self,
            step,
        )

    def _otherwise(self, name: str, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _made_good((args, kwargs), name)
        return getattr(self.logits(name), name)(*args, **kwargs)

    def mul(self, other: Any) -> Any:
        if not _is_number(other):
            return self._otherwise("mul", other)
        return self._derived(("mul", (other,), {}), map=self._map.times(other))

    def div(self, other: Any, **kwargs: Any) -> Any:
        if not _is_number(other) or other == 0 or kwargs:
            return self._otherwise("div", other, **kwargs)
        return self._derived(("div", (other,), {}), map=self._map.times(1.0 / other))

    def tanh(self) -> Any:
        if self._map.cap is not None:
            return self._otherwise("tanh")
        return self._derived(("tanh", (), {}), map=self._map._replace(cap=1.0))

    def add(self, other: Any, **kwargs: Any) -> Any:
        head = self._head
        if (
            kwargs
            or head.weight is None
            or self._map != IDENTITY
            or self.dtype != head.dtype
            or not _is_bias(other, self)
        ):
            return self._otherwise("add", other, **kwargs)
        bias = other.reshape(-1) if head.bias is None else head.bias + other.reshape(-1)
        return self._derived(("add", (other,), {}), head=head._replace(bias=bias))

    __add__ = __radd__ = add
    multiply = __mul__ = __rmul__ = mul
    divide = true_divide = __truediv__ = div

    def to(self, *args: Any, **kwargs: Any) -> Any:
        dtype = self.dtype
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, (Tensor, Promise)):
                dtype = value.dtype
                if value.device != self.device:
                    return self._otherwise("to", *args, **kwargs)
            elif isinstance(value, (torch.device, str)):
                device = torch.device(value)
                if device.type != self.device.type or device.index not in (None, self.device.index):
                    return self._otherwise("to", *args, **kwargs)
            elif not isinstance(value, (bool, torch.memory_format)):
                return self._otherwise("to", *args, **kwargs)
        if not computes_as(dtype, self._head.dtype):
            return self._otherwise("to", *args, **kwargs)
        return self._derived(("to", args, kwargs), dtype=dtype)

    def type(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or not isinstance(args[0], torch.dtype) or kwargs:
            return self._otherwise("type", *args, **kwargs)
        return self.to(args[0])

    def float(self) -> Any:
        if not computes_as(torch.float32, self._head.dtype):
            return self._otherwise("float")
        return self._derived(("float", (), {}), dtype=torch.float32)

    def double(self) -> Any:
        return self.to(torch.float64)

    def half(self) -> Any:
        return self.to(torch.float16)

    def bfloat16(self) -> Any:
        return self.to(torch.bfloat16)

    def contiguous(self, **kwargs: Any) -> Any:
        if kwargs:
            return self._otherwise("contiguous", **kwargs)
        return self._derived(("contiguous", (), {}))

    def view(self, *shape: Any, **kwargs: Any) -> Any:
        return self._reshaped("view", *shape, **kwargs)

    def reshape(self, *shape: Any, **kwargs: Any) -> Any:
        return self._reshaped("reshape", *shape, **kwargs)

    def _reshaped(self, name: str, *args: Any, **kwargs: Any) -> Any:
        shape = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
        if kwargs or not shape or not all(_is_size(size) for size in shape):
            return self._otherwise(name, *args, **kwargs)
        *batch, last = shape
        rows, classes = self.shape[:-1].numel(), self._classes
        known = math.prod([size for size in batch if size != -1])
        if -1 in batch:
            fits = last == classes and known > 0 and rows % known == 0
        else:
            fits = last in (-1, classes) and known == rows
        if not fits:
            return self._otherwise(name, *args, **kwargs)
        of_rows = self._rows.reshape(*batch, self._rows.shape[-1])
        return self._derived((name, args, {}), of_rows)

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        last = self.dim() - 1
        if end_dim % self.dim() == last and start_dim % self.dim() != last:
            return self._otherwise("flatten", start_dim, end_dim)
        step = "flatten", (start_dim, end_dim), {}
        return self._derived(step, self._rows.flatten(start_dim, end_dim))

    def __getitem__(self, index: Any) -> Any:
        found = _index_of_rows(index, self.dim(), self._classes)
        if found is None:
            return self._otherwise("__getitem__", index)
        of_rows, first, last = found
        head = self._head
        if (first, last) != (0, self._classes):
            if head.weight is None:
                return self._otherwise("__getitem__", index)
            bias = None if head.bias is None else head.bias[first:last]
            head = head._replace(weight=head.weight[first:last], bias=bias)
        return self._derived(("__getitem__", (index,), {}), self._rows[of_rows], head=head)

    # What is made good.

    def logits(self, by: str = "logits") -> Tensor:
        """Makes the logits, once, with autograd."""
        if not (torch.compiler.is_compiling() or self._exists()):
            self._head.record.made(self._trail(), by)
        # Whoever asks first may do so without gradients, as for an accuracy.
        with torch.enable_grad():
            return self._make()

    def _make(self) -> Tensor:
        if self._made is not None:
            return self._made
        made = self._computed()
        if not torch.is_inference_mode_enabled():
            self._made = made
            if not torch.compiler.is_compiling():
                self._version = made._version
        return made

    def _computed(self) -> Tensor:
        if self._before is None:
            if self._head.weight is None:
                return self._rows
            with self._autocast_of_the_head():
                return F.linear(self._rows, self._head.weight, self._head.bias)
        before = self._before._make()
        name, args, kwargs = self._step
        found = getattr(before, name)(*args, **kwargs)
        if self._before._is_edited() and not _share_memory(found, before):
            raise RuntimeError(
                f"fused_ce: the logits were edited in place after {name}() had copied them, which "
                "a promise of logits cannot undo; edit them before, or call unfuse_head."
            )
        return found

    def _is_edited(self) -> bool:
        """Whether the logits were edited in place since they exist."""
        if torch.compiler.is_compiling() or self._made is None:
            return False
        before = self._before
        return self._made._version != self._version or before is not None and before._is_edited()

    def _exists(self) -> bool:
        promise = self
        while promise is not None:
            if promise._made is not None:
                return True
            promise = promise._before
        return False

    def _trail(self) -> list[str]:
        names, promise = [], self
        while promise._before is not None:
            names.append(promise._step[0])
            promise = promise._before
        return ["slice" if name == "__getitem__" else name for name in reversed(names)]

    def __getattr__(self, name: str) -> Any:
        """Of a tensor's other attributes the methods make the logits when they are called."""
        found = None if name.startswith("__") else getattr(Tensor, name, None)
        if callable(found):
            return lambda *args, **kwargs: self._otherwise(name, *args, **kwargs)
        if found is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.logits(name), name)

    def __deepcopy__(self, memo: dict) -> Tensor:
        return self.logits("deepcopy").__deepcopy__(memo)

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.logits("pickle").__reduce_ex__(protocol)

    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.cross_entropy or function is stock.own_cross_entropy:
            return _loss(*args, **kwargs)
        name = getattr(function, "__name__", "operation")
        if name in _RECORDED_FUNCTIONS and args:
            first, *others = args
            if isinstance(first, cls):
                return getattr(first, name)(*others, **kwargs)
            if name in ("mul", "add") and len(others) == 1 and not kwargs:
                return getattr(others[0], name)(first)
        args, kwargs = _made_good((args, kwargs), name)
        return function(*args, **kwargs)

    # The loss.

    @staticmethod
    def __fused_cross_entropy__(*args: Any, **kwargs: Any) -> Tensor:
        """What :func:`fused_ce.cross_entropy` of a promise is."""
        return _loss(*args, **kwargs)

    def cross_entropy(
        self, target: Any, weight: Tensor | None, options: dict[str, Any]
    ) -> Tensor | None:
        """The loss of the rows; None if the logits are needed for it."""
        head, map = self._head, self._map
        if self._exists() or self.dim() > 2 or not isinstance(target, Tensor):
            return None
        if map.cap is not None and not 0 < map.cap < math.inf or not math.isfinite(map.scale):
            return None
        if head.weight is not None and not torch.compiler.is_compiling():
            _check_is_held(head.weight)
        arguments = {"weight": weight, **options}
        if map != IDENTITY:
            if options.get("logit_scale", 1.0) != 1.0 or options.get("softcap") is not None:
                return None
            arguments |= map.arguments
        asked = options.get("dtype")
        # What stock's loss would be computed in, which autocast now decides.
        autocasts = torch.is_autocast_enabled(self.device.type)
        dtype = asked or torch.promote_types(torch.float32 if autocasts else self.dtype, self.dtype)
        arguments["dtype"] = None if dtype == head.dtype else dtype
        if head.weight is None:
            loss = cross_entropy(self._rows, target, **arguments)
        else:
            if target.is_floating_point() and arguments["ignore_index"] < 0:
                arguments["ignore_index"] = None
            arguments.pop("inplace", None)  # there are no logits to write to
            arguments |= head.limits
            with self._autocast_of_the_head():
                layer = self._rows, head.weight
                loss = linear_cross_entropy(*layer, target, linear_bias=head.bias, **arguments)
        if not torch.compiler.is_compiling():
            head.record.fused([*self._trail(), "cross_entropy"])
        as_it_is = loss.dtype == dtype or asked is not None or target.is_floating_point()
        return loss if as_it_is else loss.to(dtype)

    @contextlib.contextmanager
    def _autocast_of_the_head(self) -> Iterator[None]:
        device, dtype = self.device.type, self._head.autocast
        now = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if now == dtype:
            yield
            return
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            yield


def _loss(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    **ours: Any,
) -> Tensor:
    """The loss with torch's arguments, and with those of :func:`fused_ce.cross_entropy`, where one
    is a promise."""
    target, weight = _made_good((target, weight), "cross_entropy")
    options = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        **ours,
    }
    if isinstance(input, Promise):
        if size_average is None and reduce is None:
            loss = input.cross_entropy(target, weight, options)
            if loss is not None:
                return loss
        input = input.logits("cross_entropy")
    legacy = {"size_average": size_average, "reduce": reduce}
    return cross_entropy(input, target, weight, **options, **legacy)


_RECORDED_FUNCTIONS = frozenset({"add", "mul", "div", "tanh", "flatten", "reshape"})
_OPERATORS = """
    iadd sub rsub isub imul rtruediv itruediv floordiv rfloordiv mod pow rpow matmul
    rmatmul neg pos abs invert eq ne lt le gt ge and or xor setitem iter contains bool int float
    index array
"""


def _operator(name: str) -> Callable:
    def operator(self: Promise, *args: Any, **kwargs: Any) -> Any:
        return self._otherwise(name, *args, **kwargs)

    operator.__name__ = name
    return operator


for _name in _OPERATORS.split():
    setattr(Promise, f"__{_name}__", _operator(f"__{_name}__"))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt))


def _is_bias(value: Any, of: Promise) -> bool:
    """Whether it is one number for each class, in the logits' own type."""
    return (
        isinstance(value, Tensor)
        and foreign(value, "bias") is None
        and 0 < value.dim() <= of.dim()
        and value.shape[-1] == value.numel() == of.shape[-1]
        and (value.dtype, value.device) == (of.dtype, of.device)
    )


def _made_good(value: Any, by: str) -> Any:
    """The same with logits in the place of promises, in lists and dicts as well."""
    if isinstance(value, Promise):
        return value.logits(by)
    if type(value) in (tuple, list):
        return type(value)([_made_good(item, by) for item in value])
    if type(value) is dict:
        return {name: _made_good(item, by) for name, item in value.items()}
    return value


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _check_is_held(weight: Tensor) -> None:
    if weight.numel() > 0 and weight.untyped_storage().nbytes() == 0:
        raise RuntimeError(
            "fused_ce: the head's weight was given back before the loss was computed, as sharding "
            "does that takes the head for a unit of its own; leave the head in its parent's unit, "
            "or call unfuse_head."
        )


def _index_of_rows(index: Any, dims: int, classes: int) -> tuple[tuple, int, int] | None:
    """The index as one of the rows, and which classes it keeps; None if it is anything else."""
    items = index if isinstance(index, tuple) else (index,)
    taken, has_ellipsis, reaches_classes = 0, False, False
    for item in items:
        if item is Ellipsis:
            has_ellipsis = True
            continue
        # Behind an ellipsis come the last dimensions.
        reaches_classes = reaches_classes or has_ellipsis
        if isinstance(item, Tensor):
            taken += item.dim() if item.dtype in (torch.bool, torch.uint8) else 1
        elif isinstance(item, slice) or _is_size(item) and not isinstance(item, bool):
            taken += 1
        elif item is not None:
            return None
    if taken > dims:
        return None
    if not reaches_classes and taken < dims:
        return items, 0, classes
    last = items[-1]
    if not isinstance(last, slice) or last.step not in (None, 1):
        return None
    first, last, _ = last.indices(classes)
    return ((*items[:-1], slice(None)), first, last) if first < last else None
