"""NaLaFormer: linear attention that gives the query's norm back the say it has in softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay._checks import in_range
from assay.nn._grid import grid
from assay.nn.nalaformer.feature_maps import (
    attention_entropy,
    key_feature_map,
    norm_aware_feature_map,
    norm_aware_linear_attention,
)

__all__ = [
    "NaLaFormerBlock",
    "NormAwareLinearAttention",
    "attention_entropy",
    "key_feature_map",
    "norm_aware_feature_map",
    "norm_aware_linear_attention",
]


class NormAwareLinearAttention(nn.Module):
    """Self-attention of N tokens in time linear in N, with rows that are the spikier, the larger the query is.

    ::

        q, k, v, g = linear(x)
        y = layer_norm(attention(q, k, v) + depthwise_conv(v)) * silu(g)
        output = linear(y)

    with :func:`assay.nn.functional.norm_aware_linear_attention` in heads. The convolution adds what is near by: over
    the grid of an image with two-dimensional positions or none, along the sequence if ``rope`` is "1d" or ``causal``.

    Args:
        dim: channels, a multiple of ``num_heads``.
        num_heads: >= 1.
        lam, tau, key_power: > 0, see the function.
        gate: multiply by silu(g).
        lepe_kernel: odd size of the convolution, or 0 for none.
        rope: rotary positions, "2d" (rows in the first half of each head, columns in the second), "1d", or None. "2d"
            needs a multiple of 4 channels in a head, "1d" an even number.
        causal: each token sees those before it and itself, in the convolution too.
        bias: of the two linear maps.
        eps: >= 0, added to the sum of a row.

    Input (B, N, dim) and, for an image, its height and width ``hw``, N = H W; without them a square is assumed.

    Raises:
        ValueError: an argument out of range, or an N that is not H W.

    Source: W. Meng et al., NaLaFormer, 2025, arXiv 2506.21137.

    >>> import torch
    >>> from assay.nn import NormAwareLinearAttention
    >>> NormAwareLinearAttention(32, num_heads=4, rope="2d")(torch.randn(2, 6 * 8, 32), hw=(6, 8)).shape
    torch.Size([2, 48, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        lam: float = 3.0,
        tau: float = 0.5,
        key_power: float = 3.0,
        gate: bool = True,
        lepe_kernel: int = 5,
        rope: str | None = "2d",
        causal: bool = False,
        bias: bool = True,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_range("num_heads", num_heads, num_heads >= 1, ">= 1")
        in_range("dim", dim, dim >= 1 and dim % num_heads == 0, f"a multiple of num_heads = {num_heads}")
        for name, value in (("lam", lam), ("tau", tau), ("key_power", key_power)):
            in_range(name, value, 0 < value < math.inf, "> 0 and finite")
        in_range("eps", eps, 0 <= eps < math.inf, ">= 0 and finite")
        in_range("lepe_kernel", lepe_kernel, lepe_kernel == 0 or lepe_kernel % 2 == 1, "0 or an odd number")
        in_range(
            "rope", rope, rope in ((None, "1d") if causal else (None, "1d", "2d")), "None, 1d, or 2d if not causal"
        )
        step = {None: 1, "1d": 2, "2d": 4}[rope]
        in_range("dim / num_heads", dim // num_heads, dim // num_heads % step == 0, f"a multiple of {step} with rope")
        self.dim, self.num_heads, self.rope, self.causal = dim, num_heads, rope, causal
        self.options: dict[str, Any] = {"lam": lam, "tau": tau, "key_power": key_power, "eps": eps}
        self.on_grid = not causal and rope != "1d"
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkvg = nn.Linear(dim, (4 if gate else 3) * dim, bias, **factory)
        self.reach = (lepe_kernel - 1, 0) if causal else (lepe_kernel // 2, lepe_kernel // 2)
        self.lepe: nn.Module | None = None
        if lepe_kernel:
            conv, pad = (nn.Conv2d, lepe_kernel // 2) if self.on_grid else (nn.Conv1d, 0)
            self.lepe = conv(dim, dim, lepe_kernel, padding=pad, groups=dim, **factory)
        self.ln = nn.LayerNorm(dim, **factory)
        self.out_proj = nn.Linear(dim, dim, bias, **factory)

    def forward(self, x: Tensor, hw: tuple[int, int] | None = None) -> Tensor:
        if self.on_grid and (self.lepe is not None or self.rope == "2d"):
            hw = grid(x.shape[1], hw)
        q, k, v, *gate = self.qkvg(x).chunk(self.qkvg.out_features // self.dim, -1)
        heads = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        rotary = None
        if self.rope is not None:
            rotary = rotary_angles(hw if self.rope == "2d" else (x.shape[1],), self.dim // self.num_heads, x.device)
        y = norm_aware_linear_attention(*heads, rotary=rotary, causal=self.causal, **self.options)
        y = y.transpose(1, 2).flatten(-2)  # type: ignore[union-attr]
        y = self.ln(y if self.lepe is None else y + self._near(v, hw))
        return self.out_proj(y * F.silu(gate[0]) if gate else y)

    def _near(self, v: Tensor, hw: tuple[int, int] | None) -> Tensor:
        """The convolution of the values over what is near by."""
        assert self.lepe is not None
        v = v.mT
        if hw is not None and self.on_grid:
            return self.lepe(v.unflatten(-1, hw)).flatten(-2).mT
        before, after = self.reach
        return self.lepe(F.pad(v, (before, after))).mT

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"{self.dim}, num_heads={self.num_heads}, rope={self.rope!r}, causal={self.causal}{options}"


def rotary_angles(
    sizes: tuple[int, ...] | None, width: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Sines and cosines (N, width) of positions along each of the sizes, in as many parts of the width.

    The frequencies fall from 1 to 1 / 10000 in equal ratios; each is that of two neighbours.
    """
    assert sizes is not None
    part = width // len(sizes)
    frequencies = (10000 ** -torch.linspace(0, 1, part // 2, device=device)).repeat_interleave(2)
    along = [torch.arange(size, device=device)[:, None] * frequencies for size in sizes]
    if len(sizes) == 2:
        along = [along[0][:, None].expand(*sizes, part), along[1].expand(*sizes, part)]
    angles = torch.cat(along, -1).flatten(0, -2)
    return angles.sin(), angles.cos()


class NaLaFormerBlock(nn.Module):
    """One block of the paper's image network: convolutions for position around attention and a gated MLP's convolution.

    ::

        x += conv3x3(x);   x += attention(layer_norm(x));   x += conv3x3(x);   x += mlp(layer_norm(x))

    on images (B, dim, H, W), where mlp is linear, gelu, y + conv3x3(y), linear in each place, and all convolutions are
    depthwise.

    Args:
        dim, num_heads: of the attention.
        hidden_dim: width of the MLP, >= 1; None: 3 dim.
        attention: further arguments of :class:`NormAwareLinearAttention`, with rope="2d" by default.

    Raises:
        ValueError: an argument out of range.

    >>> import torch
    >>> from assay.nn import NaLaFormerBlock
    >>> NaLaFormerBlock(16, num_heads=2)(torch.randn(2, 16, 5, 7)).shape
    torch.Size([2, 16, 5, 7])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ) -> None:
        super().__init__()
        hidden = 3 * dim if hidden_dim is None else hidden_dim
        in_range("hidden_dim", hidden_dim, hidden >= 1, ">= 1")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attn = NormAwareLinearAttention(dim, num_heads, **{"rope": "2d", **attention}, **factory)
        in_range("rope", self.attn.rope, self.attn.on_grid, "None or 2d, not causal, on images")
        self.cpe1, self.cpe2 = (nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory) for _ in range(2))
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6, **factory) for _ in range(2))
        self.fc1, self.fc2 = nn.Linear(dim, hidden, **factory), nn.Linear(hidden, dim, **factory)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **factory)

    def forward(self, x: Tensor) -> Tensor:
        hw = (x.shape[-2], x.shape[-1])
        x = x + self.cpe1(x)
        tokens = x.flatten(2).mT
        tokens = tokens + self.attn(self.norm1(tokens), hw)
        x = tokens.mT.unflatten(-1, hw)
        x = x + self.cpe2(x)
        tokens = x.flatten(2).mT
        hidden = F.gelu(self.fc1(self.norm2(tokens))).mT.unflatten(-1, hw)
        tokens = tokens + self.fc2((hidden + self.dwconv(hidden)).flatten(2).mT)
        return tokens.mT.unflatten(-1, hw)
