"""The top-K mixture against plain loops and closed forms, its fit and losses, and a broken variant of its claim."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from assay.bench.evidence import FAILS, Bench
from assay.nn import TopKMoE, suggest_k
from assay.nn._contract import Example
from assay.nn.gaussian_moe import TopKGaussianMoE, fit_em, min_selected_experts, voronoi_cells, voronoi_loss
from assay.nn.topk_moe.claim import claim, figure, near, truth
from assay.nn.topk_moe.em import climb, random_starts


def density(model: nn.Module, x: Tensor) -> Tensor:
    return model.log_prob(x, x[:, 0])


EXAMPLES = [
    Example(partial(TopKGaussianMoE, 2, 4, k=2), (5, 2), None, density, bfloat16=0.1),
    Example(partial(TopKMoE, 6, 4, n_experts=5, k=2), (7, 6)),
    Example(partial(TopKMoE, 6, 4, n_experts=3, k=2, selection="biased", bias=False), (3, 4, 6)),
]
exactly = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_model(d: int = 2, experts: int = 4, k: int = 2, seed: int = 0) -> TopKGaussianMoE:
    model = TopKGaussianMoE(d, experts, k, dtype=torch.float64).requires_grad_(False)
    for number, parameter in enumerate(model.parameters()):
        parameter.copy_(normal(*parameter.shape, seed=10 * seed + number))
    model.log_sigma.mul_(0.3)
    return model


def moved(model: TopKGaussianMoE, order: list[int] | None = None, t1: float = 0, t0: float = 0) -> TopKGaussianMoE:
    """The same density: atoms in another order, the gate translated."""
    other = TopKGaussianMoE(model.d, model.n_experts, model.k, dtype=torch.float64).requires_grad_(False)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        mine.copy_(theirs[order or list(range(model.n_experts))])
    other.beta1.add_(t1)
    other.beta0.add_(t0)
    return other


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_gate_density_and_mean_are_those_of_the_formula(k):
    model, x, y = a_model(k=k), normal(9, 2), normal(9, seed=1)
    gates = torch.zeros(9, 4, dtype=torch.float64)
    for n in range(9):
        score = [float(model.beta1[e] @ x[n]) for e in range(4)]
        selected = sorted(range(4), key=lambda e: -score[e])[:k]
        weight = {e: math.exp(score[e] + model.beta0[e]) for e in selected}
        p = mean = 0.0
        for e in selected:
            gates[n, e] = weight[e] / sum(weight.values())
            center, sigma = float(model.a[e] @ x[n] + model.b[e]), math.exp(model.log_sigma[e])
            p += gates[n, e] * math.exp(-((y[n] - center) ** 2) / (2 * sigma**2)) / math.sqrt(2 * math.pi) / sigma
            mean += gates[n, e] * center
        exactly(model.log_prob(x, y)[n].exp(), torch.as_tensor(p))
        exactly(model(x)[n], torch.as_tensor(mean))
    exactly(model.gate(x), gates)
    if k == 4:
        exactly(gates, (x @ model.beta1.T + model.beta0).softmax(1))


def test_the_density_integrates_to_one():
    model, x, grid = a_model(), normal(6, 2), torch.linspace(-25, 25, 20_001, dtype=torch.float64)
    for row in x:
        p = model.log_prob(row.expand(len(grid), 2), grid).exp()
        assert abs(torch.trapezoid(p, grid) - 1) < 1e-6


def test_beta0_selects_nothing_and_translations_change_nothing():
    model, x, y = a_model(), normal(50, 2), normal(50, seed=1)
    selected, before = model.gate(x) > 0, model.log_prob(x, y)
    exactly(moved(model, t1=3.0, t0=-2.0).log_prob(x, y), before)
    exactly(moved(model, [2, 0, 3, 1]).log_prob(x, y), before)
    model.beta0[1] += 5
    assert torch.equal(model.gate(x) > 0, selected) and not torch.allclose(model.log_prob(x, y), before)


def test_samples_have_the_means_and_shares_of_the_model():
    model = a_model(k=3)
    x = normal(1, 2).expand(20_000, 2)
    y = model.sample(x, torch.Generator().manual_seed(0))
    assert torch.equal(y, model.sample(x, torch.Generator().manual_seed(0)))
    assert abs(y.mean() - model(x[:1])) < 4 * y.std() / len(y) ** 0.5
    grid = torch.linspace(-30, float(y.median()), 20_001, dtype=torch.float64)
    assert abs(torch.trapezoid(model.log_prob(x[:1].expand(len(grid), 2), grid).exp(), grid) - 0.5) < 0.02


def test_hellinger_distance():
    one, other, x = a_model(seed=0), a_model(seed=1), normal(20, 2)
    assert one.expected_hellinger(one, x) == 0
    there, back = one.expected_hellinger(other, x), other.expected_hellinger(one, x)
    exactly(there, back)
    assert 0 < there < 1
    near_one, shifted = a_model(experts=1, k=1), a_model(experts=1, k=1)
    for shift in (1e-4, 0.5, 3.0, 100.0):
        shifted.b.copy_(near_one.b + shift)
        closed = math.sqrt(-math.expm1(-(shift**2) / (8 * float(near_one.log_sigma.exp()) ** 2)))
        assert near_one.expected_hellinger(shifted, x, n_grid=4001).item() == pytest.approx(closed, rel=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_no_iteration_lowers_the_likelihood(k):
    true = a_model(k=2, experts=3)
    x = normal(300, 2)
    y = true.sample(x, torch.Generator().manual_seed(0))
    with torch.no_grad():
        atoms, path = climb(random_starts(x, y, 3, 6, torch.Generator().manual_seed(1)), x, y, k, 60, 0)
    path = torch.stack(path)
    assert path.shape[1] == 6 and (path.diff(dim=0) >= -1e-9).all() and (path[-1] > path[0] + 0.01).all()
    model = fit_em(x, y, 3, k, n_init=6, max_iter=60, tol=0, generator=torch.Generator().manual_seed(1))
    exactly(model.log_prob(x, y).mean(), path[-1].max())
    exactly(model.a, atoms.a[path[-1].argmax()])


def test_one_expert_is_least_squares():
    x, y = normal(40, 3), normal(40, seed=1)
    fit, z = fit_em(x, y, 1, 1), torch.cat([x, torch.ones(40, 1)], 1)
    line = torch.linalg.lstsq(z, y).solution
    exactly(torch.cat([fit.a[0], fit.b]), line)
    exactly(fit.log_sigma.exp()[0], (y - z @ line).square().mean().sqrt())


def test_the_gate_alone_is_logistic_regression():
    """Experts so far apart that each example tells its own: the gate's likelihood is that of the labels."""
    from sklearn.linear_model import LogisticRegression

    x = normal(400, 2)
    label = (x @ torch.tensor([1.0, -2.0], dtype=torch.float64) + 0.5 + normal(400, seed=1) > 0).double()
    y = 1000 * label + normal(400, seed=2)
    fit = fit_em(x, y, 2, 2, n_init=2, generator=torch.Generator().manual_seed(0))
    upper = int(fit.b.argmax())
    found = torch.cat([fit.beta1[upper] - fit.beta1[1 - upper], (fit.beta0[upper] - fit.beta0[1 - upper]).view(1)])
    peer = LogisticRegression(C=1e10, tol=1e-10, max_iter=1000).fit(x.numpy(), label.numpy())
    expected = torch.tensor([*peer.coef_[0], peer.intercept_[0]])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_truth_is_recovered():
    true, generator = truth(3), torch.Generator().manual_seed(0)
    x = torch.rand(50_000, 1, generator=generator, dtype=torch.float64) * 2 - 1
    y = true.sample(x, generator)
    fit = fit_em(x, y, 3, 2, init=near(true, 3, 2, 1, generator))
    fit.requires_grad_(False)
    last = moved(fit, t1=float(true.beta1[-1] - fit.beta1[-1]), t0=float(true.beta0[-1] - fit.beta0[-1]))
    for name, goal in true.named_parameters():
        torch.testing.assert_close(getattr(last, name), goal, rtol=0.05, atol=0.05)
    few = slice(0, 1500)  # from random starts too no likelihood is lost
    found = fit_em(x[few], y[few], 3, 2, generator=generator)
    assert found.log_prob(x[few], y[few]).mean() >= true.log_prob(x[few], y[few]).mean()


