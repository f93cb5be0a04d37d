"""Sparse SAM in patterns that save time: whole tensors or channels, N of M weights, and the implicit form of both."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from assay.optim._sam import SAM
from assay.optim._wrapper import Base
from assay.optim.ssam.masks import FisherMask
from assay.optim.ssam.ssam import apply as apply_ssam
from assay.optim.ssam_structured.layers import (
    ImplicitSparseConv2d,
    ImplicitSparseLinear,
    implicit_layers,
    to_implicit_sparse,
)
from assay.optim.ssam_structured.patterns import nm_mask, structured_mask

if TYPE_CHECKING:
    from assay.bench.recipe import Recipe

__all__ = [
    "ImplicitSSAM",
    "ImplicitSparseConv2d",
    "ImplicitSparseLinear",
    "nm_mask",
    "structured_mask",
    "to_implicit_sparse",
]


class ImplicitSSAM(SAM):
    """SAM whose first backward pass goes down through a part of the weights only.

    The model's linear and convolutional layers are those of :func:`assay.nn.to_implicit_sparse`. With M their masks ::

        g~  = gradient at w, where a layer's input gets g_out (W * M) in place of g_out W
        eps = rho * T^2 g~ / (||T g~|| + norm_eps)                      (T = 1; adaptive: T = diag |w|)
        w   <- w - base step with the exact gradient at w + eps         (from w, restored exactly)

    The perturbation is dense, in a direction that is SAM's up to what the masks leave out. The masks are chosen as by
    :class:`~assay.optim.sam.FisherMask` from Fisher information, which is computed exactly, by ::

        optimizer.update_mask(model=model, loss_fn=loss_fn, data=train_set)

    and are random until then. After a step, also one that an exception ends, every layer is exact again. A loop that
    calls backward itself takes its first pass within ``with optimizer.first_pass():``.

    Args:
        model: the network, after ``to_implicit_sparse``; all its parameters are optimized.
        base_optimizer: a class such as ``torch.optim.SGD``, called with the parameters and ``base_options``; or an
            optimizer that exists.
        rho: radius, >= 0.
        sparsity, pattern, n, m, granularity, num_samples, seed: of the masks, as of ``FisherMask``.
        group_dim: of the pattern ``"nm"``; ``"out"`` is the dimension that the masked product sums over.
        adaptive, norm_eps, bn_stats: as of :class:`~assay.optim.SAM`.
        base_options: of the base optimizer's class.

    Raises:
        ValueError: an argument out of range; a model without such a layer.
        RuntimeError: sharded parameters; a sparse gradient; ``step`` without a closure.

    Source: P. Mi et al., Systematic Investigation of Sparse Perturbed SAM, 2023, arXiv 2306.17504.

    >>> import torch
    >>> from assay.nn import to_implicit_sparse
    >>> from assay.optim import ImplicitSSAM
    >>> model = to_implicit_sparse(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)))
    >>> optimizer = ImplicitSSAM(model, torch.optim.SGD, rho=0.1, lr=0.1)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = model(torch.ones(3, 4)).square().mean()
    ...     loss.backward()
    ...     return loss
    >>> loss = optimizer.step(closure)
    >>> optimizer.mask_density()
    0.5
    """

    def __init__(
        self,
        model: nn.Module,
        base_optimizer: Base,
        rho: float = 0.1,
        *,
        sparsity: float = 0.5,
        pattern: str = "nm",
        n: int = 2,
        m: int = 4,
        granularity: str = "tensor",
        group_dim: str = "out",
        num_samples: int = 128,
        seed: int = 0,
        adaptive: bool = False,
        norm_eps: float = 1e-7,
        bn_stats: str = "first",
        **base_options: Any,
    ) -> None:
        self.layers = implicit_layers(model)
        if not self.layers:
            raise ValueError("model has no implicitly sparse layer: call to_implicit_sparse(model) first")
        if any(hasattr(p, "to_local") for p in model.parameters()):
            raise RuntimeError("ImplicitSSAM does not mask sharded weights")
        how: dict[str, Any] = {"pattern": pattern, "n": n, "m": m, "granularity": granularity, "group_dim": group_dim}
        self.chooser = FisherMask(sparsity, **how, num_samples=num_samples, seed=seed)
        super().__init__(
            model, base_optimizer, rho, adaptive=adaptive, norm_eps=norm_eps, bn_stats=bn_stats, **base_options
        )
        self.chooser.init(list(model.parameters()))
        self._hand_out()

    def _hand_out(self) -> None:
        """Give the layers their masks."""
        for layer in self.layers:
            layer.set_mask(self.chooser.masks[layer.weight])

    def update_mask(self, **context: Any) -> None:
        """Choose the masks now: ``model``, ``loss_fn``, ``data`` and ``num_samples`` as of ``fisher_diagonal``."""
        self.chooser.refresh(self, **context)
        self._hand_out()

    def mask_density(self) -> float:
        """Share of the layers' weights that the first backward pass goes through."""
        masks = [self.chooser.masks[layer.weight] for layer in self.layers]
        return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    @contextlib.contextmanager
    def first_pass(self) -> Iterator[None]:
        """Where the layers' inputs get their gradients through the masks."""
        try:
            for layer in self.layers:
                layer.set_origin(False)
            with super().first_pass():
                yield
        finally:
            for layer in self.layers:
                layer.set_origin(True)

    def wrapper_state(self) -> dict[str, Any]:
        return {"mask": self.chooser.state_dict()}

    def load_wrapper_state(self, state: dict[str, Any]) -> None:
        self.chooser.load_state_dict(state["mask"])
        self._hand_out()


def apply(
    recipe: Recipe,
    *,
    rho: float = 0.1,
    pattern: str = "structured",
    sparsity: float = 0.5,
    num_samples: int = 64,
    lr: float | None = None,
    weight_decay: float | None = None,
) -> Recipe:
    """SSAM in a pattern around the recipe's own optimizer, with a new mask every epoch."""
    how: dict[str, Any] = {"rho": rho, "pattern": pattern, "sparsity": sparsity, "num_samples": num_samples}
    return apply_ssam(recipe, **how, lr=lr, weight_decay=weight_decay)
