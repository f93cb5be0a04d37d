"""ECAML: a metric loss, and against it a term that pulls different classes together in the embedding layer alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from assay.losses.ecaml.base_losses import binomial_deviance, check_pairs_of, n_pair_loss, triplet_margin_loss
from assay.losses.ecaml.pair_batch_sampler import PairBatchSampler

__all__ = [
    "ECAML",
    "PairBatchSampler",
    "binomial_deviance",
    "energy_confusion",
    "n_pair_loss",
    "triplet_margin_loss",
]

if TYPE_CHECKING:
    from assay.bench.recipe import Batch, Objective, Recipe, Run

EPS = 1e-12
"""Below this E counts as zero: its logarithm stays finite and pulls no further."""

Pairs = Tensor | tuple[Tensor, Tensor]


def energy_confusion(
    embeddings: Tensor,
    labels: Tensor,
    *,
    pairs_per_sample: int = 10,
    log: bool = True,
    pairs: Pairs | None = None,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Energy confusion, the squared distance between embeddings of different classes, to be made small.

    Over pairs (i, j) with ``labels[i] != labels[j]`` ::

        E    = mean of 1/2 |embeddings[i] - embeddings[j]|^2
        loss = log max(E, 1e-12)                                  (E itself with ``log=False``)

    For each i, ``pairs_per_sample`` partners j are drawn without replacement, all examples of the other classes being
    equally likely; where there are fewer, all are taken. Without two classes the loss is 0. The gradient of log E is
    that of E divided by E: it does not depend on how E is normalized, and sum_i <grad_i, embeddings[i]> = 2 whatever
    their scale. Give it embeddings as they leave the layer, not normalized. Half precision is computed in float32.

    Args:
        embeddings: (N, d), floating point.
        labels: (N,), in any order.
        pairs_per_sample: at least 1.
        log: whether to take the logarithm.
        pairs: instead of drawing, (P, 2) indices (i, j), or two tensors i (P,) and j (P,); pairs within a class add
            nothing.
        generator: draws the partners; None: torch's global one.
        reduction: ``"mean"``, over the pairs used; ``"paper"``: their sum over the number of all pairs i < j of
            different classes in the batch, whether used or not.

    Returns:
        A scalar.

    Raises:
        ValueError: shapes that do not fit, an argument out of range.

    Source:
        Chen, Deng: Energy Confused Adversarial Metric Learning for Zero-Shot Image Retrieval and Clustering, AAAI
        2019, arXiv 1901.07169.

    Example:
        >>> import torch
        >>> from assay.losses import energy_confusion
        >>> x = torch.tensor([[0.0, 0.0], [0.0, 2.0], [4.0, 0.0]])
        >>> labels = torch.tensor([0, 0, 1])
        >>> energy_confusion(x, labels, log=False)  # (16 + 20 + 16 + 20) / 2 / 4
        tensor(9.)
        >>> energy_confusion(x, labels, pairs=torch.tensor([[0, 2]]))
        tensor(2.0794)
    """
    check_pairs_of(embeddings, labels)
    _check(pairs_per_sample)
    if reduction not in ("mean", "paper"):
        raise ValueError(f"reduction = {reduction!r} is out of range: 'mean' or 'paper'")
    chosen = _drawn(labels, pairs_per_sample, generator) if pairs is None else _given(pairs, labels.device)
    energy, some = _energy(embeddings, labels, chosen, reduction)
    return (_logarithm(energy, some) if log else energy).to(embeddings.dtype)


def _energy(
    embeddings: Tensor, labels: Tensor, pairs: tuple[Tensor, Tensor], reduction: str = "mean"
) -> tuple[Tensor, Tensor]:
    """E in at least float32, and whether there was any pair of different classes."""
    x = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    first, second = pairs
    different = (labels[first] != labels[second]).to(x.dtype)
    total = (different * (x[first] - x[second]).square().sum(1)).sum() / 2
    used = different.sum()
    count = used if reduction == "mean" else (labels[:, None] != labels).sum().to(x.dtype) / 2
    return total / count.clamp(min=1), used > 0


def _logarithm(energy: Tensor, some: Tensor) -> Tensor:
    return torch.where(some, energy.clamp(min=EPS).log(), torch.zeros_like(energy))


