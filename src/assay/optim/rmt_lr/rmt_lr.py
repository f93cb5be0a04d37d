"""Learning rates as a function of batch size: random-matrix rules, and a learner that reads them off the curvature."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from assay.optim._curvature import curvature_operator, lanczos, spectral_density
from assay.optim.rmt_lr.lanczos_lr import LanczosLR

__all__ = [
    "LanczosLR",
    "NoiseEstimate",
    "batch_eigenvalue",
    "critical_batch_size",
    "curvature_lr",
    "curvature_operator",
    "estimate_noise",
    "lanczos",
    "scale_lr",
    "spectral_density",
]

POWERS = {"linear": 1.0, "sqrt": 0.5}


def scale_lr(
    lr: float,
    batch_size: float,
    new_batch_size: float,
    *,
    rule: str = "linear",
    critical_batch_size: float | None = None,
) -> float:
    """The learning rate for another batch size: in proportion to it for SGD, to its root for adaptive optimizers.

    With B* = ``critical_batch_size``, infinite if None ::

        "linear":  lr * min(new_batch_size, B*) / min(batch_size, B*)
        "sqrt":    the same with the root of the ratio

    Args:
        lr: a rate that was tuned, or just stable, at ``batch_size``; >= 0.
        batch_size, new_batch_size: > 0.
        rule: ``"linear"`` for SGD, also with momentum; ``"sqrt"`` for Adam and its kin.
        critical_batch_size: > 0; beyond it the noise of the batch no longer bounds the rate, and a larger batch does
            not raise it. See :func:`critical_batch_size`.

    Raises:
        ValueError: an argument out of range.

    Source: D. Granziol, S. Zohren, S. Roberts, JMLR 23, 2022, arXiv 2006.09092.

    >>> from assay.optim import scale_lr
    >>> scale_lr(0.1, 128, 512), scale_lr(1e-3, 128, 512, rule="sqrt")
    (0.4, 0.002)
    >>> scale_lr(0.1, 128, 4096, critical_batch_size=1024)
    0.8
    """
    if not 0 <= lr < math.inf:
        raise ValueError(f"lr = {lr!r} is out of range: a finite number >= 0")
    if rule not in POWERS:
        raise ValueError(f"rule = {rule!r} is out of range: 'linear' or 'sqrt'")
    top = math.inf if critical_batch_size is None else critical_batch_size
    _positive(batch_size=batch_size, new_batch_size=new_batch_size)
    if not top > 0:
        raise ValueError(f"critical_batch_size = {critical_batch_size!r} is out of range: > 0")
    return lr * (min(new_batch_size, top) / min(batch_size, top)) ** POWERS[rule]


def batch_eigenvalue(
    lambda_1: float, noise_var: float, n_params: int, batch_size: float, dataset_size: float | None = None
) -> float:
    """The extreme eigenvalue of the Hessian of a batch, where the Hessian of all data has ``lambda_1``.

    The batch's Hessian is taken for the full one plus a symmetric matrix of independent noise, whose entries have the
    variance ``noise_var / b``. With P = ``n_params``, b = ``batch_size`` / (1 - ``batch_size / dataset_size``) (the
    batch is drawn without replacement; b = ``batch_size`` if ``dataset_size`` is None), s = sqrt(P noise_var / b) ::

        lambda_1 + s^2 / lambda_1       if lambda_1 > s: outside the noise's own spectrum
        2 s                             otherwise: the edge of that spectrum, a semi-circle

    A negative ``lambda_1`` is the smallest eigenvalue, and the formula is mirrored. Gradient descent on the batch is
    stable up to a learning rate of 2 over the result.

    Args:
        lambda_1: largest eigenvalue of the full Hessian, or, negative, its smallest.
        noise_var: variance of an entry of one example's Hessian, >= 0; see :func:`estimate_noise`.
        n_params: number of parameters, >= 1.
        batch_size: > 0 and at most ``dataset_size``.
        dataset_size: number of training examples.

    Raises:
        ValueError: an argument out of range.

    Source: D. Granziol, S. Zohren, S. Roberts, JMLR 23, 2022, arXiv 2006.09092.

    >>> from assay.optim import batch_eigenvalue
    >>> [batch_eigenvalue(1.0, 0.01, 800, b) for b in (2, 8, 32)]
    [4.0, 2.0, 1.25]
    >>> batch_eigenvalue(1.0, 0.01, 800, 32, dataset_size=32)
    1.0
    """
    if not math.isfinite(lambda_1):
        raise ValueError(f"lambda_1 = {lambda_1!r} is out of range: a finite number")
    variance = _total(noise_var, n_params) / _effective(batch_size, dataset_size)
    size = abs(lambda_1)
    found = size + variance / size if size > math.sqrt(variance) else 2 * math.sqrt(variance)
    return math.copysign(found, lambda_1) if lambda_1 else found


def critical_batch_size(lambda_1: float, noise_var: float, n_params: int, dataset_size: float | None = None) -> float:
    """The batch size up to which the noise of the batch bounds the learning rate.

    Where the noise adds as much as ``lambda_1`` itself to :func:`batch_eigenvalue`, and its spectrum begins to swallow
    ``lambda_1``; with P = ``n_params`` and N = ``dataset_size`` ::

        b* = P noise_var / lambda_1^2           B* = b* / (1 + b* / N), or b* if N is None

    Below, the largest stable rate grows with the batch; well above it is 2 / ``lambda_1``, whatever the batch.

    Args:
        lambda_1: largest eigenvalue of the full Hessian, > 0.
        noise_var, n_params, dataset_size: as for :func:`batch_eigenvalue`.

    Raises:
        ValueError: an argument out of range.

    Source: D. Granziol, S. Zohren, S. Roberts, JMLR 23, 2022, arXiv 2006.09092.

    >>> from assay.optim import critical_batch_size
    >>> critical_batch_size(0.5, 0.01, 800), critical_batch_size(0.5, 0.01, 800, dataset_size=96)
    (32.0, 24.0)
    """
    _positive(lambda_1=lambda_1)
    b = _total(noise_var, n_params) / lambda_1**2
    if dataset_size is None:
        return b
    _positive(dataset_size=dataset_size)
    return b / (1 + b / dataset_size)


class NoiseEstimate(NamedTuple):
    """What :func:`estimate_noise` finds: the arguments of :func:`batch_eigenvalue` that go with the measurements."""

    lambda_1: float
    noise_var: float


def estimate_noise(
    eigenvalues: Sequence[float],
    batch_sizes: Sequence[float],
    dataset_size: float | None = None,
    *,
    n_params: int = 1,
) -> NoiseEstimate:
    """``lambda_1`` and ``noise_var`` such that :func:`batch_eigenvalue` gives what was measured at two batch sizes.

    Measure the largest eigenvalue of the Hessian (:func:`lanczos`) on batches of two sizes and average it over several
    batches of each: of one batch it is noisy. If ``lambda_1`` is outside the noise at both sizes, the eigenvalue is a
    straight line in 1/b, with the value ``lambda_1`` at 0 and the slope P noise_var / ``lambda_1``; if it is outside
    only at the larger one, the smaller gives P noise_var.

    Args:
        eigenvalues: two measurements, > 0, that fall with the batch size, though not as fast as 1 / sqrt(b).
        batch_sizes: their two different batch sizes, > 0; with ``dataset_size``, N itself is allowed.
        dataset_size: number of training examples, or None.
        n_params: P. With the default of 1, ``noise_var`` is P times the variance of an entry, which is all that
            :func:`batch_eigenvalue` and :func:`critical_batch_size` need, if they are given ``n_params=1`` as well.

    Returns:
        ``NoiseEstimate(lambda_1, noise_var)``.

    Raises:
        ValueError: an argument out of range, or measurements that no ``lambda_1`` and ``noise_var`` give.

    Source: the formulas of D. Granziol, S. Zohren, S. Roberts, JMLR 23, 2022, arXiv 2006.09092.

    >>> from assay.optim import critical_batch_size, estimate_noise
    >>> lambda_1, noise_var = estimate_noise([1.5, 1.25], [16, 32])
    >>> lambda_1, noise_var, critical_batch_size(lambda_1, noise_var, n_params=1)
    (1.0, 8.0, 8.0)
    """
    if len(eigenvalues) != 2 or len(batch_sizes) != 2:
        raise ValueError(f"eigenvalues = {eigenvalues!r} is out of range: two of them, with two batch_sizes")
    (small, high), (large, low) = sorted(zip(batch_sizes, eigenvalues, strict=True))
    _positive(eigenvalues=min(high, low), n_params=n_params)
    x, y = 1 / _effective(small, dataset_size), 1 / _effective(large, dataset_size)
    # At the other end lambda_1 is inside the noise at both sizes, and cannot be seen.
    if x == y or not low <= high < low * (math.sqrt(x / y) if y else math.inf):
        raise ValueError(
            f"eigenvalues = {eigenvalues!r} at batch_sizes = {batch_sizes!r} are out of range: "
            "falling with the batch size, but less than as 1 / sqrt(b)"
        )
    lambda_1 = (low * x - high * y) / (x - y)
    if high <= 2 * lambda_1:
        return NoiseEstimate(lambda_1, lambda_1 * (high - low) / (x - y) / n_params)
    total = high**2 / 4 / x
    return NoiseEstimate((low + math.sqrt(low**2 - 4 * total * y)) / 2, total / n_params)


def curvature_lr(
    grad: Tensor | Sequence[Tensor], hvp: Tensor | Sequence[Tensor] | Callable[[Any], Any], *, previous: float = 0.0
) -> float:
    """The learning rate that goes to the minimum along the gradient, if the loss is quadratic there.

    With g the gradient and H the Hessian on the same examples ::

        lr = <g, g> / <g, H g>

    Where the curvature along g is not positive there is no such minimum: the result is ``previous``, with a warning.
    It is one Lanczos step, and needs neither momentum nor a spectrum.

    Args:
        grad: g, one tensor or a list of them.
        hvp: H g in the same form; or a function that returns it, called with ``grad``, such as
            ``curvature_operator(...).product`` for a flat gradient.
        previous: >= 0, what is returned where the formula gives nothing.

    Raises:
        ValueError: shapes that differ; ``previous`` out of range.

    Source: D. Granziol's code for curvature learning rates; the step itself is A. Cauchy's, 1847.

    >>> import torch
    >>> from assay.optim import curvature_lr
    >>> H = torch.diag(torch.tensor([1.0, 4.0]))
    >>> curvature_lr(torch.tensor([1.0, 1.0]), lambda g: H @ g)
    0.4
    """
    if not 0 <= previous < math.inf:
        raise ValueError(f"previous = {previous!r} is out of range: a finite number >= 0")
    product = hvp(grad) if callable(hvp) else hvp
    g, hg = ([x] if isinstance(x, Tensor) else list(x) for x in (grad, product))
    if [x.shape for x in g] != [x.shape for x in hg]:
        raise ValueError("hvp of other shapes than grad is out of range: the product of the Hessian with grad")
    squared = sum(_dot(x, x) for x in g)
    curvature = sum(_dot(x, y) for x, y in zip(g, hg, strict=True))
    if not (0 < curvature < math.inf and 0 < squared < math.inf):
        warnings.warn(f"<g, H g> = {curvature:.3g}: the learning rate stays at {previous}", stacklevel=2)
        return previous
    return squared / curvature


def _dot(x: Tensor, y: Tensor) -> float:
    return torch.dot(x.detach().reshape(-1).double(), y.detach().reshape(-1).double()).item()


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} = {value!r} is out of range: > 0 and finite")


def _total(noise_var: float, n_params: int) -> float:
    """P noise_var: nothing else of the two is ever needed."""
    if not 0 <= noise_var < math.inf:
        raise ValueError(f"noise_var = {noise_var!r} is out of range: a finite number >= 0")
    if not n_params >= 1:
        raise ValueError(f"n_params = {n_params!r} is out of range: >= 1")
    return n_params * noise_var


def _effective(batch_size: float, dataset_size: float | None) -> float:
    """b: the size of a batch with replacement that would be as noisy as this one without."""
    _positive(batch_size=batch_size)
    if dataset_size is None:
        return batch_size
    if not batch_size <= dataset_size:
        raise ValueError(f"batch_size = {batch_size!r} is out of range: at most dataset_size = {dataset_size!r}")
    return batch_size / (1 - batch_size / dataset_size) if batch_size < dataset_size else math.inf
