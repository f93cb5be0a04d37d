"""Batch group normalization: batch normalization whose statistics see as many instances as one asks for."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from assay.nn._swap import like, swap

if TYPE_CHECKING:
    from assay.bench.recipe import Recipe, Run


def batch_group_norm(
    x: Tensor,
    num_groups: int,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalize ``num_groups`` consecutive pieces of every example, each by one mean and variance over the batch.

    The D = C*H*W values of an example are taken channel by channel, in each row by row, and cut into G = ``num_groups``
    groups of S = D/G. Group g has one statistic over its N*S values in the batch; the affine map is per channel c::

        x_hat = (x - mean_g) / sqrt(var_g + eps)            mean_g, var_g (biased) over examples and group members
        y     = weight_c * x_hat + bias_c

    G = C is batch normalization. G < C pools C/G neighbouring channels, down to one statistic for the whole batch at
    G = 1. G > C cuts each channel into G/C bands of consecutive pixels.

    In training ``running_mean`` and ``running_var``, of shape (G,), become ``(1 - momentum) * running + momentum *
    batch``, with the unbiased variance; otherwise they take the place of the batch's. Float16 and bfloat16 inputs
    beside float32 statistics or weights are normalized in float32 and returned as they came.

    Args:
        x: shape (N, C, *), in any memory layout; the layout of the values in memory does not change the groups.
        num_groups: a divisor of D.
        weight, bias: shape (C,).
        training: use the batch's statistics, else the running ones.
        momentum: weight of the batch in the running statistics, in [0, 1].
        eps: added to the variance, > 0.

    Raises:
        ValueError: ``num_groups`` does not divide D; one value per group in training; no running statistics otherwise.

    Source: X.-Y. Zhou, J. Sun, N. Ye et al., Batch Group Normalization, 2020, arXiv 2012.02782.

    >>> import torch
    >>> from assay.nn.functional import batch_group_norm
    >>> batch_group_norm(torch.tensor([[1.0, 3.0, 5.0, 9.0]]), 2, training=True)
    tensor([[-1.0000,  1.0000, -1.0000,  1.0000]])
    """
    channels, values = x.shape[1], math.prod(x.shape[1:])
    if not isinstance(num_groups, int) or num_groups < 1 or values % num_groups:
        allowed = f"a divisor of D = {values}"
        raise ValueError(f"num_groups = {num_groups!r} is out of range: {allowed} (x: {tuple(x.shape)})")
    if training and x.shape[0] * (values // num_groups) == 1:
        raise ValueError(f"one value per group in training: shape {tuple(x.shape)} with num_groups = {num_groups}")
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError("running_mean and running_var are needed with training = False")
        if channels % num_groups == 0:
            mean, var = (s.repeat_interleave(channels // num_groups) for s in (running_mean, running_var))
            return F.batch_norm(x, mean, var, weight, bias, False, momentum, eps)
    if num_groups == channels:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)

    # Batch normalization of G "channels" of S "pixels" each: torch's kernel, its double backward and its compilation.
    dtype = x.dtype
    for tensor in (running_mean, weight):
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    groups = x.reshape(x.shape[0], num_groups, values // num_groups).to(dtype)
    y = F.batch_norm(groups, running_mean, running_var, None, None, training, momentum, eps).view(x.shape)
    per_channel = (channels, *[1] * (x.dim() - 2))
    if weight is not None:
        y = y * weight.view(per_channel)
    if bias is not None:
        y = y + bias.view(per_channel)
    return y.to(x.dtype, memory_format=_layout(x))


def _layout(x: Tensor) -> torch.memory_format:
    """The layout that batch normalization would return: channels last for an input that is so, else contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is not None and x.is_contiguous(memory_format=last) and not x.is_contiguous():
        return last
    return torch.contiguous_format


class _BatchGroupNorm(nn.Module):
    """What :class:`BatchGroupNorm1d`, ``2d`` and ``3d`` share; they differ in the shapes that they accept."""

    _shapes: ClassVar[dict[int, str]]
    _plain: ClassVar[type[nn.Module]]
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_groups = num_features if num_groups is None else num_groups
        for name, value in (("num_features", num_features), ("num_groups", num_groups)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} = {value!r} is out of range: an integer >= 1")
        if not eps > 0:
            raise ValueError(f"eps = {eps!r} is out of range: > 0")
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"momentum = {momentum!r} is out of range: [0, 1], or None for a cumulative average")
        self.num_features, self.num_groups, self.eps, self.momentum = num_features, num_groups, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        self.positions: int | None = None  # pixels per channel in training, kept where the groups depend on it
        empty = partial(torch.empty, device=device, dtype=dtype)
        for name in ("weight", "bias"):
            self.register_parameter(name, nn.Parameter(empty(num_features)) if affine else None)
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, empty(num_groups) if track_running_stats else None)
        count = torch.tensor(0, dtype=torch.long, device=device) if track_running_stats else None
        self.register_buffer("num_batches_tracked", count)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Forget what was seen in training: mean 0, variance 1, no batches."""
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()
            self.positions = None

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, running statistics forgotten."""
        self.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        self._check(input)
        mean, var, count = self.running_mean, self.running_var, self.num_batches_tracked
        if not self.training or mean is None or var is None or count is None:
            return self._normalize(input, mean, var, self.training or mean is None)
        count.add_(1)
        if self.momentum is not None:
            return self._normalize(input, mean, var, True, self.momentum)
        # A share that is a tensor, not a number read back from the device, keeps the compiled graph whole.
        batch_mean, batch_var = mean.clone(), var.clone()
        output = self._normalize(input, batch_mean, batch_var, True, 1.0)
        for running, batch in ((mean, batch_mean), (var, batch_var)):
            running.lerp_(batch, 1 / count.to(running.dtype))
        return output

    def _normalize(
        self, input: Tensor, mean: Tensor | None, var: Tensor | None, training: bool, momentum: float = 0.0
    ) -> Tensor:
        return batch_group_norm(input, self.num_groups, mean, var, self.weight, self.bias, training, momentum, self.eps)

    def _check(self, input: Tensor) -> None:
        """Refuse a wrong shape, and pixels that are not those of training where the groups depend on their number."""
        if input.dim() not in self._shapes or input.shape[1] != self.num_features:
            shapes = " or ".join(self._shapes.values())
            raise ValueError(f"input of shape {tuple(input.shape)}: {shapes} with C = {self.num_features} is wanted")
        if self.running_mean is None or self.num_features % self.num_groups == 0:
            return
        positions = math.prod(input.shape[2:])
        if self.training:
            self.positions = positions
        elif self.positions not in (None, positions):
            raise ValueError(
                f"num_groups = {self.num_groups} cuts channels of {self.positions} pixels in training; the running "
                f"statistics mean nothing for the {positions} pixels of an input of shape {tuple(input.shape)}"
            )

    def to_batchnorm(self) -> nn.Module:
        """The ``torch.nn.BatchNorm`` that computes the same in evaluation, for fusing, quantizing and exporting.

        Every channel gets a copy of its group's running statistics.

        Raises:
            ValueError: ``num_groups`` does not divide ``num_features``, or there are no running statistics.
        """
        if self.num_features % self.num_groups:
            allowed = f"a divisor of num_features = {self.num_features}"
            raise ValueError(f"num_groups = {self.num_groups} is out of range: {allowed}")
        if self.running_mean is None:
            raise ValueError("track_running_stats = False: no running statistics to give to the BatchNorm")
        plain = like(copy.deepcopy(self), self._plain)
        each = self.num_features // self.num_groups
        for name, statistic in self.named_buffers():
            setattr(plain, name, statistic.repeat_interleave(each) if statistic.dim() else statistic.clone())
        return plain.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, num_groups={self.num_groups}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, track_running_stats={self.track_running_stats}"
        )


class BatchGroupNorm1d(_BatchGroupNorm):
    """Batch group normalization of (N, C) or (N, C, L): see :class:`BatchGroupNorm2d`, which has the same arguments.

    >>> import torch
    >>> from assay.nn import BatchGroupNorm1d
    >>> BatchGroupNorm1d(64, num_groups=4)(torch.randn(2, 64)).shape  # 32 values per statistic, batch norm has 2
    torch.Size([2, 64])
    """

    _shapes: ClassVar = {2: "(N, C)", 3: "(N, C, L)"}
    _plain: ClassVar = nn.BatchNorm1d


class BatchGroupNorm2d(_BatchGroupNorm):
    """Batch normalization whose ``num_groups`` says how many values share a statistic, in place of ``BatchNorm2d``.

    The D = C*H*W values of an example, channel by channel and in each row by row, are cut into G = ``num_groups``
    groups of S = D/G; each group has one mean and one variance over N*S values of the batch::

        y = weight_c * (x - mean_g) / sqrt(var_g + eps) + bias_c        per channel c, in group g

    Training uses the batch's statistics and moves the running ones, evaluation uses the running ones, as in
    ``torch.nn.BatchNorm2d``, which this is at G = C. Small batches want a small G, very large ones a G above C, where
    each channel is cut into G/C bands of pixels: :func:`suggest_groups`.

    Args:
        num_features: C of an input (N, C, H, W).
        num_groups: G >= 1, a divisor of C*H*W; None means C.
        eps: added to the variance, > 0.
        momentum: weight of the batch in the running statistics, in [0, 1]; None for the average over all batches.
        affine: learn ``weight`` and ``bias``, of shape (C,).
        track_running_stats: keep ``running_mean`` and ``running_var``, of shape (G,); without them evaluation uses
            the batch's statistics too.

    Raises:
        ValueError: an argument out of range; on input, a wrong shape, a G that does not divide C*H*W, a batch with one
            value per group in training, or, where G does not divide C, other than training's H*W in evaluation.

    Source: X.-Y. Zhou, J. Sun, N. Ye et al., Batch Group Normalization, 2020, arXiv 2012.02782.

    >>> import torch
    >>> from assay.nn import BatchGroupNorm2d
    >>> norm = BatchGroupNorm2d(16, num_groups=4)
    >>> norm(torch.randn(2, 16, 8, 8)).shape, norm.running_mean.shape
    (torch.Size([2, 16, 8, 8]), torch.Size([4]))
    """

    _shapes: ClassVar = {4: "(N, C, H, W)"}
    _plain: ClassVar = nn.BatchNorm2d


class BatchGroupNorm3d(_BatchGroupNorm):
    """Batch group normalization of (N, C, D, H, W): see :class:`BatchGroupNorm2d`, which has the same arguments.

    >>> import torch
    >>> from assay.nn import BatchGroupNorm3d
    >>> BatchGroupNorm3d(8, num_groups=2)(torch.randn(2, 8, 3, 4, 4)).shape
    torch.Size([2, 8, 3, 4, 4])
    """

    _shapes: ClassVar = {5: "(N, C, D, H, W)"}
    _plain: ClassVar = nn.BatchNorm3d


def suggest_groups(
    batch_size: int,
    num_features: int,
    spatial: int | Sequence[int] | None = None,
    target_instances: int | None = None,
) -> int:
    """The number of groups that gives a statistic about ``target_instances`` values, with whole channels or bands.

    Of the divisors of C, and with ``spatial`` also C times the divisors of H*W, the G for which N*C*H*W / G is nearest
    to the target in ratio; of two equally near, the smaller, which has more values.

    Args:
        batch_size: N >= 1, examples per worker and step.
        num_features: C >= 1.
        spatial: H*W, or (H, W) and the like; None for none or unknown, which keeps G at C or below.
        target_instances: >= 1; by default what batch normalization has in this layer at batch size 32.

    Raises:
        ValueError: an argument out of range.

    >>> from assay.nn import suggest_groups
    >>> [suggest_groups(batch_size, 64) for batch_size in (2, 8, 32, 128)]
    [4, 16, 64, 64]
    >>> suggest_groups(128, 64, spatial=(8, 8))
    256
    """
    positions = 1 if spatial is None else spatial if isinstance(spatial, int) else math.prod(spatial)
    target = 32 * positions if target_instances is None else target_instances
    sizes = {"batch_size": batch_size, "num_features": num_features, "spatial": positions, "target_instances": target}
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} = {value!r} is out of range: an integer >= 1")
    groups = _divisors(num_features) + [num_features * bands for bands in _divisors(positions)[1:]]
    wanted = batch_size * num_features * positions / target
    return min(groups, key=lambda number: abs(math.log(number / wanted)))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def convert_batchnorm_(module: nn.Module, num_groups: int | Callable[[str, int], int]) -> nn.Module:
    """Replace every ``BatchNorm1d``, ``2d`` and ``3d`` in ``module``, in place, by batch group normalization.

    The affine parameters stay the same objects. Running statistics are kept where G = C and start anew elsewhere, so
    a trained model needs some training steps (or forward passes in training mode) before it is evaluated.

    Args:
        module: the model; if it is itself a batch normalization, use what is returned.
        num_groups: G for all layers, or a function of a layer's dotted name and its number of features.

    Returns:
        ``module``, or its replacement if it was itself a batch normalization.

    Warns:
        NoEffectWarning: there is no batch normalization in ``module``.

    >>> from torch import nn
    >>> from assay.nn import convert_batchnorm_, suggest_groups
    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
    >>> convert_batchnorm_(model, lambda name, channels: suggest_groups(4, channels))[1].num_groups
    2
    """

    def converted(name: str, norm: Any) -> nn.Module:
        groups = num_groups(name, norm.num_features) if callable(num_groups) else num_groups
        return like(norm, _CONVERTED[type(norm)], num_groups=groups)

    return swap(module, tuple(_CONVERTED), converted)


_CONVERTED: dict[type[nn.Module], type[_BatchGroupNorm]] = {
    layer._plain: layer for layer in (BatchGroupNorm1d, BatchGroupNorm2d, BatchGroupNorm3d)
}


def apply(recipe: Recipe, *, num_groups: int | None = None, target_batch: int = 32) -> Recipe:
    """The recipe with batch group normalization wherever its model has batch normalization.

    Every layer gets ``num_groups`` groups or, by default, those that :func:`suggest_groups` finds for the batch size
    of the budget, so that a statistic has as many values as in batch normalization at batch size ``target_batch``.
    """
    for name, value in (("num_groups", num_groups), ("target_batch", target_batch)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} = {value!r} is out of range: an integer >= 1")

    def model(run: Run) -> nn.Module:
        network = recipe.model(run)
        positions = _positions(network, run.data) if num_groups is None else {}

        def groups(name: str, channels: int) -> int:
            pixels = positions.get(name, 1)
            return num_groups or suggest_groups(run.budget.batch_size, channels, pixels, target_batch * pixels)

        return convert_batchnorm_(network, groups)

    return replace(recipe, model=model)


@torch.no_grad()
def _positions(network: nn.Module, data: Any) -> dict[str, int]:
    """Pixels per channel at each batch normalization, seen by sending the first example through in eval mode."""
    probe = copy.deepcopy(network).eval()
    positions: dict[str, int] = {}

    def seen(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        positions[names[layer]] = math.prod(inputs[0].shape[2:])

    names = {layer: name for name, layer in probe.named_modules() if type(layer) in _CONVERTED}
    for layer in names:
        layer.register_forward_pre_hook(seen)
    probe(default_collate([data[0]])[0])
    return positions