def test_a_fit_starts_where_it_is_told_and_keeps_sigma_above_its_floor():
    true, x, y = a_model(), normal(30, 2), normal(30, seed=1)
    same = fit_em(x, y, 4, 2, init=true, max_iter=0)
    assert all(torch.equal(one, other) for one, other in zip(same.parameters(), true.parameters(), strict=True))
    assert fit_em(x.float(), y.float(), 2, 1, max_iter=2).a.dtype == torch.float32
    exact = fit_em(x, 2 * x[:, 0] + 1, 1, 1)
    torch.testing.assert_close(exact.log_sigma.exp().item(), 1e-3)
    # An expert that nobody selects is left as it is.
    idle = a_model(d=1, experts=3, k=1)
    idle.beta1.copy_(torch.tensor([[1.0], [0.0], [-1.0]]))
    kept = fit_em(x[:, :1], y, 3, 1, init=idle)
    assert kept.a[1] == idle.a[1] and kept.log_sigma[1] == idle.log_sigma[1] and kept.a[0] != idle.a[0]


@pytest.mark.parametrize("kind", ["exact", "over"])
def test_the_voronoi_loss_sees_neither_order_nor_translation(kind):
    true = a_model()
    for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 5):
        same = moved(true, list(order), t1=1.5, t0=-0.7)
        assert voronoi_loss(same, true, 2, kind) < 1e-9
        assert voronoi_cells(moved(true, list(order)), true) == [[order.index(j)] for j in range(4)]
    fitted = a_model(experts=6, seed=2)
    loss = voronoi_loss(fitted, true, 2, kind)
    assert loss > 0
    for other in (moved(fitted, [5, 3, 1, 0, 2, 4]), moved(fitted, t1=-2.0, t0=0.4)):
        assert voronoi_loss(other, true, 2, kind) == pytest.approx(loss, rel=1e-2)
    assert sorted(itertools.chain(*voronoi_cells(fitted, true))) == list(range(6))


