"""MECO: maximum likelihood for unnormalized models, with a running estimate of the partition function."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from assay._distributed import all_reduce_max, all_reduce_sum
from assay.optim._rule import at_least_zero
from assay.optim._wrapper import WrappedOptimizer

FEW = 1.5
"""Effective number of noise samples below which one of them is all that a step sees of the partition function."""


def meco_loss(log_p_data: Tensor, log_ratio: Tensor, log_u: Tensor | float) -> Tensor:
    """A scalar whose gradient is MECO's direction: of the negative log-likelihood, with u for the partition function.

    For a model p~(x) / Z, data x_1..x_n, and samples z_1..z_k of a noise density q, with r_j = p~(z_j) / q(z_j) and u
    the running estimate of Z = E[r], a constant ::

        loss = - mean_i log p~(x_i) + mean_j stopgradient(r_j / u) log r_j
        grad = - mean_i grad log p~(x_i) + (1/u) mean_j grad r_j

    The value itself is no likelihood; ``log_u - log_p_data.mean()`` is.

    Args:
        log_p_data: log p~(x_i), shape (n,).
        log_ratio: log r_j = log p~(z_j) - log q(z_j), shape (k,); -inf where p~ is 0.
        log_u: log u, finite: what :class:`PartitionEstimator` gives.

    Raises:
        ValueError: another shape; NaN or +inf in ``log_ratio``, NaN in ``log_p_data``.

    Source: W. Jiang et al., Learning Unnormalized Statistical Models via Compositional Optimization, ICML 2023, arXiv
    2306.07485.

    >>> import torch
    >>> from assay.losses import meco_loss
    >>> log_ratio = torch.tensor([0.0, 1.0], requires_grad=True)
    >>> meco_loss(torch.zeros(3), log_ratio, log_u=0.0).backward()
    >>> log_ratio.grad
    tensor([0.5000, 1.3591])
    """
    _check(log_p_data, "log_p_data")
    _check(log_ratio, "log_ratio")
    weights = (log_ratio.detach() - log_u).exp()
    # A sample where p~ is 0 weighs nothing, and 0 * -inf must not make it NaN.
    terms = torch.where(weights > 0, weights * log_ratio, 0.0)
    return terms.mean() - log_p_data.mean()


def nce_loss(log_p_data_ratio: Tensor, log_p_noise_ratio: Tensor, nu: float = 1.0) -> Tensor:
    """Noise-contrastive estimation: the logistic loss of telling data from noise by the model's density.

    With G(x) = log p(x) - log q(x), where log p is *normalized*, usually by a parameter c of the model for -log Z ::

        loss = - mean_i log sigmoid(G(x_i) - log nu) - nu * mean_j log sigmoid(log nu - G(z_j))

    Args:
        log_p_data_ratio: G of the data, shape (n,).
        log_p_noise_ratio: G of samples of q, shape (k,).
        nu: how many samples of noise there are for one of the data, > 0.

    Raises:
        ValueError: an argument out of range; NaN in a ratio.

    Source: M. Gutmann and A. Hyvärinen, Noise-contrastive estimation, AISTATS 2010.

    >>> import torch
    >>> from assay.losses import nce_loss
    >>> nce_loss(torch.zeros(3), torch.zeros(3))  # a model that is the noise: 2 log 2
    tensor(1.3863)
    """
    _check(log_p_data_ratio, "log_p_data_ratio", allowed=math.inf)
    _check(log_p_noise_ratio, "log_p_noise_ratio", allowed=math.inf)
    if not 0 < nu < math.inf:
        raise ValueError(f"nu = {nu!r} is out of range: > 0 and finite")
    shift = math.log(nu)
    return -F.logsigmoid(log_p_data_ratio - shift).mean() - nu * F.logsigmoid(shift - log_p_noise_ratio).mean()


class PartitionEstimator:
    """A running estimate u of the partition function Z = E_q[p~ / q], kept as its logarithm.

    Each ``update`` with the ratios r_1..r_k of fresh samples of q mixes their mean in; the first sets it ::

        log_u = logaddexp(log(1 - gamma) + log_u, log(gamma) + logmeanexp(log_ratio))

    so that ``mean_j r_j / u <= 1 / gamma`` whatever is drawn: this bound keeps steps finite where the mean of a small
    batch alone would not. Where a process group is initialized, the mean is that of all processes' samples.

    ``log_z`` is the estimate; ``refine(log_ratio)`` replaces it by that of one big sample, for the trained model.
    ``ess`` is the effective number of the last samples, (sum r)^2 / sum r^2. Below 1.5 of more than one the estimate
    rests on a single sample, and ``update`` warns: q does not reach where p~ has its mass.

    Args:
        gamma: weight of the new mean, in (0, 1]; 1 remembers nothing.

    Raises:
        ValueError: ``gamma`` out of range; ratios of another shape than (k,), NaN, +inf, or at first all zero.

    Source: W. Jiang et al., ICML 2023, arXiv 2306.07485.

    >>> import torch
    >>> from assay.optim import PartitionEstimator
    >>> estimator = PartitionEstimator(gamma=0.5)
    >>> estimator.update(torch.tensor([2.0, 4.0]).log()).exp()
    tensor(3.)
    >>> estimator.update(torch.tensor([5.0, 5.0]).log()).exp()
    tensor(4.)
    """

    def __init__(self, gamma: float = 0.1) -> None:
        _in_half_open_unit(gamma=gamma)
        self.gamma = gamma
        self.log_u: Tensor | None = None
        self.ess = math.nan

    @torch.no_grad()
    def update(self, log_ratio: Tensor) -> Tensor:
        """Mix in the mean of fresh ratios; returns log u, 0-d and without gradient."""
        new = self._log_mean(log_ratio)
        if self.log_u is not None and self.gamma < 1:
            old = self.log_u.to(new)
            new = torch.logaddexp(old + math.log1p(-self.gamma), new + math.log(self.gamma))
        elif new == -math.inf:
            raise ValueError("log_ratio is -inf throughout: no sample of the noise lies where the model has mass")
        self.log_u = new
        return new

    @torch.no_grad()
    def refine(self, log_ratio: Tensor) -> Tensor:
        """Forget the running estimate for that of these samples alone; returns it."""
        self.log_u = None
        return self.update(log_ratio)

    @property
    def log_z(self) -> float:
        """The estimate of log Z; NaN before the first update."""
        return math.nan if self.log_u is None else self.log_u.item()

    def _log_mean(self, log_ratio: Tensor) -> Tensor:
        _check(log_ratio, "log_ratio")
        x = log_ratio.detach().to(torch.promote_types(log_ratio.dtype, torch.float32))
        top = all_reduce_max(x.max())
        shifted = (x - top.clamp(min=torch.finfo(x.dtype).min)).exp()  # all -inf: zeros, not NaN
        first, second, count = all_reduce_sum(
            torch.stack([shifted.sum(), shifted.square().sum(), torch.full_like(top, len(x))])
        )
        if count > 1 and second > 0:
            self.ess = (first.square() / second).item()
            if self.ess < FEW:
                warnings.warn(
                    f"of {int(count)} noise samples {self.ess:.2f} count: the noise does not reach where the model has "
                    "its mass, and the estimate of the partition function is not to be trusted",
                    stacklevel=4,  # of whoever called update or refine
                )
        return top + (first / count).log()

    def state_dict(self) -> dict[str, Any]:
        """The estimate and gamma."""
        return {"log_u": self.log_u, "gamma": self.gamma}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up again what :meth:`state_dict` gave."""
        self.log_u, self.gamma = state["log_u"], state["gamma"]


