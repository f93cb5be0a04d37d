"""GradNormLoRP beside GaLore and AdamW on a small byte model, and its layer beside LoRA in fine-tuning."""

from __future__ import annotations

import _pydecimal
import argparse
import asyncio.base_events
import functools
import inspect
import math
import tarfile
import textwrap
import typing
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.evidence import Bench, Check, Evidence, Rows, at_most
from assay.nn import GradNormLoRPLinear, swap
from assay.optim import GradNormLoRP

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Make = Callable[..., torch.optim.Optimizer]
PARTS = ("training", "tuning")
RANKS = (4, 16)
CONTEXT, EMBEDDING, WIDTH, SYMBOLS = 16, 16, 256, 128
STEPS, BATCH, GAP = 300, 128, 50
TUNING_STEPS, TUNING_RANK = 150, 4
# By held-out loss on seeds 0 and 1: AdamW the best of 1e-3, 3e-3 and 1e-2, the others of 3e-3, 1e-2 and 3e-2.
RATES = {"AdamW": 3e-3, "GaLore, 4": 3e-2, "GradNormLoRP, 4": 1e-2, "GaLore, 16": 1e-2, "GradNormLoRP, 16": 1e-2}
# The best of 3e-4, 1e-3, 3e-3 and 1e-2 on the same seeds.
TUNING_RATES = {"LoRA": 1e-3, "GradNormLoRPLinear": 3e-3}
LIBRARY = (argparse, asyncio.base_events, tarfile, typing, inspect, textwrap)


def claim(
    bench: Bench,
    *,
    method: Make = GradNormLoRP,
    layer: Callable[..., nn.Module] = GradNormLoRPLinear,
    parts: Collection[str] = PARTS,
    ranks: Collection[int] = RANKS,
    seeds: int = 8,
    steps: int = STEPS,
) -> Evidence:
    """``method`` is the optimizer under test, ``layer`` the adapted layer of fine-tuning."""
    evidence = Evidence(Rows(), [])
    if "training" in parts:
        makers = optimizers(method, ranks)
        run = functools.partial(training, makers, bench.scale(steps))
        evidence.rows += bench.rows(run, makers, bench.seeds(seeds))
        _training_checks(evidence, ranks)
    if "tuning" in parts:
        run = functools.partial(tuning, layer, bench.scale(steps), bench.scale(TUNING_STEPS))
        evidence.rows += bench.rows(run, TUNING_RATES, bench.seeds(seeds))
        _tuning_checks(evidence)
    return evidence


def optimizers(method: Make = GradNormLoRP, ranks: Collection[int] = RANKS) -> dict[str, Make]:
    """What is compared: all with every matrix of the network projected, vectors by AdamW."""
    plain = functools.partial(torch.optim.AdamW, lr=RATES["AdamW"], weight_decay=0.0)
    made: dict[str, Make] = {"AdamW": plain}
    for rank in ranks:
        for name, kind, norm in (("GaLore", GradNormLoRP, False), ("GradNormLoRP", method, True)):
            options = {"rank": rank, "update_proj_gap": GAP, "weight_norm": norm, "lr": RATES[f"{name}, {rank}"]}
            made[f"{name}, {rank}"] = functools.partial(kind, **options)
    if 4 in ranks:  # reported only: the rate that is best for the other one
        made["GaLore, 4, rate 0.01"] = functools.partial(made["GaLore, 4"], lr=1e-2)
    if 16 in ranks:
        made["GradNormLoRP, 16, 8 bits"] = functools.partial(made["GradNormLoRP, 16"], state_bits=8)
    return made


def _training_checks(evidence: Evidence, ranks: Collection[int]) -> None:
    rows, checks = evidence.rows, evidence.checks
    if 4 in ranks:
        gap = rows.difference("GradNormLoRP, 4", "GaLore, 4", "nll")
        far = rows.difference("GradNormLoRP, 4", "AdamW", "nll")
        checks += [
            at_most("held-out loss, GradNormLoRP - GaLore, rank 4", gap, -0.03),
            at_most("the same, the worst of the first three seeds", gap[:3].max(), 0.02),
            at_most("held-out loss, GradNormLoRP - AdamW, rank 4", far, 0.60),
            _share(rows, "GradNormLoRP, 4", "numbers", 0.05),
        ]
    if 16 in ranks:
        gap = rows.difference("GradNormLoRP, 16", "GaLore, 16", "nll")
        rounding = rows.difference("GradNormLoRP, 16, 8 bits", "GradNormLoRP, 16", "nll")
        checks += [
            at_most("held-out loss, GradNormLoRP - GaLore, rank 16", gap, 0.02),
            at_most("held-out loss, GradNormLoRP in 8 bits - in 32, rank 16", rounding, 0.02),
            _share(rows, "GradNormLoRP, 16", "numbers", 0.15),
            _share(rows, "GradNormLoRP, 16, 8 bits", "bytes", 0.105),
        ]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        nll, numbers, size = (rows.values(variant, metric) for metric in ("nll", "numbers", "bytes"))
        evidence.notes.append(
            f"{variant}: held-out loss {nll.mean():.3f} ({nll.min():.3f} to {nll.max():.3f}), {numbers[0]:,.0f} "
            f"numbers of state in {size[0] / 1024:.0f} KiB"
        )


