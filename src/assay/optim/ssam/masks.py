"""Which weights are perturbed: by Fisher information, by exchange as in dynamic sparse training, or at random."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from assay.optim._sam import SAM
from assay.optim.ssam.fisher import fisher_diagonal
from assay.optim.ssam_structured.patterns import check_granularity, check_nm, nm_mask, structured_mask

SCORES = ("gradient", "weight", "random")
PATTERNS = ("unstructured", "structured", "nm")


class SparseMask:
    """What the masks here share: a bool tensor for each parameter, chosen jointly over all of them.

    A share ``sparsity`` of all weights is *not* perturbed: 0 is SAM, 1 the base optimizer.
    """

    moment = "now"

    def __init__(self, sparsity: float, seed: int) -> None:
        if not 0 <= sparsity <= 1:
            raise ValueError(f"sparsity = {sparsity!r} is out of range: [0, 1]")
        self.sparsity, self.seed = sparsity, seed
        self.draws = 0
        self.masks: dict[nn.Parameter, Tensor] = {}
        self.off: set[nn.Parameter] = set()
        """Parameters of which nothing is perturbed."""

    @property
    def size(self) -> int:
        """Number of all weights, N."""
        return sum(p.numel() for p in self.masks)

    def init(self, params: Sequence[nn.Parameter]) -> None:
        self.masks = dict.fromkeys(params, torch.empty(0))
        self.set_masks(self.first_masks())

    def first_masks(self) -> list[Tensor]:
        """The masks until the first refresh."""
        return largest(self.random_scores(), int(self.size * (1 - self.sparsity)))

    def apply(self, params: Sequence[nn.Parameter], eps: list[Tensor]) -> list[Tensor]:
        return [e.mul_(self.masks[p]) for p, e in zip(params, eps, strict=True)]

    def set_masks(self, masks: Sequence[Tensor]) -> None:
        """One mask for each parameter, in their order."""
        self.masks = {p: _placed(mask, p) for p, mask in zip(self.masks, masks, strict=True)}
        self.off = {p for p, mask in self.masks.items() if not _whole(mask).any()}

    def density(self) -> float:
        """Share of weights that are perturbed."""
        return sum(int(_whole(mask).sum()) for mask in self.masks.values()) / self.size

    def random_scores(self) -> list[Tensor]:
        """A random number for each weight, the same on all processes."""
        # Numbered draws rather than one stream: a checkpoint then needs no generator's state.
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.draws)
        self.draws += 1
        return [torch.rand(p.shape, generator=draw).to(p.device) for p in self.masks]

    def state_dict(self) -> dict[str, Any]:
        return {"draws": self.draws, "masks": list(self.masks.values())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.draws = state["draws"]
        self.set_masks(state["masks"])


class RandomMask(SparseMask):
    """Perturb a random share of the weights: the yardstick of every other mask.

    The mask holds int(N (1 - sparsity)) of all N weights. ``optimizer.update_mask()`` draws another one at once.

    Args:
        sparsity: share of weights that are not perturbed, in [0, 1].
        seed: of the draws; each refresh draws anew.

    Raises:
        ValueError: an argument out of range.

    >>> import torch
    >>> from assay.optim import SAM
    >>> from assay.optim.sam import RandomMask
    >>> optimizer = SAM(torch.nn.Linear(4, 2), torch.optim.SGD, mask=RandomMask(0.7), lr=0.1)
    >>> optimizer.mask_density()
    0.3
    """

    def __init__(self, sparsity: float = 0.5, *, seed: int = 0) -> None:
        super().__init__(sparsity, seed)

    def refresh(self, optimizer: SAM) -> None:
        self.set_masks(self.first_masks())


class FisherMask(SparseMask):
    """Perturb the weights with the largest Fisher information: the mask of SSAM-F.

    With F from :func:`fisher_diagonal`, and all N weights taken jointly, the mask holds by ``pattern``

    - ``"unstructured"``: the int(N (1 - sparsity)) weights with the largest F;
    - ``"structured"``: whole tensors or channels, those with the largest mean of F (see :func:`structured_mask`);
    - ``"nm"``: the n largest of every m consecutive weights (see :func:`nm_mask`) in tensors of two or more dimensions,
      and all of the others; sparsity is not looked at.

    ``optimizer.update_mask(model=..., loss_fn=..., data=...)`` chooses it, at once; until then F is random.

    Args:
        sparsity: share of weights that are not perturbed, in [0, 1].
        pattern: ``"unstructured"``, ``"structured"`` or ``"nm"``.
        n, m: of the pattern ``"nm"``, 0 <= n <= m.
        granularity: of the pattern ``"structured"``: ``"tensor"`` or ``"channel"``.
        group_dim: of the pattern ``"nm"``: ``"in"`` or ``"out"``.
        num_samples: examples for F, >= 1; ``update_mask(num_samples=...)`` may give another number.
        seed: of the first mask, and of which examples are drawn.
        refresh: ``"after"`` begins with a mask of zeros, as the authors' code does; ``"before"`` with a random one.

    Parameters that the model does not train or does not have count as F = 0. In training on several processes give
    every process the same data.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: a sharded parameter at a refresh.

    Source: P. Mi et al., Make Sharpness-Aware Minimization Stronger, NeurIPS 2022, arXiv 2210.05177;
    patterns: P. Mi et al., Systematic Investigation of Sparse Perturbed SAM, 2023, arXiv 2306.17504.

    >>> import torch
    >>> from assay.optim import SAM
    >>> from assay.optim.sam import FisherMask
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = SAM(model, torch.optim.SGD, mask=FisherMask(0.5, num_samples=4), lr=0.1)
    >>> x, y = torch.tensor([[1.0, 2.0, 0.0, 0.0]]).expand(8, 4), torch.zeros(8, dtype=torch.long)
    >>> optimizer.update_mask(model=model, loss_fn=torch.nn.functional.cross_entropy, data=(x, y))
    >>> optimizer.mask.masks[model.weight].int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0]]
    """

    def __init__(
        self,
        sparsity: float = 0.5,
        *,
        pattern: str = "unstructured",
        n: int = 2,
        m: int = 4,
        granularity: str = "tensor",
        group_dim: str = "in",
        num_samples: int = 128,
        seed: int = 0,
        refresh: str = "before",
    ) -> None:
        super().__init__(sparsity, seed)
        check_choice("pattern", pattern, PATTERNS)
        check_nm(n, m, group_dim)
        check_granularity(granularity)
        _check_num_samples(num_samples)
        check_choice("refresh", refresh, ("before", "after"))
        self.pattern, self.n, self.m, self.granularity, self.group_dim = pattern, n, m, granularity, group_dim
        self.num_samples, self.begins_at_zero = num_samples, refresh == "after"

    def first_masks(self) -> list[Tensor]:
        if self.begins_at_zero:
            return [torch.zeros(p.shape, dtype=torch.bool, device=p.device) for p in self.masks]
        return self.choose(self.random_scores())

    def choose(self, scores: list[Tensor]) -> list[Tensor]:
        """The masks by the pattern, of scores in the parameters' order."""
        if self.pattern == "unstructured":
            return largest(scores, int(self.size * (1 - self.sparsity)))
        if self.pattern == "structured":
            return list(structured_mask(dict(enumerate(scores)), self.sparsity, self.granularity).values())
        return [
            nm_mask(score, self.n, self.m, group_dim=self.group_dim)
            if score.dim() > 1
            else torch.ones_like(score, dtype=torch.bool)
            for score in scores
        ]

    def refresh(
        self,
        optimizer: SAM,
        *,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        data: Any,
        num_samples: int | None = None,
    ) -> None:
        count = self.num_samples if num_samples is None else num_samples
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.draws)
        self.draws += 1
        fisher = fisher_diagonal(model, loss_fn, data, count, generator=draw)
        scores = [fisher[p] if p in fisher else torch.zeros_like(p, requires_grad=False) for p in self.masks]
        self.set_masks(self.choose(scores))


