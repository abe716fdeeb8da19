"""torchvision beside a torch without CUDA.

The torchvision of PyPI is built for CUDA. Its operators do not load there, and then it cannot be
imported, nor can what imports it: timm, segmentation-models-pytorch, and Lightning where it finds
torchvision. Nothing in the tests uses the operators; it takes their names, which are given here.
"""

import functools
import importlib.util
from pathlib import Path

import torch

_BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


@functools.cache
def make_importable():
    """Before anything imports it."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return None
    try:
        torch.ops.load_library(Path(spec.origin).with_name("_C.so"))
    except OSError:
        names = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            names.define(name + _BOXES)
        return names
    return None
