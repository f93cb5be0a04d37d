"""Many tensors as one string of bytes, through a compressor, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.optim.efficient_adam.compressors import Compressor, Identity, Payload


@dataclass(frozen=True)
class Wire:
    """One direction: the compressor, what it is given as one, and below how many elements a tensor goes as it is."""

    compressor: Compressor
    bucket: str | int
    min_size: int

    def encode(self, tensors: Sequence[Tensor]) -> Tensor:
        """The bytes of these tensors."""
        return torch.cat([compressor.compress(unit).data for compressor, unit in self._units(tensors)])

    def decode(self, data: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """The tensors that the bytes stand for, in the shapes and dtypes of ``like``."""
        # The receiver knows all shapes, so that they take no bytes.
        units = self._units([x.to("meta") for x in like])
        parts = data.split([compressor.nbytes(unit.numel(), unit.dtype) for compressor, unit in units])
        found = [
            compressor.decompress(Payload(part, unit.shape, unit.dtype))
            for part, (compressor, unit) in zip(parts, units, strict=True)
        ]
        large = [x for x in like if x.numel() >= self.min_size]
        count = len(like) - len(large)
        exact, rest = iter(found[:count]), found[count:]
        if self.bucket != "tensor" and rest:
            rest = list(torch.cat(rest).split([x.numel() for x in large]))
        compressed = iter(rest)
        return [next(exact if x.numel() < self.min_size else compressed).to(x.dtype).view(x.shape) for x in like]

    def nbytes(self, like: Sequence[Tensor]) -> int:
        """How many bytes :meth:`encode` gives."""
        units = self._units([x.to("meta") for x in like])
        return sum(compressor.nbytes(unit.numel(), unit.dtype) for compressor, unit in units)

    def _units(self, tensors: Sequence[Tensor]) -> list[tuple[Compressor, Tensor]]:
        small: list[tuple[Compressor, Tensor]] = [(Identity(), x) for x in tensors if x.numel() < self.min_size]
        large = [x for x in tensors if x.numel() >= self.min_size]
        if self.bucket != "tensor" and large:
            large = list(torch.cat([x.reshape(-1) for x in large]).split(int(self.bucket)))
        return small + [(self.compressor, x) for x in large]
