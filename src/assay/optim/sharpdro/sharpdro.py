"""SharpDRO: SAM whose second gradient is that of the groups, or the examples, that do worst."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from assay._distributed import all_reduce_sum, world_size
from assay.optim._sam import SAM, MaskPolicy
from assay.optim._wrapper import Base
from assay.optim.sharpdro.group_dro import (
    GroupDRO,
    ascended,
    check_step_size,
    example_weights,
    group_dro_weights,
    group_means,
    uniform,
    weighted,
)
from assay.optim.sharpdro.photons import photon_limited, poisson_severities

if TYPE_CHECKING:
    from assay.bench.recipe import Batch, Objective, Recipe, Run

__all__ = ["GroupDRO", "SharpDRO", "apply", "group_dro_weights", "photon_limited", "poisson_severities"]

Closure = Callable[[], Any]


@dataclass
class _Batch:
    """What is known of a step's batch after the pass at w."""

    size: int
    log_q: Tensor | None = None
    weights: Tensor | None = None
    weights_before: Tensor | None = None
    confidence: Tensor | None = None
    done: bool = False
    """Whether the pass at w + eps was there as well."""


class SharpDRO(SAM):
    """SharpDRO: the risk of all examples, and the sharpness of the worst group alone.

    With l_i the losses of the batch at the weights w, l'_i those at w + eps, and L_s, L'_s their means over the
    examples of group s (0 for a group that is not in the batch) ::

        g0  = grad mean_i l_i
        eps = rho g0 / (||g0|| + norm_eps)                    (adaptive: as in SAM)
        q_s = q_s exp(step_size L_s), normalised              (q starts uniform, and is kept from step to step)
        g1  = grad sum_s q_s L'_s                             at w + eps
        w   = w - base step with g0 + g1                      (from w, restored exactly)

    Without groups (``mode="agnostic"``) single examples take their place, weighted by how much of their confidence c,
    the largest softmax probability, is lost on the way to w + eps ::

        g1  = grad sum_i omega_i l'_i,   omega_i = relu(c_i - c'_i) / sum_j relu(c_j - c'_j)     (uniform if all are 0)

    With one group g1 is SAM's gradient: the step has two gradients in it, and SGD's learning rate counts double.

    ``step(closure)`` calls the closure twice; it returns the losses (n,) with the groups (n,), or with the logits
    (n, ..., C) if agnostic, and does *not* call backward. A loop without closures calls ``first_step(losses, groups)``
    and, after a second forward pass, ``second_step(losses)`` (agnostic: both with the logits). Gradients are cleared by
    the optimizer; g0 + g1 is what it leaves. A loop that must call backward itself does so on
    ``objective(losses, groups)``, in a closure that returns that loss, or before ``first_step()`` and
    ``second_step()``.

    Args:
        params, base_optimizer, rho, adaptive, norm_eps, mask, bn_stats: as in :class:`SAM`.
        n_groups: S >= 1; not needed if agnostic.
        step_size: of q, >= 0 and finite; 0 weighs the groups alike for ever.
        mode: ``"aware"`` of groups, or ``"agnostic"``.
        ascent: ``"mean"``, or ``"weighted"``: eps along the gradient of sum_s q_s L_s, q from before the step.
        subtract: g1 is the gradient of the sharpness to the letter, grad sum_s q_s (L'_s - L_s), each at its weights.
            This and ``ascent="weighted"`` cost one more backward pass, and want groups.
        base_options: of the base optimizer's class.

    Under DistributedDataParallel and FSDP2 the groups' means and omega are over the batches of all processes, and q is
    the same in each.

    Raises:
        ValueError: an argument out of range; losses, groups or logits of a shape that does not fit.
        RuntimeError: as in :class:`SAM`; a step without losses; ``ascent="weighted"`` or ``subtract`` in several
            processes, or with ``objective``.

    Source: Z. Huang et al., Robust Generalization against Photon-Limited Corruptions via Worst-Case Sharpness
    Minimization, CVPR 2023, arXiv 2303.13087.

    >>> import torch
    >>> from assay.optim import SharpDRO
    >>> model = torch.nn.Linear(4, 3)
    >>> optimizer = SharpDRO(model, torch.optim.SGD, rho=0.05, n_groups=2, lr=0.1)
    >>> x, y, groups = torch.ones(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 0, 0, 0, 1, 1])
    >>> def closure():
    ...     return torch.nn.functional.cross_entropy(model(x), y, reduction="none"), groups
    >>> loss = optimizer.step(closure)
    """

    keeps_first_gradient = True

    def __init__(
        self,
        params: Any,
        base_optimizer: Base,
        rho: float = 0.05,
        *,
        n_groups: int | None = None,
        step_size: float = 0.01,
        adaptive: bool = False,
        mode: str = "aware",
        ascent: str = "mean",
        subtract: bool = False,
        norm_eps: float = 1e-12,
        mask: MaskPolicy | None = None,
        bn_stats: str = "first",
        **base_options: Any,
    ) -> None:
        if mode not in ("aware", "agnostic"):
            raise ValueError(f"mode = {mode!r} is out of range: 'aware' or 'agnostic'")
        if ascent not in ("mean", "weighted"):
            raise ValueError(f"ascent = {ascent!r} is out of range: 'mean' or 'weighted'")
        if mode == "agnostic" and (ascent != "mean" or subtract):
            name, value, only = ("ascent", ascent, "mean") if ascent != "mean" else ("subtract", subtract, False)
            raise ValueError(f"{name} = {value!r} is out of range: {only!r} with mode = 'agnostic'")
        check_step_size(step_size)
        super().__init__(
            params,
            base_optimizer,
            rho,
            adaptive=adaptive,
            norm_eps=norm_eps,
            mask=mask,
            bn_stats=bn_stats,
            **base_options,
        )
        self.step_size, self.mode, self.subtract, self.weighted_ascent = step_size, mode, subtract, ascent == "weighted"
        self.n_groups = n_groups
        self.log_q = uniform(n_groups) if mode == "aware" else None  # type: ignore[arg-type]  # None is refused there
        self._batch: _Batch | None = None
        self._descent: dict[nn.Parameter, Tensor] | None = None

    @property
    def q(self) -> Tensor | None:
        """The weights of the groups, (S,); None if there are none."""
        return None if self.log_q is None else self.log_q.exp()

    def objective(self, per_sample_loss: Tensor, groups: Tensor | None = None) -> Tensor:
        """What this pass is to differentiate: at w the mean loss, at w + eps the weighted sum of the losses.

        ``groups`` are the logits if agnostic; at w + eps the groups are those of the pass at w, and may be left out.
        """
        if self._saved is None and self._two_gradients:
            raise RuntimeError(
                "ascent='weighted' and subtract=True take two gradients of one pass: give the losses to step() or "
                "first_step(), which call backward"
            )
        if self._saved is not None:
            return weighted(per_sample_loss, self._weights(per_sample_loss, groups))
        self._look(per_sample_loss, groups)
        return per_sample_loss.mean()

    @property
    def _two_gradients(self) -> bool:
        return self.weighted_ascent or self.subtract

    @torch.no_grad()
    def _look(self, losses: Tensor, groups: Tensor | None) -> _Batch:
        """The pass at w: what it says of the weights at w + eps. q itself is changed when the step is taken."""
        self._batch = batch = _Batch(losses.numel())
        if self.log_q is None:
            batch.confidence = _confidence(losses, groups)
            return batch
        if groups is None:
            raise ValueError("groups = None is out of range: the group of each example, with mode = 'aware'")
        means, counts = group_means(losses, groups, len(self.log_q))
        before = self.log_q.to(means)
        batch.log_q = ascended(before, means, self.step_size)
        batch.weights = example_weights(batch.log_q, groups, counts)
        batch.weights_before = example_weights(before, groups, counts)
        return batch

    @torch.no_grad()
    def _weights(self, losses: Tensor, logits: Tensor | None) -> Tensor:
        """The weight of each example at w + eps."""
        batch = self._batch
        if batch is None or losses.shape != (batch.size,):
            shape = None if batch is None else (batch.size,)
            raise ValueError(f"per_sample_loss.shape = {tuple(losses.shape)} is out of range: {shape}, as at w")
        batch.done = True
        if batch.weights is not None:
            return batch.weights
        assert batch.confidence is not None
        lost = (batch.confidence - _confidence(losses, logits)).clamp(min=0)
        total, n = all_reduce_sum(torch.stack([lost.sum(), torch.full_like(lost.sum(), len(lost))]))
        return world_size() * torch.where(total > 0, lost / total, 1 / n)

    def _backward(self, losses: Tensor, groups: Tensor | None) -> Tensor:
        """All gradients of this pass; returns its mean loss."""
        with torch.enable_grad():
            if self._saved is None and self._two_gradients:
                self._backward_twice(losses, groups)
            else:
                loss = self.objective(losses, groups)
                self.zero_grad()
                loss.backward()
        return losses.detach().mean()

    def _backward_twice(self, losses: Tensor, groups: Tensor | None) -> None:
        """At w: first what the step is to have of this pass, put aside, then the direction of the ascent."""
        if world_size() > 1:
            raise RuntimeError(
                "ascent='weighted' and subtract=True take two gradients of one pass, and processes average only one"
            )
        batch = self._look(losses, groups)
        assert batch.weights is not None and batch.weights_before is not None
        descent = losses.mean() - weighted(losses, batch.weights) if self.subtract else losses.mean()
        ascent = weighted(losses, batch.weights_before) if self.weighted_ascent else losses.mean()
        self.zero_grad()
        descent.backward(retain_graph=True)
        self._descent = {p: p.grad.clone() for p in self.parameters() if p.grad is not None}
        self.zero_grad()
        ascent.backward()

    # SAM's stages.

    def ascend(self) -> None:
        super().ascend()
        if self._descent is not None:
            self._first, self._descent = self._descent, None

    def combine(self, first: Mapping[nn.Parameter, Tensor]) -> None:
        for p, g0 in first.items():
            p.grad = g0 if p.grad is None else p.grad.add_(g0)

    def descend(self) -> None:
        if self._saved is not None and (self._batch is None or not self._batch.done):
            raise RuntimeError("SharpDRO lacks the losses at w + eps: second_step(losses), or backward on objective()")
        super().descend()
        if self._batch is not None and self._batch.log_q is not None:
            self.log_q = self._batch.log_q
        self._batch = None

    # The ways to call them.

    def step(self, closure: Closure | None = None, closure2: Closure | None = None) -> Any:
        """One update; ``closure2`` gives the losses at w + eps where they are others. Returns the mean loss at w."""
        self._batch = self._descent = None
        passes = [None if given is None else self._pass(given) for given in (closure, closure2)]
        return super().step(*passes)

    def _pass(self, closure: Closure) -> Closure:
        def differentiated() -> Any:
            given = closure()
            return given if isinstance(given, Tensor) else self._backward(*given)

        return differentiated

    def first_step(  # type: ignore[override]
        self, per_sample_loss: Tensor | None = None, groups: Tensor | None = None, zero_grad: bool = False
    ) -> None:
        """Move to w + eps: with the losses at w and their groups, or after backward on their ``objective``."""
        if per_sample_loss is not None:
            self._backward(per_sample_loss, groups)
        if self._batch is None:
            raise RuntimeError(
                "SharpDRO lacks the losses at w: a closure returns (losses, groups), or calls backward on objective()"
            )
        super().first_step(zero_grad)

    def second_step(  # type: ignore[override]
        self, per_sample_loss: Tensor | None = None, logits: Tensor | None = None, zero_grad: bool = False
    ) -> None:
        """Back to w, and the base's step: with the losses at w + eps, or after backward on their ``objective``."""
        if per_sample_loss is not None:
            self._backward(per_sample_loss, logits)
        super().second_step(zero_grad)

    def wrapper_state(self) -> dict[str, Any]:
        return super().wrapper_state() | ({} if self.log_q is None else {"log_q": self.log_q})

    def load_wrapper_state(self, state: dict[str, Any]) -> None:
        super().load_wrapper_state(state)
        if self.log_q is not None:
            if len(state["log_q"]) != len(self.log_q):
                raise ValueError(f"n_groups = {len(self.log_q)} is out of range: {len(state['log_q'])}, as was saved")
            self.log_q = state["log_q"].clone()


