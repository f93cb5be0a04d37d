"""What the classifier and the policy minimize together, as in the authors' code and as a policy gradient."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from assay.data._checks import one_of

ESTIMATORS = ("reference", "reinforce")
FEW = 64  # cells


def noise_mask_loss(
    log_density: Tensor,
    per_sample_loss: Tensor,
    *,
    estimator: str = "reference",
    baseline: float | Tensor | None = None,
) -> Tensor:
    """One loss for both: the classifier that saw ``images * mask``, and the policy that drew the mask.

    With L_i = ``per_sample_loss`` and the G cells' log-densities l_ig = ``log_density`` ::

        "reference":  mean_i(log sum_g exp l_ig) * mean_i L_i
        "reinforce":  mean_i L_i  +  mean_i (L_i - baseline) * (sum_g l_ig) / G,      (L_i - baseline) a constant

    "reference" is the authors' code. Its gradient for the classifier is that of the mean loss times
    mean log sum exp l, which turns round where that is negative (a warning says so); the one for the policy is no
    unbiased estimate of anything. "reinforce" is the policy gradient: the classifier's gradient is that of the mean
    loss, the policy's is on average 1/G of the gradient of the expected loss. A baseline that does not depend on the
    image's own mask leaves that average as it is and lowers the variance. The batch mean,
    ``baseline=per_sample_loss.detach().mean()``, gives exactly 1 - 1/B of the gradient that the mean over the *other*
    images would give, and so is as good as that.

    Args:
        log_density: (B, G), from ``NoiseMaskPolicy.sample``.
        per_sample_loss: (B,), the classifier's loss on each masked image (``reduction="none"``).
        estimator: ``"reference"`` or ``"reinforce"``.
        baseline: for "reinforce": a number or a tensor, () or (B,); None is 0.

    Returns:
        A scalar, at least float32.

    Raises:
        ValueError: shapes that do not fit, an unknown estimator, a baseline with "reference".

    Source:
        Yavuz, Yang: Policy Gradient-Driven Noise Mask, 2024, arXiv 2406.14568.

    Example:
        >>> import torch
        >>> from assay.losses import noise_mask_loss
        >>> log_density, losses = torch.tensor([[0.5, 0.1], [0.2, 0.0]]), torch.tensor([2.0, 1.0])
        >>> noise_mask_loss(log_density, losses)
        tensor(1.3584)
        >>> noise_mask_loss(log_density, losses, estimator="reinforce", baseline=losses.mean())
        tensor(1.5500)
    """
    one_of("estimator", estimator, ESTIMATORS)
    if log_density.dim() != 2:
        raise ValueError(f"log_density.shape = {tuple(log_density.shape)} is out of range: (B, G)")
    if per_sample_loss.shape != log_density.shape[:1]:
        shapes = f"{tuple(per_sample_loss.shape)} is out of range: ({len(log_density)},)"
        raise ValueError(f"per_sample_loss.shape = {shapes}, the loss of each example")
    log_density, losses = precise(log_density), precise(per_sample_loss)
    if estimator == "reference":
        if baseline is not None:
            raise ValueError(f"baseline = {baseline!r} is out of range: None with estimator = 'reference'")
        return _reference_factor(log_density) * losses.mean()
    if isinstance(baseline, Tensor) and baseline.shape not in ((), losses.shape):
        raise ValueError(f"baseline.shape = {tuple(baseline.shape)} is out of range: () or {tuple(losses.shape)}")
    cost = (losses if baseline is None else losses - baseline).detach()
    return losses.mean() + (cost * log_density.mean(1)).mean()


def _reference_factor(log_density: Tensor) -> Tensor:
    """Mean over the images of the log of their summed densities."""
    factor = log_density.logsumexp(1).mean()
    # Looking makes a GPU wait. With more cells, a draw from the policy has a chance below 1e-28 to be such a case.
    if log_density.shape[1] <= FEW and not torch.compiler.is_compiling() and factor.detach() < 0:
        warnings.warn(
            "the mean of log sum exp(log_density) is negative: estimator = 'reference' then drives the classifier's "
            "loss up; use more cells or estimator = 'reinforce'",
            stacklevel=3,
        )
    return factor


def precise(values: Tensor) -> Tensor:
    """The values in float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
