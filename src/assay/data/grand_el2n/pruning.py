"""Pruning as training goes on: all examples at first, the hardest of them in the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from assay.data._checks import count, one_of, share
from assay.data._selection import keep_by_score, offset_of


class PruningSampler(Sampler[int]):
    """Visits fewer and fewer examples from epoch to epoch, those with the highest scores.

    In epoch e = 0, ..., epochs - 1 the share s(p) of the examples takes part, with p = (e - begin) / (end - begin) cut
    to [0, 1] ::

        schedule "step":      s = 1 before epoch begin, keep from it on       (the paper's pruning, where begin = 0)
        schedule "linear":    s = 1 + (keep - 1) p
        schedule "cubic":     s = keep + (1 - keep) (1 - p)^3                 (most of it early)

    chosen by :func:`assay.data.keep_by_score` and visited in a new random order, which depends on (seed, e) alone. An
    epoch of fewer examples has fewer steps; train for more epochs if the number of steps is to stay.

    Give it to a ``DataLoader`` as ``sampler=`` and call ``set_epoch(e)`` before each epoch. Scores may be renewed on
    the way by ``update(scores)``: with those of a :class:`ForgettingTracker`, or of the model as it is now.

    Args:
        scores: (N,), without NaN, larger is harder.
        epochs: number of epochs, at least 1.
        keep: share that is left in the end, in (0, 1].
        schedule: ``"step"``, ``"linear"`` or ``"cubic"``.
        begin, end: epochs between which pruning happens, 0 <= begin <= end <= epochs; ``end=None``: the last epoch.
        seed: of the orders, and of mode "random".
        mode, offset, labels, balanced: which examples are kept, as in :func:`assay.data.keep_by_score`.

    Raises:
        ValueError: an argument out of range, or scores of another length than before.

    Source:
        Pruning by score: Paul, Ganguli, Dziugaite, NeurIPS 2021, arXiv 2107.07075. The cubic schedule is that of
        M. Zhu, S. Gupta, 2017, arXiv 1710.01878, who prune weights.

    Example:
        >>> import torch
        >>> from assay.data import PruningSampler
        >>> sampler = PruningSampler(torch.tensor([0.9, 0.1, 0.5, 0.7]), epochs=3, keep=0.5, schedule="linear")
        >>> for epoch in range(3):
        ...     sampler.set_epoch(epoch)
        ...     print(sampler.share, sorted(sampler))
        1.0 [0, 1, 2, 3]
        0.75 [0, 2, 3]
        0.5 [0, 3]
    """

    def __init__(
        self,
        scores: Any,
        epochs: int,
        keep: float = 0.5,
        *,
        schedule: str = "cubic",
        begin: int = 0,
        end: int | None = None,
        seed: int = 0,
        mode: str = "max",
        offset: float = 0,
        labels: Any = None,
        balanced: bool = False,
    ) -> None:
        self.epochs, self.keep = count("epochs", epochs), share("keep", keep)
        one_of("schedule", schedule, ("step", "linear", "cubic"))
        end = epochs - 1 if end is None else end
        if not 0 <= begin <= end <= epochs:
            raise ValueError(f"begin = {begin!r} and end = {end!r} are out of range: 0 <= begin <= end <= {epochs}")
        self.schedule, self.begin, self.end, self.seed = schedule, begin, end, seed
        self._how = {"mode": mode, "offset": offset, "labels": labels, "balanced": balanced}
        self.epoch = 0
        self.scores = torch.as_tensor(scores).detach().cpu().clone()
        keep_by_score(self.scores, self.keep, **self._how)  # refuses now what it would refuse in the last epoch

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next, from 0; epochs after the last one stay pruned as it is."""
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"epoch = {epoch!r} is out of range: an integer >= 0")
        self.epoch = epoch

    def update(self, scores: Any) -> None:
        """Choose by these scores from now on."""
        scores = torch.as_tensor(scores).detach().cpu()
        if scores.shape != self.scores.shape or scores.isnan().any():
            raise ValueError(
                f"scores.shape = {tuple(scores.shape)} is out of range: {tuple(self.scores.shape)}, no NaN"
            )
        self.scores = scores.clone()

    @property
    def share(self) -> float:
        """Share of the examples that takes part in this epoch."""
        if self.schedule == "step":
            return self.keep if self.epoch >= self.begin else 1.0
        passed = 1.0 if self.epoch >= self.end else max(0, self.epoch - self.begin) / max(1, self.end - self.begin)
        left = 1 - passed if self.schedule == "linear" else (1 - passed) ** 3
        return self.keep + (1 - self.keep) * left

    def indices(self) -> Tensor:
        """Positions of the examples of this epoch, sorted."""
        # While more is kept than lies above the offset, the window starts lower.
        skipped = min(offset_of(self._how["offset"], len(self.scores)), len(self.scores) - len(self))
        how = {**self._how, "offset": skipped}
        return keep_by_score(self.scores, self.share, **how, generator=self._generator(0))

    def __len__(self) -> int:
        return round(self.share * len(self.scores))

    def __iter__(self) -> Iterator[int]:
        chosen = self.indices()
        order = torch.randperm(len(chosen), generator=self._generator(self.epoch + 1))
        return iter(chosen[order].tolist())

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(1_000_003 * self.seed + stream)

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores.clone(), "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.update(state["scores"])
        self.set_epoch(state["epoch"])
