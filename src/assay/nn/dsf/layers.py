"""The paper's layers: attention with a normalization by the input, and a quasi-LSTM with the gate of S6."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay._checks import in_range
from assay.nn._scan import linear_scan


class NormalizedAttention(nn.Module):
    """Causal attention whose weights are divided by a function of the query's own token, and of no key.

    ::

        y_t = sum_{s <= t} (q_t . k_s) v_s / exp(n_t),   output = linear(y)

    with q, k, v and n linear in x, n one number a head. Weights may be negative, and no softmax is taken, so that it is
    also a recurrence (``linear=True``), with the decay exp(n_{t-1} - n_t).

    Args:
        d_model: >= 1, a multiple of ``num_heads``.
        d_qk: width of all heads' queries and keys, a multiple of ``num_heads``; None: d_model.
        num_heads: >= 1.
        bias: of the linear maps.
        dropout: of the weights, in [0, 1].
        norm_fn: "exp"; "softplus" divides by softplus(n_t) instead.

    Input and output (batch, L, d_model). ``linear=True`` computes in time linear in L, without dropout.

    Raises:
        ValueError: an argument out of range.

    Source: J. Sieber et al., Understanding the differences in Foundation Models, NeurIPS 2024, arXiv 2405.15731.

    >>> import torch
    >>> from assay.nn.dsf import NormalizedAttention
    >>> layer, x = NormalizedAttention(8, num_heads=2).eval(), torch.randn(2, 5, 8)
    >>> torch.allclose(layer(x), layer(x, linear=True), atol=1e-5)
    True
    """

    def __init__(
        self,
        d_model: int,
        d_qk: int | None = None,
        num_heads: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        norm_fn: str = "exp",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_qk = d_model if d_qk is None else d_qk
        in_range("num_heads", num_heads, num_heads >= 1, ">= 1")
        for name, value in (("d_model", d_model), ("d_qk", d_qk)):
            in_range(name, value, value >= 1 and value % num_heads == 0, f"a multiple of num_heads = {num_heads}")
        in_range("dropout", dropout, 0 <= dropout <= 1, "[0, 1]")
        in_range("norm_fn", norm_fn, norm_fn in ("exp", "softplus"), "exp or softplus")
        self.d_model, self.d_qk, self.num_heads, self.dropout, self.norm_fn = d_model, d_qk, num_heads, dropout, norm_fn
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.Wqk = nn.Linear(d_model, 2 * d_qk, bias, **factory)
        self.Wv = nn.Linear(d_model, d_model, bias, **factory)
        self.Wn = nn.Linear(d_model, num_heads, bias, **factory)
        self.out_proj = nn.Linear(d_model, d_model, bias, **factory)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v of shape (batch, heads, L, width), and the logarithm of what is divided by (batch, heads, L)."""
        q, k, v = (
            t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (*self.Wqk(x).chunk(2, -1), self.Wv(x))
        )
        n = self.Wn(x).transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32))
        return q, k, v, n if self.norm_fn == "exp" else F.softplus(n).log()

    def forward(self, x: Tensor, linear: bool = False) -> Tensor:
        q, k, v, n = self.heads(x)
        if linear:
            pairs = (k.unsqueeze(-1) * v.unsqueeze(-2)) * (-n).exp()[..., None, None]
            decay = (F.pad(n[..., :-1], (1, 0)) - n).exp()
            states = linear_scan(decay[..., None, None], pairs, dim=2)
            y = (q.unsqueeze(-2) @ states.to(q.dtype)).squeeze(-2)
        else:
            weights = ((q @ k.mT).tril() * (-n).exp().unsqueeze(-1)).to(v.dtype)
            y = F.dropout(weights, self.dropout, self.training) @ v
        return self.out_proj(y.transpose(1, 2).flatten(-2))

    def extra_repr(self) -> str:
        return f"{self.d_model}, d_qk={self.d_qk}, num_heads={self.num_heads}, norm_fn={self.norm_fn!r}"


class QLSTM(nn.Module):
    """A gated recurrent network whose gates see the input alone, so that its state is a linear scan.

    ::

        gate, x = linear(input);   x = depthwise causal convolution of x
        f, i, o = linear(x)
        h_t = a_t h_{t-1} + sigmoid(i_t) x_t,   output = linear(gelu(gate) sigmoid(o) h)

    a = sigmoid(f), or reversed, sigmoid(-f)^relu(alpha) = exp(-relu(alpha) softplus(f)), which for alpha = 1 is the
    decay of S6 with A = -1. alpha is one learned number that starts at 1.

    Args:
        d_model: >= 1.
        expansion_factor: hidden / d_model, >= 1.
        kernel_size: of the convolution, >= 1.
        reversed_sigmoid: which a.

    Input and output (batch, L, d_model).

    Raises:
        ValueError: an argument out of range.

    Source: J. Sieber et al., Understanding the differences in Foundation Models, NeurIPS 2024, arXiv 2405.15731.

    >>> import torch
    >>> from assay.nn.dsf import QLSTM
    >>> QLSTM(8)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    alpha: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        expansion_factor: int = 2,
        kernel_size: int = 4,
        reversed_sigmoid: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("expansion_factor", expansion_factor), ("kernel_size", kernel_size)):
            in_range(name, value, value >= 1, ">= 1")
        hidden = expansion_factor * d_model
        self.d_model, self.hidden, self.kernel_size = d_model, hidden, kernel_size
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.input = nn.Linear(d_model, 2 * hidden, bias=False, **factory)
        self.conv = nn.Conv1d(hidden, hidden, kernel_size, groups=hidden, **factory)
        self.fio = nn.Linear(hidden, 3 * hidden, **factory)
        self.output = nn.Linear(hidden, d_model, bias=False, **factory)
        alpha = nn.Parameter(torch.ones((), **factory)) if reversed_sigmoid else None
        self.register_parameter("alpha", alpha)
        nn.init.normal_(self.input.weight, std=d_model**-0.5)
        for layer in (self.fio, self.output):
            nn.init.normal_(layer.weight, std=hidden**-0.5)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decay, input and output gates (batch, L, hidden) for x behind the convolution."""
        f, i, o = self.fio(x).chunk(3, -1)
        decay = f.sigmoid() if self.alpha is None else (-self.alpha.relu() * F.softplus(f)).exp()
        return decay, i.sigmoid(), o.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        gate, x = self.input(x).chunk(2, -1)
        x = self.conv(F.pad(x.mT, (self.kernel_size - 1, 0))).mT
        decay, i, o = self.gates(x)
        states = linear_scan(decay, i * x)
        return self.output(F.gelu(gate) * o * states)

    def extra_repr(self) -> str:
        ratio = self.hidden // self.d_model
        return f"{self.d_model}, expansion_factor={ratio}, reversed_sigmoid={self.alpha is not None}"
