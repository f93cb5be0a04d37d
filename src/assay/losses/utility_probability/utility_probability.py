"""A softmax network as a utility function: learning by revealed preference, and decisions from what was learned.

The pairwise form of maximum likelihood (:func:`revealed_preference_loss`) is the paper's view and exact. The way back
from utilities to probabilities (:func:`utility_to_probability`, :func:`fit_temperature`) is Assay's own reading, Luce's
choice rule with a fitted temperature; it is not the equation that the paper announces for this step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay._checks import in_range
from assay.losses.utility_probability.arguments import choices_fit, precise
from assay.losses.utility_probability.decisions import decide, fit_temperature, utility_to_probability

if TYPE_CHECKING:
    from assay.bench.recipe import Batch, Objective, Recipe, Run

__all__ = [
    "apply",
    "decide",
    "fit_temperature",
    "revealed_preference_loss",
    "sequence_utility",
    "utility_to_probability",
]

_IGNORED = -100


def revealed_preference_loss(
    scores: Tensor,
    target: Tensor,
    *,
    num_alternatives: int | None = None,
    reduction: str = "mean",
    ignore_index: int = _IGNORED,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Raise the utility of what was chosen, lower that of the alternatives that the network itself would choose.

    For one example with utilities u = ``scores``, chosen y = ``target``, and p = softmax(u) held fixed ::

        loss = sum_c p_c (u_c - u_y)                          num_alternatives = None: all of them
        loss = 1/K sum_k (u_{c_k} - u_y),  c_k drawn from p   num_alternatives = K

    No gradient goes through p or the draws. The gradient with respect to u is then ``p - onehot(y)``, that of
    cross-entropy: exactly without draws, in expectation with them (variance as 1/K). Maximum likelihood is, step by
    step, a comparison of the choice in the data with the network's own choices. The *value* is the cross-entropy less
    the entropy of p, may be negative, and is not what is descended: compare models by their cross-entropy.

    Half precision is summed in float32. A class with score -inf is no alternative.

    Args:
        scores: (..., C), floating point, usually (N, C).
        target: (...), integer classes in [0, C).
        num_alternatives: None, or K >= 1, drawn with replacement (y itself may be among them and then adds nothing).
        reduction: ``"none"`` gives (...); ``"sum"``; ``"mean"`` is over the examples that are not ignored, and 0
            if all are.
        ignore_index: examples with this target add nothing.
        generator: draws the alternatives, on the device of ``scores``; None is torch's global one.

    Raises:
        ValueError: shapes that do not fit, targets that are no integers, ``num_alternatives`` < 1, an
            unknown reduction.

    Source:
        Huang and Yuan: Utility-Probability Duality of Neural Networks, 2023, arXiv 2305.14859.

    Example:
        >>> import torch
        >>> from assay.losses import revealed_preference_loss
        >>> scores = torch.tensor([[0.0, 0.0, 0.0]], requires_grad=True)
        >>> revealed_preference_loss(scores, torch.tensor([2])).backward()
        >>> scores.grad
        tensor([[ 0.3333,  0.3333, -0.6667]])
    """
    choices_fit("scores", scores, target)
    _alternatives_in_range(num_alternatives)
    in_range("reduction", reduction, reduction in ("none", "mean", "sum"), "'none', 'mean' or 'sum'")
    target = target.long()
    used = target != ignore_index
    u = scores.to(precise(scores)).masked_fill(~used.unsqueeze(-1), 0.0)
    weight = F.softmax(u.detach(), -1)
    if num_alternatives is not None:
        weight = _frequencies(weight, num_alternatives, generator)
    chosen = u.gather(-1, target.masked_fill(~used, 0).unsqueeze(-1)).squeeze(-1)
    # 0 * -inf is nan; a score that is nan stays, so that a diverged run is seen.
    losses = (weight * u.masked_fill((weight == 0) & u.isneginf(), 0.0)).sum(-1) - chosen
    if reduction == "none":
        return losses.to(scores.dtype)
    total = losses.sum()
    if reduction == "mean":
        total = total / used.sum().clamp(min=1)
    return total.to(scores.dtype)