def _share(rows: Rows, variant: str, metric: str, bound: float) -> Check:
    return at_most(f"{metric} of state, {variant} / AdamW", rows.ratio(variant, "AdamW", metric)[0], bound)


def _tuning_checks(evidence: Evidence) -> None:
    rows = Rows(row for row in evidence.rows if row["variant"] in TUNING_RATES)
    lora, ours = TUNING_RATES
    evidence.checks += [
        at_most("held-out loss after fine-tuning, GradNormLoRPLinear - LoRA", rows.difference(ours, lora, "nll"), 0.01),
        at_most(
            "trained numbers beyond LoRA's and one per output",
            abs(rows.difference(ours, lora, "trained")[0] - (2 * WIDTH + SYMBOLS)),
            0,
        ),
    ]
    for variant in TUNING_RATES:
        nll, before = rows.values(variant, "nll"), rows.values(variant, "before")
        evidence.notes.append(
            f"{variant}: held-out loss {before.mean():.3f} before, {nll.mean():.3f} after fine-tuning"
        )


class ByteModel(nn.Module):
    """The next byte from the 16 before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, EMBEDDING)
        self.mlp = nn.Sequential(
            nn.Linear(CONTEXT * EMBEDDING, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, SYMBOLS),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.embedding(x).flatten(1))


@functools.cache
def text(*modules: Any) -> tuple[Tensor, Tensor]:
    """The source of modules as bytes, the first 90 % of each to train on, and 2,000 windows of the rest."""
    sources = [inspect.getsource(module).encode("ascii", "replace") for module in modules]
    train = b"".join(source[: len(source) * 9 // 10] for source in sources)
    rest = _bytes(b"".join(source[len(source) * 9 // 10 :] for source in sources)).unfold(0, CONTEXT + 1, 1)
    return _bytes(train), rest[torch.linspace(0, len(rest) - 1, 2000).long()]


def _bytes(source: bytes) -> Tensor:
    return torch.frombuffer(bytearray(source), dtype=torch.uint8).long()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, source: Tensor, steps: int, seed: int) -> list[float]:
    """Train on windows drawn by the seed; the loss of every step."""
    draw, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        starts = torch.randint(len(source) - CONTEXT, (BATCH,), generator=draw)
        windows = source[starts[:, None] + torch.arange(CONTEXT + 1)]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(windows[:, :-1]), windows[:, -1])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: Tensor) -> float:
    return F.cross_entropy(model(windows[:, :-1]), windows[:, -1]).item()


def training(makers: dict[str, Make], steps: int, variant: str, seed: int) -> dict[str, Any]:
    """Train from scratch; loss on held-out text, and what the optimizer keeps."""
    source, windows = text(*LIBRARY)
    torch.manual_seed(seed)
    model = ByteModel()
    optimizer = makers[variant](model.parameters())
    losses = train(model, optimizer, source, steps, seed)
    kept = [x for state in optimizer.state.values() for name, x in state.items() if name != "step"]
    return {
        "nll": held_out_loss(model, windows),
        "numbers": sum(x.numel() for x in kept),
        "bytes": sum(x.numel() * x.element_size() for x in kept),
        "curve": [sum(part) / len(part) for part in (losses[i : i + 10] for i in range(0, len(losses), 10))],
    }


class LoRALinear(nn.Module):
    """The baseline of fine-tuning: W0 + s B A, without the norms."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float = 16) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale


def tuning(
    layer: Callable[..., nn.Module], steps: int, tuning_steps: int, variant: str, seed: int, lr: float | None = None
) -> dict[str, Any]:
    """Train on five modules, adapt to another by factors of rank 4; loss on its held-out text."""
    torch.manual_seed(seed)
    model = ByteModel()
    train(model, torch.optim.AdamW(model.parameters(), lr=RATES["AdamW"]), text(*LIBRARY[:5])[0], steps, seed)
    source, windows = text(_pydecimal)
    before = held_out_loss(model, windows)
    model.requires_grad_(False)
    kind = LoRALinear if variant == "LoRA" else layer
    swap(model, nn.Linear, lambda name, base: kind(base, rank=TUNING_RANK))
    trained = [p for p in model.parameters() if p.requires_grad]
    train(
        model, torch.optim.AdamW(trained, lr=lr or TUNING_RATES[variant], weight_decay=0.0), source, tuning_steps, seed
    )
    return {"nll": held_out_loss(model, windows), "before": before, "trained": sum(p.numel() for p in trained)}


def figure(evidence: Evidence) -> Figure:
    """Training loss over the steps, mean over seeds."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6, 3.5), layout="constrained")
    axes = drawing.subplots()
    styles = {"AdamW": "k-", "GaLore, 4": "C0--", "GradNormLoRP, 4": "C1--", "GaLore, 16": "C0-"}
    for variant, style in {**styles, "GradNormLoRP, 16": "C1-"}.items():
        curves = torch.tensor([row["curve"] for row in evidence.rows if row["variant"] == variant])
        if len(curves):
            axes.plot(torch.arange(curves.shape[1]) * 10 + 5, curves.mean(0), style, label=variant)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats per byte")
    axes.set_title("A small byte model trained from scratch, by rank", fontsize="medium")
    axes.legend()
    return drawing
