"""Maximum likelihood for the top-K Gaussian mixture of experts, by generalised EM from many starts at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from assay._checks import in_range
from assay.nn._experts import check_k
from assay.nn.topk_moe.mixture import Atoms, lines, log_gate, log_joint, spread

if TYPE_CHECKING:
    from assay.nn.topk_moe.topk_moe import TopKGaussianMoE

SIGMA_FLOOR = 1e-3
_STEPS = (1.0, 0.5, 0.25, 0.125, 0.0625)


def fit_em(
    x: Tensor,
    y: Tensor,
    n_experts: int,
    k: int,
    *,
    n_init: int = 8,
    max_iter: int = 500,
    tol: float = 1e-8,
    init: TopKGaussianMoE | Sequence[TopKGaussianMoE] | None = None,
    generator: torch.Generator | None = None,
) -> TopKGaussianMoE:
    """The :class:`TopKGaussianMoE` of the largest likelihood that EM reaches, from several starts at once.

    ::

        E:  r_ne = gate_e(x_n) N(y_n | a_e . x_n + b_e, sigma_e^2), normalized over the experts e of row n
        M:  a_e, b_e by least squares with weights r_e;  sigma_e^2 the weighted mean square of what is left
            (beta0, beta1) by a Newton step on sum_n sum_e r_ne log gate_e(x_n), halved until the likelihood does
            not fall, else left out

    The selection of experts is piecewise constant and has no gradient: the Newton step takes it as given, and is
    judged by the likelihood with the selection that it leads to. The likelihood never falls. sigma stays >= 0.001.

    Args:
        x, y: shapes (n, d) and (n,).
        n_experts: E >= 1.
        k: K in [1, E].
        n_init: random starts, >= 1: experts fitted around random examples, gates at random.
        max_iter: >= 0.
        tol: stop when no start gains more mean log-likelihood than this in an iteration, >= 0.
        init: one or more models to start from in place of random starts.
        generator: of the random starts.

    Returns:
        A model on ``x``'s device, in its dtype.

    Raises:
        ValueError: an argument out of range, or shapes that do not fit.

    Source: H. Nguyen, P. Akbarian, F. Yan, N. Ho, Statistical Perspective of Top-K Sparse Softmax Gating Mixture of
    Experts, ICLR 2024, arXiv 2309.13850 (the estimator; how to compute it is left open there).

    >>> import torch
    >>> from assay.nn.gaussian_moe import fit_em
    >>> generator = torch.Generator().manual_seed(0)
    >>> x = torch.rand(500, 1, generator=generator, dtype=torch.float64) * 2 - 1
    >>> y = 2 * x[:, 0].abs() + 0.1 * torch.randn(500, generator=generator, dtype=torch.float64)
    >>> fit = fit_em(x, y, n_experts=2, k=1, generator=generator)
    >>> sorted(fit.a[:, 0].round(decimals=1).tolist())
    [-2.0, 2.0]
    """
    from assay.nn.topk_moe.topk_moe import TopKGaussianMoE

    if x.dim() != 2 or y.shape != x.shape[:1] or len(x) == 0:
        raise ValueError(f"x of shape {tuple(x.shape)}, y of shape {tuple(y.shape)}: (n, d) and (n,) are wanted")
    in_range("n_experts", n_experts, isinstance(n_experts, int) and n_experts >= 1, "an integer >= 1")
    check_k(k, n_experts)
    for name, value, least in (("n_init", n_init, 1), ("max_iter", max_iter, 0)):
        in_range(name, value, isinstance(value, int) and value >= least, f"an integer >= {least}")
    in_range("tol", tol, tol >= 0, ">= 0")
    with torch.no_grad():
        if init is None:
            atoms = random_starts(x, y, n_experts, n_init, generator)
        else:
            models = [init] if isinstance(init, torch.nn.Module) else list(init)
            atoms = Atoms(*(torch.stack(each).to(x) for each in zip(*(model.atoms for model in models), strict=True)))
            if atoms.beta1.shape[1:] != (n_experts, x.shape[1]):
                raise ValueError(
                    f"init has beta1 of shape {tuple(atoms.beta1.shape[1:])}, {n_experts, x.shape[1]} is wanted"
                )
        atoms, path = climb(atoms, x, y, k, max_iter, tol)
        best = int(path[-1].argmax())
        model = TopKGaussianMoE(x.shape[1], n_experts, k, device=x.device, dtype=x.dtype)
        for parameter, values in zip(model.atoms, atoms, strict=True):
            parameter.copy_(values[best])
    return model


class Data(NamedTuple):
    """Examples, with what the sums over them need: z = (x, 1), its products z_i z_j and z_i y."""

    x: Tensor
    y: Tensor
    z: Tensor
    pairs: Tensor
    products: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Data:
        z = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        return cls(x, y, z, (z.unsqueeze(-1) * z.unsqueeze(-2)).flatten(1), z * y.unsqueeze(-1))


class Fit(NamedTuple):
    """Parameters of all starts and what follows: log gates, experts, responsibilities (R, K, n), likelihoods (R,)."""

    atoms: Atoms
    gate: Tensor
    experts: Tensor
    share: Tensor
    likelihood: Tensor


def evaluate(atoms: Atoms, data: Data, gate: Tensor, experts: Tensor) -> Fit:
    joint = log_joint(atoms, data.x, data.y, gate, experts)
    total = joint.logsumexp(-2, keepdim=True)
    return Fit(atoms, gate, experts, (joint - total).exp(), total.mean((-2, -1)))


def climb(atoms: Atoms, x: Tensor, y: Tensor, k: int, max_iter: int, tol: float) -> tuple[Atoms, list[Tensor]]:
    """EM for all starts side by side; and the mean log-likelihood of each, before and after every iteration."""
    data = Data.of(x, y)
    fit = evaluate(atoms, data, *log_gate(atoms, x, k))
    path = [fit.likelihood]
    for _ in range(max_iter):
        responsibility = spread(fit.share, fit.experts, atoms.beta0.shape[-1])
        fit = evaluate(fit_experts(fit.atoms, data, responsibility), data, fit.gate, fit.experts)
        if k > 1:  # alone, an expert has gate 1 whatever beta is
            fit = fit_gate(fit, newton(fit, data, responsibility), data, k)
        path.append(fit.likelihood)
        if (path[-1] - path[-2]).max() <= tol:
            break
    return fit.atoms, path


def fit_experts(atoms: Atoms, data: Data, responsibility: Tensor) -> Atoms:
    """Weighted least squares and residual variance of each expert; an expert without weight stays as it is."""
    moments = (responsibility @ data.pairs).unflatten(-1, (data.z.shape[1],) * 2)
    # A pseudo-inverse, for experts with fewer examples than coefficients: any minimizer will do.
    inverse = torch.linalg.pinv(moments, hermitian=True)
    line = (inverse @ (responsibility @ data.products).unsqueeze(-1)).squeeze(-1)
    total = responsibility.sum(-1)
    squares = (responsibility * (data.y - lines(line, data.z)).square()).sum(-1)
    log_sigma = 0.5 * (squares / total.clamp(min=1e-12)).clamp(min=SIGMA_FLOOR**2).log()
    used = total > 1e-9
    return atoms._replace(
        a=torch.where(used.unsqueeze(-1), line[..., :-1], atoms.a),
        b=torch.where(used, line[..., -1], atoms.b),
        log_sigma=torch.where(used, log_sigma, atoms.log_sigma),
    )


def fit_gate(fit: Fit, step: Tensor, data: Data, k: int) -> Fit:
    """The gate moved by ``step`` or a part of it, where that does not lower the likelihood."""
    undecided = torch.ones_like(fit.likelihood, dtype=torch.bool)
    for share in _STEPS:
        beta1, beta0 = fit.atoms.beta1 + share * step[..., :-1], fit.atoms.beta0 + share * step[..., -1]
        atoms = fit.atoms._replace(beta1=beta1, beta0=beta0)
        tried = evaluate(atoms, data, *log_gate(atoms, data.x, k))
        taken = undecided & (tried.likelihood >= fit.likelihood)
        if taken.all():
            return tried
        atoms = Atoms(*(_where(taken, *both) for both in zip(tried.atoms, fit.atoms, strict=True)))
        fit = Fit(atoms, *(_where(taken, *both) for both in zip(tried[1:], fit[1:], strict=True)))
        undecided = undecided & ~taken
        if not undecided.any():
            break
    return fit


def _where(taken: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(taken.view(-1, *[1] * (new.dim() - 1)), new, old)


def newton(fit: Fit, data: Data, responsibility: Tensor) -> Tensor:
    """Newton's step of (beta1, beta0), (R, E, d + 1), on the expected log gate with the selection as it is."""
    number, width = fit.atoms.beta0.shape[-1], data.z.shape[1]
    gate = spread(fit.gate.exp(), fit.experts, number)
    gradient = (responsibility - gate) @ data.z
    # sum_n (diag(g) - g g^T) (x) z z^T
    own = (gate @ data.pairs).unflatten(-1, (width, width))
    same = torch.eye(number, dtype=gate.dtype, device=gate.device)[:, None, :, None]
    each = (gate.unsqueeze(-2) * data.z.T).flatten(-3, -2)  # (R, E (d + 1), n)
    hessian = (own.unsqueeze(3) * same).flatten(-2).flatten(1, 2) - each @ each.transpose(-1, -2)
    # Translations of all experts change nothing: the ridge keeps the step away from them.
    ridge = 1e-9 * hessian.diagonal(dim1=-2, dim2=-1).mean(-1) + 1e-12
    hessian.diagonal(dim1=-2, dim2=-1).add_(ridge.unsqueeze(-1))
    return torch.linalg.solve(hessian, gradient.flatten(1).unsqueeze(-1)).view_as(gradient)


def random_starts(x: Tensor, y: Tensor, n_experts: int, n_init: int, generator: torch.Generator | None) -> Atoms:
    """Experts fitted to what lies around random examples, and gates drawn at random."""
    data = torch.cat([x, y.unsqueeze(1)], 1)
    scale = data.std(0).nan_to_num(0).clamp(min=1e-6)
    drawn = torch.randint(len(x), (n_init, n_experts), generator=generator, device=x.device)
    distance = torch.cdist((data / scale)[drawn.flatten()], data / scale).view(n_init, n_experts, len(x))
    near = torch.exp(-2 * distance.square())
    zeros, flat = x.new_zeros(n_init, n_experts), x.new_zeros(n_init, n_experts, x.shape[1])
    slopes = torch.randn(flat.shape, generator=generator, device=x.device, dtype=x.dtype) / scale[:-1]
    return fit_experts(Atoms(zeros, slopes, flat, zeros, zeros + scale[-1].log()), Data.of(x, y), near)
