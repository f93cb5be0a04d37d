"""Token dynamics of deep selective state space models: simulation, criteria, and two layers built on them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from assay._checks import in_range
from assay.nn._ssm import SelectiveSSM

SCENARIOS = ("positive", "negative", "mixed")


class TokenTrajectory(NamedTuple):
    """Times (T,), tokens at them (T, L, D), how it ended, and when it blew up (None if it did not)."""

    t: Tensor
    x: Tensor
    status: str
    blowup_time: float | None


def simulate(
    x0: Tensor,
    S_B: Tensor,
    S_C: Tensor,
    S_delta: Tensor,
    a: Tensor,
    *,
    t_max: float,
    method: str = "rk45",
    rtol: float = 1e-6,
    atol: float = 1e-8,
    blowup: float = 1e6,
) -> TokenTrajectory:
    """Follow L tokens through a stack of infinitely many small residual Mamba layers::

        d/dt x_{l,d} = sum_{j <= l} (x_l^T S_C^T S_B x_j) delta_{j,d} exp(-a_d sum_{k = j+1..l} delta_{k,d}) x_{j,d}
        delta_{j,d}  = softplus(S_delta_d . x_j)

    Runge-Kutta steps of order 5 with an error estimate of order 4 (Dormand and Prince) and a step size of their own,
    in float64. The status is "blow-up" if a token passes ``blowup`` before ``t_max``, "converged" if the tokens are
    nearer to the origin at the end than at first and still approach it, else "diverging".

    Args:
        x0: shape (L, D).
        S_B, S_C: shape (N, D).
        S_delta: shape (D, D), row d for channel d.
        a: shape (D,), the decay.
        t_max: > 0.
        method: "rk45".
        rtol, atol: relative and absolute error of a step, > 0.
        blowup: > 0.

    Raises:
        ValueError: an argument out of range.

    Source: T. N. Vo, D.-T. Pham, X. T. Tong, T. M. Nguyen, Demystifying the Token Dynamics of Deep Selective State
    Space Models, ICLR 2025, arXiv 2410.03292.

    >>> import torch
    >>> from assay.nn.token_dynamics import simulate
    >>> one = torch.ones(1, 1)
    >>> simulate(torch.ones(2, 1), -one, one, one, torch.ones(1), t_max=50.0).status
    'converged'
    >>> simulate(torch.ones(2, 1), one, one, one, torch.ones(1), t_max=50.0).status
    'blow-up'
    """
    for name, value in (("t_max", t_max), ("rtol", rtol), ("atol", atol), ("blowup", blowup)):
        in_range(name, value, value > 0, "> 0")
    in_range("method", method, method == "rk45", "'rk45'")
    x, S_B, S_C, S_delta, a = (value.detach().double() for value in (x0, S_B, S_C, S_delta, a))
    later = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).tril()

    def velocity(x: Tensor) -> Tensor:
        delta = F.softplus(x @ S_delta.T)
        total = delta.cumsum(0)
        passed = (total[:, None] - total).masked_fill(~later[..., None], torch.inf)
        scores = (x @ S_C.T) @ (x @ S_B.T).T
        # Not inf * 0 where a = 0: what comes later counts for nothing.
        decay = torch.exp(-a * passed).masked_fill(~later[..., None], 0)
        return torch.einsum("lj,ljd,jd->ld", scores, decay, delta * x)

    t, step, times, states = 0.0, min(t_max, 1e-3), [0.0], [x]
    first, status, ended = velocity(x), "", None
    while t < t_max and not status:
        step = min(step, t_max - t)
        slopes = [first]
        for row in _STAGES:
            slopes.append(velocity(x + step * sum(c * k for c, k in zip(row, slopes, strict=True))))
        moved = x + step * sum(c * k for c, k in zip(_STAGES[-1], slopes, strict=False))
        error = step * sum(c * k for c, k in zip(_ERROR, slopes, strict=True))
        scale = atol + rtol * torch.maximum(x.abs(), moved.abs())
        off = (error / scale).square().mean().sqrt().item()
        if off <= 1:  # the last stage is the velocity at the new point; nan is not <= 1
            t, x, first = t + step, moved, slopes[-1]
            times.append(t)
            states.append(x)
        step *= min(5.0, max(0.2, 0.9 * max(off, 1e-10) ** -0.2)) if off == off else 0.2
        if x.abs().max() > blowup or step < 1e-13 * max(t, 1e-3):
            status, ended = "blow-up", t
    if not status:
        nearer = (x.norm() < states[0].norm() or not x.any()) and (x * first).sum() <= 0
        status = "converged" if nearer else "diverging"
    return TokenTrajectory(torch.tensor(times, dtype=x.dtype), torch.stack(states), status, ended)


# Dormand and Prince's coefficients; the solution of order 5 is the last stage.
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def classify(S_B: Tensor, S_C: Tensor, S_delta: Tensor | None = None, x0: Tensor | None = None) -> str:
    """Where the tokens go, from the sign of M = S_C^T S_B: "convergence", or one of three divergences.

    With no positive eigenvalue of M's symmetric part the tokens converge to the origin. Otherwise they diverge: for D
    = 1 with ``S_delta`` and ``x0`` the answer is "slow-divergence" where S_delta x_l(0) < 0 for all tokens l that are
    not 0, and "fast-divergence", in finite time, where it is not; else "divergence". For D > 1 this is a conjecture of
    the paper.

    Args:
        S_B, S_C: shape (N, D).
        S_delta: shape (D, D).
        x0: shape (L, D).

    Source: T. N. Vo et al., Demystifying the Token Dynamics of Deep Selective State Space Models, ICLR 2025, arXiv
    2410.03292.

    >>> import torch
    >>> from assay.nn.token_dynamics import classify
    >>> one = torch.ones(1, 1)
    >>> classify(-one, one), classify(one, one), classify(one, one, -one, torch.ones(3, 1))
    ('convergence', 'divergence', 'slow-divergence')
    """
    product = S_C.double().T @ S_B.double()
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2)
    # What rounding in the weights' own precision may have made of 0.
    least = 10 * torch.finfo(torch.promote_types(S_B.dtype, S_C.dtype)).eps
    if eigenvalues.max() <= least * eigenvalues.abs().max():
        return "convergence"
    if len(product) > 1 or S_delta is None or x0 is None:
        return "divergence"
    moving = x0[x0 != 0]
    return "slow-divergence" if (S_delta.reshape(()) * moving < 0).all() else "fast-divergence"


def input_output_spectrum(ssm: SelectiveSSM) -> Tensor:
    """The eigenvalues of S_C^T S_B of a layer that are not 0 by construction: d_state complex numbers.

    S_C^T S_B, of d_inner rows and rank d_state, has the eigenvalues of S_B S_C^T, of d_state rows, which are computed.

    >>> from assay.nn import SelectiveSSM, constrain_dynamics
    >>> from assay.nn.token_dynamics import input_output_spectrum
    >>> bool((input_output_spectrum(constrain_dynamics(SelectiveSSM(8, d_state=4))).real > 0).all())
    True
    """
    sizes = [ssm.dt_rank, ssm.d_state, ssm.d_state]
    _, S_B, S_C = ssm.get_submodule("x_proj").weight.split(sizes)  # type: ignore[operator]
    return torch.linalg.eigvals(S_B @ S_C.T)


def constrain_dynamics(ssm: SelectiveSSM, scenario: str = "positive", threshold: float = 0.7) -> SelectiveSSM:
    """Give a layer weights whose S_C^T S_B has eigenvalues of chosen signs, so that tokens need not converge::

        S_C = U,   S_B = diag(s) U,   S_C^T S_B = U^T diag(s) U

    U has ones on its diagonal, zeros below it, and above it what ``x_proj.weight`` has where B is made. The scales s,
    whose signs are those of the eigenvalues, come from the first column of the rows that made C: softplus(r) +
    ``threshold``, its negative, or, if "mixed", softplus(r) for the first half and -softplus(r) for the second. The
    other columns of these rows become unused.

    The layer is changed in place, by a parametrization that
    ``torch.nn.utils.parametrize.remove_parametrizations(ssm.x_proj, "weight")`` makes permanent.

    Args:
        ssm: with d_state <= d_inner; both directions of a bidirectional layer are constrained.
        scenario: "positive", "negative" or "mixed".
        threshold: >= 0, least size of s; not used if "mixed".

    Raises:
        ValueError: an argument out of range.

    Source: T. N. Vo et al., Demystifying the Token Dynamics of Deep Selective State Space Models, ICLR 2025, arXiv
    2410.03292.

    >>> import torch
    >>> from assay.nn import SelectiveSSM, constrain_dynamics
    >>> constrain_dynamics(SelectiveSSM(8))(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """
    in_range("scenario", scenario, scenario in SCENARIOS, " or ".join(map(repr, SCENARIOS)))
    in_range("threshold", threshold, threshold >= 0, ">= 0")
    in_range("ssm.d_state", ssm.d_state, ssm.d_state <= ssm.d_inner, f"<= d_inner = {ssm.d_inner}")
    for end in ("", "_b") if ssm.bidirectional else ("",):
        symmetric = _Symmetric(ssm.dt_rank, ssm.d_state, scenario, threshold)
        parametrize.register_parametrization(ssm.get_submodule(f"x_proj{end}"), "weight", symmetric)
    return ssm


class _Symmetric(nn.Module):
    """From the weight as it was to the one whose rows for B and C belong together."""

    def __init__(self, dt_rank: int, d_state: int, scenario: str, threshold: float) -> None:
        super().__init__()
        self.sizes, self.scenario, self.threshold = [dt_rank, d_state, d_state], scenario, threshold

    def forward(self, weight: Tensor) -> Tensor:
        delta, upper, scales = weight.split(self.sizes)
        U = upper.triu(1) + torch.eye(*upper.shape, dtype=weight.dtype, device=weight.device)
        s = F.softplus(scales[:, :1])
        if self.scenario == "mixed":
            half = len(s) - len(s) // 2
            s = torch.cat([s[:half], -s[half:]])
        else:
            s = s + self.threshold if self.scenario == "positive" else -s - self.threshold
        return torch.cat([delta, s * U, U])


def soft_sort(
    scores: Tensor, tau: float = 1.0, power: float = 1.0, hard: bool = False, descending: bool = True
) -> Tensor:
    """A matrix that sorts, with gradients: row i says how much of each element is at place i (SoftSort)::

        P[i, j] = softmax_j(-|scores_j - sorted(scores)_i|^power / tau)

    Shapes (..., L) to (..., L, L).

    Args:
        tau: > 0; near 0 it is the permutation.
        power: > 0.
        hard: return the permutation itself, with the gradients of P.
        descending: the largest first.

    Raises:
        ValueError: an argument out of range.

    Source: S. Prillo, J. Eisenschlos, SoftSort: A Continuous Relaxation for the argsort Operator, ICML 2020, arXiv
    2006.16038.

    >>> import torch
    >>> from assay.nn import soft_sort
    >>> scores = torch.tensor([1.0, 3.0, 2.0])
    >>> soft_sort(scores, hard=True) @ scores
    tensor([3., 2., 1.])
    """
    in_range("tau", tau, tau > 0, "> 0")
    in_range("power", power, power > 0, "> 0")
    ordered, order = scores.sort(dim=-1, descending=descending, stable=True)
    distance = (ordered[..., :, None] - scores[..., None, :]).abs()
    soft = torch.softmax(-(distance if power == 1 else distance**power) / tau, -1)
    return (F.one_hot(order, scores.shape[-1]).to(soft.dtype) - soft).detach() + soft if hard else soft


class TokenReorder(nn.Module):
    """Sort the tokens of a :class:`SelectiveSSM` so that important ones come last, where tokens move most.

    Given to the layer as ``SelectiveSSM(..., reorder=TokenReorder(d_inner))``. A learned direction K scores the tokens
    by their step sizes, s_l = K . dt_l, and the tokens are multiplied by the matrix that sorts s upwards
    (:func:`soft_sort`) before step sizes, B and C are made again and the scan runs.

    Called with tokens and step sizes of shape (batch, L, d_inner), it returns the matrix, (batch, L, L).

    Args:
        d_inner: channels, ``expand * d_model`` of the layer, >= 1.
        tau, power, hard: of :func:`soft_sort`.
        restore: let the layer multiply its output by the transposed matrix, so that outputs are where inputs were;
            without it they stay sorted, which does for pooling.

    Raises:
        ValueError: an argument out of range.

    Source: T. N. Vo et al., Demystifying the Token Dynamics of Deep Selective State Space Models, ICLR 2025, arXiv
    2410.03292.

    >>> import torch
    >>> from assay.nn import SelectiveSSM, TokenReorder
    >>> SelectiveSSM(8, reorder=TokenReorder(16))(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        d_inner: int,
        tau: float = 1.0,
        power: float = 1.0,
        hard: bool = False,
        *,
        restore: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_range("d_inner", d_inner, d_inner >= 1, "an integer >= 1")
        in_range("tau", tau, tau > 0, "> 0")
        in_range("power", power, power > 0, "> 0")
        self.tau, self.power, self.hard, self.restore = tau, power, hard, restore
        self.score = nn.Linear(d_inner, 1, bias=False, device=device, dtype=dtype)

    def forward(self, input: Tensor, dt: Tensor) -> Tensor:
        scores = self.score(dt)[..., 0]
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return soft_sort(-scores, self.tau, self.power, self.hard).to(input.dtype)

    def extra_repr(self) -> str:
        return f"tau={self.tau}, power={self.power}, hard={self.hard}, restore={self.restore}"
