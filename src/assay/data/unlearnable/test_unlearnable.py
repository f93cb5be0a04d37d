"""The robust step and the loop against transcriptions of the formulas; what noise must hold; the claim."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from assay.bench.evidence import FAILS, Bench
from assay.data import (
    Noise,
    error_minimizing_noise,
    pgd,
    random_crop_flip,
    robust_noise_step,
)
from assay.data.unlearnable.claim import claim, figure, trained
from assay.data.unlearnable.test_pgd import network, state_of

R, A = 0.2, 0.08


class MLP(nn.Module):
    """z = V tanh(W x + b) + c, and its gradient by hand."""

    def __init__(self, inputs=16, classes=3):
        super().__init__()
        self.hidden, self.head = nn.Linear(inputs, 8), nn.Linear(8, classes)

    def forward(self, x):
        return self.head(torch.tanh(self.hidden(x.flatten(1))))

    def slope(self, x, label):
        """d cross-entropy / d x of one image, in numpy."""
        W, b, V, c = (p.detach().numpy() for p in self.parameters())
        h = np.tanh(W @ x.ravel() + b)
        logits = V @ h + c
        p = np.exp(logits - logits.max())
        p /= p.sum()
        p[label] -= 1
        return (((p @ V) * (1 - h**2)) @ W).reshape(x.shape)


def make_model(seed=0):
    torch.manual_seed(seed)
    return MLP().double()


def data(n=11, seed=0):
    """Images (n, 1, 4, 4) on the grid of 255ths, some pixels black or white."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(-60, 316, (n, 1, 4, 4), generator=generator).clamp(0, 255)
    return TensorDataset(images.to(torch.uint8), torch.randint(3, (n,), generator=generator))


def batch(n=11):
    images, labels = data(n).tensors
    return images.double() / 255, labels


# --- the step with fixed weights


def step_by_hand(model, x, y, views, *, radius, adv_radius, steps, step_size, adv_steps, adv_step_size):
    """Image by image; ``views`` are functions on one image with the gradient's way back, one for each sample."""
    result = []
    for image, label in zip(x.numpy(), y.tolist(), strict=True):
        d = np.zeros_like(image)
        for _ in range(steps):
            total = np.zeros_like(image)
            for view, back in views:
                z = view(np.clip(image + d, 0, 1))
                worst = z.copy()
                for _ in range(adv_steps if adv_radius else 0):
                    worst = worst + adv_step_size * np.sign(model.slope(worst, label))
                    worst = np.clip(z + np.clip(worst - z, -adv_radius, adv_radius), 0, 1)
                inside = (image + d >= 0) & (image + d <= 1)
                total += inside * back(model.slope(worst, label))
            d = np.clip(d - step_size * np.sign(total), -radius, radius)
        result.append(d)
    return np.stack(result)