def test_the_voronoi_loss_by_hand():
    true = TopKGaussianMoE(1, 2, 1, dtype=torch.float64).requires_grad_(False)
    values = {"beta1": [[0.0], [10.0]], "a": [[0.0], [5.0]], "b": [0.0, 5.0]}
    for name, value in values.items():
        getattr(true, name).copy_(torch.tensor(value))
    close = moved(true)
    close.a[0] += 0.1
    close.b[0] -= 0.2
    close.log_sigma[0] = math.log(1.05)
    assert voronoi_loss(close, true, 1) == voronoi_loss(close, true, 2) == pytest.approx(0.35)
    close.b[1] += 0.3
    assert voronoi_loss(close, true, 1) == pytest.approx(0.35) and voronoi_loss(close, true, 2) == pytest.approx(0.65)
    # The first atom split in halves of the gate, which were moved by 0.1 in b, and in a, where powers are halved.
    split = TopKGaussianMoE(1, 3, 2, dtype=torch.float64).requires_grad_(False)
    for mine, theirs in zip(split.parameters(), true.parameters(), strict=True):
        mine.copy_(theirs[[0, 0, 1]])
    split.beta0[:2] -= math.log(2)
    assert voronoi_cells(split, true) == [[0, 1], [2]] and voronoi_loss(split, true, 1, "over") < 1e-12
    split.b[:2] += torch.tensor([0.1, -0.1])
    split.a[:2] += torch.tensor([[0.1], [-0.1]])
    assert voronoi_loss(split, true, 1, "over") == pytest.approx(0.1**4 + 0.1**2)
    assert voronoi_loss(split, true, 1, "exact") == pytest.approx(0.2)
    assert voronoi_loss(close, split, 1) > 0


def test_how_many_experts_to_select():
    cells = [[0, 3], [1], [2]]
    assert [min_selected_experts(cells, k) for k in (1, 2, 3)] == [2, 3, 4]
    assert suggest_k(8, 6, 2) == 4 and suggest_k(5, 5, 3) == 3
    for experts, true_experts, k in itertools.product(range(1, 7), range(1, 5), range(1, 5)):
        if experts >= true_experts >= k:  # the most that K cells of one atom at least can hold
            sizes = [c for c in itertools.product(range(1, 7), repeat=true_experts) if sum(c) == experts]
            most = max(min_selected_experts([[0] * size for size in c], k) for c in sizes)
            assert suggest_k(experts, true_experts, k) == most


