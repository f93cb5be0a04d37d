"""Speed and memory of an optimizer's step, as ratios in one run.

    python benchmarks/optim.py [--markdown FILE] [--pairs 9] [--only NAME ...] [--compile]

About 25 million float32 parameters in 124 tensors, as in a small transformer. One thread, processor time, interleaved
pairs with torch's foreach AdamW: the ratio of the minima, and the median of the pairs' ratios.
The bound is the bytes that a step must move over the best bandwidth measured in the same run. Peers are measured if
they are installed (``pip install 'assay-ml[peers]'``). State how memory was allocated: glibc gives large blocks back
to the system after each use and pays for them again (``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1`` keeps them).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timing import bandwidth, command, conditions, in_turns, seconds, transient_bytes
from torch import nn

from assay.bench.loop import state_bytes
from assay.optim import SGDP, AdamP, AdamW8bit, DiffGrad, Lion, PerpGrad, StableSPAM
from assay.optim._rule import RuleOptimizer

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
RATE = 1e-12
"""So small that gradients made orthogonal to their weights stay so: the projection fires in every step."""


class Adam(RuleOptimizer):
    """Plain AdamW as a rule: what the engine itself costs."""

    slots = ("exp_avg", "exp_avg_sq")

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 1e-2, **how: Any) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay}, **how)

    @staticmethod
    def rule(p: Any, g: Any, m: Any, v: Any, *, lr: Any, t: Any, betas: Any, eps: float, weight_decay: float) -> None:
        m.lerp_(g, 1 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        p.mul_(1 - lr * weight_decay)
        p.sub_(m.div(v.sqrt().div_((1 - betas[1] ** t) ** 0.5).add_(eps)).mul_(lr / (1 - betas[0] ** t)))


def shapes() -> list[tuple[int, ...]]:
    """A transformer of width 384 with ten layers and 18,000 words: 124 tensors."""
    width = 384
    block = [(width,)] * 4 + [(3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(18_000, width), (512, width), (width,), (width,), *block * 10]


def parameters(*, invariant: bool = False) -> list[nn.Parameter]:
    """Parameters with gradients; ``invariant`` makes each gradient orthogonal to its weight, row by row."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in shapes()]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
        if invariant and p.dim() > 1:
            w = p.detach()
            p.grad -= w * ((w * p.grad).sum(1) / (w * w).sum(1))[:, None]
    return params


@dataclass(frozen=True)
class Candidate:
    """An optimizer and how to measure it: ``moved`` is what a step must move, in bytes per parameter."""

    name: str
    make: Make
    moved: int
    invariant: bool = False
    """Whether the gradients are orthogonal to the weights."""


