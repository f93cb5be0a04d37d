"""The engine of 8-bit optimizers: rules whose slots are kept as codes between steps.

A parameter's slots are decoded, the rule runs on them in float32, and they are encoded again; on a CPU some blocks at a
time, so that slots in float32 never exist as a whole, and stay in the cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from assay.compress._blockwise import Codebook, codebook, copy_rounded_, decode, dynamic_map, encode_
from assay.optim._checkpoint import as_saved
from assay.optim._rule import RuleOptimizer, _local, _option_names

PIECE = 32_768
"""Elements that are decoded at once on a CPU: some ten temporaries of this size stay in a cache of 1 MiB."""
LARGE_PIECE = 1 << 24
"""The same on an accelerator, where only memory bounds it."""
GRADIENT = 1
"""The gradient's place among a rule's tensors; the others are written."""
HALF = (torch.bfloat16, torch.float16)
MARK = "_state_in_32_bits"

Map = Callable[[bool], Tensor]
Storage = tuple[Map, bool, bool] | None
"""How a slot is kept: the map of its codes, whether they have a sign, whether 0 alone is coded as 0; None: 32 bits."""
Marked = TypeVar("Marked", nn.Module, Tensor)


def use_32bit(module_or_parameter: Marked) -> Marked:
    """Have 8-bit optimizers keep the state of a parameter, or of all parameters of a module, in 32 bits.

    The mark is on the parameter itself. ``copy.deepcopy`` and ``fully_shard`` make parameters anew, without it: mark
    after them.

    Returns:
        What it was given.

    >>> import torch
    >>> from assay.optim import AdamW8bit, use_32bit
    >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 64))
    >>> _ = use_32bit(model[0])
    >>> optimizer = AdamW8bit(model.parameters())
    """
    for p in module_or_parameter.parameters() if isinstance(module_or_parameter, nn.Module) else [module_or_parameter]:
        setattr(p, MARK, True)
    return module_or_parameter


class QuantizedOptimizer(RuleOptimizer):
    """A rule optimizer that keeps slots of large parameters in eight bits; a method states which slots, and their sign.

    Such a slot is a tensor of codes (uint8, the parameter's shape) with ``<slot>_absmax`` beside it, the scales of its
    blocks. The format follows the options: a state in the other format, such as one of torch's optimizer, is converted.
    """

    signed: ClassVar[Mapping[str, bool]]
    """The slots that are kept as codes, and whether they take both signs."""
    map: ClassVar[Map] = staticmethod(dynamic_map)

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        if options["optim_bits"] not in (8, 32):
            raise ValueError(f"optim_bits = {options['optim_bits']!r} is out of range: 8 or 32")
        for name, least in (("block_size", 1), ("min_8bit_size", 0)):
            if not (isinstance(options[name], int) and options[name] >= least):
                raise ValueError(f"{name} = {options[name]!r} is out of range: an integer >= {least}")

    @staticmethod
    def in_8_bits(p: Tensor, options: Mapping[str, Any]) -> bool:
        """Whether the state of this parameter is kept as codes."""
        return options["optim_bits"] == 8 and p.numel() >= options["min_8bit_size"] and not hasattr(p, MARK)

    def _step_group(self, group: dict[str, Any]) -> None:
        plain = []
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.numel() and (self.in_8_bits(p, group) or p.dtype in HALF):
                self._step_blocks(p, group)
            else:
                plain.append(p)
        super()._step_group({**group, "params": plain})

    def _step_blocks(self, p: Tensor, group: dict[str, Any]) -> None:
        """The step of a parameter whose rule runs in a wider format than the parameter's or its state's."""
        t, found = self._tensors(p, group)
        tensors, slots = _local(found), self.slots_of(group)
        if not tensors[0].numel():
            return
        stored = tuple(self._storage(slot, p, group) for slot in slots)
        scales = _local(tuple(self.state[p][_absmax(slot)] for slot, kind in zip(slots, stored, strict=True) if kind))
        rule = _on_stored_slots(type(self).rule, stored, p.device)
        options = {name: group[name] for name in _option_names(type(self).rule)}
        options["random"] = group["stochastic_rounding"]
        flat = [x.reshape(-1) for x in tensors]
        piece = p.numel() if group["compile"] else PIECE if p.device.type == "cpu" else LARGE_PIECE
        for views in _blocks(flat, scales, group["block_size"], piece):
            if group["compile"]:
                self._run_compiled(views, group["lr"], t, options, True, rule)
            else:
                rule(*views, lr=group["lr"], t=t, **options)
        for i, (x, y) in enumerate(zip(tensors, flat, strict=True)):
            if i != GRADIENT and not x.is_contiguous():  # the flat one is a copy
                x.copy_(y.view(x.shape))

    def _storage(self, slot: str, p: Tensor, group: Mapping[str, Any]) -> Storage:
        if slot not in self.signed or not self.in_8_bits(p, group):
            return None
        # What has a sign keeps it, and is then not coded as 0 unless it is 0.
        return type(self).map, self.signed[slot], self.signed[slot] or group.get("nonzero_v", False)

    def _tensors(self, p: Tensor, group: Mapping[str, Any]) -> tuple[int, tuple[Tensor, ...]]:
        if p in self.state:
            self._convert(p, group)
        return super()._tensors(p, group)

    def _start(self, slot: str, p: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[p]
        if self._storage(slot, p, group):
            state[slot] = torch.zeros_like(p, dtype=torch.uint8, memory_format=torch.contiguous_format)
            state[_absmax(slot)] = _scales_for(p, group["block_size"])
        else:
            wide = torch.promote_types(p.dtype, torch.float32)
            state[slot] = torch.zeros_like(p, dtype=wide, memory_format=torch.preserve_format)

    def _convert(self, p: Tensor, group: Mapping[str, Any]) -> None:
        """Bring a state that was made under other options into the format that these ask for."""
        state = self.state[p]
        for slot in self.signed:
            stored = self._storage(slot, p, group)
            if slot not in state or bool(stored) == (_absmax(slot) in state):
                continue
            before, scales = state[slot], state.pop(_absmax(slot), None)
            self._start(slot, p, group)
            book = _book(type(self).map, self.signed[slot], bool(stored and stored[2]), p.device)
            values, codes = _local((before, state[slot]) if stored else (state[slot], before))
            flat = [values.reshape(-1), codes.view(-1)]
            scales = _local((state[_absmax(slot)] if stored else scales,))
            for x, q, absmax in _blocks(flat, scales, group["block_size"], LARGE_PIECE):
                if stored:
                    _write(x.to(torch.promote_types(x.dtype, torch.float32), copy=True), q, absmax, book)
                else:
                    x.copy_(decode(q, absmax, book))
            if not stored and not values.is_contiguous():
                values.copy_(flat[0].view(values.shape))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer, or of one with the same slots in 32 bits, such as torch's own."""
        super().load_state_dict(state_dict)
        for p, name, value in as_saved(self, state_dict):
            if value.dtype == torch.uint8 or name.endswith(_absmax("")):
                self.state[p][name] = value
            elif p.dtype in HALF and name in self.signed:
                self.state[p][name] = value.to(torch.promote_types(value.dtype, torch.float32))


def _absmax(slot: str) -> str:
    return f"{slot}_absmax"


def _scales_for(p: Any, block_size: int) -> Tensor:
    """One scale, 0, for each block of a parameter; of a sharded one each process blocks its own shard."""
    if not hasattr(p, "to_local"):
        return torch.zeros(-(-p.numel() // block_size), device=p.device)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    shape, placements = list(p.shape), []
    for parts, placement in zip(p.device_mesh.shape, p.placements, strict=True):
        if placement.is_shard():
            # Room for the largest shard, so that all processes hold equally many.
            shape[placement.dim] = -(-shape[placement.dim] // parts)
        placements.append(Shard(0) if placement.is_shard() else Replicate())
    scales = torch.zeros(-(-math.prod(shape) // block_size), device=p.to_local().device)
    return DTensor.from_local(scales, p.device_mesh, placements, run_check=False)


def _blocks(
    flat: Sequence[Tensor], scales: Sequence[Tensor], block_size: int, piece: int
) -> Iterator[tuple[Tensor, ...]]:
    """Views of some blocks at a time as rows of a matrix, with their scales as a column; last the short block."""
    whole = len(flat[0]) // block_size
    for scale in scales:
        if len(scale) < -(-len(flat[0]) // block_size):
            raise RuntimeError(f"block_size = {block_size} does not fit a state of {len(scale)} blocks")
    step = max(1, piece // block_size)
    for start in range(0, whole, step):
        stop = min(whole, start + step)
        rows = (x[start * block_size : stop * block_size].view(-1, block_size) for x in flat)
        yield (*rows, *(scale[start:stop, None] for scale in scales))
    if len(flat[0]) > whole * block_size:
        yield (*(x[None, whole * block_size :] for x in flat), *(scale[whole : whole + 1, None] for scale in scales))


@functools.cache
def _book(map: Map, signed: bool, keep_nonzero: bool, device: torch.device) -> Codebook:
    return codebook(map(signed).to(device), keep_nonzero)


def _write(values: Tensor, codes: Tensor, absmax: Tensor, book: Codebook, random: bool = False) -> None:
    """Encode values that are not wanted afterwards."""
    found, scales = encode_(values, book, random=random)
    codes.copy_(found)
    absmax.copy_(scales)


@functools.cache
def _on_stored_slots(rule: Callable[..., None], stored: tuple[Storage, ...], device: torch.device) -> Any:
    """The rule as one on blocks of codes: ``(p, g, *slots, *scales of those that are codes)``."""
    books = [_book(*kind, device) if kind else None for kind in stored]

    def on_stored_slots(p: Tensor, g: Tensor, *rest: Tensor, lr: Any, t: Any, random: bool, **options: Any) -> None:
        wide = torch.promote_types(p.dtype, torch.float32)
        kept, scales = rest[: len(books)], list(rest[len(books) :])
        absmax = [scales.pop(0) if book else None for book in books]
        slots = [
            decode(x, scale, book).to(wide) if book and scale is not None else x
            for x, scale, book in zip(kept, absmax, books, strict=True)
        ]
        w, g = p.to(wide), g.to(wide)
        fine = None
        # The sum of a few thousand numbers tells of one that is not finite, where reading it costs no wait.
        if any(books) and (torch.compiler.is_compiling() or g.device.type != "cpu" or not math.isfinite(g.sum())):
            fine = g.isfinite()
            before, g = [x.clone() for x in (w, *slots)], torch.where(fine, g, 0.0)
        rule(w, g, *slots, lr=lr, t=t, **options)
        if fine is not None:
            for x, old in zip((w, *slots), before, strict=True):
                x.copy_(torch.where(fine, x, old))
        for x, scale, book, values in zip(kept, absmax, books, slots, strict=True):
            if book and scale is not None:
                _write(values, x, scale, book, random)
        if w is not p:
            copy_rounded_(p, w, random)

    return on_stored_slots
