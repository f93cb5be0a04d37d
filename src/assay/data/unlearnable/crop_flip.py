"""The usual augmentation of small images, on tensors, so that a gradient passes through it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.data.unlearnable.pgd import whole


def random_crop_flip(
    padding: int = 4, *, flip: bool = True, generator: torch.Generator | None = None
) -> Callable[[Tensor], Tensor]:
    """A random crop and a mirror for every image of a batch, differentiable.

    Each image is padded by ``padding`` zeros on all sides, cut to its old size at a place of its own, drawn evenly,
    and mirrored left to right with probability 1/2. The function that is returned maps (b, ..., H, W) to the same
    shape and has the generator as its attribute ``generator``.

    Args:
        padding: at least 0; with 0 there is only the mirror.
        flip: whether to mirror.
        generator: draws places and mirrors; None: torch's global one.

    Raises:
        ValueError: ``padding`` out of range, or a batch without height and width.

    Source:
        The transforms of Fu et al.: Robust Unlearnable Examples, ICLR 2022, arXiv 2203.14533, for CIFAR.

    Example:
        >>> import torch
        >>> from assay.data import random_crop_flip
        >>> transform = random_crop_flip(1, generator=torch.Generator().manual_seed(0))
        >>> transform(torch.ones(2, 3, 3))
        tensor([[[0., 1., 1.],
                 [0., 1., 1.],
                 [0., 0., 0.]],
        <BLANKLINE>
                [[0., 0., 0.],
                 [1., 1., 0.],
                 [1., 1., 0.]]])
    """
    return _CropFlip(padding, flip, generator)


class _CropFlip:
    def __init__(self, padding: int, flip: bool, generator: torch.Generator | None) -> None:
        whole("padding", padding)
        self.padding, self.flip, self.generator = padding, flip, generator

    def __call__(self, images: Tensor) -> Tensor:
        if images.dim() < 3:
            raise ValueError(f"images.shape = {tuple(images.shape)} is out of range: (b, ..., H, W)")
        height, width = images.shape[-2:]
        rows = self._draw(images, 2 * self.padding + 1) + torch.arange(height, device=images.device)
        columns = self._draw(images, 2 * self.padding + 1) + torch.arange(width, device=images.device)
        if self.flip:
            columns = torch.where(self._draw(images, 2).bool(), columns.flip(1), columns)
        padded = F.pad(images, [self.padding] * 4).reshape(
            len(images), -1, *(size + 2 * self.padding for size in (height, width))
        )
        which = torch.arange(len(images), device=images.device)[:, None, None]
        cut = padded[which, :, rows[:, :, None], columns[:, None, :]]  # (b, H, W, ...)
        return cut.permute(0, 3, 1, 2).reshape(images.shape)

    def _draw(self, images: Tensor, choices: int) -> Tensor:
        device = images.device if self.generator is None else self.generator.device
        drawn = torch.randint(choices, (len(images), 1), generator=self.generator, device=device)
        return drawn.to(images.device)
