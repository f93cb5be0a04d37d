"""Noise masks drawn by a policy network: images are multiplied by them in a first phase of training, then no more."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Beta

from assay.data._checks import count, one_of
from assay.data.noise_mask.average_checkpoints import average_checkpoints
from assay.data.noise_mask.noise_mask_loss import ESTIMATORS, noise_mask_loss, precise

__all__ = ["NoiseMaskPolicy", "average_checkpoints", "noise_mask", "noise_mask_loss"]

if TYPE_CHECKING:
    from assay.bench.recipe import Batch, Objective, Recipe, Run

EPS = 1e-6  # how far a sample stays from 0 and 1, where a Beta density may be infinite
FAR = 10.0  # largest |log-concentration|: beyond it float32 cannot tell densities, and a policy runs off to infinity


def noise_mask(
    dist: Any,
    size: int | Sequence[int],
    *,
    grid: int,
    kernel_size: int = 13,
    sigma: float = 6.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A random mask for each image: a value per grid cell, enlarged to the image and blurred.

    For a distribution p over the ``grid**2`` cells of each of B images ::

        M    ~ p, kept in [1e-6, 1 - 1e-6], as (B, 1, grid, grid), row by row
        mask = blur(enlarge(M))

    where ``enlarge`` takes each pixel's nearest cell (nothing to do if ``size`` is the grid's) and ``blur`` is the
    Gaussian of ``sigma`` pixels, cut off after ``kernel_size`` of them and made to sum to 1, on the mask reflected at
    its border. A constant M gives a constant mask. It is multiplied with the image: ``images * mask``.

    Args:
        dist: a ``torch.distributions.Beta`` of shape (B, grid**2), as from :class:`NoiseMaskPolicy`; with B = 1, as
            from its ``base_distribution()``, one mask for all images. Without a generator, anything with ``sample()``.
        size: (H, W) of the images, or their side.
        grid: cells on a side, at least 1.
        kernel_size: pixels, odd and less than twice the shorter side; 1 is no blur.
        sigma: pixels, above 0.
        generator: draws the sample; None: torch's global one.

    Returns:
        (B, 1, H, W) in (0, 1), in the distribution's precision (at least float32), without gradient.

    Raises:
        ValueError: an argument out of range, or a sample that is not (B, grid**2).

    Source:
        Yavuz, Yang: Policy Gradient-Driven Noise Mask, 2024, arXiv 2406.14568.

    Example:
        >>> import torch
        >>> from assay.data import noise_mask
        >>> few = torch.distributions.Beta(torch.full((1, 4), 2.0), torch.full((1, 4), 2.0))
        >>> mask = noise_mask(few, 6, grid=2, kernel_size=3, sigma=1.0, generator=torch.Generator().manual_seed(0))
        >>> mask.shape, bool(((mask > 0) & (mask < 1)).all())
        (torch.Size([1, 1, 6, 6]), True)
    """
    return _spread(_draw(dist, generator), size, grid, kernel_size, sigma)


@torch.no_grad()
def _draw(dist: Any, generator: torch.Generator | None) -> Tensor:
    """A sample of the cells, away from 0 and 1; without gradient: the policy learns from its density alone."""
    if generator is None:
        cells = dist.sample()
    else:  # what Beta.sample() does, which takes no generator
        both = torch.stack([dist.concentration1, dist.concentration0], -1)
        cells = torch._sample_dirichlet(both, generator=generator)[..., 0]
    return cells.to(torch.promote_types(cells.dtype, torch.float32)).clamp(EPS, 1 - EPS)


def _spread(cells: Tensor, size: int | Sequence[int], grid: int, kernel_size: int, sigma: float) -> Tensor:
    """Cells (B, grid**2) enlarged to ``size`` and blurred: (B, 1, H, W)."""
    count("grid", grid)
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"size = {size!r} is out of range: (H, W), each at least 1")
    most = 2 * min(height, width) - 1
    if not isinstance(kernel_size, int) or kernel_size % 2 == 0 or not 1 <= kernel_size <= most:
        raise ValueError(f"kernel_size = {kernel_size!r} is out of range: an odd integer in [1, {most}] for this size")
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma = {sigma!r} is out of range: (0, inf)")
    if cells.dim() != 2 or cells.shape[1] != grid**2:
        raise ValueError(f"the sample's shape = {tuple(cells.shape)} is out of range: (B, {grid**2}), grid = {grid}")
    mask = cells.view(-1, 1, grid, grid)
    if (height, width) != (grid, grid):
        mask = F.interpolate(mask, (height, width))
    half = kernel_size // 2
    at = torch.arange(-half, half + 1, dtype=mask.dtype, device=mask.device)
    weights = torch.softmax(-0.5 * (at / sigma) ** 2, 0)
    padded = F.pad(mask, [half] * 4, mode="reflect")
    with torch.autocast(mask.device.type, enabled=False):
        return F.conv2d(F.conv2d(padded, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))


