"""GradNormLoRP against its formula in plain loops, GaLore, and what its layer promises."""

import functools
import inspect
import math

import pytest
import torch
from torch import nn

from assay.bench import Bench
from assay.nn import GradNormLoRPLinear, swap
from assay.optim import GaLoreProjector, GradNormLoRP, gradnormlorp_param_groups
from assay.optim._contract import CHECKS, EXACT, gradients, resuming_from_a_state_dict_is_bit_exact, same, walk
from assay.optim.gradnormlorp import claim as room

EXAMPLE = {"GradNormLoRP": {"rank": 2}}
DISTRIBUTED = [
    (GradNormLoRP, {"lr": 0.01, "weight_decay": 0.1, "rank": 2}),
    (GradNormLoRP, {"lr": 0.01, "rank": 2, "update_proj_gap": 2, "weight_norm": False}),
    (GradNormLoRP, {"lr": 0.01}),
]
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
SHAPES = [(9, 6), (6, 9), (7, 7), (4, 3, 2, 2), (5,), ()]


def parameters(shapes=SHAPES, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)) for shape in shapes]


class HFAdamW:
    """Adam with eps before the correction of the averages, and decay after the step."""

    def __init__(self, betas, eps, correct):
        self.betas, self.eps, self.correct, self.m, self.v = betas, eps, correct, 0.0, 0.0

    def direction(self, g):
        self.m = self.betas[0] * self.m + (1 - self.betas[0]) * g
        self.v = self.betas[1] * self.v + (1 - self.betas[1]) * g * g
        return self.m / (self.v.sqrt() + self.eps)

    def rate(self, lr, t):
        return lr * math.sqrt(1 - self.betas[1] ** t) / (1 - self.betas[0] ** t) if self.correct else lr


def bases(G, rank, kind):
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    tall = G.shape[0] >= G.shape[1]
    side = {"std": "right" if tall else "left", "reverse_std": "left" if tall else "right"}.get(kind, kind)
    left, right = torch.eye(G.shape[0], dtype=G.dtype), torch.eye(G.shape[1], dtype=G.dtype)
    return U[:, :rank] if side in ("left", "full") else left, Vh[:rank].T if side in ("right", "full") else right


def by_hand(
    params, steps, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, wd=0.0, rank=None, gap=200, scale=1.0, kind="std", norm=True,
    magnitude=1.0, correct=True,
):  # fmt: skip
    found = [nn.Parameter(p.detach().clone()) for p in params]
    adams = [[HFAdamW(betas, eps, correct) for _ in range(2)] for _ in found]
    kept = [None] * len(found)
    with torch.no_grad():
        for step in gradients(found, steps):
            for i, p in enumerate(found):
                inner, outer = adams[i]
                a = inner.rate(lr, step + 1)
                if p.dim() < 2:
                    p.copy_((p - a * inner.direction(p.grad)) * (1 - lr * wd))
                    continue
                W, G = p.flatten(1).clone(), p.grad.flatten(1).clone()
                rows = range(len(W))
                n = torch.stack([W[j].norm() for j in rows])
                if norm:
                    along = torch.stack([G[j] @ W[j] / n[j] for j in rows])
                    G = torch.stack([G[j] - along[j] * W[j] / n[j] for j in rows])
                if rank is not None and rank < min(W.shape):
                    if step % gap == 0:
                        kept[i] = bases(G, rank, kind)
                    L, P = kept[i]
                    V = W - a * scale * (L @ inner.direction(L.T @ G @ P) @ P.T)
                else:
                    V = W - a * (1.0 if rank is None else scale) * inner.direction(G)
                if norm:
                    n = (n - a * magnitude * outer.direction(along)) * (1 - lr * wd)
                    V = torch.stack([n[j] * V[j] / V[j].norm() for j in rows])
                else:
                    V = V * (1 - lr * wd)
                p.copy_(V.reshape(p.shape))
    return found


