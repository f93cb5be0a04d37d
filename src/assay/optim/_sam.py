"""Sharpness-aware minimization: the ascent, the second gradient and the exact way back, in four overridable stages."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from assay.optim._rule import at_least_zero
from assay.optim._wrapper import Base, WrappedOptimizer, total_norm

Closure = Callable[[], Any]


class MaskPolicy(Protocol):
    """Which weights are perturbed: the form that ``mask=`` of :class:`SAM` and its kin takes."""

    moment: str
    """When ``update_mask`` refreshes: ``"now"``; or in the next step ``"before"`` or ``"after"`` the ascent."""

    def init(self, params: Sequence[nn.Parameter]) -> None:
        """Meet the parameters: all of them, again if some were added."""

    @property
    def off(self) -> Collection[nn.Parameter]:
        """Parameters that are left out whole: they are neither copied nor added to."""

    def apply(self, params: Sequence[nn.Parameter], eps: list[Tensor]) -> list[Tensor]:
        """The perturbations of these parameters, zero off the mask; ``eps`` may be changed in place."""

    @property
    def refresh(self) -> Callable[..., None]:
        """Choose anew: called with the optimizer, and by name with what ``update_mask`` was given."""

    def density(self) -> float:
        """Share of weights that are perturbed."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class SAM(WrappedOptimizer):
    """SAM: the base optimizer's step with the gradient taken where a small step uphill leads.

    With all parameters that have a gradient as one vector w, T = 1 (``adaptive``: T = diag |w|) ::

        g   = grad L(w)
        eps = rho * T^2 g / (||T g|| + norm_eps)              restricted to the mask, if there is one
        w   <- w - base step with grad L(w + eps)             (from w, restored exactly)

    ``step(closure)`` calls the closure twice, at w and at w + eps, and returns the loss at w; the closure zeroes the
    gradients, computes the loss, calls backward and returns the loss. A loop that calls backward itself uses
    ``first_step()`` and ``second_step()`` after its first and second backward. ``with optimizer.perturbed():`` holds
    the weights at w + eps of the current gradients, to look at the loss there.

    Parameters without a gradient are not touched. If the norm is not finite, eps is 0 and the step is the base's. An
    exception in the second closure leaves w as it was.

    Args:
        params: parameters, groups with options of their own (``rho``, ``adaptive``, ``norm_eps`` and the base's), or a
            Module, whose normalization layers are then tracked (see ``bn_stats``).
        base_optimizer: a class such as ``torch.optim.SGD``, called with the parameters and ``base_options``; or an
            optimizer that exists. Schedulers may be given either of the two.
        rho: radius, >= 0; 0 is the base optimizer at the price of two passes.
        adaptive: ASAM, invariant to rescaling of weights.
        norm_eps: added to the norm, >= 0.
        mask: which weights are perturbed, a :class:`MaskPolicy`; None: all. The norm is that of the full gradient.
        ascent: ``"sgd"``, the formula above; or a function (groups, params, grads) -> list of eps.
        bn_stats: in which of the two passes normalization layers update their running statistics: ``"first"``,
            ``"both"`` or ``"none"``. It needs to know them: give a Module, or call ``track_batchnorm(model)``.
        base_options: of the base optimizer's class.

    Under DistributedDataParallel the gradient of the ascent is the averaged one. With a GradScaler use the two calls,
    ``scaler.unscale_(optimizer)`` before and ``scaler.update()`` after each, and where the gradients at w + eps are not
    finite ``restore()`` in place of ``second_step()``. The cost is a second forward and backward pass, and a copy of
    the parameters during a step.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: a sparse gradient; ``step`` without a closure; ``second_step`` without ``first_step``.

    Source: P. Foret et al., SAM, ICLR 2021, arXiv 2010.01412; J. Kwon et al., ASAM, ICML 2021, arXiv 2102.11600.

    >>> import torch
    >>> from assay.optim import SAM
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = SAM(model, torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = model(torch.ones(4, 2)).square().mean()
    ...     loss.backward()
    ...     return loss
    >>> loss = optimizer.step(closure)
    """

    keeps_first_gradient = False
    """Whether :meth:`combine` wants the gradient at w; costs a copy."""
    mask: MaskPolicy | None = None

    def __init__(
        self,
        params: Any,
        base_optimizer: Base,
        rho: float = 0.05,
        *,
        adaptive: bool = False,
        norm_eps: float = 1e-12,
        mask: MaskPolicy | None = None,
        ascent: str | Callable[..., list[Tensor]] = "sgd",
        bn_stats: str = "first",
        **base_options: Any,
    ) -> None:
        if ascent != "sgd" and not callable(ascent):
            raise ValueError(f"ascent = {ascent!r} is out of range: 'sgd' or a function")
        if bn_stats not in ("first", "both", "none"):
            raise ValueError(f"bn_stats = {bn_stats!r} is out of range: 'first', 'both' or 'none'")
        own = {"rho": rho, "adaptive": adaptive, "norm_eps": norm_eps}
        super().__init__(params, base_optimizer, own, base_options)
        self.ascent, self.bn_stats, self.mask = ascent, bn_stats, mask
        self._normalizations: list[nn.Module] = []
        self._saved: list[tuple[nn.Parameter, Tensor]] | None = None
        self._asked: dict[str, Any] | None = None
        self._first: dict[nn.Parameter, Tensor] = {}
        if isinstance(params, nn.Module):
            self.track_batchnorm(params)
        if mask is not None:
            mask.init(list(self.parameters()))

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        at_least_zero(options, "rho", "norm_eps")

    def track_batchnorm(self, model: nn.Module) -> None:
        """Have the running statistics of this model's normalization layers follow ``bn_stats``."""
        self._normalizations = [m for m in model.modules() if getattr(m, "track_running_stats", False)]

    # The stages.

    def perturbation(
        self, groups: list[dict[str, Any]], params: list[nn.Parameter], grads: list[Tensor]
    ) -> list[Tensor]:
        """eps for every parameter, given its group and gradient; the arguments must not be changed."""
        scaled = [g * p.abs() if group["adaptive"] else g for group, p, g in zip(groups, params, grads, strict=True)]
        norm = total_norm(scaled)
        eps = []
        for group, p, g in zip(groups, params, scaled, strict=True):
            scale = group["rho"] / (norm.to(g.device) + group["norm_eps"])
            direction = g * p.abs() if group["adaptive"] else g
            # A factor of 0 would not silence an infinite gradient.
            eps.append(torch.where(norm.to(g.device).isfinite(), direction * scale, 0).to(p.dtype))
        return eps

    @torch.no_grad()
    def ascend(self) -> None:
        """Keep w, and move to w + eps."""
        if self._saved is not None:
            raise RuntimeError(f"{type(self).__name__} is at w + eps already: call second_step() first")
        self._refresh("before")
        found = self.with_gradients()
        groups, params, grads = [group for group, _, _ in found], [p for _, p, _ in found], [g for _, _, g in found]
        eps = self.ascent(groups, params, grads) if callable(self.ascent) else self.perturbation(groups, params, grads)
        self._first = dict(zip(params, map(Tensor.clone, grads), strict=True)) if self.keeps_first_gradient else {}
        if self.mask is not None:
            eps = [e for p, e in zip(params, eps, strict=True) if p not in self.mask.off]
            params = [p for p in params if p not in self.mask.off]
            eps = self.mask.apply(params, eps)
        self._saved = [(p, p.detach().clone()) for p in params]
        if params:
            torch._foreach_add_([p.detach() for p in params], eps)
        self._refresh("after")

    @torch.no_grad()
    def restore(self) -> None:
        """Back to w, to the bit."""
        if self._saved is None:
            raise RuntimeError(f"{type(self).__name__} is not at w + eps: call first_step() first")
        for p, value in self._saved:
            p.copy_(value)
        self._saved = None

    def combine(self, first: Mapping[nn.Parameter, Tensor]) -> None:
        """Give the parameters, at w again, the gradient of the base's step; by default that at w + eps stays.

        ``first`` holds the gradients at w, if ``keeps_first_gradient``.
        """

    @torch.no_grad()
    def descend(self) -> None:
        """Restore w and take the base's step with the combined gradient."""
        self.restore()
        self.combine(self._first)
        self._first = {}
        self.base.step()

    def before_ascent(self) -> None:
        """Called in ``step`` and ``first_step`` when the gradient at w is there."""

    # The ways to call them.

    def step(self, closure: Closure | None = None, closure2: Closure | None = None) -> Any:
        """One update; ``closure2`` is the objective at w + eps where it is another one. Returns the loss at w."""
        if closure is None:
            raise RuntimeError(
                f"{type(self).__name__} needs the gradient twice: call step(closure), or first_step() and second_step()"
            )
        with torch.enable_grad(), self.first_pass():
            loss = closure()
        self.first_step()
        try:
            with torch.enable_grad(), self._statistics(self.bn_stats == "both"):
                (closure2 or closure)()
        except BaseException:
            self.restore()
            self._first = {}
            raise
        self.second_step()
        return loss

    def first_step(self, zero_grad: bool = False) -> None:
        """After the first backward: move to w + eps."""
        self.before_ascent()
        self.ascend()
        if zero_grad:
            self.zero_grad()

    def second_step(self, zero_grad: bool = False) -> None:
        """After the second backward: back to w, and the base's step."""
        self.descend()
        if zero_grad:
            self.zero_grad()

    @contextlib.contextmanager
    def first_pass(self) -> Iterator[None]:
        """Where the gradient at w is computed: around the first closure, or around forward and backward of a loop."""
        with self._statistics(self.bn_stats != "none"):
            yield

    @contextlib.contextmanager
    def perturbed(self) -> Iterator[None]:
        """The weights at w + eps of the current gradients, and back at w afterwards, whatever happens."""
        self.ascend()
        try:
            with self._statistics(False):
                yield
        finally:
            self.restore()

    @contextlib.contextmanager
    def _statistics(self, update: bool) -> Iterator[None]:
        """Whether tracked layers update their running statistics; in training they normalize by the batch anyway."""
        frozen = [] if update else [m for m in self._normalizations if m.training]
        for module in frozen:
            module.track_running_stats = False  # type: ignore[assignment]
        try:
            yield
        finally:
            for module in frozen:
                module.track_running_stats = True  # type: ignore[assignment]

    def update_mask(self, **context: Any) -> None:
        """Have the mask choose anew, with what its policy asks for: now, or in the next step with its gradient."""
        mask = self._has_mask()
        inspect.signature(mask.refresh).bind(self, **context)  # what it does not know is refused at once
        self._asked = context
        self._refresh("now")

    def mask_density(self) -> float:
        """Share of the weights that are perturbed."""
        return self._has_mask().density()

    def _has_mask(self) -> MaskPolicy:
        if self.mask is None:
            raise RuntimeError(f"{type(self).__name__} has no mask")
        return self.mask

    def _refresh(self, moment: str) -> None:
        if self.mask is not None and self._asked is not None and self.mask.moment == moment:
            context, self._asked = self._asked, None
            self.mask.refresh(self, **context)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if self.mask is not None:
            self.mask.init(list(self.parameters()))

    def wrapper_state(self) -> dict[str, Any]:
        return {"mask": self.mask.state_dict()} if self.mask is not None else {}

    def load_wrapper_state(self, state: dict[str, Any]) -> None:
        if self.mask is not None:
            self.mask.load_state_dict(state["mask"])
