"""CFCD: a cosine softmax whose scale and margin follow the median of the batch, and triplets of local descriptors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay._distributed import all_gather_rows
from assay.losses.cfcd.descriptors import (
    GlobalDescriptor,
    local_descriptor_triplet,
    local_descriptors,
    match_descriptors,
    multi_scale_descriptors,
    unit_rows,
)
from assay.losses.cfcd.tuple_sampler import TupleSampler

if TYPE_CHECKING:
    from assay.bench.recipe import Batch, Objective, Recipe, Run

__all__ = [
    "GlobalDescriptor",
    "MadaCos",
    "TupleSampler",
    "local_descriptor_triplet",
    "local_descriptors",
    "madacos",
    "madacos_logits",
    "match_descriptors",
    "multi_scale_descriptors",
]

ALPHA, RHO, MIN_SCALE, MASS = 0.02, 1 - 1e-7, 32.0, "median_sample"
_MASSES = ("median_sample", "mean", "median")
_LEAST_GAP = 1e-6  # of the median cosine to 1: keeps the scale finite once half of a batch is perfect


def madacos_logits(
    cosine: Tensor,
    target: Tensor | None = None,
    *,
    alpha: float = ALPHA,
    rho: float = RHO,
    min_scale: float = MIN_SCALE,
    mass: str = MASS,
    training: bool = True,
    scale: Tensor | float | None = None,
) -> Tensor:
    """Logits of a cosine softmax with MadaCos's scale and margin.

    With c = ``cosine``, y = ``target``, c_i = c[i, y_i], and over the batches of all processes together ::

        m50    = lower median of the c_i, and i* its example
        scale  = max(min_scale, log(rho / (1 - rho) * (1 - alpha) / alpha) / (1 - m50))
        B_i    = sum over j != y_i of exp(scale * c[i, j]);    B = B_{i*}, or the mean or the lower median of the B_i
        margin = max(0, m50 - log(B * alpha / (1 - alpha)) / scale)
        logits[i, j] = scale * (c[i, j] - margin [j = y_i])

    Where neither stands at its bound, the softmax gives example i* the probability ``alpha`` for its own class, and
    would give ``rho`` to an example with cosine 1 and the same B. Scale and margin are constants for the gradient,
    which is ``scale * d loss / d logits`` with respect to c. 1 - m50 counts as at least 1e-6.

    With ``training=False`` there is no margin: the logits are ``scale * c``.

    Args:
        cosine: (b, C), in [-1, 1]; b and C at least 1 and 2. Half precision is computed and returned in float32.
        target: (b,) classes in [0, C); None is allowed with ``training=False`` and a ``scale``.
        alpha: in (0, 1), what is left of the median example's probability. The paper's experiments have 0.02.
        rho: in (0, 1).
        min_scale: greater than 0.
        mass: which B: ``"median_sample"``, ``"mean"`` or ``"median"``.
        training: whether there is a margin.
        scale: of ``training=False`` only. None takes the one of this batch and its targets, as the authors' code
            does; :class:`MadaCos` gives the last one of the training, so that no label enters a prediction.

    Raises:
        ValueError: an argument out of range, shapes that do not fit. A class out of range is torch's own error.

    Source:
        Zhu et al.: Coarse-to-Fine: Learning Compact Discriminative Representation for Single-Stage Image Retrieval,
        ICCV 2023, arXiv 2308.04008, section 3.2.

    Example:
        >>> import torch
        >>> from assay.losses import madacos_logits
        >>> cosine, target = torch.tensor([[0.9, 0.1], [0.3, 0.5], [0.2, 0.7]]), torch.tensor([0, 0, 1])
        >>> madacos_logits(cosine, target)[2].softmax(0)  # 0.7 is the median: alpha is left of its own class
        tensor([0.9800, 0.0200])
    """
    _check_options(alpha, rho, min_scale, mass)
    if cosine.dim() != 2 or len(cosine) < 1 or cosine.shape[1] < 2:
        raise ValueError(f"cosine.shape = {tuple(cosine.shape)} is out of range: (b, C), b >= 1, C >= 2")
    if training and scale is not None:
        raise ValueError(f"scale = {scale!r} is out of range: None in training, where the batch determines it")
    cosine = cosine.to(torch.promote_types(cosine.dtype, torch.float32))
    if target is None:
        if training or scale is None:
            raise ValueError("target = None is out of range: (b,) classes, unless training = False and scale is given")
        return scale * cosine
    if target.shape != cosine.shape[:1]:
        raise ValueError(f"target.shape = {tuple(target.shape)} is out of range: ({len(cosine)},)")
    if training:
        return _with_margin(cosine, target, *_scale_and_margin(cosine, target, alpha, rho, min_scale, mass))
    return (_scale_and_margin(cosine, target, alpha, rho, min_scale, mass)[0] if scale is None else scale) * cosine


def madacos(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    alpha: float = ALPHA,
    rho: float = RHO,
    min_scale: float = MIN_SCALE,
    mass: str = MASS,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of a cosine softmax whose scale and margin follow the batch's median.

    ``loss = cross_entropy(madacos_logits(c, target), target)`` with c the cosines between the rows of ``input`` and of
    ``weight``; see :func:`madacos_logits`. A row of zeros has cosine 0 with everything.

    Args:
        input: (b, d) features, not necessarily of unit length.
        target: (b,) classes in [0, C).
        weight: (C, d), a direction for each class.
        alpha, rho, min_scale, mass: as in :func:`madacos_logits`.
        reduction: ``"none"`` gives (b,); ``"sum"``; ``"mean"``.

    Raises:
        ValueError: an argument out of range, shapes that do not fit.

    Source:
        Zhu et al., ICCV 2023, arXiv 2308.04008, section 3.2.

    Example:
        >>> import torch
        >>> from assay.losses import madacos
        >>> features, labels = torch.tensor([[2.0, 1.0], [1.0, 1.2], [0.5, 1.0]]), torch.tensor([0, 0, 1])
        >>> madacos(features, labels, torch.eye(2), reduction="none")  # 3.9120 = -log(alpha)
        tensor([  3.9120, 112.9229,   3.9120])
    """
    if input.dim() != 2 or weight.dim() != 2 or input.shape[1] != weight.shape[1]:
        shapes = f"{tuple(input.shape)} with weight of shape {tuple(weight.shape)}"
        raise ValueError(f"input.shape = {shapes} is out of range: (b, d) and (C, d)")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction = {reduction!r} is out of range: 'none', 'mean' or 'sum'")
    logits = madacos_logits(_cosine(input, weight), target, alpha=alpha, rho=rho, min_scale=min_scale, mass=mass)
    return F.cross_entropy(logits, target, reduction=reduction).to(input.dtype)