class MECO(WrappedOptimizer):
    """MECO: gradient descent on the negative log-likelihood of an unnormalized model, without sampling from it.

    For a density p~(x; theta) / Z(theta), data x_1..x_n, fresh samples z_1..z_k of a noise density q in each step, and
    r_j = p~(z_j; theta) / q(z_j) ::

        u     = (1 - gamma) u + gamma * mean_j r_j                        an estimate of Z; at first the mean
        d     = - mean_i grad log p~(x_i) + (1/u) mean_j grad r_j         (+ weight_decay * theta)
        v     = (1 - beta) v + beta * d                                   at first d
        theta = theta - lr * v

    The gradient of log Z is (grad Z) / Z, and the quotient of two means over the same small batch (gamma = 1) is a
    biased and noisy estimate of it; u, an average over steps, takes that away. A constant in log p~ changes nothing.

    ``step(closure)`` calls the closure once, with gradients on; it returns ``(log_p_data, log_ratio)`` and does *not*
    call backward. The optimizer does, and leaves d in ``.grad``. ``step`` returns the surrogate :func:`meco_loss`.
    ``optimizer.partition`` is the :class:`PartitionEstimator`, ``optimizer.log_z`` its estimate.

    Args:
        params: parameters, or groups of them with ``lr`` and ``weight_decay`` of their own.
        lr: >= 0.
        gamma: weight of the newest batch in u, in (0, 1].
        beta: weight of the newest direction in v, in (0, 1].
        weight_decay: >= 0.
        base: an optimizer of the same parameters, such as ``torch.optim.Adam(params)``, that is given d as its
            gradient in place of the last two lines; ``params``, ``lr``, ``beta`` and ``weight_decay`` then mean
            nothing. Groups, state and checkpoints are its own.

    Under DistributedDataParallel and FSDP2 every process brings its own data and noise; u and d are those of all.

    Raises:
        ValueError: an argument out of range; what :class:`PartitionEstimator` refuses of ``log_ratio``.
        RuntimeError: a step without a closure.

    Source: W. Jiang et al., Learning Unnormalized Statistical Models via Compositional Optimization, ICML 2023, arXiv
    2306.07485.

    >>> import torch
    >>> from assay.optim import MECO
    >>> theta = torch.zeros((), requires_grad=True)
    >>> optimizer = MECO([theta], lr=0.05)
    >>> noise, draw = torch.distributions.Normal(0.0, 3.0), torch.Generator().manual_seed(0)
    >>> def closure():
    ...     x, z = 2 + torch.randn(64, generator=draw), 3 * torch.randn(64, generator=draw)
    ...     return -((x - theta) ** 2) / 2, -((z - theta) ** 2) / 2 - noise.log_prob(z)
    >>> for _ in range(200):
    ...     loss = optimizer.step(closure)
    >>> abs(theta.item() - 2) < 0.3, abs(optimizer.log_z - 0.919) < 0.3  # Z is the root of 2 pi
    (True, True)
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        *,
        gamma: float = 0.1,
        beta: float = 0.1,
        weight_decay: float = 0.0,
        base: torch.optim.Optimizer | None = None,
    ) -> None:
        at_least_zero({"lr": lr, "weight_decay": weight_decay}, "lr", "weight_decay")
        _in_half_open_unit(gamma=gamma, beta=beta)
        if base is None:
            # Its buffer starts at the first gradient and is v from then on.
            base = torch.optim.SGD(params, lr, momentum=1 - beta, dampening=1 - beta, weight_decay=weight_decay)
        elif not isinstance(base, torch.optim.Optimizer):
            raise TypeError(f"base = {base!r} is out of range: None, or an optimizer that exists")
        self.partition = PartitionEstimator(gamma)
        super().__init__(None, base, {}, {})

    @property
    def log_z(self) -> float:
        """The running estimate of log Z; NaN before the first step."""
        return self.partition.log_z

    def step(self, closure: Callable[[], tuple[Tensor, Tensor]] | None = None) -> Tensor:  # type: ignore[override]
        """One update; ``closure()`` returns log p~ of the data and log p~ - log q of the noise."""
        if closure is None:
            raise RuntimeError("MECO needs the densities: call step(closure) with a closure that returns both")
        with torch.enable_grad():
            log_p_data, log_ratio = closure()
            loss = meco_loss(log_p_data, log_ratio, self.partition.update(log_ratio))
        self.zero_grad()
        loss.backward()
        self.base.step()
        return loss.detach()

    def wrapper_state(self) -> dict[str, Any]:
        return self.partition.state_dict()

    def load_wrapper_state(self, state: dict[str, Any]) -> None:
        self.partition.load_state_dict(state)


def _check(values: Tensor, name: str, allowed: float = -math.inf) -> None:
    """A list of logarithms without NaN, and of the infinities none but -inf, or ``allowed``."""
    if values.dim() != 1 or not len(values):
        hint = "; a model with a partition function for each context needs an estimator for each"
        raise ValueError(f"{name}.shape = {tuple(values.shape)} is out of range: (n,) with n >= 1{hint}")
    # One question to the device: a maximum passes NaN on.
    top = values.detach().max().item()
    if math.isnan(top) or top == math.inf > allowed:
        raise ValueError(f"{name} holds {top}, which is out of range: no NaN" + (", no inf" if allowed < 0 else ""))


def _in_half_open_unit(**options: float) -> None:
    for name, value in options.items():
        if not 0 < value <= 1:
            raise ValueError(f"{name} = {value!r} is out of range: (0, 1]")


__all__ = ["MECO", "PartitionEstimator", "meco_loss", "nce_loss"]
