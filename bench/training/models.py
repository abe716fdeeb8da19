"""The nets, of torch's own layers: nothing in them knows which loss they are trained with."""

import torch.nn.functional as F
from torch import Tensor, nn


class LanguageModel(nn.Module):
    """A causal transformer whose head is a matrix of its own."""

    def __init__(self, classes: int, length: int, width: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(classes, width)
        self.places = nn.Embedding(length, width)
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, max(1, width // 64), 4 * width, **options)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes, bias=False)
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        self.register_buffer("mask", mask, persistent=False)

    def features(self, tokens: Tensor) -> Tensor:
        """[batch, length] -> [batch * length, width]"""
        hidden = self.tokens(tokens) + self.places.weight
        for layer in self.layers:
            hidden = layer(hidden, src_mask=self.mask, is_causal=True)
        return self.norm(hidden).flatten(0, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.features(tokens))


class SegmentationNet(nn.Module):
    """Convolutions to a fourth of the size, and logits made as large as the image, as in DeepLab
    and SegFormer."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Conv2d(2 * width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """[batch, 3, height, width] -> [batch, classes, height, width]"""
        logits = self.head(self.features(images))
        return F.interpolate(logits, images.shape[2:], mode="bilinear")
