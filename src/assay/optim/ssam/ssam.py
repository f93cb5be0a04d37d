"""SSAM: sharpness-aware minimization that perturbs a part of the weights only."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from assay.optim._sam import SAM, MaskPolicy
from assay.optim._wrapper import Base
from assay.optim.ssam.fisher import fisher_diagonal
from assay.optim.ssam.masks import DynamicMask, FisherMask, RandomMask, check_choice

if TYPE_CHECKING:
    from assay.bench.recipe import Recipe, Run

__all__ = ["SSAM", "DynamicMask", "FisherMask", "RandomMask", "fisher_diagonal"]


class SSAM(SAM):
    """Sparse SAM: SAM whose perturbation is kept on a part of the weights and zero on the others.

    With g the gradient of all parameters at w as one vector, and a mask M of zeros and ones ::

        eps = rho * T^2 g / (||T g|| + norm_eps) * M                    (T = 1; adaptive: T = diag |w|)
        w   <- w - base step with grad L(w + eps)                       (from w, restored exactly; all of w moves)

    The norm is that of the whole gradient, so that ||eps|| <= rho. ``update_mask`` chooses M anew, usually once an
    epoch; in between it stays as it is::

        optimizer.update_mask(model=model, loss_fn=loss_fn, data=train_set)      # mask="fisher"
        optimizer.update_mask(epoch=epoch, T_end=epochs)                          # mask="dynamic"

    Everything else, such as ``step(closure)``, ``first_step()`` and ``second_step()`` for loops that call backward
    themselves, and ``perturbed()``, is as in :class:`SAM`; with that, ``mask_density()`` is the share of ones in M.

    Args:
        params: parameters, groups with options of their own (``rho``, ``adaptive``, ``norm_eps`` and the base's), or a
            Module, whose normalization layers are then tracked (see ``bn_stats``).
        base_optimizer: a class such as ``torch.optim.SGD``, called with the parameters and ``base_options``; or an
            optimizer that exists.
        rho: radius, >= 0.
        mask: ``"fisher"`` (SSAM-F) for :class:`~assay.optim.sam.FisherMask`, ``"dynamic"`` (SSAM-D) for
            :class:`~assay.optim.sam.DynamicMask`; or any mask policy, which then has options of its own.
        sparsity: share of the weights that are *not* perturbed, in [0, 1]: 0 is SAM, 1 the base optimizer.
        drop_rate, drop, grow: of the dynamic mask.
        adaptive: ASAM, invariant to rescaling of weights.
        pattern, n, m, granularity: of the Fisher mask.
        norm: ``"full"``, as above; or ``"active"``: tensors that the mask leaves out whole get no gradient in the first
            pass, which ends at the lowest of the others. That saves time, and g is what is left.
        refresh: ``"after"`` chooses masks when the authors' code does, one step later (see the masks).
        seed: of the mask's draws.
        norm_eps: added to the norm, >= 0.
        bn_stats: in which of the two passes normalization layers update their running statistics: ``"first"``,
            ``"both"`` or ``"none"``.
        base_options: of the base optimizer's class.

    A mask costs one byte a weight, or a unit. Two passes a step, as in SAM: only ``norm="active"`` saves time.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: a sparse gradient; ``step`` without a closure; ``second_step`` without ``first_step``.

    Source: P. Mi et al., Make Sharpness-Aware Minimization Stronger, NeurIPS 2022, arXiv 2210.05177.

    >>> import torch
    >>> from assay.optim import SSAM
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = SSAM(model, torch.optim.SGD, rho=0.1, mask="dynamic", sparsity=0.5, lr=0.1, momentum=0.9)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = model(torch.ones(4, 2)).square().mean()
    ...     loss.backward()
    ...     return loss
    >>> for epoch in range(3):
    ...     optimizer.update_mask(epoch=epoch, T_end=3)
    ...     loss = optimizer.step(closure)
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Base,
        rho: float = 0.1,
        *,
        mask: str | MaskPolicy = "fisher",
        sparsity: float = 0.5,
        drop_rate: float = 0.5,
        drop: str = "gradient",
        grow: str = "random",
        adaptive: bool = False,
        pattern: str = "unstructured",
        n: int = 2,
        m: int = 4,
        granularity: str = "tensor",
        norm: str = "full",
        refresh: str = "before",
        seed: int = 0,
        norm_eps: float = 1e-7,
        bn_stats: str = "first",
        **base_options: Any,
    ) -> None:
        check_choice("norm", norm, ("full", "active"))
        if mask == "fisher":
            how: dict[str, Any] = {"pattern": pattern, "n": n, "m": m, "granularity": granularity}
            mask = FisherMask(sparsity, **how, seed=seed, refresh=refresh)
        elif mask == "dynamic":
            if pattern != "unstructured":
                raise ValueError(f"pattern = {pattern!r} is out of range: the dynamic mask is 'unstructured'")
            mask = DynamicMask(sparsity, drop_rate, drop, grow, seed=seed, refresh=refresh)
        elif mask is None or isinstance(mask, str):
            raise ValueError(f"mask = {mask!r} is out of range: 'fisher', 'dynamic' or a mask policy")
        super().__init__(
            params, base_optimizer, rho, adaptive=adaptive, norm_eps=norm_eps, mask=mask, bn_stats=bn_stats,
            **base_options,
        )  # fmt: skip
        self.norm = norm

    @contextlib.contextmanager
    def first_pass(self) -> Iterator[None]:
        """As in SAM; with ``norm="active"`` autograd does not differentiate by what is not perturbed."""
        off = [p for p in self.parameters() if p.requires_grad and p in self._has_mask().off]
        if self.norm == "full" or len(off) == sum(p.requires_grad for p in self.parameters()):
            off = []  # with nothing left, the closure's backward would be an error
        for p in off:
            p.requires_grad_(False)
        try:
            with super().first_pass():
                yield
        finally:
            for p in off:
                p.requires_grad_(True)


def apply(
    recipe: Recipe,
    *,
    rho: float = 0.1,
    mask: str = "fisher",
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    num_samples: int = 64,
    lr: float | None = None,
    weight_decay: float | None = None,
) -> Recipe:
    """SSAM around the recipe's own optimizer, with a new mask every epoch."""
    options = {name: x for name, x in (("lr", lr), ("weight_decay", weight_decay)) if x is not None}
    for name, value in options.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} = {value!r} is out of range: >= 0 and finite")

    def update(run: Run) -> SSAM:
        base = recipe.update(run)
        for group in base.param_groups:
            if missing := options.keys() - group.keys():
                raise ValueError(f"ssam: {type(base).__name__} has no option {', '.join(sorted(missing))}")
            group.update(options)
        optimizer = SSAM(run.model, base, rho, mask=mask, sparsity=sparsity, pattern=pattern)

        def refresh(*_: Any) -> None:
            epoch, step = divmod(run.step, max(1, run.size // run.budget.batch_size))
            if step == 0 and mask == "fisher":
                data, loss = run.data, run.task.loss
                optimizer.update_mask(model=run.model, loss_fn=loss, data=data, num_samples=num_samples)
            elif step == 0:
                optimizer.update_mask(epoch=epoch, T_end=run.epochs)

        optimizer.register_step_pre_hook(refresh)
        return optimizer

    return replace(recipe, update=update)
