"""An optimizer around another: what acts on all weights at once composes with any update.

A wrapper and its base share their parameter groups (the very dicts) and their state, so a scheduler, a loop or a
checkpoint that knows one of them works for both. A wrapper's own options stand in the groups beside the base's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Base = type[torch.optim.Optimizer] | Callable[..., torch.optim.Optimizer] | torch.optim.Optimizer


class WrappedOptimizer(torch.optim.Optimizer):
    """The shell of a wrapper: a subclass states its own options and writes ``step``.

    ``base_optimizer`` is a class (or function) that is called with the parameters and ``base_options``, or an optimizer
    that exists already; ``params`` are then its parameters, in any form, or None.
    """

    def __init__(self, params: Any, base_optimizer: Base, own: Mapping[str, Any], base_options: dict[str, Any]) -> None:
        self.base = _make_base(params, base_optimizer, set(own), base_options)
        self.own = dict(own)
        for group, options in zip(self.base.param_groups, _own_options(params, own, self.base), strict=True):
            group.update(options)
            self.check({**own, **group})
        super().__init__(self.base.param_groups, {**self.base.defaults, **own})
        self._share()

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        """Raise ValueError for an option of the wrapper out of range; called for every parameter group."""

    def _share(self) -> None:
        """Hold the base's groups and state, also after it has replaced them in loading a checkpoint."""
        self.param_groups, self.state = self.base.param_groups, self.base.state
        if not any(isinstance(hook, _Share) for hook in self.base._optimizer_load_state_dict_post_hooks.values()):
            self.base.register_load_state_dict_post_hook(_Share(self))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own, the base's and this wrapper's."""
        if self.param_groups is not self.base.param_groups:
            return super().add_param_group(param_group)  # torch's constructor, meeting the base's own groups
        options = {name: param_group.get(name, value) for name, value in self.own.items()}
        self.check({**param_group, **options})
        self.base.add_param_group({name: value for name, value in param_group.items() if name not in self.own})
        self.base.param_groups[-1].update(options)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base's checkpoint, with what the wrapper itself remembers under ``"wrapper"``."""
        mine = self.wrapper_state()
        return {**self.base.state_dict(), **({"wrapper": mine} if mine else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict({name: value for name, value in state_dict.items() if name != "wrapper"})
        self._share()
        if "wrapper" in state_dict:
            self.load_wrapper_state(state_dict["wrapper"])

    def wrapper_state(self) -> dict[str, Any]:
        """What a wrapper remembers beyond the base's state: numbers, tensors, lists and dicts of them."""
        return {}

    def load_wrapper_state(self, state: dict[str, Any]) -> None:
        """Take up again what :meth:`wrapper_state` gave."""

    def __getstate__(self) -> dict[str, Any]:
        hooks = {name for name in self.__dict__ if name.startswith("_optimizer_")}
        return {name: value for name, value in self.__dict__.items() if name not in {*hooks, "param_groups", "state"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters, group after group."""
        return (p for group in self.param_groups for p in group["params"])

    def with_gradients(self) -> list[tuple[dict[str, Any], nn.Parameter, Tensor]]:
        """(group, parameter, gradient) of every parameter that has one; sparse gradients are refused."""
        found = [(group, p, p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(grad.is_sparse for _, _, grad in found):
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        return found


class _Share:
    """Called after a base has loaded a checkpoint by itself."""

    def __init__(self, wrapper: WrappedOptimizer) -> None:
        self.wrapper = wrapper

    def __call__(self, base: torch.optim.Optimizer) -> None:
        self.wrapper.param_groups, self.wrapper.state = base.param_groups, base.state


def _make_base(params: Any, base: Base, own: set[str], options: dict[str, Any]) -> torch.optim.Optimizer:
    if isinstance(base, torch.optim.Optimizer):
        if options:
            raise TypeError(f"{', '.join(map(repr, options))}: the base optimizer exists already and takes no options")
        return base
    if not callable(base):
        raise TypeError(f"base_optimizer = {base!r} is out of range: an optimizer, or a class of optimizers")
    return base(_without(params, own), **options)


def _without(params: Any, own: set[str]) -> Any:
    """The parameters or groups as the base may see them: without the wrapper's options."""
    if isinstance(params, nn.Module):
        return params.parameters()
    if isinstance(params, list) and params and isinstance(params[0], dict):
        return [{name: value for name, value in group.items() if name not in own} for group in params]
    return params


def _own_options(params: Any, own: Mapping[str, Any], base: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The wrapper's options for each group: as said in the group, else the constructor's."""
    groups = params if isinstance(params, list) and params and isinstance(params[0], dict) else base.param_groups
    return [{name: group.get(name, value) for name, value in own.items()} for group in groups]


def total_norm(tensors: list[Tensor]) -> Tensor:
    """The 2-norm of all tensors as one vector, over all shards and devices, in float32 at least; 0-d."""
    if not tensors:
        return torch.zeros(())
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) if not x.is_complex() else x for x in tensors]
    norm = torch.nn.utils.get_total_norm(wide)
    # Each process holds a shard of a DTensor: its norm is that of all shards together.
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
