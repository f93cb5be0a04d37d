"""The normalization as a function, with the regions given, and as layers, with a mask or a map of their own."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay._checks import in_range
from assay.nn._compiled import kept


def region_norm(
    x: Tensor,
    labels: Tensor,
    num_regions: int | None = None,
    statistics: str = "batch",
    eps: float = 1e-5,
    *,
    eps_mode: str = "plain",
) -> Tensor:
    """Normalize the pixels of each region by the mean and variance of that region alone.

    ::

        y = (x - mean_k) / sqrt(var_k + eps)        for the pixels of region k, per channel, var_k biased

    No pixel of another region has a say in what becomes of a region's own. A region without pixels adds nothing, one
    with a single pixel becomes 0. It is computed in float32 at least and returned in the dtype of ``x``.

    Args:
        x: shape (B, C, H, W).
        labels: boolean or integers in [0, num_regions), of shape (B, 1, H, W) or (B, C, H, W).
        num_regions: >= 1; None: 2 for boolean labels, else the largest label and one.
        statistics: "batch": of all examples together; "instance": of each.
        eps: > 0.
        eps_mode: "plain", as above; "reference": eps times all pixels over those of the region, as the authors' code.

    Raises:
        ValueError: an argument out of range, or labels of another shape.

    Source: T. Yu et al., Region Normalization for Image Inpainting, AAAI 2020, arXiv 1911.10375.

    >>> import torch
    >>> from assay.nn.functional import region_norm
    >>> x, hole = torch.tensor([1.0, 3.0, 100.0, 100.0]), torch.tensor([False, False, True, True])
    >>> region_norm(x.view(1, 1, 1, 4), hole.view(1, 1, 1, 4)).flatten()
    tensor([-1.0000,  1.0000,  0.0000,  0.0000])
    """
    in_range("statistics", statistics, statistics in ("batch", "instance"), "batch or instance")
    in_range("eps", eps, 0 < eps < math.inf, "> 0 and finite")
    in_range("eps_mode", eps_mode, eps_mode in ("plain", "reference"), "plain or reference")
    if x.dim() != 4 or labels.shape not in ((x.shape[0], 1, *x.shape[2:]), x.shape):
        raise ValueError(f"labels of shape {tuple(labels.shape)}: (B, 1, H, W) or that of x, {tuple(x.shape)}")
    if num_regions is None:
        num_regions = 2 if labels.dtype == torch.bool else int(labels.max()) + 1 if labels.numel() else 1
    in_range("num_regions", num_regions, num_regions >= 1, ">= 1")
    return _normalized(x, labels, num_regions, statistics, eps, eps_mode)


def _normalized(
    x: Tensor,
    labels: Tensor,
    num_regions: int,
    statistics: str,
    eps: float,
    eps_mode: str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The normalization, with a scale and a shift (C, regions) if given.

    The labels become tables (regions, pixels) of zeros and ones, one an example or, with labels by channel, one each.
    """
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    table = F.one_hot(labels.flatten(0, 1).flatten(1).long(), num_regions).mT
    (table,) = kept(table.to(values.dtype, memory_format=torch.contiguous_format))
    rows = values.reshape(table.shape[0], x.shape[1] // labels.shape[1], table.shape[2])

    def summed(each: Tensor) -> Tensor:
        """Over all examples, if they are taken together."""
        if statistics == "instance":
            return each
        by_example = each.view(x.shape[0], labels.shape[1] * each.shape[1], num_regions)
        return by_example.sum(0, keepdim=True).expand_as(by_example).reshape_as(each)

    count = summed(table.sum(2)[:, None]).clamp_min(1)
    deviation = rows - _spread(summed(_sums(rows, table)) / count, table)
    var = summed(_sums(deviation.square(), table)) / count
    pixels = math.prod(x.shape[2:]) * (x.shape[0] if statistics == "batch" else 1)
    least = eps if eps_mode == "plain" else eps * pixels / count
    scale = (var + least).rsqrt()
    if weight is None or bias is None:
        y = deviation * _spread(scale, table)
    else:
        y = torch.addcmul(_spread(bias[None].expand_as(scale), table), deviation, _spread(scale * weight, table))
    return y.view(x.shape).to(x.dtype)


_FEW = 4  # regions for which products by element are faster than products of matrices


def _sums(rows: Tensor, table: Tensor) -> Tensor:
    """Over the pixels (n, rows, pixels) of each region: (n, rows, regions)."""
    if table.shape[1] > _FEW:
        return _product(rows, table.mT)
    return torch.stack([(rows * region[:, None]).sum(2) for region in table.unbind(1)], 2)


def _spread(each: Tensor, table: Tensor) -> Tensor:
    """What each region has (n, rows, regions), at all of its pixels: (n, rows, pixels)."""
    if table.shape[1] > _FEW:
        return _product(each, table)
    parts = [a[..., None] * b[:, None] for a, b in zip(each.unbind(2), table.unbind(1), strict=True)]
    return sum(parts[1:], start=parts[0])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """In the precision of its factors, in the scope of an autocast too."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


class RegionNormB(nn.Module):
    """Region normalization of hole and valid pixels by a given mask, each with a scale and a shift of its own.

    ::

        y = region_norm(x, mask) (1 + gamma_k) + beta_k        on the pixels of region k, per channel

    with gamma and beta 0 at first. For the early layers of an inpainting network, where what is hole and what is not
    is known. Statistics are always those of the input, in evaluation too.

    Args:
        num_features: C.
        statistics, eps, eps_mode: as in :func:`assay.nn.functional.region_norm`.
        mask_beta: shift each region by its own beta; False: both regions by both, as the authors' code.

    Input (B, C, H, W) and a mask (B, 1, H0, W0), 1 in the hole, which is resized to H x W by the nearest pixel.

    Raises:
        ValueError: an argument out of range, or an input of another shape.

    Source: T. Yu et al., Region Normalization for Image Inpainting, AAAI 2020, arXiv 1911.10375.

    >>> import torch
    >>> from assay.nn import RegionNormB
    >>> mask = torch.zeros(2, 1, 32, 32)
    >>> mask[:, :, 8:16, 8:16] = 1
    >>> RegionNormB(6)(torch.randn(2, 6, 16, 16), mask).shape
    torch.Size([2, 6, 16, 16])
    """

    def __init__(
        self,
        num_features: int,
        statistics: str = "batch",
        eps: float = 1e-5,
        mask_beta: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        eps_mode: str = "plain",
    ) -> None:
        super().__init__()
        in_range("num_features", num_features, num_features >= 1, ">= 1")
        in_range("statistics", statistics, statistics in ("batch", "instance"), "batch or instance")
        in_range("eps", eps, 0 < eps < math.inf, "> 0 and finite")
        self.num_features, self.mask_beta = num_features, mask_beta
        self.options: dict[str, Any] = {"statistics": statistics, "eps": eps, "eps_mode": eps_mode}
        zeros = torch.zeros(4, num_features, device=device, dtype=dtype).unbind()
        self.foreground_gamma, self.foreground_beta = nn.Parameter(zeros[0].clone()), nn.Parameter(zeros[1].clone())
        self.background_gamma, self.background_beta = nn.Parameter(zeros[2].clone()), nn.Parameter(zeros[3].clone())

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        _check_channels(x, self.num_features)
        if mask.dim() != 4 or mask.shape[:2] != (x.shape[0], 1):
            raise ValueError(f"mask of shape {tuple(mask.shape)}: (B, 1, H, W) with B = {x.shape[0]} is wanted")
        same = mask.shape[2:] == x.shape[2:]
        hole = (mask if same else F.interpolate(mask.float(), x.shape[2:])) > 0.5
        dtype = torch.promote_types(x.dtype, torch.float32)
        gamma = torch.stack([self.background_gamma, self.foreground_gamma], 1).to(dtype)
        beta = torch.stack([self.background_beta, self.foreground_beta], 1).to(dtype)
        if not self.mask_beta:
            beta = beta.sum(1, keepdim=True).expand(-1, 2)
        return _normalized(x, hole, 2, **self.options, weight=1 + gamma, bias=beta)

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"{self.num_features}, mask_beta={self.mask_beta}{options}"


def _check_channels(x: Tensor, num_features: int) -> None:
    if x.dim() != 4 or x.shape[1] != num_features:
        raise ValueError(f"input of shape {tuple(x.shape)}: (B, C, H, W) with C = {num_features} is wanted")


class RegionNormL(nn.Module):
    """Region normalization by a map of its own, for layers in which the hole has begun to fill.

    ::

        s = sigmoid(conv([mean of x over channels, max of x over channels]))
        y = region_norm(x, s >= threshold) (1 + conv_gamma(s)) + conv_beta(s)

    No gradient passes through the threshold: the first convolution learns by the scale and the shift, which are the
    same for all channels.

    Args:
        num_features: C.
        threshold: any number; at 0 or below all is one region, above 1 too.
        kernel_size: odd, of the three convolutions.
        statistics, eps, eps_mode: as in :func:`assay.nn.functional.region_norm`.

    Input (B, C, H, W). ``last_region`` is the map (B, 1, H, W) of the last call that was not compiled.

    Raises:
        ValueError: an argument out of range, or an input of another shape.

    Source: T. Yu et al., Region Normalization for Image Inpainting, AAAI 2020, arXiv 1911.10375.

    >>> import torch
    >>> from assay.nn import RegionNormL
    >>> norm = RegionNormL(6)
    >>> norm(torch.randn(2, 6, 16, 16)).shape, norm.last_region.dtype
    (torch.Size([2, 6, 16, 16]), torch.bool)
    """

    last_region: Tensor | None

    def __init__(
        self,
        num_features: int,
        threshold: float = 0.8,
        kernel_size: int = 7,
        statistics: str = "batch",
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        eps_mode: str = "plain",
    ) -> None:
        super().__init__()
        in_range("num_features", num_features, num_features >= 1, ">= 1")
        in_range("threshold", threshold, not math.isnan(threshold), "a number")
        in_range("kernel_size", kernel_size, kernel_size >= 1 and kernel_size % 2 == 1, "an odd number")
        in_range("statistics", statistics, statistics in ("batch", "instance"), "batch or instance")
        in_range("eps", eps, 0 < eps < math.inf, "> 0 and finite")
        self.num_features, self.threshold = num_features, threshold
        self.options: dict[str, Any] = {"statistics": statistics, "eps": eps, "eps_mode": eps_mode}
        options: dict[str, Any] = {"padding": kernel_size // 2, "device": device, "dtype": dtype}
        self.conv = nn.Conv2d(2, 1, kernel_size, bias=False, **options)
        self.gamma_conv, self.beta_conv = (nn.Conv2d(1, 1, kernel_size, **options) for _ in range(2))
        self.last_region = None

    def forward(self, x: Tensor) -> Tensor:
        _check_channels(x, self.num_features)
        response = self.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()
        region = response.detach() >= self.threshold
        if not torch.compiler.is_compiling():
            self.last_region = region
        normed = region_norm(x, region, 2, **self.options)
        return (normed * (1 + self.gamma_conv(response)) + self.beta_conv(response)).to(x.dtype)

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"{self.num_features}, threshold={self.threshold}{options}"
