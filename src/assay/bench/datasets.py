"""Data that tasks and claims are made of, as tensors: what comes with scikit-learn, and arithmetic."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
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


def modular_addition(seed: int, modulus: int = 59) -> tuple[Examples, Examples]:
    """All pairs (a, b), one-hot side by side, and a + b modulo ``modulus``: half to train on, half to test on."""
    a, b = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus)).unbind(1)
    x, y = torch.cat([F.one_hot(a, modulus), F.one_hot(b, modulus)], 1).float(), (a + b) % modulus
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, test = order[: len(y) // 2], order[len(y) // 2 :]
    return (x[train], y[train]), (x[test], y[test])
