"""Compressors: a tensor as bytes and back, with an error that is smaller than the tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Payload(NamedTuple):
    """What goes over the wire, ``data`` (uint8, one dimension), and what the receiver knows anyway."""

    data: Tensor
    shape: torch.Size
    dtype: torch.dtype


class Compressor(Protocol):
    """What :class:`EfficientAdam` asks of a compressor."""

    @property
    def delta(self) -> float:
        """A lower bound on :meth:`contraction`, for tensors of any size."""

    def contraction(self, n: int) -> float:
        """A d that is sure for n elements: ``||x - Q(x)||^2 <= (1 - d) ||x||^2``."""

    def nbytes(self, n: int, dtype: torch.dtype) -> int:
        """Bytes of the payload of n elements."""

    def compress(self, x: Tensor) -> Payload:
        """The tensor as bytes."""

    def decompress(self, payload: Payload) -> Tensor:
        """Q(x), in the shape and dtype of x."""

    def bits(self, payload: Payload) -> int:
        """Bits that the payload takes on the wire."""


class _Wire:
    def bits(self, payload: Payload) -> int:
        """Bits that the payload takes on the wire."""
        return 8 * payload.data.numel()


@dataclass(frozen=True)
class Identity(_Wire):
    """No compression: the bytes of the tensor.

    >>> import torch
    >>> from assay.optim.compress import Identity
    >>> Q = Identity()
    >>> Q.bits(Q.compress(torch.ones(5)))
    160
    """

    @property
    def delta(self) -> float:
        return 1.0

    def contraction(self, n: int) -> float:
        return 1.0

    def nbytes(self, n: int, dtype: torch.dtype) -> int:
        return n * dtype.itemsize

    def compress(self, x: Tensor) -> Payload:
        return Payload(_to_bytes(x.reshape(-1)), x.shape, x.dtype)

    def decompress(self, payload: Payload) -> Tensor:
        return _from_bytes(payload.data, payload.dtype).view(payload.shape)


@dataclass(frozen=True)
class ScaledSign(_Wire):
    """The signs, and one scale for all: one bit an element, and four bytes.

    ``Q(x) = (||x||_1 / n) * sign(x)`` with sign(0) = +1, as a bit knows no zero. Its error is exactly
    ``||x - Q(x)||^2 = ||x||^2 - ||x||_1^2 / n`` (for x without zeros, up to the rounding of the scale to float32).

    >>> import torch
    >>> from assay.optim.compress import ScaledSign
    >>> Q = ScaledSign()
    >>> payload = Q.compress(torch.tensor([3.0, -1.0, 0.0, 4.0]))
    >>> Q.decompress(payload), Q.bits(payload)
    (tensor([ 2., -2.,  2.,  2.]), 40)
    """

    @property
    def delta(self) -> float:
        return 0.0

    def contraction(self, n: int) -> float:
        return 1.0 / max(n, 1)

    def nbytes(self, n: int, dtype: torch.dtype) -> int:
        return 4 + -(-n // 8)

    def compress(self, x: Tensor) -> Payload:
        # The mean in float64 of n equal float32 numbers is that number: what was compressed once stays as it is.
        scale = x.abs().mean(dtype=torch.float64) if x.numel() else torch.zeros((), device=x.device)
        return _scaled(scale, (x >= 0).reshape(-1).int(), 1, x)

    def decompress(self, payload: Payload) -> Tensor:
        scale, codes = _unscaled(payload, 1)
        return (codes.to(payload.dtype).mul_(2).sub_(1) * scale).view(payload.shape)


class _Levels(_Wire):
    """A code of some bits for each element, and the largest magnitude in float32."""

    def __init__(self, bits: int) -> None:
        if not (isinstance(bits, int) and 2 <= bits <= 8):
            raise ValueError(f"bits = {bits!r} is out of range: an integer from 2 to 8 (for 1 there is ScaledSign)")
        self.width = bits

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.width})"

    @property
    def levels(self) -> int:
        """L, the number of values above 0."""
        return 2 ** (self.width - 1) - 1

    @property
    def delta(self) -> float:
        return 0.0

    def nbytes(self, n: int, dtype: torch.dtype) -> int:
        return 4 + -(-n * self.width // 8)


class LogQuantizer(_Levels):
    """The nearest of ``{0, ±s 2^-(L-1), ..., ±s/2, ±s}``, s the largest magnitude, away from zero in ties.

    ``L = 2^(bits-1) - 1``; ``bits`` bits an element, and four bytes for s. From half of the smallest level on, the
    error of an element is at most a third of it.

    Args:
        bits: 2 to 8.

    Raises:
        ValueError: bits out of range.

    >>> import torch
    >>> from assay.optim.compress import LogQuantizer
    >>> Q = LogQuantizer(3)
    >>> Q.decompress(Q.compress(torch.tensor([8.0, -5.0, 3.0, 1.0, 0.5])))
    tensor([ 8., -4.,  4.,  2.,  0.])
    """

    def contraction(self, n: int) -> float:
        lost = (n - 1) * 4.0**-self.levels  # all but the largest just below half of the smallest level
        return 1 - max(lost / (1 + lost), 1 / 9 if n > 1 else 0.0)

    def compress(self, x: Tensor) -> Payload:
        scale, ratio = _ratio(x)
        powers = torch.arange(1 - self.levels, 1, device=x.device, dtype=ratio.dtype).exp2()
        thresholds = powers * 0.75
        thresholds[0] = powers[0] / 2
        magnitude = torch.bucketize(ratio.abs(), thresholds, right=True, out_int32=True)
        return _scaled(scale, 2 * magnitude - ((ratio < 0) & (magnitude > 0)).int(), self.width, x)

    def decompress(self, payload: Payload) -> Tensor:
        scale, codes = _unscaled(payload, self.width)
        magnitude = (codes + 1) // 2
        size = (magnitude - self.levels).to(payload.dtype).exp2() * (magnitude > 0)
        return (torch.where(codes % 2 == 1, -size, size) * scale).view(payload.shape)


class UniformQuantizer(_Levels):
    """The nearest of ``2L + 1`` values at equal distances in [-s, s], s the largest magnitude; 0 is one of them.

    ``L = 2^(bits-1) - 1``; ``bits`` bits an element, and four bytes for s.

    Args:
        bits: 2 to 8.

    Raises:
        ValueError: bits out of range.

    >>> import torch
    >>> from assay.optim.compress import UniformQuantizer
    >>> Q = UniformQuantizer(3)
    >>> Q.decompress(Q.compress(torch.tensor([9.0, -5.0, 4.0, 1.0])))
    tensor([ 9., -6.,  3.,  0.])
    """

    def contraction(self, n: int) -> float:
        lost = (n - 1) / (2 * self.levels) ** 2  # all but the largest in the middle between 0 and the next value
        return 1 / (1 + lost)

    def compress(self, x: Tensor) -> Payload:
        scale, ratio = _ratio(x)
        codes = ratio.mul_(self.levels).round_().clamp_(-self.levels, self.levels).int() + self.levels
        return _scaled(scale, codes, self.width, x)

    def decompress(self, payload: Payload) -> Tensor:
        scale, codes = _unscaled(payload, self.width)
        return ((codes - self.levels).to(payload.dtype) / self.levels * scale).view(payload.shape)


@dataclass(frozen=True)
class TopK(_Wire):
    """The largest elements as they are, the others 0: ``k = ceil(ratio * n)`` values, and where they stand.

    A value takes the bytes of its dtype, a position as many bits as n - 1 has.

    Args:
        ratio: in (0, 1].

    Raises:
        ValueError: ratio out of range.

    >>> import torch
    >>> from assay.optim.compress import TopK
    >>> Q = TopK(0.4)
    >>> payload = Q.compress(torch.tensor([1.0, -5.0, 2.0, 4.0, 0.0]))
    >>> Q.decompress(payload), Q.bits(payload)
    (tensor([ 0., -5.,  0.,  4.,  0.]), 72)
    """

    ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio = {self.ratio!r} is out of range: (0, 1]")

    @property
    def delta(self) -> float:
        return self.ratio

    def contraction(self, n: int) -> float:
        return self._kept(n) / max(n, 1)

    def _kept(self, n: int) -> int:
        return min(n, math.ceil(self.ratio * n))

    def nbytes(self, n: int, dtype: torch.dtype) -> int:
        return self._kept(n) * dtype.itemsize + -(-self._kept(n) * _position_bits(n) // 8)

    def compress(self, x: Tensor) -> Payload:
        flat = x.reshape(-1)
        where = flat.abs().topk(self._kept(len(flat))).indices.sort().values
        data = torch.cat([_to_bytes(flat[where]), pack_bits(where, _position_bits(len(flat)))])
        return Payload(data, x.shape, x.dtype)

    def decompress(self, payload: Payload) -> Tensor:
        n = math.prod(payload.shape)
        values, where = payload.data.split([size := self._kept(n) * payload.dtype.itemsize, len(payload.data) - size])
        flat = torch.zeros(n, dtype=payload.dtype, device=payload.data.device)
        positions = unpack_bits(where, _position_bits(n), self._kept(n))
        return flat.index_copy_(0, positions.long(), _from_bytes(values, payload.dtype)).view(payload.shape)


def pack_bits(codes: Tensor, width: int) -> Tensor:
    """Integers of ``width`` bits, one after the other without gaps, as bytes; the last is filled up with zeros."""
    places = torch.arange(width, device=codes.device, dtype=codes.dtype)
    bits = ((codes[:, None] >> places) & 1).to(torch.uint8).flatten()
    bits = F.pad(bits, (0, -len(bits) % 8))
    in_byte = torch.arange(8, device=codes.device, dtype=torch.uint8)
    return (bits.view(len(bits) // 8, 8) << in_byte).sum(1, dtype=torch.uint8)


def unpack_bits(data: Tensor, width: int, n: int) -> Tensor:
    """The ``n`` integers that :func:`pack_bits` took, as int32."""
    bits = (data[:, None] >> torch.arange(8, device=data.device, dtype=torch.uint8)) & 1
    places = torch.arange(width, device=data.device, dtype=torch.int32)
    return (bits.flatten()[: n * width].view(n, width).int() << places).sum(1, dtype=torch.int32)


def _position_bits(n: int) -> int:
    return max(n - 1, 0).bit_length()


def _to_bytes(flat: Tensor) -> Tensor:
    return flat.contiguous().view(torch.uint8)


def _from_bytes(data: Tensor, dtype: torch.dtype) -> Tensor:
    return data.clone().view(dtype)  # a slice of received bytes need not be aligned


def _ratio(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest magnitude, in float32 as it is sent, and the elements over it; zeros where it is 0."""
    flat = x.reshape(-1)
    scale = flat.abs().amax().float() if len(flat) else torch.zeros((), device=x.device)
    return scale, flat / (scale + (scale == 0))


def _scaled(scale: Tensor, codes: Tensor, width: int, x: Tensor) -> Payload:
    return Payload(torch.cat([_to_bytes(scale.float().view(1)), pack_bits(codes, width)]), x.shape, x.dtype)


def _unscaled(payload: Payload, width: int) -> tuple[Tensor, Tensor]:
    scale = _from_bytes(payload.data[:4], torch.float32)
    return scale.to(payload.dtype), unpack_bits(payload.data[4:], width, math.prod(payload.shape))
