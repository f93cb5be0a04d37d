"""Real data that comes with scikit-learn, as tensors: what tasks and claims are made of."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

Examples = tuple[Tensor, Tensor]


@functools.cache
def digits() -> Examples:
    """All 1,797 handwritten digits: pixels (N, 64) of 8x8 images in [0, 1], and labels (N,) from 0 to 9."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)


def split_digits(seed: int, train: int = 1200) -> tuple[Examples, Examples]:
    """``train`` digits to train on and the others to test on, drawn by the seed."""
    pixels, labels = digits()
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    return (pixels[order[:train]], labels[order[:train]]), (pixels[order[train:]], labels[order[train:]])
