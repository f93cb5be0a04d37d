"""MambaMixer against its equations, the four directions of ViM2, and a broken variant of its claim."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.claims import recorded
from assay.bench.evidence import FAILS, HOLDS, Bench
from assay.catalogue import find
from assay.nn import TSM2, EarlyFeatureAverage, MambaMixer, MambaMixerBlock, ViM2
from assay.nn._contract import Example
from assay.nn.functional import selective_scan
from assay.nn.mambamixer.claim import claim, figure
from assay.nn.mambamixer.mambamixer import CrossScan

TINY = {"d_state": 1, "d_conv": 1, "expand": 1}
exactly = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def average(layer: nn.Module, x: Tensor) -> Tensor:
    return layer([x, x.sin()], [x.cos()])


def both_outputs(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.cat(layer([x], [x]), 1)


EXAMPLES = [
    Example(partial(EarlyFeatureAverage, 2, 1), (3, 2), forward=average),
    Example(partial(MambaMixerBlock, 2, 2, 1, **TINY), (2, 2, 2), forward=both_outputs),
    Example(partial(MambaMixer, 1, 2, 2, residual=True, token_bidirectional=True, **TINY), (2, 2, 2)),
    Example(partial(TSM2, 3, 1, 2, depth=1, **TINY), (2, 2, 3)),
    Example(partial(ViM2, 2, 2, 1, patch_size=1, depths=(1,), widths=(1,), **TINY), (2, 1, 2, 2)),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_one_weight_of_1_returns_that_output_bit_for_bit():
    outputs, layer = [normal(2, 3, seed=i) for i in range(5)], EarlyFeatureAverage(3, 2, dtype=torch.float64)
    for i in range(5):
        with torch.no_grad():
            weights = torch.zeros(5).index_fill_(0, torch.tensor(i), 1)
            layer.weight_token.copy_(weights[:3])
            layer.weight_channel.copy_(weights[3:])
        assert torch.equal(layer(outputs[:3], outputs[3:]), outputs[i])
    with pytest.raises(ValueError, match=r"tokens = 2 is out of range"):
        layer(outputs[:2], outputs[3:])


def test_the_stack_is_the_equations_of_the_paper():
    torch.manual_seed(0)
    model, x = MambaMixer(3, 4, 5, d_state=2, dtype=torch.float64), normal(2, 5, 4)
    averages = [(b.token_average, b.channel_average) for b in model.blocks]
    for average in (layer for pair in averages for layer in pair):
        nn.init.normal_(average.weight_token)
        nn.init.normal_(average.weight_channel)
    y_tok, y_ch = {0: x}, {0: x}
    for n, block in enumerate(model.blocks, 1):
        (alpha, beta), (theta, gamma) = (tuple(average.parameters()) for average in averages[n - 1])
        x_tok = sum(alpha[i] * y_tok[i] + beta[i] * y_ch[i] for i in range(n))
        y_tok[n] = block.token_mixer(F.layer_norm(x_tok, (4,)))
        x_ch = sum(theta[i] * y_tok[i] for i in range(n + 1)) + sum(gamma[i] * y_ch[i] for i in range(n))
        y_ch[n] = block.channel_mixer(F.layer_norm(x_ch, (4,)).transpose(1, 2)).transpose(1, 2)
    exactly(model(x), y_ch[3])
    model(x).square().sum().backward()
    assert all(p.grad.count_nonzero() == p.numel() for average in averages for p in average[1].parameters())


def test_time_runs_from_the_past_and_variates_are_seen_both_ways():
    block, x = MambaMixerBlock(4, 6, 1, dtype=torch.float64), normal(1, 6, 4)
    later = torch.cat([x[:, :3], normal(1, 3, 4, seed=1)], 1)
    assert torch.equal(block([x], [x])[0][:, :3], block([later], [later])[0][:, :3])
    with torch.no_grad():  # the channel mixer alone: a change in any channel reaches every other
        for changed in range(4):
            other = x.clone()
            other[..., changed] += 1
            moved = (block.channel_mixer(other.mT) - block.channel_mixer(x.mT)).abs().sum(2)
            assert (moved > 0).all()


def test_the_cross_scan_is_four_scans():
    torch.manual_seed(0)
    mixer, x = CrossScan(3, (2, 4), d_state=2, dtype=torch.float64), normal(2, 8, 3)
    inner, gate = mixer.in_proj(x).chunk(2, -1)
    image = F.silu(mixer.conv2d(inner.mT.reshape(2, 6, 2, 4)))
    row = [(i, j) for i in range(2) for j in range(4)]
    column = [(i, j) for j in range(4) for i in range(2)]
    total = torch.zeros_like(image)
    for k, way in enumerate((row, column, row[::-1], column[::-1])):
        u = torch.stack([image[:, :, i, j] for i, j in way], 2)
        dt, B, C = (mixer.x_proj[k] @ u).split([1, 2, 2], 1)
        part = slice(6 * k, 6 * k + 6)
        A, D, bias = -mixer.A_log[part].exp(), mixer.D[part], mixer.dt_bias[part]
        y = selective_scan(u, mixer.dt_proj[k] @ dt, A, B, C, D, None, bias, True, backend="sequential")
        for t, (i, j) in enumerate(way):
            total[:, :, i, j] += y[:, :, t]
    normed = F.layer_norm(total.flatten(2).mT, (6,))
    exactly(mixer(x), mixer.out_proj(normed * F.silu(gate)))


def test_a_forecast_moves_with_the_level_and_the_scale_of_each_series():
    model, x = TSM2(8, 3, 2, n_static=1, eps=1e-12, dtype=torch.float64), normal(2, 2, 8)
    static, scale, level = normal(2, 1), torch.tensor([[2.0], [0.1]]), torch.tensor([[-5.0], [3.0]])
    y = model(x, static)
    torch.testing.assert_close(model(x * scale + level, static), y * scale + level, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(model(x, static + 1), y)
    with pytest.raises(ValueError, match=r"static = 0 is out of range"):
        model(x)


def test_dropped_paths_are_made_up_for_and_only_in_training():
    block, x = MambaMixerBlock(4, 3, 1, drop_path=0.5, residual=True, dtype=torch.float64), normal(400, 3, 4)
    whole = block.eval()([x], [x])[0]
    torch.manual_seed(0)
    part = block.train()([x], [x])[0]
    kept = (part - x).abs().sum((1, 2)) > 0
    assert 160 < kept.sum() < 240
    exactly((part - x)[kept], 2 * (whole - x)[kept])


@pytest.mark.parametrize(
    "make",
    [
        partial(MambaMixerBlock, 4, 3, index=0),
        partial(MambaMixerBlock, 4, 3, 1, drop_path=1.0),
        partial(MambaMixer, d_model=4, num_tokens=3, depth=0),
        partial(TSM2, 4, 1, 2, n_static=-1),
        partial(ViM2, image_size=10),
        partial(ViM2, 32, token_bidirectional=True),
        partial(EarlyFeatureAverage, 1, 1, init="first"),
    ],
)
def test_bad_arguments_are_named(make: partial):
    with pytest.raises(ValueError, match=f"{list(make.keywords)[-1]} = .* is out of range"):
        make()


class MixesNoChannels(TSM2):
    """The broken variant of the card: its channel mixers pass on what they are given."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        for block in self.mixer.blocks:
            block.channel_mixer = nn.Identity()


class MixesOneWay(TSM2):
    """Another: its channels are mixed from the first to the last alone."""

    def __init__(self, *args, **options):
        super().__init__(*args, channel_bidirectional=False, **options)


def test_the_claim_does_not_hold_where_not_every_variate_reaches_every_other():
    for method, verdict, share in ((TSM2, HOLDS, 1), (MixesNoChannels, FAILS, 1 / 12), (MixesOneWay, FAILS, 6.5 / 12)):
        check = claim(Bench(), method=method, variants=()).checks[0]
        assert check.verdict == verdict and check.observed == pytest.approx(share)


def test_the_claim_is_drawn():
    evidence, _ = recorded(find("mambamixer"))
    assert figure(evidence) is not None
