"""AdAdaGrad: batches that grow while training, beside any optimizer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from assay.optim._per_sample import per_sample_grads
from assay.optim.adadagrad.adagrad_norm import AdaGradNorm
from assay.optim.adadagrad.batch_tests import (
    MOMENT_TESTS,
    BatchTest,
    Moments,
    PerSample,
    augmented_inner_product_test,
    check_quantile,
    check_tolerance,
    coordinate_norm_test,
    count_examples,
    gradient_moments,
    inner_product_test,
    judge,
    norm_test,
    orthogonality_test,
)
from assay.optim.adadagrad.sampler import AdaptiveBatchSampler

if TYPE_CHECKING:
    from assay.bench.recipe import Batch, Recipe, Run

__all__ = [
    "AdaGradNorm",
    "AdaptiveBatchSampler",
    "AdaptiveBatchSize",
    "BatchTest",
    "augmented_inner_product_test",
    "coordinate_norm_test",
    "gradient_moments",
    "inner_product_test",
    "norm_test",
    "orthogonality_test",
    "per_sample_grads",
]

_TESTS = (*MOMENT_TESTS, "coordinate_norm")


class AdaptiveBatchSize:
    """The size of the next batch: it grows when a test finds that the last one was too small, and never shrinks.

    With the test's answer s, from the gradients of a batch at the parameters before the update (for
    ``test="norm"``, s = ceil(V / (eta^2 |gbar|^2)) unless the batch passes; see the functions of the tests) ::

        size <- max(size, min(s, max_batch_size, max_growth * size))

    AdAdaGrad is this beside ``torch.optim.Adagrad``, AdAdaGradNorm beside :class:`AdaGradNorm`; any other optimizer
    will do. The learning rate is not to be rescaled, and schedules and budgets count examples, not steps. A mean
    gradient of zero asks for ``max_batch_size``, with a warning; gradients that are not finite, and a batch of one
    example, leave the size as it is.

    Args:
        initial: first size, at least 2.
        max_batch_size: largest size, at least ``initial``; once it is reached no test is due.
        test: ``"norm"``, ``"inner_product"``, ``"orthogonality"``, ``"augmented_inner_product"`` or
            ``"coordinate_norm"``.
        eta: tolerance of the norm tests, > 0.
        theta: tolerance along the mean gradient, > 0.
        nu: tolerance across it, > 0.
        interval: a test is due every so many steps, at least 1.
        max_growth: largest factor of one growth (by 1 at least), > 1; None means no limit.
        quantile: share of the coordinates that must pass the coordinate-wise norm test, in (0, 1].

    Attributes:
        size: size of the next batch.
        last: the last :class:`BatchTest`, or None.

    Raises:
        ValueError: an argument out of range.

    Source: Lau, Liu and Kolar, "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods",
    arXiv 2402.11215, 2024.

    Example:
        >>> import torch
        >>> from assay.optim import AdaptiveBatchSize
        >>> controller = AdaptiveBatchSize(2, max_batch_size=64, eta=0.5)
        >>> controller.update(torch.tensor([[1.0, 2.0], [3.0, -2.0]]))
        10
        >>> controller.last.passed
        False
    """

    def __init__(
        self,
        initial: int,
        *,
        max_batch_size: int,
        test: str = "norm",
        eta: float = 0.1,
        theta: float = 0.1,
        nu: float = 0.1,
        interval: int = 1,
        max_growth: float | None = None,
        quantile: float = 1.0,
    ) -> None:
        for name, count, least in (
            ("initial", initial, 2),
            ("max_batch_size", max_batch_size, initial),
            ("interval", interval, 1),
        ):
            if not isinstance(count, int) or count < least:
                raise ValueError(f"{name} = {count!r} is out of range: an integer >= {least}")
        if test not in _TESTS:
            raise ValueError(f"test = {test!r} is out of range: one of {', '.join(_TESTS)}")
        for name, tolerance in (("eta", eta), ("theta", theta), ("nu", nu)):
            check_tolerance(name, tolerance)
        check_quantile(quantile)
        if max_growth is not None and not max_growth > 1:
            raise ValueError(f"max_growth = {max_growth!r} is out of range: None or a number > 1")
        self.size = initial
        self.last: BatchTest | None = None
        self.max_batch_size, self.test, self.interval, self.max_growth = max_batch_size, test, interval, max_growth
        self.eta, self.theta, self.nu, self.quantile = eta, theta, nu, quantile

    def due(self, step: int) -> bool:
        """Whether step number ``step`` (from 0) should test; never at ``max_batch_size``, so no gradient is wasted."""
        return step % self.interval == 0 and self.size < self.max_batch_size

    def update(self, per_sample_grads: PerSample) -> int:
        """Test the batch with these per-sample gradients; returns the size of the next one."""
        if self.size >= self.max_batch_size or count_examples(per_sample_grads) < 2:
            return self.size
        if self.test == "coordinate_norm":
            return self._grow(coordinate_norm_test(per_sample_grads, self.eta, self.quantile))
        return self.update_from_moments(*gradient_moments([per_sample_grads], inner=self.test != "norm"))

    def update_from_moments(
        self, mean_sq: float, variance: float, size: int, inner_variance: float | None = None
    ) -> int:
        """Test a batch of ``size`` examples by its moments, those of :func:`gradient_moments`; returns the next size.

        For a batch in micro-batches or over several ranks, where ``update`` would see only a part. ``mean_sq`` is the
        squared norm of the mean gradient, ``variance`` the variance summed over all coordinates, and
        ``inner_variance`` that of <g_i, gbar>, needed for all tests but ``"norm"``.

        Raises:
            ValueError: ``inner_variance`` is missing, or the test is ``"coordinate_norm"``, which needs the gradients.
        """
        if self.test == "coordinate_norm":
            raise ValueError("test = 'coordinate_norm' needs the per-sample gradients: call update")
        if self.size >= self.max_batch_size:
            return self.size
        inner = None if inner_variance is None else float(inner_variance)
        moments = Moments(float(mean_sq), float(variance), int(size), inner)
        return self._grow(judge(self.test, moments, eta=self.eta, theta=self.theta, nu=self.nu))

    def micro_batches(self, max_micro_batch: int, world_size: int = 1) -> tuple[int, int]:
        """How to fit the next batch into memory: ``(micro_batch, steps)`` for gradient accumulation.

        ``micro_batch`` is at most ``max_micro_batch``, and ``micro_batch * steps * world_size`` is the least such
        product that is at least ``size``, for the fewest steps.

        >>> AdaptiveBatchSize(100, max_batch_size=1000).micro_batches(32)
        (25, 4)
        """
        for name, count in (("max_micro_batch", max_micro_batch), ("world_size", world_size)):
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} = {count!r} is out of range: an integer >= 1")
        steps = math.ceil(self.size / (max_micro_batch * world_size))
        return math.ceil(self.size / (steps * world_size)), steps

    def state_dict(self) -> dict[str, Any]:
        """Size and last test, in plain types; loads with ``weights_only=True``."""
        return {"size": self.size, "last": None if self.last is None else list(self.last)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; a size above this controller's ``max_batch_size`` is cut to it."""
        self.size = min(state_dict["size"], self.max_batch_size)
        self.last = None if state_dict["last"] is None else BatchTest(*state_dict["last"])

    def _grow(self, result: BatchTest) -> int:
        self.last = result
        if result.mean_norm_sq == 0:
            warnings.warn("the mean gradient is zero: no batch is large enough for the test", stacklevel=3)
        elif not (math.isfinite(result.statistic) and math.isfinite(result.mean_norm_sq)):
            warnings.warn(f"the gradients are not finite: the batch size stays {self.size}", stacklevel=3)
            return self.size
        if not result.passed:
            limit = self.max_batch_size
            if self.max_growth is not None:
                limit = min(limit, max(self.size + 1, int(self.max_growth * self.size)))
            self.size = max(self.size, int(min(result.size, limit)))
        return self.size


