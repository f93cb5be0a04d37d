"""Every conversion in three ways and against the layer written out, recall, and a broken variant of the claim."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from assay.bench.claims import recorded
from assay.bench.evidence import FAILS, HOLDS, Bench
from assay.catalogue import find
from assay.data import mqar
from assay.nn import SelectiveSSM
from assay.nn._contract import Example
from assay.nn.dsf import (
    QLSTM,
    LTVSystem,
    NormalizedAttention,
    elu_plus_one,
    equivalent,
    from_linear_attention,
    from_normalized_attention,
    from_qlstm,
    from_s6,
    from_softmax_attention,
    from_ssd,
)
from assay.nn.dsf.claim import FORMS, claim, figure
from assay.nn.functional import selective_scan


def in_linear_time(layer: NormalizedAttention, x: Tensor) -> Tensor:
    return layer(x, linear=True)


EXAMPLES = [
    Example(partial(NormalizedAttention, 4, d_qk=2, num_heads=2, norm_fn="softplus"), (2, 3, 4), bfloat16=0.2),
    Example(partial(NormalizedAttention, 3, d_qk=2), (2, 3, 3), forward=in_linear_time, bfloat16=0.2),
    Example(partial(QLSTM, 2, expansion_factor=1, kernel_size=2), (2, 3, 2), bfloat16=0.1),
    Example(partial(QLSTM, 2, expansion_factor=1, kernel_size=1, reversed_sigmoid=False), (2, 3, 2), bfloat16=0.1),
]
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, K, V = normal(2, 3, 7, 4), normal(2, 3, 7, 4, seed=1), normal(3, 5, 6, seed=2)  # batch, heads, L, width
U = normal(2, 1, 7, 6, seed=3)


def s6(x: Tensor) -> tuple[SelectiveSSM, LTVSystem]:
    torch.manual_seed(0)
    ssm = SelectiveSSM(3, d_state=2, dtype=torch.float64)
    return ssm, from_s6(ssm, x)


def qlstm(x: Tensor, **options: bool) -> tuple[QLSTM, LTVSystem]:
    torch.manual_seed(0)
    layer = QLSTM(3, dtype=torch.float64, **options)
    return layer, from_qlstm(layer, x)


def decays() -> Tensor:
    return F.softplus(normal(2, 3, 7, seed=4))


SYSTEMS = {
    "linear attention": lambda: (from_linear_attention(Q, K, V), U),
    "unnormalized": lambda: (from_linear_attention(Q, K, V, normalize=None), U),
    "normalized attention": lambda: (from_normalized_attention(Q, K, V, normal(2, 3, 7)), U),
    "softmax attention": lambda: (from_softmax_attention(Q, K, V, 3), U),
    "S6": lambda: (s6(U[:, 0])[1], U[:, 0]),
    "SSD": lambda: (from_ssd(decays(), -normal(2, 3).exp(), Q, K, width=6), U),
    "qLSTM": lambda: (qlstm(U[:, 0])[1], U[:, 0]),
    "with a direct path": lambda: (LTVSystem(*(normal(7, 3), normal(7, 3, 6), normal(7, 2, 3), normal(7, 2, 6))), U),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_recurrence_convolution_and_matrix_are_the_same_map(name):
    system, u = SYSTEMS[name]()
    y = system.recurrent(u)
    close(system.convolution(u), y)
    matrix = system.attention_matrix()
    wide = u.expand(*matrix.shape[:-2], *u.shape[-2:]) if matrix.dim() > 2 else u
    close((matrix @ wide.flatten(-2)[..., None])[..., 0].unflatten(-1, y.shape[-2:]), y)
    blocks = matrix.unflatten(-1, (7, -1)).unflatten(-3, (7, -1))
    for i in range(7):
        assert (blocks[..., i, :, i + 1 :, :] == 0).all()
    later = torch.cat([u[..., :4, :], u[..., 4:, :] + 1], -2)
    assert torch.equal(system.recurrent(later)[..., :4, :], y[..., :4, :])


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_larger_state_contains_the_smaller(name):
    system, u = SYSTEMS[name]()
    larger = system.padded(system.state_dim + 3)
    assert larger.state_dim == system.state_dim + 3 and equivalent(system, larger)
    close(larger.recurrent(u), system.recurrent(u))
    moved = LTVSystem(system.Lambda, system.B, system.C + 1e-3, system.D)
    assert not equivalent(system, moved)


def test_linear_attention():
    weights = (elu_plus_one(Q) @ elu_plus_one(K).mT).tril()
    values = U @ V.mT
    close(from_linear_attention(Q, K, V).recurrent(U), weights / weights.sum(-1, keepdim=True) @ values)
    close(from_linear_attention(Q, K, V, normalize=None).recurrent(U), weights @ values)
    square = from_linear_attention(Q, K, V, torch.square)
    weights = (Q.square() @ K.square().mT).tril()
    close(square.recurrent(U), weights / weights.sum(-1, keepdim=True) @ values)
    assert square.state_dim == 4 * 5


def test_rows_of_normalized_weights_sum_to_1():
    ones = torch.ones(7, 1, dtype=torch.float64)
    unit = torch.eye(1, dtype=torch.float64)
    close(from_linear_attention(Q, K, unit).recurrent(ones), ones.expand(2, 3, 7, 1))
    system = from_linear_attention(Q, K, unit)
    eta = (elu_plus_one(Q) * elu_plus_one(K).cumsum(-2)).sum(-1)
    close(system.Lambda[..., 1:, 0].cumprod(-1), eta[..., :1] / eta[..., 1:])


@pytest.mark.parametrize("norm_fn", ["exp", "softplus"])
def test_normalized_attention(norm_fn):
    torch.manual_seed(0)
    layer = NormalizedAttention(6, d_qk=4, num_heads=2, bias=False, norm_fn=norm_fn, dtype=torch.float64)
    x = U[:, 0]
    q, k, v, n = layer.heads(x)
    by_hand = torch.zeros(2, 2, 7, 3, dtype=torch.float64)
    for t in range(7):
        raw = layer.Wn(x)[:, t]
        eta = raw.exp() if norm_fn == "exp" else F.softplus(raw)
        for s in range(t + 1):
            by_hand[:, :, t] += (q[:, :, t] * k[:, :, s]).sum(-1, keepdim=True) * v[:, :, s] / eta[..., None]
    close(layer(x), layer.out_proj(by_hand.transpose(1, 2).flatten(-2)))
    close(layer(x, linear=True), layer(x))
    weight = layer.Wv.weight.unflatten(0, (2, 3))
    y = from_normalized_attention(q, k, weight, n).recurrent(x[:, None])
    close(layer.out_proj(y.transpose(1, 2).flatten(-2)), layer(x))
    layer.dropout = 1.0
    close(layer(x), torch.zeros_like(layer(x)))
    close(layer.eval()(x), layer(x, linear=True))


def test_the_expansion_of_softmax_comes_nearer_with_every_order():
    q, k = 2 * F.normalize(Q[..., :3], dim=-1), F.normalize(K[..., :3], dim=-1)  # |q . k| <= 2
    exact = torch.softmax((q @ k.mT).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf), -1)
    unit = torch.eye(7, dtype=torch.float64)  # each token's value is a direction of its own: outputs are the weights
    even = [from_softmax_attention(q, k, unit, order, scale=1.0) for order in (2, 4, 6, 8)]
    errors = [(system.recurrent(unit) - exact).abs().max().item() for system in even]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3
    assert [s.state_dim for s in even] == [7 * math.comb(3 + order, order) for order in (2, 4, 6, 8)]
    usual = F.scaled_dot_product_attention(Q, K, (U @ V.mT), is_causal=True)
    torch.testing.assert_close(
        from_softmax_attention(Q / 4, K, V, 8).recurrent(U),
        F.scaled_dot_product_attention(Q / 4, K, U @ V.mT, is_causal=True),
        rtol=1e-3,
        atol=1e-3,
    )
    assert not torch.allclose(from_softmax_attention(Q, K, V, 1).recurrent(U), usual, atol=1e-2)


def test_s6_is_the_selective_scan():
    x = U[:, 0]
    ssm, system = s6(x)
    delta, B, C = ssm.select(x.mT)
    y = selective_scan(x.mT, delta, -ssm.A_log.exp(), B, C, ssm.D, None, ssm.dt_proj.bias, True)
    close(system.recurrent(x), y.mT)
    assert system.is_stable() and not LTVSystem(2 * system.Lambda.sign(), system.B, system.C).is_stable()


def test_ssd_and_unnormalized_attention_are_one_map_where_nothing_decays():
    u, delta = U[:, 0], torch.ones(2, 3, 7, dtype=torch.float64)
    identity = torch.eye(6, dtype=torch.float64)
    attention = from_linear_attention(Q, K, identity, lambda x: x, normalize=None)
    zero = torch.zeros(2, 3, dtype=torch.float64)
    assert equivalent(from_ssd(delta, zero, K, Q, width=6), attention)
    assert not equivalent(from_ssd(delta, zero - 0.1, K, Q, width=6), attention)
    slow = from_ssd(decays(), -normal(2, 3).exp(), K, Q, width=6)
    A = -normal(2, 3).exp().flatten()[:, None, None].expand(6, 1, 4)  # as six systems of one channel each
    for i in range(6):
        b, h = divmod(i, 3)
        step = decays()[b, h][None, None].expand(1, 6, 7)
        y = selective_scan(u[b : b + 1].mT, step, A[i].expand(6, 4), K[b, h].mT[None], Q[b, h].mT[None])
        close(slow.recurrent(U)[b, h], y[0].mT)


def test_the_gates_of_the_quasi_lstm():
    z = normal(100) * 8
    torch.testing.assert_close((-F.softplus(z)).exp(), torch.sigmoid(-z), rtol=1e-12, atol=1e-12)
    x = U[:, 0]
    layer, system = qlstm(x)
    f = layer.fio(x).chunk(3, -1)[0]
    close(system.Lambda, torch.sigmoid(-f))
    with torch.no_grad():
        layer.alpha.fill_(2.0)
        close(layer.gates(x)[0], torch.sigmoid(-f) ** 2)
        layer.alpha.fill_(-1.0)
        close(layer.gates(x)[0], torch.ones_like(f))
    plain, system = qlstm(x, reversed_sigmoid=False)
    close(system.Lambda, torch.sigmoid(plain.fio(x).chunk(3, -1)[0]))
    inputs = normal(2, 7, 3)
    gate, inner = plain.input(inputs).chunk(2, -1)
    inner = F.conv1d(F.pad(inner.mT, (3, 0)), plain.conv.weight, plain.conv.bias, groups=6).mT
    close(plain(inputs), plain.output(F.gelu(gate) * from_qlstm(plain, inner).recurrent(inner)))


@pytest.mark.parametrize("noise", [False, True])
def test_recall_asks_for_what_was_said(noise):
    tokens, labels = mqar(64, 24, 4, 50, random_non_queries=noise, seed=3).tensors
    assert tokens.dtype == torch.int64 and tokens.shape == labels.shape == (50, 24)
    for row, wanted in zip(tokens.tolist(), labels.tolist(), strict=True):
        pairs = dict(zip(row[:8:2], row[1:8:2], strict=True))
        asked = [i for i, label in enumerate(wanted) if label != -100]
        assert len(pairs) == len(asked) == 4 and min(asked) >= 8
        assert all(pairs[row[i]] == wanted[i] for i in asked)
        assert max(pairs) < 32 <= min(pairs.values())
    again, other = (mqar(64, 24, 4, 50, random_non_queries=noise, seed=s).tensors[0] for s in (3, 4))
    assert torch.equal(again, tokens) and not torch.equal(other, tokens)
    free = torch.cat([tokens[:, 8:][labels[:, 8:] == -100]])
    assert (free != 0).any() == noise


def test_bad_arguments_are_named():
    ones = torch.ones(3, 2)
    for make, name in (
        (partial(LTVSystem, ones, torch.ones(3, 1, 2), torch.ones(3, 1, 2)), "B"),
        (partial(LTVSystem, ones, torch.ones(3, 2, 1), torch.ones(3, 1, 1)), "C"),
        (partial(LTVSystem, ones, torch.ones(3, 2, 1), torch.ones(3, 1, 2), torch.ones(3, 2, 2)), "D"),
        (partial(from_linear_attention, ones, ones, ones, normalize="max"), "normalize"),
        (partial(from_softmax_attention, ones, ones, ones, -1), "order"),
        (partial(NormalizedAttention, 4, num_heads=3), "d_model"),
        (partial(NormalizedAttention, 4, norm_fn="relu"), "norm_fn"),
        (partial(QLSTM, 4, kernel_size=0), "kernel_size"),
        (partial(mqar, 64, 14, 4, 1), "seq_len"),
        (partial(mqar, 8, 16, 4, 1), "vocab_size"),
    ):
        with pytest.raises(ValueError, match=f"^{name} = .* is out of range"):
            make()


def forgets_the_sum(q: Tensor, k: Tensor, v_weight: Tensor) -> LTVSystem:
    """The broken variant of the card."""
    return from_linear_attention(q, k, v_weight, normalize=None)


def test_the_claim_does_not_hold_without_the_normalization():
    real, broken = (claim(Bench(), method=m, parts=(FORMS,)) for m in (from_linear_attention, forgets_the_sum))
    assert (real.verdict, broken.verdict) == (HOLDS, FAILS)


def test_the_claim_is_drawn():
    evidence, _ = recorded(find("dsf"))
    assert figure(evidence) is not None
