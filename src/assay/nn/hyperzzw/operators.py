"""The HyperZZW operator, in its forms, and the parts of the network that are built on it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay._checks import in_range
from assay.nn.hyperzzw.slow_net import ContextSlowNet, SlowNet


def hyper_zzw_elementwise(hk: Tensor, x: Tensor) -> Tensor:
    """The operator with two elementwise products: ``(x * hk) * x``, the kernel ``hk`` being made to fit x by x itself.

    Args:
        hk: a hyper-kernel that broadcasts to x.

    >>> import torch
    >>> from assay.nn.hyperzzw import hyper_zzw_elementwise
    >>> hyper_zzw_elementwise(torch.tensor([1.0, -1.0]), torch.tensor([2.0, 3.0]))
    tensor([ 4., -9.])
    """
    return (x * hk) * x


def standardized(x: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the pixels of each channel of each example."""
    return F.layer_norm(x, x.shape[2:])


def pointwise(inputs: int, outputs: int, factory: dict[str, Any]) -> nn.Conv2d:
    """A 1 x 1 convolution with He's normal weights and bias 0."""
    conv = nn.Conv2d(inputs, outputs, 1, **factory)
    nn.init.kaiming_normal_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class GlobalHyperZZW(nn.Module):
    """Full context: every place sees its row of one map and its column of the other, through a kernel as large as both.

    ::

        context = z_kernel * K                K = SlowNet(2, size, channels)(), (1, C, size, size)
        y       = context @ z                 a matrix product for each example and channel

    Args:
        channels: C.
        size: height and width of both inputs; the product needs them square.
        slow: keywords of :class:`SlowNet`; device and dtype too.

    Inputs (B, C, size, size); output of the same shape.

    Raises:
        ValueError: an argument out of range, or an input of another size.

    Source: H. Zhang, HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction, 2024, arXiv
    2401.17948.

    >>> import torch
    >>> from assay.nn.hyperzzw import GlobalHyperZZW
    >>> x = torch.randn(2, 16, 8, 8)
    >>> GlobalHyperZZW(16, 8)(x, x).shape
    torch.Size([2, 16, 8, 8])
    """

    def __init__(self, channels: int, size: int, **slow: Any) -> None:
        super().__init__()
        in_range("size", size, isinstance(size, int) and size >= 1, "an integer >= 1: the maps are square")
        self.slow_net = SlowNet(2, size, channels, **slow)

    def context(self, z_kernel: Tensor) -> Tensor:
        """``z_kernel * K``."""
        if z_kernel.shape[2:] != self.slow_net.size:
            raise ValueError(f"input of shape {tuple(z_kernel.shape)}: (B, C, *{self.slow_net.size}) is wanted")
        return z_kernel * self.slow_net()

    def forward(self, z_kernel: Tensor, z: Tensor) -> Tensor:
        return self.context(z_kernel) @ z


