"""Any optimizer on one block of parameters after the other, with state for one block only."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from assay.optim._wrapper import WrappedOptimizer
from assay.optim.badam.blocks import ALWAYS, ORDERS, Turns, for_base, homes, infer_blocks, named_groups, under


class BlockWrapper(WrappedOptimizer):
    """Any optimizer on one block of the parameters after the other; only that block has optimizer state.

    The parameters are in D disjoint blocks. In an epoch of blocks every block has one visit, in an order that
    ``order`` names, and a visit is K = ``switch_every`` steps of the base optimizer::

        for block i in the order of this epoch:
            state of the base for block i = new;  master_p = p in master_dtype, for p of lower precision
            K times:  the base's step on block i (and always_active), with the gradient of the whole loss
            state of block i, masters and gradients are freed

    The first block is active when the constructor returns, and the next one when the K-th step of a visit returns. A
    parameter of lower precision than ``master_dtype`` has a master copy while it is active: the base steps on the
    master, with the gradient in its precision, and the parameter becomes the master rounded. All parameters stay in
    their groups, so schedulers may be given the wrapper as any optimizer.

    With ``freeze_inactive`` the flags ``requires_grad`` follow the active block, so that backward computes nothing for
    the layers below it and no gradients of weights but the block's. A parameter that is given here is trained in its
    turn, whatever its flag was: leave out what shall stay as it is. ``close()``, or the end of a ``with`` block, brings
    the flags back. Without it, gradients of inactive parameters are ignored.

    A step in which no parameter of the block has a gradient is skipped, and does not count. ``switch_block()`` ends a
    visit early; ``switch_block(i)`` starts one of block i, which has then had its turn of this epoch. A checkpoint
    holds where the schedule is, the order that is left, and the masters.

    Args:
        base_factory: called with the parameter groups, returns the optimizer; its ``step`` must need no closure and its
            state of a parameter must be in ``optimizer.state``.
        named_params: ``model.named_parameters()``, a Module, or groups with options of their own whose ``params`` are
            such pairs. Parameters without a name are called by their position, "0", "1", ...
        blocks: for each block the prefixes of its parameters' names, in whole dotted components, or one prefix. None:
            :func:`infer_blocks`. A tensor in two blocks belongs to the first.
        switch_every: K, an integer >= 1; or ``"auto"``: num_samples // (batch_size * D), within [50, 100].
        order: ``"random"``, a new permutation in each epoch; ``"ascending"``; ``"descending"``; or ``"fixed"``, every
            visit is one of the first block.
        always_active: prefixes of what is trained in all visits, such as a new head, and keeps its state.
        master_dtype: floating; None: no masters.
        freeze_inactive: whether ``requires_grad`` follows the active block.
        seed: of the random order.
        num_samples, batch_size: of the training data, for ``switch_every="auto"``.

    Raises:
        ValueError: an argument out of range; a block or prefix that no parameter is left for.
        RuntimeError: a step or switch after ``close()``.

    Warns:
        UserWarning: parameters that are in no block and not always active: they are frozen.

    Source: Q. Luo, H. Yu, X. Li, BAdam, NeurIPS 2024, arXiv 2404.02827.

    >>> import torch
    >>> from assay.optim import BlockWrapper
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
    >>> def base(groups):
    ...     return torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    >>> optimizer = BlockWrapper(base, model.named_parameters(), blocks=["0", "2"], switch_every=5, order="descending")
    >>> optimizer.active_names()
    ['2.weight', '2.bias']
    >>> model(torch.ones(4, 4)).square().mean().backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        base_factory: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        named_params: Any,
        *,
        blocks: Sequence[Sequence[str] | str] | None = None,
        switch_every: int | str = 100,
        order: str = "random",
        always_active: Sequence[str] = (),
        master_dtype: torch.dtype | None = torch.float32,
        freeze_inactive: bool = True,
        seed: int = 0,
        num_samples: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        if not callable(base_factory) or isinstance(base_factory, torch.optim.Optimizer):
            raise TypeError(
                f"base_factory = {type(base_factory).__name__} is out of range: a function of parameter groups"
            )
        if order not in ORDERS:
            raise ValueError(f"order = {order!r} is out of range: one of {', '.join(ORDERS)}")
        if master_dtype is not None and not master_dtype.is_floating_point:
            raise ValueError(f"master_dtype = {master_dtype!r} is out of range: a floating dtype or None")
        groups = named_groups(named_params)
        named = [pair for group in groups for pair in group["params"]]
        if not named:
            raise ValueError(f"{type(self).__name__} got an empty parameter list")
        if blocks is None:
            blocks = infer_blocks(named)
        self.blocks = [[block] if isinstance(block, str) else list(block) for block in blocks]
        self.always_active = [always_active] if isinstance(always_active, str) else list(always_active)
        self.switch_every = _visit_length(switch_every, len(self.blocks), num_samples, batch_size)
        self.master_dtype, self.freeze_inactive = master_dtype, freeze_inactive
        self._check_places(named)
        super().__init__(for_base(groups), base_factory, {}, {})
        self._named: list[tuple[str, nn.Parameter]] = []
        self._flags: dict[nn.Parameter, bool] = {}
        self._masters: dict[nn.Parameter, Tensor] = {}
        self._closed = False
        self._turns = Turns(order, len(self.blocks), seed)
        self._block, self._count = self._turns.next(), 0
        self._take_in(named)

    # The blocks.

    @property
    def current_block(self) -> int:
        """The index of the block that is active."""
        return self._block

    def active_names(self) -> list[str]:
        """The names of the parameters that are trained now."""
        return [name for name, p in self._named if self._is_active(p)]

    def switch_block(self, index: int | None = None) -> None:
        """End this visit and start one of block ``index``; None: of the block whose turn it is."""
        self._refuse_if_closed()
        if index is None:
            index = self._turns.next()
        elif isinstance(index, int) and 0 <= index < len(self.blocks):
            self._turns.take(index)
        else:
            raise ValueError(f"index = {index!r} is out of range: 0 to {len(self.blocks) - 1}")
        self._begin(index)

    def close(self) -> None:
        """Give ``requires_grad`` back as it was; no step can follow."""
        if self.freeze_inactive and not self._closed:
            for p, flag in self._flags.items():
                p.requires_grad_(flag)
        self._closed = True

    def __enter__(self) -> BlockWrapper:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _check_places(self, named: list[tuple[str, nn.Parameter]]) -> None:
        places = set(homes(named, self.blocks, self.always_active).values())
        for i, prefixes in enumerate(self.blocks):
            if i not in places:
                raise ValueError(f"blocks[{i}] = {prefixes!r} is out of range: no parameter is left for it")
        for prefix in self.always_active:
            if not any(under(name, [prefix]) for name, _ in named):
                raise ValueError(f"always_active = {prefix!r} is out of range: no parameter's name begins with it")

    def _take_in(self, named: list[tuple[str, nn.Parameter]]) -> None:
        """Give new parameters their place in the schedule."""
        self._named += named
        self._flags.update({p: p.requires_grad for _, p in named})
        self._homes = homes(self._named, self.blocks, self.always_active)
        if left := [name for name, p in named if p not in self._homes]:
            warnings.warn(f"{type(self).__name__} freezes what is in no block: {', '.join(left)}", stacklevel=4)
        self._activate()

    def _begin(self, index: int) -> None:
        self._block, self._count = index, 0
        for p in self.parameters():
            if self._homes.get(p) != ALWAYS:
                self.state.pop(p, None)
                self._masters.pop(p, None)
        self._activate()

    def _activate(self) -> None:
        """Set flags and masters as the active block wants them."""
        for p in self.parameters():
            active = self._is_active(p)
            if self.freeze_inactive:
                p.requires_grad_(active)
                if not active:
                    p.grad = None
            if active and p not in self._masters and self._wants_master(p):
                self._masters[p] = p.detach().to(self.master_dtype)

    def _is_active(self, p: nn.Parameter) -> bool:
        return self._homes.get(p) in (ALWAYS, self._block)

    def _wants_master(self, p: Tensor) -> bool:
        if self.master_dtype is None or not p.is_floating_point():
            return False
        return torch.promote_types(p.dtype, self.master_dtype) != p.dtype

    # The step.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base on the active block; returns the closure's loss."""
        self._refuse_if_closed()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if all(p.grad is None for p, home in self._homes.items() if home == self._block):
            return loss
        for p, master in self._masters.items():
            master.grad = None if p.grad is None else p.grad.to(master.dtype)
        with self._groups_of(self._is_active):
            self.base.step()
        for p, master in self._masters.items():
            if p.grad is not None:
                p.copy_(master)
                master.grad = None
        self._count += 1
        if self._count >= self.switch_every:
            self.switch_block()
        return loss

    @contextlib.contextmanager
    def _groups_of(self, wanted: Callable[[nn.Parameter], bool]) -> Iterator[None]:
        """The base sees the wanted parameters only, and masters in their place; afterwards all is as before."""
        lists = [group["params"] for group in self.base.param_groups]
        for group, params in zip(self.base.param_groups, lists, strict=True):
            group["params"] = [self._masters.get(p, p) for p in params if wanted(p)]
        self._rekey(self._masters)
        try:
            yield
        finally:
            for group, params in zip(self.base.param_groups, lists, strict=True):
                group["params"] = params
            self._rekey({master: p for p, master in self._masters.items()})

    def _rekey(self, pairs: Mapping[Any, Any]) -> None:
        for one, other in pairs.items():
            if one in self.base.state:
                self.base.state[other] = self.base.state.pop(one)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise RuntimeError(f"{type(self).__name__} is closed")

    # Groups and checkpoints.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; their names say to which block they belong."""
        if self.param_groups is not self.base.param_groups:
            return super().add_param_group(param_group)  # torch's constructor, meeting the base's own groups
        groups = named_groups([param_group], start=len(self._named))
        for group in for_base(groups):
            super().add_param_group(group)
        self._take_in([pair for group in groups for pair in group["params"]])

    def wrapper_state(self) -> dict[str, Any]:
        """Where the schedule is, and the masters by the positions of their parameters."""
        masters = {i: self._masters[p] for i, p in enumerate(self.parameters()) if p in self._masters}
        where = {"blocks": len(self.blocks), "block": self._block, "count": self._count}
        return {**where, "turns": self._turns.state(), "masters": masters}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a visit where it was saved; the blocks must be the same.

        Raises:
            ValueError: a checkpoint of another optimizer, or of other blocks or masters.
        """
        mine = state_dict.get("wrapper", {})
        if mine.get("blocks") != len(self.blocks):
            raise ValueError(f"state_dict is out of range: a checkpoint with {len(self.blocks)} blocks")
        self._turns.load(mine["turns"])
        self._begin(mine["block"])
        self._count = mine["count"]
        params = list(self.parameters())
        if mine["masters"].keys() != {i for i, p in enumerate(params) if p in self._masters}:
            raise ValueError("state_dict is out of range: its parameters with a master copy are others than here")
        for i, master in mine["masters"].items():
            self._masters[params[i]].copy_(master)
        # torch casts the state that it loads to the dtype of the parameter: here of the master.
        with self._groups_of(lambda p: True):
            super().load_state_dict({name: value for name, value in state_dict.items() if name != "wrapper"})


def _visit_length(switch_every: int | str, blocks: int, num_samples: int | None, batch_size: int | None) -> int:
    if switch_every == "auto":
        for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} = {value!r} is out of range: an integer >= 1, for switch_every = 'auto'")
        assert num_samples is not None and batch_size is not None
        return min(max(num_samples // (batch_size * blocks), 50), 100)
    if not isinstance(switch_every, int) or switch_every < 1:
        raise ValueError(f"switch_every = {switch_every!r} is out of range: an integer >= 1, or 'auto'")
    return switch_every