class MadaCos(nn.Module):
    """The last layer of a classifier: cosines to a direction for each class, with MadaCos's scale and margin.

    In training ``forward(features, labels)`` is ``madacos_logits(cosine(features, weight), labels)``, to be given to
    an ordinary cross-entropy; scale and margin of the batch stay readable as ``last_scale`` and ``last_margin``. In
    evaluation it is ``last_scale * cosine``, with no margin and whatever the labels, which may be left out.

    ``last_scale`` (``min_scale`` before any training) and ``last_margin`` are buffers and part of ``state_dict()``.
    The cosines are computed in float32 at least, also under autocast.

    Args:
        in_features: d, at least 1.
        num_classes: C, at least 2.
        alpha, rho, min_scale, mass: as in :func:`madacos_logits`.

    Attributes:
        weight: (C, d), drawn from U(-1/sqrt(d), 1/sqrt(d)); its rows' lengths mean nothing.

    Raises:
        ValueError: an argument out of range, shapes that do not fit, no labels in training.

    Source:
        Zhu et al., ICCV 2023, arXiv 2308.04008, section 3.2.

    Example:
        >>> import torch
        >>> from assay.losses import MadaCos
        >>> head = MadaCos(in_features=8, num_classes=5)
        >>> features, labels = torch.randn(4, 8), torch.tensor([0, 3, 3, 1])
        >>> torch.nn.functional.cross_entropy(head(features, labels), labels).backward()
        >>> head.eval()(features).shape
        torch.Size([4, 5])
    """

    last_scale: Tensor
    last_margin: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        alpha: float = ALPHA,
        rho: float = RHO,
        min_scale: float = MIN_SCALE,
        mass: str = MASS,
    ) -> None:
        super().__init__()
        for name, value, least in (("in_features", in_features, 1), ("num_classes", num_classes, 2)):
            if not isinstance(value, Integral) or value < least:
                raise ValueError(f"{name} = {value!r} is out of range: an integer >= {least}")
        _check_options(alpha, rho, min_scale, mass)
        self.in_features, self.num_classes = in_features, num_classes
        self.alpha, self.rho, self.min_scale, self.mass = alpha, rho, min_scale, mass
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        self.register_buffer("last_scale", torch.tensor(float(min_scale)))
        self.register_buffer("last_margin", torch.tensor(0.0))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (b, C) of features (b, d)."""
        return self.logits(self.cosine(features), labels)

    def cosine(self, features: Tensor) -> Tensor:
        """Cosines (b, C) between features (b, d) and the classes' directions."""
        if features.dim() != 2 or features.shape[1] != self.in_features:
            raise ValueError(f"features.shape = {tuple(features.shape)} is out of range: (b, {self.in_features})")
        return _cosine(features, self.weight)

    def logits(self, cosine: Tensor, labels: Tensor | None = None) -> Tensor:
        """The second half of :meth:`forward`, for cosines (b, C) that are there already."""
        if not self.training:
            return self.last_scale * cosine
        if labels is None:
            raise ValueError("labels = None is out of range: (b,) classes, except in evaluation mode")
        if labels.shape != cosine.shape[:1] or len(labels) < 1:
            raise ValueError(f"labels.shape = {tuple(labels.shape)} is out of range: ({len(cosine)},), not empty")
        scale, margin = _scale_and_margin(cosine, labels, self.alpha, self.rho, self.min_scale, self.mass)
        self.last_scale.copy_(scale)
        self.last_margin.copy_(margin)
        return _with_margin(cosine, labels, scale, margin)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_classes={self.num_classes}, alpha={self.alpha}, mass={self.mass!r}"


