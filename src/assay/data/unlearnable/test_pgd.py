"""PGD against steps and projections written out in numpy, and what it must leave alone."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from assay.data import pgd, random_crop_flip

NORMS = ("linf", "l2", "l1")
EXACT = {"rtol": 0, "atol": 0}


def problem(seed=0, b=6, d=9, classes=4):
    """A softmax regression, whose gradient is (p - onehot(y)) W, with inputs near the walls of [0, 1] as well."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(d, classes).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.double))
    x = torch.rand(b, d, generator=generator, dtype=torch.double)
    x[:, :2] = x[:, :2].round()
    return model, x, torch.randint(classes, (b,), generator=generator)


def onto_l1_ball(v, radius):
    """The threshold by bisection."""
    if np.abs(v).sum() <= radius:
        return v
    low, high = 0.0, np.abs(v).max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(np.abs(v) - middle, 0).sum() > radius else (low, middle)
    return np.sign(v) * np.maximum(np.abs(v) - high, 0)


def by_hand(model, x, y, *, radius, steps, step_size, norm, direction=1, bounds=(0, 1), radial=False):
    W, c = (p.detach().numpy() for p in model.parameters())
    out = x.numpy().copy()
    for i, x_i in enumerate(x.numpy()):
        z = x_i.copy()
        for _ in range(steps):
            logits = W @ z + c
            p = np.exp(logits - logits.max())
            p /= p.sum()
            p[y[i]] -= 1
            g = p @ W
            size = {"linf": 1, "l2": np.linalg.norm(g), "l1": np.abs(g).sum()}[norm]
            z = z + direction * step_size * (np.sign(g) if norm == "linf" else g / size)
            d = z - x_i
            if norm == "linf":
                d = np.clip(d, -radius, radius)
            elif norm == "l2" or radial:
                length = np.linalg.norm(d, 2 if norm == "l2" else 1)
                d = d * min(1.0, radius / length)
            else:
                d = onto_l1_ball(d, radius)
            z = np.clip(x_i + d, *bounds) if bounds else x_i + d
        out[i] = z
    return out


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("bounds", [(0, 1), (-0.5, 1.25), None])
@pytest.mark.parametrize(
    "norm, radius, radial", [("linf", 0.2, False), ("l2", 0.5, False), ("l1", 0.7, False), ("l1", 0.7, True)]
)
def test_the_formula_step_for_step(norm, radius, radial, bounds, direction):
    model, x, y = problem()
    for steps in (0, 1, 3, 12):
        options = {"radius": radius, "steps": steps, "step_size": radius / 4, "norm": norm}
        options |= {"direction": direction, "bounds": bounds}
        got = pgd(model, x, y, **options, projection="radial" if radial else "euclidean")
        np.testing.assert_allclose(got.numpy(), by_hand(model, x, y, **options, radial=radial), rtol=0, atol=1e-12)


