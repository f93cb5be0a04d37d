"""Multi-query associative recall: pairs first, then keys whose values are asked for."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import TensorDataset

from assay._checks import in_range

IGNORED = -100  # the label of positions that are not asked for, as torch's losses have it


def mqar(
    vocab_size: int,
    seq_len: int,
    num_kv_pairs: int,
    num_examples: int,
    power_a: float = 0.01,
    random_non_queries: bool = False,
    seed: int = 0,
) -> TensorDataset:
    """Sequences ``k1 v1 k2 v2 ...`` followed by every key once more, at which its value is to be said.

    Keys are drawn without repetition from the lower half of the vocabulary without 0, values from the upper half. The
    keys return at even distances behind the pairs, near ones more often, with probability ~ distance^(power_a - 1).

    Args:
        vocab_size: even, more than twice the number of pairs and of ``seq_len``'s distinct tokens.
        seq_len: even, at least 4 ``num_kv_pairs``.
        num_kv_pairs: >= 1.
        num_examples: >= 1.
        power_a: > 0.
        random_non_queries: random tokens at the other positions, in place of 0.
        seed: of all draws.

    Returns:
        (tokens, labels) of shape (num_examples, seq_len), labels -100 where nothing is asked.

    Raises:
        ValueError: an argument out of range.

    Source: S. Arora et al., Zoology: Measuring and Improving Recall in Efficient Language Models, 2023,
    arXiv 2312.04927.

    >>> from assay.data import mqar
    >>> tokens, labels = mqar(20, 12, 2, 1).tensors
    >>> tokens.shape, int((labels >= 0).sum())
    (torch.Size([1, 12]), 2)
    """
    in_range("num_kv_pairs", num_kv_pairs, num_kv_pairs >= 1, ">= 1")
    good = seq_len % 2 == 0 and seq_len >= 4 * num_kv_pairs
    in_range("seq_len", seq_len, good, f"even and >= 4 num_kv_pairs = {4 * num_kv_pairs}")
    good = vocab_size % 2 == 0 and vocab_size // 2 > num_kv_pairs
    in_range("vocab_size", vocab_size, good, f"even and > 2 num_kv_pairs = {2 * num_kv_pairs}")
    in_range("num_examples", num_examples, num_examples >= 1, ">= 1")
    in_range("power_a", power_a, power_a > 0, "> 0")
    draw, context = np.random.default_rng(seed), 2 * num_kv_pairs
    spaces = (seq_len - context) // 2
    weights = np.arange(1, spaces + 1) ** (power_a - 1.0)
    tokens = np.zeros((num_examples, seq_len), dtype=np.int64)
    labels = np.full((num_examples, seq_len), IGNORED, dtype=np.int64)
    half = vocab_size // 2
    for row, said in zip(tokens, labels, strict=True):
        keys = draw.choice(np.arange(1, half), num_kv_pairs, replace=False)
        values = draw.choice(np.arange(half, vocab_size), num_kv_pairs, replace=False)
        places = context + 2 * draw.choice(spaces, num_kv_pairs, replace=False, p=weights / weights.sum())
        row[:context:2], row[1:context:2] = keys, values
        row[places], said[places] = keys, values
    if random_non_queries:
        free = tokens == 0
        tokens[free] = draw.integers(vocab_size, size=int(free.sum()))
    return TensorDataset(torch.from_numpy(tokens), torch.from_numpy(labels))