def _confidence(losses: Tensor, logits: Tensor | None) -> Tensor:
    """The largest softmax probability of each example, (n,), averaged where an example has several outputs."""
    if logits is None or logits.dim() < 2 or logits.shape[:1] != losses.shape or not losses.numel():
        shape = None if logits is None else tuple(logits.shape)
        raise ValueError(f"logits.shape = {shape} is out of range: (n, ..., C), with losses (n,), n >= 1")
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    return wide.softmax(-1).amax(-1).view(len(losses), -1).mean(1)


def apply(
    recipe: Recipe,
    *,
    rho: float = 0.05,
    step_size: float = 0.01,
    groups: str | None = "class",
    adaptive: bool = False,
) -> Recipe:
    """SharpDRO around the recipe's optimizer, which it hands the losses of single examples and their groups.

    ``groups="class"`` takes the classes; ``"data"`` what the training set says, an integer for each of its examples in
    its attribute ``groups``; None is the mode without groups. An example's loss is the task's loss of a batch of one.
    """
    if groups not in ("class", "data", None):
        raise ValueError(f"groups = {groups!r} is out of range: 'class', 'data' or None")
    options: dict[str, Any] = {"rho": rho, "step_size": step_size, "adaptive": adaptive}
    options["mode"] = "aware" if groups else "agnostic"
    SharpDRO([nn.Parameter(torch.zeros(1))], torch.optim.SGD, n_groups=1, **options)  # refuses early

    def update(run: Run) -> SharpDRO:
        n_groups = _n_groups(run, groups) if groups else None
        optimizer = SharpDRO(None, recipe.update(run), n_groups=n_groups, **options)
        optimizer.track_batchnorm(run.model)
        return optimizer

    def objective(run: Run) -> Objective:
        each = torch.vmap(lambda output, target: run.task.loss(output.unsqueeze(0), target.unsqueeze(0)))
        ids = _ids(run) if groups == "data" else None

        def loss(model: Callable[[Any], Any], batch: Batch) -> Tensor:
            if not isinstance(run.optimizer, SharpDRO):
                raise ValueError("sharpdro stands around the optimizer of its arm: name it last")
            output = model(batch.input)
            said = batch.target if ids is None else ids[batch.index]
            return run.optimizer.objective(each(output, batch.target), said if groups else output)

        return loss

    return replace(recipe, objective=objective, update=update)


def _n_groups(run: Run, groups: str) -> int:
    if groups == "data":
        return int(_ids(run).max()) + 1
    if run.task.classes is None:
        raise ValueError("sharpdro needs a classification task, groups='data' or groups=None")
    return run.task.classes


def _ids(run: Run) -> Tensor:
    if not hasattr(run.data, "groups"):
        raise ValueError("sharpdro(groups='data') needs a training set with an attribute groups, (N,) integers")
    return torch.as_tensor(run.data.groups)
