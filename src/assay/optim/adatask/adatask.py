"""AdaTask: Adam, RMSProp and AdaGrad with accumulators of their own for every task of a multi-task model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from assay.optim._many import Many
from assay.optim._rule import NOT_OPTIONS, SMALL, _local, _pieces, at_least_zero, below_one
from assay.optim.adatask.dominance import relative, task_update_au
from assay.optim.adatask.rules import BASES

__all__ = ["AdaTask", "task_update_au"]

Gradients = Sequence[Sequence[Tensor | None]]


class AdaTask(torch.optim.Optimizer):
    """AdaTask: an adaptive optimizer that scales each task's gradient by that task's own history.

    With K = ``n_tasks`` losses L_k, w = ``task_weights``, and t_k the number of this step for task k and parameter p ::

        g_k = w_k * dL_k/dp                                                    all at the same p
        m_k = beta1 * m_k + (1 - beta1) * g_k      v_k = beta2 * v_k + (1 - beta2) * g_k^2          base = "adam"
        p   = p - lr * sum_k (m_k / (1 - beta1^t_k)) / (sqrt(v_k / (1 - beta2^t_k)) + eps)

        v_k = alpha * v_k + (1 - alpha) * g_k^2    p = p - lr * sum_k g_k / (sqrt(v_k) + eps)       base = "rmsprop"
        v_k = v_k + g_k^2                          p = p - lr * sum_k g_k / (sqrt(v_k) + eps)       base = "adagrad"

    and, before all of it, ``p = (1 - lr * weight_decay) * p``, once. A constant factor on a loss, or its ``w_k``,
    cancels but for eps: no task has the learning rate to itself. The sum is up to K times as long as an ordinary step.

    A task that gives p no gradient is left out there: its m_k, v_k and t_k stay as they are. So a parameter that one
    task reaches (a head) has the ordinary optimizer, and no state for the others. Where p should have one accumulator
    for the sum of its gradients though several tasks reach it, say so: in a group with ``"shared": False``, or by
    naming all parameters that do have accumulators per task in ``step(losses, shared=...)``.

    There are four ways to step::

        optimizer.step(losses)                 K losses (None: the task is absent), or a function that returns them;
                                               they have not been through backward, and p.grad is not touched
        optimizer.accumulate(k, loss)          for each task, once or more, while only its graph is alive;
        optimizer.step()                       then the step. accumulate(k) after backward takes p.grad instead
        optimizer.step_from_grads(gradients)   gradients[k][i] of the i-th parameter, or None
        optimizer.step()                       after backward, or with a closure that calls it, if n_tasks = 1

    ``task_gradients(losses)`` are the gradients of the first way, to be clipped or projected and given to the third.

    Args:
        params: parameters, or groups of them with options of their own (also ``shared``); real, with dense gradients.
        n_tasks: K, an integer >= 1.
        lr: learning rate, >= 0; a number or a tensor of one element.
        base: ``"adam"``, ``"rmsprop"`` or ``"adagrad"``.
        betas: decay rates of Adam's averages, each in [0, 1).
        eps: added to the denominator, >= 0.
        alpha: decay rate of RMSProp's average, in [0, 1).
        weight_decay: decoupled decay, >= 0.
        decoupled: True. Coupled decay would enter the accumulators of every task, and is refused.
        task_weights: w, K numbers >= 0; None: 1 for each.
        track_au: keep what :meth:`dominance` needs, one more tensor for each parameter and task.
        au_decay: decay rate of that, in [0, 1).

    Raises:
        ValueError: an argument out of range; losses or gradients of another number of tasks; a loss of many numbers.
        RuntimeError: a sparse gradient or a complex parameter; ``step()`` of several tasks without any gradient given;
            losses of sharded parameters, whose gradients only ``backward`` brings together (use ``accumulate(k)``).

    Source: E. Yang et al., AdaTask, AAAI 2023, arXiv 2211.15055.

    >>> import torch
    >>> from assay.optim import AdaTask
    >>> trunk, first, second = torch.nn.Linear(4, 8), torch.nn.Linear(8, 1), torch.nn.Linear(8, 3)
    >>> params = [*trunk.parameters(), *first.parameters(), *second.parameters()]
    >>> optimizer = AdaTask(params, n_tasks=2, lr=1e-3)
    >>> hidden = trunk(torch.ones(16, 4)).relu()
    >>> loss = optimizer.step([1e4 * first(hidden).square().mean(), second(hidden).square().mean()])
    """

    def __init__(
        self,
        params: Any,
        n_tasks: int,
        lr: float | Tensor = 1e-3,
        *,
        base: str = "adam",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        alpha: float = 0.99,
        weight_decay: float = 0.0,
        decoupled: bool = True,
        task_weights: Sequence[float] | None = None,
        track_au: bool = False,
        au_decay: float = 0.99,
    ) -> None:
        if not isinstance(n_tasks, int) or n_tasks < 1:
            raise ValueError(f"n_tasks = {n_tasks!r} is out of range: an integer >= 1")
        if base not in BASES:
            raise ValueError(f"base = {base!r} is out of range: one of {', '.join(BASES)}")
        if not decoupled:
            raise ValueError(f"decoupled = {decoupled!r} is out of range: True")
        below_one({"au_decay": au_decay}, "au_decay")
        self.n_tasks, self.base, self.track_au, self.au_decay = n_tasks, base, track_au, au_decay
        self.task_weights = [1.0] * n_tasks if task_weights is None else [float(w) for w in task_weights]
        if len(self.task_weights) != n_tasks or not all(w >= 0 for w in self.task_weights):
            raise ValueError(f"task_weights = {task_weights!r} is out of range: {n_tasks} numbers >= 0")
        self._pending: list[dict[nn.Parameter, Tensor]] = [{} for _ in range(n_tasks)]
        self._total: Tensor | None = None
        options = {"lr": lr, "betas": betas, "eps": eps, "alpha": alpha, "weight_decay": weight_decay, "shared": None}
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; unknown options and values out of range are refused."""
        if unknown := param_group.keys() - self.defaults.keys() - NOT_OPTIONS:
            raise TypeError(f"AdaTask has no option {', '.join(map(repr, sorted(unknown)))}")
        options = {**self.defaults, **param_group}
        if isinstance(options["lr"], Tensor) and options["lr"].numel() != 1:
            shape = tuple(options["lr"].shape)
            raise ValueError(f"lr of shape {shape} is out of range: a number >= 0 or a tensor of one element")
        at_least_zero(options, "lr", "eps", "weight_decay")
        below_one(options, "betas", "alpha")
        super().add_param_group(param_group)

    # The ways to step.

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        losses: Sequence[Tensor | None] | Tensor | Callable[[], Any] | None = None,
        *,
        shared: Iterable[Tensor] | None = None,
        retain_graph: bool = False,
    ) -> Tensor | None:
        """One update; returns the weighted sum of the losses, detached, where there are losses."""
        if callable(losses) and not isinstance(losses, Tensor):
            with torch.enable_grad():
                losses = losses()
            if self.n_tasks == 1 and any(p.grad is not None for p in self._parameters()):
                self._update([self._left_by_backward()], shared)
                return losses  # type: ignore[return-value]
        if losses is not None:
            listed = self._checked(losses)
            self._update(self._gradients(listed, retain_graph), shared)
            return self._weighted(listed)
        if any(self._pending):
            pending, total = self._pending, self._total
            self._forget_pending()
            self._update(pending, shared)
            return total
        if self.n_tasks > 1:
            raise RuntimeError("AdaTask needs each task's gradient: call step(losses), or accumulate() and step()")
        self._update([self._left_by_backward()], shared)
        return None

    def step_from_grads(self, per_task_grads: Gradients, *, shared: Iterable[Tensor] | None = None) -> None:
        """One update with gradients of the unweighted losses: for each task a list over all parameters, or None."""
        params = list(self._parameters())
        given = [list(grads) for grads in per_task_grads]
        if len(given) != self.n_tasks or any(len(grads) != len(params) for grads in given):
            shape = [len(grads) for grads in given]
            raise ValueError(
                f"per_task_grads of lengths {shape} is out of range: {self.n_tasks} lists of {len(params)} gradients"
            )
        found = [{p: g for p, g in zip(params, grads, strict=True) if g is not None} for grads in given]
        self._update(found, shared)

    def accumulate(self, task_index: int, loss: Tensor | None = None, *, retain_graph: bool = False) -> None:
        """Add the gradient of this task's loss to what the next ``step()`` takes; without a loss ``p.grad``, zeroed."""
        if not isinstance(task_index, int) or not 0 <= task_index < self.n_tasks:
            raise ValueError(f"task_index = {task_index!r} is out of range: 0 to {self.n_tasks - 1}")
        if loss is None:
            new = self._left_by_backward()
            self.zero_grad()
        else:
            losses = self._checked([loss if k == task_index else None for k in range(self.n_tasks)])
            new = self._gradients(losses, retain_graph)[task_index]
            total = self._weighted(losses)
            self._total = total if self._total is None else self._total + total
        pending = self._pending[task_index]
        for p, g in new.items():
            pending[p] = pending[p] + g if p in pending else g

    def task_gradients(
        self, losses: Sequence[Tensor | None] | Tensor, *, retain_graph: bool = False
    ) -> list[list[Tensor | None]]:
        """For each task the gradients of its loss, unweighted, in the order of the parameters."""
        found = self._gradients(self._checked(losses), retain_graph)
        return [[gradients.get(p) for p in self._parameters()] for gradients in found]

    def dominance(self) -> dict[nn.Parameter, Tensor]:
        """Of each parameter the share that every task has in its updates, shape (K,): 1/K is balance, near 1 dominance.

        With Delta_k task k's part of a step, for each element of the parameter ::

            AU_k = au_decay * AU_k + (1 - au_decay) * Delta_k^2               share_k = mean of AU_k / sum_j AU_j

        the mean over the elements that any task has moved. Parameters with one accumulator for all are left out.
        """
        if not self.track_au:
            raise RuntimeError("AdaTask does not track updates: give it track_au=True")
        found = {}
        for p in self._parameters():
            state = self.state.get(p, {})
            parts = [state.get(f"au_{k}") for k in range(self.n_tasks)]
            shares = relative([torch.zeros_like(p) if part is None else part for part in parts])
            if shares is not None:
                found[p] = shares
        return found

    # What they have in common.

    def _parameters(self) -> Iterable[nn.Parameter]:
        return (p for group in self.param_groups for p in group["params"])

    def _left_by_backward(self) -> dict[nn.Parameter, Tensor]:
        return {p: p.grad for p in self._parameters() if p.grad is not None}

    def _forget_pending(self) -> None:
        self._pending, self._total = [{} for _ in range(self.n_tasks)], None

    def _checked(self, losses: Any) -> list[Tensor | None]:
        with torch.enable_grad():
            listed = list(losses.reshape(-1).unbind() if isinstance(losses, Tensor) else losses)
        if len(listed) != self.n_tasks:
            raise ValueError(f"losses of {len(listed)} tasks is out of range: {self.n_tasks}")
        for k, loss in enumerate(listed):
            if loss is not None and loss.numel() != 1:
                raise ValueError(f"losses[{k}] of shape {tuple(loss.shape)} is out of range: one number")
        return listed

    def _weighted(self, losses: list[Tensor | None]) -> Tensor:
        parts = [w * loss.detach() for w, loss in zip(self.task_weights, losses, strict=True) if loss is not None]
        return torch.stack([part.reshape(()) for part in parts]).sum() if parts else torch.zeros(())

    def _gradients(self, losses: list[Tensor | None], retain_graph: bool) -> list[dict[nn.Parameter, Tensor]]:
        params = [p for p in self._parameters() if p.requires_grad]
        if any(hasattr(p, "to_local") for p in params):
            raise RuntimeError(
                "AdaTask cannot ask for gradients of sharded parameters: call backward for each task, "
                "then accumulate(task_index), and step()"
            )
        present = [k for k, loss in enumerate(losses) if loss is not None and loss.requires_grad]
        found: list[dict[nn.Parameter, Tensor]] = [{} for _ in losses]
        for k in present:
            loss = losses[k]
            assert loss is not None
            keep = retain_graph or k != present[-1]
            gradients = torch.autograd.grad(loss, params, retain_graph=keep, allow_unused=True)
            found[k] = {p: g for p, g in zip(params, gradients, strict=True) if g is not None}
        return found

    @torch.no_grad()
    def _update(self, gradients: Sequence[Mapping[nn.Parameter, Tensor]], shared: Iterable[Tensor] | None) -> None:
        """Decay once, then the part of one task after the other: all gradients were taken before."""
        chosen = None if shared is None else set(map(id, shared))
        weighted = [self._weigh(k, found) for k, found in enumerate(gradients)]
        for group in self.param_groups:
            parts: list[list[tuple[nn.Parameter, Tensor]]] = [[] for _ in range(self.n_tasks + 1)]
            for p in group["params"]:
                own = [(k, found[p]) for k, found in enumerate(weighted) if p in found]
                if not own:
                    continue
                self._refuse(p, [g for _, g in own])
                if group["weight_decay"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                apart = group["shared"] is not False if chosen is None else id(p) in chosen
                if not apart:
                    own = [(self.n_tasks, sum((g for _, g in own[1:]), start=own[0][1]))]
                for k, g in own:
                    parts[k].append((p, g))
            for k, part in enumerate(parts):
                self._run(k, part, group)

    def _weigh(self, k: int, gradients: Mapping[nn.Parameter, Tensor]) -> Mapping[nn.Parameter, Tensor]:
        w = self.task_weights[k]
        return gradients if w == 1 else {p: g * w for p, g in gradients.items()}

    @staticmethod
    def _refuse(p: Tensor, gradients: list[Tensor]) -> None:
        if any(g.is_sparse for g in gradients):
            raise RuntimeError(f"AdaTask does not support sparse gradients (a parameter of shape {tuple(p.shape)})")
        if p.is_complex():
            raise RuntimeError("AdaTask does not support complex parameters")

    def _run(self, k: int, part: list[tuple[nn.Parameter, Tensor]], group: dict[str, Any]) -> None:
        """The base's step with task k's gradients and accumulators; small tensors as lists, large ones in pieces."""
        small: dict[tuple[torch.device, torch.dtype, int], list[tuple[Tensor, ...]]] = defaultdict(list)
        for p, g in part:
            t, tensors = self._tensors(k, p, g)
            if p.numel() <= SMALL:
                small[p.device, p.dtype, t].append(tensors)
            else:
                for piece in _pieces(tensors) if p.device.type == "cpu" else [tensors]:
                    self._apply(piece, t, group)
        for (_, _, t), lists in small.items():
            self._apply(tuple(map(Many, zip(*lists, strict=True))), t, group)

    def _tensors(self, k: int, p: nn.Parameter, g: Tensor) -> tuple[int, tuple[Tensor, ...]]:
        """The number of this step for task k, and what the base's rule takes: parameter, gradient, slots."""
        state = self.state[p]
        if not state:
            # Under this name torch leaves it as it is in loading; the last entry counts for the sum of all tasks.
            state["step"] = torch.zeros(self.n_tasks + 1, dtype=torch.float32)
        state["step"][k] += 1
        slots = [*BASES[self.base].slots, *(["au"] if self.track_au and k < self.n_tasks else [])]
        names = [f"{slot}_{'sum' if k == self.n_tasks else k}" for slot in slots]
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return int(state["step"][k]), _local((p, g, *(state[name] for name in names)))

    def _apply(self, tensors: tuple[Any, ...], t: int, group: dict[str, Any]) -> None:
        base = BASES[self.base]
        p, g, *slots = tensors
        accumulators, au = slots[: len(base.slots)], slots[len(base.slots) :]
        change = base.update(g, *accumulators, t=t, group=group).mul_(group["lr"])
        p.sub_(change)
        if au:
            au[0].mul_(self.au_decay).addcmul_(change, change, value=1 - self.au_decay)

    # Copies and checkpoints.

    def __getstate__(self) -> dict[str, Any]:
        own = ("n_tasks", "base", "track_au", "au_decay", "task_weights", "_pending", "_total")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the accumulators of a checkpoint; those of another number of tasks or another base are refused."""
        for state in state_dict["state"].values():
            slots = {name.rpartition("_")[0] for name in state} - {"", "au"}
            if len(state["step"]) != self.n_tasks + 1 or slots != set(BASES[self.base].slots):
                raise ValueError(f"state_dict is out of range: a checkpoint of {self.n_tasks} tasks and {self.base}")
        super().load_state_dict(state_dict)
        self._forget_pending()
