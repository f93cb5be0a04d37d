"""Subspaces as classes against closed forms, their optimizer against torch's, and a broken variant of the claim."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.arms import DEFAULT_RECIPE
from assay.bench.claims import recorded
from assay.bench.evidence import FAILS, HOLDS, Bench
from assay.bench.loop import fit
from assay.bench.recipe import Budget
from assay.bench.tasks import digits
from assay.catalogue import find
from assay.nn import GrassmannLinear
from assay.nn._contract import Example
from assay.nn.functional import grassmann_geodesic_step, grassmann_rgrad
from assay.nn.grassmann_class.claim import UNION, claim, figure
from assay.nn.grassmann_class.grassmann_class import apply
from assay.optim import GrassmannSGD, with_grassmann
from assay.optim._contract import CHECKS

EXAMPLES = [
    Example(partial(GrassmannLinear, 4, 3, subspace_dim=2, gamma=3.0), (4, 4)),
    Example(partial(GrassmannLinear, 3, 2, subspace_dim=1, gamma=2.0, normalize=False), (2, 3, 3)),
]
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


def subspaces(*shape: int, seed: int = 0) -> nn.Parameter:
    """The weight of a layer: shape (C, n, k), float64."""
    torch.manual_seed(seed)
    c, n, k = shape
    return GrassmannLinear(n, c, k, dtype=torch.float64).weight


def eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype).expand(len(like), -1, -1)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_for_other_parameters_it_is_an_optimizer_like_all(check, monkeypatch):
    wanted = inspect.signature(check).parameters
    check(GrassmannSGD, monkeypatch) if "monkeypatch" in wanted else check(GrassmannSGD)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}, {"dampening": 0.3, "weight_decay": 0.1}])
def test_for_other_parameters_it_is_torchs_sgd(options):
    options = {"lr": 0.1, "momentum": 0.9} | options
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(4, 3, dtype=torch.float64)) for _ in range(2)]
    theirs = copy.deepcopy(mine)
    one, other = GrassmannSGD(mine, **options), torch.optim.SGD(theirs, **options)
    for _ in range(5):
        for p, q in zip(mine, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        one.step()
        other.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)


def test_the_logit_is_the_length_of_the_projection():
    layer = GrassmannLinear(7, 5, 3, gamma=4.0, dtype=torch.float64)
    x = torch.randn(6, 2, 7, dtype=torch.float64)
    unit = x / x.norm(dim=-1, keepdim=True)
    expected = torch.stack([4 * (unit @ P).norm(dim=-1) for P in layer.projector()], -1)
    close(layer(x), expected)
    close(layer(-3 * x), expected)
    rotation = torch.linalg.qr(torch.randn(5, 3, 3, dtype=torch.float64)).Q
    turned = copy.deepcopy(layer)
    with torch.no_grad():
        turned.weight.copy_(layer.weight @ rotation)
    close(turned(x), expected)
    assert (expected >= 0).all() and (expected <= 4).all()
    inside = layer.weight[2] @ torch.randn(3, dtype=torch.float64)
    close(layer(inside)[2], torch.tensor(4.0, dtype=torch.float64))
    layer.normalize = False
    close(layer(-3 * x), torch.stack([4 * (3 * x @ P).norm(dim=-1) for P in layer.projector()], -1))
    one = GrassmannLinear(7, 5, 1, dtype=torch.float64)
    close(one(x), 25 * F.cosine_similarity(x[..., None, :], one.weight[..., 0], dim=-1).abs())


def test_features_of_zero_or_orthogonal_to_a_class_give_no_nan():
    layer = GrassmannLinear(3, 2, 1, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[[1.0], [0], [0]], [[0.0], [1], [0]]]))
    x = torch.tensor([[0.0, 0, 0], [0, 1, 0]], dtype=torch.float64, requires_grad=True)
    F.cross_entropy(layer(x), torch.tensor([0, 0])).backward()
    assert x.grad.isfinite().all() and layer.weight.grad.isfinite().all()
    close(layer(x).detach(), torch.tensor([[0.0, 0], [0, 25]], dtype=torch.float64))


def test_gradient_and_geodesic():
    S = subspaces(4, 9, 3).detach()
    D = torch.randn_like(S)
    G = grassmann_rgrad(S, D)
    close(S.mT @ G, torch.zeros(4, 3, 3, dtype=torch.float64))
    close(grassmann_rgrad(S, G), G)
    direction = G / torch.linalg.matrix_norm(G, 2)[..., None, None]
    moved = grassmann_geodesic_step(S, direction, 0.7)
    torch.testing.assert_close(moved.mT @ moved, eye(moved), rtol=0, atol=1e-12)
    lengths = 0.7 * torch.linalg.svdvals(direction)
    layer = GrassmannLinear(9, 8, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.cat([S, moved]))
    for i in range(4):
        close(layer.principal_angles(i, i + 4), lengths[i].flip(0))
    close(grassmann_geodesic_step(S, torch.zeros_like(S), 0.7), S)
    h = 1e-6
    slope = (grassmann_geodesic_step(S, D - S @ (S.mT @ D), h) - S) / h
    torch.testing.assert_close(slope, G, rtol=1e-4, atol=1e-4)
    half = grassmann_geodesic_step(S, direction, 0.35)
    velocity = (grassmann_geodesic_step(S, direction, 0.35 + h) - half) / h
    torch.testing.assert_close(grassmann_geodesic_step(half, velocity, 0.35), moved, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="shape of egrad = "):
        grassmann_rgrad(S, D[0])


def test_small_angles_are_not_rounded_off():
    layer = GrassmannLinear(6, 2, 2)
    turned = grassmann_geodesic_step(*(torch.eye(6)[:, i : i + 2] for i in (0, 2)), 1e-5)
    with torch.no_grad():
        layer.weight.copy_(torch.stack([torch.eye(6)[:, :2], turned]))
    torch.testing.assert_close(layer.principal_angles(0, 1), torch.tensor([1e-5, 1e-5]), rtol=1e-3, atol=0)


def test_lines_turn_as_on_the_projective_line():
    weight = subspaces(3, 5, 1)
    optimizer = GrassmannSGD([weight], lr=0.2, momentum=0.5, lr_factor=0.5, reorth_every=100)
    S, M = weight.detach().clone(), torch.zeros(3, 5, 1, dtype=torch.float64)
    for _ in range(4):
        D = torch.randn_like(S)
        weight.grad = D.clone()
        optimizer.step()
        M = 0.5 * (M - S * (S * M).sum(1, keepdim=True)) + D - S * (S * D).sum(1, keepdim=True)
        length = M.norm(dim=1, keepdim=True)
        S = S * (0.1 * length).cos() - M / length * (0.1 * length).sin()
        close(weight.detach(), S)
        close((S * optimizer.state[weight]["momentum_buffer"]).sum(1) * 0, torch.zeros(3, 1, dtype=torch.float64))


def steps(weight: nn.Parameter, gradients: list[Tensor], **options: object) -> GrassmannSGD:
    optimizer = GrassmannSGD([weight], **{"lr": 0.1, **options})
    for D in gradients:
        weight.grad = D.clone()
        optimizer.step()
    return optimizer


def test_momentum_is_carried_to_where_the_subspace_is():
    weight = subspaces(4, 8, 3)
    torch.manual_seed(1)
    gradients = [torch.randn(4, 8, 3, dtype=torch.float64) for _ in range(12)]
    S, M = weight.detach().clone(), torch.zeros(4, 8, 3, dtype=torch.float64)
    optimizer = steps(weight, gradients, momentum=0.9, reorth_every=4)
    for D in gradients:  # in another basis of each subspace, chosen anew at every step: all must turn alike
        Q = torch.linalg.qr(torch.randn(4, 3, 3, dtype=torch.float64)).Q
        P = torch.eye(8, dtype=torch.float64) - S @ S.mT
        M = 0.9 * P @ M + P @ D
        U, s, Vh = torch.linalg.svd(M @ Q, full_matrices=False)
        turned = S @ Q @ Vh.mT * (0.1 * s).cos()[:, None] - U * (0.1 * s).sin()[:, None]
        S = turned @ Vh @ Q.mT
    torch.testing.assert_close(weight.detach(), S, rtol=1e-8, atol=1e-8)
    buffer = optimizer.state[weight]["momentum_buffer"]
    torch.testing.assert_close(buffer, M, rtol=1e-8, atol=1e-8)


def test_no_momentum_and_no_gradient_move_nothing():
    weight = subspaces(4, 8, 3)
    before = weight.detach().clone()
    optimizer = steps(weight, [torch.zeros_like(before)] * 7, weight_decay=0.1)
    torch.testing.assert_close(weight.detach(), before, rtol=0, atol=1e-14)
    weight.grad = None
    optimizer.step()
    assert optimizer.state[weight]["step"] == 7
    without = steps(weight, [before], momentum=0.0)
    assert "momentum_buffer" not in without.state[weight]


@pytest.mark.parametrize(("momentum", "same"), [(0.0, True), (0.9, False)])
def test_the_authors_transport_is_the_papers_without_momentum(momentum, same):
    found = []
    for transport in ("paper", "reference"):
        weight = subspaces(4, 8, 3)
        optimizer = GrassmannSGD([weight], lr=0.1, momentum=momentum, transport=transport)
        for seed in range(8):  # gradients of functions of the subspaces: the authors' QR may turn columns round
            A = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            weight.grad = (A + A.mT) @ weight.detach()
            optimizer.step()
        found.append((weight @ weight.mT).detach())
    assert torch.allclose(*found, rtol=1e-9, atol=1e-9) == same


def test_a_thousand_steps_in_single_precision_stay_orthonormal():
    layer = GrassmannLinear(16, 3, 4)
    optimizer = GrassmannSGD(layer.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        layer.weight.grad = torch.randn(layer.weight.shape, generator=generator)
        optimizer.step()
    S = layer.weight.detach()
    torch.testing.assert_close(S.mT @ S, eye(S), rtol=0, atol=1e-6)
    half = GrassmannLinear(16, 3, 4, dtype=torch.bfloat16)
    optimizer = steps(half.weight, [torch.randn(3, 16, 4).bfloat16()] * 3)
    assert half.weight.dtype == torch.bfloat16
    assert optimizer.state[half.weight]["momentum_buffer"].dtype == torch.float32


def test_descent_finds_the_leading_eigenvectors():
    torch.manual_seed(0)
    A = torch.randn(10, 10, dtype=torch.float64)
    A = A @ A.mT
    weight = subspaces(1, 10, 3)
    optimizer = GrassmannSGD([weight], lr=0.01, momentum=0.5)
    for _ in range(1000):
        optimizer.zero_grad()
        (-(weight.mT @ A @ weight).diagonal(dim1=-2, dim2=-1).sum()).backward()
        optimizer.step()
    layer = GrassmannLinear(10, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.stack([weight[0], torch.linalg.eigh(A).eigenvectors[:, -3:]]))
    assert layer.principal_angles(0, 1).max() < 1e-4


def test_the_tag_outlives_copies_and_files_and_unlike_bases_are_the_same():
    layer = GrassmannLinear(6, 3, 2)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = GrassmannLinear(6, 3, 2)
    loaded.load_state_dict(layer.state_dict())
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
        loaded,
    ):
        assert other.weight.manifold == "grassmann" and torch.equal(other.weight, layer.weight)
    assert layer.double().weight.manifold == "grassmann"
    assert copy.deepcopy([layer.weight])[0].manifold == "grassmann"
    rows = layer.weight.detach().mT.flatten(0, 1)
    again = GrassmannLinear.from_reference_weight(rows, 2, gamma=5.0)
    close(again(torch.ones(6, dtype=torch.float64)) * 5, layer(torch.ones(6, dtype=torch.float64)))
    with torch.no_grad():
        layer.weight.mul_(3)
    layer.retract_()
    torch.testing.assert_close(layer.weight.detach(), again.weight.detach(), rtol=0, atol=1e-6)


def pair(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), GrassmannLinear(6, 3, 2)).double()
    base = torch.optim.AdamW(model[0].parameters(), lr=1e-2)
    return model, with_grassmann(base, model[2].parameters(), lr_factor=10.0, momentum=0.9, reorth_every=2)


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, first: int = 0) -> list[Tensor]:
    for i in range(first, first + count):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(8) % 3).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_beside_another_optimizer():
    model, optimizer = pair()
    whole = learn(model, optimizer, 6)
    other = pair()[0]
    heads = GrassmannSGD(other[2].parameters(), lr=0.1, reorth_every=2)
    both = [torch.optim.AdamW(other[0].parameters(), lr=1e-2), heads]
    for i in range(6):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        other.zero_grad()
        F.cross_entropy(other(x), torch.arange(8) % 3).backward()
        for one in both:
            one.step()
    close(whole, [p.detach() for p in other.parameters()])
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_beside_another_optimizer_it_resumes_and_follows_the_schedule():
    whole = learn(*pair(), 6)
    model, optimizer = pair()
    learn(model, optimizer, 3)
    saved, model2 = io.BytesIO(), copy.deepcopy(model)
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    base = torch.optim.AdamW(model2[0].parameters(), lr=1e-2)
    resumed = with_grassmann(base, model2[2].parameters(), lr_factor=10.0, reorth_every=2)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    torch.testing.assert_close(learn(model2, resumed, 3, first=3), whole, rtol=0, atol=0)
    model3, copied = copy.deepcopy((model, optimizer))
    torch.testing.assert_close(learn(model3, copied, 3, first=3), whole, rtol=0, atol=0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = [p.detach().clone() for p in model.parameters()]
    torch.testing.assert_close(learn(model, optimizer, 1), before, rtol=0, atol=1e-12)
    assert scheduler.get_last_lr() == [0.0]
    assert optimizer.step(lambda: 3.0) == 3.0


def test_as_a_piece_of_a_comparison():
    task = digits()
    found = fit(apply(DEFAULT_RECIPE, subspace_dim=4), task, Budget(60, 32, 1), 0)
    head = list(found.model.modules())[-1]
    assert isinstance(head, GrassmannLinear) and head.num_classes == 10
    assert found.status == "finished" and found.validation > 0.7
    S = head.weight.detach()
    torch.testing.assert_close(S.mT @ S, eye(S), rtol=0, atol=1e-5)


def test_arguments_out_of_range_are_named():
    for name, value in [("in_features", 0), ("num_classes", 0), ("subspace_dim", 7), ("gamma", 0.0)]:
        with pytest.raises(ValueError, match=f"{name} = {value} is out of range"):
            GrassmannLinear(**{"in_features": 6, "num_classes": 3, "subspace_dim": 2, name: value})
    weight = subspaces(2, 4, 2)
    for name, value in [
        ("momentum", 1.0),
        ("lr_factor", -1),
        ("reorth_every", 0),
        ("dampening", 2),
        ("transport", "x"),
    ]:
        with pytest.raises(ValueError, match=f"{name} = {value!r} is out of range"):
            GrassmannSGD([weight], **{"lr": 0.1, name: value})
    with pytest.raises(ValueError, match="also one of base_optimizer's"):
        with_grassmann(torch.optim.SGD([weight], lr=0.1), [weight])
    with pytest.raises(ValueError, match="grassmann_params = "):
        with_grassmann(torch.optim.SGD([weight], lr=0.1), [nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="rows of weight = 5 is out of range: a multiple of 2"):
        GrassmannLinear.from_reference_weight(torch.randn(5, 8), 2)


class Centres(nn.Module):
    """The broken variant of the card: the best of k directions, in place of the length of the projection."""

    def __init__(self, in_features: int, classes: int, k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, k, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return 25 * (F.normalize(self.weight, dim=-1) @ F.normalize(x, dim=-1).mT).amax(1).mT


def test_the_claim_does_not_hold_for_several_centres():
    real, broken = (claim(Bench(), method=m, parts=(UNION,), dims=(4,), seeds=3) for m in (GrassmannLinear, Centres))
    assert (real.checks[0].verdict, broken.checks[0].verdict) == (HOLDS, FAILS)


def test_the_claim_is_drawn():
    evidence, _ = recorded(find("grassmann-class"))
    assert figure(evidence) is not None
