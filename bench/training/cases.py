"""What is trained: two language models and a segmentation net, each with the sizes of a step.

A step has few rows and many classes, as in the training of a large model on one device; the net
beneath is small, so that it runs on a CPU and yet is most of the memory once no logits are there.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench.training.models import LanguageModel, SegmentationNet

LIMIT = 4_000_000_000
IGNORED = 255  # torchvision's and mmsegmentation's label of a pixel that has no class


@dataclass(frozen=True)
class Text:
    classes: int
    batch: int = 4
    length: int = 256
    width: int = 256
    layers: int = 8
    limit: int | None = LIMIT
    providers: ClassVar = ("stock", "patch", "head")
    options: ClassVar = {}
    item: ClassVar = "sequences"

    @property
    def name(self) -> str:
        return f"language model, {self.batch}x{self.length} tokens, {self.classes} classes"

    @property
    def label(self) -> str:
        """In a picture, where there is little room."""
        return f"language model\n{self.batch}x{self.length} tokens\n{self.classes} classes"

    def make_model(self) -> nn.Module:
        return LanguageModel(self.classes, self.length, self.width, self.layers)

    def make_batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Tokens, and for each the one that follows."""
        text = torch.randint(self.classes, (count, self.length + 1))
        return text[:, :-1].contiguous(), text[:, 1:].flatten()


@dataclass(frozen=True)
class Images:
    classes: int
    batch: int = 2
    size: int = 512
    width: int = 32
    limit: int | None = LIMIT
    # In place for those who have logits to give up; a language model need not make any.
    providers: ClassVar = ("stock", "patch", "inplace")
    options: ClassVar = {"ignore_index": IGNORED}
    item: ClassVar = "images"

    @property
    def name(self) -> str:
        return f"segmentation, {self.batch}x{self.classes}x{self.size}x{self.size}"

    @property
    def label(self) -> str:
        return f"segmentation\n{self.batch}x{self.size}x{self.size} pixels\n{self.classes} classes"

    def make_model(self) -> nn.Module:
        return SegmentationNet(self.classes, self.width)

    def make_batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Images, and the class of each pixel; one in twenty has none."""
        shape = (count, self.size, self.size)
        images, masks = torch.randn(count, 3, *shape[1:]), torch.randint(self.classes, shape)
        return images, masks.masked_fill_(torch.rand(shape) < 0.05, IGNORED)


Case = Text | Images

# Llama 2's vocabulary, Llama 3's, and ADE20K with the crops that it is trained on.
CASES: tuple[Case, ...] = (Text(32000), Text(128256), Images(150))
# Their largest batch is looked for in little more memory than such a process has anyway.
QUICK: tuple[Case, ...] = (Text(2000, batch=2, length=64, width=16, layers=1, limit=None),)
QUICK_ROOM = 32_000_000
