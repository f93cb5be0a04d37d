"""Choosing k of E experts, keeping them evenly used, and sending each input to its own: what sparse layers share."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from assay._checks import in_range

_BLOCK = 64  # rows of one expert that a traced graph multiplies at a time


class Routing(NamedTuple):
    """Which experts an input goes to: ``weights`` and ``experts`` (N, k), ``gates`` and ``load`` (N, E)."""

    weights: Tensor
    experts: Tensor
    gates: Tensor
    load: Tensor


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """No autocast on the device of ``x``: in half precision, rounding would choose the experts."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def top_k_softmax(logits: Tensor, k: int, by: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax over the k entries of the last axis that are largest in ``by`` (``logits``), and which these are."""
    experts = (logits if by is None else by).topk(k, dim=-1).indices
    return logits.gather(-1, experts).softmax(-1), experts


def spread(weights: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """The weights of the chosen experts in a row of all experts, zero elsewhere."""
    return weights.new_zeros(*weights.shape[:-1], num_experts).scatter(-1, experts, weights)


def noisy_routing(clean: Tensor, std: Tensor | None, k: int, by: Tensor | None = None) -> Routing:
    """Top k of logits ``clean``, (N, E), with noise of deviation ``std`` on them if there is one; the load is per row.

    ``by`` has the numbers to choose by where they are not the logits.
    """
    logits = clean if std is None else clean + torch.randn_like(clean) * std
    weights, experts = top_k_softmax(logits, k, by)
    gates = spread(weights, experts, clean.shape[1])
    if std is None or k == clean.shape[1]:
        return Routing(weights, experts, gates, (gates > 0).to(gates.dtype))
    # An expert stays in the top k under fresh noise if it beats the k-th of the others: the (k+1)-th if it is in now.
    kth, next_one = logits.topk(k + 1, dim=-1).values[..., -2:].split(1, dim=-1)
    threshold = torch.where(logits > next_one, next_one, kth)
    load = 0.5 + 0.5 * torch.erf((clean - threshold) / (std * math.sqrt(2)))
    return Routing(weights, experts, gates, load)


def noisy_top_k_gating(
    x: Tensor,
    w_gate: Tensor,
    w_noise: Tensor,
    k: int,
    *,
    training: bool,
    noise_epsilon: float = 1e-2,
) -> tuple[Tensor, Tensor]:
    """Gates that are a softmax over the k largest of E logits, noisy in training, and the load of each expert.

    ::

        logits = x w_gate + training * z * (softplus(x w_noise) + noise_epsilon)        z ~ N(0, 1)
        gates  = softmax over the k largest logits of a row, 0 for the others
        load_e = sum over rows of P(e is among the k largest under fresh noise)         in training, where k < E
               = number of rows with gate e > 0                                         else

    Args:
        x: shape (N, d).
        w_gate, w_noise: shape (d, E).
        k: in [1, E].
        training: add the noise.
        noise_epsilon: smallest deviation of the noise, >= 0.

    Returns:
        gates (N, E) and load (E,).

    Raises:
        ValueError: an argument out of range.

    Source: N. Shazeer et al., Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer, 2017,
    arXiv 1701.06538.

    >>> import torch
    >>> from assay.nn import noisy_top_k_gating
    >>> w_gate = torch.tensor([[0.0, 1.0, 1.0, -1.0]])
    >>> noisy_top_k_gating(torch.ones(1, 1), w_gate, torch.zeros(1, 4), k=2, training=False)
    (tensor([[0.0000, 0.5000, 0.5000, 0.0000]]), tensor([0., 1., 1., 0.]))
    """
    check_k(k, w_gate.shape[1])
    in_range("noise_epsilon", noise_epsilon, noise_epsilon >= 0, ">= 0")
    std = F.softplus(x @ w_noise) + noise_epsilon if training else None
    routing = noisy_routing(x @ w_gate, std, k)
    return routing.gates, routing.load.sum(0)


def check_k(k: int, num_experts: int) -> None:
    in_range("k", k, isinstance(k, int) and 1 <= k <= num_experts, f"an integer in [1, {num_experts}]")


def load_balance(gates: Tensor, load: Tensor, eps: float = 1e-10) -> Tensor:
    """How unevenly experts are used: the squared coefficients of variation of importance and load, added.

    ::

        loss = cv2(sum over rows of gates) + cv2(load)          cv2(v) = var(v) / (mean(v)^2 + eps), var unbiased

    0 if all experts are used alike, or if there is one. Add it to the loss with a small coefficient (0.01).

    Args:
        gates: shape (N, E).
        load: shape (E,), as :func:`assay.nn.noisy_top_k_gating` returns it.
        eps: >= 0.

    Raises:
        ValueError: ``eps`` out of range.

    Source: N. Shazeer et al., Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer, 2017,
    arXiv 1701.06538.

    >>> import torch
    >>> from assay.losses import load_balance
    >>> load_balance(torch.tensor([[0.5, 0.5], [0.5, 0.5]]), torch.tensor([3.0, 1.0]))
    tensor(0.5000)
    """
    in_range("eps", eps, eps >= 0, ">= 0")
    if gates.shape[-1] == 1:
        return gates.new_zeros(())
    dtype = torch.promote_types(gates.dtype, torch.float32)
    both = torch.stack([gates.sum(0, dtype=dtype), load.to(dtype)])
    return (both.var(1) / (both.mean(1).square() + eps)).sum()


def dispatch(x: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing) -> Tensor:
    """sum over a row's experts e of weights_e * (weight_e x + bias_e): x (N, in), weight (E, out, in), bias (E, out).

    Rows are sorted by expert, so that each expert multiplies its own in one go.
    """
    weights, experts = routing.weights, routing.experts
    k, order = experts.shape[1], experts.flatten().argsort(stable=True)
    counts = F.one_hot(experts, len(weight)).sum((0, 1))
    product = _blocks if torch.compiler.is_compiling() or x.is_meta else _pieces
    y = product(_rows(x, order // k), weight, bias, counts)
    y = _rows(y, order.argsort()).view(x.shape[0], k, weight.shape[1])
    return (weights.to(y.dtype).unsqueeze(2) * y).sum(1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    # As index_select, whose backward pass adds row by row on the CPU, many times slower.
    return x.gather(0, index.unsqueeze(1).expand(-1, x.shape[1]))


def _pieces(rows: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    biases = [None] * len(weight) if bias is None else bias.unbind()
    pieces = rows.split(counts.tolist())
    return torch.cat([F.linear(*each) for each in zip(pieces, weight.unbind(), biases, strict=True)])


def _blocks(rows: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    """The same with shapes that do not depend on the counts: each expert's rows are filled up to whole blocks."""
    blocks = -(-counts // _BLOCK)
    ends, block_ends = counts.cumsum(0), blocks.cumsum(0)
    number = rows.shape[0] // _BLOCK + len(weight)  # no counts need more
    row = torch.arange(rows.shape[0], device=rows.device)
    expert = torch.searchsorted(ends, row, right=True)
    row = row - (ends - counts)[expert]  # within its expert
    place = ((block_ends - blocks)[expert] + row // _BLOCK, row % _BLOCK)
    filled = rows.new_zeros(number, _BLOCK, rows.shape[1]).index_put(place, rows)
    owner = torch.searchsorted(block_ends, torch.arange(number, device=rows.device), right=True)
    owner = owner.clamp(max=len(weight) - 1)  # blocks that no expert needed
    y = torch.bmm(filled, weight.index_select(0, owner).transpose(1, 2))
    if bias is not None:
        y = y + bias.index_select(0, owner).unsqueeze(1).to(y.dtype)
    return y[place]
