"""The tests that say whether a batch was large enough, from the gradients of its examples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

PerSample = Mapping[str, Tensor] | Sequence[Tensor] | Tensor
"""Gradients of b examples: tensors with b as first dimension, as ``per_sample_grads`` returns them."""

_BLOCK = 2**20  # elements of the largest temporary, unless one example's gradient is larger


class BatchTest(NamedTuple):
    """What a test found. Its condition is ``statistic / b <= tolerance``, see the test for both.

    ``size`` is b if the condition holds and otherwise the smallest batch size at which it would, were the statistic
    to stay as it is: an integer, or ``math.inf`` where the mean gradient is zero and no size would do.
    """

    size: float
    statistic: float
    mean_norm_sq: float
    passed: bool


class Moments(NamedTuple):
    """What the tests need to know of ``size`` per-sample gradients g_i with mean gbar.

    ``mean_sq`` is |gbar|^2, ``variance`` the sum over all coordinates of the variance of g_i, and ``inner_variance``
    the variance of <g_i, gbar>, or None if it was not asked for.
    """

    mean_sq: float
    variance: float
    size: int
    inner_variance: float | None = None


def gradient_moments(
    micro_batches: Iterable[PerSample], *, inner: bool = False, group: dist.ProcessGroup | None = None
) -> Moments:
    """Moments of the gradients of a batch that comes in micro-batches, and from all ranks of ``group``.

    By the law of total variance, for n examples in micro-batches of b_k with means m_k and sample variances V_k ::

        gbar     = sum_k b_k m_k / n
        variance = sum_k b_k V_k / n  +  sum_k b_k |m_k - gbar|^2 / n

    One micro-batch gives the plain sample variance (correction 1). The mean of a micro-batch and one block of
    gradients are all that is held beside the gradients, so a generator that makes the micro-batches one after the
    other needs the memory of one of them.

    Args:
        micro_batches: per-sample gradients of at least 2 examples each.
        inner: also find ``inner_variance``. The global mean must be known first, so the micro-batches are gone through
            twice: a list, not a generator.
        group: the process group whose ranks share the batch, such as ``torch.distributed.group.WORLD``; every rank
            must call. None means this process alone.

    Raises:
        ValueError: no micro-batch, one of fewer than 2 examples, tensors of different length, or ``inner`` with an
            iterator.

    Example:
        >>> import torch
        >>> from assay.optim import gradient_moments
        >>> one, two = torch.tensor([[1.0], [3.0]]), torch.tensor([[3.0], [5.0]])
        >>> gradient_moments([one, two])
        Moments(mean_sq=9.0, variance=3.0, size=4, inner_variance=None)
    """
    if inner and iter(micro_batches) is micro_batches:
        raise ValueError("micro_batches is an iterator, but inner=True goes through them twice: give a list")
    size, within, between = 0, 0.0, 0.0
    mean: list[Tensor] = []
    for grads in micro_batches:
        flat = _flat(grads)
        b = len(flat[0])
        found = [_mean_and_variance(g) for g in flat]
        within += b * _total(variance.sum() for _, variance in found)
        mean = mean or [m for m, _ in found]
        shift = [m - old for (m, _), old in zip(found, mean, strict=True)]
        mean = [old + d * (b / (size + b)) for old, d in zip(mean, shift, strict=True)]
        # Chan's update: no difference of large squares, and exactly zero for equal means.
        between += size * b / (size + b) * _norm_sq(shift)
        size += b
    if not size:
        raise ValueError("micro_batches is empty: at least one is needed")
    local_size, local_mean = size, mean
    if group is not None:
        (size,) = map(int, _sum_over_ranks([size], mean[0].device, group))
        mean = [m * (local_size / size) for m in mean]
        for m in mean:
            dist.all_reduce(m, group=group)
        between += local_size * _norm_sq([m - all_m for m, all_m in zip(local_mean, mean, strict=True)])
        within, between = _sum_over_ranks([within, between], mean[0].device, group)
    mean_sq, variance = _norm_sq(mean), (within + between) / size
    if not inner:
        return Moments(mean_sq, variance, size)
    scatter = 0.0
    for grads in micro_batches:
        along = _along(_flat(grads), mean)
        b = len(along)
        scatter += b * (along.var().item() + (along.mean().item() - mean_sq) ** 2)
    if group is not None:
        (scatter,) = _sum_over_ranks([scatter], mean[0].device, group)
    # Cauchy-Schwarz bounds it; rounding may not, and a residual variance below zero would follow.
    return Moments(mean_sq, variance, size, min(scatter / size, variance * mean_sq))


def norm_test(per_sample_grads: PerSample, eta: float = 0.1) -> BatchTest:
    """Is the batch's mean gradient within a relative error ``eta``, in expectation?

    For gradients g_i of b examples with mean gbar ::

        V = sum_j Var_i(g_ij)                       (sample variance, summed over all coordinates of all tensors)
        V / b <= eta^2 |gbar|^2,  else  size = ceil(V / (eta^2 |gbar|^2))

    Args:
        per_sample_grads: what :func:`per_sample_grads` returns, or a list of tensors or one tensor whose first
            dimension is b >= 2.
        eta: tolerance, > 0; the smaller, the larger the batches.

    Returns:
        :class:`BatchTest` with V as ``statistic``.

    Raises:
        ValueError: ``eta`` out of range, fewer than 2 examples, tensors of different length.

    Source: Byrd, Chin, Nocedal and Wu 2012; Lau, Liu and Kolar, arXiv 2402.11215, 2024.

    Example:
        >>> import torch
        >>> from assay.optim import norm_test
        >>> norm_test(torch.tensor([[1.0, 2.0], [3.0, -2.0]]), eta=0.5)
        BatchTest(size=10, statistic=10.0, mean_norm_sq=4.0, passed=False)
    """
    return judge("norm", gradient_moments([per_sample_grads]), eta=eta)


def inner_product_test(per_sample_grads: PerSample, theta: float = 0.1) -> BatchTest:
    """Do the examples' gradients agree in how far they go along the mean gradient?

    With the notation of :func:`norm_test` and <,> over all coordinates of all tensors ::

        V_ip = Var_i(<g_i, gbar>)
        V_ip / b <= theta^2 |gbar|^4,  else  size = ceil(V_ip / (theta^2 |gbar|^4))

    Args:
        per_sample_grads: as for :func:`norm_test`.
        theta: tolerance, > 0.

    Returns:
        :class:`BatchTest` with V_ip as ``statistic``.

    Source: Bollapragada, Byrd and Nocedal 2018; Lau, Liu and Kolar, arXiv 2402.11215, 2024.

    Example:
        >>> import torch
        >>> from assay.optim import inner_product_test
        >>> inner_product_test(torch.tensor([[1.0, 2.0], [3.0, -2.0]]), theta=0.5)
        BatchTest(size=2, statistic=8.0, mean_norm_sq=4.0, passed=True)
    """
    return judge("inner_product", gradient_moments([per_sample_grads], inner=True), theta=theta)


def orthogonality_test(per_sample_grads: PerSample, nu: float = 0.1) -> BatchTest:
    """Do the parts of the examples' gradients across the mean gradient cancel?

    With the notation of :func:`norm_test` ::

        r_i = g_i - (<g_i, gbar> / |gbar|^2) gbar,   V_o = sum_j Var_i(r_ij)  =  V - V_ip / |gbar|^2
        V_o / b <= nu^2 |gbar|^2,  else  size = ceil(V_o / (nu^2 |gbar|^2))

    Args:
        per_sample_grads: as for :func:`norm_test`.
        nu: tolerance, > 0.

    Returns:
        :class:`BatchTest` with V_o as ``statistic``.

    Source: Bollapragada, Byrd and Nocedal 2018; Lau, Liu and Kolar, arXiv 2402.11215, 2024.

    Example:
        >>> import torch
        >>> from assay.optim import orthogonality_test
        >>> orthogonality_test(torch.tensor([[1.0, 2.0], [3.0, -2.0]]), nu=0.5)
        BatchTest(size=8, statistic=8.0, mean_norm_sq=4.0, passed=False)
    """
    return judge("orthogonality", gradient_moments([per_sample_grads], inner=True), nu=nu)


def augmented_inner_product_test(per_sample_grads: PerSample, theta: float = 0.1, nu: float = 0.1) -> BatchTest:
    """The inner-product test and the orthogonality test at once: passed if both are, and the larger size.

    Args:
        per_sample_grads: as for :func:`norm_test`.
        theta: tolerance along the mean gradient, > 0.
        nu: tolerance across it, > 0.

    Returns:
        :class:`BatchTest` of the test that asks for the larger batch; the orthogonality test's if they agree.

    Source: Bollapragada, Byrd and Nocedal 2018; Lau, Liu and Kolar, arXiv 2402.11215, 2024.

    Example:
        >>> import torch
        >>> from assay.optim import augmented_inner_product_test
        >>> augmented_inner_product_test(torch.tensor([[1.0, 2.0], [3.0, -2.0]]), theta=0.1, nu=0.5).size
        50
    """
    return judge("augmented_inner_product", gradient_moments([per_sample_grads], inner=True), theta=theta, nu=nu)


def coordinate_norm_test(per_sample_grads: PerSample, eta: float = 0.1, quantile: float = 1.0) -> BatchTest:
    """The norm test on every coordinate by itself, which the analysis of AdaGrad asks for.

    With the notation of :func:`norm_test` ::

        R = quantile over j of  Var_i(g_ij) / gbar_j^2
        R / b <= eta^2,  else  size = ceil(R / eta^2)

    over the coordinates with gbar_j^2 above the smallest normal number, so that dead ones do not count. A coordinate
    whose mean is nearly zero asks for a nearly infinite batch: ``quantile`` below 1 leaves out the worst.

    Args:
        per_sample_grads: as for :func:`norm_test`.
        eta: tolerance, > 0.
        quantile: share of the coordinates that must pass, in (0, 1].

    Returns:
        :class:`BatchTest` with R as ``statistic``, the smallest ratio that a share ``quantile`` does not exceed.

    Raises:
        ValueError: as :func:`norm_test`, and ``quantile`` out of range.

    Source: Lau, Liu and Kolar, arXiv 2402.11215, 2024.

    Example:
        >>> import torch
        >>> from assay.optim import coordinate_norm_test
        >>> coordinate_norm_test(torch.tensor([[1.0, 2.0], [3.0, -1.0]]), eta=0.5).size
        72
        >>> coordinate_norm_test(torch.tensor([[1.0, 2.0], [3.0, -1.0]]), eta=0.5, quantile=0.5).size
        2
    """
    check_tolerance("eta", eta)
    check_quantile(quantile)
    flat = _flat(per_sample_grads)
    found = [_mean_and_variance(g) for g in flat]
    ratios = [(v / m.square())[~(m.square() <= torch.finfo(m.dtype).tiny)] for m, v in found]
    ratio = torch.cat([r.to(ratios[0]) for r in ratios])
    mean_sq = _norm_sq([m for m, _ in found])
    if not len(ratio):
        return BatchTest(math.inf, math.inf, mean_sq, False)
    # kthvalue puts NaN last and, unlike torch.quantile, knows no limit on the number of coordinates.
    statistic = ratio.kthvalue(max(1, math.ceil(quantile * len(ratio)))).values.item()
    return _verdict(Moments(mean_sq, math.nan, len(flat[0])), statistic, eta * eta)


def judge(test: str, moments: Moments, *, eta: float = 0.1, theta: float = 0.1, nu: float = 0.1) -> BatchTest:
    """The verdict of a test of :data:`MOMENT_TESTS` on moments; all but ``"norm"`` need ``inner_variance``."""
    for name, tolerance in (("eta", eta), ("theta", theta), ("nu", nu)):
        check_tolerance(name, tolerance)
    mean_sq, variance, _, inner = moments
    if test == "norm":
        return _verdict(moments, variance, eta * eta * mean_sq)
    if inner is None:
        raise ValueError(f"inner_variance = None: the {test} test needs the variance of <g_i, gbar>")
    along = _verdict(moments, inner, theta * theta * mean_sq * mean_sq)
    across = _verdict(moments, max(0.0, variance - inner / mean_sq) if mean_sq else variance, nu * nu * mean_sq)
    if test == "augmented_inner_product":
        return along if along.size > across.size else across
    return along if test == "inner_product" else across


MOMENT_TESTS = ("norm", "inner_product", "orthogonality", "augmented_inner_product")


def _verdict(moments: Moments, statistic: float, bound: float) -> BatchTest:
    """The test ``statistic / b <= bound``; gradients that are not finite say nothing, and the size stays."""
    b, mean_sq = moments.size, moments.mean_sq
    if not (math.isfinite(statistic) and math.isfinite(mean_sq)):
        return BatchTest(b, statistic, mean_sq, False)
    needed = statistic / bound if bound > 0 else math.inf
    if needed <= b:
        return BatchTest(b, statistic, mean_sq, True)
    return BatchTest(math.ceil(needed) if needed < math.inf else math.inf, statistic, mean_sq, False)


def check_tolerance(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} = {value!r} is out of range: a number > 0")


def check_quantile(value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"quantile = {value!r} is out of range: a number in (0, 1]")


def count_examples(grads: PerSample) -> int:
    """Number b of examples."""
    return len(_tensors(grads)[0])


def _tensors(grads: PerSample) -> list[Tensor]:
    if isinstance(grads, Tensor):
        return [grads]
    found = list(grads.values() if isinstance(grads, Mapping) else grads)
    if not found:
        raise ValueError("per_sample_grads is empty: at least one tensor is needed")
    return found


def _flat(grads: PerSample) -> list[Tensor]:
    """One real (b, n) matrix per tensor, a view where the layout allows it."""
    tensors = [t.detach() for t in _tensors(grads)]
    lengths = sorted({len(t) for t in tensors})
    if len(lengths) > 1 or lengths[0] < 2:
        raise ValueError(f"per_sample_grads holds {lengths} examples: one number, at least 2, is needed")
    real = (torch.view_as_real(t) if t.is_complex() else t for t in tensors)
    return [t.reshape(len(t), -1) for t in real]


def _mean_and_variance(g: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sample variance of the rows, in float32 at least, without a temporary of the size of ``g``."""
    dtype = torch.promote_types(g.dtype, torch.float32)
    blocks = g.split(max(1, _BLOCK // max(1, g.shape[1])))
    # Seen from the first row, equal rows have a variance of exactly zero.
    first = g[0].to(dtype)
    mean = first + sum((block - first).sum(0) for block in blocks) / len(g)
    scatter = sum((block - mean).square_().sum(0) for block in blocks)
    return mean, torch.as_tensor(scatter) / (len(g) - 1)


def _along(flat: list[Tensor], mean: list[Tensor]) -> Tensor:
    """<g_i, mean> for every example i, over all tensors, as float64 on the processor."""
    products = [
        torch.cat([block.to(m) @ m for block in g.split(max(1, _BLOCK // max(1, g.shape[1])))])
        for g, m in zip(flat, mean, strict=True)
    ]
    return torch.stack([p.cpu().double() for p in products]).sum(0)


def _norm_sq(tensors: list[Tensor]) -> float:
    return _total(t.square().sum() for t in tensors)


def _total(parts: Iterable[Tensor]) -> float:
    """Sum of 0-d tensors, with one wait for the device."""
    parts = list(parts)
    return math.fsum(torch.stack([part.to(parts[0].device) for part in parts]).tolist())


def _sum_over_ranks(values: list[float], device: torch.device, group: dist.ProcessGroup) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total, group=group)
    return total.tolist()
