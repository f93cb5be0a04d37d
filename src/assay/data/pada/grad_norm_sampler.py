"""Examples drawn in proportion to how large their gradients were in the epoch before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from assay._distributed import rows_by_rank
from assay.data._checks import count, one_of
from assay.data._scoring import error_norms
from assay.data._selection import check_positions
from assay.data.pada.mixing import pada_mix, running


class GradNormSampler(Sampler[int]):
    """Draws examples by the size of their gradients, more and more so as training goes on.

    In the training loop the norms of a batch are recorded as they fall due; at the end of epoch e = 0, ..., E - 1 ::

        h_i = what was recorded of example i in this epoch: g the first time, then (h_i + g) / 2; 0 if it was not drawn
        q   = tau * h / sum(h) + (1 - tau) / N            with tau = e / E, given as ``step(progress)``

    and the next epoch is N draws from q. The stochastic gradient's variance is least for q in proportion to the
    gradients' norms; ``record`` takes the norm of the error, || softmax(logits) - onehot(target) ||, in their place,
    which is that of the last layer's bias and costs nothing. The loss is not reweighted, so what is minimized leans
    towards the hard examples; multiplying each example's loss by ``weights(indices)`` undoes that.

    Give it to a ``DataLoader`` over an ``IndexedDataset`` as ``sampler=``.

    Args:
        num_samples: N, at least 1.
        tau: None: what ``step`` is told; a number in [0, 1]: that, always.
        replacement: whether draws are independent. If not, an epoch is every example once, in an order that brings
            likely ones to the front.
        generator: draws the epochs; None: one of its own, seeded from torch's global generator.
        average: ``"ema"``, half old, half new, or ``"mean"``, of the visits to an example in an epoch.
        rank, world_size: this process and how many there are. All draw one list, by generators seeded alike, and take
            disjoint slices of equal length; norms are exchanged in ``record``, which all call together.

    Raises:
        ValueError: an argument out of range; several processes without a generator.

    Source:
        Lu et al.: PA&DA: Jointly Sampling PAth and DAta for Consistent NAS, CVPR 2023, arXiv 2302.14772.

    Example:
        >>> import torch
        >>> from assay.data import GradNormSampler
        >>> sampler = GradNormSampler(4, generator=torch.Generator().manual_seed(0))
        >>> sampler.record_norms([0, 1, 2], [1.0, 2.0, 1.0])
        >>> sampler.step(progress=0.5)
        >>> sampler.probabilities
        tensor([0.2500, 0.3750, 0.2500, 0.1250], dtype=torch.float64)
    """

    def __init__(
        self,
        num_samples: int,
        *,
        tau: float | None = None,
        replacement: bool = True,
        generator: torch.Generator | None = None,
        average: str = "ema",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_samples = count("num_samples", num_samples)
        if tau is not None and not 0 <= tau <= 1:
            raise ValueError(f"tau = {tau!r} is out of range: None or [0, 1]")
        one_of("average", average, ("ema", "mean"))
        if not 0 <= rank < count("world_size", world_size):
            raise ValueError(f"rank = {rank!r} is out of range: [0, {world_size})")
        if generator is None and world_size > 1:
            raise ValueError("generator = None is out of range: several processes need generators seeded alike")
        self.tau, self.replacement, self.average = tau, replacement, average
        self.rank, self.world_size = rank, world_size
        self.generator = generator or torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        self.probabilities = torch.full((num_samples,), 1 / num_samples, dtype=torch.float64)
        self._norms = torch.zeros(num_samples, dtype=torch.float64)
        self._visits = torch.zeros(num_samples, dtype=torch.int64)

    def record(self, indices: Any, logits: Tensor, targets: Tensor) -> None:
        """Note the errors of a batch: positions (b,), logits (b, C), classes (b,) or probabilities (b, C)."""
        self.record_norms(indices, error_norms(logits.detach(), targets))

    @torch.no_grad()
    def record_norms(self, indices: Any, norms: Any) -> None:
        """Note gradient norms (b,) of the examples at ``indices`` (b,), finite and at least 0, in this order."""
        indices = check_positions(indices, self.num_samples)
        norms = torch.as_tensor(norms, dtype=torch.float64).detach().cpu()
        if norms.shape != indices.shape:
            raise ValueError(f"norms.shape = {tuple(norms.shape)} is out of range: {tuple(indices.shape)}")
        if not bool((norms >= 0).all() & norms.isfinite().all()):
            raise ValueError("norms hold a number that is not finite or below 0")
        if self.world_size > 1:
            indices, norms = torch.cat(rows_by_rank(indices)), torch.cat(rows_by_rank(norms))
        # An example that stands in the batch again is taken again, after the first time.
        while indices.numel():
            order = indices.argsort(stable=True)
            first = torch.ones(len(order), dtype=torch.bool)
            first[1:] = indices[order][1:] != indices[order][:-1]
            now, later = order[first], order[~first].sort().values
            running(self._norms, self._visits, indices[now], norms[now], self.average)
            indices, norms = indices[later], norms[later]

    def step(self, progress: float = 1.0) -> None:
        """End an epoch: draw the next ones by what it recorded, and forget that. ``progress`` is tau, e / E."""
        tau = progress if self.tau is None else self.tau
        self.probabilities = pada_mix(self._norms, 1 / self.num_samples, tau)
        self._norms.zero_()
        self._visits.zero_()

    def weights(self, indices: Any) -> Tensor:
        """1 / (N q_i) of the examples: as factors on their losses they make the gradient unbiased."""
        chosen = check_positions(indices, self.num_samples)
        return (1 / (self.num_samples * self.probabilities[chosen])).to(torch.get_default_dtype())

    def __len__(self) -> int:
        return -(-self.num_samples // self.world_size)

    def __iter__(self) -> Iterator[int]:
        total = len(self) * self.world_size
        generator, device = self.generator, self.generator.device
        if self.replacement:
            # By the cumulative sum: torch.multinomial takes no more than 2^24 categories.
            ends = self.probabilities.cumsum(0)
            drawn = torch.rand(total, generator=generator, device=device, dtype=torch.float64).cpu() * ends[-1]
            order = torch.searchsorted(ends, drawn, right=True).clamp(max=self.num_samples - 1)
        else:
            waits = torch.empty(self.num_samples, device=device, dtype=torch.float64).exponential_(generator=generator)
            order = (waits.cpu() / self.probabilities).argsort()
            order = torch.cat([order, order[: total - self.num_samples]])
        return iter(order[self.rank :: self.world_size].tolist())

    def state_dict(self) -> dict[str, Any]:
        return {
            "probabilities": self.probabilities.clone(),
            "norms": self._norms.clone(),
            "visits": self._visits.clone(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["norms"]) != self.num_samples:
            raise ValueError(f"num_samples = {len(state['norms'])} in the state is out of range: {self.num_samples}")
        self.probabilities, self._norms = state["probabilities"].clone(), state["norms"].clone()
        self._visits = state["visits"].clone()
        self.generator.set_state(state["generator"])
