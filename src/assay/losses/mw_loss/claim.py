"""MW loss's claim on halves of digits: pooled AUC against InfoNCE's, and offsets that InfoNCE cannot see."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.datasets import digits
from assay.bench.evidence import Bench, Check, Evidence, Rows, at_least, at_most
from assay.bench.statistics import mean_interval
from assay.losses import contrastive_loss, mw_loss
from assay.metrics import global_auc, mean_reciprocal_rank, ndcg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Loss = Callable[..., Tensor]
TRAIN, VALIDATION, BATCH, NOISE = 1300, 300, 64, 0.5
CL, MW, RANKNET, OFFSETS = "InfoNCE", "MW", "within-query RankNet", "offsets"
VARIANTS = (CL, MW, RANKNET, OFFSETS)
TUNED = {CL: (0.2, 1e-3), MW: (0.2, 1e-3), RANKNET: (0.2, 1e-3)}  # temperature, learning rate


def within_query(scores: Tensor, target: Tensor | None = None, *, temperature: float = 0.01) -> Tensor:
    """The broken variant, RankNet: each positive against the negatives of its own row."""
    positives = scores.diagonal()[:, None]
    own = ~torch.eye(*scores.shape, dtype=torch.bool)
    return F.softplus((scores - positives) / temperature)[own].mean()


def train(
    variant: str, seed: int, *, steps: int, method: Loss = mw_loss, validate: bool = False, temperature=None, lr=None
) -> dict[str, float]:
    """Two MLPs 32-128-32 on 1,300 digits: the left half, with noise, looks for its right half among all others."""
    sides, test_sides = halves(seed, validate)
    loss = {CL: contrastive_loss, MW: method, RANKNET: within_query}[variant]
    tuned = TUNED[variant]
    temperature, lr = temperature or tuned[0], lr or tuned[1]
    torch.manual_seed(seed)
    encoders = nn.ModuleList(nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 32)) for _ in range(2))
    optimizer = torch.optim.Adam(encoders.parameters(), lr)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randperm(len(sides[0]), generator=draw)[:BATCH]
        scores = cosines(encoders, [side[index] for side in sides])
        optimizer.zero_grad()
        loss(scores, temperature=temperature).backward()
        optimizer.step()
    with torch.no_grad():
        return measures(cosines(encoders, test_sides))


def cosines(encoders, sides):
    query, document = (F.normalize(encoder(side), dim=1) for encoder, side in zip(encoders, sides, strict=True))
    return query @ document.T


def measures(scores: Tensor) -> dict[str, float]:
    right = torch.eye(len(scores), dtype=torch.bool)
    return {
        "auc": global_auc(scores, right),
        "hard": global_auc(scores, right, hard_k=50),
        "mrr": mean_reciprocal_rank(scores, right, 10),
        "ndcg": ndcg(scores, right, 10),
    }


@functools.lru_cache(maxsize=2)
def halves(seed: int, validate: bool) -> tuple[list[Tensor], list[Tensor]]:
    images, _ = digits()
    draw = torch.Generator().manual_seed(seed)
    images = images[torch.randperm(len(images), generator=draw)].view(-1, 8, 8)
    query, document = images[:, :, :4].flatten(1), images[:, :, 4:].flatten(1)
    level = NOISE * torch.rand(len(images), 1, generator=draw)
    query = query + level * torch.randn(query.shape, generator=draw)
    first, last = (TRAIN - VALIDATION, TRAIN) if validate else (TRAIN, len(images))
    return [query[:first], document[:first]], [query[first:last], document[first:last]]
