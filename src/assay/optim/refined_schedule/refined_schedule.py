"""Learning-rate schedules from theory: linear decay, and its refinement from recorded gradient norms."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from assay.optim.refined_schedule.grad_norm_recorder import GradNormRecorder

if TYPE_CHECKING:
    from assay.bench.recipe import Factor, Recipe, Run

Method = Literal["closed-form", "numerical"]

__all__ = ["GradNormRecorder", "LinearDecayLR", "RefinedLR", "refine_schedule", "schedule_bound"]


def refine_schedule(
    grad_norms: ArrayLike,
    *,
    power: float = 2.0,
    smoothing: float = 0.1,
    total_steps: int | None = None,
    normalize: bool = True,
    method: Method = "closed-form",
) -> np.ndarray:
    """The schedule that theory prefers for the next run, from the gradient norms G_1..G_T of a finished one.

    The norms are resampled to T = ``total_steps``, smoothed by a running median over ``smoothing * T`` steps, and
    become weights whose tail sums give the step sizes of a good *last* iterate::

        w_t   = G_t ^ -power
        eta_t = w_t * (w_{t+1} + ... + w_T) / (w_1 + ... + w_T)         eta_T = 0

    and, with ``normalize``, ``eta / max(eta)``. Equal norms give linear decay. Large early norms give a warm-up, and
    norms that grow towards the end a faster decay.

    ``method="numerical"`` returns the step sizes that minimize the last-iterate bound itself, which holds for any
    positive eta (with distance D = 1; the shape does not depend on it)::

        (1/2) * [ D^2 / sum_t eta_t  +  sum_{t<T} eta_t^2 G_t^power / (eta_{t+1} + ... + eta_T)  +  eta_T G_T^power ]

    Its last entry is small but positive. The bound is convex, and a recursion finds its only minimum in O(T).

    Refinement needs one complete training run before the run that uses it: that is its cost.

    Args:
        grad_norms: one norm per optimizer step, > 0, as the optimizer saw the gradient (after unscaling and clipping).
            Values that are not finite are dropped with a warning that counts them.
        power: >= 0; 2 with l2 norms for SGD, 1 with l1 norms for Adam and its kin.
        smoothing: in [0, 1], the width of the median as a share of the run; 0 smooths nothing.
        total_steps: length of the schedule, >= 2; None keeps the number of (finite) norms.
        normalize: divide by the maximum, so that the base learning rate is the largest one. The scale of a schedule
            is free: tune the base learning rate again, over a wider range if the schedule has a narrow peak.
        method: ``"closed-form"`` (the method) or ``"numerical"``.

    Returns:
        float64 array of shape (T,); entry t is for the step with index t, counted from 0.

    Raises:
        ValueError: an argument out of range; no finite norm; a norm that is zero or negative.

    Source: A. Defazio, A. Cutkosky, H. Mehta, K. Mishchenko, When, Why and How Much? Adaptive Learning Rate Scheduling
    by Refinement, 2023, arXiv 2310.07831.

    >>> from assay.optim import refine_schedule
    >>> refine_schedule([2.0, 2.0, 2.0, 2.0, 2.0]).round(3).tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0]
    >>> refine_schedule([4.0, 2.0, 1.0, 1.0, 1.0], smoothing=0).round(3).tolist()
    [0.102, 0.375, 1.0, 0.5, 0.0]
    """
    if not 0 <= power < math.inf:
        raise ValueError(f"power = {power!r} is out of range: a finite number >= 0")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing = {smoothing!r} is out of range: [0, 1]")
    if method not in ("closed-form", "numerical"):
        raise ValueError(f"method = {method!r} is out of range: 'closed-form' or 'numerical'")
    norms = _finite_norms(grad_norms)
    steps = len(norms) if total_steps is None else total_steps
    if not isinstance(steps, int) or steps < 2:
        raise ValueError(f"total_steps = {steps!r} is out of range: an integer >= 2")
    if steps != len(norms):
        norms = np.interp(np.linspace(0, 1, steps), np.linspace(0, 1, len(norms)), norms)
    norms = _running_median(norms, smoothing)
    if normalize:
        norms = norms / norms.min()  # the scale cancels below; this one cannot overflow
    eta = _tail_sum_schedule(norms**-power) if method == "closed-form" else _best_for_last_iterate(norms**power)
    return eta / eta.max() if normalize else eta


def _finite_norms(grad_norms: ArrayLike) -> np.ndarray:
    norms = np.asarray(grad_norms, dtype=np.float64)
    if norms.ndim != 1:
        raise ValueError(f"grad_norms of shape {norms.shape}: one number per step is wanted")
    finite = np.isfinite(norms)
    if dropped := int((~finite).sum()):
        warnings.warn(f"dropped {dropped} of {len(norms)} gradient norms that are not finite", stacklevel=3)
    norms = norms[finite]
    if len(norms) == 0:
        raise ValueError("grad_norms holds no finite value")
    if not norms.min() > 0:
        raise ValueError(f"grad_norms holds {norms.min()}, which is out of range: > 0")
    return norms


def _running_median(norms: np.ndarray, smoothing: float) -> np.ndarray:
    """Median over an odd window: the first value repeated to the left of the run, the run mirrored to its right."""
    from scipy.ndimage import median_filter

    width = 2 * (int(smoothing * len(norms)) // 2) + 1
    mirrored = np.pad(norms, (0, 2 * width), mode="reflect")
    return median_filter(mirrored, size=width, mode="nearest")[: len(norms)]


def _tail_sum_schedule(weights: np.ndarray) -> np.ndarray:
    tails = np.cumsum(weights[::-1])[::-1]
    return weights * np.append(tails[1:], 0.0) / tails[0]


def _best_for_last_iterate(costs: np.ndarray) -> np.ndarray:
    """The step sizes at which the gradient of the last-iterate bound is zero, for D = 1 and ``costs`` = G^power.

    With S_t = eta_t + ... + eta_T and c_t = 1 / S_1^2 + sum_{s<t} costs_s (eta_s / S_{s+1})^2 it is zero where
    2 costs_t eta_t / S_{t+1} = c_t for t < T and costs_T = c_T. So c_{t+1} = c_t + c_t^2 / (4 costs_t), which is solved
    backwards from c_T; then c_1 = 1 / S_1^2 gives the scale and eta_t / S_{t+1} = c_t / (2 costs_t) the rest.
    """
    c = np.empty_like(costs)
    c[-1] = costs[-1]
    for t in range(len(c) - 2, -1, -1):
        c[t] = 2 * c[t + 1] / (1 + math.sqrt(1 + c[t + 1] / costs[t]))
    ratio = c[:-1] / (2 * costs[:-1])
    tails = np.cumprod(np.concatenate([[c[0] ** -0.5], 1 / (1 + ratio)]))
    return np.append(ratio * tails[1:], tails[-1])


def schedule_bound(weights: ArrayLike, grad_norms: ArrayLike, distance: float = 1.0) -> float:
    """What theory guarantees for the last iterate of SGD with the tail-sum schedule of these weights.

    For convex f with minimum at x*, steps ``eta_t = w_t * (w_{t+1} + ... + w_T) / (w_1 + ... + w_T)`` from x_1 give::

        E[f(x_T) - f(x*)]  <=  (D^2 + sum_t w_t^2 G_t^2) / (2 * sum_t w_t)        D = distance = ||x_1 - x*||

    Weights c * w are best scaled by ``c = D / sqrt(sum_t w_t^2 G_t^2)``, and ``w_t`` in proportion to ``G_t^-2`` is the
    best of all: use it to compare schedules on recorded norms, smaller being better.

    Args:
        weights: w, shape (T,), >= 0 and not all zero, in the units of a learning rate.
        grad_norms: G, shape (T,), >= 0: l2 norms of the gradients.
        distance: D, > 0.

    Raises:
        ValueError: shapes that differ; a value out of range.

    Source: A. Defazio et al., 2023, arXiv 2310.07831, theorem on the last iterate.

    >>> from assay.optim import schedule_bound
    >>> norms = [3.0, 1.0, 1.0, 1.0]
    >>> round(schedule_bound([0.289, 0.289, 0.289, 0.289], norms), 3)
    0.866
    >>> round(schedule_bound([0.063, 0.567, 0.567, 0.567], norms), 3)
    0.567
    """
    w, norms = np.asarray(weights, dtype=np.float64), np.asarray(grad_norms, dtype=np.float64)
    if w.ndim != 1 or w.shape != norms.shape:
        raise ValueError(f"weights of shape {w.shape} and grad_norms of shape {norms.shape}: both must be (T,)")
    for name, values in (("weights", w), ("grad_norms", norms)):
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise ValueError(f"{name} holds {values.min()} to {values.max()}, out of range: finite numbers >= 0")
    if not w.any():
        raise ValueError("weights are all zero; at least one must be > 0")
    if not 0 < distance < math.inf:
        raise ValueError(f"distance = {distance!r} is out of range: a finite number > 0")
    return float((distance**2 + np.sum((w * norms) ** 2)) / (2 * w.sum()))


class _FactorLR(LRScheduler):
    """Sets every group's learning rate to its base value times a factor that is a function of the step alone."""

    def factor(self, step: int) -> float:
        """The factor for the step with index ``step``, counted from 0."""
        raise NotImplementedError

    def get_lr(self) -> list[float | Tensor]:
        return [base_lr * self.factor(self.last_epoch) for base_lr in self.base_lrs]


