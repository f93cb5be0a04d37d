"""AdamP and SGDP: Adam and SGD that do not let momentum grow the norm of scale-invariant weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from assay.optim._rule import RuleOptimizer, at_least_zero, below_one, row_blocks


def project_radial(
    param: Tensor, grad: Tensor, update: Tensor, delta: float, wd_ratio: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Take from ``update`` its part along ``param`` if the gradient shows that the weight is scale-invariant.

    A weight w is scale-invariant if f(c w) = f(w) for c > 0; then its gradient g is orthogonal to it. Two views are
    tried, first one group i per row ``param[i]``, then the whole tensor as one group, of D elements each::

        fires if    max_i |<g_i, w_i>| / (|g_i| |w_i|)  <  delta / sqrt(D)
        and then    u_i <- u_i - h_i <h_i, u_i>     with  h_i = w_i / (|w_i| + eps),      decay scale <- wd_ratio

    If neither fires, the update stays and the decay scale is 1. No argument is changed, and no value is read back from
    the device: both views are computed and one is selected.

    Args:
        param, grad, update: w, g and u, of one shape with at least one dimension.
        delta: threshold, >= 0; 0 never fires.
        wd_ratio: factor on the weight decay of a projected weight.
        eps: floor of the norms in the cosine, and added to the norm in h.

    Returns:
        The new update, and the decay scale as a 0-d tensor.

    Source: B. Heo, S. Chun, S. J. Oh et al., AdamP, ICLR 2021, arXiv 2006.08217.

    >>> import torch
    >>> from assay.optim import project_radial
    >>> w, g = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    >>> project_radial(w, g, torch.tensor([[3.0, 4.0]]), delta=0.1, wd_ratio=0.1, eps=1e-8)
    (tensor([[0., 4.]]), tensor(0.1000))
    """
    part, decay = _radial(_sums(param, grad, update), param.shape, delta, wd_ratio, eps)
    return torch.addcmul(update, part.to(update.dtype), param, value=-1), decay


def _sums(w: Tensor, g: Tensor, u: Tensor) -> Tensor:
    """<w_i, g_i>, <w_i, w_i>, <g_i, g_i> and <w_i, u_i> for every row i, shape (4, rows)."""
    # In float32 at least: sums of half-precision products would lose the cosine.
    w, g, u = (x.unsqueeze(-1).flatten(1).to(torch.promote_types(x.dtype, torch.float32)) for x in (w, g, u))
    dot, norm = torch.linalg.vecdot, torch.linalg.vector_norm
    return torch.stack([dot(w, g), norm(w, dim=1).square(), norm(g, dim=1).square(), dot(w, u)])


def _radial(sums: Tensor, shape: torch.Size, delta: float, wd_ratio: float, eps: float) -> tuple[Tensor, Tensor]:
    """What to subtract from the update, in units of the weight, shape (rows, 1, ...), and the decay scale."""

    def fires(sums: Tensor, size: int) -> tuple[Tensor, Tensor]:
        wg, ww, gg, wu = sums.unbind()
        norm = ww.sqrt()
        cosine = wg.abs() / (norm.clamp(min=eps) * gg.sqrt().clamp(min=eps))
        return cosine.max() < delta / math.sqrt(size), wu / (norm + eps).square()

    row_size = math.prod(shape[1:])
    by_row, row_part = fires(sums, row_size)
    by_layer, layer_part = fires(sums.sum(1), shape[0] * row_size)
    part = torch.where(by_row, row_part, torch.where(by_layer, layer_part, 0.0))
    decay = torch.where(by_row | by_layer, sums.new_full((), wd_ratio), 1.0)
    return part.view(-1, *[1] * (len(shape) - 1)), decay


def _descend(
    p: Any, g: Any, slots: tuple[Any, ...], direction: Callable[..., Any], *, rate: Any, decay_rate: Any, delta: float,
    wd_ratio: float, eps: float,
) -> None:  # fmt: skip
    """``p <- (1 - decay_rate * s) * p - rate * u`` with ``u = direction(g, *slots)``, projected if p is a matrix.

    It is ``project_radial`` in place, block of rows by block of rows, so that what one operator has read is still in
    the cache when the next one wants it.
    """
    if p.ndim <= 1:
        p.mul_(1 - decay_rate).sub_(direction(g, *slots).mul_(rate))
        return
    blocks = list(zip(*(row_blocks(x) for x in (p, g, *slots)), strict=True))
    updates, sums = [], []
    for w, g_, *slots_ in blocks:
        updates.append(direction(g_, *slots_))
        sums.append(_sums(w, g_, updates[-1]))
    part, scale = _radial(torch.cat(sums, 1) if len(sums) > 1 else sums[0], p.shape, delta, wd_ratio, eps)
    keep = 1 - decay_rate * scale
    parts = row_blocks(part.to(p.dtype), like=p)
    for (w, *_), u, part_ in zip(blocks, updates, parts, strict=True):
        u.addcmul_(part_, w, value=-1)
        w.mul_(keep).sub_(u.mul_(rate))


