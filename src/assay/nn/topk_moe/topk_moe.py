"""Top-K softmax gating: the Gaussian mixture of experts of the theory, and a sparse layer to train with its advice."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from assay._checks import in_range
from assay.nn._experts import Routing, check_k, full_precision, noisy_routing
from assay.nn.meo.meo import MoELinear
from assay.nn.topk_moe.em import fit_em
from assay.nn.topk_moe.mixture import Atoms, lines, log_gate, log_joint, spread
from assay.nn.topk_moe.voronoi import min_selected_experts, voronoi_cells, voronoi_loss

__all__ = [
    "TopKGaussianMoE",
    "TopKMoE",
    "fit_em",
    "min_selected_experts",
    "suggest_k",
    "voronoi_cells",
    "voronoi_loss",
]

SELECTIONS = ("unbiased", "biased", "noisy")


class TopKGaussianMoE(nn.Module):
    """A density p(y | x) of E Gaussian experts behind a top-K sparse softmax gate.

    ::

        S(x)    = the K experts with the largest beta1_e . x           beta0 has no say in it
        gate_e  = exp(beta1_e . x + beta0_e) / sum_{j in S(x)} exp(beta1_j . x + beta0_j)    for e in S(x), else 0
        p(y|x)  = sum_e gate_e N(y | a_e . x + b_e, sigma_e^2)

    Adding one vector to all ``beta1`` and one number to all ``beta0`` changes nothing. With K = 1 the gate is 1 for the
    expert that is selected: ``beta0`` has no effect at all, and ``beta1`` only by its order.

    Shapes: x (n, d), y (n,). Called as a layer it returns the mean of y, (n,). Parameters, which start as standard
    normal numbers with ``beta0`` and ``log_sigma`` at 0: ``beta0``, ``b``, ``log_sigma`` (E,), ``beta1``, ``a`` (E, d).

    Args:
        d: >= 1.
        n_experts: E >= 1.
        k: K in [1, E].

    Raises:
        ValueError: an argument out of range; on input, a wrong shape.

    Source: H. Nguyen, P. Akbarian, F. Yan, N. Ho, Statistical Perspective of Top-K Sparse Softmax Gating Mixture of
    Experts, ICLR 2024, arXiv 2309.13850.

    >>> import torch
    >>> from assay.nn.gaussian_moe import TopKGaussianMoE
    >>> model = TopKGaussianMoE(2, n_experts=4, k=2)
    >>> x = torch.randn(5, 2)
    >>> y = model.sample(x)
    >>> model.log_prob(x, y).shape, (model.gate(x) > 0).sum(1)
    (torch.Size([5]), tensor([2, 2, 2, 2, 2]))
    """

    beta0: nn.Parameter
    beta1: nn.Parameter
    a: nn.Parameter
    b: nn.Parameter
    log_sigma: nn.Parameter

    def __init__(
        self,
        d: int,
        n_experts: int,
        k: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("d", d), ("n_experts", n_experts)):
            in_range(name, value, isinstance(value, int) and value >= 1, "an integer >= 1")
        check_k(k, n_experts)
        self.d, self.n_experts, self.k = d, n_experts, k
        for name in Atoms._fields:
            shape = (n_experts, d) if name in ("beta1", "a") else (n_experts,)
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Standard normal; ``beta0`` and ``log_sigma`` 0."""
        for name, parameter in self.named_parameters():
            if name in ("beta0", "log_sigma"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter)

    @property
    def atoms(self) -> Atoms:
        """All parameters, by name."""
        return Atoms(*(getattr(self, name) for name in Atoms._fields))

    def gate(self, x: Tensor) -> Tensor:
        """The gates, (n, E): K of a row are above 0, and they sum to 1."""
        self._check(x)
        with full_precision(x):
            weights, experts = log_gate(self.atoms, x.to(self.a.dtype), self.k)
            return spread(weights.exp(), experts, self.n_experts).T

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x)
        with full_precision(x):
            return (gates * self._means(x.to(self.a.dtype))).sum(-1)

    def log_prob(self, x: Tensor, y: Tensor) -> Tensor:
        """log p(y | x), (n,)."""
        self._check(x)
        if y.shape != x.shape[:1]:
            raise ValueError(f"y of shape {tuple(y.shape)}: {tuple(x.shape[:1])} is wanted")
        with full_precision(x):
            x, y = x.to(self.a.dtype), y.to(self.a.dtype)
            return log_joint(self.atoms, x, y, *log_gate(self.atoms, x, self.k)).logsumexp(-2)

    @torch.no_grad()
    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One y for each x, (n,)."""
        expert = torch.multinomial(self.gate(x), 1, generator=generator)
        mean = self._means(x).gather(1, expert).squeeze(1)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + self.log_sigma.exp()[expert.squeeze(1)] * noise

    @torch.no_grad()
    def expected_hellinger(self, other: TopKGaussianMoE, x: Tensor, n_grid: int = 1024) -> Tensor:
        """The mean over x of the Hellinger distance between the two densities of y, in [0, 1].

        ``h^2 = 1/2 int (sqrt p - sqrt q)^2 dy``, which is ``1 - int sqrt(p q) dy`` without its loss of digits, by the
        trapezoidal rule on ``n_grid`` points, for each x from 8 sigma below the lowest selected mean to 8 above the
        highest.

        Args:
            other: a model with equal d.
            x: shape (n, d), a sample of the inputs.
            n_grid: >= 2; fine enough for the smallest sigma.

        Raises:
            ValueError: an argument out of range.
        """
        in_range("n_grid", n_grid, isinstance(n_grid, int) and n_grid >= 2, "an integer >= 2")
        in_range("d of other", other.d, other.d == self.d, f"{self.d}")
        limits = [model._range(x) for model in (self, other)]
        low = torch.minimum(limits[0][0], limits[1][0])
        high = torch.maximum(limits[0][1], limits[1][1])
        grid = low.unsqueeze(1) + (high - low).unsqueeze(1) * torch.linspace(
            0, 1, n_grid, device=x.device, dtype=x.dtype
        )
        roots = []
        for model in (self, other):
            # Every x beside all its grid points.
            each = x.unsqueeze(1).expand(-1, n_grid, -1).flatten(0, 1)
            roots.append(torch.exp(0.5 * model.log_prob(each, grid.flatten())).view_as(grid))
        squared = 0.5 * torch.trapezoid((roots[0] - roots[1]).square(), grid)
        return squared.clamp(max=1).sqrt().mean()

    def _means(self, x: Tensor) -> Tensor:
        return lines(self.a, x).T + self.b

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        selected, mean, reach = self.gate(x) > 0, self._means(x), 8 * self.log_sigma.exp()
        low = torch.where(selected, mean - reach, math.inf).amin(1)
        return low, torch.where(selected, mean + reach, -math.inf).amax(1)

    def _check(self, x: Tensor) -> None:
        if x.dim() != 2 or x.shape[1] != self.d:
            raise ValueError(f"x of shape {tuple(x.shape)}: (n, {self.d}) is wanted")

    def extra_repr(self) -> str:
        return f"{self.d}, n_experts={self.n_experts}, k={self.k}"


class TopKMoE(MoELinear):
    """A sparse layer of E linear experts, K of them for each input, with the gate of the theory or of common practice.

    ::

        s    = x w_gate
        S    = the K experts with the largest s ("unbiased"), s + gate_bias ("biased"), or logits ("noisy")
        y    = sum_{e in S} g_e (W_e x + b_e)          g = softmax over S of the logits s + gate_bias

    With "noisy" the logits carry learned noise in training, as in :class:`assay.nn.MoELinear`, which this is otherwise:
    ``aux_loss`` has the balance loss of the last call. How large K should be: :func:`suggest_k`.

    Shapes: x (*, ``d_in``) -> (*, ``d_out``); ``mask`` (*) is true for real inputs, the output of the others is 0.

    Args:
        d_in, d_out: >= 1.
        n_experts: E >= 1.
        k: K in [1, E].
        selection: "unbiased", "biased" or "noisy".
        bias: whether the experts have one.
        noise_epsilon: smallest deviation of the noise, >= 0.

    Raises:
        ValueError: an argument out of range; on input, a wrong shape.

    Source: H. Nguyen, P. Akbarian, F. Yan, N. Ho, Statistical Perspective of Top-K Sparse Softmax Gating Mixture of
    Experts, ICLR 2024, arXiv 2309.13850.

    >>> import torch
    >>> from assay.nn import TopKMoE, suggest_k
    >>> layer = TopKMoE(16, 8, n_experts=6, k=suggest_k(n_experts=6, true_experts=4, true_k=2))
    >>> layer(torch.randn(32, 16)).shape
    torch.Size([32, 8])
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        n_experts: int,
        k: int,
        *,
        selection: str = "unbiased",
        bias: bool = True,
        noise_epsilon: float = 1e-2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (("d_in", d_in), ("d_out", d_out), ("n_experts", n_experts)):
            in_range(name, value, isinstance(value, int) and value >= 1, "an integer >= 1")
        in_range("selection", selection, selection in SELECTIONS, "'unbiased', 'biased' or 'noisy'")
        super().__init__(
            d_in,
            d_out,
            n_experts,
            k,
            level="token",
            bias=bias,
            noisy_gating=selection == "noisy",
            noise_epsilon=noise_epsilon,
            device=device,
            dtype=dtype,
        )
        self.selection = selection
        self.gate_bias = nn.Parameter(torch.zeros(n_experts, device=device, dtype=dtype))
        self._reset_gate()

    def _reset_gate(self) -> None:
        # A gate of zeros, without noise, would select the same experts for ever.
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.w_gate, -bound, bound)
        nn.init.zeros_(self.gate_bias)

    def reset_parameters(self) -> None:
        """Experts and ``w_gate`` as torch draws a ``Linear``; the rest of the gate 0."""
        super().reset_parameters()
        self._reset_gate()

    def forward(  # type: ignore[override]  # no task here
        self, x: Tensor, mask: Tensor | None = None, *, return_aux: bool = False
    ) -> Any:
        if x.dim() < 2 or x.shape[-1] != self.in_features:
            raise ValueError(f"x of shape {tuple(x.shape)}: (*, {self.in_features}) is wanted")
        if mask is not None and mask.shape != x.shape[:-1]:
            raise ValueError(f"mask of shape {tuple(mask.shape)}: {tuple(x.shape[:-1])} is wanted")
        flat = None if mask is None else mask.reshape(1, -1)
        y, aux = super().forward(x.flatten(0, -2).unsqueeze(0), mask=flat, return_aux=True)
        y = y.view(*x.shape[:-1], self.out_features)
        return (y, aux) if return_aux else y

    def _route(self, seen: Tensor) -> Routing:
        score = seen @ self.w_gate
        by = score if self.selection == "unbiased" else None
        return noisy_routing(score + self.gate_bias, self._noise(seen), self.k, by)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, n_experts={self.num_experts}, k={self.k}, "
            f"selection={self.selection!r}, bias={self.bias is not None}"
        )


