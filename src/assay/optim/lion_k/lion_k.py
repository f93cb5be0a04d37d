"""Lion-K: Lion, and its family of optimizers that solve a problem with a constraint or penalty of one's choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from assay.optim._rule import RuleOptimizer, at_least_zero, below_one
from assay.optim.lion_k.kappas import L1, HalfSquare, Huber, Kappa, LogCosh, SoftThreshold
from assay.optim.lion_k.norms import L2, L2Rows, Lp, Nuclear, TopK

__all__ = [
    "L1",
    "L2",
    "HalfSquare",
    "Huber",
    "Kappa",
    "L2Rows",
    "Lion",
    "LionK",
    "LogCosh",
    "Lp",
    "Nuclear",
    "SoftThreshold",
    "TopK",
    "lion_constraint_violation",
    "lion_lyapunov",
]


SHIPPED = (L1, SoftThreshold, TopK, Huber, Lp, L2, L2Rows, Nuclear, HalfSquare, LogCosh)
NAMED = {
    "l1": L1(), "l2": L2(), "l2_rows": L2Rows(), "nuclear": Nuclear(), "half_square": HalfSquare(),
    "log_cosh": LogCosh(),
}  # fmt: skip
"""Kappas that need no number, by the names that ``LionK(kappa=...)`` takes."""

# They stand in parameter groups and so in checkpoints, which are read with weights_only=True.
torch.serialization.add_safe_globals(list(SHIPPED))


def kappa_of(kappa: str | Kappa) -> Kappa:
    """The kappa itself where it is given by name."""
    found = NAMED.get(kappa) if isinstance(kappa, str) else kappa
    if not isinstance(found, Kappa):
        raise ValueError(f"kappa = {kappa!r} is out of range: a Kappa, or one of {', '.join(NAMED)}")
    return found


class LionK(RuleOptimizer):
    """Lion-K: the step is the gradient of a convex function K of the momentum, and the decay a constraint.

    With g_t the gradient at step t of a parameter p, and m_0 = 0 ::

        c   = beta1 * m_{t-1} + (1 - beta1) * g_t
        p   = (1 - lr * weight_decay) * p - lr * gradK(c)
        m_t = beta2 * m_{t-1} + (1 - beta2) * g_t

    What a constant p settles at minimizes ``f(p) + K*(weight_decay * p) / weight_decay``, where K* is the conjugate of
    K. For a norm K this is the minimum of f over all p with ``|p|_dual <= 1 / weight_decay``; for Lion, K = ``l1``, the
    box ``max |p_i| <= 1 / weight_decay``. Outside, p comes nearer by a factor 1 - lr * weight_decay in every step, and
    it never leaves again. There is no correction of bias.

    Args:
        params: parameters, or groups of them with options of their own. Complex ones count as pairs of real numbers,
            where K acts on each entry alone.
        lr: learning rate, >= 0; a number or a tensor of one element.
        betas: shares of the momentum in the step and in the next momentum, each in [0, 1).
        weight_decay: decoupled decay, >= 0 and at most 1 / lr; 0 constrains nothing.
        kappa: the function K of one tensor: an object of :mod:`assay.optim.kappas`, or ``"l1"``, ``"l2"``,
            ``"l2_rows"``, ``"nuclear"``, ``"half_square"``, ``"log_cosh"``.
        eps: norms are divided by where above it, >= 0.
        rms_scale: where K is a norm of the whole tensor, such as l2, multiply gradK by a number that depends on the
            tensor's shape alone, so that ``lr`` is about the step of an entry, as with l1; that number also multiplies
            the radius of the constraint.
        maximize: ascend.
        foreach: None runs small tensors as lists, True all that may be, False one after the other.
        compile: run through ``torch.compile``; the first steps compile, a new ``lr`` does not.
        fused: no native kernel yet; True is refused.

    Raises:
        ValueError: an argument out of range, also when a schedule lifts ``lr`` above 1 / weight_decay.
        RuntimeError: a sparse gradient, or a complex parameter with a K of the whole tensor.

    Source: L. Chen, B. Liu, K. Liang, Q. Liu, Lion Secretly Solves Constrained Optimization, ICLR 2024,
    arXiv 2310.05898.

    >>> import torch
    >>> from assay.optim import LionK
    >>> from assay.optim.kappas import TopK
    >>> p = torch.nn.Parameter(torch.zeros(3))
    >>> optimizer = LionK([p], lr=0.5, kappa=TopK(1))
    >>> (p @ torch.tensor([1.0, -3.0, 2.0])).backward()
    >>> optimizer.step()
    >>> p.tolist()
    [0.0, 0.5, 0.0]
    """

    slots = ("exp_avg",)
    complex_as_real = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        kappa: str | Kappa = "l1",
        eps: float = 1e-12,
        rms_scale: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        defaults |= {"kappa": kappa, "eps": eps, "rms_scale": rms_scale}
        super().__init__(params, defaults, maximize=maximize, foreach=foreach, compile=compile, fused=fused)

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        at_least_zero(options, "weight_decay", "eps")
        below_one(options, "betas")
        kappa_of(options["kappa"])
        _check_decay(options)

    @classmethod
    def splits(cls, p: Tensor, options: Mapping[str, Any]) -> bool:
        return kappa_of(options["kappa"]).elementwise(p)

    def _step_group(self, group: dict[str, Any]) -> None:
        if not isinstance(group["lr"], Tensor):  # to look into a tensor would wait for its device
            _check_decay(group)
        super()._step_group(group)

    def _tensors(self, p: Tensor, group: Mapping[str, Any]) -> tuple[int, tuple[Tensor, ...]]:
        if p.is_complex() and not self.splits(torch.view_as_real(p), group):
            raise RuntimeError(f"{type(self).__name__} does not support complex parameters with {group['kappa']!r}")
        return super()._tensors(p, group)

    @staticmethod
    def rule(
        p: Any, g: Any, m: Any, *, lr: Any, t: Any, betas: tuple[float, float], weight_decay: float,
        kappa: str | Kappa, eps: float, rms_scale: bool,
    ) -> None:  # fmt: skip
        kappa = kappa_of(kappa)
        step = kappa.grad_(m.lerp(g, 1 - betas[0]), eps)
        if weight_decay:
            p.mul_(1 - lr * weight_decay)
        rate = lr / kappa.entry_size(p) if rms_scale else lr
        if isinstance(rate, Tensor):
            p.sub_(step.mul_(rate))
        else:  # a pass less
            p.add_(step, alpha=-rate)
        m.lerp_(g, 1 - betas[1])


class Lion(LionK):
    """Lion: every entry moves by ``lr``, in the direction of the sign of the momentum. It is LionK with K = l1.

    With g_t the gradient at step t of a parameter p, and m_0 = 0 ::

        p   = (1 - lr * weight_decay) * p - lr * sign(beta1 * m_{t-1} + (1 - beta1) * g_t)
        m_t = beta2 * m_{t-1} + (1 - beta2) * g_t

    With ``weight_decay`` it minimizes under the constraint ``max |p_i| <= 1 / weight_decay``. Usual advice: an ``lr``
    3 to 10 times smaller than with AdamW, and a ``weight_decay`` as many times larger.

    Args:
        params: parameters, or groups of them with options of their own; complex ones count as pairs of real numbers.
        lr, betas, weight_decay, maximize, foreach, compile, fused: as in :class:`LionK`.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: a sparse gradient.

    Source: X. Chen et al., Symbolic Discovery of Optimization Algorithms, NeurIPS 2023, arXiv 2302.06675; the
    constraint: L. Chen et al., arXiv 2310.05898.

    >>> import torch
    >>> from assay.optim import Lion
    >>> p = torch.nn.Parameter(torch.tensor([2.0, 1.0, 0.0]))
    >>> optimizer = Lion([p], lr=0.5, weight_decay=1.0)
    >>> (p @ torch.tensor([1.0, -3.0, 0.0])).backward()
    >>> optimizer.step()
    >>> p.tolist()
    [0.5, 1.0, 0.0]
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
        fused: bool | None = None,
    ) -> None:
        how: dict[str, Any] = {"maximize": maximize, "foreach": foreach, "compile": compile, "fused": fused}
        super().__init__(params, lr, betas, weight_decay, kappa="l1", **how)


