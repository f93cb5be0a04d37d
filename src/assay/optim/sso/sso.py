"""SSO: several cheap steps on the parameters for each expensive gradient with respect to the model's outputs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from assay.optim._wrapper import total_norm
from assay.optim.sso.armijo import ArmijoGD, add_only_group, check_search
from assay.optim.sso.smoothness import smoothness

__all__ = ["SSO", "ArmijoGD", "target_surrogate"]

SCHEDULES = ("constant", "stochastic", "exponential")
TARGETS = ("constant", "adagrad", "armijo")
SEARCH = {"c": 0.5, "backtrack": 0.9, "expand": 1.8, "max_trials": 100}
"""The line search in target space, with the constants of the authors' code."""
LEAST, MOST = 1e-4, 1e4
"""What that search may find."""
MEMORY = {"t": 0, "squares": 0.0, "eta": None, "losses": 0, "forwards": 0}
"""What the optimizer remembers: steps, the sum of squared gradients, the last eta, and what it asked for."""


def target_surrogate(z: Tensor, z0: Tensor, g: Tensor, eta: float | Tensor) -> Tensor:
    """What stands in for the loss around the outputs z0: its linear part there, and a price for going away.

    ::

        <g, z - z0> + 1/(2 eta) ||z - z0||^2

    For a loss l that is (1/eta)-smooth in z, with g = grad l(z0), it bounds l(z) - l(z0) from above. At z = z0 it is 0,
    and its gradient with respect to anything that z depends on is that of l.

    Args:
        z: the outputs, with their graph, any shape.
        z0, g: the outputs and the gradient where g was asked for, of the same shape; constants here.
        eta: step size in the space of outputs, > 0.

    Returns:
        The sum, 0-d.

    Raises:
        ValueError: shapes that differ.

    Source: J. W. Lavington et al., Target-based Surrogates for Stochastic Optimization, ICML 2023, arXiv 2302.02607.

    >>> import torch
    >>> from assay.optim import target_surrogate
    >>> z = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> target_surrogate(z, torch.tensor([0.0, 2.0]), torch.tensor([-1.0, 1.0]), eta=0.5)
    tensor(0., grad_fn=<AddBackward0>)
    """
    if not z.shape == z0.shape == g.shape:
        raise ValueError(f"z.shape = {tuple(z.shape)} is out of range: {tuple(z0.shape)}, as z0 and g {tuple(g.shape)}")
    away = z - z0.detach()
    return (g.detach() * away).sum() + away.square().sum() / (2 * eta)


