"""Stochastic gradient descent on subspaces, alone or beside another optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from assay._checks import in_range
from assay.nn.grassmann_class.geometry import grassmann_geodesic_step, grassmann_rgrad, orthonormal
from assay.optim._rule import RuleOptimizer, at_least_zero, below_one
from assay.optim._wrapper import WrappedOptimizer

TRANSPORTS = ("paper", "reference")


def is_grassmann(p: Tensor) -> bool:
    """Whether a parameter says that its matrices stand for subspaces."""
    return getattr(p, "manifold", None) == "grassmann"


class GrassmannSGD(RuleOptimizer):
    """Riemannian SGD with momentum for the weights of subspaces, and ordinary SGD for all others.

    For a weight S of orthonormal columns, with D its gradient and M its momentum ::

        G = (I - S S^T) D                                   the gradient on the manifold
        M <- momentum (I - S S^T) M + (1 - dampening) G     transported to S, and moved; M = G at the first step
        S <- (S V diag(cos(t s)) - U diag(sin(t s))) V^T    with M = U diag(s) V^T, t = lr * lr_factor

    and every ``reorth_every`` steps S is made orthonormal again, which undoes rounding and moves no subspace. All of it
    is in float32 at least. There is no weight decay on subspaces. The other parameters get ``torch.optim.SGD``.

    Args:
        params: parameters, or groups of them with options of their own. Those with ``p.manifold == "grassmann"``, as
            the weight of :class:`assay.nn.GrassmannLinear`, are subspaces, (..., n, k).
        lr: learning rate, >= 0; a number or a tensor of one element.
        momentum: in [0, 1).
        dampening: in [0, 1].
        weight_decay: >= 0, of the other parameters, added to their gradients.
        lr_factor: >= 0, of the rate of subspaces.
        reorth_every: >= 1.
        maximize: ascend.
        transport: "reference" sums D as it is and projects the sum, as the authors' code does, see the card.
        foreach, compile, fused: of the other parameters, as in :class:`assay.optim.LionK`.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: a sparse gradient or a complex parameter.

    Source: H. Wang, Z. Li, W. Zhang, Grassmann Class Representation, ICCV 2023, arXiv 2308.01547.

    >>> import torch
    >>> from assay.nn import GrassmannLinear
    >>> from assay.optim import GrassmannSGD
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), GrassmannLinear(16, 3, subspace_dim=2))
    >>> optimizer = GrassmannSGD(model.parameters(), lr=0.1)
    >>> torch.nn.functional.cross_entropy(model(torch.randn(5, 8)), torch.tensor([0, 1, 2, 0, 1])).backward()
    >>> optimizer.step()
    >>> S = model[2].weight
    >>> torch.allclose(S.mT @ S, torch.eye(2), atol=1e-6)
    True
    """

    slots = ("momentum_buffer",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        lr_factor: float = 1.0,
        reorth_every: int = 5,
        maximize: bool = False,
        *,
        transport: str = "paper",
        foreach: bool | None = None,
        compile: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "momentum": momentum, "dampening": dampening}
        defaults |= {"weight_decay": weight_decay, "lr_factor": lr_factor, "reorth_every": reorth_every}
        defaults["transport"] = transport
        super().__init__(params, defaults, maximize=maximize, foreach=foreach, compile=compile, fused=fused)

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        below_one(options, "momentum")
        at_least_zero(options, "weight_decay", "lr_factor")
        in_range("dampening", options["dampening"], 0 <= options["dampening"] <= 1, "[0, 1]")
        every, transport = options["reorth_every"], options["transport"]
        in_range("reorth_every", every, isinstance(every, int) and every >= 1, "an integer >= 1")
        in_range("transport", transport, transport in TRANSPORTS, ", ".join(TRANSPORTS))

    @classmethod
    def slots_of(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        return cls.slots if options["momentum"] else ()

    def _start(self, slot: str, p: Tensor, group: Mapping[str, Any]) -> None:
        if is_grassmann(p):
            dtype = torch.promote_types(p.dtype, torch.float32)
            self.state[p][slot] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        else:
            super()._start(slot, p, group)

    def _step_group(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            if is_grassmann(p) and p.grad is not None:
                self._move(p, group)
        super()._step_group({**group, "params": [p for p in group["params"] if not is_grassmann(p)]})

    def _move(self, p: Tensor, group: Mapping[str, Any]) -> None:
        t, (_, grad, *slots) = self._tensors(p, group)
        if p.numel() == 0:
            return
        dtype = torch.promote_types(p.dtype, torch.float32)
        S, moved = p.detach().to(dtype), grad.to(dtype)
        paper = group["transport"] == "paper"
        moved = grassmann_rgrad(S, moved) if paper else moved
        if slots:
            momentum = slots[0]
            carried = grassmann_rgrad(S, momentum) if paper else momentum
            fresh = 1.0 if t == 1 else 1 - group["dampening"]
            momentum.copy_(group["momentum"] * carried + fresh * moved)
            moved = momentum
        S = grassmann_geodesic_step(S, moved if paper else grassmann_rgrad(S, moved), -group["lr"] * group["lr_factor"])
        every = group["reorth_every"]
        if paper and t % every == 0:
            S = orthonormal(S)
        elif not paper and (t - 1) % every == 0:
            S = torch.linalg.qr(S).Q
        p.copy_(S)

    @staticmethod
    def rule(
        p: Any, g: Any, *b: Any, lr: Any, t: Any, momentum: float, dampening: float, weight_decay: float
    ) -> None:  # fmt: skip
        if weight_decay:
            g = g.add(p, alpha=weight_decay)
        if b:  # as torch has it, the first gradient is not dampened
            g = b[0].mul_(momentum).add_(g.mul(1 - dampening + dampening * (t == 1)) if dampening else g)
        p.sub_(g.mul(lr))


class _WithGrassmann(WrappedOptimizer):
    def __init__(self, base: torch.optim.Optimizer, params: Iterable[Tensor], **options: Any) -> None:
        super().__init__(None, base, {}, {})
        self.subspaces = GrassmannSGD(params, self.param_groups[0]["lr"], **options)
        others = set(self.parameters())
        for p in self.subspaces.param_groups[0]["params"]:
            in_range("grassmann_params", tuple(p.shape), is_grassmann(p), "parameters with manifold = 'grassmann'")
            if p in others:
                raise ValueError(f"a parameter of shape {tuple(p.shape)} is also one of base_optimizer's")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.base.step(closure)
        self.subspaces.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self.subspaces.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.subspaces.zero_grad(set_to_none)

    def wrapper_state(self) -> dict[str, Any]:
        return self.subspaces.state_dict()

    def load_wrapper_state(self, state: dict[str, Any]) -> None:
        self.subspaces.load_state_dict(state)


def with_grassmann(
    base_optimizer: torch.optim.Optimizer,
    grassmann_params: Iterable[Tensor],
    lr_factor: float = 1.0,
    momentum: float = 0.9,
    reorth_every: int = 1,
) -> torch.optim.Optimizer:
    """One optimizer of two: the base for its own parameters, Riemannian SGD for the weights of subspaces.

    Its groups are the base's, so schedulers act on both: the rate of the subspaces is ``lr_factor`` times that of the
    base's first group. ``step``, ``zero_grad`` and ``state_dict`` cover both.

    Args:
        base_optimizer: any optimizer of the other parameters.
        grassmann_params: parameters with ``p.manifold == "grassmann"``.
        lr_factor: >= 0; for a rate of 0.1 beside AdamW with 1e-3 it is 100.
        momentum, reorth_every: as in :class:`assay.optim.GrassmannSGD`.

    Raises:
        ValueError: an argument out of range, or a parameter given to both.

    Source: H. Wang, Z. Li, W. Zhang, Grassmann Class Representation, ICCV 2023, arXiv 2308.01547.

    >>> import torch
    >>> from assay.nn import GrassmannLinear
    >>> from assay.optim import with_grassmann
    >>> body, head = torch.nn.Linear(8, 16), GrassmannLinear(16, 3, subspace_dim=2)
    >>> optimizer = with_grassmann(torch.optim.AdamW(body.parameters(), lr=1e-3), head.parameters(), lr_factor=100)
    >>> scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    """
    return _WithGrassmann(
        base_optimizer, grassmann_params, lr_factor=lr_factor, momentum=momentum, reorth_every=reorth_every
    )
