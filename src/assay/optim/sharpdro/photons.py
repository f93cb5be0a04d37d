"""Images that few photons reach: shot noise by severity, and severities that are the rarer the worse they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PHOTONS = (6.0, 2.5, 1.2, 0.5, 0.3)
"""Photons that a white pixel gets at severity 1, 2, ...: a tenth of what shot noise on ImageNet-C has."""


def photon_limited(
    x: Tensor,
    severity: int | Tensor,
    generator: torch.Generator | None = None,
    *,
    photons: Sequence[float] = PHOTONS,
) -> Tensor:
    """Images as a sensor counts them that few photons reach: shot noise, the stronger the severity.

    With c = ``photons[s - 1]``, for every pixel of an example of severity s ::

        x' = Poisson(c x) / c           and  x' = x  where s = 0

    so that the mean of x' is x and its variance x / c. It is not cut off above 1: a pixel may count too many.

    Args:
        x: images in [0, 1], (N, ...) where severities differ, floating point.
        severity: s in 0, ..., len(photons); one for all, or integers of shape (N,).
        generator: draws the counts, on the device of ``x``; None: torch's global one.
        photons: what a pixel of 1 gets on average at severity 1, 2, ...; each above 0.

    Returns:
        x', of the shape and dtype of ``x``.

    Raises:
        ValueError: an argument out of range, or a shape that does not fit.

    Source: Z. Huang et al., Robust Generalization against Photon-Limited Corruptions via Worst-Case Sharpness
    Minimization, CVPR 2023, arXiv 2303.13087.

    >>> import torch
    >>> from assay.data import photon_limited
    >>> x = torch.full((2, 1000), 0.5)
    >>> noisy = photon_limited(x, torch.tensor([0, 2]), torch.Generator().manual_seed(0))
    >>> bool((noisy[0] == x[0]).all()), noisy[1].mul(2.5).unique().round().tolist()[:3]
    (True, [0.0, 1.0, 2.0])
    """
    if not photons or not all(c > 0 for c in photons):
        raise ValueError(f"photons = {photons!r} is out of range: numbers above 0, at least one")
    s = torch.as_tensor(severity, device=x.device)
    if s.is_floating_point() or s.dtype == torch.bool or (s.dim() and s.shape != x.shape[:1]):
        raise ValueError(f"severity = {severity!r} is out of range: an integer, or integers of shape {x.shape[:1]}")
    if s.numel() and not 0 <= int(s.min()) <= int(s.max()) <= len(photons):
        raise ValueError(f"severity = {severity!r} is out of range: integers from 0 to {len(photons)}")
    if not x.is_floating_point() or bool((x < 0).any()):
        raise ValueError("x is out of range: floating point, >= 0")
    rates = torch.tensor([1.0, *photons], dtype=x.dtype, device=x.device)[s]
    if s.dim():
        s, rates = (value.view(-1, *[1] * (x.dim() - 1)) for value in (s, rates))
    return torch.where(s == 0, x, torch.poisson(x * rates, generator=generator) / rates)


def poisson_severities(n: int, lam: float, max_severity: int, generator: torch.Generator | None = None) -> Tensor:
    """A severity for each of ``n`` examples: min(Poisson(lam), max_severity), so that severe ones are rare.

    Args:
        n: examples, >= 0.
        lam: mean of the Poisson distribution, >= 0 and finite.
        max_severity: >= 0; what is above counts as it.
        generator: a CPU generator; None: torch's global one.

    Returns:
        Integers (n,) from 0 to ``max_severity``; they are the group ids of :class:`assay.optim.SharpDRO`.

    Raises:
        ValueError: an argument out of range.

    Source: Z. Huang et al., Robust Generalization against Photon-Limited Corruptions via Worst-Case Sharpness
    Minimization, CVPR 2023, arXiv 2303.13087.

    >>> import torch
    >>> from assay.data import poisson_severities
    >>> severities = poisson_severities(1000, 0.6, 3, torch.Generator().manual_seed(0))
    >>> counts = severities.bincount().tolist()
    >>> len(counts), counts == sorted(counts, reverse=True)
    (4, True)
    """
    for name, value in (("n", n), ("max_severity", max_severity)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} = {value!r} is out of range: an integer >= 0")
    if not 0 <= lam < float("inf"):
        raise ValueError(f"lam = {lam!r} is out of range: >= 0 and finite")
    return torch.poisson(torch.full((n,), float(lam)), generator=generator).clamp(max=max_severity).long()
