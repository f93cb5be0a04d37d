"""What is frozen stays bit for bit, what is trained is what the card says, and a broken variant of the claim."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from assay.bench.arms import DEFAULT_RECIPE
from assay.bench.evidence import FAILS, HOLDS, Bench
from assay.nn import batchnorm_only, disabled_features, init_batchnorm_, random_per_channel, unfreeze
from assay.nn.batchnorm_only.batchnorm_only import apply
from assay.nn.batchnorm_only.claim import NORMS, ResNet, claim, figure

OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
]


def steps(model: nn.Module, make: Callable[[Any], torch.optim.Optimizer], count: int = 3) -> None:
    optimizer, draw = make(model.parameters()), torch.Generator().manual_seed(0)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(6, 1, 8, 8, generator=draw)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(("depth", "count", "total"), [(2, 560, 44_226), (5, 1232, 117_474)])
def test_the_trained_are_all_batch_normalizations_and_nothing_else(depth, count, total):
    model = ResNet(depth)
    report = batchnorm_only(model)
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert any("shortcut" in name for name in norms)
    assert set(report.trained) == {f"{name}.{part}" for name in norms for part in ("weight", "bias")}
    assert (report.trained_count, report.trained_count + report.frozen_count) == (count, total)
    assert report.share == count / total
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(report.trained)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_frozen_tensors_do_not_move_and_statistics_do(make):
    model = ResNet(1)
    report = batchnorm_only(model)
    before = copy.deepcopy(model.state_dict())
    steps(model, make)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in report.frozen)
    assert all(not torch.equal(after[name], before[name]) for name in report.trained)
    assert all(not torch.equal(after[n], before[n]) for n in after if "running" in n)


def test_gradients_are_those_of_the_whole_model():
    model = ResNet(1).double()
    whole = copy.deepcopy(model)
    report = batchnorm_only(model, init=None)
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    for each in (model, whole):
        each(x).square().sum().backward()
    grads, all_grads = ({n: p.grad for n, p in m.named_parameters()} for m in (model, whole))
    for name in report.trained:
        torch.testing.assert_close(grads[name], all_grads[name], rtol=1e-9, atol=1e-9)
    assert all(grads[name] is None for name in report.frozen)


def test_first_values():
    model = ResNet(5)
    draw = torch.Generator().manual_seed(1)
    batchnorm_only(model, generator=draw)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    gammas = torch.cat([m.weight.detach() for m in norms])
    assert gammas.min() >= 0 and gammas.max() < 1 and abs(gammas.mean() - 0.5) < 3 * (1 / 12 / len(gammas)) ** 0.5
    assert all((m.bias == 0).all() for m in norms)
    again = init_batchnorm_(ResNet(5), generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.cat([m.weight for m in again.modules() if isinstance(m, nn.BatchNorm2d)]), gammas)
    norm = init_batchnorm_(nn.BatchNorm1d(500), "positivenegative")
    assert norm.weight.min() < -0.9 and norm.weight.max() > 0.9 and (norm.bias == 0).all()
    assert (init_batchnorm_(norm, "fixed").weight == 1).all() and (norm.bias == 0).all()
    assert (init_batchnorm_(norm, "oneone").bias == 1).all() and (norm.weight == 1).all()


def test_further_parameters_and_other_normalizations():
    model = ResNet(1)
    report = batchnorm_only(model, train_output=True, also=["body.0.weight"])
    assert {"output.weight", "output.bias", "body.0.weight"} < set(report.trained)
    mixed = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4, affine=False))
    assert batchnorm_only(mixed, norm_types=(nn.LayerNorm, nn.BatchNorm1d)).skipped == ("2",)
    with pytest.raises(ValueError, match=r"model = 'Sequential' is out of range: .* BatchNorm1d, BatchNorm2d"):
        batchnorm_only(mixed)
    with pytest.raises(ValueError, match="also = 'head' is out of range"):
        batchnorm_only(ResNet(1), also=["head"])
    with pytest.raises(ValueError, match="init = 'ones' is out of range"):
        batchnorm_only(ResNet(1), init="ones")


def test_a_shared_parameter_is_refused():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.LayerNorm(4))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"1\.weight.* is out of range: parameters that normalization shares"):
        batchnorm_only(model)


def test_unfreezing_restores_the_flags():
    model = ResNet(1)
    model.output.bias.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    report = batchnorm_only(model)
    assert [p.requires_grad for p in unfreeze(model, report).parameters()] == flags
    with pytest.raises(ValueError, match="parameters of the model"):
        unfreeze(nn.Linear(2, 2), report)


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"per_channel": 50}, {"per_channel": None, "count": 7}])
def test_the_control_trains_its_entries_alone(make, options):
    model = ResNet(1)
    convolutions = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    first = {name: m.weight.detach().clone() for name, m in convolutions.items()}
    norms = [m.weight.detach().clone() for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    subset = random_per_channel(model, **options, generator=torch.Generator().manual_seed(2))
    assert subset.report.trained_count == subset.count
    steps(model, make)
    assert subset.remove() is model and all(p.requires_grad for p in model.parameters())
    for name, conv in convolutions.items():
        moved = conv.weight.detach() != first[name]
        expected = torch.zeros(moved.numel(), dtype=torch.bool)
        expected[subset.indices[name]] = True
        assert torch.equal(moved.flatten(), expected)
        if "count" in options:
            assert moved.sum() == 7
        else:
            each = min(options.get("per_channel", 2), conv.weight[0].numel())
            assert (moved.flatten(1).sum(1) == each).all()
    assert all(map(torch.equal, norms, (m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d))))


def test_the_control_is_as_large_and_repeats():
    one, other = (random_per_channel(ResNet(2), generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.count == other.count == batchnorm_only(ResNet(2)).trained_count
    assert all(torch.equal(one.indices[name], other.indices[name]) for name in one.indices)
    shared = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1))
    shared[1].weight = shared[0].weight
    with pytest.raises(ValueError, match="whose layers share no weight"):
        random_per_channel(shared)
    with pytest.raises(ValueError, match="per_channel = 2 is out of range: None if, and only if, count is not"):
        random_per_channel(ResNet(1), count=3)
    with pytest.raises(ValueError, match="per_channel = 0 is out of range: >= 1"):
        random_per_channel(ResNet(1), 0)


def test_disabled_features_and_pruning():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    model[1].weight.data = torch.tensor([0.005, -0.02, -0.009, 1.0])
    model[1].bias.data = torch.arange(4.0)
    found = disabled_features(model)
    assert found["1"].tolist() == [True, False, True, False]
    assert found.share == 0.5 and found.shares == {"1": 0.5}
    found.prune_()
    assert model[1].weight.tolist() == [0.0, torch.tensor(-0.02).item(), 0.0, 1.0]
    out = model(torch.randn(2, 1, 5, 5))
    assert (out[:, 0] == 0).all() and (out[:, 2] == 2).all() and out[:, 3].std() > 0


def test_in_the_bench():
    from types import SimpleNamespace

    from assay.bench.recipe import Budget
    from assay.bench.tasks import resolve_task

    task = resolve_task("digits(model='mlp')")
    network = apply(DEFAULT_RECIPE).model(SimpleNamespace(task=task, data=task.train, budget=Budget()))
    trained = {n for n, p in network.named_parameters() if p.requires_grad}
    assert trained and all(isinstance(network.get_submodule(n.rpartition(".")[0]), nn.BatchNorm1d) for n in trained)


def frozen_statistics(model: nn.Module) -> None:
    """The broken variant of the card: the layers stay in evaluation, as if only weight and bias were theirs."""
    batchnorm_only(model)
    model.eval()


def test_the_claim_does_not_hold_in_evaluation():
    short = {"arms": (NORMS,), "depths": (1,), "epochs": 16, "seeds": 6}
    real, broken = (claim(Bench(), method=method, **short) for method in (batchnorm_only, frozen_statistics))
    assert (real.checks[0].verdict, broken.checks[0].verdict) == (HOLDS, FAILS)


def test_the_claim_runs_and_is_drawn():
    assert figure(claim(Bench(quick=True), depths=(1,), epochs=10)) is not None
