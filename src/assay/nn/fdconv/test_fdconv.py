"""Frequency dynamic convolution against the paper's formulas in loops, its start as a plain convolution, and breaks."""

from __future__ import annotations

import copy
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from assay.bench.evidence import FAILS, HOLDS, Bench
from assay.nn import (
    FDConv2d,
    FrequencyBandModulation,
    KernelSpatialModulation,
    NoEffectWarning,
    convert_to_fdconv,
    fourier_groups,
    swap,
)
from assay.nn._contract import Example
from assay.nn.fdconv import fdconv
from assay.nn.fdconv.claim import CONV, FD, claim, figure
from assay.nn.fdconv.fdconv import apply


def factors(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([factor.flatten(1) for factor in layer(x) if factor is not None], 1)


EXAMPLES = [
    Example(
        partial(FDConv2d, 2, 2, 3, padding=1, kernel_num=3, min_channels=2),
        (3, 2, 4, 3),
        nn.Conv2d(2, 2, 3, padding=1),
    ),
    Example(
        partial(FDConv2d, 2, 4, 2, stride=2, kernel_num=2, param_ratio=2, groups=2, min_channels=2, ksm_act="softmax"),
        (3, 2, 4, 5),
        nn.Conv2d(2, 4, 2, stride=2, groups=2),
    ),
    Example(
        partial(FDConv2d, 3, 4, 1, kernel_num=2, param_reduction=0.7, min_channels=2, ksm_act="tanh", ksm_local=False),
        (3, 3, 2, 3),
        nn.Conv2d(3, 4, 1),
    ),
    Example(partial(FDConv2d, 2, 2, (1, 3), kernel_num=8, param_ratio=3, min_channels=1), (2, 2, 2, 4)),
    Example(partial(KernelSpatialModulation, 3, 2, 2, kernel_num=2, min_channels=2), (3, 3, 3, 2), forward=factors),
    Example(partial(FrequencyBandModulation, 4, groups=2), (2, 4, 5, 4)),
]
CONVOLUTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": "same", "groups": 4, "padding_mode": "circular", "bias": False},
    {"kernel_size": (1, 3), "padding": (0, 1), "groups": 12},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 5, "padding": "valid"},
]
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def disturbed(layer: nn.Module) -> nn.Module:
    """In evaluation, with parameters far from their first values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return layer.eval()


class Oracle:
    """The paper's formulas, one example and one output channel at a time, for a disturbed layer in evaluation."""

    def __init__(self, layer: FDConv2d) -> None:
        self.layer, self.ksm, self.fbm = layer, layer.ksm, layer.fbm

    def factor(self, logit: Tensor) -> Tensor:
        return 1 + torch.tanh(logit) if self.ksm.act == "tanh" else self.ksm.att_multi / (1 + torch.exp(-logit))

    def kernel(self, x: Tensor) -> Tensor:
        """For x (Cin, H, W)."""
        layer, ksm = self.layer, self.ksm
        (cout, cin, groups), (kh, kw) = (layer.out_channels, layer.in_channels, layer.groups), layer.kernel_size
        mean = x.flatten(1).mean(1)
        t = F.batch_norm((ksm.reduce.weight @ mean)[None], ksm.norm.running_mean, ksm.norm.running_var)[0]
        t = t * ksm.norm.weight + ksm.norm.bias
        feature = ksm.act_feature.scale * torch.where(t > 0, t * t, 0) + ksm.act_feature.bias
        logits = {name: (head.weight @ feature + head.bias) / ksm.temperature for name, head in ksm.heads.items()}
        shares = logits["kernel"].softmax(0)
        if ksm.act != "softmax":
            shares = self.factor(logits["kernel"]) * (1 if ksm.act == "tanh" else 2 / ksm.att_multi) / ksm.kernel_num
        d1, d2 = cout * kh, cin // groups * kw
        spectrum = torch.zeros(d1 * (d2 // 2 + 1), dtype=torch.complex128)
        alpha = (min(cin, cout) // 2) * layer.kernel_num * layer.param_ratio / layer.param_reduction
        order = torch.cat(fourier_groups(d1, d2, layer.kernel_num))[: len(layer.indices)]
        rings = fourier_groups(d1, d2, layer.kernel_num)
        if layer.param_reduction < 1:
            rings = order.tensor_split(layer.kernel_num)
        for r in range(layer.param_ratio):
            entries = torch.complex(*layer.dft_weight[r].reshape(-1, 2).unbind(1))
            for i, ring in enumerate(rings):
                for index in ring.tolist():
                    stored = (order == index).nonzero().item() if layer.param_reduction < 1 else index
                    spectrum[index] += alpha * shares[r * layer.kernel_num + i] * entries[stored]
        matrix = torch.fft.irfft(torch.fft.ifft(spectrum.view(d1, -1), dim=0), n=d2, dim=1)
        kernel = torch.zeros(cout, cin // groups, kh, kw, dtype=torch.float64)
        if ksm.local is not None:
            normalized = F.layer_norm(mean, (cin,), ksm.local_norm.weight, ksm.local_norm.bias)
            local = F.conv1d(normalized[None, None], ksm.local[:, None], padding=ksm.local.shape[1] // 2)[0]
            local = local.view(cout, kh, kw, cin)
        for o in range(cout):
            for i in range(cin // groups):
                channel = o // (cout // groups) * (cin // groups) + i
                for u in range(kh):
                    for v in range(kw):
                        w = matrix[o * kh + u, i * kw + v] * self.factor(logits["channel"])[channel]
                        w = w * (self.factor(logits["filter"])[o] if "filter" in logits else 1)
                        w = w * (self.factor(logits["spatial"])[u * kw + v] if "spatial" in logits else 1)
                        w = w * (self.factor(local[o, u, v, channel]) if ksm.local is not None else 1)
                        kernel[o, i, u, v] = w
        return kernel

    def bands(self, x: Tensor) -> Tensor:
        if self.fbm is None:
            return x
        height, width = x.shape[1:]
        logits, groups = self.fbm.weigh(x[None])[0], self.fbm.weigh.groups
        frequency = torch.maximum(torch.fft.fftfreq(height).abs()[:, None], torch.fft.rfftfreq(width))
        y, before = torch.zeros_like(x), x
        for i, r in enumerate(self.fbm.bands):
            mask = frequency < 0.5 / r - 1e-6
            low = torch.fft.irfft2(torch.fft.rfft2(x, norm="ortho") * mask, s=(height, width), norm="ortho")
            for c in range(len(x)):
                group = c // (len(x) // groups)
                y[c] += 2 / (1 + torch.exp(-logits[group * len(self.fbm.bands) + i])) * (before - low)[c]
            before = low
        return y + before

    def __call__(self, x: Tensor) -> Tensor:
        plain = nn.Conv2d(
            self.layer.in_channels,
            self.layer.out_channels,
            self.layer.kernel_size,
            self.layer.stride,
            self.layer.padding,
            self.layer.dilation,
            self.layer.groups,
            padding_mode=self.layer.padding_mode,
            bias=self.layer.bias is not None,
        ).double()
        plain.bias = self.layer.bias
        outputs = []
        for example in x:
            plain.weight = nn.Parameter(self.kernel(example))
            outputs.append(plain(self.bands(example)[None]))
        return torch.cat(outputs)


@pytest.mark.parametrize(
    "arguments, options",
    [
        (CONVOLUTIONS[0], {"kernel_num": 5, "temperature": 1.7, "att_multi": 1.5, "fbm_groups": 2}),
        (CONVOLUTIONS[1], {"kernel_num": 3, "ksm_act": "tanh", "param_ratio": 2, "fbm_bands": (3,)}),
        (CONVOLUTIONS[2], {"kernel_num": 20, "ksm_act": "softmax"}),
        (CONVOLUTIONS[3], {"kernel_num": 2, "param_reduction": 0.4}),
        (CONVOLUTIONS[4], {"kernel_num": 17, "param_reduction": 0.5, "ksm_local": False}),
    ],
)
def test_the_papers_formulas(arguments, options):
    layer = disturbed(FDConv2d(12, 12, **arguments, **options, dtype=torch.float64))
    close(layer(normal(2, 12, 9, 8)), Oracle(layer)(normal(2, 12, 9, 8)))


@pytest.mark.parametrize("arguments", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("options", [{}, {"kernel_num": 20}, {"param_ratio": 3, "ksm_act": "tanh"}], ids=str)
def test_it_starts_as_the_convolution_that_it_is_made_from(arguments, options):
    conv = nn.Conv2d(12, 24, **arguments).double()
    layer, x = FDConv2d.from_conv(conv, **options), normal(4, 12, 11, 9)
    assert layer.bias is conv.bias
    for training in (True, False):
        expected, y = conv(x), layer.train(training)(x)
        assert y.shape == expected.shape and (y - expected).norm() < 1e-4 * expected.norm()
    close(layer(x[0]), layer(x)[0])


@pytest.mark.parametrize("arguments", CONVOLUTIONS[1:4], ids=str)
def test_an_exported_layer_takes_any_number_of_examples(arguments):
    layer, x = disturbed(FDConv2d(12, 12, **arguments, dtype=torch.float64)), normal(4, 12, 9, 8)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    close(program.module()(x[:3]), layer(x[:3]))


@given(st.integers(1, 20), st.integers(1, 20), st.data())
@settings(max_examples=60, deadline=None)
def test_rings_are_a_partition_from_low_to_high(d1, d2, data):
    half = d2 // 2 + 1
    n = data.draw(st.integers(1, d1 * half))
    rings = fourier_groups(d1, d2, n)
    assert len(rings) == n and torch.equal(torch.cat(rings).sort().values, torch.arange(d1 * half))
    radius = torch.hypot(torch.fft.fftfreq(d1).double()[:, None], torch.fft.rfftfreq(d2).double()).flatten()
    radii = [radius[ring] for ring in rings if len(ring)]
    assert all(low.max() <= high.min() + 1e-7 for low, high in pairwise(radii))
    assert max(map(len, rings)) - min(map(len, rings)) <= 3


@pytest.mark.parametrize("size", [(16, 16, 3, 4), (6, 5, 3, 7), (8, 4, 1, 5)])
def test_kernels_of_different_rings_are_orthogonal(size):
    cout, cin, k, number = size
    layer = FDConv2d(cin, cout, k, kernel_num=number, dtype=torch.float64)
    torch.nn.init.normal_(layer.dft_weight)
    kernels = layer._mixed(torch.eye(number, dtype=torch.float64)).flatten(1)
    kernels = kernels / kernels.norm(dim=1, keepdim=True)
    torch.testing.assert_close(kernels @ kernels.T, torch.eye(number, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("reduction", [1.0, 0.6])
def test_mixing_kernels_and_mixing_spectra_are_the_same(reduction, monkeypatch):
    layer, shares = FDConv2d(6, 4, 3, kernel_num=5, param_ratio=2, param_reduction=reduction).double(), normal(3, 10)
    kernels = layer._mixed(shares)
    monkeypatch.setattr(fdconv, "_FEW", 0)
    close(layer._mixed(shares), kernels)


def test_every_example_has_its_own_kernel_and_the_factors_may_go_to_the_maps():
    layer = disturbed(FDConv2d(6, 8, 3, padding=1, fbm=False, dtype=torch.float64))
    for x in (normal(3, 6, 2, 2), normal(3, 6, 20, 20)):  # too few pixels to fold the factors, and enough
        kernels = layer.materialize(x)
        assert (kernels[0] - kernels[1]).abs().max() > 1e-3
        one_by_one = [
            F.conv2d(example[None], kernel, layer.bias, padding=1) for example, kernel in zip(x, kernels, strict=True)
        ]
        close(layer(x), torch.cat(one_by_one))


@pytest.mark.parametrize("height, width", [(8, 8), (9, 7), (1, 16), (24, 20)])
def test_bands_sum_to_the_input_and_weights_of_one_change_nothing(height, width):
    layer, x = FrequencyBandModulation(3, dtype=torch.float64), normal(2, 3, height, width)
    close(sum(layer.split(x)), x)
    nn.init.zeros_(layer.weigh.weight)
    close(layer(x), x)
    mean, low = x.mean((2, 3), keepdim=True), FrequencyBandModulation(3, bands=(64,)).split(x)[1]
    close(low, mean.expand_as(low))  # below 1/128 there is only the mean


def test_a_wave_at_the_edge_of_a_band_belongs_to_the_higher_one():
    wave = torch.cos(2 * torch.pi * 3 * torch.arange(12.0, dtype=torch.float64) / 12)  # 1/4 cycle per pixel
    high, low = FrequencyBandModulation(1, bands=(2,)).split(wave.expand(1, 1, 12, 12))
    assert low.abs().max() < 1e-12 < high.abs().max()


def test_the_weight_costs_what_a_plain_one_does():
    for cout, cin, k in [(16, 16, 3), (32, 20, 1), (17, 19, 3)]:
        layer = FDConv2d(cin, cout, k)
        assert layer.dft_weight.numel() <= 1.1 * (cout * cin * k * k + 2 * cout * k)
        reduced = FDConv2d(cin, cout, k, param_reduction=0.25).dft_weight
        assert reduced.numel() <= layer.dft_weight.numel() / 4


def test_the_lowest_frequencies_are_what_a_reduced_weight_keeps():
    conv = nn.Conv2d(8, 8, 3, padding=1).double()
    layer, whole = FDConv2d.from_conv(conv, param_reduction=0.5), FDConv2d.from_conv(conv)
    with torch.no_grad():
        whole.dft_weight.view(-1, 2)[torch.cat(fourier_groups(24, 24, 1))[len(layer.indices) :]] = 0
    close(layer.materialize(normal(1, 8, 4, 4)), whole.materialize(normal(1, 8, 4, 4)), rtol=1e-4, atol=1e-6)


def test_a_single_example_trains_on_the_running_statistics():
    layer = FDConv2d(4, 4, 3).double()
    layer(normal(5, 4, 6, 6))
    before, x = copy.deepcopy(layer.state_dict()), normal(1, 4, 6, 6)
    y = layer(x)
    close(layer.eval()(x), y)
    close(dict(layer.state_dict()), dict(before))
    assert "indices" not in before
    layer.to_empty(device="cpu").reset_parameters()
    close(layer.indices, FDConv2d(4, 4, 3).indices)
    assert layer.train()(normal(2, 4, 6, 6)).isfinite().all()


def test_half_precision():
    layer, x = FDConv2d(32, 32, 3, padding=1), torch.randn(2, 32, 8, 8)
    exact = layer(x)
    y = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)


def test_which_layers_are_converted():
    model = nn.Sequential(
        nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 5), nn.Conv2d(32, 32, 1, bias=False)
    ).eval()
    model[3].requires_grad_(False)
    plain, x = copy.deepcopy(model), torch.randn(2, 16, 12, 12)
    assert convert_to_fdconv(model, kernel_num=8) is model
    assert [isinstance(layer, FDConv2d) for layer in model] == [False, True, False, True]
    assert not model[1].training and not any(p.requires_grad for p in model[3].parameters())
    torch.testing.assert_close(model(x), plain(x), rtol=1e-3, atol=1e-4)
    convert_to_fdconv(model, lambda name, conv: name == "2")
    assert isinstance(model[2], FDConv2d) and model[2].fbm is None
    with pytest.warns(NoEffectWarning):
        convert_to_fdconv(nn.Sequential(nn.Conv2d(3, 8, 3)))
    swapped = swap(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)), nn.Conv2d, FDConv2d, kernel_num=2)
    assert "padding=(1, 1), bias=True, kernel_num=2" in repr(swapped)


def test_arguments_out_of_range_are_named():
    wrong = {"kernel_num": 0, "reduction": 0, "min_channels": 0, "temperature": 0, "att_multi": 0, "param_ratio": 0}
    wrong |= {"param_reduction": 1.5, "ksm_act": "relu", "fbm_bands": (4, 2), "fbm_groups": 3, "fbm_kernel": 2}
    for name, value in wrong.items():
        inner = (
            name.removeprefix("ksm_").removeprefix("fbm_").replace("kernel", "kernel_size" if value == 2 else "kernel")
        )
        with pytest.raises(ValueError, match=f"{inner} = .* is out of range"):
            FDConv2d(4, 4, 3, **{name: value})
    for arguments in [(0, 3, 1), (3, 0, 1), (4, 4, 13)]:
        with pytest.raises(ValueError, match="is out of range"):
            fourier_groups(*arguments)
    with pytest.raises(ValueError, match="conv = "):
        FDConv2d.from_conv(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="kernel_num = 0"):
        apply(None, kernel_num=0)


def test_in_the_bench_the_wide_convolutions_are_replaced():
    from types import SimpleNamespace

    from assay.bench.arms import DEFAULT_RECIPE
    from assay.bench.recipe import Budget
    from assay.bench.tasks import resolve_task

    task = resolve_task("digits")
    run = SimpleNamespace(task=task, data=task.train, budget=Budget())
    model = apply(DEFAULT_RECIPE, kernel_num=8).model(run)
    assert [layer.kernel_num for layer in model.modules() if isinstance(layer, FDConv2d)] == [8]


def plain(*args: int, kernel_num: int, fbm: bool, **kw: int) -> nn.Module:
    """The broken variant of the card: a convolution that takes the keywords and ignores them."""
    return nn.Conv2d(*args, **kw)


def test_the_claim_does_not_hold_for_a_plain_convolution():
    real, broken = (
        claim(Bench(quick=True), method=method, arms=(CONV, FD), reported=False) for method in (FDConv2d, plain)
    )
    gain, alike = real.checks
    assert gain.verdict != FAILS and alike.verdict == HOLDS
    assert [check.verdict for check in broken.checks] == [FAILS, FAILS] and broken.checks[0].observed == 0
    assert figure(real) is not None
