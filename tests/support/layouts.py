"""Inputs of the tests: memory layouts, and targets of every kind.

A layout takes contiguous values of shape (C,), (N, C) or (N, C, d1, ...) and returns a tensor of
that shape with other strides. Gaps between the elements hold nan, so that a kernel that reads one
shows it in the result, and one that writes to one is found by `gaps_are_untouched`.
"""

import torch

from support.grids import SHAPES


def _embed(values, shape, index):
    base = torch.full(shape, torch.nan, dtype=values.dtype)
    view = base[index]
    view.copy_(values)
    return view


def _enlarged(values, axis, size):
    return [*values.shape[:axis], size, *values.shape[axis + 1 :]]


def class_axis(tensor):
    return 0 if tensor.dim() == 1 else 1


def row_axes(tensor):
    return [axis for axis in range(tensor.dim()) if axis != class_axis(tensor)]


def _gap_after_each_row(values):
    classes = values.shape[1]
    index = (slice(None), slice(0, classes))
    return _embed(values, _enlarged(values, 1, classes + 3), index)


def _every_second_class(values):
    axis = class_axis(values)
    index = (slice(None),) * axis + (slice(None, None, 2),)
    return _embed(values, _enlarged(values, axis, 2 * values.shape[axis]), index)


def _at_offset(offset):
    """Rows that begin so many elements after a multiple of what memory is aligned to."""

    def lay_out(values):
        flat = torch.full((values.numel() + offset,), torch.nan, dtype=values.dtype)
        return flat[offset:].view(values.shape).copy_(values)

    return lay_out


def _next_token(values):
    # (B, T, V) logits of a language model without the last position, classes moved to axis 1.
    batch, classes, positions = values.shape
    base = _embed(
        values.transpose(1, 2), (batch, positions + 1, classes), (slice(None), slice(0, -1))
    )
    return base.transpose(1, 2)


def _reversed_axes(values):
    axes = tuple(range(values.dim()))[::-1]
    return values.permute(axes).contiguous().permute(axes)


def _sliding_window(values):
    # Rows that start one element after each other: overlap without a stride of zero.
    rows, classes = values.shape
    return values.flatten()[: rows + classes - 1].unfold(0, classes, 1)


def _expanded(axis):
    return lambda values: values.narrow(axis, 0, 1).expand_as(values)


# name: (make, shapes that it applies to)
_ALL = tuple(SHAPES)
_BATCHED = _ALL[1:]
_POSITIONS = _ALL[2:]
LAYOUTS = {
    "contiguous": (lambda values: values.contiguous(), _ALL),
    "odd offset": (_at_offset(1), _ALL),
    "gap after each row": (_gap_after_each_row, _BATCHED),
    "every second class": (_every_second_class, _ALL),
    "every second row": (
        lambda values: _embed(
            values, _enlarged(values, 0, 2 * values.shape[0]), (slice(None, None, 2),)
        ),
        _BATCHED,
    ),
    "transposed": (lambda values: values.t().contiguous().t(), ("NC",)),
    "classes last": (
        lambda values: values.movedim(1, -1).contiguous().movedim(-1, 1),
        _POSITIONS,
    ),
    "next token": (_next_token, ("NCd",)),
    "channels_last": (
        lambda values: values.contiguous(memory_format=torch.channels_last),
        ("NCHW",),
    ),
    "channels_last_3d": (
        lambda values: values.contiguous(memory_format=torch.channels_last_3d),
        ("NCdhw",),
    ),
    "reversed axes": (_reversed_axes, _POSITIONS),
    "expanded rows": (_expanded(0), _BATCHED),
    "expanded classes": (lambda values: _expanded(class_axis(values))(values), _ALL),
    "expanded positions": (_expanded(-1), _POSITIONS),
    "sliding window": (_sliding_window, ("NC",)),
}
OVERLAPPING = ("expanded rows", "expanded classes", "expanded positions", "sliding window")
# For kernels that read several elements at once, or positions one after the other.
FURTHER = {
    "offset of 2": _at_offset(2),
    "offset of 3": _at_offset(3),
    "classes last, gap": lambda values: (
        _gap_after_each_row(values.movedim(1, -1).flatten(0, -2))
        .unflatten(0, (values.shape[0], *values.shape[2:]))
        .movedim(-1, 1)
    ),
    "every second element": lambda values: _embed(values, (*values.shape, 2), (..., 0)),
}
GEOMETRIES = tuple((shape, layout) for layout, (_, shapes) in LAYOUTS.items() for shape in shapes)


def lay_out(values, layout):
    make = FURTHER[layout] if layout in FURTHER else LAYOUTS[layout][0]
    view = make(values)
    assert view.shape == values.shape
    return view


def gaps_are_untouched(view):
    """Whether every element of the view's storage that is not the view's own is still nan."""
    everything = torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage())
    own = torch.zeros(everything.shape, dtype=torch.bool, device=view.device)
    own.as_strided(view.size(), view.stride(), view.storage_offset()).fill_(True)
    return bool(everything[~own].isnan().all())


def is_dense(tensor):
    """Whether the elements fill one stretch of memory exactly once, in any order of axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def target_of(kind, shape, dtype, *, ignore_index=None, generator=None):
    """Targets for logits of `shape`; every third one is `ignore_index` where that is given."""
    positions = shape[:0] if len(shape) == 1 else shape[:1] + shape[2:]
    classes = shape[0] if len(shape) == 1 else shape[1]
    if kind == "probability":
        axis = 0 if len(shape) == 1 else 1
        return torch.randn(shape, generator=generator).softmax(axis).to(dtype)
    target = torch.randint(0, min(classes, 256), positions, generator=generator)
    if ignore_index is not None and positions:
        target.view(-1)[1::3] = ignore_index
    return target.to(kind)
