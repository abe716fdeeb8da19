"""Loads the operator library and binds its operators.

An operator takes its arguments by position, in the order of ``csrc/ops.cpp``: its tensors and then
the options (``options.py``), which a call leaves out where all are the defaults. Each is bound once
because looking one up costs as much as a small call.
"""

import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace

import torch

from .dynamo import constant_in_graphs

LIBRARY = Path(__file__).resolve().parent / "_C.so"
_MIN_TORCH = (2, 10)


def _load() -> None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _MIN_TORCH:
        raise ImportError(
            f"fused_ce needs torch 2.10 or newer, found {torch.__version__}; upgrade torch."
        )
    if str(LIBRARY) not in torch.ops.loaded_libraries and _is_loaded():
        others = ", ".join(path for path in torch.ops.loaded_libraries if LIBRARY.name in path)
        raise ImportError(
            f"fused_ce found another copy of itself in this process ({others}), and one alone can "
            "be loaded; start Python again with one of them on sys.path."
        )
    if not LIBRARY.exists():
        installed = _installed_elsewhere()
        if installed is not None:
            raise ImportError(
                f"fused_ce is installed in {installed}, but its source folder {LIBRARY.parent}, "
                "which has no compiled library, comes first on sys.path; start Python in another "
                "folder."
            )
        raise ImportError(
            f"fused_ce has no compiled library at {LIBRARY}; build it with "
            "'pip install --no-build-isolation -e .' in the source tree, and import it from there "
            "or from elsewhere."
        )
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        raise ImportError(
            f"fused_ce could not load {LIBRARY} with torch {torch.__version__}; reinstall "
            f"fused_ce for this machine ({error})."
        ) from error


def _is_loaded() -> bool:
    return torch._C._dispatch_has_kernel("fused_ce::forward")


def _installed_elsewhere() -> Path | None:
    """The folder of another fused_ce on ``sys.path``, which this one hides."""
    here = LIBRARY.parent.parent
    places = [place for place in sys.path if Path(place).resolve() != here]
    spec = PathFinder.find_spec("fused_ce", places)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


_load()

forward = torch.ops.fused_ce.forward.default
forward_stats = torch.ops.fused_ce.forward_stats.default
forward_grad = torch.ops.fused_ce.forward_grad.default
forward_grad_ = torch.ops.fused_ce.forward_grad_.default
backward = torch.ops.fused_ce.backward.default
backward_ = torch.ops.fused_ce.backward_.default
backward_target = torch.ops.fused_ce.backward_target.default
backward_logit_scale = torch.ops.fused_ce.backward_logit_scale.default
graph_forward = torch.ops.fused_ce.graph_forward.default
graph_backward = torch.ops.fused_ce.graph_backward.default
graph_backward_target = torch.ops.fused_ce.graph_backward_target.default
rescale_ = torch.ops.fused_ce.rescale_.default
scale_ = torch.ops.fused_ce.scale_.default
check_overwritable = torch.ops.fused_ce.check_overwritable.default
softmax_stats = torch.ops.fused_ce.softmax_stats.default
softmax_stats_backward = torch.ops.fused_ce.softmax_stats_backward.default
softmax_stats_backward_ = torch.ops.fused_ce.softmax_stats_backward_.default
graph_softmax_stats = torch.ops.fused_ce.graph_softmax_stats.default
graph_softmax_stats_backward = torch.ops.fused_ce.graph_softmax_stats_backward.default
pointwise = torch.ops.fused_ce.pointwise.default
pointwise_grad = torch.ops.fused_ce.pointwise_grad.default
pointwise_grad_ = torch.ops.fused_ce.pointwise_grad_.default
pointwise_backward = torch.ops.fused_ce.pointwise_backward.default
pointwise_backward_ = torch.ops.fused_ce.pointwise_backward_.default
pointwise_rescale_ = torch.ops.fused_ce.pointwise_rescale_.default
graph_pointwise = torch.ops.fused_ce.graph_pointwise.default
graph_pointwise_backward = torch.ops.fused_ce.graph_pointwise_backward.default
check_pointwise_overwritable = torch.ops.fused_ce.check_pointwise_overwritable.default
kl_div_with_logits = torch.ops.fused_ce.kl_div_with_logits.default
kl_div_with_logits_stats = torch.ops.fused_ce.kl_div_with_logits_stats.default
kl_div_with_logits_grad = torch.ops.fused_ce.kl_div_with_logits_grad.default
kl_div_with_logits_grad_ = torch.ops.fused_ce.kl_div_with_logits_grad_.default
kl_div_with_logits_backward = torch.ops.fused_ce.kl_div_with_logits_backward.default
kl_div_with_logits_backward_ = torch.ops.fused_ce.kl_div_with_logits_backward_.default
kl_div_with_logits_rescale_ = torch.ops.fused_ce.kl_div_with_logits_rescale_.default
graph_kl_div_with_logits = torch.ops.fused_ce.graph_kl_div_with_logits.default
graph_kl_div_with_logits_backward = torch.ops.fused_ce.graph_kl_div_with_logits_backward.default
shard_forward = torch.ops.fused_ce.shard_forward.default
shard_merge = torch.ops.fused_ce.shard_merge.default
shard_backward = torch.ops.fused_ce.shard_backward.default
shard_backward_ = torch.ops.fused_ce.shard_backward_.default
shard_backward_target = torch.ops.fused_ce.shard_backward_target.default
has_cuda_code = torch.ops.fused_ce.has_cuda_code.default
advise_huge_pages = torch.ops.fused_ce.advise_huge_pages.default
instruction_set = torch.ops.fused_ce.instruction_set.default

# Some of them as the functions that an OpOverload calls. A graph of torch.compile has to see the
# OpOverload, and nobody else.
eager = SimpleNamespace(
    forward=forward._op,
    forward_stats=forward_stats._op,
    forward_grad=forward_grad._op,
    forward_grad_=forward_grad_._op,
    rescale_=rescale_._op,
    pointwise=pointwise._op,
    pointwise_grad=pointwise_grad._op,
    pointwise_grad_=pointwise_grad_._op,
    pointwise_rescale_=pointwise_rescale_._op,
)

# A build for NVIDIA's CUDA is no use to a torch that calls AMD's GPUs cuda.
has_cuda_kernels = torch.version.hip is None and torch._C._dispatch_has_kernel_for_dispatch_key(
    "fused_ce::forward", "CUDA"
)
_cuda_devices: dict[int, bool] = {}


@constant_in_graphs
def lacking(kind: str, index: int) -> str | None:
    """Why there are no kernels for a device other than the CPU; None if there are."""
    if kind != "cuda":
        return f"there are no kernels for {kind}"
    if not has_cuda_kernels:
        return (
            "there are no kernels for cuda in this build of fused_ce, made without FUSED_CE_CUDA=1"
        )
    if index not in _cuda_devices:
        _cuda_devices[index] = has_cuda_code(index)
    if not _cuda_devices[index]:
        return "there are no kernels for this GPU's architecture in this build of fused_ce"
    return None
