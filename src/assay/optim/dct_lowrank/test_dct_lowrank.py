"""DCT-AdamW against the formula with explicit bases, and what its projector and its error feedback promise."""

import functools
import itertools
import math

import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from assay.bench import Bench
from assay.optim import DCTAdamW
from assay.optim._contract import EXACT, gradients, resuming_from_a_state_dict_is_bit_exact, same, walk
from assay.optim.dct_lowrank import claim as room
from assay.optim.dct_lowrank.feedback import dequantize_rows, quantize_rows
from assay.optim.lowrank import DCTProjector, LowRankAdamW, SVDProjector, dct2, dct3, dct_matrix

EXAMPLE = {"DCTAdamW": {"rank": 2}}
DISTRIBUTED = [
    (DCTAdamW, {"lr": 0.01, "weight_decay": 0.1, "rank": 2}),
    (DCTAdamW, {"lr": 0.01, "rank": 2, "update_gap": 3, "ef_bits": 4, "transform": "fft"}),
    (DCTAdamW, {"lr": 0.01, "rank": 3, "error_feedback": False, "rotate": False}),
    (LowRankAdamW, {"lr": 0.01, "rank": 2, "projector": SVDProjector, "ef_bits": 8}),
]
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
SHAPES = [(9, 6), (6, 9), (7, 7), (4, 3, 2, 2), (5,), ()]


def parameters(shapes=SHAPES, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)) for shape in shapes]


def cosines(n):
    """The orthogonal DCT-II, one number at a time."""
    rows = [[math.cos(math.pi * i * (2 * j + 1) / (2 * n)) * math.sqrt(2 / n) for j in range(n)] for i in range(n)]
    rows[0] = [math.sqrt(1 / n)] * n
    return torch.tensor(rows, dtype=torch.float64)


class ByHand:
    """One matrix (n, m), n >= m, of the formula with full bases and a rotation matrix; others are transposed."""

    def __init__(self, W, rank, gap=1, rotate=True, ef=True, basis="dct2", norm=1):
        self.wide = W.shape[0] < W.shape[1]
        self.W = W.T.clone() if self.wide else W.clone()
        C = cosines(self.W.shape[1])
        self.Q = C.T if basis == "dct2" else C
        self.rank, self.gap, self.rotate, self.ef, self.norm = rank, gap, rotate, ef, norm
        self.E = torch.zeros_like(self.W)
        self.m = self.v = torch.zeros(len(self.W), rank, dtype=torch.float64)
        self.idx = None

    def step(self, G, t, lr, betas, eps, wd):
        A = (G.T if self.wide else G) + self.E
        if t == 1 or t % self.gap == 0:
            before = self.idx
            scores = [column.norm(p=self.norm) for column in (A @ self.Q).T]
            self.idx = sorted(sorted(range(len(scores)), key=lambda j: -scores[j])[: self.rank])
            if before is not None:
                self.follow(before)
        Qr = self.Q[:, self.idx]
        a = A @ Qr
        self.E = A - a @ Qr.T if self.ef else self.E
        self.m = betas[0] * self.m + (1 - betas[0]) * a
        self.v = betas[1] * self.v + (1 - betas[1]) * a * a
        root = math.sqrt(1 - betas[1] ** t)
        u = self.m / (self.v.sqrt() + eps * root) * root / (1 - betas[0] ** t)
        self.W = self.W * (1 - lr * wd) - lr * u @ Qr.T
        return self.W.T if self.wide else self.W

    def follow(self, before):
        if self.rotate is True:
            R = self.Q[:, before].T @ self.Q[:, self.idx]
            self.m, self.v = self.m @ R, (self.v @ R).abs()
        elif self.rotate is False:
            stays = torch.tensor([i == j for i, j in zip(before, self.idx, strict=True)])
            self.m, self.v = self.m * stays, self.v * stays


def by_hand(params, steps, rank, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, wd=0.0, **options):
    found = [nn.Parameter(p.detach().clone()) for p in params]
    matrices = [ByHand(p.detach().flatten(1), rank, **options) if p.dim() > 1 else None for p in params]
    vectors = [p for p in found if p.dim() <= 1]
    adamw = torch.optim.AdamW(vectors, lr=lr, betas=betas, eps=eps, weight_decay=wd)
    for step in gradients(found, steps):
        adamw.step()
        for p, matrix in zip(found, matrices, strict=True):
            if matrix:
                new = matrix.step(p.grad.flatten(1), step + 1, lr, betas, eps, wd)
                p.data.copy_(new.reshape(p.shape))
    return found


