"""The loop against its transcription; data, seeds, states and breaks."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Subset, TensorDataset

from assay.data import (
    error_minimizing_noise,
    pgd,
    random_crop_flip,
    robust_error_minimizing_noise,
    robust_noise_step,
)
from assay.data.unlearnable.test_pgd import network
from assay.data.unlearnable.test_unlearnable import data, make_model

R, A = 0.2, 0.08


def generate(dataset, model=None, seed=3, robust=True, **options):
    generator = torch.Generator().manual_seed(seed)
    common = {"radius": R, "steps": 3, "step_size": 0.08, "train_steps": 7, "batch_size": 4, "generator": generator}
    adversary = {"adv_radius": A, "adv_steps": 2, "adv_step_size": 0.05}
    model = model or make_model()
    if not robust:
        return error_minimizing_noise(model, dataset, **{**common, **options})
    return robust_error_minimizing_noise(model, dataset, **{**common, **adversary, "samples": 2, **options})


@pytest.mark.parametrize("perturb_freq", [1, 3])
@pytest.mark.parametrize("regenerate", [True, False])
def test_the_loop_follows_the_algorithm(regenerate, perturb_freq):
    """Written out with SGD by hand; the step and PGD are those above."""
    images, labels = data().tensors
    x = images.double() / 255
    generator = torch.Generator().manual_seed(3)
    transform = random_crop_flip(1, generator=generator)
    sizes = {"radius": R, "adv_radius": A, "steps": 3, "step_size": 0.08, "adv_steps": 2, "adv_step_size": 0.05}
    model, stored = make_model(), torch.zeros(11, 1, 4, 4, dtype=torch.double)
    velocity = [torch.zeros_like(p) for p in model.parameters()]

    def noise_of(chosen):
        d = robust_noise_step(
            model, x[chosen], labels[chosen], **sizes, transform=transform, samples=2, generator=generator
        )
        return (255 * d).round()

    for step in range(7):
        if step % 2 == 0:  # two whole batches of four in an epoch of eleven
            order = torch.randperm(11, generator=generator)
        chosen = order[:4] if step % 2 == 0 else order[4:8]
        if (step + 1) % perturb_freq == 0:
            stored[chosen] = noise_of(chosen)
        z = transform((x[chosen] + stored[chosen] / 255).clamp(0, 1))
        z = pgd(model, z, labels[chosen], radius=A, steps=2, step_size=0.05, random_start=True, generator=generator)
        gradients = torch.autograd.grad(F.cross_entropy(model(z), labels[chosen]), list(model.parameters()))
        with torch.no_grad():
            for p, v, g in zip(model.parameters(), velocity, gradients, strict=True):
                v.mul_(0.9).add_(g + 5e-4 * p)
                p -= 0.1 * (0.5 if step >= 4 else 1) * v
    if regenerate:
        for chosen in torch.arange(11).split(4):
            stored[chosen] = noise_of(chosen)

    own = torch.Generator().manual_seed(3)
    ours = make_model()
    noise = robust_error_minimizing_noise(
        ours,
        data(),
        **sizes,
        transform=random_crop_flip(1, generator=own),
        samples=2,
        generator=own,
        train_steps=7,
        batch_size=4,
        regenerate=regenerate,
        perturb_freq=perturb_freq,
        lr_schedule=lambda step: 0.5 if step >= 4 else 1,
    )
    assert torch.equal(noise.double(), stored)
    torch.testing.assert_close(ours.state_dict(), model.state_dict(), rtol=0, atol=1e-12)


def test_without_adversary_and_transform_it_is_error_minimization_to_the_bit():
    models = make_model(), make_model()
    one = generate(data(), models[0], robust=False)
    other = generate(data(), models[1], adv_radius=0, samples=1)
    assert torch.equal(one, other) and one.max_abs
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)
    default = generate(data(), robust=False, step_size=None)
    assert torch.equal(default, generate(data(), robust=False, step_size=R / 5))


@pytest.mark.parametrize("robust", [True, False])
def test_every_image_gets_noise_within_the_radius_whatever_the_batch_size(robust):
    for batch_size in (1, 4, 11, 50):
        noise = generate(data(), robust=robust, batch_size=batch_size, train_steps=1)
        assert noise.shape == (11, 1, 4, 4) and (noise.flatten(1) != 0).any(1).all()
        assert noise.max_abs <= 51 == 255 * R
    odd = generate(data(), robust=robust, radius=0.3)  # 76.5 of 255
    assert odd.max_abs == 76


def test_equal_seeds_equal_noise_and_any_map_style_dataset():
    images, labels = data().tensors
    expected = generate(data())
    rows = [(image, int(label)) for image, label in data()]
    fractions = images.float() / 255
    for same in (
        rows,
        Subset(data(), range(11)),
        TensorDataset(fractions, labels),
        [(x.numpy(), y, "more") for x, y in rows],
    ):
        assert torch.equal(generate(same), expected)
    assert not torch.equal(generate(data(), seed=4), expected)
    flat = TensorDataset(images.flatten(1), labels)
    assert torch.equal(generate(flat).view(11, 1, 4, 4), expected)
    protected = expected.apply(data())
    assert all(x.dtype == torch.uint8 for x, _ in protected)


def test_the_global_generator_is_used_where_none_is_given():
    def draw(seed):
        model = make_model()
        torch.manual_seed(seed)
        return generate(data(), model, generator=None)

    assert torch.equal(draw(5), draw(5)) and not torch.equal(draw(5), draw(6))


def test_modes_gradients_and_learning_rates_are_put_back():
    model = network().float()
    modes = [module.training for module in model.modules()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    used = []

    def schedule(step):
        used.append(step)
        return 0.5**step

    with torch.no_grad():
        generate(data(), model, optimizer=optimizer, lr_schedule=schedule)
    assert used == list(range(7)) and optimizer.param_groups[0]["lr"] == 0.01
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model[1].num_batches_tracked == 1 + 7  # trained in training mode, and seen by nothing else


def test_an_optimizer_may_be_made_by_a_function():
    made = [generate(data(), make, optimizer=o) for make, o in ((make_model(), None), (make_model(), default_sgd))]
    assert torch.equal(*made)


def default_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


class Killed(Exception):
    pass


class Fragile(list):
    """Rows that end in an error once they were read so many times."""

    def __init__(self, rows, reads):
        super().__init__(rows)
        self.reads = reads

    def __getitem__(self, i):
        self.reads -= 1
        if self.reads < 0:
            raise Killed
        return super().__getitem__(i)


@pytest.mark.parametrize("own_generator", [True, False])
@pytest.mark.parametrize("reads", [2, 9, 18, 31, 36])
def test_a_run_that_was_killed_goes_on_to_the_same_bits(tmp_path, reads, own_generator):
    rows = [(image, int(label)) for image, label in data()]

    def run(dataset, path):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Dropout(0.3), nn.Linear(8, 3)).double()
        drawing = torch.Generator().manual_seed(8) if own_generator else None
        options = {"transform": random_crop_flip(1, generator=drawing)}
        options |= {} if own_generator else {"generator": None}
        return generate(dataset, model, checkpoint=path, checkpoint_every=3, **options), model

    expected, whole_model = run(rows, None)
    path = tmp_path / "run.pt"
    with pytest.raises(Killed):
        run(Fragile(rows, reads), path)
    assert path.exists() == (reads > 2 + 12)
    for _ in range(2):  # and once more, from the finished state
        again, model = run(rows, path)
        assert torch.equal(again, expected)
        torch.testing.assert_close(model.state_dict(), whole_model.state_dict(), rtol=0, atol=0)
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    generate(data(), checkpoint=path)
    with pytest.raises(ValueError, match=r"checkpoint is that of another run: radius = 0.2 against 0.1"):
        generate(data(), checkpoint=path, radius=0.1)
    with pytest.raises(ValueError, match="sum of the first and last image"):
        generate(data(seed=1), checkpoint=path)


def test_an_adversary_stronger_than_the_noise_warns():
    with pytest.warns(UserWarning, match=r"adv_radius = 0.3 is above radius = 0.2"):
        generate(data(), adv_radius=0.3, train_steps=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(data(), adv_radius=R, train_steps=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radius": 0.6}, r"radius = 0.6 is out of range: \[0, 127/255\]"),
        ({"radius": -0.1}, "radius = -0.1"),
        ({"adv_radius": -0.1}, "adv_radius = -0.1"),
        ({"step_size": -1}, "step_size = -1"),
        ({"adv_step_size": float("nan")}, "adv_step_size = nan"),
        ({"steps": -1}, "steps = -1"),
        ({"adv_steps": 0.5}, "adv_steps = 0.5"),
        ({"samples": 0}, "samples = 0 is out of range: an integer >= 1"),
        ({"train_steps": -1}, "train_steps = -1"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"perturb_freq": 0}, "perturb_freq = 0"),
        ({"checkpoint_every": 0}, "checkpoint_every = 0"),
        ({"adv_bounds": (1, 0)}, r"adv_bounds = \(1, 0\)"),
    ],
)
def test_arguments_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        generate(data(), **options)


def test_data_and_models_that_cannot_be_used_are_named():
    images, labels = data().tensors
    for dataset, message in (
        (iter([]), "not a map-style dataset"),
        ([], "dataset is empty"),
        (TensorDataset(images.float() / 64, labels), "images reach from 0 to 3.984: they lie in"),
        (TensorDataset(images.float() / 255 - 0.5, labels), "images reach from -0.5 to 0.5"),
        ([x for x, _ in data()], "an example is .image, label, ...."),
    ):
        with pytest.raises(ValueError, match=message):
            generate(dataset)
    with pytest.raises(FloatingPointError, match="the model's loss is nan in step 1"):
        generate(data(), optimizer=lambda p: torch.optim.SGD(p, lr=float("inf")))
    with pytest.raises(TypeError):
        generate(data(), no_such_option=1)
