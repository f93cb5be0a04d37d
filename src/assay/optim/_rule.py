"""The engine of update rules: a method writes its formula once, this runs it on all parameters, and fast.

A rule is a function ``rule(p, g, *state, lr, t, **options)`` of a few lines of tensor maths: it changes the parameter
``p`` and its state slots in place and never writes the gradient ``g``. It has no loop over parameters, no ``.item()``
and no branch on values; ``lr`` and ``t`` (the number of this step, from 1) may be numbers or 0-d tensors.

How a rule is run follows from what it declares of a parameter (:meth:`RuleOptimizer.elementwise`):

- an element-wise rule sees small tensors as one :class:`Many`, large ones (on a CPU) in pieces that stay in the cache:
  the same arithmetic in the same order, so bitwise equal to one tensor at a time (``foreach=False``);
- any other rule sees each parameter whole.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from assay.optim._checkpoint import as_saved
from assay.optim._many import Many

SMALL = 32_768
"""Elements up to which tensors are run as a list: below it the cost of calling an operator counts most."""
PIECE = 131_072
"""Elements of a piece of a large tensor on a CPU: parameter, gradient, slots and a temporary stay in a 4 MiB cache."""
COMPILER = "inductor"
"""Backend of ``compile=True``."""
NOT_OPTIONS = {"params", "param_names", "initial_lr", "name", "lr_scale"}
"""What a group may hold besides its optimizer's options: labels that training loops and schedulers put there."""


class RuleOptimizer(torch.optim.Optimizer):
    """An optimizer made of a rule; a method subclasses it and states ``slots``, ``rule`` and its constructor.

    ``slots`` names the rule's state tensors in its order; they start at zero, in the parameter's dtype and layout.
    The rule's keyword arguments besides ``lr`` and ``t`` are the options that every parameter group holds.
    """

    slots: ClassVar[tuple[str, ...]]
    rule: ClassVar[Callable[..., None]]
    complex_as_real: ClassVar[bool] = False
    """Whether a complex parameter may be seen as pairs of real numbers: for rules that are element-wise."""

    @classmethod
    def slots_of(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """The slots of a parameter in a group with these options, where they depend on them."""
        return cls.slots

    @staticmethod
    def elementwise(p: Tensor) -> bool:
        """Whether the rule acts on each element of this parameter by itself, so that it may be cut and packed."""
        return True

    @classmethod
    def splits(cls, p: Tensor, options: Mapping[str, Any]) -> bool:
        """:meth:`elementwise`, for rules where it depends on the group's options."""
        return cls.elementwise(p)

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        """Raise ValueError for an option out of range; called for every parameter group."""

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
        fused: bool | None = None,
    ) -> None:
        if fused:
            raise ValueError(f"fused = {fused!r} is out of range: {type(self).__name__} has no native kernel yet")
        how = {"maximize": maximize, "foreach": foreach, "compile": compile, "fused": fused}
        super().__init__(params, {**defaults, **how})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; unknown options and values out of range are refused."""
        if unknown := param_group.keys() - self.defaults.keys() - NOT_OPTIONS:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(map(repr, sorted(unknown)))}")
        self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _check_group(self, options: Mapping[str, Any]) -> None:
        lr = options["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr of shape {tuple(lr.shape)} is out of range: a number >= 0 or a tensor of one element")
        at_least_zero(options, "lr")
        self.check(options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a state saved before an option existed gets its default
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave; tensors besides the slots keep the dtype in which they were saved."""
        super().load_state_dict(state_dict)
        slots = {p: {"step", *self.slots_of(group)} for group in self.param_groups for p in group["params"]}
        for p, name, value in as_saved(self, state_dict):
            if name not in slots[p]:
                self.state[p][name] = value

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        options = {name: group[name] for name in _option_names(type(self).rule)}
        small: dict[tuple[torch.device, torch.dtype, int], list[tuple[Tensor, ...]]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is None:
                continue
            t, tensors = self._tensors(p, group)
            if p.numel() == 0:
                continue
            whole = not self.splits(p, group)
            alone = group["foreach"] is False or whole
            if not alone and (p.numel() <= SMALL or (group["foreach"] and not group["compile"])):
                # Also with compile=True: to call a graph costs more than a small tensor's share of a list.
                small[p.device, p.dtype, t].append(_local(tensors))
            elif group["compile"]:
                self._run_compiled(tensors, group["lr"], t, options, whole)
            elif alone or p.device.type != "cpu":
                self.rule(*tensors, lr=group["lr"], t=t, **options)
            else:
                for piece in _pieces(_local(tensors)):
                    self.rule(*piece, lr=group["lr"], t=t, **options)
        for (_, _, t), lists in small.items():
            self.rule(*map(Many, zip(*lists, strict=True)), lr=group["lr"], t=t, **options)

    def _tensors(self, p: Tensor, group: Mapping[str, Any]) -> tuple[int, tuple[Tensor, ...]]:
        """The number of this step for ``p``, and what the rule takes: parameter, gradient, slots."""
        name = type(self).__name__
        g = p.grad
        assert g is not None
        if g.is_sparse:
            raise RuntimeError(f"{name} does not support sparse gradients (a parameter of shape {tuple(p.shape)})")
        if p.is_complex() and not self.complex_as_real:
            raise RuntimeError(f"{name} does not support complex parameters")
        state = self.state[p]
        if not state:
            # A tensor, as torch's own optimizers keep it, so that checkpoints and shards treat it alike.
            state["step"] = torch.zeros((), dtype=torch.float32)
            for slot in self.slots_of(group):
                self._start(slot, p, group)
        state["step"] += 1
        tensors = (p, -g if group["maximize"] else g, *(state[slot] for slot in self.slots_of(group)))
        return int(state["step"]), tuple(map(torch.view_as_real, tensors)) if p.is_complex() else tensors

    def _start(self, slot: str, p: Tensor, group: Mapping[str, Any]) -> None:
        """Put the slot of a parameter that takes its first step into the state."""
        self.state[p][slot] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def _run_compiled(
        self, tensors: tuple[Tensor, ...], lr: Any, t: Any, options: dict[str, Any], whole: bool, rule: Any = None
    ) -> None:
        """One graph for a kind of tensor: ``lr`` and ``t`` go in as tensors, so that no new value compiles anew."""
        p = tensors[0]
        # A scalar too: torch's compiler loses what is written into one of float64.
        if p.dim() == 0 or (not whole and all(x.is_contiguous() for x in _local(tensors))):
            tensors = tuple(x.view(-1) for x in _local(tensors))
        # In float64 where there is one: 1 - beta^t in float32 would be wrong in the fifth digit at the first steps.
        dtype = torch.float32 if p.device.type == "mps" else torch.float64
        lr, t = (torch.as_tensor(value, dtype=dtype, device=p.device) for value in (lr, t))
        # Detached, because the compiler takes the shape of an nn.Parameter for a constant.
        tensors = tuple(x.detach() for x in tensors)
        kind = (p.dtype, *(size == 1 for size in tensors[0].shape))
        _compiled(rule or type(self).rule, kind)(*tensors, lr=lr, t=t, **options)


@functools.cache
def _option_names(rule: Callable[..., None]) -> tuple[str, ...]:
    parameters = inspect.signature(rule).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("lr", "t"))


