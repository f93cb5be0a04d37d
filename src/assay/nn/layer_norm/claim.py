"""An LSTM on digits pixel by pixel with and without layer normalization, networks on small batches, and gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from assay.bench.datasets import split_digits
from assay.bench.evidence import Bench, Evidence, Rows, at_least, at_most
from assay.nn.layer_norm.layer_norm import LayerNormLSTM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NORMED, PLAIN = "normalized", "plain"
RECURRENT, SMALL, GRADIENT = "recurrent", "small batches", "gradient"
RATES = {NORMED: 0.008, PLAIN: 0.016}  # tuned on seeds 0 and 1 among 0.004, 0.008, 0.016, 0.032
SMALL_RATES = {NORMED: 0.001, PLAIN: 0.002}  # tuned on seeds 0 and 1 among 0.0005 to 0.008
CAREFUL = 0.002  # a rate at which both are slow
EARLY, EPOCHS, GOAL, SIZE = 3, 6, 0.4, 48
Method = Callable[..., nn.Module]


def claim(
    bench: Bench,
    *,
    method: Method = LayerNormLSTM,
    parts: tuple[str, ...] = (RECURRENT, SMALL, GRADIENT),
    seeds: int = 4,
) -> Evidence:
    """Accuracy in the first epochs; the loss of a network on batches of 4; and gradients where weights are tripled."""
    run = functools.partial(measure, method=method, parts=parts, bench=bench)
    rows = bench.rows(run, [NORMED, PLAIN], bench.seeds(seeds))
    checks = []
    if RECURRENT in parts:
        gain = rows.difference(NORMED, PLAIN, "early")
        checks.append(at_least(f"mean accuracy of the first {EARLY} epochs over the plain LSTM's", gain, 0.05))
        epochs = rows.difference(NORMED, PLAIN, "epochs")
        checks.append(at_most(f"epochs to {GOAL:.0%}, normalized - plain", epochs, 0.0))
    if SMALL in parts:
        loss = rows.difference(NORMED, PLAIN, "loss")
        checks.append(at_most("batches of 4: training loss after 2 epochs, layer - batch normalization", loss, 0.0))
    if GRADIENT in parts:
        for arm, check in ((NORMED, at_most), (PLAIN, at_least)):
            name = f"gradient through 200 steps, powers of 10 by which tripled weights change it, {arm}"
            checks.append(check(name, rows.values(arm, "powers"), 1.0))
    return Evidence(rows, checks, notes(rows) if RECURRENT in parts else [])


def notes(rows: Rows) -> list[str]:
    ends = [f"{arm} {np.mean([row['curve'][-1] for row in rows if row['variant'] == arm]):.3f}" for arm in RATES]
    early = [f"{arm} {rows.values(arm, 'early, careful').mean():.3f}" for arm in RATES]
    return [
        f"accuracy after {EPOCHS} epochs: {', '.join(ends)}",
        f"mean accuracy of the first {EARLY} epochs with rate {CAREFUL} for both: {', '.join(early)}",
    ]


def measure(variant: str, seed: int, *, method: Method, parts: tuple[str, ...], bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if RECURRENT in parts:
        curve = recurrent(variant, RATES[variant], seed, bench.scale(EPOCHS), method)
        reached = next((epoch for epoch, share in enumerate(curve, start=1) if share >= GOAL), EPOCHS + 1)
        careful = recurrent(variant, CAREFUL, seed, bench.scale(EARLY), method)
        found |= {"curve": curve, "early": float(np.mean(curve[:EARLY])), "epochs": reached}
        found["early, careful"] = float(np.mean(careful))
    if SMALL in parts:
        found["loss"] = small_batches(variant, SMALL_RATES[variant], seed)
    if GRADIENT in parts:
        found["powers"] = tripled(variant, seed, method)
    return found


def lstm(arm: str, method: Method, size: int) -> nn.Module:
    """The same first weights for both arms; the plain one is the same layer without its norms."""
    off = {} if arm == NORMED else {"preact_norm": False, "cell_norm": False}
    return (method if arm == NORMED else LayerNormLSTM)(size, SIZE, batch_first=True, **off)


def recurrent(arm: str, rate: float, seed: int, epochs: int, method: Method = LayerNormLSTM) -> list[float]:
    """Test accuracy after each epoch on digits as 64 steps of one pixel."""
    (x, y), (unseen, labels) = split_digits(seed)
    torch.manual_seed(seed)
    layer, head = lstm(arm, method, 1), nn.Linear(SIZE, 10)
    parameters = [*layer.parameters(), *head.parameters()]
    optimizer, curve = torch.optim.Adam(parameters, lr=rate), []
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(len(y), generator=order).split(60):
            optimizer.zero_grad()
            F.cross_entropy(head(layer(x[chosen, :, None])[0][:, -1]), y[chosen]).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        with torch.no_grad():
            logits = head(layer(unseen[..., None])[0][:, -1])
        curve.append((logits.argmax(1) == labels).double().mean().item())
    return curve


def small_batches(arm: str, rate: float, seed: int) -> float:
    """Training loss, in evaluation, after two epochs of batches of 4: layer against batch normalization."""
    (x, y), _ = split_digits(seed)
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in ((64, 128), (128, 128)):
        layers += [nn.Linear(a, b), nn.LayerNorm(b) if arm == NORMED else nn.BatchNorm1d(b), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(2):
        for chosen in torch.randperm(len(y)).split(4):
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    with torch.no_grad():
        return F.cross_entropy(model.eval()(x), y).item()


def tripled(arm: str, seed: int, method: Method) -> float:
    """Powers of 10 between the gradients at the first of 200 inputs with weight matrices as they are and tripled."""
    norms = []
    for scale in (1.0, 3.0):
        torch.manual_seed(seed)
        layer = lstm(arm, method, 4).double()
        x = torch.randn(8, 200, 4, dtype=torch.float64, requires_grad=True)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if "weight_" in name:
                    parameter.mul_(scale)
        (grad,) = torch.autograd.grad(layer(x)[0][:, -1].sum(), x)
        norms.append(grad[:, 0].norm().item())
    return abs(math.log10(norms[1] / norms[0]))


def figure(evidence: Evidence) -> Figure:
    """Accuracy over epochs, mean and range over seeds."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6, 3.5), layout="constrained")
    axes = drawing.subplots()
    for arm, style in ((NORMED, "D-"), (PLAIN, "o--")):
        curves = 100 * np.array([row["curve"] for row in evidence.rows if row["variant"] == arm])
        epochs = range(1, curves.shape[1] + 1)
        axes.plot(epochs, curves.mean(0), style, label=arm)
        axes.fill_between(epochs, curves.min(0), curves.max(0), alpha=0.15, linewidth=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel("test accuracy, %")
    axes.set_title("LSTM on digits, one pixel a step", fontsize="medium")
    axes.legend()
    return drawing
