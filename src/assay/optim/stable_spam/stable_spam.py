"""Stable-SPAM: Adam that clips spikes of the gradient, normalizes its norm over time, and restarts its momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from assay.optim._rule import RuleOptimizer, at_least_zero, below_one, row_blocks


class ClipState(NamedTuple):
    """What :func:`adaclip` remembers: how many gradients it saw, and the average of their largest entries."""

    step: int
    largest: Tensor


class NormState(NamedTuple):
    """What :func:`adagn` remembers: how many gradients it saw, and the averages of their norms and squared norms."""

    step: int
    norm: Tensor
    square: Tensor


def adaclip(grad: Tensor, state: ClipState | None, gamma3: float = 0.999) -> tuple[Tensor, ClipState]:
    """Scale down the entries of a gradient that are larger than its largest entry usually is.

    With T_0 = 0, for the gradients g_t, t = 1, 2, ... of one tensor ::

        T_t = gamma3 * T_{t-1} + (1 - gamma3) * max |g_t|            That = T_t / (1 - gamma3^t)
        g_i = g_i * That / max |g_t|    where |g_i| > That

    So the largest entry becomes That, and smaller spikes stay smaller than it. The first gradient is left as it is.

    Args:
        grad: any shape; not changed.
        state: what the last call returned; None at the first.
        gamma3: in [0, 1); with 0 nothing is clipped.

    Returns:
        The clipped gradient, and the state for the next call.

    Raises:
        ValueError: ``gamma3`` out of range.

    Source: T. Huang et al., Stable-SPAM, 2025, arXiv 2502.17055.

    >>> import torch
    >>> from assay.optim import adaclip
    >>> _, state = adaclip(torch.tensor([1.0, -2.0]), None, gamma3=0.5)
    >>> adaclip(torch.tensor([1.0, -8.0]), state, gamma3=0.5)[0].tolist()
    [1.0, -6.0]
    """
    below_one({"gamma3": gamma3}, "gamma3")
    g = _wide(grad)
    largest = _top(g)
    step, average = state or (0, torch.zeros_like(largest))
    state = ClipState(step + 1, average.lerp(largest, 1 - gamma3))
    return _clipped(g, state.largest / (1 - gamma3**state.step), largest).to(grad.dtype), state


def adagn(
    grad: Tensor, state: NormState | None, gamma1: float = 0.7, gamma2: float = 0.9, eps: float = 1e-8
) -> tuple[Tensor, NormState]:
    """Give a gradient a norm near 1, larger or smaller as it is against the norms before.

    With mu_0 = nu_0 = 0 and n_t the Euclidean norm of g_t, t = 1, 2, ... ::

        mu_t = gamma1 * mu_{t-1} + (1 - gamma1) * n_t                nu_t = gamma2 * nu_{t-1} + (1 - gamma2) * n_t^2
        g    = g_t / n_t * mu_t / (1 - gamma1^t) / (sqrt(nu_t / (1 - gamma2^t)) + eps)

    Args:
        grad: any shape; not changed. One of norm 0 stays 0.
        state: what the last call returned; None at the first.
        gamma1, gamma2: in [0, 1).
        eps: >= 0.

    Returns:
        The normalized gradient, and the state for the next call.

    Raises:
        ValueError: an argument out of range.

    Source: T. Huang et al., Stable-SPAM, 2025, arXiv 2502.17055.

    >>> import torch
    >>> from assay.optim import adagn
    >>> g, state = adagn(torch.tensor([30.0, -40.0]), None)
    >>> [round(x, 4) for x in g.tolist()]
    [0.6, -0.8]
    """
    below_one({"gamma1": gamma1, "gamma2": gamma2}, "gamma1", "gamma2")
    at_least_zero({"eps": eps}, "eps")
    g = _wide(grad)
    n = torch.linalg.vector_norm(g)
    step, norm, square = state or (0, torch.zeros_like(n), torch.zeros_like(n))
    state = NormState(step + 1, norm.lerp(n, 1 - gamma1), square.lerp(n.square(), 1 - gamma2))
    factor = _factor(n, state.norm / (1 - gamma1**state.step), state.square / (1 - gamma2**state.step), eps)
    return (g * factor).to(grad.dtype), state


class StableSPAM(RuleOptimizer):
    """Stable-SPAM: Adam on gradients whose spikes are clipped and whose norm is about 1, with momentum restarts.

    With g_t the gradient at step t = 1, 2, ... of a parameter p, each tensor with statistics of its own ::

        p   = (1 - lr * weight_decay) * p
        g   = adagn(adaclip(g_t, gamma3), gamma1, gamma2, eps)
        m = v = k = 0                                           if t is a multiple of reset_interval
        k   = k + 1;    m = beta1 * m + (1 - beta1) * g;    v = beta2 * v + (1 - beta2) * g^2
        p   = p - lr / (1 - beta1^k) * m / (sqrt(v) / sqrt(1 - beta2^k) + eps)

    With ``total_steps``, gamma1 and beta1 are multiplied by
    ``eta_min + (1 - eta_min) (1 + cos(pi t / (total_steps + 1))) / 2``, which ends at ``eta_min`` and stays there.
    Multiplying all gradients by a number changes nothing, so that they need not be clipped before; with a
    ``GradScaler`` unscale them. A tensor whose gradient holds an inf or a nan is left alone in that step, and nothing
    waits for the device.

    Args:
        params: parameters, or groups of them with options of their own; real, with dense gradients.
        lr: learning rate, >= 0; a number or a tensor of one element.
        betas: decay rates of the two averages, each in [0, 1).
        eps: added to the denominators, >= 0.
        weight_decay: decoupled decay, >= 0.
        gamma1, gamma2: decay rates of the averages of the norm and its square, in [0, 1); gamma1 None means beta1.
        gamma3: decay rate of the average of the largest entry, in [0, 1).
        reset_interval: steps between restarts of Adam's averages, an integer >= 1; 0 or None never restarts.
        total_steps: steps of the schedule of gamma1 and beta1, an integer >= 1; None keeps them.
        eta_min: where that schedule ends, in [0, 1].
        amsgrad: never let v shrink, but for restarts; one more tensor of state.
        clip, normalize: False leaves AdaClip or AdaGN out. Without both and without restarts this is AdamW.
        maximize: ascend.
        foreach: no effect: sums over a tensor are taken of each by itself.
        compile: run through ``torch.compile``; the first steps compile, a new ``lr`` does not.
        fused: no native kernel yet; True is refused.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: a sparse gradient or a complex parameter.

    Source: T. Huang et al., Stable-SPAM, 2025, arXiv 2502.17055.

    >>> import torch
    >>> from assay.optim import StableSPAM
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = StableSPAM(model.parameters(), lr=1e-3, **StableSPAM.preset("bf16"))
    >>> model(torch.ones(4, 2)).square().mean().backward()
    >>> optimizer.step()
    """

    slots = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        gamma1: float | None = 0.7,
        gamma2: float = 0.9,
        gamma3: float = 0.999,
        reset_interval: int | None = 1000,
        total_steps: int | None = None,
        eta_min: float = 0.5,
        amsgrad: bool = False,
        clip: bool = True,
        normalize: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"gamma1": gamma1, "gamma2": gamma2, "gamma3": gamma3, "reset_interval": reset_interval}
        defaults |= {"total_steps": total_steps, "eta_min": eta_min, "amsgrad": amsgrad}
        defaults |= {"clip": clip, "normalize": normalize}
        super().__init__(params, defaults, maximize=maximize, foreach=foreach, compile=compile, fused=fused)

    @staticmethod
    def preset(name: str) -> dict[str, Any]:
        """The authors' options for training in ``"bf16"`` or ``"4bit"``, to be given as keywords."""
        presets = {
            "bf16": {"gamma1": 0.85, "gamma2": 0.99999, "gamma3": 0.999},
            "4bit": {"gamma1": 0.7, "gamma2": 0.9, "gamma3": 0.999, "reset_interval": 500},
        }
        if name not in presets:
            raise ValueError(f"name = {name!r} is out of range: one of {', '.join(presets)}")
        return presets[name]

    @classmethod
    def slots_of(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        return (*cls.slots, "max_exp_avg_sq") if options["amsgrad"] else cls.slots

    @staticmethod
    def elementwise(p: Tensor) -> bool:
        return False

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        at_least_zero(options, "eps", "weight_decay")
        below_one(options, "betas", "gamma2", "gamma3")
        if options["gamma1"] is not None:
            below_one(options, "gamma1")
        for name, least in (("reset_interval", 0), ("total_steps", 1)):
            value = options[name]
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name} = {value!r} is out of range: None or an integer >= {least}")
        if not 0 <= options["eta_min"] <= 1:
            raise ValueError(f"eta_min = {options['eta_min']!r} is out of range: [0, 1]")

    def _tensors(self, p: Tensor, group: Mapping[str, Any]) -> tuple[int, tuple[Tensor, ...]]:
        t, tensors = super()._tensors(p, group)
        state = self.state[p]
        if "statistics" not in state:
            # T, mu, nu, how many gradients they saw, and k: a call costs as much on five numbers as on one.
            state["statistics"] = torch.zeros(5, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
        if group["reset_interval"] and t % group["reset_interval"] == 0:
            state["statistics"][4] = 0
            for name in self.slots_of(group):
                state[name].zero_()
        return t, (*tensors, state["statistics"])

    @staticmethod
    def rule(
        p: Any, g: Any, m: Any, v: Any, *rest: Any, lr: Any, t: Any, betas: tuple[float, float], eps: float,
        weight_decay: float, gamma1: float | None, gamma2: float, gamma3: float, total_steps: int | None,
        eta_min: float, clip: bool, normalize: bool,
    ) -> None:  # fmt: skip
        *slots, statistics = rest
        scale = _schedule(t, total_steps, eta_min)
        beta1, beta2 = betas[0] * scale, betas[1]
        gamma1 = beta1 if gamma1 is None else gamma1 * scale
        # To look at a number costs nothing on a CPU; elsewhere it would wait for the device, and numbers stay tensors.
        look = p.device.type == "cpu" and not torch.compiler.is_compiling()
        T, mu, nu, count, k = statistics.tolist() if look else statistics.unbind()

        def number(x: Tensor) -> Any:
            return x.item() if look else x

        blocks = list(zip(*(row_blocks(_part(x)) for x in (p, g, m, v, *slots)), strict=True))
        grads = [_wide(g_) for _, g_, *_ in blocks]
        # A block's own norm is taken while the block is in the cache, and again only where something is clipped.
        measured = [(_top(g_) if clip else g_.new_zeros(()), torch.linalg.vector_norm(g_)) for g_ in grads]
        largest = number(_across(_joined([top for top, _ in measured], math.inf), g, "max"))
        threshold = (gamma3 * T + (1 - gamma3) * largest) / _unbias(gamma3, count + 1)
        clips = [clip and (not look or not top.item() <= threshold) for top, _ in measured]
        if len(grads) == 1 and clips[0]:
            grads, clips = [_clipped(grads[0], threshold, largest)], [False]
            measured = [(largest, torch.linalg.vector_norm(grads[0]))]
        norms = [
            torch.linalg.vector_norm(_clipped(g_, threshold, largest)) if clips_ else norm
            for g_, (_, norm), clips_ in zip(grads, measured, clips, strict=True)
        ]
        n = number(_across(_joined(norms, 2).square(), g, "sum").sqrt() if _is_sharded(g) else _joined(norms, 2))
        # 1 where all is finite. Else 0, and so are the weights of all updates.
        fine, largest, n = _guarded(largest, n)
        if look and not fine:
            return
        T = T + (1 - gamma3) * fine * (largest - T)
        mu = mu + (1 - gamma1) * fine * (n - mu)
        nu = nu + (1 - gamma2) * fine * (n * n - nu)
        count, k = count + fine, k + fine
        now = (T, mu, nu, count, k)
        statistics.copy_(torch.tensor(now, dtype=statistics.dtype) if look else torch.stack(now))
        factor = fine
        if normalize:
            mean, square = mu / _unbias(gamma1, count), nu / _unbias(gamma2, count)
            factor = fine * _factor(n, mean, square, eps)

        rate, root = fine * lr / _unbias(beta1, k), _unbias(beta2, k) ** 0.5
        keep, keep_v, new_m = 1 - fine * (lr * weight_decay), 1 - (1 - beta2) * fine, (1 - beta1) * fine
        new_m = new_m.to(m.dtype) if isinstance(new_m, Tensor) else new_m
        for (p_, _, m_, v_, *top_), g_, clips_ in zip(blocks, grads, clips, strict=True):
            u = (_clipped(g_, threshold, largest) if clips_ else g_).mul(factor)
            u = (u if look else u.nan_to_num_(0.0, 0.0, 0.0)).to(p_.dtype)
            m_.lerp_(u, new_m)
            v_.mul_(keep_v).addcmul_(u, u, value=1 - beta2)
            if top_:
                v_ = top_[0].copy_(top_[0].maximum(v_))
            denominator = v_.sqrt().div_(root).add_(eps)
            p_.mul_(keep)
            if isinstance(rate, Tensor):
                p_.sub_(m_.div(denominator).mul_(rate))
            else:  # a pass less
                p_.addcdiv_(m_, denominator, value=-rate)


def _clipped(g: Tensor, threshold: Tensor, largest: Tensor) -> Tensor:
    """``g`` with the entries beyond the threshold scaled as the largest must be to reach it."""
    return torch.where(g.abs() > threshold, g * (threshold / largest), g)


# What follows takes numbers, and 0-d tensors where a number would have to be waited for.


def _factor(n: Any, mean: Any, square: Any, eps: float) -> Any:
    """What makes a norm n one of ``mean / (sqrt(square) + eps)``; finite for n = 0."""
    return mean / _positive(square**0.5 + eps) / _positive(n)


def _positive(x: Any) -> Any:
    tiny = torch.finfo(torch.float32).tiny
    return x.clamp(min=tiny) if isinstance(x, Tensor) else max(x, tiny)


def _unbias(decay: Any, count: Any) -> Any:
    """``1 - decay^count``, to full precision also in float32; 1 for a count of 0, where it is not used."""
    if isinstance(count, Tensor):
        return -torch.expm1(count.clamp(min=1) * torch.as_tensor(decay, dtype=count.dtype, device=count.device).log())
    return -math.expm1(max(count, 1) * math.log(decay)) if decay else 1.0


def _guarded(largest: Any, n: Any) -> tuple[Any, Any, Any]:
    """1, and the two as they are; or 0, 0 and 0 if one is infinite or no number."""
    if isinstance(n, Tensor):
        fine = (largest + n * n).isfinite()
        return fine.to(n.dtype), torch.where(fine, largest, 0.0), torch.where(fine, n, 0.0)
    return (1.0, largest, n) if math.isfinite(largest + n * n) else (0.0, 0.0, 0.0)


def _schedule(t: Any, total_steps: int | None, eta_min: float) -> Any:
    """The factor on gamma1 and beta1 at step t, a number or a tensor as t is."""
    if total_steps is None:
        return 1.0
    turn = math.pi / (total_steps + 1)
    cosine = (t * turn).clamp(max=math.pi).cos() if isinstance(t, Tensor) else math.cos(min(t * turn, math.pi))
    return eta_min + (1 - eta_min) * (1 + cosine) / 2


def _wide(x: Tensor) -> Tensor:
    """In float32 at least: a half-precision norm would lose its digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _part(x: Any) -> Tensor:
    """This process's part of a sharded tensor."""
    return x.to_local() if _is_sharded(x) else x


def _is_sharded(x: Any) -> bool:
    return hasattr(x, "to_local")


def _top(x: Tensor) -> Tensor:
    """The largest absolute value."""
    if not x.numel():  # a process may hold nothing of a sharded tensor
        return x.new_zeros(())
    low, high = torch.aminmax(x)
    return torch.maximum(high, -low)


def _joined(norms: list[Tensor], order: float) -> Tensor:
    """The norm of a whole from those of its blocks."""
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), order)


def _across(value: Tensor, sharded: Any, reduction: str) -> Tensor:
    """Reduce over the dimensions of the mesh along which a tensor is sharded."""
    if not _is_sharded(sharded):
        return value
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Partial(reduction) if at.is_shard() else Replicate() for at in sharded.placements]
    return DTensor.from_local(value, sharded.device_mesh, placements).full_tensor()
