"""Block-wise quantization: eight bits a number, through a map of 256 values and one scale for each block."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST = torch.finfo(torch.float32).tiny


class QuantizedState(NamedTuple):
    """A tensor as codes: what :func:`quantize_blockwise` returns.

    ``codes`` (uint8, the tensor's shape) are positions in a map of values; ``absmax`` (float32, one per block) scales
    each block of consecutive elements.

    >>> import torch
    >>> from assay.compress.quant import QuantizedState, dynamic_map, quantize_blockwise
    >>> state = quantize_blockwise(torch.ones(1000), dynamic_map())
    >>> isinstance(state, QuantizedState), state.nbytes
    (True, 1016)
    """

    codes: Tensor
    absmax: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that codes and scales take."""
        return self.codes.nbytes + self.absmax.nbytes


def dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Tensor:
    """The values of the dynamic tree: as fine near 0 as near 1, in relative terms.

    In each decade ``[10^(i-E), 10^(i-E+1)]``, i = 0, ..., E-1, with E = ``max_exponent_bits``, the values are the
    midpoints of n_i equal cells, n_i = 2^(i + total_bits - 1 - E), twice as many where there is no sign. With a sign
    the negatives join them. 0 and 1 complete the map (-1 is not in it); where E leaves codes over, the last decade has
    2^(total_bits - 1 - E) - 1 cells more, laid out once again.

    Args:
        signed: values in [-1, 1]; otherwise in [0, 1].
        max_exponent_bits: decades, 1 to total_bits - 1.
        total_bits: 2 to 8.

    Returns:
        (2**total_bits,) sorted, float32.

    Raises:
        ValueError: a number of bits out of range.

    Source: T. Dettmers et al., 8-bit Optimizers via Block-wise Quantization, ICLR 2022, arXiv 2110.02861.

    >>> from assay.compress.quant import dynamic_map
    >>> dynamic_map(total_bits=4, max_exponent_bits=2)
    tensor([-0.8875, -0.6625, -0.5500, -0.4375, -0.2125, -0.0775, -0.0325,  0.0000,
             0.0325,  0.0775,  0.2125,  0.4375,  0.5500,  0.6625,  0.8875,  1.0000])
    """
    if not 2 <= total_bits <= 8:
        raise ValueError(f"total_bits = {total_bits!r} is out of range: 2 to 8")
    if not 1 <= max_exponent_bits < total_bits:
        raise ValueError(f"max_exponent_bits = {max_exponent_bits!r} is out of range: 1 to total_bits - 1")
    linear_bits = total_bits - 1 - max_exponent_bits
    cells = [(i - max_exponent_bits + 1, 2 ** (i + linear_bits + (not signed))) for i in range(max_exponent_bits)]
    if linear_bits:
        cells.append((0, 2**linear_bits - 1 if signed else 2 * (2**linear_bits - 1)))
    values = [10.0**decade * (0.1 + 0.9 * (k + 0.5) / n) for decade, n in cells for k in range(n)]
    if signed:
        values += [-value for value in values]
    return torch.tensor(sorted([*values, 0.0, 1.0]), dtype=torch.float64).float()


def quantize_blockwise(x: Tensor, code: Tensor, block_size: int = 256, *, keep_nonzero: bool = False) -> QuantizedState:
    """Codes of ``x``: each block of consecutive elements is scaled by its largest magnitude and rounded to the map.

    For block b of the elements in row-major order (the last may be short) ::

        absmax_b = max |x|            codes = the nearest value of the map to x / absmax_b,    the lower one of two

    A block of zeros has absmax 0.

    Args:
        x: any shape, floating point; computed in float32.
        code: the map, sorted, at most 256 values; as of :func:`dynamic_map`.
        block_size: elements that share a scale, >= 1.
        keep_nonzero: a number other than 0 never gets the map's 0, but the next value on its side.

    Returns:
        (codes, absmax): uint8 in the shape of ``x``; float32, (number of blocks,).

    Raises:
        ValueError: block_size, or a map of more than 256 values or (with keep_nonzero) without 0.

    Source: T. Dettmers et al., 8-bit Optimizers via Block-wise Quantization, ICLR 2022, arXiv 2110.02861.

    >>> import torch
    >>> from assay.compress.quant import dequantize_blockwise, dynamic_map, quantize_blockwise
    >>> x, code = torch.tensor([2.0, -1.0, 0.5, 0.0]), dynamic_map()
    >>> codes, absmax = quantize_blockwise(x, code)
    >>> dequantize_blockwise(codes, absmax, code)
    tensor([ 2.0000, -1.0016,  0.4953,  0.0000])
    """
    _check_block_size(block_size)
    book = codebook(code, keep_nonzero)
    flat = x.detach().reshape(-1).to(torch.float32, copy=True)
    full = len(flat) // block_size * block_size
    blocks = [part for part in (flat[:full].view(-1, block_size), flat[full:].view(1, -1)) if part.numel()]
    codes, scales = zip(*(encode_(part, book) for part in blocks), strict=True) if blocks else ((), ())
    empty = flat.new_zeros(0)
    return QuantizedState(
        torch.cat([empty.to(torch.uint8), *(c.flatten() for c in codes)]).view(x.shape),
        torch.cat([empty, *(s.flatten() for s in scales)]),
    )


def dequantize_blockwise(
    q: Tensor,
    absmax: Tensor,
    code: Tensor,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    block_size: int | None = None,
) -> Tensor:
    """The tensor that codes stand for: ``code[q] * absmax`` of the element's block.

    Args:
        q, absmax: as :func:`quantize_blockwise` returned them.
        code: the map that they were made with.
        shape: of the result; None: that of ``q``.
        dtype: of the result; the product is taken in float32.
        block_size: as they were made with; None: the power of two that fits the number of scales, if there is one.

    Raises:
        ValueError: the number of scales does not fit.

    Source: T. Dettmers et al., 8-bit Optimizers via Block-wise Quantization, ICLR 2022, arXiv 2110.02861.

    >>> import torch
    >>> from assay.compress.quant import dequantize_blockwise, dynamic_map
    >>> dequantize_blockwise(torch.tensor([255, 127], dtype=torch.uint8), torch.tensor([3.0]), dynamic_map())
    tensor([3., 0.])
    """
    n, scales = q.numel(), absmax.numel()
    if block_size is None:
        sizes = (2**k for k in range(n.bit_length() + 1))
        block_size = next((size for size in sizes if -(-n // size) == scales), 0)
    if not block_size or -(-n // block_size) != scales:
        raise ValueError(f"absmax.shape = {tuple(absmax.shape)} is out of range: one scale per block of {n} codes")
    values = code.to(q.device).index_select(0, q.reshape(-1).int())
    scale = absmax.flatten().repeat_interleave(block_size)[:n]
    return values.mul_(scale).to(dtype).view(q.shape if shape is None else shape)


class Codebook(NamedTuple):
    """A map with what finds the nearest of its values at once.

    The upper 16 bits of a float32 number, of which there are 65,536, say which values come into question: at most two,
    with one threshold between them. ``first`` holds the lower of the two, ``bound`` the threshold; looked up, they are
    exact. Where a map is too fine for it, and on accelerators, where a search costs little, both are None.
    """

    code: Tensor
    thresholds: Tensor
    zero: int
    keep_nonzero: bool
    first: Tensor | None
    bound: Tensor | None

    def nearest(self, z: Tensor) -> Tensor:
        """The code of the nearest value; z contiguous float32."""
        if self.first is None or self.bound is None:
            return torch.bucketize(z, self.thresholds, out_int32=True).to(torch.uint8)
        flat = z.view(-1)
        high = (flat.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
        return self.first.index_select(0, high).add_(flat > self.bound.index_select(0, high)).view(z.shape)

    def random(self, z: Tensor) -> Tensor:
        """The code of one of the two values around z, by chance, so that the mean is z."""
        nearest = self.nearest(z)
        low = (nearest.int() - (self.values(nearest) > z).int()).clamp_(0, len(self.code) - 2)
        lower, upper = self.values(low), self.values(low + 1)
        codes = (low + (torch.rand_like(z) * (upper - lower) < z - lower)).to(torch.uint8)
        return torch.where((codes == self.zero) & (z != 0), nearest, codes) if self.keep_nonzero else codes

    def values(self, codes: Tensor) -> Tensor:
        """The map's values at these codes."""
        return self.code.index_select(0, codes.reshape(-1).int()).view(codes.shape)


def encode_(blocks: Tensor, book: Codebook, *, random: bool = False) -> tuple[Tensor, Tensor]:
    """Codes and scales of the rows of a matrix, which is overwritten; shapes (rows, block) and (rows, 1)."""
    absmax = blocks.abs().amax(1, keepdim=True).float()
    # Float64 is divided as such: the quotient is rounded once.
    z = blocks.div_(absmax + (absmax == 0)).float()
    return book.random(z) if random else book.nearest(z), absmax


def decode(codes: Tensor, absmax: Tensor, book: Codebook) -> Tensor:
    """What :func:`encode_` gave, as numbers in float32."""
    return book.values(codes).mul_(absmax)


def codebook(code: Tensor, keep_nonzero: bool = False) -> Codebook:
    """The map with its thresholds and tables, made once for each map and device."""
    if code.dim() != 1 or not 2 <= len(code) <= 256:
        raise ValueError(f"code.shape = {tuple(code.shape)} is out of range: (n,) with n from 2 to 256")
    return _codebook(tuple(code.tolist()), keep_nonzero, code.device)


@functools.lru_cache(maxsize=32)
def _codebook(values: tuple[float, ...], keep_nonzero: bool, device: torch.device) -> Codebook:
    code = torch.tensor(values, dtype=torch.float32)
    if not (code[1:] >= code[:-1]).all():
        raise ValueError("code is out of range: values in ascending order")
    thresholds = ((code[1:].double() + code[:-1].double()) / 2).float()
    zero = values.index(0.0) if 0.0 in values else -1
    if keep_nonzero:
        if zero < 0:
            raise ValueError("code is out of range: with keep_nonzero it must hold 0")
        # A number has the code that as many thresholds lie below as its position says: 0 alone is between these two.
        thresholds[zero : zero + 1] = 0.0
        if zero:
            thresholds[zero - 1] = -SMALLEST
    first, bound = _tables(thresholds) if device.type == "cpu" else (None, None)
    return Codebook(code.to(device), thresholds.to(device), zero, keep_nonzero, first, bound)


def _tables(thresholds: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    high = torch.arange(65536, dtype=torch.int64) << 16
    ends = torch.stack([high, high + 0xFFFF])
    # Of the numbers with these upper bits; those from 2^31 on are negative.
    least, most = torch.where(ends >= 2**31, ends - 2**32, ends).int().view(torch.float32).sort(0).values
    first, last = torch.bucketize(least, thresholds), torch.bucketize(most, thresholds)
    if (last[~least.isnan() & ~most.isnan()] - first[~least.isnan() & ~most.isnan()]).max() > 1:
        return None, None
    bound = torch.cat([thresholds, torch.tensor([torch.inf])])[first]
    return first.to(torch.uint8), bound


def _check_block_size(block_size: int) -> None:
    if not block_size >= 1:
        raise ValueError(f"block_size = {block_size!r} is out of range: an integer >= 1")


def copy_rounded_(target: Tensor, x: Tensor, random: bool = False) -> None:
    """Copy ``x`` into a tensor of a narrower dtype; ``random``: one of the two numbers around it, with mean ``x``."""
    near = x.to(target.dtype)
    if random and target.dtype in (torch.bfloat16, torch.float16):
        error = x - near
        # As integers, numbers of one sign are in the order of their size; 0 has neighbours on both sides.
        outwards = (error * near > 0) | (near == 0)
        bits = torch.where(near == 0, near.new_zeros(()).copysign(error.to(near.dtype)), near).view(torch.int16)
        other = torch.where(outwards, bits + 1, bits - 1).view(target.dtype)
        gap = other.to(x.dtype) - near.to(x.dtype)
        near = torch.where((error != 0) & (torch.rand_like(x) * gap.abs() < error.abs()), other, near)
    target.copy_(near)
