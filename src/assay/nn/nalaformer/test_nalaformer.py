"""Norm-aware linear attention against its explicit form, its decoding form, and a broken variant of its claim."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from assay.bench.evidence import FAILS, HOLDS, Bench
from assay.nn import NaLaFormerBlock, NormAwareLinearAttention
from assay.nn._contract import Example
from assay.nn.functional import (
    attention_entropy,
    key_feature_map,
    norm_aware_feature_map,
    norm_aware_linear_attention,
)
from assay.nn.nalaformer.claim import ENTROPY, claim, figure
from assay.nn.nalaformer.nalaformer import rotary_angles

EXAMPLES = [
    Example(partial(NormAwareLinearAttention, 4, 1, lepe_kernel=3), (2, 4, 4), bfloat16=0.1),
    Example(partial(NormAwareLinearAttention, 4, 2, rope=None, gate=False, bias=False, lepe_kernel=0), (2, 3, 4)),
    Example(partial(NormAwareLinearAttention, 4, 2, rope="1d", causal=True, lepe_kernel=3), (2, 2, 4), bfloat16=0.1),
    Example(partial(NaLaFormerBlock, 4, 1, hidden_dim=1, lepe_kernel=1), (2, 4, 1, 1), bfloat16=0.1),
]
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def qkv(n: int = 7, batch: int = 2, d: int = 4) -> list[Tensor]:
    torch.manual_seed(n)
    return [torch.randn(batch, 3, n, d, dtype=torch.float64) for _ in range(3)]


def phi(q: Tensor, lam: float, tau: float) -> Tensor:
    norm = q.norm(dim=-1, keepdim=True)
    return torch.cat([(sign * q / norm).relu() ** (lam * (tau + norm.tanh())) for sign in (1, -1)], -1)


def psi(k: Tensor, power: float) -> Tensor:
    return torch.cat([(sign * k).relu() ** power for sign in (1, -1)], -1)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.floats(0.5, 4), st.floats(0.3, 1), st.sampled_from([1.0, 2.0, 3.0]), st.booleans())
def test_the_linear_form_is_the_explicit_one(n, lam, tau, power, causal):
    q, k, v = qkv(n)
    weights = phi(q, lam, tau) @ psi(k, power).mT
    if causal:
        weights = weights.tril()
    scale = 1 if causal else n
    expected = weights @ v / (weights.sum(-1, keepdim=True) + scale * 1e-6)
    close(norm_aware_linear_attention(q, k, v, lam=lam, tau=tau, key_power=power, causal=causal), expected)
    close(norm_aware_feature_map(q, lam, tau), phi(q, lam, tau))
    close(key_feature_map(k, power), psi(k, power))
    assert (weights >= 0).all()


@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
def test_causal_in_chunks_and_token_by_token(n):
    q, k, v = qkv(n)
    rotary = rotary_angles((n,), 4)
    weights = (phi(q, 3, 0.5) @ psi(k, 3).mT).tril()
    expected = weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)
    close(norm_aware_linear_attention(q, k, v, causal=True), expected)
    for turns in (None, rotary):
        full, state = norm_aware_linear_attention(q, k, v, causal=True, rotary=turns, return_state=True)
        parts, carried = [], None
        for i in range(0, n, 50):
            here = None if turns is None else tuple(t[i : i + 50] for t in turns)
            part, carried = norm_aware_linear_attention(
                *(t[:, :, i : i + 50] for t in (q, k, v)), causal=True, rotary=here, state=carried, return_state=True
            )
            parts.append(part)
        close(torch.cat(parts, 2), full)
        close(carried, state)


def test_rotation_is_in_the_numerator_alone():
    q, k, v = qkv(6)
    sin, cos = rotary_angles((2, 3), 4)
    assert sin.shape == (6, 4)
    close(
        sin[4].double(), torch.tensor([math.sin(1)] * 4, dtype=torch.float32).double(), rtol=1e-6, atol=1e-6
    )  # (1, 1)
    features, keys = phi(q, 3, 0.5).chunk(2, -1), psi(k, 3).chunk(2, -1)

    def turned(x: Tensor) -> Tensor:  # as complex numbers
        turn = torch.complex(cos.double()[:, ::2], sin.double()[:, ::2])
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    weights = sum(turned(a) @ turned(b).mT for a, b in zip(features, keys, strict=True))
    total = (phi(q, 3, 0.5) @ psi(k, 3).mT).mean(-1, keepdim=True)
    close(norm_aware_linear_attention(q, k, v, rotary=(sin, cos)), weights @ v / 6 / (total + 1e-6))


def test_entropy_falls_with_the_norm_of_the_query():
    q, k, _ = qkv(40, d=16)
    entropies = [attention_entropy(phi(s * F.normalize(q, dim=-1), 3, 0.5) @ psi(k, 3).mT) for s in (0.5, 1, 2)]
    assert (entropies[0] > entropies[1]).all() and (entropies[1] > entropies[2]).all()
    flat = [attention_entropy((s * q).relu() @ k.relu().mT + 1e-300) for s in (0.5, 1, 2)]
    close(flat[0], flat[2])


def test_signs_and_scales():
    q, k, v = qkv()
    out = norm_aware_linear_attention(q, k, v, eps=0.0)
    close(norm_aware_linear_attention(-q, -k, v, eps=0.0), out)
    close(norm_aware_linear_attention(q, 7 * k, v, eps=0.0), out)
    a, b = norm_aware_feature_map(q), key_feature_map(-q.sign() * k.abs())
    assert ((a * b).sum(-1) == 0).all()
    ones = norm_aware_linear_attention(q, k, torch.ones_like(v), eps=0.0)
    close(ones, torch.ones_like(v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("a", "b"), [(0.0, 1.0), (1.0, 0.0), (1e3, 1e3), (1e-30, 1e-3)])
@pytest.mark.parametrize("causal", [True, False])
def test_extreme_queries_and_keys_stay_finite(dtype, a, b, causal):
    inputs = [(scale * t).to(dtype).requires_grad_() for t, scale in zip(qkv(), (a, b, 1.0), strict=True)]
    out = norm_aware_linear_attention(*inputs, causal=causal)
    assert out.dtype == dtype and out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.float().square().sum(), inputs))


def test_the_layer_is_its_formula():
    torch.manual_seed(0)
    layer, x = NormAwareLinearAttention(8, 2).double(), torch.randn(2, 6, 8, dtype=torch.float64)
    q, k, v, g = layer.qkvg(x).chunk(4, -1)
    heads = [t.reshape(2, 6, 2, 4).permute(0, 2, 1, 3) for t in (q, k, v)]
    y = norm_aware_linear_attention(*heads, rotary=rotary_angles((2, 3), 4)).permute(0, 2, 1, 3).reshape(2, 6, 8)
    near = layer.lepe(v.reshape(2, 2, 3, 8).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(2, 6, 8)
    close(layer(x, (2, 3)), layer.out_proj(layer.ln(y + near) * F.silu(g)))


def test_a_causal_layer_does_not_look_ahead():
    layer, x = NormAwareLinearAttention(8, 2, rope="1d", causal=True).double(), torch.randn(1, 9, 8).double()
    later = x.clone()
    later[:, 5:] += 1
    close(layer(later)[:, :5], layer(x)[:, :5])
    assert not torch.allclose(layer(later)[:, 5:], layer(x)[:, 5:])


def test_in_the_place_of_torch_attention_a_step_learns():
    model = nn.Sequential(nn.Linear(3, 8), NormAwareLinearAttention(8, 2, rope="1d"), nn.Linear(8, 2))
    optimizer, x, y = torch.optim.Adam(model.parameters(), lr=0.01), torch.randn(8, 6, 3), torch.randint(2, (48,))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(x).flatten(0, 1), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_arguments_out_of_range_are_named():
    for name, value in [("lam", 0.0), ("tau", -1.0), ("key_power", math.inf), ("eps", -1.0), ("lepe_kernel", 4)]:
        with pytest.raises(ValueError, match=f"{name} = {value} is out of range"):
            NormAwareLinearAttention(8, 2, **{name: value})
    with pytest.raises(ValueError, match="dim = 9 is out of range: a multiple of num_heads = 2"):
        NormAwareLinearAttention(9, 2)
    with pytest.raises(ValueError, match="dim / num_heads = 2 is out of range: a multiple of 4"):
        NormAwareLinearAttention(4, 2)
    with pytest.raises(ValueError, match="rope = '2d' is out of range"):
        NormAwareLinearAttention(8, 2, causal=True)
    with pytest.raises(ValueError, match=r"hw = \(2, 2\) is out of range: \(H, W\) with H W = N = 5"):
        NormAwareLinearAttention(8, 2)(torch.randn(1, 5, 8))
    with pytest.raises(ValueError, match=r"state = .* is out of range: None if not causal"):
        norm_aware_linear_attention(*qkv(), return_state=True)


def powered_whole(q: Tensor) -> Tensor:
    """The broken variant of the card: the power is the same for every norm, and cancels in the row."""
    return psi(q, 3)


def test_the_claim_does_not_hold_for_a_power_of_the_whole_query():
    real = claim(Bench(quick=True), parts=(ENTROPY,))
    assert [check.verdict for check in real.checks] == [HOLDS] * 4
    broken = claim(Bench(quick=True), method=(powered_whole, key_feature_map), parts=(ENTROPY,))
    assert [check.verdict for check in broken.checks[:2]] == [FAILS] * 2


def test_the_claim_runs_and_is_drawn():
    assert figure(claim(Bench(quick=True))) is not None