@torch.no_grad()
def lion_constraint_violation(optimizer: LionK) -> float:
    """How far the parameters of a Lion-K optimizer are from what its decay confines them to.

    The largest over the parameters p of the Euclidean distance from ``weight_decay * p`` to the domain of K*; with
    ``rms_scale`` p is divided by its number first. It is 0 once the constraint holds, where K confines nothing, and for
    ``weight_decay = 0``. Sharded parameters are gathered.

    Source: L. Chen et al., ICLR 2024, arXiv 2310.05898, phase 1 of the dynamics.

    >>> import torch
    >>> from assay.optim import Lion, lion_constraint_violation
    >>> lion_constraint_violation(Lion([torch.nn.Parameter(torch.tensor([3.0, -0.5]))], weight_decay=1.0))
    2.0
    """
    worst = 0.0
    for group in optimizer.param_groups:
        kappa = kappa_of(group["kappa"])
        for p in group["params"]:
            if p.numel() == 0:
                continue
            whole = p.full_tensor() if hasattr(p, "full_tensor") else p
            whole = torch.view_as_real(whole) if whole.is_complex() else whole
            scale = kappa.entry_size(whole) if group["rms_scale"] else 1.0
            worst = max(worst, kappa.distance(whole.detach() * (group["weight_decay"] * scale)).item())
    return worst


