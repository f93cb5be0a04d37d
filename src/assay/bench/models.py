"""The small networks of the embedded tasks and of claims, and their accuracy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from assay._modes import evaluating


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the examples whose largest output, in evaluation, is at their class."""
    with evaluating(model):
        return (model(x).argmax(1) == y).double().mean().item()


def mlp(inputs: int, outputs: int, width: int = 64) -> nn.Module:
    """Two hidden layers with batch normalization."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, outputs),
    )


def cnn(classes: int, channels: int = 1, width: int = 16) -> nn.Module:
    """Three 3x3 convolutions with batch normalization for images of 8x8 pixels and more."""

    def block(fan_in: int, fan_out: int) -> list[nn.Module]:
        return [nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU()]

    return nn.Sequential(
        *block(channels, width),
        *block(width, 2 * width),
        nn.MaxPool2d(2),
        *block(2 * width, 2 * width),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, classes),
    )


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch normalization of (..., channels) over all else, where a transformer has layer normalization."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(0, -2)).view_as(input)


class ViT(nn.Module):
    """A small vision transformer for square one-channel images, patches of 2x2 pixels."""

    def __init__(self, classes: int, side: int = 8, patch: int = 2, width: int = 48, depth: int = 2, heads: int = 4):
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.position = nn.Parameter(torch.randn(1, (side // patch) ** 2, width) * 0.5)
        self.blocks = _encoder(width, heads, depth)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class ByteTransformer(nn.Module):
    """A causal transformer over bytes, (batch, length) -> (batch, length, 256) logits."""

    mask: Tensor

    def __init__(self, length: int, width: int = 64, depth: int = 2, heads: int = 4):
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Parameter(torch.randn(1, length, width) * 0.02)
        self.blocks = _encoder(width, heads, depth)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        hidden = self.embedding(tokens) + self.position[:, :length]
        hidden = self.blocks(hidden, mask=self.mask[:length, :length], is_causal=True)
        return self.head(self.norm(hidden))


def _encoder(width: int, heads: int, depth: int) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    # TransformerEncoder copies one layer: without this all layers would start with equal weights.
    for module in encoder.modules():
        if isinstance(module, nn.MultiheadAttention):
            module._reset_parameters()
        elif isinstance(module, nn.Linear):
            module.reset_parameters()
    return encoder