@torch.no_grad()
def _scale_and_margin(
    cosine: Tensor, target: Tensor, alpha: float, rho: float, min_scale: float, mass: str
) -> tuple[Tensor, Tensor]:
    """Scale and margin, () each, of the batches of all processes together; without gradient."""
    own = target.unsqueeze(1)
    right = all_gather_rows(cosine.gather(1, own).squeeze(1))
    # Not median(): of equal cosines all processes and devices must choose the same example.
    ranked = right.sort(stable=True)
    middle = (len(right) - 1) // 2
    median = ranked.values[middle]
    odds = math.log(rho / (1 - rho)) + math.log((1 - alpha) / alpha)
    scale = (odds / (1 - median).clamp(min=_LEAST_GAP)).clamp(min=min_scale)
    # exp(scale * c) itself would overflow: the scale reaches hundreds, and its bound is 2e7.
    log_b = all_gather_rows((scale * cosine).scatter(1, own, -math.inf).logsumexp(1))
    if mass == "mean":
        chosen = log_b.logsumexp(0) - math.log(len(log_b))
    elif mass == "median":
        chosen = log_b.sort().values[middle]
    else:
        chosen = log_b[ranked.indices[middle : middle + 1]].squeeze(0)
    return scale, (median - (chosen + math.log(alpha / (1 - alpha))) / scale).clamp(min=0)


def _with_margin(cosine: Tensor, target: Tensor, scale: Tensor, margin: Tensor) -> Tensor:
    return scale * cosine.scatter_add(1, target.unsqueeze(1), -margin.expand(len(cosine), 1))


def _cosine(features: Tensor, weight: Tensor) -> Tensor:
    precise = torch.promote_types(torch.promote_types(features.dtype, weight.dtype), torch.float32)
    with torch.autocast(features.device.type, enabled=False):  # a scale of hundreds would multiply bfloat16's error
        return F.linear(unit_rows(features.to(precise)), unit_rows(weight.to(precise)))


def _check_options(alpha: float, rho: float, min_scale: float, mass: str) -> None:
    for name, value in (("alpha", alpha), ("rho", rho)):
        if not 0 < value < 1:
            raise ValueError(f"{name} = {value!r} is out of range: (0, 1)")
    if not 0 < min_scale < math.inf:
        raise ValueError(f"min_scale = {min_scale!r} is out of range: greater than 0")
    if mass not in _MASSES:
        raise ValueError(f"mass = {mass!r} is out of range: {', '.join(map(repr, _MASSES))}")


class _BareHead(MadaCos):
    """The head in a model that is called without labels: in training it leaves scale and margin to the objective."""

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.cosine(features) if self.training else super().forward(features)


def apply(recipe: Recipe, *, alpha: float = ALPHA, rho: float = RHO, min_scale: float = MIN_SCALE) -> Recipe:
    """MadaCos in place of a classifier's last linear layer and loss."""
    _check_options(alpha, rho, min_scale, MASS)

    def model(run: Run) -> nn.Module:
        if run.task.classes is None:
            raise ValueError("cfcd needs a classification task")
        network = recipe.model(run)
        name, last = _last_linear(network, run.task.classes)
        head = _BareHead(last.in_features, last.out_features, alpha=alpha, rho=rho, min_scale=min_scale)
        if not name:
            return head
        network.set_submodule(name, head)
        return network

    def objective(run: Run) -> Objective:
        heads = [module for module in run.model.modules() if isinstance(module, _BareHead)]
        if len(heads) != 1:
            raise ValueError(f"cfcd needs its own head in the model, once: other methods have left {len(heads)}")

        def loss(model: Callable[[Any], Any], batch: Batch) -> Tensor:
            return F.cross_entropy(heads[0].logits(model(batch.input), batch.target), batch.target)

        return loss

    return replace(recipe, model=model, objective=objective)


def _last_linear(network: nn.Module, classes: int) -> tuple[str, nn.Linear]:
    """The layer that gives the logits, and its name in the network: empty if it is the network."""
    linear = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear or linear[-1][1].out_features != classes:
        found = f"{linear[-1][1].out_features} outputs" if linear else "no nn.Linear at all"
        raise ValueError(f"cfcd needs a model whose last nn.Linear gives the {classes} logits; this one has {found}")
    return linear[-1]
