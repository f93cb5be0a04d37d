from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from assay._processes import run_on_two
from assay.bench.arms import DEFAULT_RECIPE
from assay.bench.evidence import FAILS, HOLDS, Bench
from assay.bench.loop import evaluate, fit
from assay.bench.recipe import Budget
from assay.bench.tasks import resolve_task
from assay.data import TupleSampler
from assay.data._contract import VISITED
from assay.losses import MadaCos, local_descriptor_triplet, madacos, madacos_logits
from assay.losses._contract import Example, Exempt, Memory
from assay.losses.cfcd.cfcd import apply
from assay.losses.cfcd.claim import CONTINUED, LOCAL, MADACOS, PLAIN, ThroughScale, WrongSign, claim, train_stage
from assay.optim._contract import Twice

B, C, D = 7, 5, 6
ODDS = (1 - 1e-7) / 1e-7
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


# --- the formula, in plain loops


def samplers():
    """For the contract of data."""

    def make():
        labels = torch.arange(VISITED) % 6
        return TupleSampler(labels, labels.roll(3), tuple_size=4, batch_size=8, seed=1)

    return {"tuples": (make, TupleSampler.set_epoch)}


def by_hand(cosine, target, alpha=0.02, rho=1 - 1e-7, min_scale=32.0, mass="median_sample", training=True):
    """Logits, scale, margin and the median example, as the paper and the authors' code have them."""
    cosine, target = cosine.tolist(), target.tolist()
    right = [row[y] for row, y in zip(cosine, target, strict=True)]
    ranked = sorted(range(len(right)), key=lambda i: right[i])
    middle = ranked[(len(ranked) - 1) // 2]
    m50 = right[middle]
    scale = max(min_scale, math.log(rho / (1 - rho) * (1 - alpha) / alpha) / max(1 - m50, 1e-6))
    sums = [
        sum(math.exp(scale * c) for j, c in enumerate(row) if j != y) for row, y in zip(cosine, target, strict=True)
    ]
    b = {"median_sample": sums[middle], "mean": sum(sums) / len(sums), "median": sorted(sums)[(len(sums) - 1) // 2]}
    margin = max(0.0, m50 - math.log(b[mass] * alpha / (1 - alpha)) / scale) if training else 0.0
    logits = [
        [scale * (c - margin if j == y else c) for j, c in enumerate(row)]
        for row, y in zip(cosine, target, strict=True)
    ]
    return torch.tensor(logits, dtype=torch.float64), scale, margin, middle


def cosines(seed=0, right=0.6, spread=0.15, b=B):
    """Cosines (b, C) where the true class has about ``right``; float64."""
    torch.manual_seed(seed)
    target = torch.randint(C, (b,))
    cosine = torch.empty(b, C, dtype=torch.float64).uniform_(-0.4, 0.3)
    own = (right + spread * torch.randn(b, dtype=torch.float64)).clamp(-0.99, 0.99)
    return cosine.scatter(1, target[:, None], own[:, None]), target


CASES = {
    "scale and margin active": ({"right": 0.6}, {}),
    "an even batch has a lower median": ({"right": 0.6, "b": 8}, {}),
    "floor of the scale": ({"right": 0.32, "spread": 0.02}, {}),
    "floor of the margin": ({"right": -0.5, "spread": 0.05}, {}),
    "mass of the mean": ({"right": 0.6}, {"mass": "mean"}),
    "mass of the median": ({"right": 0.6, "b": 8}, {"mass": "median"}),
    "another alpha, rho and floor": ({"right": 0.3}, {"alpha": 0.1, "rho": 0.999, "min_scale": 5.0}),
    "evaluation": ({"right": 0.6}, {"training": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_the_formula(case):
    drawn, options = CASES[case]
    cosine, target = cosines(**drawn)
    expected, scale, margin, _ = by_hand(cosine, target, **options)
    logits = madacos_logits(cosine.requires_grad_(), target, **options)
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert (scale > options.get("min_scale", 32.0)) == ("floor of the" not in case)
    assert (margin > 0) == (case not in ("floor of the margin", "evaluation"))
    upstream = torch.randn_like(logits)
    (gradient,) = torch.autograd.grad(logits, cosine, upstream, retain_graph=True)
    torch.testing.assert_close(gradient, scale * upstream, **CLOSE)  # scale and margin are constants
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, target), cosine)
    p = F.softmax(expected, 1)
    torch.testing.assert_close(gradient, scale * (p - F.one_hot(target, C)) / len(target), **CLOSE)


def linear_example():
    return torch.randn(6, D), torch.tensor([0, 4, 2, 2, 1, 3])


def weight():
    return torch.randn(C, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def cross_entropies(input, target, weight, **options):
    cosine = [[float(x @ w / (x.norm() * w.norm())) for w in weight] for x in input]
    logits = by_hand(torch.tensor(cosine, dtype=torch.float64), target, **options)[0].tolist()
    return [math.log(sum(math.exp(z) for z in row)) - row[y] for row, y in zip(logits, target.tolist(), strict=True)]


# Around this input scale and margin stand at their floors: numerical differentiation would see them move elsewhere.
FLOORED = {"weight": weight(), "alpha": 0.5, "rho": 0.6, "min_scale": 2.0}


def head_step(module, k, features):
    labels = (torch.arange(6) + k) % C
    return F.cross_entropy(module(features, labels), labels)


class Named(Example):
    def __str__(self):
        return "madacos(input, target, weight)"


EXAMPLES = [
    Named(madacos, linear_example, cross_entropies, FLOORED, by_example=False),
    Exempt(local_descriptor_triplet, "its losses are of matches and negatives, not of examples with targets"),
    Memory(
        lambda **options: MadaCos(D, C, **options).double(),
        head_step,
        lambda: torch.randn(6, D, dtype=torch.float64),
        "MadaCos",
    ),
]


@pytest.mark.parametrize("mass", ["median_sample", "mean", "median"])
def test_the_head_is_the_functional_form(mass):
    head = MadaCos(D, C, mass=mass, alpha=0.1).double()
    features, labels = torch.randn(B, D, dtype=torch.float64), torch.arange(B) % C
    features = (features + 9 * head.weight[labels]).detach()  # so that the margin is active
    loss = madacos(features, labels, head.weight, alpha=0.1, mass=mass)
    logits = head(features, labels)
    torch.testing.assert_close(F.cross_entropy(logits, labels), loss)
    _, scale, margin, _ = by_hand(head.cosine(features), labels, alpha=0.1, mass=mass)
    assert head.last_scale.item() == pytest.approx(scale, rel=1e-9)
    assert head.last_margin.item() == pytest.approx(margin, rel=1e-9) and margin > 0
    torch.testing.assert_close(loss, F.cross_entropy(by_hand(head.cosine(features), labels, 0.1, mass=mass)[0], labels))


# --- what must hold


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), right=st.floats(0.6, 0.98), alpha=st.floats(0.001, 0.3), b=st.integers(1, 12))
def test_the_median_example_keeps_the_probability_alpha_and_would_have_rho_at_cosine_one(seed, right, alpha, b):
    cosine, target = cosines(seed, right, 0.01, b)
    _, scale, margin, middle = by_hand(cosine, target, alpha=alpha)
    assert scale > 32 and margin > 0
    p = F.softmax(madacos_logits(cosine, target, alpha=alpha), 1)[middle, target[middle]]
    assert p.item() == pytest.approx(alpha, abs=1e-9)
    b_star = sum(math.exp(scale * c) for j, c in enumerate(cosine[middle].tolist()) if j != target[middle])
    at_one = math.exp(scale * (1 - margin))
    assert at_one / (at_one + b_star) == pytest.approx(1 - 1e-7, abs=1e-9)


@given(first=st.floats(-1, 1), second=st.floats(-1, 1), low=st.floats(1e-6, 0.999))
def test_scale_grows_with_the_median_and_neither_leaves_its_bound(first, second, low):
    found = []
    for m50 in sorted((first, second)):
        head = MadaCos(D, C, alpha=low).double()
        head.logits(torch.full((3, C), m50, dtype=torch.float64), torch.tensor([0, 1, 1]))
        found.append(head.last_scale.item())
        assert head.last_margin >= 0
    assert 32 <= found[0] <= found[1]


def test_classes_and_examples_may_be_renamed():
    cosine, target = cosines(b=9)
    logits, classes, order = madacos_logits(cosine, target), torch.randperm(C), torch.randperm(9)
    torch.testing.assert_close(madacos_logits(cosine[:, classes], classes.argsort()[target]), logits[:, classes])
    torch.testing.assert_close(madacos_logits(cosine[order], target[order]), logits[order])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_saturated_batch_stays_finite(dtype):
    for right in (1.0, 1 - 1e-7, 1 + 1e-6):  # rounding may pass 1
        cosine = torch.full((B, C), -0.2, dtype=dtype)
        cosine[:, 1] = right
        logits = madacos_logits(cosine.requires_grad_(), torch.ones(B, dtype=torch.long))
        F.cross_entropy(logits, torch.ones(B, dtype=torch.long)).backward()
        assert logits.isfinite().all() and logits.dtype == torch.promote_types(dtype, torch.float32)
        assert cosine.grad.isfinite().all() or dtype == torch.float16  # where the gradient itself is above 65,504
    loss = madacos(torch.eye(C, dtype=dtype), torch.arange(C), torch.eye(C, dtype=dtype))
    assert loss.isfinite() and loss.dtype == dtype


def test_features_of_zeros_give_finite_gradients():
    features = torch.zeros(3, D, requires_grad=True)
    MadaCos(D, C)(features, torch.arange(3)).sum().backward()
    assert features.grad.abs().max() < 1e4


def test_lengths_of_features_and_weights_mean_nothing():
    head, features, labels = MadaCos(D, C).double(), torch.randn(B, D, dtype=torch.float64), torch.arange(B) % C
    expected = head(features, labels)
    head.weight.data *= torch.rand(C, 1, dtype=torch.float64) * 1e-15
    torch.testing.assert_close(
        head(features * torch.logspace(-20, 20, B, dtype=torch.float64)[:, None], labels), expected
    )


def test_autocast_does_not_touch_the_cosines():
    head, features, labels = MadaCos(D, C), torch.randn(B, D), torch.arange(B) % C
    expected = head(features, labels)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(features, labels)
    assert torch.equal(logits, expected) and logits.dtype == torch.float32


def test_compiled_it_is_the_same():
    torch._dynamo.reset()
    cosine, target = cosines()
    compiled = torch.compile(madacos_logits, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(cosine, target), madacos_logits(cosine, target), **CLOSE)


# --- evaluation


def test_evaluation_has_the_last_scale_of_training_no_margin_and_no_use_for_labels():
    head = MadaCos(D, C).double()
    features, labels = torch.randn(B, D, dtype=torch.float64), torch.arange(B) % C
    assert torch.equal(head.eval()(features), 32 * head.cosine(features))
    head.train()(features + 9 * head.weight[labels], labels)
    scale = head.last_scale.item()
    assert scale > 32 and head.last_margin > 0
    head.eval()
    for any_labels in (None, labels, labels.flip(0)):
        torch.testing.assert_close(head(features, any_labels), scale * head.cosine(features), **CLOSE)
    assert head.last_scale == scale
    cosine = head.cosine(features)
    torch.testing.assert_close(madacos_logits(cosine, training=False, scale=scale), scale * cosine, **CLOSE)


def test_weights_start_in_the_range_of_the_authors():
    weight = MadaCos(16, 500).weight
    assert 0.24 < weight.max() <= 0.25 and -0.25 <= weight.min() < -0.24


# --- two processes


def test_the_median_and_its_mass_are_those_of_all_processes(tmp_path):
    masses = ("median_sample", "mean", "median")
    cosine, target = cosines(seed=5, spread=0.3, b=11)
    whole = {mass: by_hand(cosine, target, mass=mass) for mass in masses}
    own = slice(0, 4)  # unequal batches
    for mass, (expected, scale, margin, _) in whole.items():
        assert margin > 0 and scale > 32
        assert not torch.allclose(by_hand(cosine[own], target[own], mass=mass)[0], expected[own], atol=1e-2)
    torch.save((cosine, target, whole), tmp_path / "expected")
    run_on_two(
        f"""
from assay.losses import MadaCos, madacos_logits
cosine, target, whole = torch.load({str(tmp_path / "expected")!r})
own = slice(0, 4) if rank == 0 else slice(4, 11)
for mass, (expected, scale, margin, _) in whole.items():
    c = cosine[own].clone().requires_grad_()
    logits = madacos_logits(c, target[own], mass=mass)
    torch.testing.assert_close(logits, expected[own], rtol=1e-9, atol=1e-9)
    (gradient,) = torch.autograd.grad(logits.sum(), c)  # no communication: scale and margin are constants
    torch.testing.assert_close(gradient, torch.full_like(c, scale), rtol=1e-9, atol=1e-9)
    head = MadaCos(6, 5, mass=mass).double()
    head.logits(cosine[own], target[own])
    torch.testing.assert_close(head.last_margin, torch.tensor(margin, dtype=torch.float64), rtol=1e-9, atol=1e-9)
""",
        tmp_path,
    )


# --- wrong use


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0}, r"alpha = 0 is out of range: \(0, 1\)"),
        ({"alpha": 1.0}, "alpha = 1.0 is out of range"),
        ({"alpha": math.nan}, "alpha = nan is out of range"),
        ({"rho": 1}, "rho = 1 is out of range"),
        ({"min_scale": 0}, "min_scale = 0 is out of range: greater than 0"),
        ({"min_scale": math.inf}, "min_scale = inf is out of range"),
        ({"mass": "max"}, "mass = 'max' is out of range: 'median_sample', 'mean', 'median'"),
    ],
)
def test_arguments_out_of_range_are_named(options, message):
    cosine, target = cosines()
    for call in (
        lambda: MadaCos(D, C, **options),
        lambda: madacos_logits(cosine, target, **options),
        lambda: madacos(cosine, target, torch.eye(C).double(), **options),
        lambda: MadaCos(D, C, **options) if "mass" in options else apply(DEFAULT_RECIPE, **options),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_what_does_not_fit_is_named():
    head, features, labels = MadaCos(D, C), torch.randn(B, D), torch.arange(B) % C
    for call, message in [
        (lambda: MadaCos(0, C), "in_features = 0 is out of range: an integer >= 1"),
        (lambda: MadaCos(D, 1), "num_classes = 1 is out of range: an integer >= 2"),
        (lambda: head(features), "labels = None is out of range"),
        (lambda: head(features, labels[1:]), r"labels.shape = \(6,\) is out of range: \(7,\)"),
        (lambda: head(features[:0], labels[:0]), r"labels.shape = \(0,\) is out of range"),
        (lambda: head(features[:, 1:], labels), r"features.shape = \(7, 5\) is out of range: \(b, 6\)"),
        (lambda: madacos_logits(features), "target = None is out of range"),
        (lambda: madacos_logits(features, labels, scale=32.0), "scale = 32.0 is out of range: None in training"),
        (lambda: madacos_logits(features, training=False), "target = None is out of range"),
        (lambda: madacos_logits(features[0], labels), r"cosine.shape = \(6,\) is out of range"),
        (lambda: madacos_logits(features[:, :1], labels), r"cosine.shape = \(7, 1\) is out of range"),
        (lambda: madacos(features, labels, torch.eye(3)), r"input.shape = \(7, 6\) with weight of shape \(3, 3\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(RuntimeError, match="index 6 is out of bounds"):
        madacos_logits(features, labels + D)


# --- in the bench


def test_in_the_bench_it_is_the_head_and_the_objective():
    """The weights are those of a loop written by hand, also with an optimizer that asks for a loss twice."""
    task, budget = resolve_task("digits(model='mlp')"), Budget(steps=25, batch_size=60, evaluations=0)

    recipe = replace(DEFAULT_RECIPE, update=lambda run: Twice(run.model.parameters(), 0.05))

    def by_hand(run):
        network = task.model()
        network[-1] = MadaCos(64, 10, alpha=0.1, rho=0.999, min_scale=8)
        network.forward = lambda x, labels=None: network[-1](network[:-1](x), labels)
        return network

    def objective(run):
        return lambda model, batch: F.cross_entropy(model(batch.input, batch.target), batch.target)

    ours = fit(apply(recipe, alpha=0.1, rho=0.999, min_scale=8), task, budget, 7).model
    theirs = fit(replace(recipe, model=by_hand, objective=objective), task, budget, 7).model
    assert ours[-1].last_scale >= 8 and ours[-1].last_margin > 0
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    (x, y), loss = task.validation.tensors, evaluate(replace(task, metric=task.loss), ours, task.validation)
    with torch.no_grad():
        logits = ours[-1].last_scale * ours[-1].cosine(ours[:-1].eval()(x))
    assert loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)


def test_in_the_bench_it_refuses_what_it_cannot_change():
    task, budget = resolve_task("digits(model='mlp')"), Budget(steps=2, batch_size=60, evaluations=0)
    for other, message in [
        (replace(task, classes=None), "cfcd needs a classification task"),
        (replace(task, model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 12))), "this one has 12 outputs"),
        (replace(task, model=nn.Flatten), "this one has no nn.Linear at all"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(apply(DEFAULT_RECIPE), other, budget)
    covered = replace(apply(DEFAULT_RECIPE), model=DEFAULT_RECIPE.model)
    with pytest.raises(ValueError, match="cfcd needs its own head"):
        fit(covered, task, budget)


def test_in_the_bench_a_bare_linear_model_and_a_transformer_get_the_head_too():
    task, budget = resolve_task("digits(model='vit')"), Budget(steps=2, batch_size=60, evaluations=1)
    assert isinstance(fit(apply(DEFAULT_RECIPE), task, budget).model.head, MadaCos)
    table = resolve_task("tabular")
    linear = replace(table, model=lambda: nn.Linear(30, 2))
    assert isinstance(fit(apply(DEFAULT_RECIPE), linear, budget).model, MadaCos)


# --- the claim


@pytest.mark.parametrize(
    ("method", "found_by"), [(WrongSign, "median example"), (ThroughScale, "gradient at the cosines"), (MadaCos, None)]
)
def test_broken_variants_are_found_out(method, found_by):
    epochs = 2 if method is WrongSign else 10  # by then the scale has left its floor
    evidence = claim(Bench(), method=method, heads=(PLAIN, MADACOS), stages=(), seeds=1, epochs=epochs)
    mechanism = [check for check in evidence.checks if check.name.startswith(("median example", "gradient"))]
    assert len(mechanism) == 2
    for check in mechanism:
        assert check.verdict == (FAILS if found_by and check.name.startswith(found_by) else HOLDS)
    assert evidence.verdict == FAILS or not found_by


def test_the_stages_of_the_claim_differ_by_the_local_term_alone():
    def nothing(descriptors, attention):
        return 0 * descriptors.sum()

    run = functools.partial(train_stage, seed=0, epochs=2, method=MadaCos)
    continued, without, local = (
        run(variant, local=term)
        for variant, term in ((CONTINUED, nothing), (LOCAL, nothing), (LOCAL, local_descriptor_triplet))
    )
    assert continued == without != local
