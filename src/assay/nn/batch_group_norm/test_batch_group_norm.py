"""Batch group normalization against the paper's formula, its reductions, and a broken variant of its claim."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from assay.bench.evidence import FAILS, Bench
from assay.bench.recipe import Budget
from assay.nn import (
    BatchGroupNorm1d,
    BatchGroupNorm2d,
    BatchGroupNorm3d,
    NoEffectWarning,
    convert_batchnorm_,
    suggest_groups,
)
from assay.nn._contract import Example
from assay.nn.batch_group_norm.batch_group_norm import apply
from assay.nn.batch_group_norm.claim import claim, figure
from assay.nn.functional import batch_group_norm

EXAMPLES = [
    Example(partial(BatchGroupNorm1d, 6, num_groups=2), (4, 6), nn.BatchNorm1d(6)),
    Example(partial(BatchGroupNorm1d, 6, num_groups=1, affine=False), (3, 6, 5), nn.BatchNorm1d(6, affine=False)),
    Example(partial(BatchGroupNorm2d, 6), (4, 6, 3, 4), nn.BatchNorm2d(6)),
    Example(partial(BatchGroupNorm2d, 6, num_groups=3), (4, 6, 3, 4), nn.BatchNorm2d(6)),
    Example(partial(BatchGroupNorm2d, 4, num_groups=12, momentum=None), (3, 4, 3, 2), nn.BatchNorm2d(4)),
    Example(partial(BatchGroupNorm2d, 4, num_groups=6), (3, 4, 3, 2), nn.BatchNorm2d(4)),
    Example(partial(BatchGroupNorm3d, 4, num_groups=2, eps=1e-3), (3, 4, 2, 2, 2), nn.BatchNorm3d(4)),
]
PLAIN = {BatchGroupNorm1d: nn.BatchNorm1d, BatchGroupNorm2d: nn.BatchNorm2d, BatchGroupNorm3d: nn.BatchNorm3d}
SHAPES = {BatchGroupNorm1d: (5, 6, 4), BatchGroupNorm2d: (5, 6, 3, 4), BatchGroupNorm3d: (5, 6, 2, 3, 2)}
exactly = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 0.7


def disturbed(layer: nn.Module) -> nn.Module:
    """Affine parameters and running statistics away from ones and zeros."""
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            tensor.add_(normal(len(tensor), seed=len(tensor)).abs())
    return layer


class Oracle:
    """The paper's five steps in plain loops over numpy arrays."""

    def __init__(self, groups: int, gamma: np.ndarray, beta: np.ndarray, momentum: float = 0.1, eps: float = 1e-5):
        self.groups, self.gamma, self.beta, self.momentum, self.eps = groups, gamma, beta, momentum, eps
        self.mean, self.var = np.zeros(groups), np.ones(groups)

    def __call__(self, x: np.ndarray, training: bool) -> np.ndarray:
        examples, channels = x.shape[:2]
        merged = [[value for plane in example for row in plane for value in row] for example in x.tolist()]
        size = len(merged[0]) // self.groups
        out = np.empty((examples, len(merged[0])))
        for g in range(self.groups):
            members = range(g * size, (g + 1) * size)
            mean, var = self.mean[g], self.var[g]
            if training:
                values = [merged[n][i] for n in range(examples) for i in members]
                mean = sum(values) / len(values)
                squares = sum((value - mean) ** 2 for value in values)
                var = squares / len(values)
                self.mean[g] += self.momentum * (mean - self.mean[g])
                self.var[g] += self.momentum * (squares / (len(values) - 1) - self.var[g])
            for n in range(examples):
                for i in members:
                    c = i // (len(merged[0]) // channels)
                    out[n, i] = self.gamma[c] * (merged[n][i] - mean) / np.sqrt(var + self.eps) + self.beta[c]
        return out.reshape(x.shape)


