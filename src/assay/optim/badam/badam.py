"""BAdam: Adam on one block of parameters after the other, with optimizer state for one block only."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from assay.optim._rule import at_least_zero, below_one
from assay.optim.badam.blocks import infer_blocks, named_groups
from assay.optim.badam.wrapper import BlockWrapper

if TYPE_CHECKING:
    from assay.bench.recipe import Recipe, Run

__all__ = ["BAdam", "BlockWrapper", "apply", "infer_blocks"]


class BAdam(BlockWrapper):
    """BAdam: full-parameter training with Adam's state for one block of the parameters at a time.

    In a visit of block i, with k = 1 ... K counting its steps and g the gradient of the loss for a parameter p in it ::

        m = beta1 * m + (1 - beta1) * g                v = beta2 * v + (1 - beta2) * g^2           from m = v = 0
        p = (1 - lr * weight_decay) * p - lr * (m / (1 - beta1^k)) / (sqrt(v / (1 - beta2^k)) + eps)

    while all other parameters stay as they are; then comes the next block. It is :class:`BlockWrapper` around
    ``torch.optim.AdamW`` (``decoupled=False``: ``torch.optim.Adam``, whose decay is part of g), with its arguments and
    methods. Parameters of fewer than two dimensions, biases and gains of normalizations, are not decayed, unless their
    group has a ``weight_decay`` of its own.

    Args:
        named_params: ``model.named_parameters()``, a Module, or groups with options of their own whose ``params`` are
            such pairs. Parameters without a name are called by their position, "0", "1", ...
        lr: learning rate, >= 0; a number or a tensor of one element.
        betas: decay rates of the two averages, each in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: of matrices, >= 0.
        blocks: for each block the prefixes of its parameters' names, or one prefix; None: :func:`infer_blocks`.
        switch_every: K, an integer >= 1; or ``"auto"``: num_samples // (batch_size * D), within [50, 100].
        order: ``"random"``, ``"ascending"``, ``"descending"`` or ``"fixed"``.
        always_active: prefixes of what is trained in all visits, and keeps its state.
        master_dtype: of the copies of active parameters of lower precision; None: no copies.
        freeze_inactive: whether ``requires_grad`` follows the active block.
        seed: of the random order.
        decoupled: whether weight decay is apart from the gradient.
        num_samples, batch_size: of the training data, for ``switch_every="auto"``.

    Raises:
        ValueError: an argument out of range; a block or prefix that no parameter is left for.
        RuntimeError: a sparse gradient; a step or switch after ``close()``.

    Source: Q. Luo, H. Yu, X. Li, BAdam, NeurIPS 2024, arXiv 2404.02827.

    >>> import torch
    >>> from assay.optim import BAdam
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
    >>> with BAdam(model.named_parameters(), lr=1e-3, blocks=["0", "2"], switch_every=50) as optimizer:
    ...     model(torch.ones(4, 4)).square().mean().backward()
    ...     optimizer.step()
    """

    def __init__(
        self,
        named_params: Any,
        lr: float | Tensor = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        blocks: Sequence[Sequence[str] | str] | None = None,
        switch_every: int | str = 100,
        order: str = "random",
        always_active: Sequence[str] = (),
        master_dtype: torch.dtype | None = torch.float32,
        freeze_inactive: bool = True,
        seed: int = 0,
        decoupled: bool = True,
        num_samples: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.check(options)
        super().__init__(
            functools.partial(torch.optim.AdamW if decoupled else torch.optim.Adam, **options),  # type: ignore[arg-type]
            _exempt(named_groups(named_params), weight_decay),
            blocks=blocks,
            switch_every=switch_every,
            order=order,
            always_active=always_active,
            master_dtype=master_dtype,
            freeze_inactive=freeze_inactive,
            seed=seed,
            num_samples=num_samples,
            batch_size=batch_size,
        )

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        lr = options["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr of shape {tuple(lr.shape)} is out of range: a number >= 0 or a tensor of one element")
        at_least_zero(options, "lr", "eps", "weight_decay")
        below_one(options, "betas")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; their names say to which block they belong."""
        if self.param_groups is not self.base.param_groups:
            return super().add_param_group(param_group)  # torch's constructor, meeting the base's own groups
        options = {name: self.defaults[name] for name in ("lr", "betas", "eps", "weight_decay")}
        groups = named_groups([param_group], start=len(self._named))
        for group in _exempt(groups, options["weight_decay"]):
            super().add_param_group({**options, **group})


def _exempt(groups: list[dict[str, Any]], weight_decay: float) -> list[dict[str, Any]]:
    """Vectors and scalars in groups of their own, without decay; a group that has its own decay stays."""
    found = []
    for group in groups:
        matrices = [(name, p) for name, p in group["params"] if p.dim() > 1]
        others = [(name, p) for name, p in group["params"] if p.dim() <= 1]
        if "weight_decay" in group or not weight_decay or not others:
            found.append(group)
        else:
            found += [{**group, "params": matrices}] if matrices else []
            found.append({**group, "params": others, "weight_decay": 0.0})
    return found


def apply(
    recipe: Recipe, *, lr: float = 1e-3, weight_decay: float = 0.0, switch_every: int = 20, order: str = "random"
) -> Recipe:
    """BAdam as a run's update: a block for each layer, or each matrix with the vectors after it; all have a turn."""

    def update(run: Run) -> BAdam:
        named = list(run.model.named_parameters())
        options = {"lr": lr, "weight_decay": weight_decay, "switch_every": switch_every, "order": order}
        return BAdam(named, blocks=_all_blocks(named), **options)  # type: ignore[arg-type]

    return replace(recipe, update=update)


def _all_blocks(named: list[tuple[str, nn.Parameter]]) -> list[list[str]]:
    try:
        return infer_blocks(named, include_embedding=True, include_head=True)
    except ValueError:
        blocks: list[list[str]] = []
        for name, p in named:
            if p.dim() > 1 or not blocks:
                blocks.append([])
            blocks[-1].append(name)
        return blocks