@functools.cache
def _compiled(rule: Any, kind: tuple[Any, ...]) -> Callable[..., None]:
    """The rule compiled for one kind of tensor; sizes are symbols, so one graph serves all tensors of a kind."""
    # Torch allows a piece of code eight graphs, fewer than the kinds that a model has: each kind gets its own code.
    own = types.FunctionType(
        rule.__code__.replace(), rule.__globals__, rule.__name__, rule.__defaults__, rule.__closure__
    )
    own.__kwdefaults__ = rule.__kwdefaults__
    # Otherwise inductor computes what depends on t alone, 1 - beta^t, again for every element: Adam at half the speed.
    settings: Any = {"realize_opcount_threshold": 3} if COMPILER == "inductor" else None
    return torch.compile(own, fullgraph=True, dynamic=True, backend=COMPILER, options=settings)


def _local(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """This process's part of sharded tensors; what is element-wise needs no more."""
    # Asked by name: importing DTensor costs a second that most users need not spend.
    return tuple(x.to_local() if hasattr(x, "to_local") else x for x in tensors)


def _pieces(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Equal pieces of tensors with one layout, as views; tensors of different layouts stay whole."""
    dense = [flat for x in tensors if (flat := _dense(x)) is not None]
    if len(dense) < len(tensors) or len({x.stride() for x in tensors}) > 1:
        return iter([tensors])
    return zip(*(flat.split(PIECE) for flat in dense), strict=True)


def _dense(x: Tensor) -> Tensor | None:
    """The elements of a tensor without gaps, in memory order, as a flat view; None if it has gaps."""
    if x.is_contiguous():
        return x.view(-1)
    order = sorted(range(x.dim()), key=lambda d: (x.stride()[d], x.shape[d]), reverse=True)
    sorted_ = x.permute(order)
    return sorted_.view(-1) if sorted_.is_contiguous() else None


def row_blocks(x: Tensor, *, like: Tensor | None = None) -> tuple[Tensor, ...]:
    """Views of consecutive rows of a matrix, :data:`PIECE` elements each, for rules that need sums over rows.

    ``like`` is the matrix whose rows count where ``x`` has a number per row. What is small, compiled or sharded, or
    lies on another device than the CPU, where a call costs more than a pass over memory, stays whole.
    """
    whole = x if like is None else like
    if torch.compiler.is_compiling() or x.device.type != "cpu" or hasattr(whole, "to_local") or whole.numel() <= PIECE:
        return (x,)
    return x.split(max(1, PIECE * whole.shape[0] // whole.numel()))


def at_least_zero(options: Mapping[str, Any], *names: str) -> None:
    """Refuse a named option below zero (or not a number)."""
    for name in names:
        if not options[name] >= 0:
            raise ValueError(f"{name} = {options[name]!r} is out of range: a number >= 0")


def below_one(options: Mapping[str, Any], *names: str) -> None:
    """Refuse a named option outside [0, 1), or a tuple with such an entry."""
    for name in names:
        values = options[name] if isinstance(options[name], (tuple, list)) else (options[name],)
        if not all(0 <= value < 1 for value in values):
            raise ValueError(f"{name} = {options[name]!r} is out of range: [0, 1)")
