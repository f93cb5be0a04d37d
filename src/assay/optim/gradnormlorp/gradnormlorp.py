"""GradNormLoRP: weight matrices as magnitude and direction, and Adam on the direction in a low-rank subspace."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from assay.optim._lowrank import LowRankOptimizer, gathered, local, local_part, rank_of, wide
from assay.optim._rule import at_least_zero, below_one
from assay.optim.gradnormlorp.linear import GradNormLoRPLinear
from assay.optim.gradnormlorp.moments import Moments
from assay.optim.gradnormlorp.projector import TYPES, GaLoreProjector

__all__ = ["GaLoreProjector", "GradNormLoRP", "GradNormLoRPLinear", "gradnormlorp_param_groups"]

FACTORS: dict[type[nn.Module], tuple[str, ...]] = {nn.Linear: ("weight",), GradNormLoRPLinear: ("lora_A", "lora_B")}


class GradNormLoRP(LowRankOptimizer):
    """GradNormLoRP: Adam on the row norms of a matrix, and, in r dimensions of its gradient, on the rows' directions.

    For a matrix W (out, in) with gradient G at step t = 1, 2, ..., all norms |.| by row ::

        n   = |W|,  H = W / n
        g   = sum_cols(G * H)                                 gradient of the norms, (out, 1)
        G   = G - g * H                                       gradient of the directions: its part along H is gone
        if (t - 1) % update_proj_gap = 0:
            P = the r leading singular vectors of G           (GaLoreProjector)
        R   = project(G)
        m = beta1 * m + (1 - beta1) * R                       v = beta2 * v + (1 - beta2) * R^2
        D   = scale * project_back(m / (sqrt(v) + eps))       (and likewise u from g, unprojected)
        a   = lr * sqrt(1 - beta2^t) / (1 - beta1^t)          (correct_bias False: a = lr)
        V   = W - a * D
        W   = (1 - lr * weight_decay) * (n - a * magnitude_lr_scale * u) * V / |V|

    ``weight_norm=False`` is GaLore: W = (1 - lr * weight_decay) * (W - a * D) with D from G itself. The moments are
    neither rotated nor reset when P is renewed. Where ``rank`` is None or not below the smaller side nothing is
    projected. Vectors are stepped by AdamW with the same eps and decay (both as in Hugging Face's); so are the
    parameters of a group that names no ``rank`` where the optimizer has none either: the form ``[{"params": others},
    {"params": matrices, "rank": 128, "scale": 0.25}]``, which :func:`gradnormlorp_param_groups` makes. Convolution
    kernels count as matrices (out, -1). Kept per matrix: 2 r max(out, in) + r min(out, in) + 2 out numbers.

    Args:
        params: parameters, or groups of them with options of their own; real, with dense gradients.
        lr: learning rate, >= 0; a number or a tensor of one element.
        betas: decay rates of the averages, each in [0, 1).
        eps: added to the denominator before the correction of the averages, >= 0.
        weight_decay: decoupled decay, >= 0.
        rank: r, an int >= 1, a share of the smaller side in (0, 1], or None.
        update_proj_gap: steps between two renewals of P, >= 1.
        scale: factor of the projected step, >= 0.
        proj_type: ``"std"``, ``"reverse_std"``, ``"right"``, ``"left"`` or ``"full"``, see :class:`GaLoreProjector`.
        weight_norm: False is GaLore.
        magnitude_lr_scale: factor on the rate of the row norms, >= 0; 0 keeps them.
        state_bits: 32, or 8: m and v in blocks of 8-bit codes.
        correct_bias: correct the averages for their start at 0.
        maximize: ascend.
        foreach, compile: as in the other optimizers, for vectors and what else is plain AdamW.
        fused: no native kernel yet; True is refused.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: a sparse gradient or a complex parameter.

    Source: J.-H. Huang et al., Gradient Weight-normalized Low-rank Projection for Efficient LLM Training, AAAI 2025,
    arXiv 2412.19616.

    >>> import torch
    >>> from assay.optim import GradNormLoRP
    >>> model = torch.nn.Linear(16, 8)
    >>> optimizer = GradNormLoRP([{"params": [model.bias]}, {"params": [model.weight], "rank": 2}], lr=1e-2)
    >>> model(torch.randn(4, 16)).square().mean().backward()
    >>> optimizer.step()
    >>> sum(x.numel() for name, x in optimizer.state[model.weight].items() if name != "step")
    96
    """

    slots = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: float | None = None,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        proj_type: str = "std",
        weight_norm: bool = True,
        magnitude_lr_scale: float = 1.0,
        state_bits: int = 32,
        correct_bias: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank}
        defaults |= {"update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type}
        defaults |= {"weight_norm": weight_norm, "magnitude_lr_scale": magnitude_lr_scale}
        defaults |= {"state_bits": state_bits, "correct_bias": correct_bias}
        if not isinstance(params, (list, Tensor)):
            params = list(params)
        if isinstance(params, list) and params and not isinstance(params[0], dict):
            params = [{"params": params, "rank": rank}]  # no group that leaves its rank out
        super().__init__(params, defaults, maximize=maximize, foreach=foreach, compile=compile, fused=fused)

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        at_least_zero(options, "eps", "weight_decay", "scale", "magnitude_lr_scale")
        below_one(options, "betas")
        if options["rank"] is not None:
            rank_of(options["rank"], 1)
        if not options["update_proj_gap"] >= 1:
            raise ValueError(f"update_proj_gap = {options['update_proj_gap']!r} is out of range: an int >= 1")
        for name, allowed in (("proj_type", TYPES), ("state_bits", (32, 8))):
            if options[name] not in allowed:
                raise ValueError(f"{name} = {options[name]!r} is out of range: {', '.join(map(repr, allowed))}")

    @staticmethod
    def rule(
        p: Any, g: Any, m: Any, v: Any, *, lr: Any, t: Any, betas: tuple[float, float], eps: float, weight_decay: float,
        correct_bias: bool,
    ) -> None:  # fmt: skip
        rate = _rate(lr, t, betas, correct_bias)
        p.sub_(_direction(g, m, v, betas, eps).mul_(rate)).mul_(1 - lr * weight_decay)

    def projects(self, p: Tensor, group: Mapping[str, Any]) -> bool:
        return p.dim() >= 2 and p.numel() > 0 and (group["weight_norm"] or group["rank"] is not None)

    def step_matrix(self, p: Tensor, g: Tensor, t: int, group: Mapping[str, Any]) -> None:
        state, lr, betas, eps = self.state[p], group["lr"], group["betas"], group["eps"]
        # The singular vectors need the whole gradient, and every process computes the same with it.
        G = gathered(g).flatten(1).to(wide(p.dtype))
        W = gathered(p.detach()).flatten(1).to(G.dtype)
        rate, keep = _rate(lr, t, betas, group["correct_bias"]), 1 - lr * group["weight_decay"]
        if group["weight_norm"]:
            n = torch.linalg.vector_norm(W, dim=1, keepdim=True).clamp_min(1e-12)
            H = W / n
            along = (G * H).sum(1, keepdim=True)
            G = torch.addcmul(G, along, H, value=-1)
        projector = self._projector(p, W.shape, group)
        if projector is not None:
            projector.memory = state
        low = G if projector is None else projector.project(G, t - 1)
        with Moments(state, "low_exp_avg", low, group["state_bits"]) as (m, v):
            step = _direction(low, m, v, betas, eps)
        # A group's scale counts also where its rank is the whole side and nothing is projected.
        scale = 1.0 if group["rank"] is None else group["scale"]
        V = W - rate * (step * scale if projector is None else projector.project_back(step))
        if group["weight_norm"]:
            with Moments(state, "magnitude_exp_avg", along, 32) as (m, v):
                n = n - rate * group["magnitude_lr_scale"] * _direction(along, m, v, betas, eps)
            V = V * (n / torch.linalg.vector_norm(V, dim=1, keepdim=True).clamp_min(1e-12))
        mine = local(p)
        mine.copy_(local_part(V * keep, p).view(mine.shape))

    @staticmethod
    def _projector(p: Tensor, shape: torch.Size, group: Mapping[str, Any]) -> GaLoreProjector | None:
        if group["rank"] is None or rank_of(group["rank"], min(shape)) >= min(shape):
            return None
        options = (group[name] for name in ("rank", "update_proj_gap", "scale", "proj_type"))
        return GaLoreProjector(*options, dtype=p.dtype)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; without a ``rank`` anywhere they are stepped by AdamW."""
        if self.defaults["rank"] is None and "rank" not in param_group:
            # GaLore's convention: such a group is not one of the targets.
            param_group.setdefault("weight_norm", False)
        super().add_param_group(param_group)


def _direction(g: Any, m: Any, v: Any, betas: tuple[float, float], eps: float) -> Any:
    """Adam's direction on averages that it renews, eps added before their correction."""
    m.lerp_(g, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    return m.div(v.sqrt().add_(eps))


def _rate(lr: Any, t: Any, betas: tuple[float, float], correct_bias: bool) -> Any:
    """lr, corrected for averages that began at 0."""
    return lr * ((1 - betas[1] ** t) ** 0.5 / (1 - betas[0] ** t)) if correct_bias else lr


def gradnormlorp_param_groups(
    model: nn.Module, target: str | Collection[str] = ("attn", "mlp"), rank: float = 128, **options: Any
) -> list[dict[str, Any]]:
    """The parameters of a model in two groups for :class:`GradNormLoRP`: plain AdamW, and the targets with their rank.

    Targets are the weights of linear layers whose dotted name contains one of the words in ``target``, and both factors
    of a :class:`GradNormLoRPLinear` of such a name. Frozen parameters are left out.

    Args:
        model: the network.
        target: a word, or several.
        rank: of the projection, an int >= 1 or a share of the smaller side in (0, 1].
        options: further options of the targets' group: ``scale``, ``update_proj_gap``, ...

    Raises:
        ValueError: no linear layer has such a name.

    >>> import torch
    >>> from assay.optim import GradNormLoRP, gradnormlorp_param_groups
    >>> model = torch.nn.ModuleDict({"mlp": torch.nn.Linear(8, 8), "head": torch.nn.Linear(8, 2)})
    >>> groups = gradnormlorp_param_groups(model, rank=4, scale=0.25)
    >>> [len(group["params"]) for group in groups]
    [3, 1]
    >>> optimizer = GradNormLoRP(groups, lr=1e-2)
    """
    words = (target,) if isinstance(target, str) else tuple(target)
    chosen: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        if any(word in name for word in words):
            for kind, names in FACTORS.items():
                found = [getattr(module, name) for name in names] if isinstance(module, kind) else []
                chosen |= {id(p): p for p in found if p.requires_grad}
    if not chosen:
        raise ValueError(f"target = {target!r} is out of range: words in the names of linear layers that train")
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    return [{"params": others}, {"params": list(chosen.values()), "rank": rank, **options}]
