"""Stable-SPAM beside Adam on a byte model with INT4 weights, with and without spikes in the loss."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.evidence import Bench, Evidence, at_least, at_most
from assay.optim.stable_spam.stable_spam import StableSPAM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Make = Callable[..., torch.optim.Optimizer]
ADAM, STABLE, CLIPPED = "Adam", "Stable-SPAM", "AdamW with clipped norm"
PARTS = ("clean", "clipped")
RATES, USUAL = (1e-3, 3e-3, 1e-2, 3e-2), (3e-3, 1e-2)
STEPS, BATCH, CONTEXT, GROUP = 200, 128, 16, 64
EVERY, SPIKE = 50, 1000.0
FILES = ("argparse", "asyncio/base_events", "tarfile", "typing", "inspect", "textwrap")


def claim(
    bench: Bench, *, method: Make = StableSPAM, seeds: int = 5, steps: int = STEPS, rates: Collection[float] = RATES,
    usual: Collection[float] = USUAL, parts: Collection[str] = PARTS,
) -> Evidence:  # fmt: skip
    """All rates with spikes for both, the usual two without; the clipped baseline is reported at those, not gated."""
    variants = [f"{name}, spikes, {lr:g}" for name in (ADAM, STABLE) for lr in rates]
    if "clean" in parts:
        variants += [f"{name}, clean, {lr:g}" for name in (ADAM, STABLE) for lr in usual]
    if "clipped" in parts:
        variants += [f"{CLIPPED}, spikes, {lr:g}" for lr in usual]
    rows = bench.rows(functools.partial(train, method, bench.scale(steps, least=60)), variants, bench.seeds(seeds))

    def nll(name: str, kind: str, lr: float) -> Any:
        return rows.values(f"{name}, {kind}, {lr:g}", "nll")

    checks, notes = [], []
    for lr in usual:
        stable = nll(STABLE, "spikes", lr)
        gain = nll(ADAM, "spikes", lr) - stable
        checks.append(at_least(f"spikes, rate {lr:g}: NLL of Adam - Stable-SPAM", gain, 0.3))
        if "clean" in parts:
            clean, adam = nll(STABLE, "clean", lr), nll(ADAM, "clean", lr)
            checks += [
                at_most(f"rate {lr:g}: NLL of Stable-SPAM, spikes - clean", stable - clean, 0.15),
                at_most(f"clean, rate {lr:g}: NLL of Stable-SPAM - Adam", clean - adam, 0.06),
            ]
        if "clipped" in parts:
            gap = (stable - nll(CLIPPED, "spikes", lr)).mean()
            notes.append(f"not gated: spikes, rate {lr:g}: NLL of Stable-SPAM - {CLIPPED}: {gap:+.3f}")
    if len(rates) > 1:
        spreads = [torch.stack([torch.as_tensor(nll(name, "spikes", lr)) for lr in rates]) for name in (STABLE, ADAM)]
        stable, adam = (s.amax(0) - s.amin(0) for s in spreads)
        checks.append(at_most("spikes: NLL's spread over rates, Stable-SPAM / Adam", (stable / adam).numpy(), 1.0))
    return Evidence(rows, checks, notes)


def fake_quant_int4(w: Tensor, group_size: int = GROUP) -> Tensor:
    """Each group of a row rounded to 16 levels between its extremes; gradients pass as if nothing was rounded."""
    groups = w.detach().unflatten(1, (-1, group_size))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = (high - low).clamp(min=1e-8) / 15
    rounded = (((groups - low) / step).round() * step + low).flatten(1)
    return w + (rounded - w).detach()


class Int4(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, fake_quant_int4(self.weight), self.bias)


class ByteModel(nn.Sequential):
    """The next byte from 16 before: an embedding and three linear layers with INT4 weights."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Embedding(128, 16), nn.Flatten()),
            *(Int4(16 * CONTEXT, 256), nn.ReLU(), Int4(256, 256), nn.ReLU(), Int4(256, 128)),
        )


@functools.cache
def windows() -> tuple[Tensor, Tensor]:
    """Windows of 17 bytes of Python's library: every tenth block of 1,000 bytes is for validation."""
    folder = Path(functools.__file__).parent
    text = b"".join((folder / f"{name}.py").read_bytes() for name in FILES)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().clamp(max=127)
    blocks = data[: len(data) // 1000 * 1000].view(-1, 1000)
    held = torch.arange(len(blocks)) % 10 == 9
    train, validation = (part.unfold(1, CONTEXT + 1, 1).flatten(0, 1) for part in (blocks[~held], blocks[held]))
    return train, validation[:: len(validation) // 2000][:2000]


def train(method: Make, steps: int, variant: str, seed: int) -> dict[str, Any]:
    """The loss in nats on 2,000 windows that were not trained on."""
    name, kind, rate = variant.split(", ")
    data, validation = windows()
    torch.manual_seed(seed)
    model, lr = ByteModel(), float(rate)
    if name == STABLE:
        optimizer = method(model.parameters(), lr=lr)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    draw = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        batch = data[torch.randint(len(data), (BATCH,), generator=draw)]
        loss = F.cross_entropy(model(batch[:, :-1]), batch[:, -1])
        optimizer.zero_grad()
        (loss * SPIKE if kind == "spikes" and step % EVERY == 0 else loss).backward()
        if name == CLIPPED:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        nll = F.cross_entropy(model(validation[:, :-1]), validation[:, -1]).item()
    return {"nll": nll if math.isfinite(nll) else 99.0}


def figure(evidence: Evidence) -> Figure:
    """Loss over learning rates, mean and range over seeds."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6, 3.5), layout="constrained")
    axes = drawing.subplots()
    for name, color in ((ADAM, "C0"), (STABLE, "C1"), (CLIPPED, "C2")):
        for kind, style in (("spikes", "-"), ("clean", ":")):
            said = {row["variant"] for row in evidence.rows if row["variant"].startswith(f"{name}, {kind}, ")}
            rates = sorted(float(variant.rpartition(", ")[2]) for variant in said)
            if rates:
                curves = torch.stack(
                    [torch.as_tensor(evidence.rows.values(f"{name}, {kind}, {lr:g}", "nll")) for lr in rates]
                )
                axes.plot(rates, curves.mean(1), f"{color}o{style}", markersize=4, label=f"{name}, {kind}")
                axes.fill_between(rates, curves.amin(1), curves.amax(1), color=color, alpha=0.15, linewidth=0)
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss, nats a byte")
    axes.legend(fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    return drawing
