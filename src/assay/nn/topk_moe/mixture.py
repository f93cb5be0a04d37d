"""The density of a top-K Gaussian mixture of experts, for one set of parameters or for many side by side."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Atoms(NamedTuple):
    """Parameters of E experts: ``beta0``, ``b``, ``log_sigma`` (*, E) and ``beta1``, ``a`` (*, E, d)."""

    beta0: Tensor
    beta1: Tensor
    a: Tensor
    b: Tensor
    log_sigma: Tensor


# Experts stand before rows, (*, E, n): sums over few experts then run along whole rows of memory.


def lines(slope: Tensor, x: Tensor) -> Tensor:
    """slope_e . x for every row of x, (*, E, d) and (n, d) -> (*, E, n)."""
    return slope @ x.T


def log_gate(atoms: Atoms, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Log weights of the K experts with the largest beta1_e . x (beta0 has no say), and which they are: (*, K, n)."""
    score = lines(atoms.beta1, x)
    every = torch.arange(score.shape[-2], device=x.device).unsqueeze(-1)
    experts = every.expand(score.shape) if k == len(every) else score.topk(k, dim=-2).indices
    return pick(score + atoms.beta0.unsqueeze(-1), experts).log_softmax(-2), experts


def pick(values: Tensor, experts: Tensor) -> Tensor:
    """The values (*, E, n or 1) of the selected experts; all experts stand in their order."""
    if values.shape[-2] == experts.shape[-2]:
        return values
    return values.expand(*values.shape[:-1], experts.shape[-1]).gather(-2, experts)


def spread(values: Tensor, experts: Tensor, number: int) -> Tensor:
    """The inverse of :func:`pick`: zeros for the other experts."""
    if number == experts.shape[-2]:
        return values
    return values.new_zeros(*values.shape[:-2], number, values.shape[-1]).scatter(-2, experts, values)


def log_joint(atoms: Atoms, x: Tensor, y: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """log of gate times N(y | a_e . x + b_e, sigma_e^2) for the selected experts, whose log gates are ``weights``."""
    log_sigma = pick(atoms.log_sigma.unsqueeze(-1), experts)
    z = (y - pick(lines(atoms.a, x) + atoms.b.unsqueeze(-1), experts)) * torch.exp(-log_sigma)
    return weights - 0.5 * z.square() - (log_sigma + _HALF_LOG_2PI)
