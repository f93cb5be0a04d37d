"""Norm-aware linear attention, plain linear attentions and softmax: entropy over query norms, retrieval, digits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.datasets import split_digits
from assay.bench.evidence import Bench, Evidence, Rows, at_least, at_most
from assay.nn.nalaformer.feature_maps import (
    attention_entropy,
    key_feature_map,
    norm_aware_feature_map,
    norm_aware_linear_attention,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NALA, RELU, ELU, SOFTMAX = "norm-aware", "ReLU", "elu + 1", "softmax"
SCALES = (0.25, 0.5, 1.0, 2.0)
ENTROPY, RETRIEVAL, DIGITS = "entropy", "retrieval", "digits"
# Learning rates of AdamW, tuned on seeds 0 and 1 among 0.001, 0.003, 0.01, 0.03 and, for retrieval, 0.1.
RATES = {RETRIEVAL: {NALA: 0.1, RELU: 0.1, ELU: 0.03, SOFTMAX: 0.1}, DIGITS: {NALA: 0.03, RELU: 0.03}}
Maps = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
OURS: Maps = (norm_aware_feature_map, key_feature_map)


def claim(
    bench: Bench, *, method: Maps = OURS, parts: tuple[str, ...] = (ENTROPY, RETRIEVAL, DIGITS), seeds: int = 6
) -> Evidence:
    """What a query's norm does to its row, and what that is worth where a row must be spiky and where it need not."""
    run = functools.partial(measure, method=method, parts=parts, bench=bench)
    rows = bench.rows(run, [NALA, RELU, ELU, SOFTMAX], bench.seeds(seeds))
    checks = []
    if ENTROPY in parts:
        checks += [
            at_least("nats of entropy lost from scale 1/4 to 2, norm-aware", rows.values(NALA, "drop"), 0.2),
            at_least("share of queries whose entropy falls at each step, norm-aware", rows.values(NALA, "falls"), 1.0),
            at_most("nats of entropy lost, ReLU", rows.values(RELU, "drop"), 1e-6),
            at_most("nats of entropy lost, elu + 1", rows.values(ELU, "drop"), 0.02),
        ]
    if RETRIEVAL in parts:
        for other, least in ((RELU, 0.05), (ELU, 0.03)):
            gain = rows.difference(NALA, other, RETRIEVAL)
            checks.append(at_least(f"retrieval: accuracy over that of {other}", gain, least))
    if DIGITS in parts:
        gain = rows.difference(NALA, RELU, DIGITS)
        checks.append(at_least("digits: accuracy over that of ReLU", gain, -0.005))
    return Evidence(rows, checks, notes(rows) if RETRIEVAL in parts else [])


def notes(rows: Rows) -> list[str]:
    means = [f"{arm} {rows.values(arm, RETRIEVAL).mean():.3f}" for arm in RATES[RETRIEVAL]]
    return [f"retrieval, accuracy: {', '.join(means)}"]


