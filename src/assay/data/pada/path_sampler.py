"""Paths through a super-network, drawn by how large the gradients of their operations were."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from assay.data._checks import count, one_of
from assay.data.pada.mixing import pada_mix

Norms = Mapping[int, Any] | Sequence[Any] | Tensor


class PathSampler:
    """Draws an operation for every edge, by the gradients that the operations had in the epoch before.

    After each step, for every operation k on the path, with G_k the mean over the edges that chose it of the summed
    norms of its parameters' gradients, and at the end of epoch e = 0, ..., E - 1 ::

        R_k = (R_k + G_k) / 2     if G_k > 0            (R = 0 at the start of every epoch)
        p   = tau * R / sum(R) + (1 - tau) / K          with tau = e / E, given as ``step(progress)``

    All edges draw from the one p, or, if ``num_choices`` is a list, each from its own.

    Args:
        num_choices: K, the number of operations on every edge; or a list of it, one number an edge.
        parametric: which of the K operations have parameters; None: all. (For a list of choices: a list of masks.)
        tau: None: what ``step`` is told; a number in [0, 1]: that, always.
        generator: draws the paths; None: one of its own, seeded from torch's global generator.
        average: ``"ema"``, as above, or ``"mean"``: R_k is the mean of the G_k of an epoch.
        nonparametric: what operations without parameters get for R, which have no gradient: ``"zero"``, as in the
            authors' code, which leaves them at (1 - tau) / K; or ``"mean"``, the mean R of the others.

    Raises:
        ValueError: an argument out of range.

    Source:
        Lu et al.: PA&DA: Jointly Sampling PAth and DAta for Consistent NAS, CVPR 2023, arXiv 2302.14772.

    Example:
        >>> import torch
        >>> from assay.data import PathSampler
        >>> sampler = PathSampler(3, generator=torch.Generator().manual_seed(0))
        >>> path = sampler.sample(num_edges=4)
        >>> sampler.record([0, 2, 2, 2], {0: 1.0, 2: 9.0})  # sums over the edges: 1 and 9 / 3
        >>> sampler.step(progress=0.5)
        >>> sampler.probabilities
        tensor([0.2917, 0.1667, 0.5417], dtype=torch.float64)
    """

    def __init__(
        self,
        num_choices: int | Sequence[int],
        *,
        parametric: Any = None,
        tau: float | None = None,
        generator: torch.Generator | None = None,
        average: str = "ema",
        nonparametric: str = "zero",
    ) -> None:
        self.shared = isinstance(num_choices, int)
        sizes = [num_choices] if isinstance(num_choices, int) else list(num_choices)
        for size in sizes or [0]:
            count("num_choices", size)
        if tau is not None and not 0 <= tau <= 1:
            raise ValueError(f"tau = {tau!r} is out of range: None or [0, 1]")
        one_of("average", average, ("ema", "mean"))
        one_of("nonparametric", nonparametric, ("zero", "mean"))
        self.tau, self.average, self.nonparametric = tau, average, nonparametric
        self.generator = generator or torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        self._parametric = _masks(parametric, sizes, self.shared)
        self._probabilities = [torch.full((size,), 1 / size, dtype=torch.float64) for size in sizes]
        self._norms = [torch.zeros(size, dtype=torch.float64) for size in sizes]
        self._records = [torch.zeros(size, dtype=torch.int64) for size in sizes]

    @property
    def probabilities(self) -> Any:
        """Probabilities of the operations: (K,), or one such tensor for each edge."""
        return self._probabilities[0] if self.shared else list(self._probabilities)

    def sample(self, num_edges: int | None = None) -> list[int]:
        """An operation for each edge; ``num_edges`` is needed where all edges have the same choices."""
        if self.shared:
            edges = self._probabilities * count("num_edges", num_edges)  # type: ignore[arg-type]
        elif num_edges in (None, len(self._probabilities)):
            edges = self._probabilities
        else:
            raise ValueError(f"num_edges = {num_edges!r} is out of range: {len(self._probabilities)}")
        generator, device = self.generator, self.generator.device
        drawn = torch.rand(len(edges), generator=generator, device=device, dtype=torch.float64).cpu()
        ends = [p.cumsum(0) for p in edges]
        return [min(int((end <= u * end[-1]).sum()), len(end) - 1) for end, u in zip(ends, drawn, strict=True)]

    @torch.no_grad()
    def record(self, path: Sequence[int], grad_norms: Norms) -> None:
        """Note the gradients of a step on ``path``.

        ``grad_norms`` holds the summed norms of each operation over its edges, ``{operation: number}`` as
        :func:`path_grad_norms` gives them, or one number for each edge. Operations that are not on the path are
        ignored.
        """
        for where, k, norm in self._by_operation(list(path), grad_norms):
            if not bool(norm >= 0) or not bool(norm.isfinite()):
                raise ValueError(f"grad_norms = {norm.item()!r} of operation {k} is out of range: finite and >= 0")
            if norm == 0:
                continue
            seen = int(self._records[where][k])
            weight = 0.5 if self.average == "ema" else 1 / (seen + 1)
            self._norms[where][k] += weight * (norm - self._norms[where][k])
            self._records[where][k] += 1

    def _by_operation(self, path: list[int], norms: Norms) -> Iterable[tuple[int, int, Tensor]]:
        """(which distribution, operation, its mean norm over the edges that chose it)."""
        named = isinstance(norms, Mapping)
        if not named and len(norms) != len(path):
            raise ValueError(f"grad_norms of {len(norms)} edges, but the path has {len(path)}")
        if not self.shared:
            if named or len(path) != len(self._norms):
                raise ValueError(f"a path of {len(self._norms)} edges, and a number for each, are needed")
            found = [(edge, k, norms[edge]) for edge, k in enumerate(path)]
        else:
            chosen = sorted(set(path))
            sums = norms if named else {k: sum(n for j, n in zip(path, norms, strict=True) if j == k) for k in chosen}
            found = [(0, k, sums[k] / path.count(k)) for k in chosen if k in sums]
        for where, k, norm in found:
            if not 0 <= k < len(self._norms[where]):
                raise ValueError(f"path holds operation {k!r}: out of range [0, {len(self._norms[where])})")
            yield where, k, torch.as_tensor(norm, dtype=torch.float64).cpu()

    def step(self, progress: float = 1.0) -> None:
        """End an epoch: draw the next ones by what it recorded, and forget that. ``progress`` is tau, e / E."""
        tau = progress if self.tau is None else self.tau
        for where, norms in enumerate(self._norms):
            mask = self._parametric[where]
            norms = norms * mask
            if self.nonparametric == "mean" and mask.any():
                norms = torch.where(mask, norms, norms[mask].mean())
            self._probabilities[where] = pada_mix(norms, 1 / len(norms), tau)
            self._norms[where].zero_()
            self._records[where].zero_()

    def state_dict(self) -> dict[str, Any]:
        held = {"probabilities": self._probabilities, "norms": self._norms, "records": self._records}
        copies: dict[str, Any] = {name: [x.clone() for x in tensors] for name, tensors in held.items()}
        return {**copies, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        sizes, mine = ([len(x) for x in tensors] for tensors in (state["norms"], self._norms))
        if sizes != mine:
            raise ValueError(f"num_choices = {sizes} in the state is out of range: {mine}")
        self._probabilities, self._norms, self._records = (
            [x.clone() for x in state[name]] for name in ("probabilities", "norms", "records")
        )
        self.generator.set_state(state["generator"])


def _masks(parametric: Any, sizes: list[int], shared: bool) -> list[Tensor]:
    if parametric is None:
        return [torch.ones(size, dtype=torch.bool) for size in sizes]
    masks = [torch.as_tensor(mask, dtype=torch.bool) for mask in ([parametric] if shared else parametric)]
    if [mask.shape for mask in masks] != [(size,) for size in sizes]:
        raise ValueError(f"parametric of shapes {[tuple(mask.shape) for mask in masks]} is out of range: {sizes}")
    return masks


@torch.no_grad()
def path_grad_norms(modules_per_op: Mapping[int, Iterable[nn.Module]]) -> dict[int, Tensor]:
    """For each operation the sum, over its modules on the path and their parameters, of the gradients' norms.

    ``sum over modules, over their parameters w, of || grad w ||_2``; parameters without a gradient add nothing. One
    pass over all of them, and nothing is read back from the device. Clear gradients (``zero_grad``) between steps: a
    module that was on an earlier path would still hold its old ones, but only those given here are looked at.

    Args:
        modules_per_op: for each operation number its modules on the path, over edges and cells.

    Returns:
        0-d tensors by operation number, for :meth:`PathSampler.record`.

    Source:
        Lu et al.: PA&DA, CVPR 2023, arXiv 2302.14772.

    Example:
        >>> import torch
        >>> from assay.data import path_grad_norms
        >>> layer = torch.nn.Linear(2, 1)
        >>> layer(torch.tensor([[3.0, 4.0]])).sum().backward()
        >>> path_grad_norms({1: [layer], 2: [torch.nn.Identity()]})  # || (3, 4) || + |1|
        {1: tensor(6.), 2: tensor(0.)}
    """
    held = {
        k: [p.grad for module in modules for p in module.parameters() if p.grad is not None]
        for k, modules in modules_per_op.items()
    }
    norms = iter(torch._foreach_norm([g for grads in held.values() for g in grads]) if any(held.values()) else [])
    return {k: sum((next(norms) for _ in grads), torch.zeros(())) for k, grads in held.items()}
