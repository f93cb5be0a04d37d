"""What frequency dynamic convolution reads from its input: factors for its kernels, and for the input's bands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay._checks import in_range


class StarReLU(nn.Module):
    """``scale * relu(t)^2 + bias`` with two learned numbers, at first 1 and 0."""

    def __init__(self, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros((), device=device, dtype=dtype))

    def forward(self, t: Tensor) -> Tensor:
        return self.scale * t.relu().square() + self.bias


class Modulation(NamedTuple):
    """The factors of :class:`KernelSpatialModulation`, for B examples; None where the layer has no such factor."""

    channel: Tensor
    """(B, Cin)"""
    filter: Tensor | None
    """(B, Cout)"""
    spatial: Tensor | None
    """(B, kh, kw)"""
    kernel: Tensor
    """(B, kernel_num)"""
    local: Tensor | None
    """(B, Cout, Cin / groups, kh, kw)"""


class KernelSpatialModulation(nn.Module):
    """The factors by which frequency dynamic convolution fits its kernel to an example, from the example's mean.

    With g the mean over the pixels, (B, Cin), and heads that start at (nearly) 0::

        feature = StarReLU(BN(A g))                                 StarReLU(t) = scale relu(t)^2 + bias
        channel, filter, spatial = att_multi * sigmoid(head(feature) / temperature)
        kernel  = 2 sigmoid(head(feature) / temperature) / kernel_num
        local   = att_multi * sigmoid(conv1d(LN(g)))                dense, from the neighbours of each channel

    So with ``att_multi`` 2 all factors are 1 at first, and those of the ``kernel_num`` kernels 1 / kernel_num. A batch
    of one example is normalized by the running statistics in training too: it has no variance.

    Args:
        in_channels, out_channels, kernel_size, groups: of the convolution. A depthwise one has no filter factor, one
            with a kernel of one pixel no spatial factor.
        kernel_num: number of kernels that are mixed, >= 1.
        reduction, min_channels: feature has max(int(in_channels * reduction), min_channels) entries.
        temperature: > 0.
        att_multi: > 0.
        local: have the local factor.
        act: "sigmoid"; "tanh" for 1 + tanh(.) in place of 2 sigmoid(.); "softmax" for kernel, sigmoid for the others.

    Input (B, Cin, H, W); output a named tuple :class:`Modulation`.

    Raises:
        ValueError: an argument out of range.

    Source: L. Chen et al., Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, arXiv 2503.18783.

    >>> import torch
    >>> from assay.nn import KernelSpatialModulation
    >>> factors = KernelSpatialModulation(32, 48, 3, kernel_num=4)(torch.randn(2, 32, 8, 8))
    >>> {name: tuple(factor.shape) for name, factor in factors._asdict().items()}  # doctest: +NORMALIZE_WHITESPACE
    {'channel': (2, 32), 'filter': (2, 48), 'spatial': (2, 3, 3), 'kernel': (2, 4), 'local': (2, 48, 32, 3, 3)}
    """

    heads: Any
    local: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        groups: int = 1,
        *,
        kernel_num: int = 4,
        reduction: float = 0.0625,
        min_channels: int = 16,
        temperature: float = 1.0,
        att_multi: float = 2.0,
        local: bool = True,
        act: str = "sigmoid",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        for name, number in (("in_channels", in_channels), ("out_channels", out_channels)):
            in_range(name, number, number >= 1 and number % groups == 0, f">= 1, a multiple of groups = {groups}")
        in_range("kernel_size", kernel_size, min(size) >= 1, ">= 1")
        in_range("kernel_num", kernel_num, isinstance(kernel_num, int) and kernel_num >= 1, "an integer >= 1")
        in_range("reduction", reduction, reduction > 0, "> 0")
        in_range("min_channels", min_channels, min_channels >= 1, ">= 1")
        in_range("temperature", temperature, temperature > 0, "> 0")
        in_range("att_multi", att_multi, att_multi > 0, "> 0")
        in_range("act", act, act in ("sigmoid", "tanh", "softmax"), "sigmoid, tanh or softmax")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.kernel_num = size, kernel_num
        self.temperature, self.att_multi, self.act = temperature, att_multi, act
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        features = max(int(in_channels * reduction), min_channels)
        self.reduce = nn.Linear(in_channels, features, bias=False, **factory)
        self.norm = nn.BatchNorm1d(features, **factory)
        self.act_feature = StarReLU(**factory)
        sizes = {"channel": in_channels, "filter": out_channels, "spatial": math.prod(size), "kernel": kernel_num}
        if in_channels == out_channels == groups:
            del sizes["filter"]
        if sizes["spatial"] == 1:
            del sizes["spatial"]
        self.heads = nn.ModuleDict({name: nn.Linear(features, size, **factory) for name, size in sizes.items()})
        self.local_norm: nn.LayerNorm | None = None
        self.register_parameter("local", None)
        if local:
            taps = round(math.log2(in_channels) / 2 + 0.5) // 2 * 2 + 1
            self.local_norm = nn.LayerNorm(in_channels, **factory)
            self.local = nn.Parameter(torch.empty(out_channels * math.prod(size), taps, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All factors at their first values, up to a millionth."""
        nn.init.kaiming_normal_(self.reduce.weight, mode="fan_out", nonlinearity="relu")
        for head in self.heads.values():
            nn.init.normal_(head.weight, std=1e-6)
            nn.init.zeros_(head.bias)
        self.norm.reset_parameters()
        nn.init.ones_(self.act_feature.scale)
        nn.init.zeros_(self.act_feature.bias)
        if self.local is not None and self.local_norm is not None:
            self.local_norm.reset_parameters()
            nn.init.constant_(self.local, 1e-6)

    def forward(self, x: Tensor) -> Modulation:
        mean = x.mean((2, 3))
        reduced = self.reduce(mean)
        norm = self.norm
        if self.training and x.shape[0] == 1:
            reduced = F.batch_norm(
                reduced, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
            )
        else:
            reduced = norm(reduced)
        feature = self.act_feature(reduced)
        logits = {name: head(feature) for name, head in self.heads.items()}
        scaled = {name: self._factor(logit / self.temperature) for name, logit in logits.items() if name != "kernel"}
        spatial = scaled.get("spatial")
        return Modulation(
            channel=scaled["channel"],
            filter=scaled.get("filter"),
            spatial=None if spatial is None else spatial.unflatten(1, self.kernel_size),
            kernel=self._shares(logits["kernel"] / self.temperature),
            local=None if self.local is None else self._factor(self._local(mean, self.local)),
        )

    def _factor(self, logit: Tensor) -> Tensor:
        return 1 + logit.tanh() if self.act == "tanh" else self.att_multi * logit.sigmoid()

    def _shares(self, logit: Tensor) -> Tensor:
        if self.act == "softmax":
            return logit.softmax(1)
        return (1 + logit.tanh() if self.act == "tanh" else 2 * logit.sigmoid()) / self.kernel_num

    def _local(self, mean: Tensor, local: Tensor) -> Tensor:
        """A convolution along the channels, of which each output sees only the channels of its own group."""
        assert self.local_norm is not None
        taps, groups = local.shape[1], self.groups
        windows = F.pad(self.local_norm(mean), (taps // 2, taps // 2)).unfold(1, taps, 1)  # (B, Cin, taps)
        windows = windows.unflatten(1, (groups, self.in_channels // groups))
        weight = local.unflatten(0, (groups, self.out_channels // groups, -1))
        logit = torch.einsum("bgis,goks->bgoik", windows, weight)
        return logit.flatten(1, 2).unflatten(3, self.kernel_size)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, groups={self.groups}, "
            f"kernel_num={self.kernel_num}, temperature={self.temperature}, att_multi={self.att_multi}, "
            f"local={self.local is not None}, act={self.act!r}"
        )


class FrequencyBandModulation(nn.Module):
    """Weigh the frequency bands of feature maps anew at every pixel.

    With low_0 = x, and low_i what is left of x below 1 / (2 r_i) cycles per pixel, r_i being the i-th of ``bands``::

        weight_i = 2 sigmoid(conv(x))_i                                         (groups maps, one per group of channels)
        y = sum_i weight_i * (low_(i-1) - low_i) + low_last

    A frequency is below t if max(|fy|, |fx|) < t. The convolution starts at (nearly) 0, and y = x. Half precision is
    computed in float32, also under autocast.

    Args:
        channels: C of an input (B, C, H, W).
        bands: integers > 1 in increasing order.
        groups: of channels that share their weights, a divisor of ``channels``.
        kernel_size: of the convolution, odd.

    Raises:
        ValueError: an argument out of range.

    Source: L. Chen et al., Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, arXiv 2503.18783.

    >>> import torch
    >>> from assay.nn import FrequencyBandModulation
    >>> x = torch.randn(2, 8, 16, 15)
    >>> bool(torch.allclose(FrequencyBandModulation(8)(x), x, atol=1e-4))
    True
    """

    def __init__(
        self,
        channels: int,
        bands: Sequence[int] = (2, 4, 8),
        groups: int = 1,
        kernel_size: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_range("channels", channels, channels >= 1, ">= 1")
        rising = all(isinstance(r, int) and r > 1 for r in bands) and list(bands) == sorted(set(bands))
        in_range("bands", bands, len(bands) > 0 and rising, "integers > 1 in increasing order")
        in_range("groups", groups, groups >= 1 and channels % groups == 0, f"a divisor of channels = {channels}")
        in_range("kernel_size", kernel_size, kernel_size >= 1 and kernel_size % 2 == 1, "odd and >= 1")
        self.bands = tuple(bands)
        self.weigh = nn.Conv2d(
            channels,
            groups * len(self.bands),
            kernel_size,
            padding=kernel_size // 2,
            groups=groups,
            device=device,
            dtype=dtype,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All weights 1, up to a millionth."""
        nn.init.normal_(self.weigh.weight, std=1e-6)
        if self.weigh.bias is not None:
            nn.init.zeros_(self.weigh.bias)

    def forward(self, x: Tensor) -> Tensor:
        shape, groups, dtype = x.shape, self.weigh.groups, torch.promote_types(x.dtype, torch.float32)
        weights = self.weigh(x).to(dtype).sigmoid().mul(2).unflatten(1, (groups, len(self.bands))).unsqueeze(3)
        weight = [*weights.unbind(2), 1]
        # The sum of the bands, ordered by low_i: every difference of weights is 0 at first, and y is x to the last bit.
        y = x.to(dtype).unflatten(1, (groups, -1)) * weight[0]
        for i, low in enumerate(self._lows(x.to(dtype)) if x.shape[0] else ()):  # torch transforms no empty tensors
            y = torch.addcmul(y, low.unflatten(1, (groups, -1)), weight[i + 1] - weight[i])
        return y.view(shape).to(x.dtype)

    def split(self, x: Tensor) -> list[Tensor]:
        """The bands of x from high to low, each of the shape of x; their sum is x."""
        lows = [x, *self._lows(x)]
        return [above - below for above, below in pairwise(lows)] + lows[-1:]

    def _lows(self, x: Tensor) -> list[Tensor]:
        height, width = x.shape[2:]
        spectrum = torch.fft.rfft2(x)
        row = torch.arange(height, device=x.device)
        row = torch.minimum(row, height - row).view(-1, 1)
        lows = []
        for r in self.bands:
            # In whole numbers, without rounding: j / width < 1 / (2 r). What the slice leaves out counts as 0.
            kept = spectrum[..., : -(-width // (2 * r))] * (row * 2 * r < height)
            lows.append(torch.fft.irfft(torch.fft.ifft(kept, dim=2), n=width, dim=3))
        return lows

    def extra_repr(self) -> str:
        return f"bands={self.bands}"
