"""AdaGrad with one step size for all parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from assay.optim._rule import at_least_zero

_GLOBAL: Any = "global"  # no parameter's state, so that loading does not cast it to a parameter's dtype


class AdaGradNorm(torch.optim.Optimizer):
    """AdaGrad-Norm: gradient descent whose step size falls with the norms of all gradients so far.

    With g_k the gradient of all parameters of all groups as one vector ::

        v_0 = b0^2
        v_k = v_{k-1} + |g_k|^2
        x_k = x_{k-1} - lr * g_k / (sqrt(v_k) + eps)

    where, if ``weight_decay`` > 0, g_k is the gradient plus ``weight_decay`` * x (as in ``torch.optim.Adagrad``). The
    accumulator v is one number, so the step goes along the gradient and the path turns with the coordinates.

    Args:
        params: parameters or groups of them. ``lr``, ``eps`` and ``weight_decay`` may differ between groups.
        lr: learning rate, >= 0; a number or a tensor of one element.
        b0: square root of the first v, >= 0; the larger, the smaller the first steps.
        eps: >= 0; with ``b0`` = 0 it must be > 0.
        weight_decay: >= 0.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: a sparse gradient.

    Source: Ward, Wu and Bottou, "AdaGrad stepsizes", arXiv 1806.01811, 2018; Lau, Liu and Kolar, "AdAdaGrad",
    arXiv 2402.11215, 2024.

    Example:
        >>> import torch
        >>> from assay.optim import AdaGradNorm
        >>> x = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = AdaGradNorm([x], lr=1.0, b0=0.0)
        >>> x.square().sum().backward()
        >>> optimizer.step()  # a step of length lr along the gradient, as nothing came before
        >>> [round(value, 4) for value in x.tolist()]
        [2.4, 3.2]
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        b0: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
    ) -> None:
        at_least_zero({"b0": b0}, "b0")
        if b0 == 0 and eps == 0:
            raise ValueError("eps = 0 is out of range: a number > 0 where b0 = 0")
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})
        self.state[_GLOBAL] = {"v": torch.tensor(float(b0) ** 2, dtype=torch.float64)}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, which share the accumulator from now on."""
        if unknown := param_group.keys() - self.defaults.keys() - {"params", "param_names", "initial_lr"}:
            raise TypeError(f"AdaGradNorm has no option {', '.join(map(repr, sorted(unknown)))} of a group")
        options = {**self.defaults, **param_group}
        lr = options["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr of shape {tuple(lr.shape)} is out of range: a number >= 0 or a tensor of one element")
        at_least_zero(options, "lr", "eps", "weight_decay")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [
            (group, [(p, _gradient(p, p.grad, group["weight_decay"])) for p in group["params"] if p.grad is not None])
            for group in self.param_groups
        ]
        squares = [_norm_sq(g) for _, pairs in found for _, g in pairs]
        if not squares:
            return loss
        device = squares[0].device
        v = self.state[_GLOBAL]["v"].to(device, torch.float32 if device.type == "mps" else torch.float64)
        v = v + torch.stack([square.to(v) for square in squares]).sum()
        self.state[_GLOBAL] = {"v": v}  # a new dict: the old one may belong to a state_dict that somebody holds
        for group, pairs in found:
            scale = (-group["lr"] / (v.sqrt() + group["eps"])).reshape(())
            for p, g in pairs:
                p.addcmul_(g, scale.to(p.device))
        return loss


def _gradient(p: Tensor, grad: Tensor, weight_decay: float) -> Tensor:
    if grad.is_sparse:
        raise RuntimeError("AdaGradNorm does not support sparse gradients")
    return torch.add(grad, p, alpha=weight_decay) if weight_decay else grad


def _norm_sq(g: Tensor) -> Tensor:
    """Squared norm in float32 at least, of the whole tensor where it is sharded."""
    norm = torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32))
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).square()
