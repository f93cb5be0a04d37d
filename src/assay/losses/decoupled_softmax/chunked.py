"""Losses from embeddings, a chunk of labels at a time, and label embeddings whose activations are not kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from assay.losses.decoupled_softmax.positives import Positives, Target, as_lists, scattered
from assay.losses.decoupled_softmax.soft_topk import Chunks, bisected, log_slopes
from assay.losses.decoupled_softmax.terms import (
    check_options,
    check_temperature,
    check_topk,
    decoupled_terms,
    places_and_positives,
    reduced,
    topk_terms,
)


def chunked_decoupled_softmax(
    queries: Tensor,
    labels: Tensor,
    target: Target,
    *,
    temperature: float | Tensor = 1.0,
    chunk_size: int = 8192,
    num_sampled_positives: int | None = None,
    normalize: str = "mean",
    weights: Tensor | None = None,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
) -> Tensor:
    """:func:`decoupled_softmax` of the scores ``queries @ labels.T``, without ever holding more than a chunk of them.

    Forward passes once over the labels and keeps the log-sums (N,) and the positives' scores; backward computes each
    chunk of scores again. Value and gradients are those of the plain loss, up to rounding.

    Args:
        queries: (N, d), floating point; normalize both for cosine scores. Computed in float32 at least, also under
            autocast.
        labels: (C, d).
        target, temperature, num_sampled_positives, normalize, weights, generator, reduction: as in
            :func:`decoupled_softmax`. A dense target is turned into lists, for which a GPU waits.
        chunk_size: labels at a time, at least 1.

    Raises:
        ValueError: as in :func:`decoupled_softmax`.

    Source:
        Gupta et al.: Dual-encoders for Extreme Multi-label Classification, ICLR 2024, arXiv 2310.10636.

    Example:
        >>> import torch
        >>> from assay.losses import chunked_decoupled_softmax, decoupled_softmax
        >>> queries, labels = torch.eye(2, 3), torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.6, 0.8, 0.0]])
        >>> target = torch.tensor([[1, 0], [1, 2]]), torch.tensor([[0, 1], [1, 1]])
        >>> chunked_decoupled_softmax(queries, labels, target, temperature=0.5, chunk_size=2)
        tensor(0.3079)
        >>> decoupled_softmax(queries @ labels.T, target, temperature=0.5)
        tensor(0.3079)
    """
    check_options(reduction, normalize, num_sampled_positives)
    q, positives, weights = _prepared(queries, labels, target, temperature, chunk_size, weights)
    chosen = positives.marked
    if num_sampled_positives is not None:
        chosen = positives.draw(num_sampled_positives, generator)
    rest, s = _Chunked.apply(q, labels, positives.places, positives.marked, _LogSumExp(), chunk_size)
    terms = decoupled_terms(s, rest, chosen)
    return reduced(positives.total(terms, chosen, weights, normalize), reduction, queries.dtype)


def chunked_soft_topk_loss(
    queries: Tensor,
    labels: Tensor,
    target: Target,
    *,
    k: int | Tensor | str = 5,
    alpha: float = 2.0,
    n_iter: int = 32,
    temperature: float | Tensor = 1.0,
    chunk_size: int = 8192,
    sample_positives: bool = True,
    normalize: str = "mean",
    weights: Tensor | None = None,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
) -> Tensor:
    """:func:`soft_topk_loss` of the scores ``queries @ labels.T``, without ever holding more than a chunk of them.

    Each halving in search of the threshold is a pass over the labels: n_iter + 2 products of the embeddings forward
    and 2 backward, which a matrix of scores would have cost once.

    Args:
        queries, labels, target, weights, chunk_size: as in :func:`chunked_decoupled_softmax`.
        k, alpha, n_iter, temperature, sample_positives, normalize, generator, reduction: as in
            :func:`soft_topk_loss`.

    Raises:
        ValueError: as in :func:`soft_topk_loss`.

    Source:
        Gupta et al., arXiv 2310.10636.

    Example:
        >>> import torch
        >>> from assay.losses import chunked_soft_topk_loss
        >>> queries, labels = torch.eye(2, 3), torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.6, 0.8, 0.0]])
        >>> target = torch.tensor([[1, 0], [1, 2]]), torch.tensor([[0, 1], [1, 1]])
        >>> chunked_soft_topk_loss(queries, labels, target, k=2, temperature=0.5, chunk_size=2)
        tensor(0.0799)
    """
    check_options(reduction, normalize)
    check_topk(k, alpha, n_iter, len(queries), len(labels))
    q, positives, weights = _prepared(queries, labels, target, temperature, chunk_size, weights)
    number, chosen = places_and_positives(k, positives, sample_positives, generator)
    out = positives.marked & ~chosen
    t, s = _Chunked.apply(q, labels, positives.places, out, _Threshold(number, alpha, n_iter), chunk_size)
    terms = topk_terms(s, t, alpha, chosen)
    return reduced(positives.total(terms, chosen, weights, normalize), reduction, queries.dtype)


def encode_in_chunks(encoder: Callable[..., Tensor], inputs: Any, *, chunk_size: int = 1024) -> Tensor:
    """Embeddings of all labels, with the activations of no more than one chunk in memory (gradient caching).

    Forward encodes chunk by chunk and keeps nothing but the embeddings. When the loss's gradient on them arrives,
    backward encodes each chunk again from the same random state and back-propagates its rows. The encoder's gradients
    are exactly those of ``torch.cat([encoder(chunk) for chunk in chunks])``, dropout included, for the price of one
    more forward pass.

    Args:
        encoder: maps inputs of n labels to their embeddings (n, d), each label by itself.
        inputs: what it is called with: a tensor (C, ...), a tuple of such (unpacked), or a mapping of such (as
            keywords, in the manner of a tokenizer's output).
        chunk_size: labels at a time, at least 1.

    Returns:
        (C, d).

    Raises:
        ValueError: no inputs, inputs of unequal lengths, chunk_size out of range.

    Source:
        Gao et al.: Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021, arXiv 2101.06983, as
        used by Gupta et al., arXiv 2310.10636.

    Example:
        >>> import torch
        >>> from assay.losses import encode_in_chunks
        >>> encoder = torch.nn.Sequential(torch.nn.EmbeddingBag(50, 8), torch.nn.Tanh())
        >>> encode_in_chunks(encoder, torch.randint(50, (1000, 6)), chunk_size=256).shape
        torch.Size([1000, 8])
    """
    _check_chunk_size(chunk_size)
    tensors = [inputs] if isinstance(inputs, Tensor) else [*(inputs.values() if _named(inputs) else inputs)]
    lengths = {len(tensor) for tensor in tensors}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"inputs of lengths {sorted(lengths)} are out of range: tensors of C >= 1 labels each")
    parts = []
    for start in range(0, lengths.pop(), chunk_size):
        cut = [tensor[start : start + chunk_size] for tensor in tensors]
        arguments, named = ([], dict(zip(inputs, cut, strict=True))) if _named(inputs) else (cut, {})
        parts.append(checkpoint(encoder, *arguments, use_reentrant=False, preserve_rng_state=True, **named))
    return torch.cat(parts)


def _named(inputs: Any) -> bool:
    return isinstance(inputs, Mapping)


def _check_chunk_size(chunk_size: int) -> None:
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size!r} is out of range: an integer >= 1")


def _prepared(
    queries: Tensor,
    labels: Tensor,
    target: Target,
    temperature: float | Tensor,
    chunk_size: int,
    weights: Tensor | None,
) -> tuple[Tensor, Positives, Tensor | None]:
    """Queries over temperature, in single precision at least; positives and their weights as lists."""
    _check_chunk_size(chunk_size)
    if queries.dim() != 2 or labels.dim() != 2 or queries.shape[1] != labels.shape[1]:
        shapes = f"{tuple(labels.shape)} with queries of shape {tuple(queries.shape)}"
        raise ValueError(f"labels.shape = {shapes} is out of range: (C, d) and (N, d)")
    check_temperature(temperature)
    size = len(queries), len(labels)
    if isinstance(target, Tensor):
        for name, matrix in (("target", target), ("weights", weights)):
            if matrix is not None and matrix.shape != size:
                raise ValueError(f"{name}.shape = {tuple(matrix.shape)} is out of range: {size}")
        target = as_lists(target)
        weights = None if weights is None else weights.gather(1, target[0])
    q = queries.to(torch.promote_types(queries.dtype, torch.float32)) / temperature
    return q, Positives.read(target, size), weights


class _Statistic(Protocol):
    """One number a query that all its scores enter."""

    def value(self, chunks: Chunks) -> Tensor:
        """(N, 1)."""
        ...

    def slopes(self, x: Tensor, value: Tensor) -> Tensor:
        """The derivative of the value with respect to the scores of a chunk (N, c); called after :meth:`value`."""
        ...


class _LogSumExp:
    def value(self, chunks: Chunks) -> Tensor:
        total: Tensor | None = None
        for x in chunks():
            part = x.logsumexp(1, keepdim=True)
            total = part if total is None else torch.logaddexp(total, part)
        assert total is not None
        return total

    def slopes(self, x: Tensor, value: Tensor) -> Tensor:
        # The log-sum of nothing, -inf, has slope 0.
        return torch.exp(x - value.clamp(min=torch.finfo(value.dtype).min))


class _Threshold:
    def __init__(self, k: int | Tensor, alpha: float, n_iter: int) -> None:
        self.k, self.alpha, self.n_iter = k, alpha, n_iter

    def value(self, chunks: Chunks) -> Tensor:
        t = bisected(chunks, self.k, self.alpha, self.n_iter)
        self.log_sum = _LogSumExp().value(lambda: (self._log_v(x, t) for x in chunks()))
        return t

    def slopes(self, x: Tensor, value: Tensor) -> Tensor:
        return -torch.exp(self._log_v(x, value) - self.log_sum)

    def _log_v(self, x: Tensor, t: Tensor) -> Tensor:
        return log_slopes(self.alpha * (x + t))


class _Chunked(torch.autograd.Function):
    """A statistic of the scores q @ labels.T without the ``left_out`` entries, and the scores at all entries."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, labels: Tensor, places: Tensor, left_out: Tensor, statistic: _Statistic, size: int
    ) -> tuple[Tensor, Tensor]:
        ctx.statistic, ctx.size = statistic, size
        at_entries = q.new_zeros(places.shape)

        def chunks() -> Iterator[Tensor]:
            for start, _, x in _scores(q, labels, size):
                there = _inside(places, start, x)
                # Every pass finds them; a pass for them alone would be another product.
                at_entries.copy_(torch.where(there, x.gather(1, (places - start).where(there, 0)), at_entries))
                yield _without(left_out, places, start, x)

        with torch.autocast(q.device.type, enabled=False):
            value = statistic.value(chunks)
        ctx.save_for_backward(q, labels, places, left_out, value)
        return value, at_entries

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, labels, places, left_out, value = ctx.saved_tensors
        of_value, of_entries = gradients
        of_queries, of_labels = torch.zeros_like(q), torch.empty_like(labels)
        with torch.autocast(q.device.type, enabled=False):
            for start, rows, x in _scores(q, labels, ctx.size):
                slopes = ctx.statistic.slopes(_without(left_out, places, start, x), value)
                here = of_entries.masked_fill(~_inside(places, start, x), 0.0)
                of_scores = of_value * slopes + scattered(here, places - start, x.shape[1])
                of_queries += of_scores @ rows
                of_labels[start : start + len(rows)] = of_scores.T @ q
        return of_queries, of_labels, None, None, None, None


def _scores(q: Tensor, labels: Tensor, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """First label, embeddings and scores (N, c) of each chunk."""
    for start in range(0, len(labels), size):
        rows = labels[start : start + size].to(q.dtype)
        yield start, rows, q @ rows.T


def _inside(places: Tensor, start: int, x: Tensor) -> Tensor:
    return (places >= start) & (places < start + x.shape[1])


def _without(left_out: Tensor, places: Tensor, start: int, x: Tensor) -> Tensor:
    out = scattered(left_out & _inside(places, start, x), places - start, x.shape[1])
    return x.masked_fill(out, -math.inf)
