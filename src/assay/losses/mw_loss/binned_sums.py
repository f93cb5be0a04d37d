"""The same sums from moments: the pooled scores go into bins once, and no pair is ever looked at.

The softplus of a difference is smooth on the scale of the temperature. Sources (the negatives) give their first three
moments about the centres of fine bins, at most 1/64 of the temperature wide. The 256 fine bins of a coarse one are
taken together as weights on 20 Chebyshev nodes: exactly what polynomial interpolation needs to know of them. Between
nodes the sum is a convolution, done by FFT. The result is carried back to fine bins as a Taylor polynomial of degree
two, which is evaluated where it is wanted. Bins are powers of two wide and begin at multiples of that, so a score's
place within its bin is exact in its own precision.

Per pair, softplus and its slope are off by less than :data:`TOLERANCE`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from assay._operators import opaque
from assay.losses.mw_loss.pair_sums import block_size, pair_gradients, pair_sums

TOLERANCE = 3e-8
_MOMENTS, _FINE, _NODES = 3, 256, 20
_FINE_PER_TEMPERATURE = 64
_MOST_COARSE = 4096


@opaque("mw_binned_sums")
def binned_sums(
    positives: Tensor, cells: Tensor, holes: Tensor, own: bool, temperature: float
) -> tuple[Tensor, Tensor]:
    """As :func:`pair_sums`, with the negatives given as all ``cells`` except ``cells.flatten()[holes]``.

    With ``own``, what is in the holes are the positives, and their gradient goes there instead of to ``positives``:
    a second matrix, of zeros but for them, would cost as much as a fifth of all. The second result is what backward
    needs: minus the slope of each sum with respect to its positive.
    """
    grid = _Grid.over(positives, cells, temperature)
    if grid is None:
        negatives, ones = _without(cells, holes), torch.ones_like(positives)
        slopes = -pair_gradients(ones, positives, negatives, temperature, None)[0]
        return pair_sums(positives, negatives, temperature, None), slopes
    moments = grid.spread(cells) - grid.spread(cells.flatten()[holes])
    sums = grid.field(moments, lambda x: F.softplus(-x, threshold=50))
    slopes = grid.field(moments, lambda x: torch.sigmoid(-x) / temperature)
    return grid.evaluate(sums, positives), grid.evaluate(slopes, positives)


@opaque("mw_binned_gradient")
def binned_gradient(
    weights: Tensor, positives: Tensor, cells: Tensor, holes: Tensor, at_holes: Tensor, temperature: float
) -> Tensor:
    """Gradient of ``(weights * binned_sums).sum()`` with respect to the cells; ``at_holes`` stands in the holes."""
    grid = _Grid.over(positives, cells, temperature)
    if grid is None:
        every = pair_gradients(weights, positives, cells.flatten(), temperature, None)[1]
    else:
        field = grid.field(grid.spread(positives, weights), lambda x: torch.sigmoid(x) / temperature)
        every = grid.evaluate(field, cells)
    return every.view(-1).index_copy_(0, holes, at_holes).view(cells.shape)


@dataclass(frozen=True)
class _Grid:
    """Fine bins about k / scale for k = start, ..., in ``coarse`` groups of 256; kernels see x / temperature."""

    start: int
    scale: float
    coarse: int
    temperature: float

    @classmethod
    def over(cls, positives: Tensor, cells: Tensor, temperature: float) -> _Grid | None:
        """The bins that hold all scores; None where there is nothing, or where they would be too many or not finite."""
        if not (positives.numel() and cells.numel()):
            return None
        scale = 2.0 ** math.ceil(math.log2(_FINE_PER_TEMPERATURE / temperature))
        bounds = torch.stack([*positives.aminmax(), *cells.aminmax()]).mul_(scale).tolist()
        low, high = min(bounds), max(bounds)
        if not (all(map(math.isfinite, bounds)) and high - low < (_MOST_COARSE - 1) * _FINE):
            return None
        start = round(low)
        return cls(start, scale, -(-(round(high) - start + 1) // _FINE), temperature)

    def places(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The fine bin of each value, and where in it from -1/2 to 1/2. No step rounds: see the module."""
        scaled = values * self.scale
        whole = scaled.round()
        return whole.sub(self.start).int(), scaled.sub_(whole)

    def spread(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """Moments 0, 1, 2 of the values about their bins' centres, in widths of a bin; (3, bins), double precision."""
        moments = torch.zeros(_MOMENTS, self.coarse * _FINE, dtype=torch.float64, device=values.device)
        for part, weight in zip(_pieces(values), _pieces(values if weights is None else weights), strict=True):
            index, u = self.places(part)
            index, u = index.long(), u.double()
            power = torch.ones_like(u) if weights is None else weight.to(torch.float64, copy=True)
            for m, moment in enumerate(moments):
                moment.scatter_add_(0, index, power.mul_(u) if m else power)
        return moments

    def field(self, moments: Tensor, kernel: Callable[[Tensor], Tensor]) -> Tensor:
        """Taylor coefficients about the fine bins' centres of y -> sum over sources s of kernel((y - s) / temperature).

        (3, bins) of moments gives (3, bins) of coefficients.
        """
        nodes, matrix = (x.to(moments.device) for x in _interpolation())
        sources = torch.einsum("mbr,mrj->bj", moments.view(_MOMENTS, self.coarse, _FINE), matrix)
        width = _FINE / self.scale / self.temperature
        steps = torch.arange(2 * self.coarse, device=moments.device, dtype=torch.float64)
        steps[self.coarse :] -= 2 * self.coarse  # a cyclic convolution, twice as long so that the ends do not meet
        between = kernel(width * (steps[:, None, None] + (nodes[:, None] - nodes) / 2))
        spectrum = torch.fft.rfft(sources, n=len(steps), dim=0)
        transformed = torch.einsum("fij,fj->fi", torch.fft.rfft(between, dim=0), spectrum)
        at_nodes = torch.fft.irfft(transformed, n=len(steps), dim=0)[: self.coarse]
        return torch.einsum("bi,mri->mbr", at_nodes, matrix).reshape(_MOMENTS, -1)

    def evaluate(self, coefficients: Tensor, values: Tensor) -> Tensor:
        """The polynomials of ``coefficients`` (3, bins) at the values, in their shape."""
        constant, linear, square = coefficients.to(values.dtype)
        result = values.new_empty(values.shape)
        for part, out in zip(_pieces(values), _pieces(result), strict=True):
            index, u = self.places(part)
            torch.index_select(square, 0, index, out=out)
            for coefficient in (linear, constant):
                out.mul_(u).add_(coefficient.index_select(0, index))
        return result


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    return x.reshape(-1).split(block_size(x) // 4)  # a handful of arrays of that size are in use at a time


def _without(cells: Tensor, holes: Tensor) -> Tensor:
    kept = torch.ones(cells.numel(), dtype=torch.bool, device=cells.device)
    kept[holes] = False
    return cells.flatten()[kept]


@functools.cache
def _interpolation() -> tuple[Tensor, Tensor]:
    """Chebyshev nodes in (-1, 1) of a coarse bin, and their Lagrange polynomials about the centres of its fine bins.

    ``matrix[m, r, j]`` is the coefficient of u^m, u in widths of a fine bin, of polynomial j about the centre of r.
    """
    nodes = np.cos(np.pi * (np.arange(_NODES) + 0.5) / _NODES)
    chebyshev = np.polynomial.chebyshev.chebvander(nodes, _NODES - 1).T * 2 / _NODES
    chebyshev[0] /= 2  # column j: the j-th Lagrange polynomial
    centres = (2 * np.arange(_FINE) + 1) / _FINE - 1
    matrix = [
        np.polynomial.chebyshev.chebval(centres, np.polynomial.chebyshev.chebder(chebyshev, m)).T
        * (2 / _FINE) ** m
        / math.factorial(m)
        for m in range(_MOMENTS)
    ]
    return torch.from_numpy(nodes), torch.from_numpy(np.stack(matrix))


@binned_sums.register_fake
def _(positives: Tensor, cells: Tensor, holes: Tensor, own: bool, temperature: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(positives), torch.empty_like(positives)


@binned_gradient.register_fake
def _(weights: Tensor, positives: Tensor, cells: Tensor, holes: Tensor, at_holes: Tensor, temperature: float) -> Tensor:
    return cells.new_empty(cells.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    positives, cells, holes, ctx.own, ctx.temperature = inputs
    ctx.save_for_backward(positives, cells, holes, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, weights: Tensor, _: Any) -> tuple[Any, ...]:
    positives, cells, holes, slopes = ctx.saved_tensors
    at_positives = -weights * slopes
    at_holes = at_positives if ctx.own else at_positives.new_zeros(len(holes))
    at_cells = binned_gradient(weights, positives, cells, holes, at_holes, ctx.temperature)
    return None if ctx.own else at_positives, at_cells, None, None, None


binned_sums.register_autograd(_backward, setup_context=_keep)