@pytest.mark.parametrize("groups", [1, 3, 4, 6, 8, 12, 24, 72])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_papers_formula_over_three_training_steps_and_evaluation(groups, layout):
    layer = BatchGroupNorm2d(6, groups, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(normal(6, seed=1))
        layer.bias.copy_(normal(6, seed=2))
    oracle = Oracle(groups, layer.weight.detach().numpy(), layer.bias.detach().numpy())
    for step in range(4):
        layer.train(step < 3)
        x = normal(5, 6, 3, 4, seed=10 + step)
        y = layer(x.to(memory_format=layout))
        assert y.is_contiguous(memory_format=layout)
        np.testing.assert_allclose(y.detach().numpy(), oracle(x.numpy(), step < 3), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose([layer.running_mean, layer.running_var], [oracle.mean, oracle.var], rtol=1e-9)
    assert layer.num_batches_tracked == 3


@pytest.mark.parametrize("layer", PLAIN)
@pytest.mark.parametrize("momentum", [0.3, None])
def test_with_a_group_per_channel_it_is_torchs_batch_norm(layer, momentum):
    plain = disturbed(PLAIN[layer](6, momentum=momentum, dtype=torch.float64))
    ours = layer(6, momentum=momentum, dtype=torch.float64)
    ours.load_state_dict(plain.state_dict())
    for step in range(4):
        x = normal(*SHAPES[layer], seed=step)
        results = []
        for norm in (plain.train(step < 3), ours.train(step < 3)):
            leaf = x.clone().requires_grad_()
            output = norm(leaf)
            results.append([output, *torch.autograd.grad(output.sin().sum(), [leaf, norm.weight, norm.bias])])
        exactly(*results)
    exactly(dict(plain.state_dict()), dict(ours.state_dict()))
    plain.load_state_dict(ours.state_dict())


def test_without_running_statistics_evaluation_uses_the_batch_as_torchs_does():
    x = normal(4, 6)
    layer, plain = (cls(6, track_running_stats=False).double() for cls in (BatchGroupNorm1d, nn.BatchNorm1d))
    assert not list(layer.buffers()) and list(layer.state_dict()) == ["weight", "bias"]
    exactly(layer.eval()(x), plain.eval()(x))
    exactly(layer.train()(x), plain.train()(x))
    banded = BatchGroupNorm2d(2, 4, track_running_stats=False).double()
    banded(normal(2, 2, 4, 4))
    assert banded.eval()(normal(2, 2, 6, 6)).shape == (2, 2, 6, 6)  # no statistic of training, no resolution to keep


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_one_example_in_training_is_group_norm(groups):
    x, weight, bias = normal(1, 6, 3, 4), normal(6, seed=1), normal(6, seed=2)
    ours = batch_group_norm(x, groups, None, None, weight, bias, training=True)
    exactly(ours, F.group_norm(x, groups, weight, bias))


def test_one_group_pools_the_whole_batch():
    x = normal(3, 6, 2, 5)
    exactly(batch_group_norm(x, 1, training=True, eps=1e-3), (x - x.mean()) / (x.var(correction=0) + 1e-3).sqrt())


def test_twice_as_many_groups_as_channels_cut_the_upper_from_the_lower_rows():
    x = normal(3, 2, 4, 5)
    bands = [x[:, c : c + 1, rows] for c in range(2) for rows in (slice(0, 2), slice(2, 4))]
    upper0, lower0, upper1, lower1 = [F.batch_norm(band, None, None, training=True) for band in bands]
    manual = torch.cat([torch.cat([upper0, lower0], 2), torch.cat([upper1, lower1], 2)], 1)
    exactly(batch_group_norm(x, 4, training=True), manual)


@given(
    examples=st.integers(2, 5),
    channels=st.integers(1, 6),
    pixels=st.lists(st.integers(1, 4), max_size=3),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_groups_have_mean_zero_and_the_variance_that_eps_leaves(examples, channels, pixels, data):
    x = normal(examples, channels, *pixels)
    values = x[0].numel()
    groups = data.draw(st.sampled_from([g for g in range(1, values + 1) if values % g == 0]))
    eps = data.draw(st.sampled_from([1e-9, 1e-5, 1.0]))
    cut = (examples, groups, values // groups)
    y, before = batch_group_norm(x, groups, training=True, eps=eps).reshape(cut), x.reshape(cut)
    var = before.var((0, 2), correction=0)
    exactly(y.mean((0, 2)), torch.zeros(groups, dtype=torch.float64))
    torch.testing.assert_close(y.var((0, 2), correction=0), var / (var + eps), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 3, 6, 12])
def test_the_layout_in_memory_does_not_matter(groups):
    x, gradient = normal(4, 6, 4, 4), normal(4, 6, 4, 4, seed=1)
    weight, bias = normal(6, seed=1), normal(6, seed=2)
    layouts = [x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)]
    layouts += [x.expand(2, *x.shape)[1], torch.stack([x, x], -1)[..., 0], x.flip(0).flip(0)]
    for training in (True, False):
        results = []
        for layout in layouts:
            leaf = layout.detach().requires_grad_()
            running = [torch.full((groups,), 0.5, dtype=torch.float64), torch.full((groups,), 2.0, dtype=torch.float64)]
            y = batch_group_norm(leaf, groups, *running, weight, bias, training)
            results.append([y.detach(), torch.autograd.grad(y, leaf, gradient)[0], *running])
        for result in results[1:]:
            exactly(result, results[0])


@pytest.mark.parametrize("groups", [1, 2, 6, 12, 9])
def test_evaluation_sees_no_other_example_and_changes_nothing(groups):
    layer = disturbed(BatchGroupNorm2d(6, groups, dtype=torch.float64))
    layer(normal(5, 6, 3, 4))
    before = copy.deepcopy(layer.eval().state_dict())
    x = normal(5, 6, 3, 4, seed=3)
    alone = layer(x[:1])
    x[1:] *= 1e6
    exactly(layer(x)[:1], alone)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("layer", PLAIN)
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("affine", [True, False])
def test_as_a_plain_batch_norm_it_evaluates_the_same(layer, groups, affine):
    ours = layer(6, groups, eps=1e-3, affine=affine, dtype=torch.float64).requires_grad_(False)
    ours(normal(*SHAPES[layer]))
    plain = ours.eval().to_batchnorm()
    assert type(plain) is PLAIN[layer] and not plain.training and plain.num_batches_tracked == 1
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    x = normal(*SHAPES[layer], seed=1)
    expected = ours(x)
    exactly(plain(x), expected)
    ours.train()(x)
    for tensor in ours.parameters():
        tensor.add_(1)
    exactly(plain(x), expected)


def test_a_convolution_before_it_can_be_fused():
    convolution, norm = nn.Conv2d(3, 6, 3).double(), disturbed(BatchGroupNorm2d(6, 2, dtype=torch.float64))
    model = nn.Sequential(convolution, norm).eval()
    fused = torch.nn.utils.fuse_conv_bn_eval(convolution, norm.to_batchnorm())
    torch.testing.assert_close(fused(normal(2, 3, 5, 5)), model(normal(2, 3, 5, 5)))


def test_a_cumulative_average_weighs_all_batches_alike():
    layer, banded = BatchGroupNorm1d(6, 2, momentum=None).double(), BatchGroupNorm1d(6, 3, momentum=None).double()
    batches = [normal(4, 6, seed=seed) for seed in range(3)]
    for x in batches:
        layer(x), banded(x)
    exactly(layer.running_mean, torch.stack([x.view(4, 2, 3).mean((0, 2)) for x in batches]).mean(0))
    exactly(banded.running_var, torch.stack([x.view(4, 3, 2).var((0, 2)) for x in batches]).mean(0))
    layer.reset_running_stats()
    assert [layer.num_batches_tracked.item(), *layer.running_mean, *layer.running_var] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("dtype, close", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("groups", [1, 3, 6, 12])
def test_half_precision_is_normalized_in_float32(dtype, close, groups):
    """Rounded once, at the end; with a mean where E[x^2] - E[x]^2 in half precision would have no correct digit."""
    x = (normal(8, 6, 4, 4) + 30).to(dtype)
    layer = disturbed(BatchGroupNorm2d(6, groups))
    exact = copy.deepcopy(layer).double()
    for training in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer.train(training)(x)
        assert y.dtype == dtype and layer.running_mean.dtype == layer.running_var.dtype == torch.float32
        torch.testing.assert_close(y.double(), exact.train(training)(x.double()), rtol=close, atol=1e-4)
        torch.testing.assert_close(layer.running_var.double(), exact.running_var, rtol=1e-5, atol=1e-5)
    assert layer.to(dtype)(x).dtype == dtype


@pytest.mark.parametrize("groups", [1, 4, 8, 16])
def test_an_empty_batch_is_treated_as_torch_treats_it(groups):
    layer = BatchGroupNorm2d(8, groups, momentum=None)
    x = torch.empty(0, 8, 2, 2, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape and layer.running_mean.eq(0).all() and layer.running_var.eq(1).all()
    assert layer.eval()(x).shape == x.shape


def test_the_noise_of_the_mean_falls_with_the_instances_per_group():
    """The point of the method: var(mean_g) = sigma^2 / (N*S) for identical channels, whatever makes up N*S."""
    generator = torch.Generator().manual_seed(0)
    for examples, groups in [(2, 16), (2, 4), (2, 1), (8, 16), (8, 64), (32, 16)]:
        layer = BatchGroupNorm2d(16, groups, momentum=1.0)
        means = []
        for _ in range(400):
            layer(torch.randn(examples, 16, 2, 2, generator=generator))
            means.append(layer.running_mean.clone())
        expected = 1 / (examples * 64 / groups)
        assert expected / 1.3 < torch.stack(means).var() < expected * 1.3


@pytest.mark.parametrize("groups", [0, -1, 5, 2.0, 144])
def test_a_number_of_groups_that_does_not_divide_is_refused(groups):
    with pytest.raises(ValueError, match=rf"num_groups = {groups} .* D = 72"):
        batch_group_norm(torch.randn(2, 6, 3, 4), groups, training=True)


def test_wrong_arguments_are_refused():
    for name, value in [("num_features", 0), ("num_groups", 0), ("num_groups", 1.5), ("eps", 0), ("momentum", 2)]:
        with pytest.raises(ValueError, match=f"{name} = {value}"):
            BatchGroupNorm2d(**{"num_features": 6, name: value})
    with pytest.raises(ValueError, match="one value per group in training"):
        BatchGroupNorm1d(6, 6)(torch.randn(1, 6))
    with pytest.raises(ValueError, match="running_mean and running_var are needed"):
        batch_group_norm(torch.randn(2, 6), 3)
    with pytest.raises(ValueError, match=r"\(2, 6\): \(N, C, H, W\) with C = 6"):
        BatchGroupNorm2d(6)(torch.randn(2, 6))
    with pytest.raises(ValueError, match=r"\(N, C\) or \(N, C, L\) with C = 6"):
        BatchGroupNorm1d(6)(torch.randn(2, 5))
    assert BatchGroupNorm1d(6, 3)(torch.randn(1, 6)).shape == (1, 6)


def test_bands_of_pixels_ask_for_the_resolution_of_training_in_evaluation():
    large, small = torch.randn(2, 2, 6, 6), torch.randn(2, 2, 4, 4)
    banded, whole = BatchGroupNorm2d(2, 4), BatchGroupNorm2d(2, 1)
    banded.eval()(small)  # nothing known yet
    banded.train()(large)
    with pytest.raises(ValueError, match=r"channels of 36 pixels in training; .* 16 pixels"):
        banded.eval()(small)
    with pytest.raises(ValueError, match="36 pixels"):
        copy.deepcopy(banded)(small)
    banded.eval()(large.reshape(2, 2, 4, 9))
    whole.train()(large)
    whole.eval()(small)
    with pytest.raises(ValueError, match="num_groups = 4 is out of range"):
        banded.to_batchnorm()
    with pytest.raises(ValueError, match="track_running_stats"):
        BatchGroupNorm2d(2, 1, track_running_stats=False).to_batchnorm()


@given(st.integers(1, 700), st.integers(1, 96), st.integers(1, 12), st.none() | st.integers(1, 10**6))
@settings(max_examples=100, deadline=None)
def test_suggested_groups_are_the_nearest_that_keep_channels_or_bands_whole(batch_size, channels, side, target):
    for spatial, positions in ((None, 1), (side * side, side * side), ((side, side), side * side)):
        groups = suggest_groups(batch_size, channels, spatial, target)
        assert channels % groups == 0 or (groups % channels == 0 and positions % (groups // channels) == 0)
        assert spatial is not None or groups <= channels
        allowed = [g for g in range(1, channels + 1) if channels % g == 0]
        allowed += [channels * bands for bands in range(1, positions + 1) if positions % bands == 0]
        wanted = batch_size * channels * positions / (target or 32 * positions)
        nearest = min(abs(np.log(g / wanted)) for g in allowed)
        assert abs(np.log(groups / wanted)) == pytest.approx(nearest)


def test_suggested_groups_by_hand():
    assert [suggest_groups(n, 64) for n in (1, 2, 4, 16, 32, 600)] == [2, 4, 8, 32, 64, 64]
    assert [suggest_groups(n, 6, (4, 4)) for n in (2, 32, 64, 600)] == [1, 6, 12, 96]
    assert suggest_groups(2, 64, target_instances=2) == 64 and suggest_groups(2, 64, target_instances=10**6) == 1
    for name, arguments in [("batch_size", (0, 4)), ("num_features", (2, 0)), ("spatial", (2, 4, 0))]:
        with pytest.raises(ValueError, match=f"{name} = 0"):
            suggest_groups(*arguments)
    with pytest.raises(ValueError, match=r"target_instances = 0\.5"):
        suggest_groups(2, 4, target_instances=0.5)


def test_converting_a_model_keeps_the_affine_weights_and_asks_for_the_groups_by_name():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-3), nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    ).double()
    for norm in (model[1], model[2][1]):
        disturbed(norm)
    before = copy.deepcopy(model).eval()
    asked = []
    assert convert_batchnorm_(model, lambda name, channels: asked.append((name, channels)) or channels) is model
    assert asked == [("1", 8), ("2.1", 4)] and model[1].eps == 1e-3
    exactly(model.eval()(normal(2, 3, 8, 8)), before(normal(2, 3, 8, 8)))
    fresh = convert_batchnorm_(copy.deepcopy(before), 2)
    torch.testing.assert_close(fresh[1].weight, before[1].weight, rtol=0, atol=0)
    assert fresh[1].num_groups == 2 and fresh[1].running_mean.eq(0).all() and fresh[1].num_batches_tracked == 0
    assert {layer: type(convert_batchnorm_(plain(4), 2)) for layer, plain in PLAIN.items()} == {
        layer: layer for layer in PLAIN
    }
    with pytest.warns(NoEffectWarning):
        convert_batchnorm_(nn.Sequential(nn.SyncBatchNorm(4)), 2)


def groups_of(model: nn.Module) -> list[int]:
    return [layer.num_groups for layer in model.modules() if hasattr(layer, "num_groups")]


def test_in_the_bench_the_groups_follow_the_batch_size():
    from assay.bench.arms import DEFAULT_RECIPE
    from assay.bench.tasks import resolve_task

    def model(task: str, batch_size: int, **options: int) -> nn.Module:
        task = resolve_task(task)
        run = SimpleNamespace(task=task, data=task.train, budget=Budget(batch_size=batch_size))
        return apply(DEFAULT_RECIPE, **options).model(run)

    assert groups_of(model("digits", 64)) == [32, 64, 64]  # 64 = 2 * 32: each channel in two bands
    assert groups_of(model("digits", 64, target_batch=512)) == [2, 4, 4]
    assert groups_of(model("digits", 64, num_groups=8)) == [8, 8, 8]
    assert groups_of(model("digits(model='mlp')", 64)) == [64, 64]
    assert groups_of(model("digits(model='mlp')", 4, target_batch=128)) == [2, 2]
    assert all(layer.training for layer in model("digits", 4).modules())
    for options in ({"num_groups": 0}, {"target_batch": 0.5}):
        with pytest.raises(ValueError, match="is out of range"):
            apply(DEFAULT_RECIPE, **options)


class IgnoresGroups(nn.BatchNorm2d):
    """The broken variant of the card: it takes the number of groups and does nothing with it."""

    def __init__(self, num_features: int, num_groups: int):
        super().__init__(num_features)


def test_the_claim_does_not_hold_for_a_variant_that_ignores_the_groups():
    bench = Bench(quick=True)
    broken = claim(bench, method=IgnoresGroups, parts=("small batch",))
    assert broken.verdict == FAILS
    real = claim(bench, parts=("small batch",))
    assert real.verdict != FAILS and real.checks[0].observed > 0.03
    assert figure(real) is not None
