"""The six EvoNorms: one layer each for a normalization and the activation after it."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay._checks import in_range


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Biased variance and mean of every map, over all dimensions after C: two tensors (B, C)."""
    if x.dim() == 2:
        return torch.zeros_like(x), x
    space = tuple(range(2, x.dim()))
    mean = x.mean(space, keepdim=True)
    # Outside of a compiled graph torch.var_mean takes nine times as long on a CPU.
    return (x - mean).square().mean(space), mean.flatten(1)


def pooled_variance(var: Tensor, mean: Tensor, dim: int) -> Tensor:
    """Biased variance of the values of several maps together, from that of each: the input is not read again."""
    return var.mean(dim) + (mean - mean.mean(dim, keepdim=True)).square().mean(dim)


def like_map(values: Tensor, x: Tensor) -> Tensor:
    """(C,) or (B, C) with dimensions of size 1 behind, to be combined with ``x``."""
    return values.to(x.dtype).view(*values.shape, *[1] * (x.dim() - 2))


def values_per_channel(x: Tensor) -> int:
    """B times the size of a map; refuses one value, of which there is no unbiased variance."""
    count = x.numel() // x.shape[1]
    if count == 1:
        raise ValueError(f"one value per channel in training: shape {tuple(x.shape)}")
    return count


@torch.no_grad()
def move_running_(running: Tensor, batch: Tensor, momentum: float, count: int) -> None:
    """``running <- (1 - momentum) running + momentum batch``, unless the batch is of no values."""
    if count:
        running.lerp_(batch.to(running.dtype), momentum)


class EvoLayer(nn.Module):
    """What all the layers share: ``weight`` and ``bias`` per channel, applied last, and arithmetic in float32."""

    _least_dim: ClassVar = 2
    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, num_features: int, nonlinear: bool, eps: float, factory: dict[str, Any]) -> None:
        super().__init__()
        in_range("num_features", num_features, num_features >= 1, ">= 1")
        in_range("eps", eps, 0 < eps < math.inf, "> 0 and finite")
        self.num_features, self.nonlinear, self.eps = num_features, nonlinear, eps
        self.weight = nn.Parameter(torch.ones(num_features, **factory))
        self.bias = nn.Parameter(torch.zeros(num_features, **factory))

    def _checked(self, input: Tensor) -> Tensor:
        """The input in at least float32."""
        if input.dim() < self._least_dim or input.shape[1] != self.num_features:
            wanted = "(B, C, *)" if self._least_dim == 2 else "(B, C, *) with at least one dimension after C,"
            raise ValueError(f"input of shape {tuple(input.shape)}: {wanted} with C = {self.num_features} is wanted")
        return input.to(torch.promote_types(input.dtype, torch.float32))

    def _affine(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """``scale x weight + bias``, with a scale of shape (B, C)."""
        weight = self.weight if scale is None else self.weight * scale
        return torch.addcmul(like_map(self.bias, x), x, like_map(weight, x))

    def extra_repr(self) -> str:
        return f"{self.num_features}, nonlinear={self.nonlinear}, eps={self.eps}"


class _Batch(EvoLayer):
    """B0 to B2, ``x / max(std of the batch, rival) weight + bias``: they differ in the rival."""

    _least_dim: ClassVar = 3
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        nonlinear: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(num_features, nonlinear, eps, factory)
        in_range("momentum", momentum, momentum is not None and 0 <= momentum <= 1, "[0, 1]")
        self.momentum = momentum
        self.register_buffer("running_var", torch.ones(num_features, **factory))

    def forward(self, input: Tensor) -> Tensor:
        x = self._checked(input)
        if self.nonlinear:
            var, mean = moments(x)
            std = (self._batch_variance(x, var, mean) + self.eps).sqrt()
            std, rival = like_map(std, x), self._rival(x, var, mean)
            # The larger of both, whose backward pass is several times as fast as that of torch.maximum.
            x = x / (std + F.relu(rival - std))
        return self._affine(x).to(input.dtype)

    def _batch_variance(self, x: Tensor, var: Tensor, mean: Tensor) -> Tensor:
        if not self.training:
            return self.running_var
        count, batch = values_per_channel(x), pooled_variance(var, mean, 0)
        move_running_(self.running_var, batch * (count / max(count - 1, 1)), self.momentum, count)
        return batch

    def _rival(self, x: Tensor, var: Tensor, mean: Tensor) -> Tensor:
        raise NotImplementedError

    def _rms(self, var: Tensor, mean: Tensor, x: Tensor) -> Tensor:
        return like_map((var + mean.square() + self.eps).sqrt(), x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, momentum={self.momentum}"


class EvoNormB0(_Batch):
    """EvoNorm B0, a batch-dependent layer in place of batch normalization and the activation after it.

    Per channel and element of an input x of shape (B, C, *), with no mean subtracted ::

        y = weight x / max(std_batch, v x + std_instance) + bias
        std_batch = sqrt(var over B and * + eps)     std_instance = sqrt(var over * of each sample + eps)

    The variances are biased. Evaluation takes ``running_var`` for that of the batch, which in training becomes
    ``(1 - momentum) running_var + momentum var``, with the unbiased variance; std_instance is always the input's own.

    Args:
        num_features: C >= 1.
        nonlinear: False where no activation followed the normalization (the end of a residual branch, a linear
            bottleneck): the layer is then ``weight x + bias``.
        momentum: weight of the batch in ``running_var``, in [0, 1].
        eps: > 0.

    ``weight`` (1), ``bias`` (0) and ``v`` (1), each of shape (C,), are learned; leave them out of weight decay.

    Raises:
        ValueError: an argument out of range; on input, a wrong shape, no dimension after C, or one value per channel
            in training.

    Source: H. Liu, A. Brock, K. Simonyan, Q. V. Le, Evolving Normalization-Activation Layers, NeurIPS 2020, arXiv
    2004.02967.

    >>> import torch
    >>> from assay.nn import EvoNormB0
    >>> norm = EvoNormB0(16)
    >>> norm(torch.randn(2, 16, 8, 8)).shape, norm.running_var.shape
    (torch.Size([2, 16, 8, 8]), torch.Size([16]))
    """

    v: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        nonlinear: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, nonlinear, momentum, eps, device, dtype)
        v = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype)) if nonlinear else None
        self.register_parameter("v", v)

    def _rival(self, x: Tensor, var: Tensor, mean: Tensor) -> Tensor:
        assert self.v is not None
        return torch.addcmul(like_map((var + self.eps).sqrt(), x), x, like_map(self.v, x))


