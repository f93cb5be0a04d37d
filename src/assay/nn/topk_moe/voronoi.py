"""Voronoi cells and losses: how far a fitted mixing measure is from the true one, atom by atom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from assay._checks import in_range

if TYPE_CHECKING:
    from assay.nn.topk_moe.topk_moe import TopKGaussianMoE

_POWER = {1: 1, 2: 4, 3: 6}  # r(m) for a cell of m atoms; from 4 on 7 is the least that the literature allows


class _Measure(NamedTuple):
    beta0: np.ndarray
    beta1: np.ndarray
    a: np.ndarray
    b: np.ndarray
    sigma: np.ndarray

    def moved(self, by: np.ndarray) -> _Measure:
        """The same density with ``by`` = (beta1, beta0) added to every atom's gate."""
        return self._replace(beta1=self.beta1 + by[:-1], beta0=self.beta0 + by[-1])


def _measure(model: TopKGaussianMoE) -> _Measure:
    beta0, beta1, a, b, log_sigma = (t.detach().double().cpu().numpy() for t in model.atoms)
    return _Measure(beta0, beta1, a, b, np.exp(log_sigma))


def voronoi_cells(fitted: TopKGaussianMoE, true: TopKGaussianMoE) -> list[list[int]]:
    """For each true atom the fitted atoms that are nearest to it, in theta = (beta1, a, b, sigma).

    Distances are Euclidean, between the parameters as they stand: gates of models that were fitted apart differ by a
    translation that changes nothing, and :func:`voronoi_loss` looks for the best one. Ties go to the first atom.

    >>> from assay.nn.gaussian_moe import TopKGaussianMoE, voronoi_cells
    >>> true = TopKGaussianMoE(1, 2, k=1)
    >>> voronoi_cells(true, true)
    [[0], [1]]
    """
    return _cells(_measure(fitted), _measure(true))


def _cells(fitted: _Measure, true: _Measure) -> list[list[int]]:
    thetas = [np.concatenate([g.beta1, g.a, g.b[:, None], g.sigma[:, None]], 1) for g in (fitted, true)]
    nearest = np.linalg.norm(thetas[0][:, None] - thetas[1][None], axis=-1).argmin(1)
    return [np.flatnonzero(nearest == j).tolist() for j in range(len(true.b))]


def min_selected_experts(cells: Sequence[Sequence[int]], k: int) -> int:
    """How many experts a fit must select for its density to converge: the atoms in the K largest cells together.

    Args:
        cells: of a fitted and a true model, as :func:`voronoi_cells` returns them.
        k: K of the true model, in [1, number of cells].

    Raises:
        ValueError: ``k`` out of range.

    >>> from assay.nn.gaussian_moe import min_selected_experts
    >>> min_selected_experts([[0, 3], [1], [2]], k=2)
    3
    """
    in_range("k", k, isinstance(k, int) and 1 <= k <= len(cells), f"an integer in [1, {len(cells)}]")
    return sum(sorted(map(len, cells), reverse=True)[:k])


def voronoi_loss(fitted: TopKGaussianMoE, true: TopKGaussianMoE, k: int, kind: str = "exact") -> float:
    """The Voronoi loss between two mixing measures, least over translations of the fitted gate.

    With C_j the cell of true atom j (:func:`voronoi_cells`), m its size, and differences to its true atom::

        L_j  = sum_{i in C_j} exp(beta0_i) (||dbeta1||^p + |db|^p + ||da||^q + |dsigma|^q)
               + | sum_{i in C_j} exp(beta0_i) - exp(beta0*_j) |
        loss = the K largest L_j added: the largest sum over K true atoms

    "exact": p = q = 1. "over": p = r(m) and q = r(m) / 2 in cells with m > 1, where r(2) = 4, r(3) = 6 and, for want of
    a known value, r(m) = 7 from 4 on. The translation (beta1 + t1, beta0 + t0) of the fitted gate is searched from all
    that bring a fitted atom's gate onto a true one's.

    Args:
        fitted, true: of any number of experts, with equal d.
        k: K of the true model, in [1, its number of experts].
        kind: "exact" or "over".

    Raises:
        ValueError: an argument out of range.

    Source: H. Nguyen, P. Akbarian, F. Yan, N. Ho, Statistical Perspective of Top-K Sparse Softmax Gating Mixture of
    Experts, ICLR 2024, arXiv 2309.13850.

    >>> import torch
    >>> from assay.nn.gaussian_moe import TopKGaussianMoE, voronoi_loss
    >>> true, moved = TopKGaussianMoE(1, 2, k=1), TopKGaussianMoE(1, 2, k=1)
    >>> state = {name: tensor.flip(0) for name, tensor in true.state_dict().items()}
    >>> moved.load_state_dict(state | {"beta1": state["beta1"] + 3})
    <All keys matched successfully>
    >>> round(voronoi_loss(moved, true, k=1), 4)
    0.0
    """
    in_range("kind", kind, kind in ("exact", "over"), "'exact' or 'over'")
    g, goal = _measure(fitted), _measure(true)
    in_range("k", k, isinstance(k, int) and 1 <= k <= len(goal.b), f"an integer in [1, {len(goal.b)}]")
    if g.a.shape[1] != goal.a.shape[1]:
        raise ValueError(f"the fitted model has d = {g.a.shape[1]}, the true one d = {goal.a.shape[1]}")

    def loss(by: np.ndarray) -> float:
        return _loss(g.moved(by), goal, k, kind)

    gates = [np.concatenate([m.beta1, m.beta0[:, None]], 1) for m in (g, goal)]
    starts = [np.zeros(gates[0].shape[1]), *(gates[1][None] - gates[0][:, None]).reshape(-1, gates[0].shape[1])]
    mass = np.logaddexp.reduce(goal.beta0) - np.logaddexp.reduce(g.beta0)
    starts += [np.append(start[:-1], mass) for start in starts]
    best = min(starts, key=loss)
    return _descend(loss, best)


def _loss(fitted: _Measure, true: _Measure, k: int, kind: str) -> float:
    parts = []
    for j, cell in enumerate(_cells(fitted, true)):
        p: float = 1
        q: float = 1
        if kind == "over" and len(cell) > 1:
            p = _POWER.get(len(cell), 7)
            q = p / 2
        mass = np.exp(fitted.beta0[cell])
        differences = (
            np.linalg.norm(fitted.beta1[cell] - true.beta1[j], axis=1) ** p
            + np.abs(fitted.b[cell] - true.b[j]) ** p
            + np.linalg.norm(fitted.a[cell] - true.a[j], axis=1) ** q
            + np.abs(fitted.sigma[cell] - true.sigma[j]) ** q
        )
        parts.append(float(mass @ differences + abs(mass.sum() - np.exp(true.beta0[j]))))
    return sum(sorted(parts, reverse=True)[:k])


def _descend(loss: Callable[[np.ndarray], float], start: np.ndarray) -> float:
    """The least loss near ``start``; the loss has kinks, so without derivatives."""
    from scipy.optimize import minimize

    first = loss(start)
    if first < 1e-12:
        return first
    simplex = start + min(first, 0.1) * np.eye(len(start) + 1, len(start), -1)
    options = {"initial_simplex": simplex, "xatol": 1e-9, "fatol": 1e-12, "maxiter": 400 * len(start)}
    return float(min(first, minimize(loss, start, method="Nelder-Mead", options=options).fun))