class NoiseMaskPolicy(nn.Module):
    """A network that looks at each image and says how a mask for it is to be drawn: a Beta distribution per cell.

    With features h = ``feature_extractor(images)`` and two heads A and B, the modules ``alpha`` and ``beta`` (Linear,
    BatchNorm, ReLU, the same again, Linear) ::

        a = decay * base_alpha + (1 - decay) * A(h)         b = decay * base_beta + (1 - decay) * B(h)
        p = Beta(exp(a), exp(b)), independent over the grid's cells; a and b are kept in [-10, 10]
        base_alpha <- base_momentum * base_alpha + (1 - base_momentum) * (mean of A(h) over the batch)

    and so for ``base_beta``; the bases start as U(0, 1), have no gradient and move in training mode only, after a and b
    were taken. Train it beside the classifier with :func:`assay.losses.noise_mask_loss`, and throw it away afterwards.

    Args:
        feature_extractor: maps images (B, C, H, W) to (B, ``feature_dim``).
        feature_dim: at least 1.
        grid: cells on a side, at least 1.
        decay: share of the base in the concentrations, in [0, 1]; with 1 the images have no influence.
        base_momentum: in [0, 1].

    Raises:
        ValueError: an argument out of range, or features of another shape.

    Source:
        Yavuz, Yang: Policy Gradient-Driven Noise Mask, 2024, arXiv 2406.14568.

    Example:
        >>> import torch
        >>> from assay.data import NoiseMaskPolicy
        >>> features = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten())
        >>> policy = NoiseMaskPolicy(features, 3 * 16, grid=8)
        >>> mask, log_density = policy.sample(torch.randn(5, 3, 32, 32))
        >>> mask.shape, log_density.shape
        (torch.Size([5, 1, 32, 32]), torch.Size([5, 64]))
    """

    base_alpha: Tensor
    base_beta: Tensor

    def __init__(
        self,
        feature_extractor: nn.Module,
        feature_dim: int,
        *,
        grid: int = 64,
        decay: float = 0.9,
        base_momentum: float = 0.99,
    ) -> None:
        super().__init__()
        count("feature_dim", feature_dim)
        count("grid", grid)
        for name, value in (("decay", decay), ("base_momentum", base_momentum)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} = {value!r} is out of range: [0, 1]")
        self.feature_dim, self.grid, self.decay, self.base_momentum = feature_dim, grid, decay, base_momentum
        self.feature_extractor = feature_extractor
        self.alpha, self.beta = (_head(feature_dim, grid**2) for _ in range(2))
        self.register_buffer("base_alpha", torch.rand(1, grid**2))
        self.register_buffer("base_beta", torch.rand(1, grid**2))

    def forward(self, images: Tensor) -> Beta:
        """The distribution of the masks for images (B, C, H, W): a ``Beta`` of shape (B, grid**2), at least float32."""
        features = self.feature_extractor(images)
        if features.shape != (len(images), self.feature_dim):
            expected = (len(images), self.feature_dim)
            raise ValueError(f"the features' shape = {tuple(features.shape)} is out of range: {expected}")
        heads = [(self.base_alpha, precise(self.alpha(features))), (self.base_beta, precise(self.beta(features)))]
        dist = _beta(*(self.decay * base + (1 - self.decay) * head for base, head in heads))
        if self.training:
            for base, head in heads:
                mean = head.detach().mean(0, keepdim=True)
                base.copy_(self.base_momentum * base + (1 - self.base_momentum) * mean)
        return dist

    def sample(
        self,
        images: Tensor,
        *,
        kernel_size: int = 13,
        sigma: float = 6.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A mask for each of the images (B, C, H, W), and the log-density of what was drawn.

        The mask, (B, 1, H, W) in the images' dtype and without gradient, is that of :func:`noise_mask` (same options);
        the log-density of each cell's value, (B, grid**2) and at least float32, is what the policy is trained through.
        A policy whose weights are no longer finite gives masks that are NaN.
        """
        dist = self(images)
        cells = _draw(dist, generator)
        log_density = dist.log_prob(cells)
        # From concentrations that are NaN torch draws 0.5, behind which a policy that has diverged would go unseen.
        cells = cells.masked_fill(log_density.detach().isnan(), math.nan)
        mask = _spread(cells, images.shape[-2:], self.grid, kernel_size, sigma)
        return mask.to(images.dtype) if images.is_floating_point() else mask, log_density

    def base_distribution(self) -> Beta:
        """``Beta(exp(base_alpha), exp(base_beta))``, of shape (1, grid**2): the policy without an image."""
        return _beta(precise(self.base_alpha), precise(self.base_beta))


def _head(features: int, cells: int) -> nn.Sequential:
    hidden = [nn.Linear(features, features), nn.BatchNorm1d(features), nn.ReLU()]
    again = [nn.Linear(features, features), nn.BatchNorm1d(features), nn.ReLU()]
    return nn.Sequential(*hidden, *again, nn.Linear(features, cells))


def _beta(log_alpha: Tensor, log_beta: Tensor) -> Beta:
    # The check of its arguments would make a GPU wait.
    return Beta(log_alpha.clamp(-FAR, FAR).exp(), log_beta.clamp(-FAR, FAR).exp(), validate_args=False)


def feature_extractor(channels: int, width: int = 16) -> tuple[nn.Module, int]:
    """A small network for small images, with the number of its features."""
    layers = [
        nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers), 8 * width


def apply(
    recipe: Recipe,
    *,
    heating: float = 0.5,
    policy_lr: float = 1e-3,
    estimator: str = "reinforce",
    grid: int = 8,
    kernel_size: int = 3,
    sigma: float = 1.0,
    decay: float = 0.9,
    base_momentum: float = 0.99,
) -> Recipe:
    """The first ``heating`` of the run on masked images, with a policy that learns beside the model; the rest without.

    The policy has an optimizer of its own (Adam, ``policy_lr`` that falls to 0 as a cosine over the heating), stepped
    once a step. No checkpoints are averaged: the model goes on as it is.
    """
    one_of("estimator", estimator, ESTIMATORS)
    count("grid", grid)
    if not 0 <= heating <= 1:
        raise ValueError(f"heating = {heating!r} is out of range: [0, 1]")
    if not 0 <= policy_lr < math.inf:
        raise ValueError(f"policy_lr = {policy_lr!r} is out of range: [0, inf)")

    def objective(run: Run) -> Objective:
        shape = tuple(getattr(run.data[0][0], "shape", ()))
        if run.task.classes is None or len(shape) != 3:
            raise ValueError(f"noise-mask needs images (b, c, h, w) to classify; {run.task.name!r} has none")
        features, width = feature_extractor(shape[0])
        policy = NoiseMaskPolicy(features, width, grid=grid, decay=decay, base_momentum=base_momentum).to(run.device)
        optimizer = torch.optim.Adam(policy.parameters(), policy_lr)
        # Its own, so that dropout in the model draws what it draws without masks.
        generator = torch.Generator(run.device).manual_seed(run.seed)
        drawn: dict[int, tuple[Tensor, Tensor | float]] = {}

        def learn(log_density: Tensor, costs: Tensor) -> None:
            optimizer.param_groups[0]["lr"] = policy_lr * (1 + math.cos(math.pi * run.progress / heating)) / 2
            baseline = costs.mean() if estimator == "reinforce" else None
            optimizer.zero_grad()
            noise_mask_loss(log_density, costs, estimator=estimator, baseline=baseline).backward()
            optimizer.step()

        def loss(model: Callable[[Any], Any], batch: Batch) -> Tensor:
            if run.progress >= heating:
                return run.task.loss(model(batch.input), batch.target)
            first = run.step not in drawn  # an optimizer may ask for the loss of one step several times
            if first:
                drawn.clear()
                mask, log_density = policy.sample(
                    batch.input, kernel_size=kernel_size, sigma=sigma, generator=generator
                )
                factor = 1.0 if estimator == "reinforce" else log_density.detach().logsumexp(1).mean()
                drawn[run.step] = mask, factor
            mask, factor = drawn[run.step]
            costs = F.cross_entropy(model(batch.input * mask), batch.target, reduction="none")
            if first:
                learn(log_density, costs.detach())
            return factor * costs.mean()

        return loss

    return replace(recipe, objective=objective)
