"""diffGrad: Adam with a friction that is high where the gradient hardly changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from assay.optim._rule import RuleOptimizer, at_least_zero, below_one


def diffgrad_friction(grad: Tensor, prev_grad: Tensor) -> Tensor:
    """The friction coefficient of diffGrad, ``xi = sigmoid(|prev_grad - grad|)``, element by element in [0.5, 1).

    Where the gradient repeats itself it is 1/2, where it changes much it is near 1. The change counts in the gradient's
    own units: scaled gradients have another friction.

    Args:
        grad, prev_grad: the gradients of this step and of the one before, of one shape.

    Source: S. R. Dubey et al., diffGrad, IEEE TNNLS 2020, arXiv 1909.11015.

    >>> import torch
    >>> from assay.optim import diffgrad_friction
    >>> diffgrad_friction(torch.tensor([1.0, 1.0]), torch.tensor([1.0, -100.0]))
    tensor([0.5000, 1.0000])
    """
    return (prev_grad - grad).abs().sigmoid()


class DiffGrad(RuleOptimizer):
    """diffGrad: Adam whose step is damped where the gradient is the same as before, as near an optimum.

    With g_t the gradient at step t = 1, 2, ... of a parameter p, and g_0 = m_0 = v_0 = 0 ::

        g_t = g_t + weight_decay * p                              (decoupled: p = (1 - lr * weight_decay) * p instead)
        m_t = beta1 * m_{t-1} + (1 - beta1) * g_t                 v_t = beta2 * v_{t-1} + (1 - beta2) * g_t^2
        xi  = sigmoid(|g_{t-1} - g_t|)
        p   = p - lr * sqrt(1 - beta2^t) / (1 - beta1^t) * xi * m_t / (sqrt(v_t) + eps)

    ``amsgrad`` takes the largest v so far in place of v_t. The friction scales the step, never the average m; eps is
    added before the correction of v, unlike in ``torch.optim.Adam``. The friction depends on the scale of the gradient:
    unscale it (``GradScaler.unscale_``) and clip it before ``step``.

    Args:
        params: parameters, or groups of them with options of their own; complex ones count as pairs of real numbers.
        lr: learning rate, >= 0; a number or a tensor of one element.
        betas: decay rates of the two averages, each in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: >= 0; part of the gradient, or decoupled.
        decoupled: decay as AdamW does.
        amsgrad: never let v shrink; one more tensor of state.
        maximize: ascend.
        foreach: None runs small tensors as lists, True all that may be, False one after the other.
        compile: run through ``torch.compile``; the first steps compile, a new ``lr`` does not.
        capturable, fused: no CUDA graphs and no native kernel yet; True is refused.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: a sparse gradient.

    Source: S. R. Dubey et al., diffGrad, IEEE TNNLS 2020, arXiv 1909.11015.

    >>> import torch
    >>> from assay.optim import DiffGrad
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = DiffGrad(model.parameters(), lr=1e-3)
    >>> model(torch.ones(4, 2)).square().mean().backward()
    >>> optimizer.step()
    """

    slots = ("exp_avg", "exp_avg_sq", "previous_grad")
    complex_as_real = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled: bool = False,
        amsgrad: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        compile: bool = False,
        fused: bool | None = None,
    ) -> None:
        if capturable:
            raise ValueError(f"capturable = {capturable!r} is out of range: DiffGrad counts its steps on the CPU")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"decoupled": decoupled, "amsgrad": amsgrad}
        super().__init__(params, defaults, maximize=maximize, foreach=foreach, compile=compile, fused=fused)

    @classmethod
    def slots_of(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        return (*cls.slots, "max_exp_avg_sq") if options["amsgrad"] else cls.slots

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        at_least_zero(options, "eps", "weight_decay")
        below_one(options, "betas")

    @staticmethod
    def rule(
        p: Any, g: Any, m: Any, v: Any, previous: Any, *largest: Any, lr: Any, t: Any, betas: tuple[float, float],
        eps: float, weight_decay: float, decoupled: bool, amsgrad: bool,
    ) -> None:  # fmt: skip
        beta1, beta2 = betas
        if decoupled:
            p.mul_(1 - lr * weight_decay)
        elif weight_decay:
            g = g.add(p, alpha=weight_decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        step = previous.sub_(g).abs().sigmoid_().mul_(m)
        previous.copy_(g)
        if amsgrad:
            v = largest[0].copy_(largest[0].maximum(v))
        p.sub_(step.div_(v.sqrt().add_(eps)).mul_(lr * ((1 - beta2**t) ** 0.5 / (1 - beta1**t))))