def measure(variant: str, seed: int, *, method: Maps, parts: tuple[str, ...], bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if ENTROPY in parts:
        found |= entropies(variant, seed, method)
    if RETRIEVAL in parts:
        found[RETRIEVAL] = retrieval(variant, RATES[RETRIEVAL][variant], seed, bench, method)
    if DIGITS in parts and variant in RATES[DIGITS]:
        found[DIGITS] = on_digits(variant, RATES[DIGITS][variant], seed, bench, method)
    return found


def maps_of(variant: str, method: Maps) -> Maps:
    return {NALA: method, RELU: (F.relu, F.relu), ELU: (positive, positive)}[variant]


def positive(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def attend(variant: str, q: Tensor, k: Tensor, v: Tensor, method: Maps) -> Tensor:
    """Attention of q, k, v of shape (B, H, N, D); small N, so the linear ones too are written out."""
    if variant == SOFTMAX:
        return F.scaled_dot_product_attention(q, k, v)
    if variant == NALA and method is OURS:
        return norm_aware_linear_attention(q, k, v)
    of_query, of_key = maps_of(variant, method)
    weights = of_query(q) @ of_key(k).mT
    return weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)


def entropies(variant: str, seed: int, method: Maps) -> dict[str, Any]:
    """Mean entropy of 400 queries' rows over 64 keys at each scale of the queries, in float64."""
    draw = torch.Generator().manual_seed(seed)
    q = F.normalize(torch.randn(400, 16, generator=draw, dtype=torch.float64), dim=-1)
    k = torch.randn(64, 16, generator=draw, dtype=torch.float64)
    each = []
    for scale in SCALES:
        if variant == SOFTMAX:
            weights = (scale * q @ k.T / 4).softmax(-1)
        else:
            of_query, of_key = maps_of(variant, method)
            weights = of_query(scale * q) @ of_key(k).T
        each.append(attention_entropy(weights))
    rows = torch.stack(each)
    mean = rows.mean(1)
    falls = (rows.diff(dim=0) < 0).all(0).double().mean().item()
    return {"entropies": mean.tolist(), "drop": (mean[0] - mean[-1]).item(), "falls": falls}


def retrieval(variant: str, rate: float, seed: int, bench: Bench, method: Maps = OURS) -> float:
    """64 pairs of a random unit key and one of 16 classes; the class of the key that is asked for, with noise on it."""
    torch.manual_seed(seed)
    width, classes = 16, 16
    parts = nn.ModuleDict({name: nn.Linear(width, width) for name in "qkvo"})
    optimizer = torch.optim.AdamW(parts.parameters(), lr=rate)
    draw = torch.Generator().manual_seed(seed)

    def batch(size: int) -> tuple[Tensor, Tensor]:
        keys = F.normalize(torch.randn(size, 64, width, generator=draw), dim=-1)
        values = torch.randint(classes, (size, 64), generator=draw)
        asked = torch.randint(64, (size, 16), generator=draw)
        queries = keys.gather(1, asked[..., None].expand(-1, -1, width))
        queries = queries + 0.1 * torch.randn(queries.shape, generator=draw)
        q, k, v = parts["q"](queries), parts["k"](keys), parts["v"](F.one_hot(values, classes).float())
        found = attend(variant, *(t.unsqueeze(1) for t in (q, k, v)), method).squeeze(1)
        return parts["o"](found).flatten(0, 1), values.gather(1, asked).flatten()

    steps = bench.scale(400)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(*batch(32)).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        logits, target = batch(256)
    return (logits.argmax(-1) == target).double().mean().item()


class Pixels(nn.Module):
    """Digits with every pixel a token: two blocks of attention and an MLP, then the mean."""

    def __init__(self, variant: str, method: Maps, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.variant, self.method, self.heads = variant, method, heads
        self.embed, self.position = nn.Linear(1, width), nn.Parameter(0.5 * torch.randn(64, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(2)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x[..., None]) + self.position
        for i in range(2):
            qkv = self.qkv[i](self.norms[2 * i](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            x = x + self.out[i](attend(self.variant, *qkv, self.method).transpose(1, 2).flatten(-2))
            x = x + self.mlps[i](self.norms[2 * i + 1](x))
        return self.head(x.mean(1))


def on_digits(variant: str, rate: float, seed: int, bench: Bench, method: Maps = OURS) -> float:
    (x, y), (unseen, labels) = split_digits(seed)
    torch.manual_seed(seed)
    model = Pixels(variant, method)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    epochs = bench.scale(10)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * -(-len(y) // 64), pct_start=0.1)
    for _ in range(epochs):
        for chosen in torch.randperm(len(y)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return (model(unseen).argmax(1) == labels).double().mean().item()


def figure(evidence: Evidence) -> Figure:
    """Entropy of the rows over the queries' norm, and accuracies."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 3.5), layout="constrained")
    left, right = drawing.subplots(1, 2)
    rows = evidence.rows
    for place, (arm, style) in enumerate(((NALA, "D-"), (RELU, "o--"), (ELU, "s--"), (SOFTMAX, "^:"))):
        means = np.mean([row["entropies"] for row in rows if row["variant"] == arm], axis=0)
        left.plot(SCALES, means, style, label=arm)
        for part, mark in ((RETRIEVAL, "D"), (DIGITS, "o")):
            if arm not in RATES[part]:
                continue
            values = 100 * rows.values(arm, part)
            spread = [[values.mean() - values.min()], [values.max() - values.mean()]]
            label = part if place == 0 else None
            right.errorbar([place], [values.mean()], spread, fmt=mark, color=f"C{'Do'.index(mark)}", label=label)
    left.set_xscale("log", base=2)
    left.set_xlabel("norm of the query")
    left.set_ylabel("entropy of its row, nats")
    right.set_xticks(range(4), [NALA, RELU, ELU, SOFTMAX])
    right.set_ylabel("test accuracy, %")
    for axes in (left, right):
        axes.legend()
    return drawing
