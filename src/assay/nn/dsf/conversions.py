"""Attention, state space models and gated networks as systems of one form, for one sequence of inputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from assay._checks import in_range
from assay.nn.dsf.system import LTVSystem

if TYPE_CHECKING:
    from assay.nn._ssm import SelectiveSSM
    from assay.nn.dsf.layers import QLSTM

FeatureMap = Callable[[Tensor], Tensor]


def elu_plus_one(x: Tensor) -> Tensor:
    """The usual feature map of linear attention, ``elu(x) + 1``."""
    return F.elu(x) + 1


def from_linear_attention(
    q: Tensor,
    k: Tensor,
    v_weight: Tensor,
    feature_map: FeatureMap = elu_plus_one,
    normalize: str | None = "sum",
) -> LTVSystem:
    """Causal linear attention as a system from the tokens u, whose values are ``v_weight u``.

    With phi = ``feature_map`` and eta_i = phi(q_i) . sum_{j <= i} phi(k_j) ::

        Lambda_i = eta_{i-1} / eta_i,   B_i = phi(k_i) (x) v_weight / eta_i,   C_i = phi(q_i)^T (x) I

    on n d states for n features and d values. The normalization eta depends on the query and on the whole past.

    Args:
        q, k: shape (..., L, m).
        v_weight: shape (..., d, d_u).
        feature_map: from (..., m) to (..., n).
        normalize: "sum", as above; None: eta = 1, so that Lambda = 1.

    Raises:
        ValueError: another ``normalize``.

    Source: J. Sieber et al., Understanding the differences in Foundation Models, NeurIPS 2024, arXiv 2405.15731.

    >>> import torch
    >>> from assay.nn.dsf import from_linear_attention
    >>> q, k = torch.randn(2, 5, 3)
    >>> from_linear_attention(q, k, torch.eye(4)).recurrent(torch.ones(5, 4)).allclose(torch.ones(5, 4))
    True
    """
    in_range("normalize", normalize, normalize in ("sum", None), "sum or None")
    phi, psi = feature_map(q), feature_map(k)
    eta = (phi * psi.cumsum(-2)).sum(-1) if normalize else torch.ones_like(phi[..., 0])
    return _attention(phi, psi, v_weight, eta)


def _attention(phi: Tensor, psi: Tensor, v_weight: Tensor, eta: Tensor) -> LTVSystem:
    """What is common to all attention that is normalized by eta: sum_{j <= i} (phi_i . psi_j) v_j / eta_i."""
    width = v_weight.shape[-2]
    ratio = F.pad(eta, (1, 0))[..., :-1] / eta
    # States in the order (feature, value).
    matrix = psi[..., :, None, None] * v_weight[..., None, None, :, :] / eta[..., None, None, None]
    identity = torch.eye(width, dtype=phi.dtype, device=phi.device)
    read = (phi[..., None, :, None] * identity[:, None, :]).flatten(-2)
    return LTVSystem(ratio.unsqueeze(-1).expand(*ratio.shape, read.shape[-1]), matrix.flatten(-3, -2), read)


def from_normalized_attention(q: Tensor, k: Tensor, v_weight: Tensor, norm: Tensor) -> LTVSystem:
    """Normalized attention as a system: eta_i = exp(norm_i) depends on the input of that step alone.

    ::

        Lambda_i = exp(norm_{i-1} - norm_i),   B_i = exp(-norm_i) k_i (x) v_weight,   C_i = q_i^T (x) I

    Args:
        q, k: shape (..., L, n).
        v_weight: shape (..., d, d_u).
        norm: shape (..., L).

    >>> import torch
    >>> from assay.nn.dsf import from_normalized_attention
    >>> q, k = torch.randn(2, 5, 3)
    >>> from_normalized_attention(q, k, torch.eye(4), torch.zeros(5)).state_dim
    12
    """
    return _attention(q, k, v_weight, norm.exp())


def monomials(x: Tensor, order: int) -> Tensor:
    """Features with phi(x) . phi(y) = sum_{m <= order} (x . y)^m / m!, of which there are C(n + order, order)."""
    features = []
    for degree in range(order + 1):
        for chosen in itertools.combinations_with_replacement(range(x.shape[-1]), degree):
            counts = [chosen.count(i) for i in set(chosen)]
            weight = 1 / math.prod(map(math.factorial, counts))
            product = math.sqrt(weight) * torch.ones_like(x[..., 0])
            for i in chosen:
                product = product * x[..., i]
            features.append(product)
    return torch.stack(features, -1)


def from_softmax_attention(q: Tensor, k: Tensor, v_weight: Tensor, order: int, scale: float | None = None) -> LTVSystem:
    """Causal softmax attention, its exponential expanded to a power: exact only in the limit of infinitely many states.

    ``exp(z) ~ sum_{m <= order} z^m / m!`` for z = scale q . k, as linear attention on the monomials of q and k.

    Args:
        q, k: shape (..., L, n).
        v_weight: shape (..., d, d_u).
        order: >= 0.
        scale: None: 1 / sqrt(n).

    Raises:
        ValueError: an order below 0.

    >>> import torch
    >>> from assay.nn.dsf import from_softmax_attention
    >>> q, k = torch.randn(2, 5, 3)
    >>> [from_softmax_attention(q, k, torch.eye(1), order).state_dim for order in (1, 2, 3)]
    [4, 10, 20]
    """
    in_range("order", order, order >= 0, ">= 0")
    root = (q.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    return from_linear_attention(root * q, root * k, v_weight, lambda x: monomials(x, order))


def from_s6(ssm: SelectiveSSM, x: Tensor) -> LTVSystem:
    """The scan of a :class:`assay.nn.SelectiveSSM` as a system from x to what is gated and projected out.

    ::

        Lambda_i = exp(delta_i A),   B_i = delta_i B(x_i),   C_i = C(x_i),   D        per channel

    Here decay and input are coupled by delta, a recurrent normalization that depends on the input of the step alone.

    Args:
        ssm: the layer; its first direction is taken.
        x: shape (batch, L, d_inner), behind the layer's convolution.

    >>> import torch
    >>> from assay.nn import SelectiveSSM
    >>> from assay.nn.dsf import from_s6
    >>> from_s6(SelectiveSSM(2, d_state=3), torch.randn(1, 5, 4)).state_dim
    12
    """
    delta, B, C = (t.transpose(1, 2) for t in ssm.select(x.transpose(1, 2)))
    delta = F.softplus(delta + ssm.get_parameter("dt_proj.bias"))
    decay = (delta[..., None] * -ssm.A_log.exp()).exp().flatten(-2)
    channels = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    # States in the order (channel, state), of which a channel reads and writes its own.
    write = ((delta[..., None] * B[..., None, :])[..., None] * channels[:, None, :]).flatten(-3, -2)
    read = (C[..., None, None, :] * channels[..., None]).flatten(-2)
    return LTVSystem(decay, write, read, torch.diag(ssm.D).expand(*x.shape[:2], -1, -1))


def from_ssd(delta: Tensor, a: Tensor, B: Tensor, C: Tensor, width: int = 1) -> LTVSystem:
    """A head of Mamba-2 as a system: one decay for all its states.

    ``Lambda_i = exp(delta_i a)``, ``B_i = delta_i B_i (x) I``, ``C_i = C_i^T (x) I`` on n * width states.

    Args:
        delta: step sizes (..., L).
        a: shape () or (...,) as delta without L, below 0 for a state that decays.
        B, C: shape (..., L, n).
        width: channels of the head.

    >>> import torch
    >>> from assay.nn.dsf import from_ssd
    >>> from_ssd(torch.rand(5), torch.tensor(-1.0), torch.randn(5, 3), torch.randn(5, 3), width=2).state_dim
    6
    """
    identity = torch.eye(width, dtype=B.dtype, device=B.device)
    write = (delta[..., None] * B)[..., None, None] * identity
    read = (C[..., None, :, None] * identity[:, None, :]).flatten(-2)
    decay = (delta * a.unsqueeze(-1)).exp()
    return LTVSystem(decay.unsqueeze(-1).expand(*decay.shape, read.shape[-1]), write.flatten(-3, -2), read)


def from_qlstm(layer: QLSTM, x: Tensor) -> LTVSystem:
    """The recurrence of a :class:`QLSTM` as a system from x, behind the layer's convolution, to what is gated.

    ``Lambda_i = a_i``, ``B_i = diag(sigmoid(i_i))``, ``C_i = diag(sigmoid(o_i))``.

    Args:
        layer: the layer.
        x: shape (batch, L, hidden).

    >>> import torch
    >>> from assay.nn.dsf import QLSTM, from_qlstm
    >>> from_qlstm(QLSTM(2), torch.randn(1, 5, 4)).is_stable()
    True
    """
    decay, i, o = layer.gates(x)
    return LTVSystem(decay, torch.diag_embed(i), torch.diag_embed(o))