class SSO(torch.optim.Optimizer):
    """SSO: one gradient of the loss in the model's outputs, then many steps of the parameters on a surrogate.

    For a loss l(z(theta)) whose gradient in the outputs z is expensive (a simulator, an expert, an adversary), while
    the model z(theta) is cheap. Step t, with the outputs z_t of a batch and g_t = grad l(z_t), asked for once ::

        S(theta) = <g_t, z(theta) - z_t> + 1/(2 eta_t) ||z(theta) - z_t||^2       (:func:`target_surrogate`)
        theta    <- inner_steps steps of a deterministic method on S, from theta, on the same batch

        eta_t    = lr                                          schedule "constant"
                   lr / sqrt(t)                                "stochastic"
                   lr * (1 / total_steps)^(t / total_steps)    "exponential"
        target "adagrad":  eta_t / (sqrt(sum_{s<=t} ||g_s||^2) + 1e-6)  in its place
        target "armijo":   in place of lr the first eta of 1.8 e, 0.9 * 1.8 e, 0.9^2 * 1.8 e, ... with
                           l(z_t - eta g_t) <= l(z_t) - eta/2 ||g_t||^2, kept in [1e-4, 1e4]; e is the last one, or lr

    If all data are one batch, l is (1/lr)-smooth and the inner method lowers S, no step raises the loss. One inner step
    of gradient descent is a step on the loss; with l = 1/2 ||z - y||^2 and lr = 1, S is the loss but for a constant.

    ``step(closure)``: the closure returns ``(targets, loss_fn)``, the outputs with their graph and a function of
    outputs that returns their loss, 0-d; it calls no backward. It is called once for each look at S and must give the
    same function of theta each time: the same batch, dropout and normalization by the batch switched off or held fixed.
    A third element, a 0-d tensor, is added to S: weight decay or another penalty. ``loss_fn`` is called once (target
    "armijo": once more for each trial, without a gradient); ``counts`` says how often all were asked. ``step`` returns
    the loss, before the step and without the penalty. ``p.grad`` is left as it was.

    Args:
        params: parameters, one group.
        lr: eta, > 0. A loss that is a *mean* over n examples has 1/n of the smoothness of their sum: give n times as
            much. ``"smoothness"``: the inverse smoothness 1/L of a loss_fn that is a ``functools.partial`` of torch's
            binary cross-entropy with logits, cross-entropy or squared error with a bound ``target``; the group's ``lr``
            is then a factor on it, 1 at first.
        inner_steps: m, >= 1.
        inner: ``"armijo"``: :class:`ArmijoGD`; or a function of the parameters that returns an optimizer, such as
            ``lambda params: torch.optim.LBFGS(params)``.
        schedule: ``"constant"``, ``"stochastic"`` or ``"exponential"``, which needs ``total_steps``.
        armijo_c, backtrack, expand: c, backtrack and expand of the inner line search.
        init_step: its first step, > 0.
        reset_step: start every outer step with ``init_step``, or with a new inner optimizer; else go on with the last.
        grad_tol: stop the inner steps where the gradient of S has at most this norm, >= 0.
        target: ``"constant"``, ``"adagrad"`` or ``"armijo"``.

    Raises:
        ValueError: an argument out of range; targets of a shape that changes; a loss_fn whose smoothness is not known.
        RuntimeError: a step without a closure; targets without a gradient; sharded or complex parameters.

    Source: J. W. Lavington et al., Target-based Surrogates for Stochastic Optimization, ICML 2023, arXiv 2302.02607.

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from assay.optim import SSO
    >>> X, y = torch.eye(3), torch.tensor([1.0, 0.0, 1.0])
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = SSO(model.parameters(), lr=4 * 3, inner_steps=20)  # the mean over 3 has L = 1 / (4 * 3)
    >>> def closure():
    ...     return model(X).squeeze(1), lambda z: F.binary_cross_entropy_with_logits(z, y)
    >>> losses = [optimizer.step(closure).item() for _ in range(10)]
    >>> losses[-1] < 0.5 * losses[0], optimizer.counts["gradients"]
    (True, 10)
    """

    def __init__(
        self,
        params: Any,
        lr: float | str = 1.0,
        inner_steps: int = 10,
        *,
        inner: str | Callable[[list[nn.Parameter]], torch.optim.Optimizer] = "armijo",
        schedule: str = "constant",
        total_steps: int | None = None,
        armijo_c: float = 0.1,
        backtrack: float = 0.9,
        expand: float = 2.0,
        init_step: float = 10.0,
        reset_step: bool = True,
        grad_tol: float = 1e-6,
        target: str = "constant",
    ) -> None:
        known = lr == "smoothness"
        defaults: dict[str, Any] = {"lr": 1.0 if known else lr, "smoothness": known, "inner_steps": inner_steps}
        defaults |= {"inner": inner, "schedule": schedule, "total_steps": total_steps, "armijo_c": armijo_c}
        defaults |= {"backtrack": backtrack, "expand": expand, "init_step": init_step, "reset_step": reset_step}
        self._inner: torch.optim.Optimizer | None = None
        super().__init__(params, {**defaults, "grad_tol": grad_tol, "target": target})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Meet the parameters; there is one surrogate for all of them, and so one group."""
        _check({**self.defaults, **param_group})
        add_only_group(self, param_group, super().add_param_group)
        self.param_groups[0].update(MEMORY)

    @property
    def counts(self) -> dict[str, int]:
        """How often the optimizer asked: for gradients of the loss, for the loss, and for the model's outputs."""
        (group,) = self.param_groups
        return {"gradients": group["t"], "losses": group["losses"], "forwards": group["forwards"]}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_inner": self._inner}

    def state_dict(self) -> dict[str, Any]:
        """torch's checkpoint; with ``reset_step=False`` also the inner optimizer's. ``inner`` stays as constructed."""
        saved = super().state_dict()
        del saved["param_groups"][0]["inner"]
        return saved if self._inner is None else {**saved, "inner": self._inner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up again what :meth:`state_dict` gave."""
        inner = self.param_groups[0]["inner"]
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "inner"})
        self.param_groups[0]["inner"] = inner
        self._inner = None
        if "inner" in state_dict:
            self._inner = self._make_inner()
            self._inner.load_state_dict(state_dict["inner"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One gradient of the loss, and ``inner_steps`` steps on its surrogate; returns the loss before them."""
        if closure is None:
            raise RuntimeError("SSO needs the model's outputs: call step(closure), which returns (targets, loss_fn)")
        (group,) = self.param_groups
        surrogate: Any = _Surrogate(self, closure)  # a closure with an argument, which torch's stubs do not know
        loss, z0, g = surrogate.ask()
        group["t"] += 1
        surrogate.eta = self._eta(surrogate.loss_fn, loss, z0, g)
        inner = self._inner or self._make_inner()
        with _gradients_restored(group["params"]):
            for _ in range(group["inner_steps"]):
                inner.step(surrogate)
                if surrogate.norm <= group["grad_tol"]:
                    break
        self._inner = None if group["reset_step"] else inner
        return loss

    def _make_inner(self) -> torch.optim.Optimizer:
        (group,) = self.param_groups
        if callable(group["inner"]):
            return group["inner"](group["params"])
        search = (group["armijo_c"], group["backtrack"], group["expand"])
        return ArmijoGD(group["params"], group["init_step"], *search)

    def _eta(self, loss_fn: Callable[[Tensor], Tensor], loss: Tensor, z0: Tensor, g: Tensor) -> float:
        (group,) = self.param_groups
        eta = float(group["lr"]) / (smoothness(loss_fn, z0) if group["smoothness"] else 1)
        t, total = group["t"], group["total_steps"]
        factor = {"constant": 1.0, "stochastic": t**-0.5}.get(group["schedule"])
        factor = (1 / total) ** (t / total) if factor is None else factor
        if group["target"] == "armijo":
            eta = self._search(loss_fn, float(loss), z0, g, eta)
        elif group["target"] == "adagrad":
            group["squares"] += g.square().sum().item()
            factor /= math.sqrt(group["squares"]) + 1e-6
        return eta * factor

    def _search(self, loss_fn: Callable[[Tensor], Tensor], loss: float, z0: Tensor, g: Tensor, eta: float) -> float:
        """eta by a line search in the space of outputs, from the one found last."""
        (group,) = self.param_groups
        eta = SEARCH["expand"] * (group["eta"] or eta)
        square = g.square().sum().item()
        for _ in range(int(SEARCH["max_trials"])):
            group["losses"] += 1
            if loss_fn(z0 - eta * g) <= loss - SEARCH["c"] * eta * square:
                break
            eta *= SEARCH["backtrack"]
        group["eta"] = eta = min(max(eta, LEAST), MOST)
        return eta


@contextlib.contextmanager
def _gradients_restored(params: list[nn.Parameter]) -> Iterator[None]:
    before = [p.grad for p in params]
    try:
        yield
    finally:
        for p, grad in zip(params, before, strict=True):
            p.grad = grad


class _Surrogate:
    """The surrogate of one outer step as a closure for the inner optimizer."""

    def __init__(self, optimizer: SSO, closure: Callable[[], Any]) -> None:
        (self.group,) = optimizer.param_groups
        self.closure, self.eta, self.norm = closure, math.nan, math.inf
        self.first: tuple[Tensor, Any] | None = self._look(True)

    def _look(self, backward: bool) -> tuple[Tensor, Any]:
        """The model's outputs, and the penalty."""
        with torch.set_grad_enabled(backward):
            found = self.closure()
        if not isinstance(found, tuple) or len(found) not in (2, 3) or not isinstance(found[0], Tensor):
            raise ValueError(
                "what the closure returned is out of range: (targets, loss_fn) or (targets, loss_fn, penalty)"
            )
        self.group["forwards"] += 1
        self.loss_fn = found[1]
        return found[0], found[2] if len(found) == 3 else 0

    def ask(self) -> tuple[Tensor, Tensor, Tensor]:
        """The loss at the outputs, these outputs, and the gradient: the expensive part."""
        assert self.first is not None
        z = self.first[0]
        if not z.requires_grad:
            raise RuntimeError("the targets that the closure returned carry no gradient: none depends on a parameter")
        self.z0 = z.detach().clone()
        self.group["losses"] += 1
        with torch.enable_grad():
            at = self.z0.clone().requires_grad_()
            loss = self.loss_fn(at)
            (self.g,) = torch.autograd.grad(loss, at)
        return loss.detach(), self.z0, self.g

    def __call__(self, backward: bool = True) -> Tensor:
        # The outputs that the gradient was asked at are those that the first inner step starts from.
        z, penalty = self.first or self._look(backward)
        self.first = None
        with torch.set_grad_enabled(backward):
            value = target_surrogate(z, self.z0, self.g, self.eta) + penalty
            if backward:
                params = [p for p in self.group["params"] if p.requires_grad]
                # Not backward(), which would also write to parameters of the model that this optimizer has not got.
                grads = torch.autograd.grad(value, params, allow_unused=True)
                for p, grad in zip(params, grads, strict=True):
                    p.grad = grad
                self.norm = total_norm([grad for grad in grads if grad is not None]).item()
        return value.detach()


def _check(options: dict[str, Any]) -> None:
    """Refuse what is out of range, or missing for its schedule."""
    lr = options["lr"]
    if isinstance(lr, str) or not lr > 0:
        raise ValueError(f"lr = {lr!r} is out of range: a number > 0 or 'smoothness'")
    if not options["inner_steps"] >= 1:
        raise ValueError(f"inner_steps = {options['inner_steps']!r} is out of range: >= 1")
    if options["inner"] != "armijo" and not callable(options["inner"]):
        raise ValueError(f"inner = {options['inner']!r} is out of range: 'armijo' or a function of the parameters")
    for name, allowed in (("schedule", SCHEDULES), ("target", TARGETS)):
        if options[name] not in allowed:
            raise ValueError(f"{name} = {options[name]!r} is out of range: {', '.join(map(repr, allowed))}")
    total = options["total_steps"]
    if (total is None and options["schedule"] == "exponential") or (total is not None and not total >= 1):
        raise ValueError(f"total_steps = {total!r} is out of range: >= 1 with schedule = 'exponential'")
    if not options["init_step"] > 0:
        raise ValueError(f"init_step = {options['init_step']!r} is out of range: a number > 0")
    if not options["grad_tol"] >= 0:
        raise ValueError(f"grad_tol = {options['grad_tol']!r} is out of range: a number >= 0")
    try:
        check_search({**options, "c": options["armijo_c"], "max_trials": 1})
    except ValueError as error:
        raise ValueError(str(error).replace("c =", "armijo_c =", 1)) from None
