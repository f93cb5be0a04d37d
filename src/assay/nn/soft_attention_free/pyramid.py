"""The block around softmax-free attention, and the paper's image network of four stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay._checks import in_range


class SoftmaxFreeBlock(nn.Module):
    """Attention and an MLP, each added to what it read, and normalized afterwards.

    ::

        x = layer_norm(x + dropout(attention(x)))
        x = layer_norm(x + dropout(mlp(x)))          mlp: linear, gelu (tanh), linear

    Args:
        dim, num_heads, ratio, conv_size: of :class:`SoftmaxFreeAttention`.
        drop: in [0, 1).
        mlp_ratio: width of the MLP over dim, >= 1.
        attention: further arguments of the attention.

    Input (B, N, dim) and ``hw`` as there.

    Raises:
        ValueError: an argument out of range.

    Source: J. Lu et al., Softmax-free Linear Transformers, IJCV 2024, arXiv 2207.03341.

    >>> import torch
    >>> from assay.nn import SoftmaxFreeBlock
    >>> SoftmaxFreeBlock(32, 2, ratio=4)(torch.randn(2, 64, 32), (8, 8)).shape
    torch.Size([2, 64, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        ratio: int | tuple[int, int] = 8,
        conv_size: int = 3,
        drop: float = 0.0,
        mlp_ratio: float = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ) -> None:
        from assay.nn.soft_attention_free.soft_attention_free import SoftmaxFreeAttention

        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        attn = SoftmaxFreeAttention(dim, num_heads, ratio=ratio, conv_size=conv_size, **attention, **factory)
        self._build(dim, attn, drop, mlp_ratio, factory)

    def _build(self, dim: int, attn: nn.Module, drop: float, mlp_ratio: float, factory: dict[str, Any]) -> None:
        in_range("drop", drop, 0 <= drop < 1, "[0, 1)")
        in_range("mlp_ratio", mlp_ratio, mlp_ratio >= 1, ">= 1")
        hidden = int(dim * mlp_ratio)
        self.attn, self.drop = attn, nn.Dropout(drop)
        self.norm1, self.norm2 = (nn.LayerNorm(dim, **factory) for _ in range(2))
        self.fc1, self.fc2 = nn.Linear(dim, hidden, **factory), nn.Linear(hidden, dim, **factory)
        for linear in (self.fc1, self.fc2):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, hw: tuple[int, int] | None = None) -> Tensor:
        x = self.norm1(x + self.drop(self.attn(x, hw)))
        return self.norm2(x + self.drop(self.fc2(F.gelu(self.fc1(x), approximate="tanh"))))


class _SoftmaxBlock(SoftmaxFreeBlock):
    """The same block around ordinary attention, for the last stage, whose tokens are few and have no full grid."""

    def __init__(self, dim: int, num_heads: int, drop: float, mlp_ratio: float, factory: dict[str, Any]) -> None:
        nn.Module.__init__(self)
        self._build(dim, _SoftmaxAttention(dim, num_heads, factory), drop, mlp_ratio, factory)


class _SoftmaxAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, factory: dict[str, Any]) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, **factory), nn.Linear(dim, dim, **factory)

    def forward(self, x: Tensor, hw: tuple[int, int] | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class SOFT(nn.Module):
    """The paper's image classifier: three stages of :class:`SoftmaxFreeBlock` and one of ordinary attention.

    A stage begins with a convolution that makes its tokens (stride 4, then 2) and adds learned positions; the last has
    a class token, which is classified.

    Args:
        image_size: pixels of a side, a multiple of 32 times nothing smaller than a window; other sizes may be given
            later, positions are interpolated.
        num_classes, in_channels: >= 1.
        embed_dims, depths, num_heads: of the four stages.
        ratios, conv_sizes: of the first three.
        drop, mlp_ratio: of the blocks.
        attention: further arguments of :class:`SoftmaxFreeAttention`, such as ``normalize=True``.

    Input (B, in_channels, H, W), output (B, num_classes).

    Raises:
        ValueError: an argument out of range.

    Source: J. Lu et al., Softmax-free Linear Transformers, IJCV 2024, arXiv 2207.03341.

    >>> import torch
    >>> from assay.nn import SOFT
    >>> model = SOFT(64, 10, embed_dims=(8, 16, 16, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4))
    >>> model(torch.randn(2, 3, 64, 64)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        image_size: int = 224,
        num_classes: int = 1000,
        in_channels: int = 3,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (1, 2, 3, 2),
        num_heads: Sequence[int] = (2, 4, 10, 16),
        ratios: Sequence[int] = (8, 4, 2),
        conv_sizes: Sequence[int] = (9, 5, 3),
        drop: float = 0.0,
        mlp_ratio: float = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ) -> None:
        super().__init__()
        for name, values, count in (
            ("embed_dims", embed_dims, 4),
            ("depths", depths, 4),
            ("num_heads", num_heads, 4),
            ("ratios", ratios, 3),
            ("conv_sizes", conv_sizes, 3),
        ):
            in_range(name, tuple(values), len(values) == count, f"{count} numbers")
        in_range("image_size", image_size, image_size >= 4, ">= 4")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed, self.norms, self.positions = nn.ModuleList(), nn.ModuleList(), nn.ParameterList()
        self.stages = nn.ModuleList()
        inputs, side = in_channels, image_size
        for stage, (dim, depth, heads) in enumerate(zip(embed_dims, depths, num_heads, strict=True)):
            kernel, stride = (7, 4) if stage == 0 else (3, 2)
            side = -(-side // stride)
            self.embed.append(nn.Conv2d(inputs, dim, kernel, stride, kernel // 2, **factory))
            self.norms.append(nn.LayerNorm(dim, **factory))
            self.positions.append(nn.Parameter(torch.empty(1, dim, side, side, **factory)))
            nn.init.trunc_normal_(self.positions[-1], std=0.02)
            blocks: list[nn.Module] = []
            for _ in range(depth):
                if stage < 3:
                    options = {**attention, **factory}
                    blocks.append(
                        SoftmaxFreeBlock(dim, heads, ratios[stage], conv_sizes[stage], drop, mlp_ratio, **options)
                    )
                else:
                    blocks.append(_SoftmaxBlock(dim, heads, drop, mlp_ratio, factory))
            self.stages.append(nn.ModuleList(blocks))
            inputs = dim
        self.class_token = nn.Parameter(torch.empty(1, 1, inputs, **factory))
        nn.init.trunc_normal_(self.class_token, std=0.02)
        self.head = nn.Linear(inputs, num_classes, **factory)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x
        for stage, (embed, norm, blocks) in enumerate(zip(self.embed, self.norms, self.stages, strict=True)):
            maps = embed(x)
            hw = (maps.shape[2], maps.shape[3])
            position = self.positions[stage]
            if position.shape[2:] != maps.shape[2:]:
                position = F.interpolate(position, hw, mode="bilinear")
            tokens = norm(maps.flatten(2).mT) + position.flatten(2).mT
            if stage == 3:
                tokens = torch.cat([self.class_token.expand(tokens.shape[0], -1, -1), tokens], 1)
            for block in blocks:  # type: ignore[attr-defined]
                tokens = block(tokens, hw)
            if stage < 3:
                x = tokens.mT.unflatten(-1, hw)
        return self.head(tokens[:, 0])
