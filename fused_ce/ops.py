"""Loads the operator library and binds its operators, the only place that names them.

The operators take their arguments by position, in the order of ``csrc/ops.cpp``, and the last ones
may be left out where they are the defaults. The overloads are bound once because looking one up
costs as much as a small call. The fake kernels give ``torch.compile`` and ``torch.export`` the
shapes; what they rely on is checked in ``functional``.
"""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

_LIBRARY = Path(__file__).parent / "_C.so"
_MIN_TORCH = (2, 10)


def _load() -> None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _MIN_TORCH:
        raise ImportError(
            f"fused_ce needs torch 2.10 or newer, found {torch.__version__}; upgrade torch."
        )
    if not _LIBRARY.exists():
        raise ImportError(
            f"fused_ce has no compiled library at {_LIBRARY}; build it with "
            "'pip install --no-build-isolation -e .' in the source tree, and import it from there "
            "or from elsewhere."
        )
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        raise ImportError(
            f"fused_ce could not load {_LIBRARY} with torch {torch.__version__}; reinstall "
            f"fused_ce for this machine ({error})."
        ) from error


_load()

forward = torch.ops.fused_ce.forward.default
forward_stats = torch.ops.fused_ce.forward_stats.default
forward_grad = torch.ops.fused_ce.forward_grad.default
forward_grad_ = torch.ops.fused_ce.forward_grad_.default
backward = torch.ops.fused_ce.backward.default
backward_ = torch.ops.fused_ce.backward_.default
backward_target = torch.ops.fused_ce.backward_target.default
graph_forward = torch.ops.fused_ce.graph_forward.default
graph_backward = torch.ops.fused_ce.graph_backward.default
graph_backward_target = torch.ops.fused_ce.graph_backward_target.default
rescale_ = torch.ops.fused_ce.rescale_.default
scale_ = torch.ops.fused_ce.scale_.default
check_overwritable = torch.ops.fused_ce.check_overwritable.default
has_cuda_code = torch.ops.fused_ce.has_cuda_code.default
advise_huge_pages = torch.ops.fused_ce.advise_huge_pages.default
instruction_set = torch.ops.fused_ce.instruction_set.default

# Some of them without OpOverload's method in front, which only a graph of torch.compile has to see.
eager = SimpleNamespace(
    forward=forward._op,
    forward_stats=forward_stats._op,
    forward_grad=forward_grad._op,
    forward_grad_=forward_grad_._op,
    rescale_=rescale_._op,
)

# The options that a call of an operator may leave out.
DEFAULTS = tuple(argument.default_value for argument in forward._schema.arguments[2:])


# A build for NVIDIA's CUDA is no use to a torch that calls AMD's GPUs cuda.
has_cuda_kernels = torch.version.hip is None and torch._C._dispatch_has_kernel_for_dispatch_key(
    "fused_ce::forward", "CUDA"
)
_cuda_devices: dict[int, bool] = {}


@torch.compiler.assume_constant_result
def lacking(kind: str, index: int) -> str | None:
    """Why there are no kernels for a device other than the CPU; None if there are."""
    if kind != "cuda":
        return f"there are no kernels for {kind}"
    if not has_cuda_kernels:
        return "there are no kernels for cuda in this build of fused_ce"
    if index not in _cuda_devices:
        _cuda_devices[index] = has_cuda_code(index)
    if not _cuda_devices[index]:
        return "there are no kernels for this GPU's architecture in this build of fused_ce"
    return None


def _row_shape(input: Tensor) -> tuple[int, ...]:
    shape = tuple(input.shape)
    return shape[:1] + shape[2:] if len(shape) > 1 else ()


def _fake_loss(input, *options) -> Tensor:
    reduction, loss_dtype = (*options, *DEFAULTS[len(options) :])[2::3]
    return input.new_empty(_row_shape(input) if reduction == 0 else (), dtype=loss_dtype)


def _fake_stats(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The statistics of the rows, and the totals."""
    rows = 1
    for size in _row_shape(input):
        rows *= size
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    stats = input.new_empty((3 if target.is_floating_point() else 2, rows), dtype=dtype)
    return stats, input.new_empty(2, dtype=torch.float64)


def _is_dense(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return True
    expected = 1
    dims = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(dim for dim in dims if dim[1] != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def empty_gradient(like: Tensor) -> Tensor:
    if _is_dense(like):
        return torch.empty_like(like)
    return torch.empty_like(like, memory_format=torch.contiguous_format)


@torch.library.register_fake("fused_ce::forward")
def _(input, target, *options):
    return _fake_loss(input, *options)


@torch.library.register_fake("fused_ce::forward_grad_")
def _(input, target, grad_output=None, *options):
    return _fake_loss(input, *options)


@torch.library.register_fake("fused_ce::forward_stats")
@torch.library.register_fake("fused_ce::graph_forward")
def _(input, target, *options):
    return _fake_loss(input, *options), *_fake_stats(input, target)


@torch.library.register_fake("fused_ce::forward_grad")
def _(input, target, *options):
    return _fake_loss(input, *options), *_fake_stats(input, target), empty_gradient(input)


@torch.library.register_fake("fused_ce::backward")
@torch.library.register_fake("fused_ce::graph_backward")
def _(input, target, stats, totals, grad_output, *options):
    return empty_gradient(input)


@torch.library.register_fake("fused_ce::backward_target")
@torch.library.register_fake("fused_ce::graph_backward_target")
def _(input, target, stats, totals, grad_output, *options):
    return empty_gradient(target)


@torch.library.register_fake("fused_ce::backward_")
def _(input, target, stats, totals, grad_output, *options):
    return input


@torch.library.register_fake("fused_ce::rescale_")
def _(grad, grad_output, input, target, stats, totals, *options):
    return grad


@torch.library.register_fake("fused_ce::check_overwritable")
def _(input, target, weight=None):
    return None


@torch.library.register_fake("fused_ce::advise_huge_pages")
def _(memory):
    return None


@torch.library.register_fake("fused_ce::scale_")
def _(grad, grad_output):
    return grad
