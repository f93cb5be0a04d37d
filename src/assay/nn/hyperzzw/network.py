"""The slow-fast encoder block, the Terminator network, and the loss of its slow networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay._checks import in_range
from assay.nn.hyperzzw.operators import (
    RGU,
    GlobalHyperZZW,
    GroupIBS,
    HyperChannelInteraction,
    HyperInteraction,
    LocalHyperZZW,
    pointwise,
    standardized,
)


class SFNEBlock(nn.Module):
    """Slow-fast neural encoding: global and local branches side by side, then one 1 x 1 convolution; no residual.

    With IN a standardization of each channel of each example, and @ the product of :class:`GlobalHyperZZW`::

        context = x * K
        fast    = IN(RGU(context) + RGU'(x)),   mixed = IN(A x),   weighed = IN(HyperChannelInteraction(x))
        out     = context @ fast                and likewise context @ mixed, context @ weighed
        local   = LocalHyperZZW(x, weighed), (weighed, x), (mixed, x), (x, mixed)
        parts   = [out, the other products, fast, local, out * sigmoid(out), HyperInteraction(out, x), earlier features]
        y       = Dropout2d(GELU(GroupIBS(A' parts)) + bias)

    Args:
        in_channels: C.
        bottleneck_factor: the output has C * bottleneck_factor channels.
        size: height and width of the input.
        local_kernel_sizes: of the four local branches, odd.
        n_previous: number of earlier features, 0 to 2, that forward takes after x; their channels must divide C.
        dropout: in [0, 1).
        hidden, num_layers: of the slow network of K.
        local_hidden: of those of the local branches.
        omega_0: of all.
        batch_stats_eval: evaluate with the batch's statistics, as the author does; not with one example, then.

    Input (B, C, size, size).

    Raises:
        ValueError: an argument out of range, or another number of earlier features.

    Source: H. Zhang, HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction, 2024, arXiv
    2401.17948.

    >>> import torch
    >>> from assay.nn.hyperzzw import SFNEBlock
    >>> SFNEBlock(3, 4, 8)(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 12, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        bottleneck_factor: int,
        size: int,
        local_kernel_sizes: Sequence[int] = (3, 9, 5, 7),
        n_previous: int = 0,
        dropout: float = 0.0,
        *,
        hidden: int = 64,
        num_layers: int = 2,
        local_hidden: int = 32,
        omega_0: float = 1.0,
        batch_stats_eval: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_range("bottleneck_factor", bottleneck_factor, bottleneck_factor >= 1, ">= 1")
        in_range("local_kernel_sizes", local_kernel_sizes, len(local_kernel_sizes) == 4, "four numbers")
        in_range("n_previous", n_previous, n_previous in (0, 1, 2), "0, 1 or 2")
        in_range("dropout", dropout, 0 <= dropout < 1, "[0, 1)")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        slow = {"omega_0": omega_0, **factory}
        outputs = in_channels * bottleneck_factor
        self.n_previous = n_previous
        self.zzw = GlobalHyperZZW(in_channels, size, hidden=hidden, num_layers=num_layers, **slow)
        self.rgu, self.rgu_slow = (RGU(in_channels, size, **factory) for _ in range(2))
        self.mixer = pointwise(in_channels, in_channels, factory)
        self.channel = HyperChannelInteraction(in_channels, **slow)
        self.hyper = HyperInteraction(in_channels, size, **slow)
        self.local = nn.ModuleList(
            LocalHyperZZW(in_channels, k, hidden=local_hidden, batch_stats_eval=batch_stats_eval, **slow)
            for k in local_kernel_sizes
        )
        self.bottleneck = pointwise(in_channels * (10 + n_previous), outputs, factory)
        self.norm = GroupIBS(outputs, batch_stats_eval=batch_stats_eval, **factory)
        self.dropout = nn.Dropout2d(dropout)
        self.bias = nn.Parameter(torch.zeros((), **factory))

    def hyper_kernel(self) -> Tensor:
        """K, (1, C, size, size), for :func:`slow_neural_loss`."""
        return self.zzw.slow_net()

    def forward(self, x: Tensor, *previous: Tensor) -> Tensor:
        if len(previous) != self.n_previous:
            raise ValueError(f"{len(previous)} earlier features: n_previous = {self.n_previous} are wanted")
        context = self.zzw.context(x)
        fast = standardized(self.rgu_slow(context) + self.rgu(x))
        mixed, weighed = standardized(self.mixer(x)), standardized(self.channel(x))
        out, out_mixed, out_weighed = context @ fast, context @ mixed, context @ weighed
        pairs = ((x, weighed), (weighed, x), (mixed, x), (x, mixed))
        local = [branch(*pair) for branch, pair in zip(self.local, pairs, strict=True)]
        earlier = [part.repeat(1, x.shape[1] // part.shape[1], 1, 1) for part in previous]
        parts = [out, local[1], *earlier[:1], fast, out_mixed, local[0], F.silu(out), local[2], out_weighed, local[3]]
        y = self.bottleneck(torch.cat([*parts, *earlier[1:], self.hyper(out, x)], 1))
        return self.dropout(F.gelu(self.norm(y)) + self.bias)


class Terminator(nn.Module):
    """An image classifier of :class:`SFNEBlock`, whose maps keep their size while the channels multiply.

    Beside its predecessor's output a block takes that of the second block before it, from the fifth on that of the
    third before it too. The last map's mean over the pixels goes into a linear layer.

    Args:
        num_classes: outputs.
        in_channels, size: of the images (B, in_channels, size, size).
        bottleneck_factors: by how much each block multiplies the channels.
        dropout: of each block.
        num_layers: of each block's large slow network; None: 3 in the first block, 2 in the others.
        block: further keywords of :class:`SFNEBlock`; device and dtype too.

    Raises:
        ValueError: an argument out of range.

    Source: H. Zhang, HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction, 2024, arXiv
    2401.17948.

    >>> import torch
    >>> from assay.nn.hyperzzw import Terminator
    >>> model = Terminator(10, in_channels=1, size=8, bottleneck_factors=(6, 3), dropout=(0, 0))
    >>> model(torch.randn(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        size: int = 32,
        bottleneck_factors: Sequence[int] = (4, 3, 2, 2, 2),
        dropout: Sequence[float] = (0, 0.05, 0.05, 0.05, 0.05),
        *,
        num_layers: Sequence[int] | None = None,
        **block: Any,
    ) -> None:
        super().__init__()
        count = len(bottleneck_factors)
        layers = [3, *[2] * (count - 1)] if num_layers is None else list(num_layers)
        in_range("num_classes", num_classes, num_classes >= 1, ">= 1")
        in_range("bottleneck_factors", bottleneck_factors, count >= 1, "at least one")
        in_range("dropout", dropout, len(dropout) == count, f"{count} numbers, one per block")
        in_range("num_layers", num_layers, len(layers) == count, f"{count} numbers, one per block")
        self.bottleneck_factors = tuple(bottleneck_factors)
        channels = [in_channels * math.prod(bottleneck_factors[:i]) for i in range(count + 1)]
        self.earlier = [[i - back for back in (2, 3)[: 1 + (i >= 4)]] if i >= 2 else [] for i in range(count)]
        self.blocks: Any = nn.ModuleList(
            SFNEBlock(
                channels[i],
                bottleneck_factors[i],
                size,
                n_previous=len(self.earlier[i]),
                dropout=dropout[i],
                num_layers=layers[i],
                **block,
            )
            for i in range(count)
        )
        factory = {name: block[name] for name in ("device", "dtype") if name in block}
        self.head = nn.Linear(channels[-1], num_classes, **factory)

    def hyper_kernels(self) -> list[Tensor]:
        """The large kernels of all blocks, for :func:`slow_neural_loss`."""
        return [block.hyper_kernel() for block in self.blocks]

    def forward(self, x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for block, earlier in zip(self.blocks, self.earlier, strict=True):
            x = block(x, *(outputs[i] for i in earlier))
            outputs.append(x)
        return self.head(x.mean((2, 3)))


def slow_neural_loss(kernels: Sequence[Tensor], factors: Sequence[int] | None = None, mode: str = "tile") -> Tensor:
    """How far the blocks' large kernels are from repeating one another: a loss for the slow networks alone.

    Over all pairs j < i, the sum of::

        mean((K_j repeated prod(factors[j:i]) times over the channels - K_i)^2)         mode "tile"
        mean((sum of K_j over the channels - sum of K_i over the channels)^2)           mode "channel_sum"

    Add it to the loss in training, ``loss + slow_neural_loss(model.hyper_kernels())``.

    Args:
        kernels: at least one, of shape (1, C_i, *size).
        factors: C_(i+1) / C_i of the blocks, at least one fewer than kernels; None: as the shapes say.
        mode: "tile" or "channel_sum".

    Raises:
        ValueError: an argument out of range.

    Source: H. Zhang, HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction, 2024, arXiv
    2401.17948.

    >>> import torch
    >>> from assay.nn.hyperzzw import slow_neural_loss
    >>> kernel = torch.randn(1, 2, 4, 4)
    >>> slow_neural_loss([kernel, kernel.repeat(1, 3, 1, 1)])
    tensor(0.)
    """
    in_range("mode", mode, mode in ("tile", "channel_sum"), "tile or channel_sum")
    in_range("kernels", kernels, len(kernels) >= 1, "at least one")
    if factors is None:
        factors = [after.shape[1] // before.shape[1] for before, after in pairwise(kernels)]
    in_range("factors", factors, len(factors) >= len(kernels) - 1, f"at least {len(kernels) - 1} numbers")
    loss = kernels[0].new_zeros(())
    for i, deep in enumerate(kernels):
        for j, shallow in enumerate(kernels[:i]):
            if mode == "channel_sum":
                loss = loss + F.mse_loss(shallow.sum(1), deep.sum(1))
            else:
                loss = loss + F.mse_loss(shallow.repeat(1, math.prod(factors[j:i]), *[1] * (deep.dim() - 2)), deep)
    return loss
