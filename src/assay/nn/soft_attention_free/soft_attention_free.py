"""SOFT: attention by a Gaussian kernel in place of a softmax, in time linear in the number of tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay._checks import in_range
from assay.nn._grid import grid
from assay.nn.soft_attention_free.kernel import gaussian_kernel, newton_pinv
from assay.nn.soft_attention_free.pyramid import SOFT, SoftmaxFreeBlock

__all__ = ["SOFT", "SoftmaxFreeAttention", "SoftmaxFreeBlock", "gaussian_kernel", "newton_pinv"]


class SoftmaxFreeAttention(nn.Module):
    """Self-attention of N tokens without softmax, through m landmarks, in time and memory linear in N.

    With S the Gaussian kernel of the queries, which are the keys too, so that it is symmetric ::

        q, v = linear(x) in heads,   q / d_h^(1/4),   q~ = landmarks of q
        P = S(q, q~),   A = S(q~, q~)
        y = P (A^+ (P^T v)) + depthwise_conv(v)
        output = linear(y)

    A^+ is :func:`newton_pinv`. No row is normalized. The landmarks stand for windows of ``ratio`` x ``ratio`` tokens:
    a convolution of each, the same for all heads, layer normalized, through a GELU; or their means. The kernel, A^+ and
    the products with it are in float32 at least.

    Args:
        dim: channels, a multiple of ``num_heads``.
        num_heads: >= 1.
        ratio: tokens of a window along each side, a number or a pair, >= 1; 1: the kernel of all tokens, y = S v, in
            quadratic time.
        conv_size: odd size of the convolution of the values over the grid, or 0 for none.
        max_iter, ridge: of the inverse.
        normalize: D^(-1/2) A^+ D^(-1/2) in place of A^+, D the row sums of A, which bounds the map's eigenvalues where
            N is large.
        qkv_bias: of the linear maps of q and v.
        landmarks: "conv", or "pool" for means, at any size of the grid.

    Input (B, N, dim) and height and width ``hw`` of the grid, N = H W; without them a square is assumed. A sequence is
    a grid (N, 1), with a ratio (r, 1).

    Raises:
        ValueError: an argument out of range, an N that is not H W, or a grid that is smaller than a window.

    Source: J. Lu et al., Softmax-free Linear Transformers, IJCV 2024, arXiv 2207.03341.

    >>> import torch
    >>> from assay.nn import SoftmaxFreeAttention
    >>> SoftmaxFreeAttention(32, num_heads=2, ratio=4)(torch.randn(2, 256, 32), (16, 16)).shape
    torch.Size([2, 256, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        ratio: int | tuple[int, int] = 8,
        conv_size: int = 3,
        max_iter: int = 20,
        ridge: float = 0.01,
        normalize: bool = False,
        qkv_bias: bool = True,
        landmarks: str = "conv",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_range("num_heads", num_heads, num_heads >= 1, ">= 1")
        in_range("dim", dim, dim >= 1 and dim % num_heads == 0, f"a multiple of num_heads = {num_heads}")
        window = (ratio, ratio) if isinstance(ratio, int) else ratio
        in_range("ratio", ratio, len(window) == 2 and min(window) >= 1, "a number or a pair of them, >= 1")
        in_range("conv_size", conv_size, conv_size == 0 or conv_size % 2 == 1, "0 or odd")
        in_range("max_iter", max_iter, max_iter >= 0, ">= 0")
        in_range("ridge", ridge, ridge >= 0, ">= 0")
        in_range("landmarks", landmarks, landmarks in ("conv", "pool"), "conv or pool")
        self.dim, self.num_heads, self.ratio, self.landmarks = dim, num_heads, window, landmarks
        self.max_iter, self.ridge, self.normalize = max_iter, ridge, normalize
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q, self.v = (nn.Linear(dim, dim, qkv_bias, **factory) for _ in range(2))
        self.proj = nn.Linear(dim, dim, **factory)
        width = dim // num_heads
        self.sample: nn.Module | None = None
        if landmarks == "conv" and self.ratio != (1, 1):
            self.sample = nn.Conv2d(width, width, self.ratio, self.ratio, bias=False, **factory)
            self.sample_norm = nn.LayerNorm(width, **factory)
        self.conv: nn.Module | None = None
        if conv_size:
            options: dict[str, Any] = {"padding": conv_size // 2, "groups": num_heads, "bias": False}
            self.conv = nn.Conv2d(num_heads, num_heads, conv_size, **options, **factory)
        for linear in (self.q, self.v, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, hw: tuple[int, int] | None = None) -> Tensor:
        hw = grid(x.shape[1], hw)
        q, v = (linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for linear in (self.q, self.v))
        q = q * q.shape[-1] ** -0.25
        near = None if self.conv is None else self._near(v, hw)
        sampled = None if self.ratio == (1, 1) else self._sampled(q, hw)
        exact = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            y = self._mixed(*(None if t is None else t.to(exact) for t in (q, v, sampled)))  # type: ignore[arg-type]
        y = y.to(v.dtype) if near is None else y.to(v.dtype) + near
        return self.proj(y.transpose(1, 2).flatten(-2))

    def _mixed(self, q: Tensor, v: Tensor, sampled: Tensor | None) -> Tensor:
        if sampled is None:
            return gaussian_kernel(q, q) @ v
        P, A = gaussian_kernel(q, sampled), gaussian_kernel(sampled, sampled)
        inverse = newton_pinv(A, self.max_iter, self.ridge)
        if self.normalize:
            root = A.sum(-1).rsqrt()
            inverse = root.unsqueeze(-1) * inverse * root.unsqueeze(-2)
        return P @ (inverse @ (P.mT @ v))

    def _sampled(self, q: Tensor, hw: tuple[int, int]) -> Tensor:
        """The landmarks (B, heads, m, d_h)."""
        maps = q.flatten(0, 1).mT.unflatten(-1, hw)
        if self.sample is None:
            sizes = (-(-hw[0] // self.ratio[0]), -(-hw[1] // self.ratio[1]))
            return F.adaptive_avg_pool2d(maps, sizes).flatten(2).mT.unflatten(0, q.shape[:2])
        good = all(length >= step for length, step in zip(hw, self.ratio, strict=True))
        in_range("hw", hw, good, f"at least ratio = {self.ratio}")
        found = self.sample(maps).flatten(2).mT.unflatten(0, q.shape[:2])
        return F.gelu(self.sample_norm(found))

    def _near(self, v: Tensor, hw: tuple[int, int]) -> Tensor:
        """The values convolved over the grid, each head with a kernel of its own."""
        assert self.conv is not None
        maps = v.permute(0, 3, 1, 2)  # (B, d_h, heads, N)
        near = self.conv(maps.flatten(0, 1).unflatten(-1, hw)).flatten(-2)
        return near.unflatten(0, maps.shape[:2]).permute(0, 2, 3, 1)

    def extra_repr(self) -> str:
        said = f"{self.dim}, num_heads={self.num_heads}, ratio={self.ratio}, landmarks={self.landmarks!r}"
        return f"{said}, max_iter={self.max_iter}, ridge={self.ridge}, normalize={self.normalize}"
