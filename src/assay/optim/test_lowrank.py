"""Projectors of the family, and what all low-rank optimizers get from their shared part."""

import functools
import inspect

import pytest
import torch

from assay.optim._contract import CHECKS, EXACT, resuming_from_a_state_dict_is_bit_exact
from assay.optim._lowrank import rank_of
from assay.optim._rule import RuleOptimizer
from assay.optim.lowrank import DCTProjector, LowRankAdamW, RandomProjector, SVDProjector

KINDS = [SVDProjector, RandomProjector, DCTProjector]
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def matrix(n, m, seed=0, dtype=torch.float64):
    return torch.randn(n, m, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "side", "low"), [
    ((9, 6), None, (9, 2)),
    ((6, 9), None, (2, 9)),
    ((6, 6), None, (6, 2)),
    ((9, 6), "left", (2, 6)),
    ((6, 9), "right", (6, 2)),
])  # fmt: skip
def test_columns_are_orthonormal_and_lift_is_the_adjoint(kind, shape, side, low):
    projector, G = kind(shape, 2, side=side), matrix(*shape)
    found = projector.update(G)
    Q = projector.columns(G.dtype)
    torch.testing.assert_close(Q.T @ Q, torch.eye(2, dtype=G.dtype), **CLOSE)
    assert found.shape == low == projector.low_shape
    torch.testing.assert_close(found, G @ Q if projector.right else Q.T @ G, **CLOSE)
    torch.testing.assert_close(projector.project(G), found, **CLOSE)
    x = torch.randn_like(found)
    torch.testing.assert_close((projector.lift(x) * G).sum(), (x * found).sum(), **CLOSE)
    torch.testing.assert_close(projector.project(projector.lift(x)), x, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_states_are_rotated_by_the_product_of_the_bases(kind, shape):
    projector = kind(shape, 3)
    state = projector.update(matrix(*shape))
    assert projector.rotate(state) is state, "at the first choice there is nothing to follow"
    before = projector.columns(torch.float64)
    projector.update(matrix(*shape, seed=1))
    R = before.T @ projector.columns(torch.float64)
    torch.testing.assert_close(projector.rotate(state), state @ R if projector.right else R.T @ state, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_projected_in_float32(kind):
    projector, G = kind((8, 6), 3), matrix(8, 6, dtype=torch.float32).bfloat16()
    low = projector.update(G)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, G.float() @ projector.columns(torch.float32), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_svd_is_the_nearest_matrix_of_its_rank(shape):
    G, projector = matrix(*shape), SVDProjector(shape, 2)
    U, S, Vh = torch.linalg.svd(G)
    torch.testing.assert_close(projector.lift(projector.update(G)), (U[:, :2] * S[:2]) @ Vh[:2], **CLOSE)
    stored = SVDProjector(shape, 2, dtype=torch.bfloat16)
    stored.update(G)
    assert stored.memory["basis"].dtype == torch.bfloat16 and stored.memory["basis"].shape == (6, 2)


def test_random_subspaces_are_drawn_anew_and_can_be_repeated():
    one, other, third = (RandomProjector((8, 5), 2, seed=seed) for seed in (0, 0, 1))
    G = matrix(8, 5)
    first, second = one.update(G), one.update(G)
    assert not torch.allclose(first, second) and not torch.allclose(first, third.update(G))
    torch.testing.assert_close(other.update(G), first, **EXACT)
    other.memory = dict(one.memory)  # as from a checkpoint
    torch.testing.assert_close(other.update(G), one.update(G), **EXACT)


@pytest.mark.parametrize(("rank", "side", "found"), [(3, 8, 3), (30, 8, 8), (0.25, 8, 2), (1.0, 8, 8), (0.01, 8, 1)])
def test_ranks_are_numbers_or_shares(rank, side, found):
    assert rank_of(rank, side) == found


@pytest.mark.parametrize("kind", KINDS)
def test_values_out_of_range_are_refused_by_name(kind):
    for rank in (0, -1, 1.5, 0.0, True, float("nan")):
        with pytest.raises(ValueError, match=r"rank = .* is out of range"):
            kind((4, 3), rank)
    with pytest.raises(ValueError, match="side = 'up' is out of range"):
        kind((4, 3), 1, side="up")
    with pytest.raises(ValueError, match=r"shape = \(4, 3, 2\) is out of range"):
        kind((4, 3, 2), 1)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_any_projector_makes_a_sound_optimizer(check, monkeypatch):
    make = functools.partial(LowRankAdamW, projector=SVDProjector, rank=2, update_gap=2)
    check(make, monkeypatch) if "monkeypatch" in inspect.signature(check).parameters else check(make)


def test_random_subspaces_go_on_after_a_checkpoint_as_they_would_have():
    resuming_from_a_state_dict_is_bit_exact(functools.partial(LowRankAdamW, projector=RandomProjector, rank=2))


class Counts(RuleOptimizer):
    """Descent that keeps an integer beside its slot."""

    slots = ("sum",)

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @staticmethod
    def rule(p, g, total, *, lr, t):
        total.add_(g)


def test_what_is_no_slot_keeps_its_dtype_in_a_checkpoint():
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2)]
    ones, others = Counts(params[:1]), Counts(params[1:])
    params[0].grad = torch.ones_like(params[0])
    ones.step()
    ones.state[params[0]]["places"] = torch.tensor([70_001, 5])
    ones.state[params[0]]["sum"] = ones.state[params[0]]["sum"].float()
    others.load_state_dict(ones.state_dict())
    state = others.state[params[1]]
    assert torch.equal(state["places"], torch.tensor([70_001, 5])) and state["places"].dtype == torch.int64
    assert state["sum"].dtype == torch.bfloat16, "slots are in the parameter's dtype"