def suggest_k(n_experts: int, true_experts: int, true_k: int) -> int:
    """How many experts to select if there are more than needed: enough however they are shared out, E - (E* - K*).

    The theory wants at least as many as the K* largest Voronoi cells hold together. Each of the E* true experts has one
    of the E at least, so that K* cells hold at most E - (E* - K*).

    Args:
        n_experts: E >= E*.
        true_experts: E* >= 1, a guess of how many are needed.
        true_k: K* in [1, E*], how many of them an input needs.

    Raises:
        ValueError: an argument out of range.

    Source: H. Nguyen, P. Akbarian, F. Yan, N. Ho, Statistical Perspective of Top-K Sparse Softmax Gating Mixture of
    Experts, ICLR 2024, arXiv 2309.13850.

    >>> from assay.nn import suggest_k
    >>> suggest_k(n_experts=8, true_experts=6, true_k=2)
    4
    """
    integers = all(isinstance(value, int) for value in (n_experts, true_experts, true_k))
    in_range(
        "true_experts", true_experts, integers and 1 <= true_experts <= n_experts, f"an integer in [1, {n_experts}]"
    )
    in_range("true_k", true_k, 1 <= true_k <= true_experts, f"an integer in [1, {true_experts}]")
    return n_experts - (true_experts - true_k)
