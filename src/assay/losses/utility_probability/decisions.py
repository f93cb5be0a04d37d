"""From utilities of candidates to probabilities (Assay's own reading: Luce's rule) and from either to decisions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from assay._checks import in_range
from assay.losses.utility_probability.arguments import choices_fit, floating, precise

COLDEST, HOTTEST = 1e-3, 1e3


def utility_to_probability(
    utility: Tensor,
    *,
    temperature: float = 1.0,
    prior: Tensor | None = None,
    dim: int = -1,
    candidates: Tensor | None = None,
) -> Tensor:
    """Probabilities of a finite set of candidates from their utilities, by Luce's choice rule.

    ``p_c = prior_c exp(utility_c / temperature) / sum over all candidates``. A temperature below 1 sharpens; towards 0
    all mass goes to the best (ties share it), towards infinity p becomes the prior.

    This transform is Assay's own reading of the paper's way back from utilities to probabilities, and not the
    equation that the paper announces.

    Args:
        utility: (..., C) along ``dim``, floating point, finite; or -inf for what is no candidate,
            which gets exactly 0.
        temperature: > 0, as far as the precision goes; see :func:`fit_temperature`.
        prior: broadcastable to ``utility``, >= 0 and finite; need not sum to 1. None is uniform.
        dim: the dimension of the candidates.
        candidates: what the candidates are, for merging those that occur twice (samples often do): integers of
            ``utility``'s shape, or with further dimensions at the end, as padded tokens have. The first copy keeps the
            mass of the candidate, the others get 0. None: no two are equal.

    Returns:
        ``utility``'s shape, in float32 at least; sums to 1 along ``dim`` (nan where no candidate is left).

    Raises:
        ValueError: an argument out of range, shapes that do not fit.

    Source:
        Assay; after the aim of Huang and Yuan, arXiv 2305.14859. The rule is Luce's (Individual Choice Behavior, 1959).

    Example:
        >>> import torch
        >>> from assay.losses import utility_to_probability
        >>> utility = torch.tensor([-1.0, -1.0, -3.0])
        >>> utility_to_probability(utility, temperature=2.0)
        tensor([0.4223, 0.4223, 0.1554])
        >>> utility_to_probability(utility, temperature=2.0, candidates=torch.tensor([7, 7, 4]))
        tensor([0.7311, 0.0000, 0.2689])
    """
    floating("utility", utility)
    limits = torch.finfo(precise(utility))
    allowed = f"[{limits.tiny:.2g}, {limits.max:.2g}]"
    in_range("temperature", temperature, limits.tiny <= temperature <= limits.max, allowed)
    u, log_prior, _ = _luce(utility, prior, candidates, dim)
    # Centred before the division: however cold, the best has 0 and cannot overflow.
    return F.softmax((u - u.amax(dim, keepdim=True).detach()) / temperature + log_prior, dim)


def _luce(
    utility: Tensor, prior: Tensor | None, candidates: Tensor | None, dim: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Utilities, -inf where a candidate is none, finite log priors, and the place of each candidate's first copy."""
    u, log_prior, first = utility.to(precise(utility)), torch.zeros_like(utility, dtype=precise(utility)), None
    if prior is not None:
        if not ((prior >= 0) & (prior < math.inf)).all():
            raise ValueError("prior has a value out of range: [0, inf)")
        try:
            prior = prior.to(u.dtype).broadcast_to(u.shape)
        except RuntimeError:
            shapes = f"prior.shape = {tuple(prior.shape)} is out of range"
            raise ValueError(f"{shapes}: broadcastable to {tuple(u.shape)}") from None
        u = u.masked_fill(prior == 0, -math.inf)
        log_prior = torch.where(prior == 0, 1.0, prior).log()
    if candidates is not None:
        if candidates.shape[: u.dim()] != u.shape:
            shapes = f"candidates.shape = {tuple(candidates.shape)} is out of range"
            raise ValueError(f"{shapes}: {tuple(u.shape)}, perhaps with further dimensions")
        axis = dim % u.dim()
        first = _first_copies(candidates.reshape(*u.shape, -1).movedim(axis, -2)).movedim(-1, axis)
        place = torch.arange(u.shape[axis], device=u.device).view(-1, *[1] * (u.dim() - 1 - axis))
        u = u.masked_fill(first != place, -math.inf)
    return u, log_prior, first


