"""How many rows of a linear layer's output are computed at a time, and what suits each device."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..fallback import callers_frame, warn_at

_ROW_MULTIPLE = 128  # what GEMMs like their rows to be a multiple of
TILE_BYTES = 1 << 20


class Device(NamedTuple):
    """What suits a kind of device."""

    chunk_bytes: int  # of a chunk's logits, unless the caller says
    least_rows: int  # in fewer, reading the weight costs more time than the arithmetic
    widens: bool  # its GEMMs of a half type can have float32 results
    gemm_dtype: dict[torch.dtype, torch.dtype]  # instead of types that its GEMMs are slow in
    checks_values: bool  # the host may look at tensors without waiting for the device

    def computed_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.gemm_dtype.get(dtype, dtype)

    def sums_by_tiles(self, dtype: torch.dtype) -> bool:
        """Whether the GEMMs of the weight's gradient have narrow results, to be summed apart."""
        return dtype.itemsize == 2 and not self.widens


def _slow_in_gemms() -> tuple[torch.dtype, ...]:
    """The types in which this processor multiplies matrices many times slower than in float32:
    bfloat16 where oneDNN does not take it, in torch's own loops."""
    try:
        takes_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except AttributeError:  # a torch without oneDNN
        takes_bfloat16 = False
    return (torch.float16,) if takes_bfloat16 else (torch.float16, torch.bfloat16)


DEVICES = {
    "cpu": Device(64 << 20, 256, False, dict.fromkeys(_slow_in_gemms(), torch.float32), True),
    "cuda": Device(1 << 30, 2048, True, {}, False),
}


def logits_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a linear layer takes the tensor: under autocast, that of autocast."""
    device = tensor.device.type
    if tensor.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


class Limits(NamedTuple):
    """What the caller says of the chunks; at most one of the first two."""

    chunk_size: int | None
    max_chunk_bytes: int | None
    chunking_method: str | None = None  # as torch's LinearCrossEntropyOptions name it


def check_limits(chunk_size: int | None, max_chunk_bytes: int | None) -> None:
    for name, value in (("chunk_size", chunk_size), ("max_chunk_bytes", max_chunk_bytes)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"fused_ce: {name} must be a positive int or None, got {value!r}.")
    if chunk_size is not None and max_chunk_bytes is not None:
        raise ValueError(
            "fused_ce: chunk_size and max_chunk_bytes both say how large a chunk is; "
            "pass one of them."
        )


def limits_of(options: Any, rows: int) -> Limits:
    """What torch's LinearCrossEntropyOptions say of the chunks; nothing if they leave it open."""
    try:
        size, method = options.batch_chunk_size, options.chunking_method
    except AttributeError:
        raise TypeError(
            f"fused_ce: expected options to be torch's LinearCrossEntropyOptions or None, got "
            f"{options!r}; what is meant by it may have a name of its own, as chunk_size has."
        ) from None
    if method is None and size is None:
        size = max(rows, 1)  # no less than all
    return Limits(size, None, None if method == "auto" else method)


class Sizes(NamedTuple):
    """Of the matrices: the input is [rows, features], the logits are [rows, columns]."""

    rows: int
    features: int
    classes: int
    columns: int  # the classes times all positions
    copies: bool  # a chunk's input is a copy: of rows apart, or in the GEMMs' type
    copied_bytes: int  # of a probability, where a chunk's are a copy
    held: int = 1  # chunks whose logits are there at a time

    def chunk_rows(self, limits: Limits, dtype: torch.dtype, device: Device) -> int:
        """The rows of a chunk, of which the last may have fewer."""
        chunk_size, max_chunk_bytes, method = limits
        if method is not None:
            chunk_size = self._rows_by_aspect_ratio(method, chunk_size)
        if chunk_size is None:
            weight_bytes = self.columns * self.features * dtype.itemsize
            scratch = min(TILE_BYTES, weight_bytes) if device.sums_by_tiles(dtype) else 0
            budget = (max_chunk_bytes or device.chunk_bytes) - scratch
            # Besides the logits, the input and its gradient where they are copies.
            columns = self.columns * self.held + 2 * self.features * self.copies
            row_bytes = columns * dtype.itemsize + self.columns * self.copied_bytes
            chunk_size = max(budget // max(row_bytes, 1), 1)
            least = device.least_rows
            if max_chunk_bytes is None:
                chunk_size = max(chunk_size, least)
            elif chunk_size < min(least, self.rows):
                _warn_of_small_chunks(max_chunk_bytes, chunk_size, least)
        count = -(-self.rows // chunk_size)
        equal = -(-self.rows // max(count, 1))
        rounded = -(-equal // _ROW_MULTIPLE) * _ROW_MULTIPLE
        return max(rounded if rounded <= chunk_size else equal, 1)

    def _rows_by_aspect_ratio(self, method: str, size: int | None) -> int:
        """As torch has it: a chunk's logits take the input's memory, or a part of that."""
        _, _, factor = method.partition(":")
        ratio = -(-self.classes // max(self.features, 1))
        even = 1 << (max(-(-self.rows // ratio), 1) - 1).bit_length()
        found = max(1, min(even // int(factor or 1), self.rows))
        if size is not None and size != found:
            raise ValueError(
                f"batch_chunk_size (={size}) and chunking_method ('{method}') give different "
                f"chunk sizes ({size} vs {found}); pass only one."
            )
        return found


@functools.cache
def _warn_once(text: str) -> None:
    warn_at(callers_frame(), text)


def _warn_of_small_chunks(max_chunk_bytes: int, rows: int, least: int) -> None:
    _warn_once(
        f"fused_ce: max_chunk_bytes={max_chunk_bytes} leaves {rows} rows for a chunk; with fewer "
        f"than {least} most of the time goes into reading the weight."
    )