def candidates() -> Iterator[Candidate]:
    """torch's own, ours, and the same methods of peers that are installed."""
    adamw = functools.partial(torch.optim.AdamW, lr=RATE, weight_decay=1e-2)
    nesterov = {"lr": RATE, "momentum": 0.9, "nesterov": True}
    yield Candidate("torch AdamW foreach", functools.partial(adamw, foreach=True), 28)
    yield Candidate("torch AdamW fused", functools.partial(adamw, fused=True), 28)
    yield Candidate("torch AdamW for-loop", functools.partial(adamw, foreach=False), 28)
    yield Candidate("torch SGD foreach", functools.partial(torch.optim.SGD, **nesterov, foreach=True), 20)
    decay = {"lr": RATE, "weight_decay": 1e-2}
    yield Candidate("assay Adam as a rule", Adam, 28)
    yield Candidate("assay SGDP", functools.partial(SGDP, **nesterov), 28)
    for invariant in (False, True):
        projecting = ", projecting" if invariant else ""
        yield Candidate(f"assay AdamP{projecting}", functools.partial(AdamP, **decay), 36, invariant)
        for package in ("torch_optimizer", "pytorch_optimizer", "timm.optim"):
            yield from peer(package, "AdamP", 36, invariant, **decay)
    yield Candidate("assay DiffGrad", functools.partial(DiffGrad, lr=RATE), 36)
    yield from peer("torch_optimizer", "DiffGrad", 36, lr=RATE)
    yield from peer("pytorch_optimizer", "DiffGrad", 36, lr=RATE)
    yield Candidate("assay Lion", functools.partial(Lion, **decay), 20)
    yield from peer("pytorch_optimizer", "Lion", 20, **decay)
    yield from peer("lion_pytorch", "Lion", 20, **decay)
    # The largest gradient must be known before anything is written: gradients are read twice.
    yield Candidate("assay StableSPAM", functools.partial(StableSPAM, **decay), 36)
    yield from peer("pytorch_optimizer", "StableSPAM", 36, **decay)
    yield Candidate("assay AdamW8bit", functools.partial(AdamW8bit, **decay), 16)
    yield from peer("bitsandbytes.optim", "AdamW8bit", 16, **decay)
    yield from peer("torchao.optim", "AdamW8bit", 16, **decay)
    # The sums must be known before the gradient is written: weights and gradients are read twice.
    yield Candidate("assay PerpGrad, AdamW foreach", lambda params: PerpGrad(adamw(params, foreach=True)), 48)
    for found in peer("pytorch_optimizer", "OrthoGrad", 48):
        around = functools.partial(lambda orthograd, params: orthograd(adamw(params, foreach=True)), found.make)
        yield Candidate(f"{found.name}, AdamW foreach", around, 48)


def peer(package: str, name: str, moved: int, invariant: bool = False, **options: Any) -> Iterator[Candidate]:
    """A peer's optimizer, if it is installed."""
    try:
        found = getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError):
        return
    label = f"{package.partition('.')[0]} {name}{', projecting' if invariant else ''}"
    yield Candidate(label, functools.partial(found, **options), moved, invariant)


def measure(pairs: int, only: list[str], compile: bool) -> list[dict[str, Any]]:
    """Each candidate in turn with torch's foreach AdamW, A B A B; only two sets of parameters live at a time."""
    torch.set_num_threads(1)
    rows = []
    for candidate in candidates():
        name = candidate.name
        if only and not any(word in name for word in only):
            continue
        for compiled in (False, True) if compile and name.startswith("assay") else (False,):
            reference = torch.optim.AdamW(parameters(), lr=RATE, weight_decay=1e-2, foreach=True)
            params = parameters(invariant=candidate.invariant)
            optimizer = candidate.make(params)
            if compiled:
                optimizer.param_groups[0]["compile"] = True
            row = {"name": name + (", compiled" if compiled else ""), "moved": candidate.moved}
            row["first"] = seconds(optimizer.step)
            row["transient"] = transient_bytes(optimizer.step)
            seconds(reference.step)
            row["times"] = in_turns(reference.step, optimizer.step, pairs)
            row["state"], row["count"] = state_bytes(optimizer), sum(p.numel() for p in params)
            rows.append(row)
            del reference, params, optimizer
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    count, speed = rows[0]["count"], bandwidth()
    lines = [
        f"{count / 1e6:.2f} million float32 parameters in {len(shapes())} tensors; "
        f"best bandwidth in place {speed / 1e9:.0f} GB/s. {conditions(len(rows[0]['times'].mine))}",
        "",
        "| optimizer | min | median | bound | state, B/param | transient, B/param | first step, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        bound = row["moved"] * count / speed / min(row["times"].base)
        lines.append(
            f"| {row['name']} | {row['times'].minimum:.2f} | {row['times'].median:.2f} | {bound:.2f} | "
            f"{row['state'] / count:.2f} | {row['transient'] / count:.2f} | {row['first']:.2f} |"
        )
    return "\n".join(lines)


def report(pairs: int, only: list[str], compile: bool) -> str:
    return table(measure(pairs, only, compile))


if __name__ == "__main__":
    command(__doc__, report, "compile", "also run ours with compile=True", pairs=9)
