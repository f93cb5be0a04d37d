"""A small language model with layer, batch and power normalization: bits on unseen text, steadiness of statistics."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from assay.bench.evidence import Bench, Evidence, Rows, at_least, at_most
from assay.bench.models import TokenBatchNorm
from assay.bench.tasks import Task, bits_per_byte, byte_loss, text
from assay.nn._convert import convert_layernorm_
from assay.nn.power_norm.power_norm import PowerNorm, PowerNormV

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYER, BATCH, BATCH_V, POWER = "LayerNorm", "BatchNorm", "PN-V", "PowerNorm"
# Tuned on seed 0 among 0.001 to 0.032 by factors of 2.
RATES = {LAYER: 0.016, BATCH: 0.032, BATCH_V: 0.016, POWER: 0.032}
STEPS, WARMUP, WATCHED, UNSEEN = 500, 100, 50, 256
Method = Callable[[int], nn.Module]


def power(num_features: int) -> nn.Module:
    return PowerNorm(num_features, warmup_steps=WARMUP, groups=4)


def claim(
    bench: Bench, *, method: Method = power, arms: tuple[str, ...] = (LAYER, BATCH, BATCH_V, POWER), seeds: int = 3
) -> Evidence:
    """Bits a byte of text not trained on, in evaluation; the arms differ in the normalization alone."""
    run = functools.partial(measure, method=method, steps=bench.scale(STEPS, 2 * WATCHED))
    rows = bench.rows(run, arms, bench.seeds(seeds))
    checks = []
    if BATCH in arms:
        gain = rows.difference(POWER, BATCH, "bits")
        checks.append(at_most("bits a byte, PowerNorm - BatchNorm", gain, -0.02))
        ratio = rows.ratio(BATCH, POWER, "unsteadiness")
        checks.append(at_least("variance of the statistic over batches, BatchNorm / PowerNorm", ratio, 3.0))
    if LAYER in arms:
        checks.append(at_most("bits a byte, PowerNorm - LayerNorm", rows.difference(POWER, LAYER, "bits"), 0.05))
    gap = rows.values(POWER, "bits, batch statistics") - rows.values(POWER, "bits")
    checks.append(at_most("bits a byte between training and evaluation mode, PowerNorm", np.abs(gap), 0.1))
    return Evidence(rows, checks, notes(rows, arms))


def notes(rows: Rows, arms: tuple[str, ...]) -> list[str]:
    return [f"{arm}: {rows.values(arm, 'bits').mean():.3f} bits a byte, lr {RATES[arm]:g}" for arm in arms]


def factory(arm: str, method: Method) -> Method:
    return {BATCH: TokenBatchNorm, BATCH_V: functools.partial(PowerNormV, groups=4), POWER: method}[arm]


@functools.cache
def task() -> Task:
    return text()


def measure(variant: str, seed: int, *, method: Method, steps: int) -> dict[str, Any]:
    return train(variant, seed, RATES[variant], steps, method)


def train(arm: str, seed: int, rate: float, steps: int, method: Method = power) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = task().model()
    if arm != LAYER:
        convert_layernorm_(model, factory(arm, method))
    tokens, targets = task().train.tensors
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    seen: list[Tensor] = []
    for step in range(steps):
        if step == steps - WATCHED and arm != LAYER:
            watch(model, seen)
        chosen = torch.randint(len(tokens), (16,))
        optimizer.zero_grad()
        byte_loss(model(tokens[chosen]), targets[chosen]).backward()
        optimizer.step()
        schedule.step()
    found: dict[str, Any] = {}
    if seen:
        values = torch.stack(seen).view(WATCHED, -1, seen[0].numel())  # steps, layers, channels
        found["unsteadiness"] = (values.var(0) / values.mean(0).square()).mean().item()
    x, y = (t[:UNSEEN] for t in task().test.tensors)
    with torch.no_grad():
        found["bits"] = bits_per_byte(model.eval()(x), y).item()
        parts = [bits_per_byte(model.train()(x[i : i + 16]), y[i : i + 16]).item() for i in range(0, UNSEEN, 16)]
    return found | {"bits, batch statistics": float(np.mean(parts))}


def watch(model: nn.Module, seen: list[Tensor]) -> None:
    """Note at each forward pass what every normalization divides by, squared."""

    def note(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        rows = inputs[0].detach().flatten(0, -2)
        if isinstance(norm, PowerNorm):
            seen.append(norm.psi2.clone())
        else:
            seen.append(rows.var(0) if isinstance(norm, TokenBatchNorm) else rows.square().mean(0))

    for norm in model.modules():
        if isinstance(norm, (PowerNorm, PowerNormV, TokenBatchNorm)):
            norm.register_forward_pre_hook(note)


def figure(evidence: Evidence) -> Figure:
    """Held-out bits a byte of every arm, over seeds."""
    from matplotlib.figure import Figure

    from assay.bench.figures import by_variant

    drawing = Figure(figsize=(6, 3.5), layout="constrained")
    axes = drawing.subplots()
    by_variant(axes, evidence.rows, list(RATES), "bits")
    axes.set_ylabel("bits a byte of text not trained on")
    axes.set_title(f"Two-layer transformer after {STEPS} steps", fontsize="medium")
    return drawing
