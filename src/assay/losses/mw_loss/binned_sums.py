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

from assay.losses.mw_loss.pair_sums import block_size, pair_gradients, pair_sums

TOLERANCE = 3e-8
_MOMENTS, _FINE, _NODES = 3, 256, 20
_FINE_PER_TEMPERATURE = 64
_MOST_COARSE = 4096


@torch.library.custom_op("assay::mw_binned_sums", mutates_args=())
def binned_sums(positives: Tensor, cells: Tensor, excluded: Tensor, temperature: float) -> Tensor:
    """As :func:`pair_sums`, with the negatives given as all ``cells`` without those equal to ``excluded``."""
    grid = _Grid.over(positives, cells, temperature)
    if grid is None:
        return pair_sums(positives, cells, temperature, None) - pair_sums(positives, excluded, temperature, None)
    moments = grid.spread(cells) - grid.spread(excluded)
    field = grid.field(moments, lambda x: F.softplus(-x, threshold=50))
    return grid.evaluate(field, positives)


@torch.library.custom_op("assay::mw_binned_gradients", mutates_args=())
def binned_gradients(
    weights: Tensor, positives: Tensor, cells: Tensor, excluded: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``(weights * binned_sums).sum()`` with respect to positives, cells and excluded."""
    grid = _Grid.over(positives, cells, temperature)
    if grid is None:
        at_positives, at_cells = pair_gradients(weights, positives, cells, temperature, None)
        too_much, at_excluded = pair_gradients(weights, positives, excluded, temperature, None)
        return at_positives - too_much, at_cells, -at_excluded
    moments = grid.spread(cells) - grid.spread(excluded)
    of_negatives = grid.field(moments, lambda x: torch.sigmoid(-x))
    of_positives = grid.field(grid.spread(positives, weights / temperature), torch.sigmoid)
    at_positives = -weights / temperature * grid.evaluate(of_negatives, positives)
    return at_positives, grid.evaluate(of_positives, cells), -grid.evaluate(of_positives, excluded)


@dataclass(frozen=True)
class _Grid:
    """Fine bins [k, k + 1) / scale for k = start, ..., in ``coarse`` groups of 256; kernels see x / temperature."""

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
        bounds = torch.stack([*positives.aminmax(), *cells.aminmax()]).double() * scale
        low, high = bounds.min().item(), bounds.max().item()
        if not high - low < _MOST_COARSE * _FINE:  # also where one is nan
            return None
        start = math.floor(low)
        return cls(start, scale, -(-(math.floor(high) - start + 1) // _FINE), temperature)

    def places(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The fine bin of each value, and where in it from -1/2 to 1/2."""
        scaled = values * self.scale
        whole = scaled.floor()
        return whole.long().sub_(self.start), scaled.sub_(whole).sub_(0.5)

    def spread(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """Moments 0, 1, 2 of the values about their bins' centres, in widths of a bin; (3, bins), double precision."""
        moments = torch.zeros(_MOMENTS, self.coarse * _FINE, dtype=torch.float64, device=values.device)
        for part, weight in zip(_pieces(values), _pieces(values if weights is None else weights), strict=True):
            index, u = self.places(part)
            u = u.double()
            power = torch.ones_like(u) if weights is None else weight.double()
            for moment in moments:
                moment.scatter_add_(0, index, power)
                power = power * u
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
        flat = values.reshape(-1)
        result = torch.empty_like(flat)
        for part, out in zip(_pieces(flat), _pieces(result), strict=True):
            index, u = self.places(part)
            torch.index_select(square, 0, index, out=out)
            for coefficient in (linear, constant):
                out.mul_(u).add_(coefficient.index_select(0, index))
        return result.view(values.shape)


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    return x.reshape(-1).split(block_size(x))


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
def _(positives: Tensor, cells: Tensor, excluded: Tensor, temperature: float) -> Tensor:
    return torch.empty_like(positives)


@binned_gradients.register_fake
def _(
    weights: Tensor, positives: Tensor, cells: Tensor, excluded: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(positives), torch.empty_like(cells), torch.empty_like(excluded)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.temperature = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, weights: Tensor) -> tuple[Any, ...]:
    return *binned_gradients(weights, *ctx.saved_tensors, ctx.temperature), None


binned_sums.register_autograd(_backward, setup_context=_keep)