class LinearDecayLR(_FactorLR):
    """Linear decay to zero, optimal in the worst case, after an optional linear warm-up.

    The learning rate of each group is its base value times, for step t = 0, 1, ... ::

        (t + 1) / warmup_steps                                                              t < warmup_steps
        min_factor + (1 - min_factor) * (total_steps - t) / (total_steps - warmup_steps)    t < total_steps
        min_factor                                                                          afterwards

    Call ``step()`` after every ``optimizer.step()``, not once an epoch.

    Args:
        optimizer: any torch optimizer; groups keep the ratio of their learning rates.
        total_steps: number of optimizer steps, >= 1.
        warmup_steps: in [0, total_steps).
        min_factor: in [0, 1], where the decay ends.
        last_epoch: index of the last step when resuming without a state dict, else -1.

    Raises:
        ValueError: an argument out of range.

    Source: A. Defazio et al., 2023, arXiv 2310.07831.

    >>> import torch
    >>> from assay.optim import LinearDecayLR
    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    >>> scheduler = LinearDecayLR(optimizer, total_steps=6, warmup_steps=2)
    >>> rates = []
    >>> for _ in range(8):
    ...     rates += scheduler.get_last_lr()
    ...     optimizer.step()
    ...     scheduler.step()
    >>> rates
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        warmup_steps: int = 0,
        min_factor: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        if not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps = {total_steps!r} is out of range: an integer >= 1")
        if not isinstance(warmup_steps, int) or not 0 <= warmup_steps < total_steps:
            raise ValueError(f"warmup_steps = {warmup_steps!r} is out of range: an integer in [0, {total_steps})")
        if not 0 <= min_factor <= 1:
            raise ValueError(f"min_factor = {min_factor!r} is out of range: [0, 1]")
        self.total_steps, self.warmup_steps, self.min_factor = total_steps, warmup_steps, min_factor
        super().__init__(optimizer, last_epoch)

    def factor(self, step: int) -> float:
        """The factor for the step with index ``step``, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        left = max(self.total_steps - step, 0) / (self.total_steps - self.warmup_steps)
        return self.min_factor + (1 - self.min_factor) * left


