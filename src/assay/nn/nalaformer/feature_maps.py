"""Feature maps and sums of norm-aware linear attention: no token sees the N x N matrix of weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from assay._checks import in_range

State = tuple[Tensor, Tensor]
_CHUNK = 64  # tokens whose weights for each other are written out in the causal form


def norm_aware_feature_map(q: Tensor, lam: float = 3.0, tau: float = 0.5) -> Tensor:
    """Queries as non-negative features whose sharpness grows with the query's norm.

    ::

        d   = q / ||q||,   p = lam (tau + tanh ||q||)                    norms over the last dimension
        phi = [relu(d)^p, relu(-d)^p]

    Args:
        q: shape (..., D).
        lam: > 0.
        tau: > 0; powers lie between ``lam * tau`` and ``lam * (tau + 1)``.

    Returns:
        Shape (..., 2 D).

    Raises:
        ValueError: an argument out of range.

    >>> import torch
    >>> from assay.nn.functional import norm_aware_feature_map
    >>> norm_aware_feature_map(torch.tensor([30.0, -40.0]), lam=2.0, tau=1.0)  # 0.6 and -0.8 to the power 4
    tensor([0.1296, 0.0000, 0.0000, 0.4096])
    """
    for name, value in (("lam", lam), ("tau", tau)):
        in_range(name, value, 0 < value < math.inf, "> 0 and finite")
    norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    direction = q / norm.clamp_min(torch.finfo(q.dtype).tiny)
    return _signed_powers(direction, lam * (tau + norm.tanh()))


def key_feature_map(k: Tensor, power: float = 3.0) -> Tensor:
    """Keys as non-negative features, norm kept: ``[relu(k)^power, relu(-k)^power]``.

    Args:
        k: shape (..., D).
        power: > 0.

    Returns:
        Shape (..., 2 D).

    Raises:
        ValueError: power out of range.

    >>> import torch
    >>> from assay.nn.functional import key_feature_map
    >>> key_feature_map(torch.tensor([2.0, -1.0]))
    tensor([8., 0., 0., 1.])
    """
    in_range("power", power, 0 < power < math.inf, "> 0 and finite")
    return _signed_powers(k, power)


def _signed_powers(x: Tensor, power: Tensor | float) -> Tensor:
    # At 0 the power has no finite gradient below 1, and its logarithm none at all: 0 takes no part.
    size = torch.where(x == 0, 1.0, x.abs()) ** power
    return torch.cat([torch.where(x > 0, size, 0.0), torch.where(x < 0, size, 0.0)], -1)


def norm_aware_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lam: float = 3.0,
    tau: float = 0.5,
    key_power: float = 3.0,
    rotary: tuple[Tensor, Tensor] | None = None,
    causal: bool = False,
    eps: float = 1e-6,
    state: State | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, State]:
    """Linear attention whose rows are the spikier, the larger the query is, as with softmax.

    With phi = :func:`norm_aware_feature_map` of the queries and psi = :func:`key_feature_map` of the keys ::

        out_i = sum_j phi(q_i) psi(k_j) v_j / (sum_j phi(q_i) psi(k_j) + eps)        all j, or j <= i if ``causal``

    in time and memory linear in N. Not causal, both sums are means over j before ``eps`` is added. It is computed in
    float32 at least and returned in the dtype of ``v``.

    Args:
        q, k, v: shape (B, H, N, D); the keys may be of another number than the queries if not causal.
        lam, tau, key_power: > 0, see the feature maps.
        rotary: sines and cosines, broadcastable to (B, H, N, D), by which neighbouring pairs of features are turned;
            in the numerator alone, so that weights may then be negative and need not sum to one.
        causal: leave out the tokens after the query's.
        eps: >= 0.
        state: sums over the tokens before these, as returned with ``return_state``; only if causal.
        return_state: also return the sums (B, H, 2 D, D) and (B, H, 2 D) over all tokens up to now.

    Returns:
        Shape (B, H, N, D), or that and the state.

    Raises:
        ValueError: an argument out of range, or a state without ``causal``.

    Source: W. Meng et al., NaLaFormer, 2025, arXiv 2506.21137.

    >>> import torch
    >>> from assay.nn.functional import norm_aware_linear_attention
    >>> q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))
    >>> past, state = norm_aware_linear_attention(q[:, :, :3], k[:, :, :3], v[:, :, :3], causal=True, return_state=True)
    >>> now = norm_aware_linear_attention(q[:, :, 3:], k[:, :, 3:], v[:, :, 3:], causal=True, state=state)
    >>> torch.allclose(torch.cat([past, now], 2), norm_aware_linear_attention(q, k, v, causal=True), atol=1e-5)
    True
    """
    in_range("eps", eps, 0 <= eps < math.inf, ">= 0 and finite")
    in_range("state", state, causal or (state is None and not return_state), "None if not causal")
    dtype, out = torch.promote_types(q.dtype, torch.float32), v.dtype
    with torch.autocast(q.device.type, enabled=False):
        v = v.to(dtype)
        phi = norm_aware_feature_map(q.to(dtype), lam, tau)
        psi = key_feature_map(k.to(dtype), key_power)
        turned = (phi, psi) if rotary is None else (_rotated(phi, *rotary), _rotated(psi, *rotary))
        if not causal:
            total = psi.mean(-2).unsqueeze(-1)
            return (turned[0] @ (turned[1].mT @ (v / max(1, v.shape[-2]))) / (phi @ total + eps)).to(out)
        sums, counts = (None, None) if state is None else (state[0], state[1].unsqueeze(-1))
        above, sums = _causal(*turned, v, sums)
        below, counts = _causal(phi, psi, torch.ones_like(v[..., :1]), counts)
        result = (above / (below + eps)).to(out)
        return (result, (sums, counts.squeeze(-1))) if return_state else result


def _rotated(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Features of positive and of negative parts, each turned by the same angles."""
    halves = x.unflatten(-1, (2, -1))
    sin, cos = (t.to(x.dtype).unsqueeze(-2) for t in (sin, cos))
    even, odd = halves[..., ::2], halves[..., 1::2]
    return (halves * cos + torch.stack([-odd, even], -1).flatten(-2) * sin).flatten(-2)


def _causal(phi: Tensor, psi: Tensor, v: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """sum over j <= i of (phi_i psi_j) v_j for all i, with the sum of psi_j v_j^T over all j and ``before``.

    Tokens are taken in chunks: within one the weights are written out, what came before it is one matrix.
    """
    length = phi.shape[-2]
    chunk = min(_CHUNK, max(1, length))
    short = -length % chunk
    phi, psi, v = (F.pad(x, (0, 0, 0, short)).unflatten(-2, (-1, chunk)) for x in (phi, psi, v))
    sums = psi.mT @ v
    if before is not None:
        sums = torch.cat([before.unsqueeze(-3), sums], -3)
    sums = sums.cumsum(-3)
    if before is None:
        sums = F.pad(sums, (0, 0, 0, 0, 1, 0))
    inside = (phi @ psi.mT).tril() @ v
    out = (inside + phi @ sums[..., :-1, :, :]).flatten(-3, -2)
    return out[..., :length, :], sums[..., -1, :, :]


def attention_entropy(weights: Tensor) -> Tensor:
    """Entropy in nats of each row of attention weights, divided by their sum first.

    Args:
        weights: >= 0 with a sum above 0 in each row, shape (..., N).

    Returns:
        Shape (...).

    >>> import torch
    >>> from assay.nn.functional import attention_entropy
    >>> attention_entropy(torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    tensor([0.6931, 0.0000])
    """
    share = weights / weights.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1)
