"""Environments between stochastic and adversarial, with known variance and variation; and what a learner regrets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.optim.omd_sea.domains import Ball, Box, Simplex

LOSSES = ("linear", "quadratic")


@dataclass(frozen=True)
class OnlineLoss:
    """A round's loss f_t and its expectation F_t: <c, x>, or 1/2 ||x - c||^2; x of shape (..., d)."""

    c: Tensor
    mean: Tensor
    kind: str

    def __call__(self, x: Tensor) -> Tensor:
        return self._value(x, self.c)

    def grad(self, x: Tensor) -> Tensor:
        """The gradient of f_t at x."""
        return self.c.expand_as(x) if self.kind == "linear" else x - self.c

    def expected(self, x: Tensor) -> Tensor:
        """F_t(x), but for a constant."""
        return self._value(x, self.mean)

    def _value(self, x: Tensor, c: Tensor) -> Tensor:
        return x @ c if self.kind == "linear" else (x - c).square().sum(-1) / 2


class SEAEnvironment:
    """Losses of the stochastically extended adversarial model, with prescribed variance and variation.

    In round t = 1, ..., T nature picks a distribution, and from it a loss with coefficients ::

        c_t = s_t * amplitude * e_1 + sigma * noise_t / sqrt(d)         noise_t standard normal, (d,)
        f_t(x) = <c_t, x>    or    1/2 ||x - c_t||^2

    where the sign s_t is +1 at first and flips after every ``flip_every`` rounds. The two quantities that bound the
    regret are ``variance`` = sum_t E sup_x ||grad f_t - grad F_t||^2 = T sigma^2, and ``variation()`` = sum_t sup_x
    ||grad F_t - grad F_{t-1}||^2 with grad F_0 = 0. Iterate over it, or index it, for the losses: ``f(x)``,
    ``f.grad(x)`` and ``f.expected(x)``.

    Args:
        rounds: T, >= 1.
        dim: d, >= 1.
        sigma: root of the variance of a round's gradient, >= 0.
        flip_every: rounds between two flips of the sign, >= 1; None: no flip, losses drawn from one distribution.
        loss: ``"linear"`` or ``"quadratic"``.
        amplitude: size of the mean of c_t, >= 0.
        seed: of the noise.

    Raises:
        ValueError: an argument out of range.

    Source: S. Sachs et al., NeurIPS 2022, arXiv 2202.07554; S. Chen et al., JMLR 25 (2024), arXiv 2302.04552.

    >>> from assay.online import SEAEnvironment
    >>> environment = SEAEnvironment(rounds=128, sigma=0.5, flip_every=64)
    >>> environment.variance, environment.variation()
    (32.0, 5.0)
    """

    def __init__(
        self,
        rounds: int,
        dim: int = 4,
        *,
        sigma: float = 0.0,
        flip_every: int | None = 64,
        loss: str = "linear",
        amplitude: float = 1.0,
        seed: int = 0,
    ) -> None:
        for name, count in {
            "rounds": rounds,
            "dim": dim,
            "flip_every": 1 if flip_every is None else flip_every,
        }.items():
            if count < 1:
                raise ValueError(f"{name} = {count!r} is out of range: >= 1")
        for name, value in {"sigma": sigma, "amplitude": amplitude}.items():
            if not value >= 0:
                raise ValueError(f"{name} = {value!r} is out of range: a number >= 0")
        if loss not in LOSSES:
            raise ValueError(f"loss = {loss!r} is out of range: 'linear' or 'quadratic'")
        self.loss, self.sigma, self.amplitude = loss, sigma, amplitude
        blocks = torch.zeros(rounds, dtype=torch.long) if flip_every is None else torch.arange(rounds) // flip_every
        self.flips = int(blocks[-1])
        self.means = torch.zeros(rounds, dim, dtype=torch.float64)
        self.means[:, 0] = amplitude * (1 - 2 * (blocks % 2)).double()
        noise = torch.randn(rounds, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.coefficients = self.means + sigma * noise / dim**0.5

    def __len__(self) -> int:
        return len(self.means)

    def __getitem__(self, t: int) -> OnlineLoss:
        return OnlineLoss(self.coefficients[t], self.means[t], self.loss)

    def __iter__(self) -> Iterator[OnlineLoss]:
        return (self[t] for t in range(len(self)))

    @property
    def variance(self) -> float:
        """sigma^2_{1:T}."""
        return len(self) * self.sigma**2

    def variation(self, radius: float = 1.0) -> float:
        """Sigma^2_{1:T}, the supremum taken over the ball of this radius around 0."""
        first = self.amplitude + (radius if self.loss == "quadratic" else 0)
        return first**2 + self.flips * (2 * self.amplitude) ** 2

    def best_fixed(self, domain: Ball | Box | Simplex) -> Tensor:
        """The point of the domain with the least sum of losses, (d,)."""
        if self.loss == "linear":
            return domain.argmin(self.coefficients.sum(0))
        return domain.project(self.coefficients.mean(0))


def regret(losses: Sequence[Callable[[Tensor], Tensor]], decisions: Tensor, comparator: Tensor) -> Tensor:
    """How much more a learner lost than the comparator: sum_t f_t(x_t) - f_t(u_t).

    Args:
        losses: f_1, ..., f_T, functions of a point (d,); an iterable of them.
        decisions: x_1, ..., x_T, shape (T, d).
        comparator: a fixed point u, shape (d,), for static regret; or u_1, ..., u_T, shape (T, d), for dynamic regret.

    Returns:
        The sum, 0-d.

    Raises:
        ValueError: shapes or numbers of rounds that do not fit.

    >>> import torch
    >>> from assay.online import regret
    >>> regret([torch.sum, torch.sum], torch.tensor([[1.0, 0.0], [0.0, 0.5]]), torch.tensor([0.5, 0.0]))
    tensor(0.5000)
    """
    if decisions.dim() != 2 or comparator.shape not in (decisions.shape, decisions.shape[1:]):
        shapes = f"{tuple(decisions.shape)} and {tuple(comparator.shape)}"
        raise ValueError(f"decisions and comparator of shapes {shapes} are out of range: (T, d), and (d,) or (T, d)")
    rounds = list(losses)
    if len(rounds) != len(decisions):
        raise ValueError(f"losses of {len(rounds)} rounds are out of range: {len(decisions)}, as decisions")
    points = zip(rounds, decisions, comparator.expand_as(decisions), strict=True)
    return torch.stack([torch.as_tensor(f(x) - f(u)) for f, x, u in points]).sum()