def apply(
    recipe: Recipe,
    *,
    eta: float = 1.0,
    initial: int | None = None,
    max_batch_size: int = 512,
    test: str = "norm",
    theta: float = 1.0,
    nu: float = 1.0,
    interval: int = 1,
    max_growth: float | None = None,
) -> Recipe:
    """The recipe with adaptive batches in place of equal ones; ``initial`` None means a quarter of the budget's size.

    The number of examples stays the budget's, so larger batches mean fewer steps. No batch exceeds the training set.
    """
    options: dict[str, Any] = {"test": test, "eta": eta, "theta": theta, "nu": nu}
    options |= {"interval": interval, "max_growth": max_growth}
    AdaptiveBatchSize(2 if initial is None else initial, max_batch_size=max_batch_size, **options)  # refuses early

    def batches(run: Run) -> _Batches:
        largest = max(2, min(max_batch_size, run.size))
        first = max(2, run.budget.batch_size // 4) if initial is None else initial
        return _Batches(run, AdaptiveBatchSize(min(first, largest), max_batch_size=largest, **options))

    return replace(recipe, batch=batches)


class _Batches:
    """Adaptive batches for the bench, whose test looks at the task's loss before each update."""

    def __init__(self, run: Run, controller: AdaptiveBatchSize) -> None:
        self.controller = controller
        self.sampler = AdaptiveBatchSampler(range(run.size), controller, generator=run.order)

    def __iter__(self) -> Iterator[list[int]]:
        # A remainder of one example has no variance, and batch normalization refuses it.
        return (batch for batch in self.sampler if len(batch) > 1)

    def before_update(self, run: Run, batch: Batch) -> None:
        if self.controller.due(run.step):
            self.controller.update(per_sample_grads(run.model, run.task.loss, batch.input, batch.target))