def _drawn(labels: Tensor, pairs_per_sample: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """For every example the partners with the largest of random keys; those that have run out pair with themselves."""
    n = len(labels)
    place = generator.device if generator is not None else labels.device
    keys = torch.rand(n, n, generator=generator, device=place).to(labels.device)
    keys = keys.masked_fill(labels[:, None] == labels, -1.0)
    largest, partners = keys.topk(min(pairs_per_sample, n), dim=1)
    itself = torch.arange(n, device=labels.device)[:, None].expand_as(partners)
    return itself.flatten(), torch.where(largest < 0, itself, partners).flatten()


def _given(pairs: Pairs, device: torch.device) -> tuple[Tensor, Tensor]:
    apart = isinstance(pairs, tuple | list) and len(pairs) == 2 and all(isinstance(side, Tensor) for side in pairs)
    indices = torch.stack(tuple(pairs), 1) if apart else torch.as_tensor(pairs)
    if indices.dim() != 2 or indices.shape[1] != 2:
        raise ValueError(f"pairs.shape = {tuple(indices.shape)} is out of range: (P, 2)")
    first, second = indices.to(device).unbind(1)
    return first, second


class ECAML(nn.Module):
    """Energy-confused adversarial metric learning: any metric loss, with energy confusion in the embedding layer.

    For features phi (N, p) of the backbone and labels (N,) ::

        loss = base_loss(embedding(phi), labels) + weight * energy_confusion(embedding(stop_gradient(phi)), labels)

    The two terms pull the weights of ``embedding`` in opposite directions, which is all that is adversarial here. The
    second one does not reach the backbone: the gradient of ``phi`` is that of ``base_loss`` alone, to the bit.
    ``weight=0`` is ``base_loss``. For retrieval use ``embedding(phi)`` as ever.

    ``embedding`` and a ``base_loss`` that is a module are submodules, so ``parameters()`` has theirs; where the model
    holds ``embedding`` as well, hand its parameters to the optimizer once. After a call, ``energy`` is E of that
    batch, without logarithm and gradient.

    Args:
        base_loss: ``base_loss(embeddings, labels)`` gives a scalar: those here, or a loss of pytorch-metric-learning.
        embedding: the last layer, from features to embeddings, usually ``torch.nn.Linear``; it is called twice.
        weight: of the energy confusion (lambda), at least 0; useful values lie between 0.01 and 1.
        pairs_per_sample: at least 1.
        log: whether its logarithm is minimized.

    Raises:
        ValueError: an argument out of range, or shapes that do not fit.
        TypeError: ``base_loss`` that cannot be called, ``embedding`` that is no module.

    Source:
        Chen, Deng: Energy Confused Adversarial Metric Learning for Zero-Shot Image Retrieval and Clustering, AAAI
        2019, arXiv 1901.07169.

    Example:
        >>> import torch
        >>> from assay.losses import ECAML, binomial_deviance
        >>> backbone, embedding = torch.nn.Linear(8, 6), torch.nn.Linear(6, 3)
        >>> criterion = ECAML(binomial_deviance, embedding, weight=0.13)
        >>> x, labels = torch.randn(4, 8), torch.tensor([0, 0, 1, 1])
        >>> loss = criterion(backbone(x), labels)
        >>> loss.backward()
        >>> embedding.weight.grad.shape
        torch.Size([3, 6])
    """

    def __init__(
        self,
        base_loss: Callable[[Tensor, Tensor], Tensor],
        embedding: nn.Module,
        *,
        weight: float = 0.13,
        pairs_per_sample: int = 10,
        log: bool = True,
    ) -> None:
        super().__init__()
        if not callable(base_loss):
            raise TypeError(f"base_loss = {base_loss!r} cannot be called")
        if not isinstance(embedding, nn.Module):
            raise TypeError(f"embedding = {embedding!r} is not a torch.nn.Module")
        _check(pairs_per_sample, weight)
        self.base_loss, self.embedding = base_loss, embedding
        self.weight, self.pairs_per_sample, self.log = weight, pairs_per_sample, log
        self.energy: Tensor | None = None

    def forward(self, features: Tensor, labels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The loss of features (N, p); ``generator`` draws the pairs of the energy confusion."""
        loss = self.base_loss(self.embedding(features), labels)
        if self.weight == 0:
            return loss
        embeddings = self.embedding(features.detach())
        energy, some = _energy(embeddings, labels, _drawn(labels, self.pairs_per_sample, generator))
        self.energy = energy.detach()
        return loss + self.weight * (_logarithm(energy, some) if self.log else energy).to(embeddings.dtype)

    def extra_repr(self) -> str:
        return f"weight={self.weight}, pairs_per_sample={self.pairs_per_sample}, log={self.log}"


def _check(pairs_per_sample: int, weight: float = 0.0) -> None:
    whole = isinstance(pairs_per_sample, Integral) and not isinstance(pairs_per_sample, bool)
    if not whole or pairs_per_sample < 1:
        raise ValueError(f"pairs_per_sample = {pairs_per_sample!r} is out of range: an integer >= 1")
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight = {weight!r} is out of range: [0, inf)")


def apply(recipe: Recipe, *, weight: float = 0.13, pairs_per_sample: int = 10, log: bool = True) -> Recipe:
    """The task's loss, and energy confusion in the layer that makes the logits."""
    _check(pairs_per_sample, weight)

    def objective(run: Run) -> Objective:
        if run.task.classes is None:
            raise ValueError("ecaml needs a classification task")
        head = _last_linear(run.model, run.task.classes)
        generator = torch.Generator()

        def loss(model: Callable[[Any], Any], batch: Batch) -> Tensor:
            seen: list[Tensor] = []
            # Only for this pass: a model with a hook left on it could not be pickled.
            hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            try:
                plain = run.task.loss(model(batch.input), batch.target)
            finally:
                hook.remove()
            # The same pairs where an optimizer asks for the loss of one step several times.
            generator.manual_seed(1_000_003 * run.seed + run.step)
            confusion = energy_confusion(
                head(seen[-1].detach()),
                batch.target,
                pairs_per_sample=pairs_per_sample,
                log=log,
                generator=generator,
            )
            return plain + weight * confusion

        return loss

    return replace(recipe, objective=objective)


def _last_linear(model: nn.Module, outputs: int) -> nn.Linear:
    found = [part for part in model.modules() if isinstance(part, nn.Linear) and part.out_features == outputs]
    if not found:
        raise ValueError(f"ecaml needs a model that ends in a torch.nn.Linear with {outputs} outputs, one a class")
    return found[-1]
