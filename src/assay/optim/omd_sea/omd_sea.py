"""Optimistic online mirror descent: guess the next gradient, play, and be corrected by the gradient that comes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from assay.optim._rule import NOT_OPTIONS, at_least_zero
from assay.optim.omd_sea.domains import Ball, Box, Domain, Simplex, norm_of, project_parts
from assay.optim.omd_sea.environment import SEAEnvironment, regret
from assay.optim.omd_sea.learners import DynamicOMD, OptimisticHedge

if TYPE_CHECKING:
    from assay.bench.recipe import Recipe, Run

__all__ = [
    "Ball",
    "Box",
    "DynamicOMD",
    "OptimisticHedge",
    "OptimisticOMD",
    "SEAEnvironment",
    "Simplex",
    "regret",
]

MODES = ("convex", "strongly_convex", "exp_concave")
OPTIMISMS = ("last_grad", "middle_grad", "external", "none")
LARGEST = 4096
"""Dimension up to which the matrix of mode "exp_concave" is kept."""
MEMORY = {"t": 0, "V": 0.0, "G": 0.0, "eta": 0.0, "steepness": 0.0, "growth": 0.0, "cost": 0.0}
"""What a group remembers: rounds, squared surprises, the largest gradient, eta, and the terms of the bound."""


class OptimisticOMD(torch.optim.Optimizer):
    """Optimistic online mirror descent, whose regret follows what could not be guessed of the gradients.

    All parameters of a group are one vector. They hold x_t, the point that is played; the gradient g_t is taken there;
    M_t is a guess of it, M_1 = 0; P projects onto the domain. A step ends round t ::

        xhat_{t+1} = P[xhat_t - eta_t g_t]
        V_t        = V_{t-1} + ||g_t - M_t||^2
        M_{t+1}    = g_t
        x_{t+1}    = P[xhat_{t+1} - eta_{t+1} M_{t+1}]

    with one eta_t for both half steps of a round, by mode ::

        convex            eta_t = diameter / sqrt(delta + 4 lipschitz^2 + V_{t-1})
        strongly_convex   eta_t = 2 / (strong_convexity * t)
        exp_concave       eta_t = H_t^-1,   H_t = (1 + beta/2 lipschitz^2) I + beta/2 sum_{s<t} g_s g_s^T
                          beta = 1/2 min(1 / (4 lipschitz diameter), exp_concavity),   P in the norm of H_t

    For any gradients, and any u within ``diameter`` of all xhat_t, mode convex has ::

        sum_t <g_t, x_t - u>  <=  diameter^2 / (2 eta_T) + sum_t eta_t ||g_t - M_t||^2

    and ``regret_bound()`` is the right side so far; in the other modes it is one for the regret of losses that are as
    convex as was said. For drawn losses with variances sigma_t^2, and variations Sigma_t^2 of their expectation, which
    is convex and smooth, the expected regret is of the order sqrt(sum sigma_t^2) + sqrt(sum Sigma_t^2).

    ``with optimizer.eval_params():`` puts the average of the points played so far into the parameters, to evaluate or
    save it, and takes it out again. The parameters are projected when the optimizer is made. A parameter without a
    gradient takes no part in a round. Besides the arguments a group has ``lr`` (1 at first), a factor on eta_t that
    schedulers drive.

    Args:
        params: parameters, or groups with options of their own; real, with dense gradients. Each group is a learner.
        diameter: D of the domain, > 0; None where the mode is strongly_convex (there is no bound then).
        lipschitz: G, the largest norm of a gradient, > 0. None: the largest norm so far, a heuristic (eta_1 takes
            ||g_1||, x_1 does not depend on it); mode exp_concave needs the number.
        delta: > 0; bounds the first step.
        mode: ``"convex"``, ``"strongly_convex"`` or ``"exp_concave"``, which keeps two d x d matrices, d <= 4096.
        strong_convexity: lambda of the expected losses, > 0, for its mode.
        exp_concavity: alpha of the losses, > 0, for its mode.
        domain: an ``assay.online.Ball``, ``Box`` or ``Simplex``, or any object with ``project(x)`` (and
            ``project_norm(x, H)`` for mode exp_concave) for a vector; None: no constraint.
        optimism: where M_{t+1} comes from, for all groups: ``"last_grad"``, g_t; ``"middle_grad"``, the gradient of the
            same loss at xhat_{t+1}, for which the closure is called a second time; ``"external"``, the ``hint`` of the
            step; ``"none"``, 0, which is projected gradient descent.

    Raises:
        ValueError: an argument out of range, or missing in its mode.
        RuntimeError: a sparse gradient, a complex parameter; a step without the closure or hint that it needs; sharded
            parameters with mode exp_concave, or with a domain that needs the whole vector.

    Source: S. Chen et al., Optimistic Online Mirror Descent for Bridging Stochastic and Adversarial Online Convex
    Optimization, JMLR 25 (2024), arXiv 2302.04552.

    >>> import torch
    >>> from assay.online import Ball
    >>> from assay.optim import OptimisticOMD
    >>> x = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = OptimisticOMD([x], diameter=2.0, lipschitz=1.0, domain=Ball(1.0))
    >>> for _ in range(100):
    ...     optimizer.zero_grad()
    ...     x[0].backward()
    ...     optimizer.step()
    >>> round(x[0].item(), 4), round(optimizer.regret_bound(), 2)
    (-1.0, 3.34)
    """

    def __init__(
        self,
        params: Any,
        *,
        diameter: float | None,
        lipschitz: float | None = None,
        delta: float = 1.0,
        mode: str = "convex",
        strong_convexity: float | None = None,
        exp_concavity: float | None = None,
        domain: Domain | None = None,
        optimism: str = "last_grad",
    ) -> None:
        if optimism not in OPTIMISMS:
            raise ValueError(f"optimism = {optimism!r} is out of range: {', '.join(map(repr, OPTIMISMS))}")
        defaults = {"lr": 1.0, "diameter": diameter, "lipschitz": lipschitz, "delta": delta, "mode": mode}
        defaults |= {"strong_convexity": strong_convexity, "exp_concavity": exp_concavity}
        super().__init__(params, {**defaults, "domain": domain, "optimism": optimism})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, a learner of their own; unknown options and values out of range are refused."""
        if unknown := param_group.keys() - self.defaults.keys() - NOT_OPTIONS:
            raise TypeError(f"OptimisticOMD has no option {', '.join(map(repr, sorted(unknown)))}")
        options = {**self.defaults, **param_group}
        _check(options)
        if options["optimism"] != self.defaults["optimism"]:
            raise ValueError(f"optimism = {options['optimism']!r} is out of range: all groups have the same")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.update(MEMORY)
        try:
            _check_size(group)
            params = [p.detach() for p in group["params"] if p.requires_grad]
            if params:
                _copy(params, project_parts(group["domain"], params))
        except Exception:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """torch's checkpoint, without the domains: they are no tensors or numbers, and stay as constructed."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            del group["domain"]
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up again what :meth:`state_dict` gave, in the domains of this optimizer."""
        domains = [group["domain"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, domain in zip(self.param_groups, domains, strict=True):
            group["domain"] = domain

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, hint: Sequence[Tensor | None] | None = None) -> Any:
        """End a round and move to the next point; returns the closure's loss.

        ``hint``: a guess of the next gradient for each parameter, in the order of the groups, if optimism = "external".
        """
        optimism = self.defaults["optimism"]
        if (hint is not None) != (optimism == "external"):
            raise RuntimeError("hint is to be given if, and only if, optimism = 'external'")
        if optimism == "middle_grad" and closure is None:
            raise RuntimeError("optimism = 'middle_grad' needs a second gradient: call step(closure)")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = ((group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups)
        players = [(group, params) for group, params in found if params]
        for group, params in players:
            self._correct(group, params)
        if optimism == "middle_grad" and closure is not None:
            for _, params in players:
                _copy([p.detach() for p in params], self._slots(params, "xhat"))
            with torch.enable_grad():
                closure()
        everything = [p for group in self.param_groups for p in group["params"]]
        hints = dict(zip(everything, [p.grad for p in everything] if hint is None else hint, strict=True))
        for group, params in players:
            self._play(group, params, hints)
        return loss

    def regret_bound(self) -> float:
        """The deterministic bound on the regret of all rounds so far, a sum over the groups; see the class.

        Infinite in modes strongly_convex and exp_concave if a scheduler has changed ``lr``, or without ``diameter``.
        """
        total = 0.0
        for group in self.param_groups:
            if group["t"]:
                total += math.inf if group["diameter"] is None else group["diameter"] ** 2 * group["growth"]
                total += group["cost"]
        return total

    @contextlib.contextmanager
    def eval_params(self) -> Iterator[None]:
        """The average of the points played so far in the parameters, and the point to play back afterwards."""
        params = [p for group in self.param_groups for p in group["params"] if p in self.state]
        points = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p in params:
                p.copy_(self.state[p]["average"])
        try:
            yield
        finally:
            with torch.no_grad():
                for p, point in zip(params, points, strict=True):
                    p.copy_(point)

    def _slots(self, params: list[Tensor], name: str) -> list[Tensor]:
        return [self.state[p][name] for p in params]

    def _correct(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """The gradients are there: from xhat_t to xhat_{t+1}, and what the round added to V and to the bound."""
        for p in params:
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError(f"OptimisticOMD does not support sparse gradients (shape {tuple(p.shape)})")
            if p.is_complex():
                raise RuntimeError("OptimisticOMD does not support complex parameters")
            if not self.state[p]:
                point = p.detach().clone(memory_format=torch.preserve_format)
                self.state[p] = {"xhat": point, "M": torch.zeros_like(point), "average": point.clone()}
        grads = [p.grad for p in params if p.grad is not None]
        xhat, guesses = self._slots(params, "xhat"), self._slots(params, "M")
        group["t"] += 1
        torch._foreach_lerp_(self._slots(params, "average"), [p.detach() for p in params], 1 / group["t"])
        if group["lipschitz"] is None:
            group["G"] = max(group["G"], norm_of(grads))
        missed = torch._foreach_sub(grads, guesses)
        if group["mode"] == "exp_concave":
            self._newton(group, params, grads, missed)
        else:
            if group["t"] == 1:
                group["eta"] = _eta(group, 1)
            surprise = norm_of(missed) ** 2
            _account(group, surprise)
            group["V"] += surprise
            moved = torch._foreach_sub(xhat, torch._foreach_mul(grads, group["eta"]))
            _copy(xhat, project_parts(group["domain"], list(moved)))
        _copy(guesses, grads)

    def _play(self, group: dict[str, Any], params: list[Tensor], hints: dict[Tensor, Tensor | None]) -> None:
        """The guess is there: from xhat_{t+1} to x_{t+1}."""
        optimism, guesses = group["optimism"], self._slots(params, "M")
        if optimism == "none":
            torch._foreach_zero_(guesses)
        elif optimism != "last_grad":
            for p, guess in zip(params, guesses, strict=True):
                hint = hints[p]
                guess.copy_(hint) if hint is not None else guess.zero_()
        group["eta"] = _eta(group, group["t"] + 1)
        xhat = self._slots(params, "xhat")
        if group["mode"] == "exp_concave":
            whole = _flat(xhat) - group["eta"] * (group["H_inverse"] @ _flat(guesses))
            points = _parts(_project_norm(group, whole), params)
        else:
            moved = torch._foreach_sub(xhat, torch._foreach_mul(guesses, group["eta"]))
            points = project_parts(group["domain"], list(moved))
        _copy([p.detach() for p in params], points)

    def _newton(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], missed: Sequence[Tensor]
    ) -> None:
        """The round's correction in the norm of H_t, and H_{t+1}."""
        g, xhat = _flat(grads), self._slots(params, "xhat")
        half = min(1 / (4 * group["lipschitz"] * group["diameter"]), group["exp_concavity"]) / 4  # beta / 2
        if group["t"] == 1:
            first = 1 + half * group["lipschitz"] ** 2
            group["H"] = first * torch.eye(len(g), dtype=g.dtype, device=g.device)
            group["H_inverse"] = group["H"] / first**2
            group["growth"], group["eta"] = first / 2, _eta(group, 1)
        if len(g) != len(group["H"]):
            raise RuntimeError("mode = 'exp_concave' needs a gradient of every parameter of the group in every round")
        group["H"], group["H_inverse"] = group["H"].to(g), group["H_inverse"].to(g)
        direction = group["H_inverse"] @ g
        after = _project_norm(group, _flat(xhat) - group["eta"] * direction)
        surprise = _flat(list(missed))
        moved = (g @ (after - _flat(params))).item()
        plain = group["eta"] == 1
        spent = (surprise @ (group["H_inverse"] @ surprise)).item() + half * moved**2
        group["cost"] += spent if plain else math.inf
        group["V"] += surprise.square().sum().item()
        # Sherman and Morrison: the inverse of H + half g g^T.
        group["H"].addr_(g, g, alpha=half)
        group["H_inverse"].addr_(direction, direction, alpha=-half / (1 + half * (g @ direction).item()))
        _copy(xhat, _parts(after, params))


def _eta(group: dict[str, Any], t: int) -> float:
    """eta of round t, after those before it; in mode exp_concave the factor on the inverse of H."""
    lr = float(group["lr"])
    if group["mode"] == "exp_concave":
        return lr
    if group["mode"] == "strongly_convex":
        return 2 * lr / (group["strong_convexity"] * t)
    G = group["G"] if group["lipschitz"] is None else group["lipschitz"]
    return lr * group["diameter"] / math.sqrt(group["delta"] + 4 * G**2 + group["V"])


def _account(group: dict[str, Any], surprise: float) -> None:
    """Add the round to the bound: growth is that of 1 / (2 eta), times D^2; cost is what the surprise costs."""
    eta = group["eta"]
    if group["mode"] == "convex":
        steepness = 1 / (2 * eta) if eta else math.inf
        group["growth"] += max(0.0, steepness - group["steepness"])
        group["steepness"] = steepness
        group["cost"] += eta * surprise
    else:
        curvature = group["strong_convexity"]
        group["growth"] = curvature / 4
        plain = math.isclose(eta * curvature * group["t"], 2)
        group["cost"] += (eta + curvature * eta**2 / 2) * surprise if plain else math.inf


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):  # sharded tensors have no _foreach_copy_
        target.copy_(source)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors as one vector in float64: errors in H would add up over the rounds."""
    return torch.cat([x.detach().flatten() for x in tensors]).double()


def _parts(whole: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A vector as tensors of these shapes and dtypes."""
    pieces = whole.split([x.numel() for x in like])
    return [piece.view(x.shape).to(x.dtype) for piece, x in zip(pieces, like, strict=True)]


def _project_norm(group: dict[str, Any], x: Tensor) -> Tensor:
    return x if group["domain"] is None else group["domain"].project_norm(x, group["H"])


def _check(options: dict[str, Any]) -> None:
    """Refuse what is out of range, or missing in its mode."""
    lr, mode, domain = options["lr"], options["mode"], options["domain"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr of shape {tuple(lr.shape)} is out of range: a number >= 0 or a tensor of one element")
    at_least_zero(options, "lr")
    if mode not in MODES:
        raise ValueError(f"mode = {mode!r} is out of range: {', '.join(map(repr, MODES))}")
    needed: dict[str, tuple[str, ...]] = {"convex": ("diameter",), "strongly_convex": ("strong_convexity",)}
    needed["exp_concave"] = ("diameter", "lipschitz", "exp_concavity")
    for name in ("diameter", "lipschitz", "delta", "strong_convexity", "exp_concavity"):
        value = options[name]
        if value is None and name in (*needed[mode], "delta"):
            raise ValueError(f"{name} = None is out of range: mode = {mode!r} needs a number > 0")
        if value is not None and not value > 0:
            raise ValueError(f"{name} = {value!r} is out of range: a number > 0")
    wanted = "project_norm" if mode == "exp_concave" else "project"
    if domain is not None and not hasattr(domain, wanted):
        raise ValueError(f"domain = {domain!r} is out of range: an object with {wanted}()")


def _check_size(group: dict[str, Any]) -> None:
    """Refuse parameters that are too many for a matrix, or sharded where the whole vector is needed."""
    matrix, domain = group["mode"] == "exp_concave", group["domain"]
    size = sum(p.numel() for p in group["params"])
    if matrix and size > LARGEST:
        raise ValueError(f"params of {size} elements are out of range: mode = 'exp_concave' takes {LARGEST}")
    whole = matrix or (domain is not None and not hasattr(domain, "project_parts"))
    if whole and any(hasattr(p, "to_local") for p in group["params"]):
        raise RuntimeError(f"mode = {group['mode']!r} with domain = {domain!r} does not support sharded parameters")


def apply(recipe: Recipe, *, diameter: float = 10.0, delta: float = 1.0) -> Recipe:
    """Optimistic OMD without a constraint as a run's optimizer, with the largest gradient so far for its constant."""

    def update(run: Run) -> OptimisticOMD:
        return OptimisticOMD(run.model.parameters(), diameter=diameter, delta=delta)

    return replace(recipe, update=update)