class EvoNormB1(_Batch):
    """EvoNorm B1, ``y = weight x / max(std_batch, (x + 1) rms_instance) + bias``: see :class:`EvoNormB0`.

    ``rms_instance = sqrt(mean over * of x^2 + eps)``. Arguments are those of :class:`EvoNormB0`; there is no ``v``.

    >>> import torch
    >>> from assay.nn import EvoNormB1
    >>> EvoNormB1(16)(torch.randn(2, 16, 8, 8)).shape
    torch.Size([2, 16, 8, 8])
    """

    def _rival(self, x: Tensor, var: Tensor, mean: Tensor) -> Tensor:
        rms = self._rms(var, mean, x)
        return torch.addcmul(rms, x, rms)


class EvoNormB2(_Batch):
    """EvoNorm B2, ``y = weight x / max(std_batch, rms_instance - x) + bias``: see :class:`EvoNormB1`.

    >>> import torch
    >>> from assay.nn import EvoNormB2
    >>> EvoNormB2(16)(torch.randn(2, 16, 8, 8)).shape
    torch.Size([2, 16, 8, 8])
    """

    def _rival(self, x: Tensor, var: Tensor, mean: Tensor) -> Tensor:
        return self._rms(var, mean, x) - x


class _Sample(EvoLayer):
    """S0 to S2, ``x sigmoid(.) / (deviation of the group) weight + bias``."""

    _centred: ClassVar = True

    def __init__(
        self,
        num_features: int,
        groups: int = 32,
        group_size: int | None = None,
        nonlinear: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, nonlinear, eps, {"device": device, "dtype": dtype})
        allowed = f"a divisor of num_features = {num_features}"
        if group_size is not None:
            in_range("group_size", group_size, group_size >= 1 and num_features % group_size == 0, allowed)
            groups = num_features // group_size
        in_range("groups", groups, groups >= 1 and num_features % groups == 0, allowed)
        self.groups = groups

    def forward(self, input: Tensor) -> Tensor:
        x = self._checked(input)
        if not self.nonlinear:
            return self._affine(x).to(input.dtype)
        var, mean = (t.unflatten(1, (self.groups, self.num_features // self.groups)) for t in moments(x))
        spread = pooled_variance(var, mean, 2) if self._centred else (var + mean.square()).mean(2)
        scale = (spread + self.eps).rsqrt()[..., None].expand_as(mean).flatten(1)
        return self._affine(self._gated(x), scale).to(input.dtype)

    def _gated(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"


class EvoNormS0(_Sample):
    """EvoNorm S0, a layer in place of group normalization and the activation after it; samples do not meet.

    Per element of an input x of shape (B, C, *), with no mean subtracted and the same in training and evaluation ::

        y = weight x sigmoid(v x) / std_group + bias
        std_group = sqrt(biased var over the group's channels and * of each sample + eps)

    Args:
        num_features: C >= 1.
        groups: >= 1, a divisor of C.
        group_size: channels in a group, a divisor of C; overrides ``groups``.
        nonlinear: False where no activation followed the normalization: the layer is then ``weight x + bias``.
        eps: > 0.

    ``weight`` (1), ``bias`` (0) and ``v`` (1), each of shape (C,), are learned; leave them out of weight decay.

    Raises:
        ValueError: an argument out of range, or an input of another shape.

    Source: H. Liu, A. Brock, K. Simonyan, Q. V. Le, Evolving Normalization-Activation Layers, NeurIPS 2020, arXiv
    2004.02967.

    >>> import torch
    >>> from assay.nn import EvoNormS0
    >>> EvoNormS0(64, group_size=8)(torch.randn(2, 64, 8, 8)).shape
    torch.Size([2, 64, 8, 8])
    """

    v: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        groups: int = 32,
        group_size: int | None = None,
        nonlinear: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, groups, group_size, nonlinear, eps, device, dtype)
        v = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype)) if nonlinear else None
        self.register_parameter("v", v)

    def _gated(self, x: Tensor) -> Tensor:
        assert self.v is not None
        return x * torch.sigmoid(x * like_map(self.v, x))


class EvoNormS1(_Sample):
    """EvoNorm S1, ``y = weight x sigmoid(x) / std_group + bias``: see :class:`EvoNormS0`, which has the same arguments.

    >>> import torch
    >>> from assay.nn import EvoNormS1
    >>> EvoNormS1(64, groups=8)(torch.randn(2, 64, 8, 8)).shape
    torch.Size([2, 64, 8, 8])
    """


class EvoNormS2(_Sample):
    """EvoNorm S2, ``y = weight x sigmoid(x) / rms_group + bias``: see :class:`EvoNormS0`, which has the same arguments.

    ``rms_group = sqrt(mean of x^2 over the group's channels and * of each sample + eps)``.

    >>> import torch
    >>> from assay.nn import EvoNormS2
    >>> EvoNormS2(64, groups=8)(torch.randn(2, 64, 8, 8)).shape
    torch.Size([2, 64, 8, 8])
    """

    _centred: ClassVar = False


LAYERS: dict[str, type[EvoLayer]] = {
    layer.__name__.removeprefix("EvoNorm"): layer
    for layer in (EvoNormB0, EvoNormB1, EvoNormB2, EvoNormS0, EvoNormS1, EvoNormS2)
}


def evonorm(name: str, num_features: int, **kw: Any) -> nn.Module:
    """The EvoNorm of that name.

    Args:
        name: B0, B1, B2, S0, S1 or S2.
        num_features: C >= 1.
        kw: further arguments of the layer, :class:`EvoNormB0` or :class:`EvoNormS0` and so on.

    Raises:
        ValueError: an argument out of range.

    >>> from assay.nn import evonorm
    >>> evonorm("S0", 64, group_size=16)
    EvoNormS0(64, nonlinear=True, eps=1e-05, groups=4)
    """
    in_range("name", name, name in LAYERS, " or ".join(LAYERS))
    return LAYERS[name](num_features, **kw)