class RefinedLR(_FactorLR):
    """Sets each group's learning rate in step t = 0, 1, ... to its base value times ``schedule[t]``.

    After the end the last entry stays, which is 0 in a refined schedule. The schedule is a part of ``state_dict()``,
    so a resumed run goes on with the one that it was begun with. Call ``step()`` after every ``optimizer.step()``.

    Args:
        optimizer: any torch optimizer; groups keep the ratio of their learning rates.
        schedule: one factor per optimizer step, finite and >= 0: usually from :func:`refine_schedule`.
        last_epoch: index of the last step when resuming without a state dict, else -1.

    Raises:
        ValueError: a schedule that is empty, of more than one dimension, or holds a value out of range.

    Source: A. Defazio et al., 2023, arXiv 2310.07831.

    >>> import torch
    >>> from assay.optim import RefinedLR, refine_schedule
    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    >>> scheduler = RefinedLR(optimizer, refine_schedule([2.0, 1.0, 1.0, 1.0]))
    >>> rates = []
    >>> for _ in range(5):
    ...     rates += scheduler.get_last_lr()
    ...     optimizer.step()
    ...     scheduler.step()
    >>> rates
    [0.1875, 0.5, 0.25, 0.0, 0.0]
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: ArrayLike, last_epoch: int = -1) -> None:
        factors = np.asarray(schedule, dtype=np.float64)
        if factors.ndim != 1 or len(factors) == 0:
            raise ValueError(f"schedule of shape {factors.shape}: one number per step is wanted")
        if not (np.isfinite(factors).all() and (factors >= 0).all()):
            raise ValueError(f"schedule holds {factors.min()} to {factors.max()}, out of range: finite numbers >= 0")
        self.schedule: list[float] = factors.tolist()  # a list, so that torch.load(weights_only=True) reads the state
        super().__init__(optimizer, last_epoch)

    def factor(self, step: int) -> float:
        """The factor for the step with index ``step``, counted from 0."""
        return self.schedule[min(step, len(self.schedule) - 1)]


def apply(recipe: Recipe, *, smoothing: float = 0.1, method: Method = "closed-form", pilot: float = 1.0) -> Recipe:
    """Train once by ``recipe`` to record gradient norms, then anew with the schedule refined from them.

    An optimizer derived from ``torch.optim.SGD`` gets l2 norms and power 2, any other l1 norms and power 1. The pilot
    has the seed, the data and the learning rate of the run that it prepares, and its time counts as that run's. A
    pilot that diverges, or has no gradient, leaves the schedule as it was.

    Args:
        smoothing, method: see :func:`refine_schedule`.
        pilot: length of the pilot as a share of the run, in (0, 1].
    """
    refine_schedule([1.0, 1.0], smoothing=smoothing, method=method)
    if not 0 < pilot <= 1:
        raise ValueError(f"pilot = {pilot!r} is out of range: (0, 1]")

    def schedule(run: Run) -> Factor:
        norm, power = ("l2", 2.0) if isinstance(run.optimizer, torch.optim.SGD) else ("l1", 1.0)
        recorders: list[GradNormRecorder] = []
        progress: list[float] = []

        def record(trial: Run) -> None:
            if not recorders:
                recorders.append(GradNormRecorder(trial.model.parameters(), norm))
            recorders[0].record()
            progress.append(trial.progress)

        status = run.fit(recipe, fraction=pilot, before_update=record).status
        norms = recorders[0].norms if recorders else np.zeros(0)
        moved = np.isfinite(norms) & (norms > 0)  # a step with gradient zero changes nothing: the bound omits it
        if status == "diverged" or not moved.any():
            return recipe.schedule(run)
        # By progress, not by number: batches may vary in size, and the pilot may be shorter.
        grid = np.arange(run.budget.steps) / run.budget.steps
        norms = np.interp(grid, np.asarray(progress)[moved], norms[moved])
        eta = refine_schedule(norms, power=power, smoothing=smoothing, method=method)
        return lambda progress: float(np.interp(progress, grid, eta))

    return replace(recipe, schedule=schedule)