NAMES = {
    "weight_decay": "wd", "update_proj_gap": "gap", "proj_type": "kind", "weight_norm": "norm",
    "magnitude_lr_scale": "magnitude", "correct_bias": "correct",
}  # fmt: skip


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("options", [
    {"rank": 2},
    {"rank": 2, "lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1, "scale": 0.25},
    {"rank": 3, "update_proj_gap": 3, "proj_type": "reverse_std"},
    {"rank": 3, "update_proj_gap": 2, "proj_type": "right", "correct_bias": False},
    {"rank": 2, "proj_type": "left", "magnitude_lr_scale": 0.1},
    {"rank": 2, "proj_type": "full", "update_proj_gap": 4},
    {"rank": 6, "scale": 0.5},
    {"rank": None, "weight_decay": 0.1},
])  # fmt: skip
def test_trajectory_is_the_formula(options, norm):
    told = {NAMES.get(name, name): value for name, value in options.items()}
    mine = walk(GradNormLoRP, parameters(), steps=10, weight_norm=norm, **options)
    same(mine, by_hand(parameters(), 10, norm=norm, **told), **CLOSE)


def test_without_norm_and_rank_it_is_adamw_but_for_eps():
    mine = walk(GradNormLoRP, parameters(), steps=10, weight_norm=False, eps=0.0, lr=0.01)
    same(mine, walk(torch.optim.AdamW, parameters(), steps=10, weight_decay=0.0, eps=0.0, lr=0.01), **CLOSE)


def matrix(n, m, seed=0):
    return torch.randn(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("kind", "low"), [
    ("std", (9, 2)), ("reverse_std", (2, 6)), ("right", (9, 2)), ("left", (2, 6)), ("full", (2, 2)),
])  # fmt: skip
def test_at_a_renewal_the_projection_is_the_truncated_svd(kind, low):
    G, projector = matrix(9, 6), GaLoreProjector(2, update_proj_gap=3, scale=0.5, proj_type=kind)
    found = projector.project(G, 0)
    U, S, Vh = torch.linalg.svd(G)
    assert found.shape == low
    torch.testing.assert_close(projector.project_back(found), 0.5 * (U[:, :2] * S[:2]) @ Vh[:2], **CLOSE)
    for basis in (value for name, value in projector.state_dict().items() if name != "calls"):
        torch.testing.assert_close(basis.T @ basis, torch.eye(2, dtype=G.dtype), **CLOSE)
    assert GaLoreProjector(2, proj_type=kind).project(G.T).shape == {
        "std": (2, 9), "reverse_std": (6, 2), "right": (6, 2), "left": (2, 9), "full": (2, 2)
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["std", "full"])
def test_bases_are_kept_between_renewals_and_in_a_checkpoint(kind):
    ones, others = (GaLoreProjector(2, update_proj_gap=3, proj_type=kind) for _ in range(2))
    lows = [ones.project(matrix(9, 6, seed=i)) for i in range(5)]
    kept = [ones.state_dict()["basis_right"]]
    fresh = GaLoreProjector(2, proj_type=kind)
    fresh.project(matrix(9, 6, seed=3))
    torch.testing.assert_close(kept[0], fresh.state_dict()["basis_right"], **EXACT)
    for i in range(2):
        torch.testing.assert_close(others.project(matrix(9, 6, seed=i)), lows[i], **EXACT)
    loaded = GaLoreProjector(2, update_proj_gap=3, proj_type=kind)
    loaded.load_state_dict(others.state_dict())
    for i in range(2, 5):
        torch.testing.assert_close(loaded.project(matrix(9, 6, seed=i)), lows[i], **EXACT)


def test_row_norms_do_not_change_without_their_rate():
    params = parameters(dtype=torch.float32)[:4]
    before = [p.detach().flatten(1).norm(dim=1) for p in params]
    walk(GradNormLoRP, params, steps=50, rank=2, lr=0.1, magnitude_lr_scale=0.0, update_proj_gap=7)
    torch.testing.assert_close([p.detach().flatten(1).norm(dim=1) for p in params], before, rtol=1e-6, atol=1e-6)


def test_a_radial_gradient_changes_only_the_norms():
    (p,) = parameters([(9, 6)])
    start = p.detach().clone()
    optimizer = GradNormLoRP([p], lr=0.1, rank=2)
    for _ in range(5):
        p.grad = torch.arange(1.0, 10.0, dtype=torch.float64)[:, None] * p.detach()
        optimizer.step()
    cosine = (p * start).sum(1) / (p.norm(dim=1) * start.norm(dim=1))
    torch.testing.assert_close(cosine, torch.ones(9, dtype=torch.float64), rtol=1e-9, atol=0)
    torch.testing.assert_close(start.norm(dim=1) - p.norm(dim=1), torch.full((9,), 0.5).double(), rtol=1e-2, atol=0)


def test_the_projected_gradient_is_orthogonal_to_its_rows(monkeypatch):
    params, seen = parameters([(9, 6), (6, 9)]), []
    project = GaLoreProjector.project
    monkeypatch.setattr(GaLoreProjector, "project", lambda self, G, step: seen.append(G) or project(self, G, step))
    optimizer = GradNormLoRP(params, lr=0.1, rank=2)
    for _ in gradients(params, 2):
        rows = [p.detach().clone() for p in params]
        optimizer.step()
        assert all((G * W).sum(1).abs().max() < 1e-12 for G, W in zip(seen[-2:], rows, strict=True))


def test_rows_of_zeros_begin_to_move():
    p = nn.Parameter(torch.zeros(4, 3))
    walk(GradNormLoRP, [p], steps=3, lr=0.1, rank=2)
    assert p.isfinite().all() and (p.norm(dim=1) > 0.01).all()


@pytest.mark.parametrize(("shape", "count"), [((9, 6), 2 * 2 * 9 + 2 * 6 + 2 * 9), ((6, 9), 2 * 2 * 9 + 2 * 6 + 2 * 6)])
def test_the_state_is_as_many_numbers_as_said(shape, count):
    (p,) = parameters([shape])
    optimizer = GradNormLoRP([p], rank=2)
    for _ in gradients([p], 2):
        optimizer.step()
    assert sum(x.numel() for name, x in optimizer.state[p].items() if name != "step") == count


def test_groups_that_name_no_rank_are_adamw():
    params, others = parameters(), parameters()
    ones = GradNormLoRP([{"params": params[:2]}, {"params": params[2:4], "rank": 2, "scale": 0.5}], lr=0.01)
    ones.add_param_group({"params": params[4:]})
    twos = [GradNormLoRP([*others[:2], *others[4:]], lr=0.01, weight_norm=False)]
    twos.append(GradNormLoRP(others[2:4], lr=0.01, rank=2, scale=0.5))
    for _ in zip(gradients(params, 4), gradients(others, 4), strict=True):
        for optimizer in (ones, *twos):
            optimizer.step()
    same(params, others)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_other_forms_satisfy_the_contract(check, monkeypatch):
    """GaLore on both sides with states in eight bits, and the full rank."""
    if "monkeypatch" in inspect.signature(check).parameters:
        pytest.skip("compiles what the form of the card's test has compiled")
    check(functools.partial(GradNormLoRP, rank=2, weight_norm=False, proj_type="full", update_proj_gap=2, state_bits=8))
    check(GradNormLoRP)


def test_resuming_in_the_middle_of_a_gap():
    for bits in (32, 8):
        resuming_from_a_state_dict_is_bit_exact(
            functools.partial(GradNormLoRP, rank=2, update_proj_gap=4, state_bits=bits)
        )


def test_half_precision_weights_have_float32_moments_and_a_basis_in_their_own():
    params = parameters([(9, 6)], torch.bfloat16)
    optimizer = GradNormLoRP(params, rank=2)
    for _ in gradients(params, 2):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    dtypes = {name: x.dtype for name, x in optimizer.state[params[0]].items() if name != "step"}
    assert dtypes.pop("basis_right") == torch.bfloat16 and set(dtypes.values()) == {torch.float32}


def test_eight_bits_stay_near_thirty_two_and_take_a_quarter():
    params, others = parameters([(300, 64)], torch.float32), parameters([(300, 64)], torch.float32)
    ones, twos = (GradNormLoRP(p, lr=0.01, rank=8, state_bits=b) for p, b in ((params, 32), (others, 8)))
    start = params[0].detach().clone()
    for _ in zip(gradients(params, 10), gradients(others, 10), strict=True):
        ones.step()
        twos.step()
    away, moved = (others[0] - params[0]).norm(), (params[0] - start).norm()
    assert 0 < away < 0.05 * moved

    def size(optimizer, p):
        names = ("low_exp_avg", "low_exp_avg_sq", "low_exp_avg_absmax", "low_exp_avg_sq_absmax")
        kept = [optimizer.state[p][name] for name in names if name in optimizer.state[p]]
        return sum(x.numel() * x.element_size() for x in kept)

    assert size(twos, others[0]) < 0.26 * size(ones, params[0])


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.attn = nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 10)


