"""An output layer whose classes are subspaces."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay._checks import in_range
from assay.nn.grassmann_class.geometry import angles_between, grassmann_geodesic_step, grassmann_rgrad, orthonormal
from assay.nn.grassmann_class.sgd import GrassmannSGD, is_grassmann, with_grassmann

if TYPE_CHECKING:
    from assay.bench.recipe import Recipe, Run

__all__ = [
    "GrassmannLinear",
    "GrassmannSGD",
    "apply",
    "grassmann_geodesic_step",
    "grassmann_rgrad",
    "with_grassmann",
]


class _Subspaces(nn.Parameter):
    """A parameter whose matrices stand for their columns' spans, as optimizers can see; so are its copies."""

    manifold = "grassmann"

    def __deepcopy__(self, memo: dict[int, Any]) -> _Subspaces:
        if id(self) not in memo:
            memo[id(self)] = _Subspaces(copy.deepcopy(self.data, memo), self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _Subspaces, (self.data, self.requires_grad)


class GrassmannLinear(nn.Module):
    """The last layer of a classifier: a class is a subspace, its logit the length of the feature's projection onto it.

    With S_i the n x k matrix of class i, of orthonormal columns ::

        logit_i = gamma || S_i^T x / ||x|| ||          in [0, gamma]; gamma exactly where x lies in the subspace

    The sign of x does not matter, nor the basis of a subspace. Loss and prediction are the usual ones. The weight must
    stay orthonormal: train it with :class:`assay.optim.GrassmannSGD`, or :func:`assay.optim.with_grassmann` beside
    another optimizer, which know it by ``weight.manifold``.

    Args:
        in_features: n.
        num_classes: C.
        subspace_dim: k, in [1, n].
        gamma: > 0, the scale of the logits.
        normalize: divide x by its norm; a feature of zeros has logits 0.

    Input (..., n), output (..., C). ``weight`` has shape (C, n, k).

    Raises:
        ValueError: an argument out of range.

    Source: H. Wang, Z. Li, W. Zhang, Get the Best of Both Worlds: Improving Accuracy and Transferability by Grassmann
    Class Representation, ICCV 2023, arXiv 2308.01547.

    >>> import torch
    >>> from assay.nn import GrassmannLinear
    >>> head = GrassmannLinear(64, 10, subspace_dim=4)
    >>> features = torch.randn(3, 64)
    >>> torch.allclose(head(features), head(-2 * features)), bool(head(features).max() < 25)
    (True, True)
    """

    weight: nn.Parameter

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        subspace_dim: int = 8,
        gamma: float = 25.0,
        normalize: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("num_classes", num_classes)):
            in_range(name, value, value >= 1, ">= 1")
        in_range("subspace_dim", subspace_dim, 1 <= subspace_dim <= in_features, f"in [1, {in_features}]")
        in_range("gamma", gamma, 0 < gamma < math.inf, "> 0 and finite")
        self.in_features, self.num_classes, self.subspace_dim = in_features, num_classes, subspace_dim
        self.gamma, self.normalize = gamma, normalize
        shape = (num_classes, in_features, subspace_dim)
        self.weight = _Subspaces(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random subspaces: the spans of matrices of independent normal numbers."""
        with torch.no_grad():
            self.weight.normal_()
        self.retract_()

    @torch.no_grad()
    def retract_(self) -> None:
        """Make the columns of each class orthonormal again; subspaces stay what they are."""
        wide = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        self.weight.copy_(orthonormal(wide))

    def forward(self, input: Tensor) -> Tensor:
        x = F.normalize(input, dim=-1) if self.normalize else input
        projected = F.linear(x, self.weight.mT.flatten(0, 1)).unflatten(-1, (self.num_classes, self.subspace_dim))
        return self.gamma * torch.linalg.vector_norm(projected, dim=-1)

    def projector(self) -> Tensor:
        """S_i S_i^T of every class, shape (C, n, n): what a class is, whatever its basis."""
        return self.weight @ self.weight.mT

    @torch.no_grad()
    def principal_angles(self, i: int, j: int) -> Tensor:
        """The k principal angles between the subspaces of two classes in radians, ascending."""
        return angles_between(self.weight[i], self.weight[j])

    @classmethod
    def from_reference_weight(cls, weight: Tensor, subspace_dim: int, **options: Any) -> GrassmannLinear:
        """A layer with the weight of the authors' code, whose (C k, n) rows are the columns of the classes."""
        in_range("rows of weight", len(weight), len(weight) % subspace_dim == 0, f"a multiple of {subspace_dim}")
        columns = weight.detach().unflatten(0, (-1, subspace_dim)).mT
        layer = cls(columns.shape[1], len(columns), subspace_dim, device=weight.device, dtype=weight.dtype, **options)
        with torch.no_grad():
            layer.weight.copy_(columns)
        return layer

    def extra_repr(self) -> str:
        said = f"in_features={self.in_features}, num_classes={self.num_classes}, subspace_dim={self.subspace_dim}"
        return f"{said}, gamma={self.gamma}, normalize={self.normalize}"


def apply(
    recipe: Recipe,
    *,
    subspace_dim: int = 8,
    gamma: float = 25.0,
    grassmann_lr: float = 0.1,
    momentum: float = 0.9,
    reorth_every: int = 1,
) -> Recipe:
    """The recipe with subspaces as classes, trained by Riemannian SGD beside the recipe's own optimizer.

    The last linear layer with an output for each class is replaced; ``grassmann_lr`` is the first rate of its weight,
    and follows the schedule.
    """
    in_range("grassmann_lr", grassmann_lr, 0 < grassmann_lr < math.inf, "> 0 and finite")

    def model(run: Run) -> nn.Module:
        network = recipe.model(run)
        linear = {name: m for name, m in network.named_modules() if type(m) is nn.Linear}
        heads = [name for name, m in linear.items() if m.out_features == run.task.classes]
        if not heads:
            raise ValueError("grassmann-class needs a linear layer with an output for each class of the task")
        old, (parent, _, child) = linear[heads[-1]], heads[-1].rpartition(".")
        dim = min(subspace_dim, old.in_features)
        factory: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
        new = GrassmannLinear(old.in_features, old.out_features, dim, gamma, **factory)
        if not child:
            return new
        setattr(network.get_submodule(parent), child, new)
        return network

    def update(run: Run) -> torch.optim.Optimizer:
        optimizer = recipe.update(run)
        heads = [p for p in run.model.parameters() if is_grassmann(p)]
        for group in optimizer.param_groups:
            kept = [i for i, p in enumerate(group["params"]) if not is_grassmann(p)]
            for name in ("params", "param_names"):
                if name in group:
                    group[name] = [group[name][i] for i in kept]
        factor = grassmann_lr / float(optimizer.param_groups[0]["lr"])
        return with_grassmann(optimizer, heads, lr_factor=factor, momentum=momentum, reorth_every=reorth_every)

    return replace(recipe, model=model, update=update)