def _first_copies(tokens: Tensor) -> Tensor:
    """For candidates (..., C, L), at each the place of the first that equals it (..., C)."""
    same = torch.ones(*tokens.shape[:-1], tokens.shape[-2], dtype=torch.bool, device=tokens.device)
    for token in tokens.unbind(-1):  # a comparison of all at once would hold C * C * L numbers
        same &= token.unsqueeze(-1) == token.unsqueeze(-2)
    return same.int().argmax(-1)


@torch.no_grad()
def fit_temperature(
    utility: Tensor, target: Tensor, *, prior: Tensor | None = None, candidates: Tensor | None = None
) -> float:
    """The temperature of :func:`utility_to_probability` under which held-out choices are most likely.

    Minimises ``mean_n - log p_n[target_n]`` over the temperature in [1e-3, 1e3]. It is convex in 1 / temperature, with
    slope ``mean_n (sum_c p_nc utility_nc - utility_n[target_n])``; Newton's steps, or a bisection where one would leave
    the bracket, find its zero in float64. Where all temperatures are alike the answer is 1.

    Assay's own, as :func:`utility_to_probability` is. On samples of the network itself, mind what ``target`` says: the
    reference beside samples of a calibrated network is one more sample, its utility says nothing of the choice, and
    unless copies are merged the answer is infinitely hot.

    Args:
        utility: (N, C), floating point, finite; -inf for a candidate that is none.
        target: (N,), integer, which candidate was chosen, in [0, C).
        prior, candidates: as there.

    Returns:
        The temperature.

    Raises:
        ValueError: an argument out of range, shapes that do not fit, no example, a target whose probability is 0.

    Source:
        Assay; known as temperature scaling where the utilities are logits (Guo et al. 2017, arXiv 1706.04599).

    Example:
        >>> import torch
        >>> from assay.losses import fit_temperature
        >>> utility = torch.tensor([[1.0, 0.0]]).expand(4, 2)
        >>> round(fit_temperature(utility, torch.tensor([0, 0, 0, 1])), 4)  # 1 / log(3)
        0.9102
    """
    if utility.dim() != 2 or len(utility) == 0:
        raise ValueError(f"utility.shape = {tuple(utility.shape)} is out of range: (N, C) with N >= 1")
    choices_fit("utility", utility, target)
    u, log_prior, first = (None if x is None else x.cpu() for x in _luce(utility, prior, candidates, -1))
    assert u is not None and log_prior is not None
    outside = (target < 0) | (target >= utility.shape[1])
    if outside.any():
        raise ValueError(f"target = {target[outside][0].item()} is out of range: [0, {utility.shape[1]})")
    place = target.cpu().long().unsqueeze(-1)
    place = place if first is None else first.gather(-1, place)
    chosen = u.gather(-1, place).double()
    if not chosen.isfinite().all():
        row = int((~chosen.isfinite()).nonzero()[0, 0])
        raise ValueError(f"utility of the target in row {row} is out of range: finite, with a prior > 0")
    ahead = u.double() - chosen
    gain = ahead.masked_fill(ahead.isneginf(), 0.0)

    def slope_and_curvature(inverse: float) -> tuple[float, float]:
        p = F.softmax(inverse * ahead + log_prior.double(), -1)
        mean = (p * gain).sum(-1)
        variance = (p * gain.square()).sum(-1) - mean.square()
        return mean.mean().item(), variance.mean().item()

    return 1 / _zero(slope_and_curvature, 1 / HOTTEST, 1 / COLDEST)