def test_the_two_projections_onto_the_l1_ball_differ():
    """Otherwise the case above could not tell them apart."""
    model, x, y = problem()
    one, other = (
        pgd(model, x, y, radius=0.7, steps=12, step_size=0.2, norm="l1", projection=projection)
        for projection in ("euclidean", "radial")
    )
    assert (one - other).abs().max() > 1e-3


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(NORMS),
    st.integers(0, 10**6),
    st.floats(1e-3, 3),
    st.integers(0, 6),
    st.floats(0, 2),
    st.booleans(),
    st.sampled_from([torch.float64, torch.float32]),
)
def test_it_stays_in_the_ball_and_in_the_bounds(norm, seed, radius, steps, step, random_start, dtype):
    model, x, y = problem(seed)
    model, x = model.to(dtype), x.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    z = pgd(
        model,
        x,
        y,
        radius=radius,
        steps=steps,
        step_size=step * radius,
        norm=norm,
        random_start=random_start,
        generator=generator,
    )
    assert (z >= 0).all() and (z <= 1).all() and not z.requires_grad and z.dtype == dtype
    length = torch.linalg.vector_norm(z - x, ord={"linf": float("inf"), "l2": 2, "l1": 1}[norm], dim=1)
    assert (length <= radius + (1e-12 if dtype == torch.float64 else 1e-6)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_the_loss_goes_where_it_is_sent(norm):
    model, x, y = problem(b=40)
    before = F.cross_entropy(model(x), y, reduction="none")
    for direction in (1, -1):
        z = pgd(model, x, y, radius=0.1, steps=3, step_size=0.01, norm=norm, direction=direction)
        after = F.cross_entropy(model(z), y, reduction="none")
        assert (direction * (after - before) > 0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_every_example_has_a_radius_and_a_step_of_its_own(norm):
    model, x, y = problem()
    radius, step_size = torch.linspace(0, 0.5, len(x)), torch.linspace(0.2, 0.05, len(x))
    together = pgd(model, x, y, radius=radius.double(), steps=4, step_size=step_size.double(), norm=norm)
    for i in range(len(x)):
        alone = pgd(
            model,
            x[i : i + 1],
            y[i : i + 1],
            radius=float(radius[i]),
            steps=4,
            step_size=float(step_size[i]),
            norm=norm,
        )
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_a_random_start_is_even_in_the_ball(norm):
    """The share of a ball of d dimensions within half its radius is 2^-d, and its centre of mass is x."""
    d, n = 3, 40_000
    x = torch.full((n, 1, d), 0.5, dtype=torch.double)
    draw = functools.partial(
        pgd, nn.Identity(), x, None, radius=0.4, steps=0, step_size=1, norm=norm, random_start=True
    )
    delta = (draw(generator=torch.Generator().manual_seed(0)) - x).squeeze(1)
    length = torch.linalg.vector_norm(delta, ord={"linf": float("inf"), "l2": 2, "l1": 1}[norm], dim=1)
    assert length.max() <= 0.4 + 1e-12
    assert (length < 0.2).double().mean().item() == pytest.approx(2**-d, abs=0.01)
    assert delta.mean(0).abs().max() < 0.005
    assert torch.equal(*(draw(generator=torch.Generator().manual_seed(3)) for _ in range(2)))


def test_no_radius_no_steps_and_no_slope_leave_the_inputs():
    model, x, y = problem()
    flat = functools.partial(pgd, lambda z: z * 0, x, y, radius=0.1, steps=3, step_size=0.05)
    for norm in NORMS:
        for same in (
            pgd(model, x, y, radius=0, steps=5, step_size=0.1, norm=norm, random_start=True),
            pgd(model, x, y, radius=torch.zeros(len(x)), steps=5, step_size=0.1, norm=norm),
            pgd(model, x, y, radius=0.1, steps=0, step_size=0.1, norm=norm),
            flat(norm=norm),
        ):
            torch.testing.assert_close(same, x, **EXACT)
            assert same.data_ptr() != x.data_ptr()


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 3)
    ).double()
    with torch.no_grad():
        model(torch.randn(30, 1, 4, 4, dtype=torch.double))
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[4].bias.grad = torch.ones(3, dtype=torch.double)
    return model


def state_of(model):
    return [
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [None if parameter.grad is None else parameter.grad.tolist() for parameter in model.parameters()],
        [value.tolist() for value in model.state_dict().values()],
    ]


def test_the_model_and_the_inputs_stay_as_they_were():
    model = network()
    x = torch.rand(5, 1, 4, 4, dtype=torch.double, requires_grad=True)
    y, before, inputs = torch.tensor([0, 1, 2, 0, 1]), state_of(model), x.detach().clone()
    attack = functools.partial(pgd, model, x, y, radius=0.1, steps=3, step_size=0.05)
    first = attack()
    with torch.no_grad():
        second = attack()
    assert torch.equal(first, second) and torch.is_grad_enabled()  # dropout is off
    assert state_of(model) == before and x.grad is None and torch.equal(x, inputs)
    with pytest.raises(ZeroDivisionError):
        attack(loss_fn=lambda output, y: 1 / 0)
    assert state_of(model) == before


