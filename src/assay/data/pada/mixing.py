"""Importance and uniform sampling in one distribution."""

from __future__ import annotations

import torch
from torch import Tensor


def pada_mix(importance: Tensor, uniform: Tensor | float, tau: float) -> Tensor:
    """``tau * importance / sum(importance) + (1 - tau) * uniform``: a distribution that moves from one to the other.

    Where every importance is 0 the result is ``uniform``.

    Args:
        importance: (n,), finite and at least 0, in any unit.
        uniform: the distribution at ``tau=0``, (n,), or its value in every place, 1/n.
        tau: in [0, 1].

    Returns:
        Probabilities (n,), each at least (1 - tau) * uniform.

    Raises:
        ValueError: an importance or tau out of range.

    Source:
        Lu et al.: PA&DA: Jointly Sampling PAth and DAta for Consistent NAS, CVPR 2023, arXiv 2302.14772.

    Example:
        >>> import torch
        >>> from assay.data import pada_mix
        >>> pada_mix(torch.tensor([3.0, 1.0]), 0.5, tau=0.5)
        tensor([0.6250, 0.3750])
    """
    if not 0 <= tau <= 1:
        raise ValueError(f"tau = {tau!r} is out of range: [0, 1]")
    if importance.dim() != 1 or not bool((importance >= 0).all() & importance.isfinite().all()):
        raise ValueError(f"importance {tuple(importance.shape)} is out of range: (n,), finite numbers >= 0")
    largest = importance.max()
    if largest == 0:
        tau, largest = 0.0, torch.ones_like(largest)
    share = importance / largest  # first by the largest, so that no sum overflows
    return tau * share / share.sum().clamp(min=1) + (1 - tau) * uniform


def running(values: Tensor, counts: Tensor, at: Tensor, new: Tensor, average: str) -> None:
    """Take one new number into each of ``values[at]``, which have taken ``counts[at]`` before; ``at`` is distinct.

    ``"ema"``: half old, half new (the first is taken whole); ``"mean"``: the mean of all.
    """
    seen = counts[at]
    weight = torch.where(seen == 0, 1.0, 0.5) if average == "ema" else 1.0 / (seen.to(values) + 1)
    values[at] = values[at].lerp(new.to(values), weight.to(values))
    counts[at] += 1