class DynamicMask(SparseMask):
    """Perturb a mask that exchanges some of its weights now and then: the mask of SSAM-D.

    It begins at random with L = N - ceil(N sparsity) of all N weights. A refresh in epoch t exchanges the share ::

        a = drop_rate / 2 * (1 + cos(pi * (t - T_start) / (T_end - T_start)))        (t held within T_start and T_end)

    of them: the int(N (1 - sparsity) (1 - a)) live weights with the largest ``drop`` score stay, and so many of those
    that were dead before with the largest ``grow`` score become live that L stays what it is. (Are there fewer dead
    weights than would be exchanged, fewer are.) The scores are |gradient|, |weight| or a random number.

    ``optimizer.update_mask(epoch=t)`` refreshes in the next step, when the gradient at w is there.

    Args:
        sparsity: share of weights that are not perturbed, in [0, 1].
        drop_rate: largest share that is exchanged, in [0, 1]; 0 keeps the first mask.
        drop, grow: ``"gradient"``, ``"weight"`` or ``"random"``.
        T_start, T_end: epochs between which the share falls to 0; T_end None: it does not fall.
            ``update_mask(T_end=...)`` sets it later.
        seed: of all draws.
        refresh: ``"before"`` the ascent, or ``"after"`` it as in the authors' code: then ``"weight"`` scores see the
            perturbed weights, and the new mask counts from the next step on.

    Raises:
        ValueError: an argument out of range.

    Source: P. Mi et al., Make Sharpness-Aware Minimization Stronger, NeurIPS 2022, arXiv 2210.05177.

    >>> import torch
    >>> from assay.optim.sam import DynamicMask
    >>> mask = DynamicMask(0.5, drop_rate=0.4, T_end=200)
    >>> [round(mask.exchanged(epoch), 3) for epoch in (0, 100, 200)]
    [0.4, 0.2, 0.0]
    """

    def __init__(
        self,
        sparsity: float = 0.5,
        drop_rate: float = 0.5,
        drop: str = "gradient",
        grow: str = "random",
        *,
        T_start: int = 0,
        T_end: int | None = None,
        seed: int = 0,
        refresh: str = "before",
    ) -> None:
        super().__init__(sparsity, seed)
        if not 0 <= drop_rate <= 1:
            raise ValueError(f"drop_rate = {drop_rate!r} is out of range: [0, 1]")
        for name, value, allowed in (
            ("drop", drop, SCORES),
            ("grow", grow, SCORES),
            ("refresh", refresh, ("before", "after")),
        ):
            check_choice(name, value, allowed)
        self.drop_rate, self.drop, self.grow = drop_rate, drop, grow
        self.T_start, self.T_end = T_start, T_end
        self.moment = refresh
        self.epoch = T_start
        """The epoch of the next refresh that is told none."""

    def first_masks(self) -> list[Tensor]:
        return largest(self.random_scores(), self._live())

    def _live(self) -> int:
        return self.size - math.ceil(self.size * self.sparsity)

    def exchanged(self, epoch: int) -> float:
        """The share a of the live weights that a refresh in this epoch exchanges."""
        if self.T_end is None:
            return self.drop_rate
        if self.T_end <= self.T_start:
            raise ValueError(f"T_end = {self.T_end!r} is out of range: > T_start = {self.T_start}")
        progress = (epoch - self.T_start) / (self.T_end - self.T_start)
        return self.drop_rate / 2 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))

    def refresh(self, optimizer: SAM, *, epoch: int | None = None, T_end: int | None = None) -> None:
        self.T_end = self.T_end if T_end is None else T_end
        epoch = self.epoch if epoch is None else epoch
        share, live, every = self.exchanged(epoch), self._live(), self.size - self.size * self.sparsity
        count = min(max(live - int(every * (1 - share)), 0), self.size - live)
        masks = [_whole(mask) for mask in self.masks.values()]
        kept = largest(_only(masks, self._scores(self.drop)), live - count)
        grown = largest(_only([~mask for mask in masks], self._scores(self.grow)), count)
        self.set_masks([a | b for a, b in zip(kept, grown, strict=True)])
        self.epoch = epoch + 1

    def _scores(self, kind: str) -> list[Tensor]:
        if kind == "random":
            return self.random_scores()
        if kind == "weight":
            return [_whole(p.detach()).abs() for p in self.masks]
        # Without a gradient a weight is not perturbed: it counts as a gradient of 0.
        return [_whole(torch.zeros_like(p) if p.grad is None else p.grad).detach().abs() for p in self.masks]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "epoch": self.epoch, "T_end": self.T_end}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.epoch, self.T_end = state["epoch"], state["T_end"]


