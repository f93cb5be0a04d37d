"""Unified normalization against its steps written out, what fusing leaves of it, and a broken variant of its claim."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay._processes import run_on_two
from assay.bench.claims import recorded
from assay.bench.evidence import FAILS, HOLDS, Bench
from assay.catalogue import find
from assay.nn import UnifiedNorm, convert_layernorm_, fuse_unified_norm
from assay.nn._contract import Example
from assay.nn.unified_norm import claim as room
from assay.nn.unified_norm.claim import STRESSED, UNIFIED, claim, figure, unified

BY_DESIGN = {"gradient": False, "second_gradient": False}
EXAMPLES = [
    Example(partial(UnifiedNorm, 6, window_size=2, warmup_steps=0), (4, 3, 6), nn.LayerNorm(6), **BY_DESIGN),
    Example(
        partial(UnifiedNorm, 6, window_size=(1, 3), warmup_steps=1, outlier_filtration=True, affine=False),
        (4, 6),
        nn.LayerNorm(6),
        **BY_DESIGN,
    ),
]
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def stream(count: int, *shape: int, spike: int | None = None) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    scales = torch.linspace(0.5, 2, shape[-1], dtype=torch.float64)
    return [
        (
            (30 if t == spike else 1) * scales * torch.randn(*shape, generator=draw, dtype=torch.float64),
            torch.randn(*shape, generator=draw, dtype=torch.float64),
        )
        for t in range(1, count + 1)
    ]


def through(layer: nn.Module, x: Tensor, upstream: Tensor, **options: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x, **options)
    (y * upstream).sum().backward()
    return y.detach(), x.grad


class Oracle:
    """The steps of the card, in the order and the words of the card."""

    def __init__(self, norm: UnifiedNorm, start: int = 0) -> None:
        channels = norm.num_features
        self.norm, self.t, (self.m, self.mb) = norm, start, norm.window_size
        self.buffer = [torch.zeros(channels, dtype=torch.float64) for _ in range(self.m)]
        self.backward = [torch.zeros(channels, dtype=torch.float64) for _ in range(self.mb)]
        self.running, self.ema = torch.ones(channels).double(), torch.zeros(channels).double()
        self.skips = 0

    def step(self, x: Tensor, upstream: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        norm, self.t = self.norm, self.t + 1
        weight, t, m = norm.weight.detach(), self.t, self.m
        q = x[~mask].square().mean(0)
        rec = torch.stack(self.buffer).sqrt().var()
        self.buffer[t % m] = q
        full = norm.reference_quirks or all((row != 0).any() for row in self.buffer)
        rows = torch.stack(self.buffer)
        arithmetic, geometric = rows.mean(0), rows.clamp_min(1e-300).log().mean(0).exp()
        warm, skip = t >= norm.warmup_steps, False
        if norm.outlier_filtration and warm and full and (arithmetic - geometric > m * rec).any():
            self.buffer[t % m], skip = self.running, True
            self.skips += 1
        var = geometric if t > m and warm and full and not skip and m > 1 else q
        z = x / (var + norm.eps).sqrt()
        r = ((var + norm.eps) / (self.running + norm.eps)).sqrt().clamp(0.2, 5)
        if t <= max(1000, norm.warmup_steps) or skip:
            r = torch.ones_like(r)
        self.running = norm.momentum * self.running + (1 - norm.momentum) * var
        g = upstream * weight * r
        counted = torch.ones_like(mask) if norm.reference_quirks else ~mask
        gz = (g * z)[counted].mean(0)
        self.backward[t % self.mb] = self.ema if skip else gz
        mean = torch.stack(self.backward).mean(0) if t > self.mb and warm and not skip else gz
        self.ema = norm.momentum * self.ema + (1 - norm.momentum) * mean
        grad = (g - (mean if skip else self.ema) * z) / (var + norm.eps).sqrt()
        return weight * z + norm.bias.detach(), grad, (upstream * r * z).sum((0, 1))


CASES = {
    "plain": {"warmup_steps": 4},
    "no window": {"window_size": 1, "warmup_steps": 0},
    "two sizes": {"window_size": (3, 2), "warmup_steps": 2},
    "spike": {"warmup_steps": 6, "outlier_filtration": True},
    "early filtration": {"warmup_steps": 0, "outlier_filtration": True, "reference_quirks": True},
    "quirks": {"warmup_steps": 3, "reference_quirks": True},
}


@pytest.mark.parametrize("start", [0, 1200])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_steps(case, masked, start):
    norm = UnifiedNorm(4, **CASES[case]).double()
    norm.step.fill_(start)  # beyond 1,000 gradients are compensated
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1, 2, -1]))
        norm.bias.fill_(0.3)
    oracle, mask = Oracle(norm, start), torch.zeros(6, 3, dtype=torch.bool)
    mask[4:, 1:] = masked
    for x, upstream in stream(14, 6, 3, 4, spike=9):
        y, grad = through(norm, x, upstream, **({"padding_mask": mask} if masked else {}))
        expected, expected_grad, weight_grad = oracle.step(x, upstream, mask)
        close(y, expected)
        close(grad, expected_grad)
        close(norm.weight.grad, weight_grad)
        close(norm.bias.grad, upstream.sum((0, 1)))
        close(norm.running_var, oracle.running)
        close(norm.ema_gz, oracle.ema)
        close(norm.fwd_window, torch.stack(oracle.buffer))
        close(norm.bwd_window, torch.stack(oracle.backward))
        assert norm.skip_counter == oracle.skips
    assert (case == "spike") <= (oracle.skips > 0)


def test_a_constant_stream_is_never_an_outlier():
    norm = UnifiedNorm(1, warmup_steps=0, outlier_filtration=True).double()
    x = torch.full((5, 1), 0.3, dtype=torch.float64)
    for _ in range(30):
        through(norm, x, x)
    close(norm.fwd_window, torch.full((4, 1), 0.09, dtype=torch.float64))
    assert norm.skip_counter == 0
    close(norm.running_var, torch.tensor([0.09 + 0.91 * 0.9**30], dtype=torch.float64))


def test_a_spike_leaves_no_trace_in_the_window():
    norm = UnifiedNorm(4, warmup_steps=5, outlier_filtration=True).double()
    for x, upstream in stream(20, 32, 4):
        through(norm, x, upstream)
    assert norm.skip_counter == 0
    before = norm.running_var.clone()
    x, upstream = stream(1, 32, 4)[0]
    through(norm, 30 * x, upstream)
    assert norm.skip_counter == 1
    close(norm.fwd_window[21 % 4], before)


def test_tiny_values_and_scales():
    norm = UnifiedNorm(3, warmup_steps=0, eps=1e-35).double()
    x, upstream = stream(1, 8, 3)[0]
    for _ in range(6):
        y, grad = through(norm, 1e-15 * x, upstream)
    assert y.isfinite().all() and grad.isfinite().all()
    one, other = (UnifiedNorm(3, window_size=1, warmup_steps=0, eps=1e-14).double() for _ in range(2))
    close(one(x), other(7 * x))


def test_evaluation_leaves_everything_as_it_is_and_tokens_alone():
    norm = UnifiedNorm(4, warmup_steps=2).double()
    for x, upstream in stream(6, 3, 5, 4):
        through(norm, x, upstream)
    before = copy.deepcopy(norm.state_dict())
    whole = norm.eval()(x)
    assert torch.equal(norm(x[1:2, 3:4]), whole[1:2, 3:4])
    torch.testing.assert_close(dict(norm.state_dict()), dict(before), rtol=0, atol=0)
    scale, shift = norm.folded()
    close(whole, x * scale + shift)
    norm.reset_warmup()
    assert norm.step == 0 and (norm.fwd_window == 0).all() and (norm.running_var == before["running_var"]).all()


def test_padding_is_irrelevant():
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = True
    one, other = (UnifiedNorm(4, warmup_steps=1).double() for _ in range(2))
    for x, upstream in stream(8, 3, 5, 4):
        upstream = upstream * ~mask[..., None]
        (y, grad), (y2, grad2) = (
            through(norm, given, upstream, padding_mask=mask)
            for norm, given in ((one, x), (other, torch.where(mask[..., None], 100.0, x)))
        )
        close(y[~mask], y2[~mask])
        close(grad[~mask], grad2[~mask])
    close(dict(one.state_dict()), dict(other.state_dict()))


SYNCHRONIZED = """
from assay.nn import UnifiedNorm
torch.manual_seed(0)
x, upstream = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
here = slice(0, 4) if rank == 0 else slice(4, 6)
alone, shared = (UnifiedNorm(4, 2, 1, sync=sync).double() for sync in (False, True))
ddp = torch.nn.parallel.DistributedDataParallel(shared, broadcast_buffers=False)
for _ in range(5):
    whole, part = x.clone().requires_grad_(), x[here].clone().requires_grad_()
    y, y_part = alone(whole), ddp(part)
    (y * upstream).sum().backward()
    (y_part * upstream[here]).sum().backward()
    torch.testing.assert_close(y_part, y[here])
    torch.testing.assert_close(part.grad, whole.grad[here])
