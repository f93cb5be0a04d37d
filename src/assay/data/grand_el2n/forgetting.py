"""How often each example was forgotten, counted while a network learns."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from assay.data._checks import count
from assay.data._selection import check_positions


class ForgettingTracker(nn.Module):
    """Counts how often each example was forgotten: answered rightly at one visit and wrongly at the next.

    ``score_i = number of visits t with correct_i(t - 1) = 1 and correct_i(t) = 0``, and +inf for an example that was
    never answered rightly. Larger is harder, as for the other scores. The counts are buffers: ``state_dict()`` and
    ``load_state_dict()`` carry them from one run to the next.

    Args:
        num_samples: number of examples N, at least 1.

    Source:
        Toneva et al.: An Empirical Study of Example Forgetting, ICLR 2019, arXiv 1812.05159, as compared with in
        Paul, Ganguli, Dziugaite (NeurIPS 2021, arXiv 2107.07075).

    Example:
        >>> import torch
        >>> from assay.data import ForgettingTracker
        >>> tracker = ForgettingTracker(3)
        >>> for correct in ([True, False, False], [False, True, False], [True, False, False], [False, True, False]):
        ...     tracker.update(torch.arange(3), torch.tensor(correct))
        >>> tracker.scores()
        tensor([2., 1., inf])
    """

    forgotten: Tensor
    correct: Tensor
    ever_correct: Tensor

    def __init__(self, num_samples: int) -> None:
        super().__init__()
        self.num_samples = count("num_samples", num_samples)
        self.register_buffer("forgotten", torch.zeros(num_samples, dtype=torch.int64))
        self.register_buffer("correct", torch.zeros(num_samples, dtype=torch.bool))
        self.register_buffer("ever_correct", torch.zeros(num_samples, dtype=torch.bool))

    def update(self, indices: Any, correct: Any) -> None:
        """Note one visit of each of ``indices`` (b,), in this order, and whether the answer was right (b,)."""
        indices = check_positions(indices, self.num_samples).to(self.correct.device)
        correct = torch.as_tensor(correct, device=indices.device).bool()
        if indices.shape != correct.shape:
            raise ValueError(f"indices {tuple(indices.shape)} and correct {tuple(correct.shape)}: both are (b,)")
        if indices.numel() == 0:
            return
        # An example may stand in a batch twice: its visits are brought together, in their order.
        order = indices.argsort(stable=True)
        indices, correct = indices[order], correct[order]
        again = torch.zeros_like(correct)
        again[1:] = indices[1:] == indices[:-1]
        before = torch.where(again, correct.roll(1), self.correct[indices])
        self.forgotten.index_add_(0, indices, (before & ~correct).long())
        last = ~again.roll(-1)
        self.correct[indices[last]] = correct[last]
        self.ever_correct[indices[correct]] = True

    def scores(self) -> Tensor:
        """Number of times that each example was forgotten, +inf where it was never known: (N,)."""
        return self.forgotten.to(torch.get_default_dtype()).masked_fill(~self.ever_correct, math.inf)