@pytest.mark.parametrize("selection", ["unbiased", "biased", "noisy"])
@pytest.mark.parametrize("training", [True, False])
def test_the_layer_is_a_loop_over_the_selected_experts(selection, training):
    layer, x = TopKMoE(6, 4, 5, 2, selection=selection, dtype=torch.float64).train(training), normal(2, 7, 6)
    with torch.no_grad():
        layer.gate_bias.copy_(3 * normal(5, seed=3))
    torch.manual_seed(0)
    y, aux = layer(x, return_aux=True)
    assert y.shape == (2, 7, 4) and aux is layer.aux_loss
    logits = x.flatten(0, 1) @ layer.w_gate + layer.gate_bias
    if selection == "noisy" and training:
        torch.manual_seed(0)
        logits = logits + torch.randn_like(logits) * (math.log(2) + 0.01)  # w_noise starts at 0
    by = logits - layer.gate_bias if selection == "unbiased" else logits
    for row, token in enumerate(x.flatten(0, 1)):
        selected = by[row].argsort(descending=True)[:2]
        gates = logits[row, selected].softmax(0)
        expected = sum(g * (layer.weight[e] @ token + layer.bias[e]) for g, e in zip(gates, selected, strict=True))
        exactly(y.flatten(0, 1)[row], expected)


def test_the_layer_leaves_masked_inputs_out():
    layer, x = TopKMoE(6, 4, 5, 2, dtype=torch.float64), normal(3, 4, 6)
    mask = torch.tensor([[True] * 4, [True] * 2 + [False] * 2, [False] * 4])
    y, aux = layer(x.masked_fill(~mask[..., None], math.nan), mask, return_aux=True)
    real, alone = layer(x[mask], return_aux=True)
    exactly(y[mask], real)
    exactly(aux, alone)
    assert not y[~mask].any()
    assert layer.w_gate.any()  # a gate of zeros would select the same experts for ever


def test_wrong_arguments_are_refused():
    x, y, model = normal(5, 2), normal(5), a_model()
    for call, named in [
        (lambda: TopKGaussianMoE(0, 2, 1), "d = 0"),
        (lambda: TopKGaussianMoE(2, 2, 3), "k = 3"),
        (lambda: model.expected_hellinger(model, x, n_grid=1), "n_grid = 1"),
        (lambda: fit_em(x, y, 0, 1), "n_experts = 0"),
        (lambda: fit_em(x, y, 2, 3), "k = 3"),
        (lambda: fit_em(x, y, 2, 1, n_init=0), "n_init = 0"),
        (lambda: fit_em(x, y, 2, 1, max_iter=-1), "max_iter = -1"),
        (lambda: fit_em(x, y, 2, 1, tol=-1), "tol = -1"),
        (lambda: voronoi_loss(model, model, 2, "near"), "kind = 'near'"),
        (lambda: voronoi_loss(model, model, 5), "k = 5"),
        (lambda: min_selected_experts([[0]], 2), "k = 2"),
        (lambda: suggest_k(3, 4, 1), "true_experts = 4"),
        (lambda: suggest_k(3, 2, 3), "true_k = 3"),
        (lambda: TopKMoE(6, 4, 5, 2, selection="best"), "selection = 'best'"),
        (lambda: TopKMoE(6, 4, 5, 6), "k = 6"),
        (lambda: TopKMoE(0, 4, 5, 2), "d_in = 0"),
    ]:
        with pytest.raises(ValueError, match=f"{named} is out of range"):
            call()
    for call, named in [
        (lambda: model.gate(y), r"x of shape \(5,\)"),
        (lambda: model.log_prob(x, x), r"y of shape \(5, 2\)"),
        (lambda: fit_em(x, x, 2, 1), r"y of shape \(5, 2\)"),
        (lambda: fit_em(x, y, 2, 1, init=model), r"beta1 of shape \(4, 2\)"),
        (lambda: voronoi_loss(model, a_model(d=3), 1), "d = 2"),
        (lambda: TopKMoE(6, 4, 5, 2)(x), r"x of shape \(5, 2\)"),
        (lambda: TopKMoE(2, 4, 5, 2)(x.float(), torch.ones(3)), r"mask of shape \(3,\)"),
    ]:
        with pytest.raises(ValueError, match=named):
            call()


def all_selected(x: Tensor, y: Tensor, n_experts: int, k: int, **options: object) -> TopKGaussianMoE:
    """The broken variant of the card: a softmax over all experts, however many were to be selected."""
    return shortly(x, y, n_experts, n_experts, **options)


def shortly(*arguments: object, **options: object) -> TopKGaussianMoE:
    return fit_em(*arguments, **options | {"max_iter": 100})


def test_the_claim_does_not_hold_where_all_experts_are_selected():
    bench = Bench(quick=True)
    broken, real = (
        claim(bench, method=method, seeds=2, sizes=(300, 3000), over_only=True) for method in (all_selected, shortly)
    )
    assert broken.verdict == broken.checks[2].verdict == FAILS
    assert real.checks[2].verdict != FAILS and real.checks[2].observed > 3.5
    assert figure(real) is not None