def _zero(slope_and_curvature: Callable[[float], tuple[float, float]], low: float, high: float) -> float:
    """Where an increasing function is 0 in [low, high], or the end next to it; from 1 on, by relative steps."""
    place = 1.0
    slope, curvature = slope_and_curvature(place)
    if not math.isfinite(slope):
        raise ValueError("utility has a value out of range: finite or -inf")
    if slope == 0:
        return place
    end = high if slope < 0 else low
    if slope_and_curvature(end)[0] * slope >= 0:
        return end
    for _ in range(200):
        low, high = (low, place) if slope > 0 else (place, high)
        newton = place - slope / curvature if curvature > 0 else math.inf
        following = newton if low < newton < high else math.sqrt(low * high)
        if slope == 0 or abs(following - place) <= 1e-12 * place:
            break
        place = following
        slope, curvature = slope_and_curvature(place)
    return place


def decide(
    utility: Tensor,
    *,
    rule: str = "argmax",
    probability: Tensor | None = None,
    loss_matrix: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose a candidate by its utility or, with a probability of the candidates, by a rule that needs one.

    - ``"argmax"``: the best utility. Only the order counts: any increasing transform of the utilities, another one for
      each input, decides the same.
    - ``"sample"``: a draw from ``probability``.
    - ``"mbr"``, minimum Bayes risk: the candidate d of least expected loss ``sum_c loss_matrix[d, c] probability_c``.

    Of equals the first is chosen.

    Args:
        utility: (..., C), floating point; rows are inputs, and are never compared with each other.
        rule: ``"argmax"``, ``"sample"`` or ``"mbr"``.
        probability: ``utility``'s shape, rows >= 0 that sum to 1; None is ``utility_to_probability(utility)``, the
            softmax. ``"argmax"`` does not look at it.
        loss_matrix: (C, C) or (..., C, C): what deciding for the row costs if the column is true. For ``"mbr"`` alone,
            which needs it; with D rows the decision is among those D.
        generator: draws for ``"sample"``, on the device of ``probability``; None is torch's global one.

    Returns:
        (...), integers in [0, C).

    Raises:
        ValueError: an unknown rule, shapes that do not fit, a probability that is none, ``"mbr"`` without a loss.

    Source:
        Huang and Yuan, arXiv 2305.14859, for argmax by utility; the rules are textbook decision theory.

    Example:
        >>> import torch
        >>> from assay.losses import decide
        >>> utility = torch.tensor([[0.6, 0.0, 0.5]])  # for the ordered labels 0, 1, 2
        >>> square = (torch.arange(3)[:, None] - torch.arange(3)).square()
        >>> decide(utility), decide(utility, rule="mbr", loss_matrix=square)
        (tensor([0]), tensor([1]))
    """
    floating("utility", utility)
    in_range("rule", rule, rule in ("argmax", "sample", "mbr"), "'argmax', 'sample' or 'mbr'")
    if rule == "argmax":
        return utility.argmax(-1)
    inputs, count = utility.shape[:-1], utility.shape[-1]
    probability = _probability(utility, probability)
    if rule == "sample":
        return torch.multinomial(probability.reshape(-1, count), 1, generator=generator).view(inputs)
    if loss_matrix is None:
        raise ValueError("loss_matrix = None is out of range: rule = 'mbr' needs one")
    if loss_matrix.dim() < 2 or loss_matrix.shape[-1] != count or loss_matrix.shape[:-2] not in ((), inputs):
        expected = f"(D, {count}), perhaps with {tuple(inputs)} before it"
        raise ValueError(f"loss_matrix.shape = {tuple(loss_matrix.shape)} is out of range: {expected}")
    return (loss_matrix.to(probability.dtype) @ probability.unsqueeze(-1)).squeeze(-1).argmin(-1)


def _probability(utility: Tensor, probability: Tensor | None) -> Tensor:
    if probability is None:
        return utility_to_probability(utility)
    if probability.shape != utility.shape:
        raise ValueError(f"probability.shape = {tuple(probability.shape)} is out of range: {tuple(utility.shape)}")
    probability = probability.to(precise(probability))
    # Loose enough for rows that were rounded to half precision; what is meant to be found are scores and logarithms.
    if not ((probability >= 0).all() and ((probability.sum(-1) - 1).abs() <= 0.01).all()):
        raise ValueError("probability has a row out of range: values >= 0 that sum to 1")
    return probability