@pytest.mark.parametrize("transform", ["matmul", "fft"])
@pytest.mark.parametrize("options", [
    {},
    {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-2, "weight_decay": 0.1},
    {"update_gap": 3},
    {"rotate": False, "error_feedback": False},
    {"rotate": False, "update_gap": 2},
    {"rotate": "reference"},
    {"error_feedback": False, "norm": 2, "basis": "dct3"},
])  # fmt: skip
def test_trajectory_is_the_formula(options, transform):
    names = {"weight_decay": "wd", "update_gap": "gap", "error_feedback": "ef"}
    told = {names.get(name, name): value for name, value in options.items()}
    mine = walk(DCTAdamW, parameters(), steps=10, rank=2, transform=transform, **options)
    same(mine, by_hand(parameters(), 10, 2, **told), **CLOSE)


def test_what_is_not_projected_is_adamw():
    shapes = [(5,), (), (6, 3), (3, 6), (2, 40), (2, 3, 1, 1)]
    options = {"lr": 0.01, "weight_decay": 0.1}
    mine = walk(DCTAdamW, parameters(shapes), steps=10, rank=3, max_dim=40, **options)
    same(mine, walk(torch.optim.AdamW, parameters(shapes), steps=10, **options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_at_full_rank_it_is_adamw_in_the_coordinates_of_the_basis(shape):
    params, turned, C = parameters([shape]), parameters([shape]), cosines(6)

    def turn(x):
        return x @ C.T if shape[0] > shape[1] else C @ x

    turned[0].data = turn(turned[0].data)
    options = {"lr": 0.01, "weight_decay": 0.1}
    mine = DCTAdamW(params, rank=6, force_lowrank=True, **options)
    adamw = torch.optim.AdamW(turned, **options)
    for _ in gradients(params, 10):
        turned[0].grad = turn(params[0].grad)
        mine.step()
        adamw.step()
    torch.testing.assert_close(turn(params[0].detach()), turned[0].detach(), rtol=1e-10, atol=1e-12)
    assert mine.state[params[0]]["error"].abs().max() < 1e-13


def test_at_full_rank_and_without_the_second_moment_it_is_momentum():
    """With eps far above every root of v, u is m / eps."""
    params, others = parameters([(6, 9)]), parameters([(6, 9)])
    mine = DCTAdamW(params, lr=0.1 * 1e10, eps=1e10, rank=1.0, force_lowrank=True)
    m = torch.zeros(6, 9, dtype=torch.float64)
    for step in gradients(params, 5):
        mine.step()
        m = 0.9 * m + 0.1 * params[0].grad
        others[0].data -= 0.1 * m / (1 - 0.9 ** (step + 1))
    same(params, others, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_transposed_weights_take_transposed_steps(bits):
    params = parameters([(9, 6)])
    others = [nn.Parameter(params[0].detach().T.clone())]
    ones, twos = (DCTAdamW(p, lr=0.1, rank=2, ef_bits=bits, update_gap=2) for p in (params, others))
    for _ in gradients(params, 6):
        others[0].grad = params[0].grad.T.clone()
        ones.step()
        twos.step()
    torch.testing.assert_close(others[0].T, params[0], **CLOSE)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 64])
def test_the_transforms_are_the_matrix_and_scipys(n):
    C, x = dct_matrix(n, torch.float64), torch.randn(5, n, 3, dtype=torch.float64)
    torch.testing.assert_close(C, cosines(n), rtol=0, atol=1e-12)
    torch.testing.assert_close(C @ C.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    assert dct_matrix(n, torch.float64, "cpu") is C
    for dim in (1, -2):
        expected = torch.from_numpy(scipy.fft.dct(x.numpy(), type=2, norm="ortho", axis=dim))
        torch.testing.assert_close(dct2(x, dim), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(dct3(expected, dim), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(dct2(x.movedim(1, -1)), x.movedim(1, -1) @ C.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(dct3(x.movedim(1, -1)), x.movedim(1, -1) @ C, rtol=0, atol=1e-12)
    assert dct2(x.bfloat16(), 1).dtype == dct3(x.bfloat16(), 1).dtype == torch.bfloat16


def test_a_large_basis_is_orthogonal_in_float64_and_rounded_once():
    C = dct_matrix(1024, torch.float64)
    assert (C @ C.T - torch.eye(1024, dtype=torch.float64)).abs().max() < 1e-12
    assert torch.equal(dct_matrix(1024, torch.bfloat16), C.bfloat16())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8), st.booleans())
def test_what_is_lost_is_known_and_between_svd_and_chance(seed, rank, wide):
    G = torch.randn(12, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    G = G.T if wide else G
    total = G.square().sum()
    for norm in (1, 2):
        projector = DCTProjector(G.shape, rank, norm=norm)
        low = projector.update(G)
        lost = (G - projector.lift(low)).square().sum()
        torch.testing.assert_close(lost, total - low.square().sum(), rtol=1e-9, atol=1e-9)
        svd = SVDProjector(G.shape, rank)
        assert lost >= (G - svd.lift(svd.update(G))).square().sum() - 1e-9
    assert lost <= (1 - rank / 8) * total + 1e-9


def test_norm_2_is_the_best_of_all_choices():
    G = torch.randn(11, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    S = G @ cosines(8).T
    best = max(itertools.combinations(range(8), 3), key=lambda idx: S[:, idx].square().sum())
    projector = DCTProjector(G.shape, 3, norm=2)
    projector.update(G)
    assert projector.indices.tolist() == list(best) and projector.indices.dtype == torch.int32


def test_equal_scores_choose_the_first_columns():
    projector = DCTProjector((4, 6), 2)
    projector.update(torch.zeros(4, 6))
    assert projector.indices.tolist() == [0, 1]


def test_columns_that_stay_keep_their_moments_to_the_bit():
    projector = DCTProjector((5, 8), 3, side="right")
    Q, state = cosines(8).T, torch.randn(5, 3, dtype=torch.float64)
    projector.update(torch.ones(5, 1, dtype=torch.float64) * (Q[:, 1] + Q[:, 4] + Q[:, 6]))
    projector.update(torch.ones(5, 1, dtype=torch.float64) * (Q[:, 0] + Q[:, 1] + Q[:, 6]))
    assert projector.indices.tolist() == [0, 1, 6]
    expected = torch.stack([torch.zeros(5, dtype=torch.float64), state[:, 0], state[:, 2]], 1)
    torch.testing.assert_close(projector.rotate(state), expected, **EXACT)
    assert projector.changed().tolist() == [True, True, False]


class Recorder(DCTProjector):
    """Adds up what it projects."""

    used: dict

    def update(self, G):
        low = super().update(G)
        self.used[self.shape] = self.used.get(self.shape, 0) + self.lift(low)
        return low

    def project(self, G):
        low = super().project(G)
        self.used[self.shape] = self.used.get(self.shape, 0) + self.lift(low)
        return low


@pytest.mark.parametrize("gap", [1, 3])
def test_with_error_feedback_nothing_is_lost(gap):
    params, used = parameters([(9, 6), (6, 9)]), {}

    def projector(shape, rank):
        made = Recorder(shape, rank)
        made.used = used
        return made

    optimizer = LowRankAdamW(params, projector=projector, rank=2, update_gap=gap)
    total = [torch.zeros_like(p) for p in params]
    for _ in gradients(params, 12):
        total = [x + p.grad for x, p in zip(total, params, strict=True)]
        optimizer.step()
    for p, x in zip(params, total, strict=True):
        torch.testing.assert_close(used[tuple(p.shape)] + optimizer.state[p]["error"], x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dim", [0, 1])
def test_codes_are_within_half_a_step_of_their_row(bits, dim):
    x = torch.randn(7, 5, dtype=torch.float64)
    x[2] = x[:, 3] = 0.7
    codes, low, high = quantize_rows(x, bits, dim)
    found = dequantize_rows(codes, low, high, bits, x.shape[dim], dim)
    assert codes.dtype == torch.uint8 and codes.shape[dim] == (x.shape[dim] if bits == 8 else (x.shape[dim] + 1) // 2)
    assert ((found - x).abs() <= (high - low) / (2**bits - 1) / 2 + 1e-12).all()
    constant = (high == low).expand_as(x)
    assert constant.any() and torch.equal(found[constant], x[constant])
    extreme = (x == low) | (x == high)
    torch.testing.assert_close(found[extreme], x[extreme], rtol=1e-12, atol=1e-12)


def test_half_bytes_come_back_in_their_order():
    x = torch.arange(16.0).flip(0).view(2, 8)
    codes, low, high = quantize_rows(x, 4)
    assert torch.equal(codes[0] // 16, torch.tensor([15, 11, 6, 2], dtype=torch.uint8))
    assert (dequantize_rows(codes, low, high, 4, 8) - x).abs().max() < 0.24


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.008), (4, 0.12)])
def test_feedback_in_few_bits_stays_near_the_exact_one(bits, limit):
    params, others = parameters([(40, 24)]), parameters([(40, 24)])
    ones, twos = DCTAdamW(params, rank=6), DCTAdamW(others, rank=6, ef_bits=bits)
    for _ in zip(gradients(params, 1), gradients(others, 1), strict=True):
        ones.step()
        twos.step()
    state = twos.state[others[0]]
    found = dequantize_rows(state["error_codes"], state["error_low"], state["error_high"], bits, 24)
    exact = ones.state[params[0]]["error"]
    assert 0 < (found - exact).norm() / exact.norm() < limit
    assert state["error_codes"].numel() == 40 * 24 * bits // 8


def test_the_state_is_the_moments_and_the_indices():
    p = nn.Parameter(torch.randn(40, 24))
    optimizer = DCTAdamW([p], rank=0.25, error_feedback=False)
    for _ in gradients([p], 3):
        optimizer.step()
    state = {name: value for name, value in optimizer.state[p].items() if name != "step"}
    assert sum(x.numel() * x.element_size() for x in state.values()) == (2 * 40 * 6 + 6) * 4
    assert optimizer.state[p]["low_exp_avg"].shape == (40, 6)


@pytest.mark.parametrize("options", [
    {"update_gap": 4},
    {"update_gap": 2, "ef_bits": 8},
    {"ef_bits": 4, "transform": "fft"},
    {"error_feedback": False, "rotate": False},
])  # fmt: skip
def test_resuming_in_the_middle_of_a_gap(options):
    resuming_from_a_state_dict_is_bit_exact(functools.partial(DCTAdamW, rank=2, **options))


def test_half_precision_weights_have_float32_moments_also_after_a_checkpoint():
    def run(resume):
        params = parameters(dtype=torch.bfloat16)
        optimizer = DCTAdamW(params, lr=0.01, rank=2, update_gap=3)
        for step in gradients(params, 6):
            if step == 4 and resume:
                state, optimizer = optimizer.state_dict(), DCTAdamW(params, lr=0.01, rank=2, update_gap=3)
                optimizer.load_state_dict(state)
            optimizer.step()
        dtypes = {name: value.dtype for name, value in optimizer.state[params[0]].items()}
        return params, dtypes

    (whole, dtypes), (resumed, same_dtypes) = run(False), run(True)
    same(resumed, whole)
    assert dtypes == same_dtypes
    assert dtypes["low_exp_avg"] == dtypes["low_exp_avg_sq"] == torch.float32
    assert dtypes["indices"] == torch.int32 and dtypes["error"] == torch.bfloat16


def test_groups_may_have_their_own_rank():
    params = parameters([(9, 6), (9, 6)])
    optimizer = DCTAdamW([{"params": params[:1], "rank": 3}, {"params": params[1:]}], rank=1)
    for _ in gradients(params, 1):
        optimizer.step()
    assert [len(optimizer.state[p]["indices"]) for p in params] == [3, 1]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("betas", (1.0, 0.9)),
        ("eps", -1e-8),
        ("weight_decay", -0.1),
        ("rank", 0),
        ("rank", 1.5),
        ("update_gap", 0),
        ("rotate", "turn"),
        ("ef_bits", 2),
        ("basis", "dct4"),
        ("transform", "svd"),
        ("norm", 3),
        ("max_dim", 0),
    ],
)
def test_values_out_of_range_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"{option} = .* is out of range"):
        DCTAdamW([nn.Parameter(torch.ones(2, 2))], **{option: value})


def test_bad_arguments_of_the_transforms_are_refused_by_name():
    with pytest.raises(ValueError, match="n = 0 is out of range"):
        dct_matrix(0)
    for option, value in (("basis", "dct1"), ("transform", "svd"), ("norm", 3)):
        with pytest.raises(ValueError, match=f"{option} = .* is out of range"):
            DCTProjector((4, 3), 2, **{option: value})


class Smallest(DCTProjector):
    """The broken variant: the columns with the smallest norm."""

    def update(self, G):
        scores = self.transformed(G).abs().sum(1 - self.axis)
        self.memory["indices"] = scores.sort(stable=True).indices[: self.rank].sort().values.to(torch.int32)
        return self.project(G)


def test_the_claim_fails_for_the_columns_that_hold_least():
    def verdicts(projector):
        checks = room.claim(Bench(), projector=projector, parts=("errors",), steps=11).checks
        return [check.verdict for check in checks]

    assert verdicts(Smallest) == ["does not hold"] * 2
    assert verdicts(DCTProjector) == ["holds"] * 2
