"""The norm of the gradient at every step of a run, also where parameters are sharded over processes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ORDERS = {"l1": 1, "l2": 2}


class GradNormRecorder:
    """Keeps the norm of the gradient at every step of a run: what :func:`refine_schedule` is made from.

    ``record()`` is called once per optimizer step, between the last ``backward()`` and ``step()``: after gradients are
    accumulated, unscaled (AMP) and clipped, so that the norm is that of what the optimizer sees. The norm is taken over
    all parameters together, ``sum |g|`` for ``"l1"`` and ``sqrt(sum g^2)`` for ``"l2"``, complex gradients as pairs of
    real ones. It stays on the device until it is asked for, so recording does not wait for the device.

    Sharded parameters (``DTensor``: FSDP2, tensor parallelism) are summed over their shards; replicated ones (DDP) are
    the same everywhere and counted once. Every process must then call ``record()``.

    Args:
        params: the parameters that the optimizer holds, as in ``model.parameters()``.
        norm: ``"l2"`` for SGD, ``"l1"`` for Adam and its kin.

    Raises:
        ValueError: no parameters; an unknown norm; a state of the other norm.
        RuntimeError: ``record()`` while no parameter has a gradient.

    >>> import torch
    >>> from assay.optim import GradNormRecorder
    >>> weight = torch.tensor([3.0, -4.0], requires_grad=True)
    >>> recorder = GradNormRecorder([weight])
    >>> (weight**2).sum().backward()
    >>> recorder.record()
    >>> recorder.norms
    array([10.])
    """

    _MOST_PENDING = 256  # a 0-d tensor on a GPU takes 512 bytes

    def __init__(self, params: Iterable[Tensor], norm: str = "l2") -> None:
        self.params = list(params)
        if not self.params:
            raise ValueError("params is empty")
        if norm not in _ORDERS:
            raise ValueError(f"norm = {norm!r} is out of range: 'l1' or 'l2'")
        self.norm = norm
        self._norms: list[float] = []
        self._pending: list[Tensor] = []

    @torch.no_grad()
    def record(self) -> None:
        """Add the norm of the gradients as they are now."""
        if all(p.grad is None for p in self.params):
            raise RuntimeError("no parameter has a gradient: call record() between backward() and step()")
        self._pending.append(_gradient_norm(self.params, _ORDERS[self.norm]))
        if len(self._pending) >= self._MOST_PENDING:
            self._collect()

    @property
    def norms(self) -> np.ndarray:
        """All norms so far, float64, one per call of ``record()``."""
        self._collect()
        return np.asarray(self._norms, dtype=np.float64)

    def _collect(self) -> None:
        if self._pending:
            self._norms += torch.stack(self._pending).tolist()
            self._pending.clear()

    def state_dict(self) -> dict[str, Any]:
        """The norms so far and their kind, in plain Python types."""
        return {"norm": self.norm, "norms": self.norms.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the norms of ``state_dict``."""
        if state_dict["norm"] != self.norm:
            raise ValueError(f"a state of {state_dict['norm']!r} norms for a recorder with norm = {self.norm!r}")
        self._pending.clear()
        self._norms = [math.nan if value is None else float(value) for value in state_dict["norms"]]

    def save(self, path: str | Path) -> None:
        """Write ``{"norm": ..., "norms": [...]}`` as JSON; what is not finite becomes null."""
        norms = [value if math.isfinite(value) else None for value in self.norms.tolist()]
        Path(path).write_text(json.dumps({"norm": self.norm, "norms": norms}), encoding="utf-8")

    def load(self, path: str | Path) -> None:
        """Go on after the norms that ``save`` wrote; null becomes nan."""
        self.load_state_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def _gradient_norm(params: list[Tensor], order: int) -> Tensor:
    """The norm of all gradients together, a 0-d tensor; one reduction for all that is sharded alike."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    local: dict[Any, list[Tensor]] = {}
    for p in params:
        shards, grad = _local_shard(p) if distributed else ((), p.grad)
        local.setdefault(shards, []).extend([] if grad is None else [grad])
    total = torch.zeros((), dtype=_wide(params[0].device), device=params[0].device)
    for shards, grads in local.items():
        powers = [part.to(total.device, total.dtype) for part in _power_sums(grads, order)]
        part = torch.stack(powers).sum() if powers else torch.zeros_like(total)
        for mesh, dim in shards:  # also where this process has no gradient: all must take part
            torch.distributed.all_reduce(part, group=mesh.get_group(dim))
        total += part
    return total ** (1 / order)


def _local_shard(p: Tensor) -> tuple[tuple[tuple[Any, int], ...], Tensor | None]:
    """The mesh dimensions over which a parameter is sharded, and this process's piece of its gradient."""
    from torch.distributed.tensor import DTensor

    if not isinstance(p, DTensor):
        return (), p.grad
    shards = tuple((p.device_mesh, dim) for dim, place in enumerate(p.placements) if not place.is_replicate())
    grad = p.grad
    # A gradient may still be a pending sum; placed like its parameter, it is complete.
    return shards, grad.redistribute(placements=p.placements).to_local() if isinstance(grad, DTensor) else grad


def _power_sums(grads: list[Tensor], order: int) -> list[Tensor]:
    """``sum |g|^order`` of the gradients of each device and dtype, accumulated in at least float32."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for g in grads:
        dense = g.coalesce().values() if g.is_sparse else g
        real = torch.view_as_real(dense) if dense.is_complex() else dense
        if real.numel():
            kinds.setdefault((real.device, real.dtype), []).append(real)
    sums = []
    for (device, dtype), same in kinds.items():
        norms = torch._foreach_norm(same, order, dtype=torch.promote_types(dtype, torch.float32))
        sums.append((torch.stack(norms).to(_wide(device)) ** order).sum())
    return sums


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