def lion_lyapunov(
    f: float | Tensor | Callable[[Tensor], Tensor],
    x: Tensor,
    m: Tensor,
    kappa: str | Kappa = "l1",
    *,
    weight_decay: float,
    alpha: float = 1.0,
    gamma: float = 1.0,
    eps: float = 0.0,
) -> Tensor:
    """The function that the dynamics of Lion-K never let grow, once the constraint holds.

    In continuous time ::

        m' = -alpha * grad f(x) - gamma * m
        x' = gradK(m - eps * (alpha * grad f(x) + gamma * m)) - weight_decay * x

    and, with l = weight_decay, what does not grow is ::

        H = alpha f(x) + gamma/l K*(l x) + (1 - eps gamma)/(1 + eps l) (K*(l x) + K(m) - l <m, x>)

    A step of :class:`LionK` is one of these of length lr, with m minus its momentum, alpha = gamma = (1 - beta2) / lr
    and eps = lr (1 - beta1) / (1 - beta2).

    Args:
        f: the objective's value at x, or the function itself.
        x, m: position and momentum, of one shape; m has the sign of a descent.
        kappa: as in :class:`LionK`.
        weight_decay: > 0.
        alpha, gamma: > 0.
        eps: >= 0, with eps * gamma <= 1.

    Returns:
        H as a 0-d tensor, infinite where the constraint does not hold.

    Raises:
        ValueError: an argument out of range.

    Source: L. Chen et al., ICLR 2024, arXiv 2310.05898.

    >>> import torch
    >>> from assay.optim import lion_lyapunov
    >>> x, m = torch.tensor([0.5, 0.0]), torch.tensor([0.0, -1.0])
    >>> lion_lyapunov(lambda x: x.square().sum(), x, m, "l1", weight_decay=1.0).item()
    1.25
    """
    for name, value in (("weight_decay", weight_decay), ("alpha", alpha), ("gamma", gamma)):
        if not value > 0:
            raise ValueError(f"{name} = {value!r} is out of range: a number > 0")
    if not 0 <= eps * gamma <= 1:
        raise ValueError(f"eps = {eps!r} is out of range: from 0 to 1 / gamma = {1 / gamma!r}")
    kappa, objective = kappa_of(kappa), f(x) if callable(f) else f
    conjugate = kappa.conjugate(weight_decay * x)
    gap = conjugate + kappa.value(m) - weight_decay * (m * x).sum()
    return alpha * objective + gamma / weight_decay * conjugate + (1 - eps * gamma) / (1 + eps * weight_decay) * gap


def _check_decay(options: Mapping[str, Any]) -> None:
    # Beyond it the decay would turn the sign of the weights.
    if options["weight_decay"] * float(options["lr"]) > 1:
        most = f"at most 1 / lr = {1 / float(options['lr'])!r}"
        raise ValueError(f"weight_decay = {options['weight_decay']!r} is out of range: {most}")
