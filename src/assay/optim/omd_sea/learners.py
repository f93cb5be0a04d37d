"""Learners beside the optimizer: weights over experts, and a pool of step sizes for comparators that move."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from assay.optim.omd_sea.domains import Ball, Domain


class OptimisticHedge:
    """Optimistic Hedge: optimistic mirror descent on the simplex, in the geometry of the entropy.

    Weights p_t over n experts are played, then the experts' losses l_t are seen; m_t is a guess of them ::

        p_t      ~ q_t * exp(-lr_t * m_t)                         (play)
        q_{t+1}  ~ q_t * exp(-lr_t * l_t)         q_1 = prior     (update)

    ``lazy`` takes the sum of all losses instead, p_t ~ prior * exp(-lr_t * (l_1 + ... + l_{t-1} + m_t)): the same for a
    constant rate. Without a rate it follows what could not be guessed::

        lr_t = min(max_lr, sqrt(log(n) / (1 + sum_{s<t} max_i (l_{s,i} - m_{s,i})^2)))

    ``weights`` are those to play now; ``update(losses)`` ends the round and returns the next. With ``m = 0`` and a
    constant rate they are exponential weights.

    Args:
        n: number of experts, >= 1.
        lr: a constant rate, > 0; None: the formula above.
        prior: positive weights (n,) of any sum; None: equal ones.
        optimism: ``"last_loss"``: m_{t+1} = l_t; ``"none"``: 0; ``"external"``: what ``update`` is given as ``hint``.
        lazy: sum losses instead of updating weights.
        max_lr: > 0.
        dtype: of the weights.

    Raises:
        ValueError: an argument out of range, or losses of another shape than (n,).

    Source: S. Chen et al., JMLR 25 (2024), arXiv 2302.04552; A. Rakhlin and K. Sridharan, 2013, arXiv 1208.3728.

    >>> import torch
    >>> from assay.online import OptimisticHedge
    >>> hedge = OptimisticHedge(2, lr=1.0)
    >>> hedge.update(torch.tensor([0.0, 1.0]))
    tensor([0.8808, 0.1192], dtype=torch.float64)
    """

    def __init__(
        self,
        n: int,
        lr: float | None = None,
        *,
        prior: Tensor | None = None,
        optimism: str = "last_loss",
        lazy: bool = False,
        max_lr: float = 1.0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if n < 1:
            raise ValueError(f"n = {n!r} is out of range: >= 1")
        for name, value in (("lr", lr), ("max_lr", max_lr)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} = {value!r} is out of range: a number > 0")
        if optimism not in ("last_loss", "external", "none"):
            raise ValueError(f"optimism = {optimism!r} is out of range: 'last_loss', 'external' or 'none'")
        start = torch.ones(n, dtype=dtype) if prior is None else torch.as_tensor(prior, dtype=dtype)
        if start.shape != (n,) or not bool((start > 0).all()):
            raise ValueError(f"prior = {prior!r} is out of range: {n} positive weights")
        self.n, self.lr, self.optimism, self.lazy, self.max_lr = n, lr, optimism, lazy, max_lr
        self.log_prior = (start / start.sum()).log()
        self.log_weights = self.log_prior.clone()  # of q, or if lazy minus the sum of losses
        if lazy:
            self.log_weights = torch.zeros_like(self.log_prior)
        self.hint, self.surprise = torch.zeros_like(self.log_prior), 0.0

    @property
    def rate(self) -> float:
        """lr_t, of the round that is on."""
        if self.lr is not None:
            return self.lr
        return min(self.max_lr, math.sqrt(math.log(self.n) / (1 + self.surprise)))

    @property
    def weights(self) -> Tensor:
        """p_t, shape (n,): positive, with sum 1."""
        if self.lazy:
            logits = self.log_prior + self.rate * (self.log_weights - self.hint)
        else:
            logits = self.log_weights - self.rate * self.hint
        return torch.softmax(logits, 0).clamp(min=torch.finfo(logits.dtype).tiny)

    def update(self, losses: Tensor, hint: Tensor | None = None) -> Tensor:
        """End the round with these losses (n,); ``hint`` guesses the next ones if the optimism is external."""
        losses = self._checked("losses", losses)
        if (hint is not None) != (self.optimism == "external"):
            raise ValueError(f"hint = {hint!r} is out of range: given if, and only if, optimism = 'external'")
        self.log_weights = self.log_weights - (losses if self.lazy else self.rate * losses)
        if not self.lazy:
            self.log_weights = torch.log_softmax(self.log_weights, 0)
        self.surprise += (losses - self.hint).abs().max().item() ** 2
        if self.optimism == "last_loss":
            self.hint = losses
        elif hint is not None:
            self.hint = self._checked("hint", hint)
        return self.weights

    def _checked(self, name: str, x: Tensor) -> Tensor:
        x = torch.as_tensor(x).detach().to(self.log_prior)
        if x.shape != (self.n,):
            raise ValueError(f"{name}.shape = {tuple(x.shape)} is out of range: ({self.n},)")
        return x


class DynamicOMD:
    """A pool of optimistic learners under optimistic Hedge, for a comparator that moves (experimental).

    Learner i has the constant step size eta_i, from D / (G sqrt(T)) in powers of 2 up to 1 / (8 L). With x_{t,i} its
    point, p_t the weights over the learners, g_t the gradient at what is played, and g_0 = 0 ::

        x_t         = sum_i p_{t,i} x_{t,i}
        xhat_{t+1,i} = P[xhat_{t,i} - eta_i g_t]                            x_{t+1,i} = P[xhat_{t+1,i} - eta_i g_t]
        losses of i:  <g_t, x_{t,i}>     + 2 L ||x_{t,i} - x_{t-1,i}||^2
        guesses:      <g_{t-1}, x_{t,i}> + 2 L ||x_{t,i} - x_{t-1,i}||^2    max_lr = 1 / (8 D^2 L)

    so one gradient a round serves all of them. Against any points u_t, with P_T the length of their path, the regret is
    of the order P_T + sqrt(1 + P_T) (sqrt(sigma^2) + sqrt(Sigma^2)), in the terms of :class:`SEAEnvironment`.
    ``decision`` is x_t; ``update(gradient)`` ends the round and returns the next.

    Args:
        dim: d.
        diameter, lipschitz, smoothness: D of the domain, G and L of the losses, > 0.
        rounds: T, >= 1.
        domain: None: a ball of this diameter around 0.
        start: x_1, shape (d,); None: the projection of 0.
        dtype: of the points.

    Raises:
        ValueError: an argument out of range, or a gradient of another shape than (d,).

    Source: S. Chen et al., JMLR 25 (2024), arXiv 2302.04552; P. Zhao et al., Sword++, 2024, arXiv 2112.14368.

    >>> import torch
    >>> from assay.online import DynamicOMD
    >>> learner = DynamicOMD(2, diameter=2.0, lipschitz=1.0, smoothness=0.5, rounds=100)
    >>> for _ in range(100):
    ...     x = learner.update(torch.tensor([1.0, 0.0]))
    >>> x
    tensor([-1.,  0.], dtype=torch.float64)
    """

    def __init__(
        self,
        dim: int,
        *,
        diameter: float,
        lipschitz: float,
        smoothness: float,
        rounds: int,
        domain: Domain | None = None,
        start: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        for name, value in {"diameter": diameter, "lipschitz": lipschitz, "smoothness": smoothness}.items():
            if not value > 0:
                raise ValueError(f"{name} = {value!r} is out of range: a number > 0")
        for name, value in {"dim": dim, "rounds": rounds}.items():
            if value < 1:
                raise ValueError(f"{name} = {value!r} is out of range: >= 1")
        self.domain, self.penalty = domain or Ball(diameter / 2), 2 * smoothness
        least, most = diameter / (lipschitz * math.sqrt(rounds)), 1 / (8 * smoothness)
        count = max(1, math.ceil(math.log2(most / least)) + 1)
        self.step_sizes = (least * 2.0 ** torch.arange(count, dtype=dtype)).clamp(max=most)
        self.hedge = OptimisticHedge(count, optimism="external", max_lr=1 / (8 * diameter**2 * smoothness), dtype=dtype)
        first = self.domain.project(torch.zeros(dim, dtype=dtype) if start is None else start.to(dtype))
        self.middle = self.experts = first.expand(count, dim)
        self.moved = torch.zeros(count, dtype=dtype)

    @property
    def decision(self) -> Tensor:
        """x_t, shape (d,)."""
        return self.hedge.weights @ self.experts

    def update(self, gradient: Tensor) -> Tensor:
        """End the round with the gradient (d,) of its loss at ``decision``; returns the next decision."""
        g = torch.as_tensor(gradient).detach().to(self.experts)
        if g.shape != self.experts.shape[1:]:
            raise ValueError(f"gradient.shape = {tuple(g.shape)} is out of range: {tuple(self.experts.shape[1:])}")
        losses = self.experts @ g + self.penalty * self.moved
        step = self.step_sizes[:, None] * g
        self.middle = self.domain.project(self.middle - step)
        experts = self.domain.project(self.middle - step)
        self.moved, self.experts = (experts - self.experts).square().sum(1), experts
        self.hedge.update(losses, hint=experts @ g + self.penalty * self.moved)
        return self.decision
