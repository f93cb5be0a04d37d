"""Speed and memory of losses and scores, as ratios in one run.

    python benchmarks/losses.py [--markdown FILE] [--pairs 7] [--only NAME ...] [--long]

One thread, processor time, interleaved pairs with the plain loss or pass that a user would have instead: the ratio of
the minima, and the median of the pairs' ratios. A loss is timed with its gradient. Transient memory is the most that
the allocator held beyond what was there before. ``--long`` adds what takes minutes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timing import command, conditions, in_turns, seconds, transient_bytes
from torch import Tensor
from torch.utils.data import TensorDataset

from assay.bench import models
from assay.data import el2n_scores
from assay.losses import (
    chunked_decoupled_softmax,
    contrastive_loss,
    decoupled_softmax,
    mw_loss,
    soft_topk_loss,
)


@dataclass
class Case:
    """A candidate and its reference, both calls without arguments; ``unit`` bytes are counted as one."""

    name: str
    reference: Callable[[], Any]
    candidate: Callable[[], Any]
    unit: int
    slow: bool = False


def with_gradient(loss: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], None]:
    """The loss of inputs and its gradient with respect to them."""

    def call() -> None:
        leaves = [x.detach().requires_grad_() for x in inputs]
        torch.autograd.grad(loss(*leaves), leaves)

    return call


def pooled(batch: int) -> Iterator[Case]:
    """MW loss on a batch of queries and passages against the contrastive loss on the same score matrix."""
    generator = torch.Generator().manual_seed(0)
    queries, passages = (F.normalize(torch.randn(batch, 256, generator=generator), dim=1) for _ in range(2))
    scores = queries @ passages.T + 0.3 * torch.eye(batch)
    base = with_gradient(functools.partial(contrastive_loss, temperature=0.05), scores)
    for pairs in ("binned", "exact"):
        loss = functools.partial(mw_loss, temperature=0.05, pairs=pairs)
        slow = pairs == "exact" and batch > 1024
        yield Case(f"mw_loss, {pairs}, B = {batch}", base, with_gradient(loss, scores), 4 * batch**2, slow)


def many_labels(batch: int = 256, labels: int = 100_000, width: int = 64) -> Iterator[Case]:
    """Decoupled softmax over 100,000 labels with five positives a row, against cross-entropy with one."""
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(batch, width, generator=generator), dim=1)
    embeddings = F.normalize(torch.randn(labels, width, generator=generator), dim=1)
    positives = torch.randint(labels, (batch, 5), generator=generator)
    target = (positives, torch.ones_like(positives, dtype=torch.float32))
    scores, unit = queries @ embeddings.T, 4 * batch * labels
    of_scores = with_gradient(lambda s: F.cross_entropy(s / 0.05, positives[:, 0]), scores)

    def decoupled(s: Tensor) -> Tensor:
        return decoupled_softmax(s, target, temperature=0.05)

    def topk(s: Tensor) -> Tensor:
        return soft_topk_loss(s, target, k=5, temperature=0.05)

    yield Case("decoupled_softmax, 100,000 labels", of_scores, with_gradient(decoupled, scores), unit)
    yield Case("soft_topk_loss, 100,000 labels", of_scores, with_gradient(topk, scores), unit)

    def plain(q: Tensor, e: Tensor) -> Tensor:
        return F.cross_entropy(q @ e.T / 0.05, positives[:, 0])

    def chunked(q: Tensor, e: Tensor) -> Tensor:
        return chunked_decoupled_softmax(q, e, target, temperature=0.05)

    base = with_gradient(plain, queries, embeddings)
    yield Case("chunked_decoupled_softmax, from embeddings", base, with_gradient(chunked, queries, embeddings), unit)


def scoring(count: int = 20_000) -> Iterator[Case]:
    """EL2N against a forward pass over the same data in the same batches."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(count, 1, 8, 8, generator=generator), torch.randint(10, (count,), generator=generator)
    )
    model = models.cnn(10).eval()

    @torch.no_grad()
    def forward() -> None:
        for x in data.tensors[0].split(256):
            model(x)

    yield Case("el2n_scores", forward, functools.partial(el2n_scores, model, data, batch_size=256), 4 * count)


def cases() -> Iterator[Case]:
    for batch in (512, 1024, 4096):
        yield from pooled(batch)
    yield from many_labels()
    yield from scoring()


REFERENCES = """\
Reference of `mw_loss`: `contrastive_loss` on the same (B, B) scores; of the losses over labels: `F.cross_entropy` of
256 rows with one positive each, on the same scores or embeddings; of `el2n_scores`: the model's forward pass over the
20,000 examples. Memory is in units of the score matrix (for EL2N: of the scores)."""


def table(pairs: int, only: list[str], long: bool) -> str:
    torch.set_num_threads(1)
    lines = [conditions(pairs), "", REFERENCES, "", "| what | min | median | memory | memory of the reference |"]
    lines.append("|---|---|---|---|---|")
    for case in cases():
        if (only and not any(word in case.name for word in only)) or (case.slow and not long):
            continue
        memory = [transient_bytes(call) / case.unit for call in (case.candidate, case.reference)]
        seconds(case.reference)
        found = in_turns(case.reference, case.candidate, 1 if case.slow else pairs)
        lines.append(f"| {case.name} | {found.minimum:.2f} | {found.median:.2f} | {memory[0]:.2f} | {memory[1]:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    command(__doc__, table, "long", "also what takes minutes, measured once", pairs=7)