class LocalHyperZZW(nn.Module):
    """A depthwise convolution of one feature map with a kernel that is made from another.

    ::

        y = GELU(BN(A (depthwise convolution of z with ContextSlowNet(z_kernel)))) + bias

    A is a 1 x 1 convolution, BN has no affine map, bias is a number.

    Args:
        channels: C.
        kernel_size: odd.
        batch_stats_eval: evaluate with the batch's statistics, as the author does.
        slow: keywords of :class:`ContextSlowNet`; device and dtype too.

    Inputs (B, C, H, W); output of the same shape.

    Raises:
        ValueError: an argument out of range.

    Source: H. Zhang, HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction, 2024, arXiv
    2401.17948.

    >>> import torch
    >>> from assay.nn.hyperzzw import LocalHyperZZW
    >>> x = torch.randn(2, 16, 8, 8)
    >>> LocalHyperZZW(16, 5)(x, x).shape
    torch.Size([2, 16, 8, 8])
    """

    def __init__(self, channels: int, kernel_size: int, *, batch_stats_eval: bool = False, **slow: Any) -> None:
        super().__init__()
        in_range("kernel_size", kernel_size, kernel_size >= 1 and kernel_size % 2 == 1, "odd and >= 1")
        factory: dict[str, Any] = {name: slow[name] for name in ("device", "dtype") if name in slow}
        self.slow_net = ContextSlowNet(channels, kernel_size, batch_stats_eval=batch_stats_eval, **slow)
        self.mixer = pointwise(channels, channels, factory)
        self.norm = nn.BatchNorm2d(channels, affine=False, track_running_stats=not batch_stats_eval, **factory)
        self.bias = nn.Parameter(torch.zeros((), **factory))

    def forward(self, z_kernel: Tensor, z: Tensor) -> Tensor:
        kernel = self.slow_net(z_kernel)
        y = F.conv2d(z, kernel.to(z.dtype), padding=kernel.shape[-1] // 2, groups=len(kernel))
        return F.gelu(self.norm(self.mixer(y))) + self.bias


class RGU(nn.Module):
    """Recursive gated unit: a feature map that is gated by what it makes of itself.

    ::

        k, v = A_k x, A_v x
        y = A_y (GELU(IN(k * A_q v)) + p)

    A are 1 x 1 convolutions, IN standardizes each channel of each example, p is one learned number per place.

    Args:
        channels: C.
        size: height and width, a number or two.

    Input and output (B, C, *size).

    Raises:
        ValueError: an argument out of range.

    Source: H. Zhang, HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction, 2024, arXiv
    2401.17948.

    >>> import torch
    >>> from assay.nn.hyperzzw import RGU
    >>> RGU(16, 8)(torch.randn(2, 16, 8, 8)).shape
    torch.Size([2, 16, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        size: int | tuple[int, int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = (size, size) if isinstance(size, int) else tuple(size)
        in_range("channels", channels, channels >= 1, ">= 1")
        in_range("size", size, len(sizes) == 2 and min(sizes) >= 1, ">= 1")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.k, self.v, self.q, self.y = (nn.Conv2d(channels, channels, 1, **factory) for _ in range(4))
        for conv in (self.k, self.v, self.q, self.y):
            nn.init.kaiming_uniform_(conv.weight, nonlinearity="linear")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        self.bias_p = nn.Parameter(torch.zeros(1, 1, *sizes, **factory))

    def forward(self, x: Tensor) -> Tensor:
        gated = standardized(self.k(x) * self.q(self.v(x)))
        return self.y(F.gelu(gated) + self.bias_p)


class HyperChannelInteraction(nn.Module):
    """Channel weights from a slow network along the channels: ``x * sigmoid((m * hk) * m)``, m the mean over pixels.

    Args:
        channels: C of an input (B, C, H, W).
        slow: keywords of :class:`SlowNet` (hidden is 32 here); device and dtype too.

    Raises:
        ValueError: an argument out of range.

    Source: H. Zhang, HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction, 2024, arXiv
    2401.17948.

    >>> import torch
    >>> from assay.nn.hyperzzw import HyperChannelInteraction
    >>> HyperChannelInteraction(16)(torch.randn(2, 16, 8, 8)).shape
    torch.Size([2, 16, 8, 8])
    """

    def __init__(self, channels: int, **slow: Any) -> None:
        super().__init__()
        self.slow_net = SlowNet(1, channels, 1, **({"hidden": 32} | slow))

    def score(self, x: Tensor) -> Tensor:
        """``(m * hk) * m``, (B, C, 1, 1)."""
        return hyper_zzw_elementwise(self.slow_net().view(1, -1, 1, 1), x.mean((2, 3), keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.score(x).sigmoid()


class HyperInteraction(nn.Module):
    """Weights for channels and places of x, read from another map.

    ::

        channel = (m * hk) * m           m: mean of out over the pixels, hk: a slow network along the channels
        spatial = (s * hk') * s          s: mean of out over the channels, hk': a slow network over the places
        y = x * sigmoid(spatial * channel)

    Args:
        channels: C.
        size: height and width, a number or two.
        slow: keywords of both :class:`SlowNet` (hidden is 16 for the channels and 64 for the places here); device and
            dtype too.

    Inputs ``out`` and x, (B, C, *size); output of the same shape.

    Raises:
        ValueError: an argument out of range.

    Source: H. Zhang, HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction, 2024, arXiv
    2401.17948.

    >>> import torch
    >>> from assay.nn.hyperzzw import HyperInteraction
    >>> HyperInteraction(16, 8)(torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8)).shape
    torch.Size([2, 16, 8, 8])
    """

    def __init__(self, channels: int, size: int | tuple[int, int], **slow: Any) -> None:
        super().__init__()
        self.channel = HyperChannelInteraction(channels, **({"hidden": 16} | slow))
        self.slow_net = SlowNet(2, size, 1, **slow)

    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        spatial = hyper_zzw_elementwise(self.slow_net(), out.mean(1, keepdim=True))
        return x * (spatial * self.channel.score(out)).sigmoid()


class GroupIBS(nn.Module):
    """Standardize every other group of channels over the batch, and the rest over each example alone.

    The channels are cut into ``groups`` consecutive groups, as equal as they can be. Groups 0, 2, ... are batch
    normalized, groups 1, 3, ... instance normalized, both without affine map.

    Args:
        channels: C of an input (B, C, H, W).
        groups: >= 1; more than C count as C.
        batch_stats_eval: evaluate with the batch's statistics, as the author does.

    Raises:
        ValueError: an argument out of range.

    Source: H. Zhang, HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction, 2024, arXiv
    2401.17948.

    >>> import torch
    >>> from assay.nn.hyperzzw import GroupIBS
    >>> GroupIBS(24)(torch.randn(2, 24, 8, 8)).std().round()
    tensor(1.)
    """

    def __init__(
        self,
        channels: int,
        groups: int = 12,
        *,
        batch_stats_eval: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_range("channels", channels, channels >= 1, ">= 1")
        in_range("groups", groups, isinstance(groups, int) and groups >= 1, "an integer >= 1")
        self.groups = min(groups, channels)
        self.sizes = [len(part) for part in torch.arange(channels).tensor_split(self.groups)]
        self.norm = nn.BatchNorm2d(
            sum(self.sizes[::2]),
            affine=False,
            track_running_stats=not batch_stats_eval,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.sizes, 1)
        of_batch = self.norm(torch.cat(parts[::2], 1)).split(self.sizes[::2], 1)
        alone = [standardized(part) for part in parts[1::2]]
        return torch.cat([(alone if i % 2 else of_batch)[i // 2] for i in range(len(parts))], 1)

    def extra_repr(self) -> str:
        return f"{sum(self.sizes)}, groups={self.groups}"