def test_groups_take_the_linear_layers_of_the_named_modules():
    model = Network()
    others, chosen = gradnormlorp_param_groups(model, rank=4, scale=0.25)
    weights = {id(model.attn.weight), id(model.mlp[0].weight), id(model.mlp[2].weight)}
    assert {id(p) for p in chosen["params"]} == weights
    assert len(others["params"]) + len(chosen["params"]) == len(list(model.parameters()))
    assert chosen["rank"] == 4 and chosen["scale"] == 0.25 and "rank" not in others
    assert len(gradnormlorp_param_groups(model, "head")[1]["params"]) == 1
    with pytest.raises(ValueError, match="target = 'gate' is out of range"):
        gradnormlorp_param_groups(model, "gate")
    swap(model.mlp, nn.Linear, lambda name, layer: GradNormLoRPLinear(layer, rank=2))
    others, chosen = gradnormlorp_param_groups(model, "mlp", rank=1)
    assert [tuple(p.shape) for p in chosen["params"]] == [(2, 8), (16, 2), (2, 16), (8, 2)]
    assert all(p.requires_grad for p in others["params"])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("betas", (1.0, 0.9)),
        ("eps", -1e-8),
        ("weight_decay", -0.1),
        ("scale", -1.0),
        ("magnitude_lr_scale", -1.0),
        ("rank", 0),
        ("update_proj_gap", 0),
        ("proj_type", "up"),
        ("state_bits", 4),
    ],
)
def test_values_out_of_range_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"{option} = .* is out of range"):
        GradNormLoRP([nn.Parameter(torch.ones(2, 2))], **{option: value})


def test_bad_arguments_of_the_projector_are_refused_by_name():
    for option, value in (("rank", 0), ("update_proj_gap", 0), ("proj_type", "up")):
        with pytest.raises(ValueError, match=f"{option} = .* is out of range"):
            GaLoreProjector(**{"rank": 2, option: value})
    with pytest.raises(ValueError, match=r"grad.shape = \(3,\) is out of range"):
        GaLoreProjector(2).project(torch.ones(3))


class NoWriteBack(GradNormLoRP):
    """The broken variant: the new direction and norms are computed, and never written to the weights."""

    def step_matrix(self, p, g, t, group):
        before = p.detach().clone()
        super().step_matrix(p, g, t, group)
        p.data.copy_(before)


def test_the_claim_fails_for_an_optimizer_that_does_not_write_back():
    """On the distance to AdamW, which is decisive for it."""

    def verdict(method):
        checks = room.claim(Bench(), method=method, parts=("training",), ranks=(4,), seeds=3, steps=30).checks
        return next(check.verdict for check in checks if check.name.startswith("held-out loss, GradNormLoRP - AdamW"))

    assert verdict(NoWriteBack) == "does not hold"
    assert verdict(GradNormLoRP) == "holds"