def largest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Masks of the ``count`` largest of all scores together."""
    device = scores[0].device
    flat = torch.cat([score.flatten().to(device, torch.promote_types(score.dtype, torch.float32)) for score in scores])
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(count, sorted=False).indices] = True
    parts = mask.split([score.numel() for score in scores])
    return [part.view(score.shape).to(score.device) for part, score in zip(parts, scores, strict=True)]


def _only(masks: Sequence[Tensor], scores: Sequence[Tensor]) -> list[Tensor]:
    """The scores where the masks are True, below all others elsewhere."""
    return [torch.where(mask, score, -math.inf) for mask, score in zip(masks, scores, strict=True)]


def _whole(x: Tensor) -> Tensor:
    """All of a sharded tensor, on every process."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def _placed(mask: Tensor, p: Any) -> Tensor:
    """The mask on its parameter's device, sharded as it is."""
    if not hasattr(p, "to_local"):
        return mask.to(p.device)
    if hasattr(mask, "to_local"):
        return mask
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(mask, p.device_mesh, p.placements)


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} = {value!r} is out of range: {', '.join(map(repr, allowed))}")


def _check_num_samples(num_samples: int) -> None:
    if not num_samples >= 1:
        raise ValueError(f"num_samples = {num_samples!r} is out of range: an integer >= 1")