class Alternating:
    """The identity and the mirror in turns."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x if self.calls % 2 else x.flip(-1)


SIZES = {"radius": R, "adv_radius": A, "steps": 6, "step_size": 0.06, "adv_steps": 4, "adv_step_size": 0.03}


@pytest.mark.parametrize("adv_radius", [0.0, A])
@pytest.mark.parametrize("samples", [1, 2])
def test_the_step_is_the_formula(adv_radius, samples):
    model, (x, y) = make_model(), batch()
    sizes = {**SIZES, "adv_radius": adv_radius}
    views = [(lambda z: z, lambda g: g), (lambda z: z[..., ::-1], lambda g: g[..., ::-1])][:samples]
    transform = Alternating() if samples == 2 else None
    got = robust_noise_step(model, x, y, **sizes, transform=transform, samples=samples, random_start=False)
    np.testing.assert_allclose(got.numpy(), step_by_hand(model, x, y, views, **sizes), rtol=0, atol=1e-12)


def test_without_adversary_and_transform_it_is_pgd_descent_where_no_pixel_is_at_the_wall():
    model, (x, y) = make_model(), batch()
    x = 0.3 + 0.4 * x
    noise = robust_noise_step(model, x, y, **{**SIZES, "adv_radius": 0}, samples=1, random_start=False)
    down = pgd(model, x, y, radius=R, steps=6, step_size=0.06, direction=-1)
    torch.testing.assert_close(x + noise, down, rtol=0, atol=1e-12)


def test_an_adversary_behind_a_transform_that_normalizes():
    """Shifted inputs, shifted bounds and a model that shifts back: the same noise."""
    model, (x, y) = make_model(), batch()
    plain = robust_noise_step(model, x, y, **SIZES, samples=1, random_start=False)
    shifted = robust_noise_step(
        lambda z: model(z + 0.5),
        x,
        y,
        **SIZES,
        samples=1,
        random_start=False,
        transform=lambda z: z - 0.5,
        adv_bounds=(-0.5, 0.5),
    )
    torch.testing.assert_close(shifted, plain, rtol=0, atol=1e-12)


def test_no_steps_or_no_radius_give_no_noise():
    model, (x, y) = make_model(), batch()
    for options in ({"steps": 0}, {"radius": 0.0}):
        assert not robust_noise_step(model, x, y, **{**SIZES, **options}).any()
        noise = error_minimizing_noise(make_model(), data(), train_steps=3, batch_size=4, **options)
        assert noise.max_abs == 0


def test_equal_generators_give_equal_noise_within_the_radius():
    model, (x, y) = make_model(), batch()

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return robust_noise_step(
            model, x, y, **SIZES, transform=random_crop_flip(1, generator=generator), generator=generator
        )

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert draw(1).abs().max() <= R


def test_the_robust_loss_of_a_linear_model_never_rises():
    """Where the worst neighbour is exact: two logits (-w x, w x), and a = -+ adv_radius sign(w)."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(16, generator=generator, dtype=torch.double)
    x, y = 0.3 + 0.4 * torch.rand(200, 16, generator=generator, dtype=torch.double), torch.arange(200) % 2

    def robust_loss(d):
        margin = 2 * (2 * y - 1) * ((x + d) @ w) - 2 * A * w.abs().sum()
        return F.softplus(-margin)

    losses = [robust_loss(torch.zeros_like(x))]
    for steps in (1, 2, 5):
        d = robust_noise_step(
            lambda z: torch.stack([-z @ w, z @ w], 1),
            x,
            y,
            **{**SIZES, "steps": steps, "step_size": R / 5},
            samples=1,
            random_start=False,
        )
        losses.append(robust_loss(d))
    assert all((later < earlier).all() for earlier, later in itertools.pairwise(losses))
    torch.testing.assert_close(d, R * (2 * y - 1)[:, None] * w.sign())


def test_the_model_stays_as_it_was():
    model, (x, y) = network(), batch(6)
    before = state_of(model)
    robust_noise_step(model, x, y, **SIZES, transform=random_crop_flip(1))
    assert state_of(model) == before
    with torch.no_grad():
        robust_noise_step(model, x, y, **SIZES, samples=1)
    with pytest.raises(ValueError, match="a function through which gradients pass"):
        robust_noise_step(model, x, y, **SIZES, transform=lambda z: z.detach().round())
    assert state_of(model) == before


# --- the claim


def ignoring(model, x, y, *, adv_radius, **options):
    """The first broken variant: a step that sees no adversary."""
    return robust_noise_step(model, x, y, adv_radius=0.0, **options)


def maximizing(model, dataset, *, radius, train_steps, **_):
    """The second broken variant: noise that raises the loss of a trained network."""
    x, y = dataset.tensors
    z = pgd(trained(x, y, 0, train_steps, 0.0), x, y, radius=radius, steps=10, step_size=radius / 5)
    return Noise((255 * (z - x)).round().to(torch.int8))


@pytest.mark.parametrize("step", [ignoring, robust_noise_step])
def test_the_claim_finds_out_a_step_without_adversary(step):
    evidence = claim(Bench(), step=step, seeds=2, steps=100, parts=["weights fixed"])
    assert (evidence.verdict == FAILS) == (step is ignoring)


def test_the_claim_finds_out_noise_that_maximizes():
    evidence = claim(Bench(), method=maximizing, seeds=3, steps=40, parts=["loss"])
    assert [check.verdict for check in evidence.checks] == [FAILS, FAILS]
    assert len(figure(evidence).axes) == 3
