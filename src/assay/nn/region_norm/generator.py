"""The paper's inpainting network: region normalization by the mask while encoding, by maps of its own afterwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from assay._checks import in_range
from assay.nn.region_norm.layers import RegionNormB, RegionNormL


class InpaintingGenerator(nn.Module):
    """Fills the holes of images: an encoder with :class:`RegionNormB`, dilated residual blocks and a decoder with
    :class:`RegionNormL`.

    Args:
        channels: of the images.
        width: channels after the first convolution; the blocks have four times as many.
        blocks: residual blocks, >= 0.
        threshold: of the maps, see :class:`RegionNormL`.
        mask_channel: also show the mask to the first convolution, which the authors do not.

    Input: images (B, channels, H, W) in [0, 1], H and W multiples of 4, and masks (B, 1, H, W), 1 in the hole, where
    the images are set to 1. Output: images of the same shape in [0, 1].

    Raises:
        ValueError: an argument out of range.

    Source: T. Yu et al., Region Normalization for Image Inpainting, AAAI 2020, arXiv 1911.10375.

    >>> import torch
    >>> from assay.nn import InpaintingGenerator
    >>> mask = torch.zeros(2, 1, 32, 32)
    >>> mask[:, :, 8:16, 8:16] = 1
    >>> InpaintingGenerator(width=8, blocks=1)(torch.rand(2, 3, 32, 32), mask).shape
    torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        channels: int = 3,
        width: int = 64,
        blocks: int = 8,
        threshold: float = 0.8,
        *,
        mask_channel: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        for name, value, least in (("channels", channels, 1), ("width", width, 1), ("blocks", blocks, 0)):
            in_range(name, value, value >= least, f">= {least}")
        self.mask_channel = mask_channel
        wide = 4 * width
        self.encoder = nn.ModuleList(
            [
                nn.Conv2d(channels + mask_channel, width, 7, padding=3, padding_mode="reflect", **factory),
                RegionNormB(width, **factory),
                nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, **factory),
                RegionNormB(2 * width, **factory),
                nn.Conv2d(2 * width, wide, 4, stride=2, padding=1, **factory),
                RegionNormB(wide, **factory),
            ]
        )
        self.middle = nn.Sequential(*(_Block(wide, threshold, factory) for _ in range(blocks)))
        self.decoder = nn.Sequential(
            nn.Conv2d(wide, 2 * wide, 3, padding=1, **factory),
            _Shuffle(),
            RegionNormL(2 * width, threshold, **factory),
            nn.ReLU(),
            nn.Conv2d(2 * width, wide, 3, padding=1, **factory),
            _Shuffle(),
            RegionNormL(width, threshold, **factory),
            nn.ReLU(),
            nn.Conv2d(width, channels, 7, padding=3, padding_mode="reflect", **factory),
        )

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        masks = masks.to(images.dtype)
        x = torch.lerp(images, torch.ones_like(images), masks)
        if self.mask_channel:
            x = torch.cat([x, masks], 1)
        for convolution, norm in zip(self.encoder[::2], self.encoder[1::2], strict=True):
            x = norm(convolution(x), masks).relu()
        return (self.decoder(self.middle(x)).tanh() + 1) / 2


class _Shuffle(nn.Module):
    """``torch.nn.PixelShuffle(2)``, which fails in the backward pass of a batch without examples."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, 2, 2)).permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)


class _Block(nn.Module):
    """A residual block whose first convolution is dilated; both are spectrally normalized."""

    def __init__(self, width: int, threshold: float, factory: dict[str, Any]) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": False, "padding_mode": "reflect", **factory}
        first = nn.Conv2d(width, width, 3, padding=2, dilation=2, **options)
        second = nn.Conv2d(width, width, 3, padding=1, **options)
        self.body = nn.Sequential(
            spectral_norm(first),
            RegionNormL(width, threshold, **factory),
            nn.ReLU(),
            spectral_norm(second),
            RegionNormL(width, threshold, **factory),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)
