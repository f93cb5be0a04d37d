"""Frequency dynamic convolution: for every example a kernel of its own, mixed from parts of one weight's spectrum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay._checks import in_range
from assay.nn._swap import like, swap
from assay.nn.fdconv.modulation import FrequencyBandModulation, KernelSpatialModulation, Modulation

if TYPE_CHECKING:
    from assay.bench.recipe import Recipe, Run

__all__ = ["FDConv2d", "FrequencyBandModulation", "KernelSpatialModulation", "convert_to_fdconv", "fourier_groups"]

# Up to so many kernels are transformed each and then mixed; of more, the spectra are mixed for each example.
_FEW = 16


def fourier_groups(d1: int, d2: int, n: int) -> list[Tensor]:
    """Cut the half plane of a real d1 x d2 spectrum into ``n`` rings, about equal in size, from low to high frequency.

    The entries (y, x) of ``torch.fft.rfft2``, with y < d1 and x < d2 // 2 + 1, are sorted by sqrt(fy^2 + fx^2), fy
    and fx being in cycles per entry, and cut into consecutive pieces. Two entries that are one another's conjugates in
    the spectrum of a real matrix stay together (the piece gets one more), so that matrices with spectra in different
    rings are orthogonal.

    Args:
        d1, d2: >= 1.
        n: from 1 to the number of entries, d1 * (d2 // 2 + 1).

    Returns:
        n tensors of indices y * (d2 // 2 + 1) + x; every index is in one of them. Where there are hardly more entries
        than rings, one may be empty.

    Raises:
        ValueError: an argument out of range.

    >>> from assay.nn import fourier_groups
    >>> [group.tolist() for group in fourier_groups(4, 4, 3)]
    [[0, 1, 3, 9], [4, 10, 2, 6], [5, 11, 7, 8]]
    """
    for name, size in (("d1", d1), ("d2", d2)):
        in_range(name, size, isinstance(size, int) and size >= 1, "an integer >= 1")
    half = d2 // 2 + 1
    in_range("n", n, isinstance(n, int) and 1 <= n <= d1 * half, f"an integer in [1, {d1 * half}]")
    row, column = torch.arange(d1).repeat_interleave(half), torch.arange(half).repeat(d1)
    height = torch.minimum(row, d1 - row)
    # Whole numbers, so that equal radii are equal; among these an entry and its conjugate come one after the other.
    order = torch.argsort((height * half + column) * d1 + row)
    order = order[torch.argsort(((height * d2) ** 2 + (column * d1) ** 2)[order], stable=True)]
    alone = (column > 0) & (2 * column != d2)  # its conjugate is in the other half plane
    cuts = [len(part) for part in order.tensor_split(n)]
    groups, start, end = [], 0, 0
    for size in cuts:
        end += size
        last, following = order[max(end - 1, 0)], order[min(end, len(order) - 1)]
        paired = end < len(order) and not alone[last] and column[last] == column[following]
        stop = end + int(bool(paired and row[last] + row[following] == d1))
        groups.append(order[start:stop])
        start = stop
    return groups


class FDConv2d(nn.Module):
    """A 2-d convolution that mixes a kernel for every example from rings of one weight's spectrum.

    The weight (Cout, Cin / groups, kh, kw), as a matrix of Cout * kh rows and Cin / groups * kw columns, is kept as its
    spectrum, whose entries are cut into ``kernel_num`` rings (:func:`fourier_groups`). For example b::

        channel, filter, spatial, kernel, local = KernelSpatialModulation(x_b)
        W_b = irfft2(alpha * sum_i kernel_i * (spectrum in ring i)) * channel * filter * spatial * local
        y_b = conv2d(FrequencyBandModulation(x)_b, W_b) + bias
        alpha = (min(Cin, Cout) // 2) * kernel_num * param_ratio / param_reduction

    All factors start at the values with which W_b is the weight and y the plain convolution.

    Args:
        in_channels ... padding_mode: as in ``torch.nn.Conv2d``.
        kernel_num: number of rings, >= 1.
        reduction, min_channels, temperature, att_multi: see :class:`KernelSpatialModulation`.
        param_ratio: number of spectra that are mixed, each with factors of its own for its rings, >= 1.
        param_reduction: share of the entries that is kept, those of lowest frequency, in (0, 1]. Below 1 the layer
            starts with the low frequencies of the weight.
        ksm_local: have the factor ``local``.
        ksm_act: "sigmoid", "tanh" or "softmax".
        fbm: weigh the bands of x if the kernel is 3 x 3; fbm_bands, fbm_groups and fbm_kernel are the settings of
            :class:`FrequencyBandModulation`.

    Input (B, Cin, H, W) or (Cin, H, W), output as of ``torch.nn.Conv2d``. ``dft_weight``, the parameter, has real
    pairs: (param_ratio, Cout * kh, Cin / groups * kw // 2 + 1, 2), or with ``param_reduction`` below 1 (param_ratio,
    kept, 2), in the order of the frequencies.

    Raises:
        ValueError: an argument out of range.

    Source: L. Chen et al., Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, arXiv 2503.18783.

    >>> import torch
    >>> from assay.nn import FDConv2d
    >>> conv = torch.nn.Conv2d(32, 48, 3, stride=2, padding=1)
    >>> layer, x = FDConv2d.from_conv(conv, kernel_num=8), torch.randn(2, 32, 16, 16)
    >>> bool(torch.allclose(layer(x), conv(x), atol=1e-3)), layer.materialize(x).shape
    (True, torch.Size([2, 48, 32, 3, 3]))
    """

    bias: nn.Parameter | None
    kernel_size: tuple[int, int]
    indices: Tensor
    ring: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        kernel_num: int = 4,
        reduction: float = 0.0625,
        min_channels: int = 16,
        temperature: float = 1.0,
        att_multi: float = 2.0,
        param_ratio: int = 1,
        param_reduction: float = 1.0,
        ksm_local: bool = True,
        ksm_act: str = "sigmoid",
        fbm: bool = True,
        fbm_bands: Sequence[int] = (2, 4, 8),
        fbm_groups: int = 1,
        fbm_kernel: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        # Torch's own layer checks its arguments and brings them into their usual form.
        mode: Any = padding_mode
        plain: Any = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, mode, **factory
        )
        for name, count in (("kernel_num", kernel_num), ("param_ratio", param_ratio)):
            in_range(name, count, isinstance(count, int) and count >= 1, "an integer >= 1")
        in_range("param_reduction", param_reduction, 0 < param_reduction <= 1, "(0, 1]")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = plain.kernel_size, plain.stride, plain.dilation
        self.padding, self.padding_mode = plain.padding, padding_mode
        self.kernel_num, self.param_ratio, self.param_reduction = kernel_num, param_ratio, param_reduction
        self._pad = tuple(plain._reversed_padding_repeated_twice)  # as F.pad wants it
        rows, columns = self._matrix
        entries = rows * (columns // 2 + 1)
        kept = int(entries * param_reduction)
        in_range("kernel_num", kernel_num, kernel_num <= kept, f"an integer in [1, {kept}], the number of frequencies")
        self.alpha = self._unit * kernel_num * param_ratio / param_reduction
        shape = (rows, columns // 2 + 1) if param_reduction == 1 else (kept,)
        self.dft_weight = nn.Parameter(torch.empty(param_ratio, *shape, 2, **factory))
        self.register_parameter("bias", plain.bias)
        for name, size in (("indices", kept), ("ring", entries)):  # made from the sizes: no part of the state
            self.register_buffer(name, torch.empty(size, dtype=torch.long, device=device), persistent=False)
        self.ksm = KernelSpatialModulation(
            in_channels,
            out_channels,
            self.kernel_size,
            groups,
            kernel_num=kernel_num * param_ratio,
            reduction=reduction,
            min_channels=min_channels,
            temperature=temperature,
            att_multi=att_multi,
            local=ksm_local,
            act=ksm_act,
            **factory,
        )
        self.fbm = None
        if fbm and self.kernel_size == (3, 3):
            self.fbm = FrequencyBandModulation(in_channels, fbm_bands, fbm_groups, fbm_kernel, **factory)
        self._set_rings()
        self.set_weight_(plain.weight)

    @property
    def _matrix(self) -> tuple[int, int]:
        return self.out_channels * self.kernel_size[0], self.in_channels // self.groups * self.kernel_size[1]

    @property
    def _unit(self) -> int:
        return max(1, min(self.in_channels, self.out_channels) // 2)

    def _set_rings(self) -> None:
        parts = list(torch.cat(fourier_groups(*self._matrix, 1))[: len(self.indices)].tensor_split(self.kernel_num))
        if self.param_reduction == 1:
            parts = fourier_groups(*self._matrix, self.kernel_num)
        order = torch.cat(parts)
        ring = torch.full((len(self.ring),), self.kernel_num)  # a number that no ring has: left out
        ring[order] = torch.arange(self.kernel_num).repeat_interleave(torch.tensor([len(part) for part in parts]))
        self.indices.copy_(order)
        self.ring.copy_(ring)

    def reset_parameters(self) -> None:
        """The weight and bias of a fresh ``torch.nn.Conv2d``, and all factors at their first values."""
        weight = self.dft_weight.new_empty(self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        plain = nn.Conv2d(1, 1, 1, bias=False, device="meta")
        plain.weight, plain.bias = nn.Parameter(weight), self.bias
        plain.reset_parameters()
        self._set_rings()
        self.set_weight_(plain.weight)
        self.ksm.reset_parameters()
        if self.fbm is not None:
            self.fbm.reset_parameters()

    @torch.no_grad()
    def set_weight_(self, weight: Tensor) -> None:
        """Take the spectrum of a plain convolution's weight (Cout, Cin / groups, kh, kw)."""
        matrix = weight.transpose(1, 2).reshape(self._matrix)
        spectrum = torch.view_as_real(torch.fft.rfft2(matrix.to(torch.promote_types(matrix.dtype, torch.float32))))
        if self.param_reduction < 1:
            spectrum = spectrum.flatten(0, 1)[self.indices] * self.param_reduction
        self.dft_weight.copy_((spectrum / (self._unit * self.param_ratio)).expand_as(self.dft_weight))

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **kw: Any) -> FDConv2d:
        """The layer that starts as the function of ``conv``, with its bias as the same parameter.

        Args:
            conv: a ``torch.nn.Conv2d``; if its parameters are frozen, those of the new layer are.
            kw: the keywords of the class, kernel_num and so on.

        Raises:
            ValueError: ``conv`` is none, or a keyword is out of range.
        """
        in_range("conv", conv, isinstance(conv, nn.Conv2d), "a torch.nn.Conv2d")
        layer = like(conv, cls, **kw)
        assert isinstance(layer, cls)
        layer.set_weight_(conv.weight)
        return layer.train(conv.training)

    def materialize(self, x: Tensor) -> Tensor:
        """The kernels (B, Cout, Cin / groups, kh, kw) that the layer has for x (B, Cin, H, W)."""
        return self._kernels(self.ksm(x), folded=True)

    def _kernels(self, factors: Modulation, folded: bool) -> Tensor:
        """W_b, or, if not ``folded``, without its factors ``channel`` and ``filter``."""
        weight = self._mixed(factors.kernel)
        if factors.local is not None:
            weight = weight * factors.local
        batch, groups = weight.shape[0], self.groups
        small = None if factors.spatial is None else factors.spatial.view(batch, 1, 1, 1, *self.kernel_size)
        if folded:
            channel = factors.channel.view(batch, groups, 1, -1, 1, 1)
            small = channel if small is None else channel * small
        if small is not None:
            weight = (weight.unflatten(1, (groups, -1)) * small).flatten(1, 2)
        if folded and factors.filter is not None:
            weight = weight * factors.filter.view(batch, -1, 1, 1, 1)
        return weight

    def _mixed(self, shares: Tensor) -> Tensor:
        """irfft2 of the mixed spectrum, (B, Cout, Cin / groups, kh, kw)."""
        rows, columns = self._matrix
        dft = self.dft_weight.to(torch.promote_types(self.dft_weight.dtype, torch.float32))
        shares = self.alpha * shares.to(dft.dtype)
        if self.param_reduction < 1:
            dft = dft.new_zeros(self.param_ratio, len(self.ring), 2).index_copy(1, self.indices, dft)
        dft = dft.view(self.param_ratio, -1, 2)
        if self.kernel_num * self.param_ratio <= _FEW:
            each = torch.arange(self.kernel_num, device=dft.device).view(1, -1, 1, 1)
            spectrum = (dft.unsqueeze(1) * (self.ring.view(1, 1, -1, 1) == each)).flatten(0, 1)
            spectrum = torch.view_as_complex(spectrum.view(-1, rows, columns // 2 + 1, 2))
            kernels = torch.fft.irfft2(spectrum, s=(rows, columns))
            weight = (shares @ kernels.flatten(1)).view(-1, rows, columns)
        else:
            each = F.pad(shares.unflatten(1, (self.param_ratio, -1)), (0, 1))  # 0 for what is in no ring
            spectrum = (each[:, :, self.ring, None] * dft).sum(1).view(-1, rows, columns // 2 + 1, 2)
            weight = torch.fft.irfft2(torch.view_as_complex(spectrum), s=(rows, columns))
        weight = weight.unflatten(2, (-1, self.kernel_size[1])).unflatten(1, (-1, self.kernel_size[0]))
        return weight.transpose(2, 3)

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 3:
            return self(input.unsqueeze(0)).squeeze(0)
        batch, _, height, width = input.shape
        if not batch:  # torch transforms no empty tensors; the convolution sees to the shape
            shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
            return self._convolve(input, input.new_zeros(shape), self.groups)
        factors = self.ksm(input)
        x = input if self.fbm is None else self.fbm(input)
        size = self.out_channels * self.in_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]
        folded = size < (self.in_channels + self.out_channels) * height * width
        weight = self._kernels(factors, folded)
        if not folded:
            x = x * factors.channel.view(batch, -1, 1, 1)
        y = self._each(x, weight.to(x.dtype))
        if not folded and factors.filter is not None:
            y = y * factors.filter.view(batch, -1, 1, 1)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)

    def _each(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve every example with its own kernel."""
        batch, _, height, width = x.shape
        if torch.compiler.is_exporting():
            # The groups below would fix the batch size of an exported program; a product of matrices does not.
            pads = (self._pad[2:], self._pad[:2])
            size = [
                (length + sum(pad) - dilation * (kernel - 1) - 1) // stride + 1
                for length, pad, dilation, kernel, stride in zip(
                    (height, width), pads, self.dilation, self.kernel_size, self.stride, strict=True
                )
            ]
            windows = F.unfold(self._padded(x), self.kernel_size, self.dilation, 0, self.stride)
            weight = weight.flatten(2).unflatten(1, (self.groups, -1))
            return (weight @ windows.unflatten(1, (self.groups, -1))).flatten(1, 2).unflatten(2, size)
        y = self._convolve(x.reshape(1, -1, height, width), weight.flatten(0, 1), batch * self.groups)
        return y.view(batch, self.out_channels, *y.shape[2:])

    def _convolve(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        if self.padding_mode == "zeros":
            return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, groups)
        return F.conv2d(self._padded(x), weight, None, self.stride, 0, self.dilation, groups)

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, self._pad, "constant" if self.padding_mode == "zeros" else self.padding_mode)

    def extra_repr(self) -> str:
        said = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, usual in (
            ("padding", (0, 0)),
            ("dilation", (1, 1)),
            ("groups", 1),
            ("padding_mode", "zeros"),
            ("param_ratio", 1),
            ("param_reduction", 1),
        ):
            if getattr(self, name) != usual:
                said += f", {name}={getattr(self, name)!r}"
        return f"{said}, bias={self.bias is not None}, kernel_num={self.kernel_num}"


def convert_to_fdconv(
    model: nn.Module, predicate: Callable[[str, nn.Conv2d], bool] | None = None, **kw: Any
) -> nn.Module:
    """Replace convolutions of ``model``, in place, by :class:`FDConv2d` layers that start as the same functions.

    Make the optimizer afterwards: only the biases stay the same parameters.

    Args:
        model: if it is itself a convolution, use what is returned.
        predicate: which to replace, from a layer's dotted name and the layer; None: those with more than 16 channels
            on either side and a kernel of 1 x 1 or 3 x 3.
        kw: the keywords of the class, kernel_num and so on.

    Returns:
        ``model``, or its replacement if it was itself a convolution.

    Warns:
        NoEffectWarning: none was replaced.

    >>> from torch import nn
    >>> from assay.nn import convert_to_fdconv
    >>> model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    >>> [type(layer).__name__ for layer in convert_to_fdconv(model)]
    ['Conv2d', 'ReLU', 'FDConv2d']
    """
    wanted = predicate or _usual

    def converted(name: str, conv: nn.Conv2d) -> nn.Module:
        return FDConv2d.from_conv(conv, **kw) if wanted(name, conv) else conv

    return swap(model, nn.Conv2d, converted)


def _usual(name: str, conv: nn.Conv2d) -> bool:
    return min(conv.in_channels, conv.out_channels) > 16 and conv.kernel_size in ((1, 1), (3, 3))


def apply(recipe: Recipe, *, kernel_num: int = 4) -> Recipe:
    """The recipe with frequency dynamic convolutions for those of its model that :func:`convert_to_fdconv` takes."""
    in_range("kernel_num", kernel_num, isinstance(kernel_num, int) and kernel_num >= 1, "an integer >= 1")

    def model(run: Run) -> nn.Module:
        return convert_to_fdconv(recipe.model(run), kernel_num=kernel_num)

    return replace(recipe, model=model)