def _frequencies(probability: Tensor, draws: int, generator: torch.Generator | None) -> Tensor:
    """How often each class is drawn, as a share of the draws."""
    # multinomial refuses nan; the scores themselves still carry it into the loss.
    rows = probability.nan_to_num(1.0).flatten(0, -2)
    drawn = torch.multinomial(rows, draws, replacement=True, generator=generator)
    ones = torch.full_like(drawn, 1 / draws, dtype=probability.dtype)
    return torch.zeros_like(rows).scatter_add(-1, drawn, ones).view_as(probability)


def sequence_utility(
    logits: Tensor, target: Tensor, *, length_penalty: float = 0.0, mask: Tensor | None = None
) -> Tensor:
    """Utility of whole outputs: the sum of their tokens' log-probabilities, or a length-normalised one.

    ``utility = (sum_t log softmax(logits_t)[target_t]) / length ** length_penalty`` over the tokens that count;
    ``length`` is their number (at least 1). 0 is the log-probability of the output, 1 its mean over the tokens.

    Utilities are comparable among outputs for the same input, and not between inputs.

    Args:
        logits: (B, L, V), floating point; any leading shape will do, (B, candidates, L, V) too.
        target: (B, L), integer tokens in [0, V); a token -100 does not count.
        length_penalty: finite, >= 0.
        mask: (B, L), true (or non-zero) where a token counts; None for all. Whether an end symbol counts is up to you.

    Returns:
        (B,), in float32 at least.

    Raises:
        ValueError: shapes that do not fit, targets that are no integers, ``length_penalty`` out of range.

    Source:
        Huang and Yuan, arXiv 2305.14859, for the log-score as a utility; the penalty is usual in beam search.

    Example:
        >>> import torch
        >>> from assay.losses import sequence_utility
        >>> logits, target = torch.zeros(1, 3, 4), torch.tensor([[1, 2, 0]])
        >>> sequence_utility(logits, target, mask=target > 0)  # 0 is padding here
        tensor([-2.7726])
    """
    choices_fit("logits", logits, target, least=2)
    in_range("length_penalty", length_penalty, 0 <= length_penalty < math.inf, "[0, inf)")
    target = target.long()
    counts = target != _IGNORED
    if mask is not None:
        if mask.shape != target.shape:
            raise ValueError(f"mask.shape = {tuple(mask.shape)} is out of range: {tuple(target.shape)}")
        counts = counts & mask.bool()
    # Padding may hold anything, nan included, and must not reach the gradient either.
    log_p = F.log_softmax(logits.masked_fill(~counts.unsqueeze(-1), 0.0), -1, dtype=precise(logits))
    scores = log_p.gather(-1, target.masked_fill(~counts, 0).unsqueeze(-1)).squeeze(-1)
    total = scores.masked_fill(~counts, 0.0).sum(-1)
    return total / counts.sum(-1).clamp(min=1).to(total.dtype) ** length_penalty


def _alternatives_in_range(num_alternatives: int | None) -> None:
    good = num_alternatives is None or (isinstance(num_alternatives, Integral) and num_alternatives >= 1)
    in_range("num_alternatives", num_alternatives, good, "None or an integer >= 1")


def apply(recipe: Recipe, *, num_alternatives: int | None = 8) -> Recipe:
    """Learning by revealed preference as a run's objective; None is cross-entropy's gradient, without draws."""
    _alternatives_in_range(num_alternatives)

    def objective(run: Run) -> Objective:
        if run.task.classes is None:
            raise ValueError("utility-probability needs a classification task")

        def loss(model: Callable[[Any], Any], batch: Batch) -> Tensor:
            return revealed_preference_loss(model(batch.input), batch.target, num_alternatives=num_alternatives)

        return loss

    return replace(recipe, objective=objective)