class AdamP(RuleOptimizer):
    """AdamP: Adam whose update is projected off scale-invariant weights, so that momentum does not grow their norm.

    With g_t the gradient at step t = 1, 2, ... of a parameter p ::

        m_t = beta1 * m_{t-1} + (1 - beta1) * g_t            v_t = beta2 * v_{t-1} + (1 - beta2) * g_t^2
        u   = m_t / (sqrt(v_t) / sqrt(1 - beta2^t) + eps)    (nesterov: beta1 * m_t + (1 - beta1) * g_t in place of m_t)
        u, s = project_radial(p, g_t, u, delta, wd_ratio, eps)           if p has two dimensions or more, else s = 1
        p   = (1 - lr * weight_decay * s) * p - lr / (1 - beta1^t) * u

    Where nothing is projected it is ``torch.optim.AdamW``.

    Args:
        params: parameters, or groups of them with options of their own; real, with dense gradients.
        lr: learning rate, >= 0; a number or a tensor of one element.
        betas: decay rates of the two averages, each in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decoupled decay, >= 0.
        delta: threshold on the cosine of gradient and weight, >= 0; 0 projects never.
        wd_ratio: factor on the decay of projected weights, in [0, 1].
        nesterov: look one momentum step ahead.
        maximize: ascend.
        foreach: None runs small tensors as lists, True all that may be, False one after the other.
        compile: run through ``torch.compile``; the first steps compile, a new ``lr`` does not.
        fused: no native kernel yet; True is refused.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: a sparse gradient or a complex parameter (its phase is no scale).

    Source: B. Heo, S. Chun, S. J. Oh et al., AdamP, ICLR 2021, arXiv 2006.08217.

    >>> import torch
    >>> from assay.optim import AdamP
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = AdamP(model.parameters(), lr=1e-3, weight_decay=1e-2)
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
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"delta": delta, "wd_ratio": wd_ratio, "nesterov": nesterov}
        super().__init__(params, defaults, maximize=maximize, foreach=foreach, compile=compile, fused=fused)

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        at_least_zero(options, "eps", "weight_decay", "delta")
        below_one(options, "betas")
        _check_ratio(options)

    @staticmethod
    def elementwise(p: Tensor) -> bool:
        return p.dim() <= 1

    @staticmethod
    def rule(
        p: Any, g: Any, m: Any, v: Any, *, lr: Any, t: Any, betas: tuple[float, float], eps: float, weight_decay: float,
        delta: float, wd_ratio: float, nesterov: bool,
    ) -> None:  # fmt: skip
        beta1, beta2 = betas

        def direction(g: Any, m: Any, v: Any) -> Any:
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            denominator = v.sqrt().div_((1 - beta2**t) ** 0.5).add_(eps)
            return (m.lerp(g, 1 - beta1) if nesterov else m).div(denominator)

        rates = {"rate": lr / (1 - beta1**t), "decay_rate": lr * weight_decay}
        _descend(p, g, (m, v), direction, **rates, delta=delta, wd_ratio=wd_ratio, eps=eps)


class SGDP(RuleOptimizer):
    """SGDP: SGD with momentum whose update is projected off scale-invariant weights.

    With g_t the gradient at step t of a parameter p and b_0 = 0 ::

        b_t = momentum * b_{t-1} + (1 - dampening) * g_t
        u   = b_t                                            (nesterov: g_t + momentum * b_t)
        u, s = project_radial(p, g_t, u, delta, wd_ratio, eps)           if p has two dimensions or more, else s = 1
        p   = (1 - lr * weight_decay * s / (1 - momentum)) * p - lr * u

    The decay is decoupled, and divided by 1 - momentum as if it had gone through the buffer. Unlike in
    ``torch.optim.SGD`` the first gradient is dampened like the others.

    Args:
        params: parameters, or groups of them with options of their own; real, with dense gradients.
        lr: learning rate, >= 0; a number or a tensor of one element.
        momentum: in [0, 1).
        dampening: in [0, 1].
        weight_decay: decoupled decay, >= 0.
        nesterov: look one momentum step ahead.
        eps: floor of the norms, >= 0.
        delta, wd_ratio, maximize, foreach, compile, fused: as in :class:`AdamP`.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: a sparse gradient or a complex parameter.

    Source: B. Heo, S. Chun, S. J. Oh et al., AdamP, ICLR 2021, arXiv 2006.08217.

    >>> import torch
    >>> from assay.optim import SGDP
    >>> p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> optimizer = SGDP([p], lr=0.5, momentum=0.9)
    >>> p.sum().backward()
    >>> optimizer.step()
    >>> p.tolist()
    [0.5, 1.5]
    """

    slots = ("momentum_buffer",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        defaults |= {"nesterov": nesterov, "eps": eps, "delta": delta, "wd_ratio": wd_ratio}
        super().__init__(params, defaults, maximize=maximize, foreach=foreach, compile=compile, fused=fused)

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        at_least_zero(options, "eps", "weight_decay", "delta")
        below_one(options, "momentum")
        if not 0 <= options["dampening"] <= 1:
            raise ValueError(f"dampening = {options['dampening']!r} is out of range: [0, 1]")
        _check_ratio(options)

    @staticmethod
    def elementwise(p: Tensor) -> bool:
        return p.dim() <= 1

    @staticmethod
    def rule(
        p: Any, g: Any, b: Any, *, lr: Any, t: Any, momentum: float, dampening: float, weight_decay: float,
        nesterov: bool, eps: float, delta: float, wd_ratio: float,
    ) -> None:  # fmt: skip
        def direction(g: Any, b: Any) -> Any:
            b.mul_(momentum).add_(g, alpha=1 - dampening)
            return b.mul(momentum).add_(g) if nesterov else b.clone()

        rates = {"rate": lr, "decay_rate": lr * weight_decay / (1 - momentum)}
        _descend(p, g, (b,), direction, **rates, delta=delta, wd_ratio=wd_ratio, eps=eps)


def _check_ratio(options: Mapping[str, Any]) -> None:
    if not 0 <= options["wd_ratio"] <= 1:
        raise ValueError(f"wd_ratio = {options['wd_ratio']!r} is out of range: [0, 1]")
