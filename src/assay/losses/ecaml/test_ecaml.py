"""Energy confusion against its formula, what the paper's form implies for its gradient, the module and the claim."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from assay.bench.arms import DEFAULT_RECIPE
from assay.bench.evidence import FAILS, Bench
from assay.bench.loop import fit
from assay.bench.recipe import Budget
from assay.bench.tasks import resolve_task
from assay.data import PairBatchSampler
from assay.data._contract import VISITED
from assay.losses import ECAML, binomial_deviance, energy_confusion, n_pair_loss, triplet_margin_loss
from assay.losses._contract import Exempt
from assay.losses.ecaml.claim import CONFUSED, IntoBackbone, claim, effective_rank, split, spread
from assay.losses.ecaml.ecaml import _drawn, apply
from assay.optim._contract import Twice

EXAMPLES = [Exempt(energy_confusion, "one number for the pairs of a batch: there is no loss of a single example")]


def samplers():
    """For the contract of data."""

    def make():
        return PairBatchSampler(torch.arange(VISITED) % 6, classes_per_batch=3, per_class=2, seed=1)

    return {"pair batches": (make, PairBatchSampler.set_epoch)}


EXACT = {"rtol": 0.0, "atol": 1e-12}
BITWISE = {"rtol": 0.0, "atol": 0.0}
LABELS = torch.tensor([2, 0, 1, 0, 2, 0, 1, 2, 3])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def embeddings(n=9, d=4, seed=0):
    return 2 * torch.randn(n, d, generator=seeded(seed), dtype=torch.float64)


def gradient(loss, x, *rest, **options):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss(x, *rest, **options), x)[0]


# --- the formula


def energy_by_hand(x, labels, pairs, reduction):
    """E and the gradient of log E, accumulated pair by pair."""
    n, d = len(x), len(x[0])
    total, count, grad = 0.0, 0, [[0.0] * d for _ in range(n)]
    for i, j in pairs:
        if labels[i] == labels[j]:
            continue
        count += 1
        for k in range(d):
            difference = x[i][k] - x[j][k]
            total += 0.5 * difference * difference
            grad[i][k] += difference
            grad[j][k] -= difference
    if reduction == "paper":
        count = sum(labels[i] != labels[j] for i, j in itertools.combinations(range(n), 2))
    energy = total / count
    return energy, [[value / count / energy for value in row] for row in grad]


def as_the_authors_draw(n, r, seed):
    """Batch of consecutive pairs: for i < n - 2 r, r partners without replacement from i + 2, ..., n - 1."""
    draw = seeded(seed)
    return [(i, i + 2 + j) for i in range(n - 2 * r) for j in torch.randperm(n - i - 2, generator=draw)[:r].tolist()]


@pytest.mark.parametrize("reduction", ["mean", "paper"])
@pytest.mark.parametrize(
    ("labels", "pairs"),
    [
        (torch.arange(8).repeat_interleave(2), as_the_authors_draw(16, 3, 0)),
        (LABELS, [(0, 1), (8, 2), (3, 5), (0, 1), (4, 6)]),  # one of them within a class, one twice
    ],
)
def test_equals_the_formula_for_given_pairs(labels, pairs, reduction):
    x = embeddings(len(labels))
    energy, grad = energy_by_hand(x.tolist(), labels.tolist(), pairs, reduction)
    given = torch.tensor(pairs)
    for form in (given, given.unbind(1), pairs, given.int()):
        options = {"pairs": form, "reduction": reduction}
        found = energy_confusion(x, labels, log=False, **options)
        torch.testing.assert_close(found, torch.tensor(energy, dtype=torch.float64), **EXACT)
        found = energy_confusion(x, labels, **options)
        torch.testing.assert_close(found, torch.tensor(math.log(energy), dtype=torch.float64), **EXACT)
        logarithm = gradient(energy_confusion, x, labels, **options)
        torch.testing.assert_close(logarithm, torch.tensor(grad, dtype=torch.float64), **EXACT)
        plain = gradient(energy_confusion, x, labels, log=False, **options)
        torch.testing.assert_close(plain, energy * torch.tensor(grad, dtype=torch.float64), **EXACT)


def test_all_pairs_are_the_expectation():
    """With partners to spare E is that over two different examples of different classes."""
    x = embeddings()
    apart = [(i, j) for i, j in itertools.permutations(range(len(x)), 2) if LABELS[i] != LABELS[j]]
    expected, _ = energy_by_hand(x.tolist(), LABELS.tolist(), apart, "mean")
    found = energy_confusion(x, LABELS, pairs_per_sample=100, log=False)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("log", [True, False])
def test_has_the_right_gradients(log):
    torch.autograd.gradcheck(
        lambda x: energy_confusion(x, LABELS, log=log, generator=seeded()), embeddings().requires_grad_()
    )


# --- the pairs


@settings(max_examples=60, deadline=None)
@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=12), r=st.integers(1, 6), seed=st.integers(0, 99))
def test_partners_are_distinct_of_another_class_and_as_many_as_asked_for(labels, r, seed):
    labels = torch.tensor(labels)
    first, second = _drawn(labels, r, seeded(seed))
    used = labels[first] != labels[second]
    assert (first[~used] == second[~used]).all()  # the places that nobody is left for
    for i in range(len(labels)):
        partners = second[(first == i) & used].tolist()
        assert len(set(partners)) == len(partners) == min(r, int((labels != labels[i]).sum()))
    torch.testing.assert_close(_drawn(labels, r, seeded(seed)), (first, second), **BITWISE)


def test_all_partners_are_equally_likely():
    from scipy.stats import chisquare

    labels = torch.tensor([0, 0, 1, 2, 2, 2, 3, 1])
    counts, draw = torch.zeros(8, 8), seeded()
    for _ in range(1500):
        first, second = _drawn(labels, 2, draw)
        counts[first, second] += 1
    for i in range(8):
        # Two of m without replacement: the counts of partners spread less than those of independent draws.
        eligible = counts[i][labels != labels[i]]
        m = len(eligible)
        statistic = chisquare(eligible).statistic * (m - 1) / (m - 2)
        assert statistic < 30 and counts[i][labels == labels[i]].sum() == 0  # 6 degrees of freedom at most: p > 4e-5


def test_a_generator_makes_it_reproducible_and_leaves_the_global_one_alone():
    x, state = embeddings(), torch.get_rng_state()
    losses = [energy_confusion(x, LABELS, pairs_per_sample=1, generator=seeded(seed)) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2] and torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    assert energy_confusion(x, LABELS, pairs_per_sample=1) == losses[0]


# --- what follows from the form


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), scale=st.floats(0.01, 100), reduction=st.sampled_from(["mean", "paper"]))
def test_the_gradient_of_the_logarithm_does_not_depend_on_scale_or_place(seed, scale, reduction):
    x = scale * embeddings(seed=seed)

    def grad(x):
        return gradient(energy_confusion, x, LABELS, generator=seeded(seed), reduction=reduction)

    here = grad(x)
    assert abs((here * x).sum().item() - 2) < 1e-10
    torch.testing.assert_close(grad(3 * x), here / 3)
    assert here.sum(0).abs().max() < 1e-10 / scale
    shift = scale * torch.tensor([3.0, -1.0, 0.5, 10.0])
    torch.testing.assert_close(grad(x + shift), here, rtol=1e-9, atol=1e-10 / scale)
    energies = [energy_confusion(y, LABELS, log=False, generator=seeded(seed)) for y in (x, x + shift)]
    torch.testing.assert_close(*energies, rtol=1e-10, atol=0.0)


def test_both_reductions_have_the_same_gradient_of_the_logarithm():
    grads = [
        gradient(energy_confusion, embeddings(), LABELS, generator=seeded(), reduction=word)
        for word in ("mean", "paper")
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("log", [True, False])
def test_collapsed_embeddings_have_a_finite_loss_and_no_gradient(log):
    x = torch.ones(4, 3, dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1])
    found = energy_confusion(x, labels, log=log)
    assert found == (math.log(1e-12) if log else 0.0)
    assert not gradient(energy_confusion, x, labels, log=log).any()
    nearly = x + 1e-9 * embeddings(4, 3)
    assert gradient(energy_confusion, nearly, labels, log=log).isfinite().all()


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("labels", [torch.zeros(3).long(), torch.zeros(1).long(), torch.zeros(0).long()])
def test_without_two_classes_there_is_nothing(log, labels):
    for reduction in ("mean", "paper"):
        x = embeddings(len(labels))
        assert energy_confusion(x, labels, log=log, reduction=reduction) == 0
        assert not gradient(energy_confusion, x, labels, log=log, reduction=reduction).any()


def test_a_step_on_it_brings_classes_together_and_one_on_the_metric_loss_parts_them():
    labels = torch.arange(4).repeat_interleave(2)
    apart = labels[:, None] != labels

    def distance(x):
        return torch.cdist(x, x)[apart].square().mean()

    for seed in range(10):
        x = embeddings(8, seed=seed)
        confused = x - 0.1 * gradient(energy_confusion, x, labels, pairs_per_sample=8)
        parted = x - 0.1 * gradient(binomial_deviance, x, labels)
        assert distance(confused) < distance(x) < distance(parted)


def test_every_precision_and_extreme_inputs():
    for log in (True, False):
        exact = energy_confusion(embeddings(), LABELS, log=log, generator=seeded())
        for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
            x = embeddings().to(dtype).requires_grad_()
            found = energy_confusion(x, LABELS, log=log, generator=seeded())
            found.backward()
            assert found.dtype == x.grad.dtype == dtype and x.grad.isfinite().all()
            torch.testing.assert_close(found.double(), exact, rtol=close, atol=close)
    for extreme in (1e4, 6e4):  # whose squares are no longer numbers of float16
        half = (extreme * embeddings().sign()).half()
        assert energy_confusion(half, LABELS).isfinite()


def test_compiles():
    torch._dynamo.reset()
    labels = LABELS[:4]  # as many partners as there are, so that both calls have the same pairs
    outcomes = []
    for call in (energy_confusion, torch.compile(energy_confusion, backend="aot_eager", fullgraph=True)):
        x = embeddings(4).requires_grad_()
        found = call(x, labels)
        outcomes.append([found.detach(), *torch.autograd.grad(found, x)])
    torch.testing.assert_close(*outcomes)


# --- the module


class FromElsewhere(nn.Module):
    """A loss with weights, as pytorch-metric-learning has them: a proxy for each class."""

    def __init__(self):
        super().__init__()
        self.proxies = nn.Parameter(embeddings(4, 3))

    def forward(self, embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None):
        return torch.cdist(embeddings, self.proxies).gather(1, labels[:, None]).mean()


BASES = [binomial_deviance, n_pair_loss, triplet_margin_loss, FromElsewhere()]
each_base = pytest.mark.parametrize("base", BASES, ids=["binomial", "n-pair", "triplet", "module"])


def layers(base, **options):
    torch.manual_seed(0)
    embedding = nn.Linear(4, 3).double()
    return embedding, ECAML(copy.deepcopy(base), embedding, **options)


@each_base
def test_is_the_sum_of_both_and_only_the_base_loss_reaches_the_features(base):
    embedding, criterion = layers(base, weight=0.4, pairs_per_sample=2)
    features = embeddings().requires_grad_()
    base_loss = base(embedding(features), LABELS)
    by_base = torch.autograd.grad(base_loss, [features, embedding.weight])
    confusion = energy_confusion(embedding(features.detach()), LABELS, pairs_per_sample=2, generator=seeded(3))
    by_confusion = torch.autograd.grad(confusion, embedding.weight)[0]
    loss = criterion(features, LABELS, generator=seeded(3))
    torch.testing.assert_close(loss, base_loss + 0.4 * confusion, **EXACT)
    loss.backward()
    torch.testing.assert_close(features.grad, by_base[0], **BITWISE)
    torch.testing.assert_close(embedding.weight.grad, by_base[1] + 0.4 * by_confusion)
    assert (embedding.weight.grad - by_base[1]).abs().max() > 1e-3
    torch.testing.assert_close(criterion.energy, confusion.detach().exp())


@each_base
def test_weight_zero_is_the_base_loss(base):
    embedding, criterion = layers(base, weight=0)
    outcomes, state = [], torch.get_rng_state()
    for loss in (criterion, lambda x, labels: base(embedding(x), labels)):
        torch.set_rng_state(state)
        features = embeddings().requires_grad_()
        found = loss(features, LABELS)
        outcomes.append([found.detach(), *torch.autograd.grad(found, [features, *embedding.parameters()])])
    torch.testing.assert_close(*outcomes, **BITWISE)
    assert criterion.energy is None


def test_trains_the_bias_not_at_all_and_the_weights_against_the_metric():
    """E does not change with the bias; over training it lowers the distance of classes that the metric raises."""
    ends = []
    for weight in (0.0, 1.0):
        embedding, criterion = layers(binomial_deviance, weight=weight, log=True)
        optimizer = torch.optim.Adam(criterion.parameters(), 0.01)
        for step in range(60):
            optimizer.zero_grad()
            criterion(embeddings(), LABELS, generator=seeded(step)).backward()
            optimizer.step()
        ends.append(energy_confusion(embedding(embeddings()), LABELS, pairs_per_sample=9, log=False).item())
    assert ends[1] < 0.5 * ends[0]
    embedding, _ = layers(binomial_deviance)
    energy_confusion(embedding(embeddings()), LABELS).backward()
    assert embedding.bias.grad.abs().max() < 1e-14 < embedding.weight.grad.abs().max()


def test_is_a_module_with_the_weights_of_its_parts():
    embedding, criterion = layers(FromElsewhere())
    names = ["base_loss.proxies", "embedding.bias", "embedding.weight"]
    assert sorted(name for name, _ in criterion.named_parameters()) == sorted(criterion.state_dict()) == names
    assert criterion.embedding is embedding
    assert "weight=0.13, pairs_per_sample=10, log=True" in repr(criterion)


def test_the_module_without_logarithm_and_under_autocast():
    embedding, criterion = layers(binomial_deviance, log=False)
    features = embeddings()
    confusion = energy_confusion(embedding(features), LABELS, log=False, generator=seeded())
    loss = criterion(features, LABELS, generator=seeded())
    torch.testing.assert_close(loss, binomial_deviance(embedding(features), LABELS) + 0.13 * confusion)
    torch.testing.assert_close(criterion.energy, confusion.detach())
    exact = layers(binomial_deviance)[1](features, LABELS, generator=seeded())
    single = layers(binomial_deviance)[1].float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = single(features.float().requires_grad_(), LABELS, generator=seeded())
    loss.backward()
    torch.testing.assert_close(loss.double(), exact, rtol=0.05, atol=0.05)
    assert single.embedding.weight.grad.isfinite().all()


# --- wrong use


def test_what_does_not_fit_is_named():
    x = embeddings()
    for call, message in [
        (lambda: energy_confusion(x, LABELS[1:]), r"labels.shape = \(8,\) is out of range: \(9,\)"),
        (lambda: energy_confusion(x[0], LABELS), r"embeddings.shape = \(4,\) is out of range: \(N, d\)"),
        (lambda: energy_confusion(x, LABELS, pairs_per_sample=0), "pairs_per_sample = 0 is out of range"),
        (lambda: energy_confusion(x, LABELS, pairs_per_sample=2.5), "pairs_per_sample = 2.5 is out of range"),
        (lambda: energy_confusion(x, LABELS, reduction="sum"), "reduction = 'sum' is out of range: 'mean' or 'paper'"),
        (lambda: energy_confusion(x, LABELS, pairs=torch.zeros(3).long()), r"pairs.shape = \(3,\) is out of range"),
        (lambda: ECAML(binomial_deviance, nn.Linear(4, 3), weight=-1), r"weight = -1 is out of range: \[0, inf\)"),
        (lambda: ECAML(binomial_deviance, nn.Linear(4, 3), weight=math.nan), "weight = nan is out of range"),
        (lambda: ECAML(binomial_deviance, nn.Linear(4, 3), pairs_per_sample=0), "pairs_per_sample = 0"),
        (lambda: apply(DEFAULT_RECIPE, weight=-0.5), "weight = -0.5 is out of range"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    for call, message in [
        (lambda: ECAML(nn.Linear(4, 3), binomial_deviance), "embedding = .* is not a torch.nn.Module"),
        (lambda: ECAML(None, nn.Linear(4, 3)), "base_loss = None cannot be called"),
        (lambda: energy_confusion(x, LABELS, no_such_argument=1), "no_such_argument"),
        (lambda: ECAML(binomial_deviance, nn.Linear(4, 3), no_such_argument=1), "no_such_argument"),
    ]:
        with pytest.raises(TypeError, match=message):
            call()


# --- in the bench


def test_in_the_bench_it_is_the_objective():
    """The weights are those of a loop written by hand, also with an optimizer that asks for a loss twice."""
    task, budget = resolve_task("digits(model='mlp')"), Budget(steps=20, batch_size=60, evaluations=0)

    recipe = replace(DEFAULT_RECIPE, update=lambda run: Twice(run.model.parameters(), 0.1))
    seen = []

    def by_hand(run):
        *backbone, head = run.model.children()
        assert head.out_features == 10

        def loss(model, batch):
            features = nn.Sequential(*backbone)(batch.input)
            draw = seeded(1_000_003 * 7 + len(seen) // 2)
            seen.append(run.step)
            confusion = energy_confusion(head(features.detach()), batch.target, pairs_per_sample=3, generator=draw)
            return run.task.loss(head(features), batch.target) + 0.3 * confusion

        return loss

    ones = fit(apply(recipe, weight=0.3, pairs_per_sample=3), task, budget, 7)
    others = fit(replace(recipe, objective=by_hand), task, budget, 7)
    torch.testing.assert_close(ones.model.state_dict(), others.model.state_dict(), **BITWISE)
    assert seen == [step for step in range(20) for _ in range(2)]
    assert not any(module._forward_pre_hooks for module in ones.model.modules())
    plain = fit(recipe, task, budget, 7).fingerprint
    assert fit(apply(recipe, weight=0.0), task, budget, 7).fingerprint == plain != ones.fingerprint


def test_in_the_bench_it_says_what_it_needs():
    task, budget = resolve_task("digits(model='mlp')"), Budget(steps=1, batch_size=8, evaluations=0)
    with pytest.raises(ValueError, match="ecaml needs a classification task"):
        fit(apply(DEFAULT_RECIPE), replace(task, classes=None), budget)
    with pytest.raises(ValueError, match=r"ecaml needs a model that ends in a torch.nn.Linear with 11 outputs"):
        fit(apply(DEFAULT_RECIPE), replace(task, classes=11), budget)


# --- the claim


@pytest.mark.parametrize("method", [IntoBackbone, ECAML])
def test_the_broken_variant_is_found_out(method):
    """A gradient into the backbone collapses it; that shows in the recall, of unseen and of seen classes."""
    evidence = claim(Bench(), method=method, variants=("N-pair", CONFUSED.format("N-pair")), seeds=3, steps=100)
    kept = evidence.checks[0]
    assert kept.name.startswith("R@1 on unseen classes")
    assert (kept.verdict == FAILS and evidence.verdict == FAILS) == (method is IntoBackbone)


def test_what_the_claim_measures():
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [3.0, 0.0], [3.0, 1.0]])
    # Within: 1, 1, 1, 1. Between: 9, 10, 10, 9 from either side.
    assert spread(x, torch.tensor([0, 0, 1, 1])) == pytest.approx(9.5)
    assert effective_rank(x) == pytest.approx(math.exp(0.25 * math.log(4) + 0.75 * math.log(4 / 3)))
    assert effective_rank(torch.cat([torch.eye(3), -torch.eye(3)])) == pytest.approx(3)
    for seed in range(100, 120, 2):
        halves = [split(seed + k) for k in range(2)]
        assert len(halves[0][1][halves[0][2]].unique()) == 5
        assert torch.equal(halves[0][2], ~halves[1][2])
