"""How the steps of a shared parameter are divided among the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from assay.optim._rule import below_one

Memory = dict[nn.Parameter, list[dict[str, Tensor]]]


@torch.no_grad()
def task_update_au(
    optimizer: torch.optim.Optimizer,
    per_task_grads: Sequence[Sequence[Tensor | None]],
    memory: Memory,
    *,
    decay: float = 0.99,
) -> dict[nn.Parameter, Tensor]:
    """The share that every task has in the updates of an ordinary Adam, AdamW, RMSprop or Adagrad.

    Call it after every ``optimizer.step()``, with the K tasks' gradients g_k whose sum the optimizer was given, and
    with the same ``memory``, a dict that is empty at first. With lr, eps and v the optimizer's (v with its bias
    correction, one for all tasks), for each element of a parameter ::

        m_k     = beta1 * m_k + (1 - beta1) * g_k              (RMSprop and Adagrad: m_k = g_k, without correction)
        Delta_k = lr * (m_k / (1 - beta1^t)) / (sqrt(v) + eps)             the Delta_k add up to the optimizer's step
        AU_k    = decay * AU_k + (1 - decay) * Delta_k^2
        share_k = mean of AU_k / sum_j AU_j                    over the elements that any task has moved

    Args:
        optimizer: with state for its latest step; RMSprop without momentum and not centered.
        per_task_grads: for each task a list over all of the optimizer's parameters, in their order; None where the task
            gives no gradient.
        memory: m_k and AU_k of all parameters, written here.
        decay: in [0, 1).

    Returns:
        For each parameter with a gradient of any task, so far as it has moved, the shares, shape (K,), in float32 at
        least: 1/K is balance, near 1 dominance.

    Raises:
        ValueError: decay out of range, or lists of gradients that do not fit the parameters.
        TypeError: an optimizer of another kind.

    Source: E. Yang et al., AdaTask, AAAI 2023, arXiv 2211.15055.

    >>> import torch
    >>> from assay.optim import task_update_au
    >>> w = torch.nn.Parameter(torch.zeros(3))
    >>> optimizer, memory = torch.optim.Adam([w]), {}
    >>> small, large = torch.ones(3), torch.full((3,), 3.0)
    >>> w.grad = small + large
    >>> optimizer.step()
    >>> task_update_au(optimizer, [[small], [large]], memory)[w]
    tensor([0.1000, 0.9000])
    """
    below_one({"decay": decay}, "decay")
    members = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    if any(len(grads) != len(members) for grads in per_task_grads):
        raise ValueError(f"per_task_grads is out of range: a list of {len(members)} gradients for each task")
    found = {}
    for i, (group, p) in enumerate(members):
        grads = [list(task)[i] for task in per_task_grads]
        if all(g is None for g in grads):
            continue
        parts = memory.setdefault(p, [{} for _ in grads])
        for part, g in zip(parts, grads, strict=True):
            change = _change(part, torch.zeros_like(p) if g is None else g, optimizer.state[p], group)
            au = part.setdefault("au", torch.zeros_like(p))
            au.mul_(decay).addcmul_(change, change, value=1 - decay)
        shares = relative([part["au"] for part in parts])
        if shares is not None:
            found[p] = shares
    return found


def _change(part: dict[str, Tensor], g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """One task's part of the latest step."""
    lr, eps = group["lr"], group.get("eps", 0.0)
    if "exp_avg_sq" in state:
        (beta1, beta2), t = group["betas"], int(state["step"])
        m = part.setdefault("m", torch.zeros_like(g)).lerp_(g, 1 - beta1)
        v = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"] / (1 - beta2**t)
        return lr / (1 - beta1**t) * m / (v.sqrt() + eps)
    if "square_avg" in state and not group.get("momentum") and not group.get("centered"):
        return lr * g / (state["square_avg"].sqrt() + eps)
    if "sum" in state:
        return lr / (1 + (int(state["step"]) - 1) * group["lr_decay"]) * g / (state["sum"].sqrt() + eps)
    raise TypeError("optimizer is out of range: Adam, AdamW, plain RMSprop or Adagrad, after a step")


def relative(parts: list[Tensor]) -> Tensor | None:
    """The mean over elements of each part's share of the sum; None where all parts are zero everywhere."""
    # Of sharded tensors all shards count.
    whole = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in parts]
    stacked = torch.stack([x.to(torch.promote_types(x.dtype, torch.float32)).flatten() for x in whole])
    total = stacked.sum(0)
    moved = total > 0
    return (stacked[:, moved] / total[moved]).mean(1) if moved.any() else None