torch.testing.assert_close(dict(shared.state_dict()), dict(alone.state_dict()))
"""


def test_synchronized_over_processes_it_is_one_batch(tmp_path):
    run_on_two(SYNCHRONIZED, tmp_path)


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    """With unified normalization that has seen batches, and other than its first weights, in evaluation."""
    convert_layernorm_(model.double(), partial(UnifiedNorm, window_size=2, warmup_steps=1))
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, UnifiedNorm):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias)
    for _ in range(4):
        model(x).sum().backward()
    return model.eval()


def encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False)


def test_a_prenorm_transformer_is_fused_without_rest():
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    model = trained(nn.Sequential(encoder(norm_first=True), nn.Linear(8, 3)), x)
    expected, before = model(x), copy.deepcopy(model.state_dict())
    fused = fuse_unified_norm(model, (x,))
    torch.testing.assert_close(fused(x), expected, rtol=1e-12, atol=1e-12)
    # The last normalization stands inside the encoder, its reader outside: what is read there is not known.
    assert fused.fusion_report.affine == ("0.norm",)
    assert not any(isinstance(m, UnifiedNorm) for m in fused.modules())
    assert fused.fusion_report.folded["0.layers.1.norm1"] == ("0.layers.1.self_attn",)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    single = copy.deepcopy(fused).float()
    torch.testing.assert_close(single(x.float()), expected.float(), rtol=1e-4, atol=1e-5)


def test_a_decoder_and_a_postnorm_transformer():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, 2 * x.flip(1))

    x = torch.randn(3, 5, 8, dtype=torch.float64)
    model = trained(Decoder(), x)
    fused = fuse_unified_norm(model, (x,))
    close(fused(x), model(x))
    assert fused.fusion_report.affine == () and len(fused.fusion_report.folded) == 3
    post = trained(encoder(norm_first=False), x)
    fused = fuse_unified_norm(post, (x,))
    close(fused(x), post(x))
    assert fused.fusion_report.folded == {} and len(fused.fusion_report.affine) == 5


class Block(nn.Module):
    """Attention written out: three readers, and a residual path that may start before or behind the norm."""

    def __init__(self, behind: bool) -> None:
        super().__init__()
        self.norm, self.behind = nn.LayerNorm(8), behind
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8, bias=i != 0) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        mixed = F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        return self.out(mixed) + (y if self.behind else x)


@pytest.mark.parametrize("behind", [False, True])
def test_readers_are_found_by_tracing(behind):
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    model = trained(nn.Sequential(Block(behind), nn.LayerNorm(8), nn.Dropout(0.1), nn.Linear(8, 2)), x)
    fused = fuse_unified_norm(model, (x,), inplace=False)
    close(fused(x), model(x))
    report = fused.fusion_report
    assert report.folded["1"] == ("3",)
    assert report.affine == (("0.norm",) if behind else ())
    assert behind or set(report.folded["0.norm"]) == {"0.q", "0.k", "0.v"}
    assert fuse_unified_norm(model, inplace=True) is model


def test_a_reader_that_reads_twice_or_a_model_that_cannot_be_traced():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
            self.inner = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 1e9:  # no graph for all inputs
                return x
            return self.inner(self.linear(self.norm(x)) + self.linear(x))

    x = torch.randn(3, 8, dtype=torch.float64)
    model = trained(Twice(), x)
    fused = fuse_unified_norm(model, (x,))
    close(fused(x), model(x))
    assert fused.fusion_report.affine == ("norm",) and fused.fusion_report.folded == {"inner.0": ("inner.1",)}


def test_arguments_out_of_range_are_named():
    for name, value in [("num_features", 0), ("eps", 0.0), ("momentum", 1.0), ("window_size", 0), ("warmup_steps", -1)]:
        with pytest.raises(ValueError, match=f"{name} = {value} is out of range"):
            UnifiedNorm(**{"num_features": 6, name: value})
    with pytest.raises(ValueError, match="training of '0' = True is out of range"):
        fuse_unified_norm(nn.Sequential(UnifiedNorm(4), nn.Linear(4, 2)))


class Broken(UnifiedNorm):
    """It takes an outlier for what it has seen all along, and its shift is lost when it is folded."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, warmup_steps=room.WARMUP, outlier_filtration=False)

    def folded(self) -> tuple[Tensor, Tensor]:
        scale, shift = super().folded()
        return scale, torch.zeros_like(shift)


def test_the_claim_does_not_hold_without_the_filter_and_with_half_a_folding(monkeypatch):
    for name, value in (("WARMUP", 20), ("OUTLIER_EVERY", 25)):
        monkeypatch.setattr(room, name, value)
    for method, expected in ((unified, HOLDS), (Broken, FAILS)):
        evidence = claim(Bench(), method=method, arms=(UNIFIED, STRESSED), epochs=2, seeds=1)
        found = {check.name.split()[0]: check.verdict for check in evidence.checks}
        assert (found["fewest"], found["largest"]) == (expected, expected)


def test_the_claim_is_drawn():
    evidence, _ = recorded(find("unified-norm"))
    assert figure(evidence) is not None