def test_any_loss_and_any_targets():
    """Up the distance to a target: away from it, to the corner of the ball."""
    x = torch.full((2, 3), 0.5)
    target = torch.tensor([[0.6, 0.4, 0.6], [0.4, 0.4, 0.4]])
    losses = [
        lambda z, t: (z - t).square().mean(),
        lambda z, t: (z - t).square(),
        lambda z, t: F.mse_loss(z, t, reduction="sum"),
    ]
    for loss_fn in losses:
        z = pgd(nn.Identity(), x, target, radius=0.25, steps=3, step_size=0.125, loss_fn=loss_fn)
        torch.testing.assert_close(z, x + 0.25 * (x - target).sign())


def test_vectors_as_batch_and_bounds_for_every_channel():
    x = torch.tensor([0.5, 0.75])
    z = pgd(lambda x: x, x, None, radius=0.5, steps=2, step_size=0.25, loss_fn=lambda x, _: x.sum())
    assert z.tolist() == [1.0, 1.0]
    low, high = torch.tensor([0.0, -1.0]), torch.tensor([0.6, 0.9])
    z = pgd(
        lambda x: x,
        torch.tensor([[0.5, 0.75]]),
        None,
        radius=1,
        steps=4,
        step_size=1,
        bounds=(low, high),
        loss_fn=lambda x, _: x.sum(),
    )
    torch.testing.assert_close(z, high[None])


def test_autocast():
    model, x, y = problem()
    model, x = model.float(), x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = pgd(model, x, y, radius=0.1, steps=4, step_size=0.05)
    assert z.dtype == torch.float32 and (z - x).abs().max() <= 0.1 + 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radius": -0.1}, r"radius = -0.1 is out of range: >= 0"),
        ({"radius": float("nan")}, "radius = nan"),
        ({"radius": torch.tensor([0.1, 0.2])}, r"radius.shape = \(2,\) is out of range: \(6,\)"),
        ({"step_size": torch.full((6,), -1.0)}, "step_size = .* is out of range: >= 0"),
        ({"step_size": float("inf")}, "step_size = inf"),
        ({"steps": -1}, "steps = -1 is out of range: an integer >= 0"),
        ({"steps": 1.5}, "steps = 1.5"),
        ({"norm": "l3"}, "norm = 'l3' is out of range: 'linf' or 'l2' or 'l1'"),
        ({"direction": 0}, "direction = 0"),
        ({"projection": "none"}, "projection = 'none'"),
        ({"bounds": (1, 0)}, r"bounds = \(1, 0\) is out of range"),
    ],
)
def test_arguments_out_of_range_are_named(options, message):
    model, x, y = problem()
    with pytest.raises(ValueError, match=message):
        pgd(model, x, y, **{"radius": 0.1, "steps": 1, "step_size": 0.1, **options})


def test_images_of_bytes_are_refused():
    with pytest.raises(ValueError, match=r"x = torch.uint8 \(2, 3\) is out of range"):
        pgd(nn.Identity(), torch.zeros(2, 3, dtype=torch.uint8), None, radius=1, steps=1, step_size=1)


# --- crop and mirror


def test_a_crop_is_a_shifted_image_or_its_mirror_drawn_for_each_image():
    image = torch.arange(1.0, 13).view(1, 3, 4)
    padded = F.pad(image, [1, 1, 1, 1])
    views = [padded[:, r : r + 3, c : c + 4] for r in range(3) for c in range(3)]
    views += [view.flip(-1) for view in views]
    cut = random_crop_flip(1, generator=torch.Generator().manual_seed(0))(image.expand(3600, 1, 3, 4))
    counts = [sum(torch.equal(view, one) for one in cut) for view in views]
    assert sum(counts) == 3600 and min(counts) > 140 and max(counts) < 270  # 200 each


def test_the_gradient_of_a_crop_goes_back_to_the_pixels_that_it_shows():
    transform = random_crop_flip(2, generator=torch.Generator().manual_seed(1))
    x = torch.rand(3, 2, 4, 4, dtype=torch.double, requires_grad=True)
    state = transform.generator.get_state()

    def fixed(x):
        transform.generator.set_state(state)
        return transform(x)

    assert torch.autograd.gradcheck(fixed, x)
    assert torch.equal(random_crop_flip(0, flip=False)(x), x)
    with pytest.raises(ValueError, match="padding = -1"):
        random_crop_flip(-1)
    with pytest.raises(ValueError, match=r"images.shape = \(3, 4\)"):
        transform(torch.zeros(3, 4))
