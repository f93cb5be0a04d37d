"""The scores against formulas written out in numpy, the paper's identities, averages, forgetting and the claim."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from assay.bench.arms import DEFAULT_RECIPE
from assay.bench.evidence import Bench
from assay.bench.loop import fit
from assay.bench.recipe import Budget
from assay.bench.tasks import resolve_task
from assay.data import (
    ForgettingTracker,
    PruningSampler,
    average_scores,
    el2n_scores,
    grand_scores,
    keep_by_score,
    margin_scores,
)
from assay.data._contract import VISITED
from assay.data.grand_el2n.claim import claim, figure
from assay.data.grand_el2n.grand_el2n import apply
from assay.optim._contract import Twice

METHODS = ("vmap", "loop", "ghost")


def scorers():
    """For the family's contract."""
    grand = {f"grand {method}": functools.partial(grand_scores, method=method) for method in METHODS}
    margins = {f"margin {kind}": functools.partial(margin_scores, kind=kind) for kind in ("max", "sum")}
    return {"el2n": el2n_scores, "el1n": functools.partial(el2n_scores, order=1), **margins, **grand}


def trackers():
    """For the family's contract."""

    def feed(tracker, step):
        tracker.update(torch.arange(8), torch.arange(8) * (step + 3) % 5 < 2)

    return {"forgetting": (lambda: ForgettingTracker(8), feed, ForgettingTracker.scores)}


def samplers():
    """For the family's contract."""

    def make():
        return PruningSampler(torch.arange(VISITED) / 10, epochs=3, keep=0.5, schedule="linear", seed=1)

    return {"pruning": (make, PruningSampler.set_epoch)}


# --- the scores, written out ------------------------------------------------------------------------------------------


class TwoLayers(nn.Module):
    """z = V tanh(W x + b) + c."""

    def __init__(self, inputs=5, hidden=7, classes=4):
        super().__init__()
        self.hidden, self.head = nn.Linear(inputs, hidden), nn.Linear(hidden, classes)

    def forward(self, x):
        return self.head(torch.tanh(self.hidden(x)))


@pytest.fixture
def case():
    torch.manual_seed(0)
    model = TwoLayers().double()
    return model, TensorDataset(torch.randn(23, 5, dtype=torch.double), torch.randint(4, (23,)))


def by_hand(model, dataset):
    """Probabilities, one-hot targets and every parameter's per-example gradient, in plain numpy."""
    W, b, V, c = (p.detach().numpy() for p in model.parameters())
    x, y = dataset.tensors[0].numpy(), dataset.tensors[1].numpy()
    h = np.tanh(x @ W.T + b)
    z = h @ V.T + c
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    t = (y[:, None] == np.arange(p.shape[1])).astype(float)
    e = p - t
    back = (e @ V) * (1 - h**2)
    grads = {
        "hidden.weight": np.einsum("ni,nj->nij", back, x),
        "hidden.bias": back,
        "head.weight": np.einsum("ni,nj->nij", e, h),
        "head.bias": e,
    }
    return p, t, h, grads


def close(scores, expected, tolerance=1e-9):
    np.testing.assert_allclose(scores.numpy(), expected, rtol=tolerance, atol=1e-12)


def test_el2n_and_its_first_order(case):
    p, t, _, _ = by_hand(*case)
    close(el2n_scores(*case), np.sqrt(((p - t) ** 2).sum(1)))
    close(el2n_scores(*case, order=1), np.abs(p - t).sum(1))
    close(el2n_scores(*case, num_classes=4), np.sqrt(((p - t) ** 2).sum(1)))


def test_margins(case):
    p, t, _, _ = by_hand(*case)
    wrong = p[t == 0].reshape(len(p), -1) - p[t == 1].reshape(len(p), 1)
    close(margin_scores(*case), wrong.max(1))
    close(margin_scores(*case, kind="sum"), wrong.sum(1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("params", "names"),
    [
        ("all", ("hidden.weight", "hidden.bias", "head.weight", "head.bias")),
        ("last_layer", ("head.weight", "head.bias")),
        (["hidden.weight", "head.bias"], ("hidden.weight", "head.bias")),
        (["hidden"], ("hidden.weight", "hidden.bias")),
    ],
)
def test_grand_over_parameter_sets(case, method, params, names):
    grads = by_hand(*case)[3]
    expected = np.sqrt(sum((grads[name].reshape(23, -1) ** 2).sum(1) for name in names))
    close(grand_scores(*case, params=params, method=method), expected)


def test_ends_of_the_range():
    classes = 5
    confident = 800 * torch.eye(classes, dtype=torch.double)[[2, 2]]
    logits = torch.cat([confident, torch.zeros(1, classes, dtype=torch.double)])
    scores = el2n_scores(nn.Identity(), TensorDataset(logits, torch.tensor([2, 1, 0])))
    close(scores, [0, math.sqrt(2), math.sqrt(1 - 1 / classes)], 1e-15)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.floats(0.1, 300))
def test_el2n_lies_between_0_and_root_2(seed, classes, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(20, classes, generator=generator, dtype=torch.double)
    scores = el2n_scores(
        nn.Identity(), TensorDataset(logits, torch.randint(classes, (20,), generator=generator)), batch_size=7
    )
    assert (scores >= 0).all() and (scores <= math.sqrt(2) + 1e-12).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bias", [True, False])
def test_last_layer_grand_is_el2n_times_the_features(method, bias):
    torch.manual_seed(1)
    body = nn.Sequential(nn.Linear(5, 6), nn.ReLU()).double()
    model = nn.Sequential(body, nn.Linear(6, 3, bias=bias).double())
    data = TensorDataset(torch.randn(20, 5, dtype=torch.double), torch.randint(3, (20,)))
    features = body(data.tensors[0]).detach().square().sum(1)
    expected = el2n_scores(model, data) * (features + bias).sqrt()
    close(grand_scores(model, data, params="last_layer", method=method), expected.numpy(), 1e-12)


def test_targets_may_be_probabilities(case):
    model, data = case
    rows = TensorDataset(data.tensors[0], F.one_hot(data.tensors[1], 4).double())
    assert torch.equal(el2n_scores(model, rows), el2n_scores(model, data))
    close(grand_scores(model, rows), grand_scores(model, data).numpy(), 1e-12)
    with pytest.raises(ValueError, match="classes as targets"):
        margin_scores(model, rows)


def test_half_precision_is_scored_in_single():
    logits = torch.randn(6, 3, dtype=torch.bfloat16)
    scores = el2n_scores(nn.Identity(), TensorDataset(logits, torch.zeros(6, dtype=torch.long)))
    expected = el2n_scores(nn.Identity(), TensorDataset(logits.float(), torch.zeros(6, dtype=torch.long)))
    assert scores.dtype == torch.float32 and torch.equal(scores, expected)


@pytest.mark.parametrize("method", METHODS)
def test_rows_and_outputs_in_the_manner_of_hugging_face(case, method):
    model, data = case

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, values, shift):
            return SimpleNamespace(logits=self.inner(values - shift[:, None]))

    rows = [{"values": x + 2, "shift": 2.0, "labels": int(y)} for x, y in data]
    close(el2n_scores(Wrapped(), rows), el2n_scores(model, data).numpy())
    close(grand_scores(Wrapped(), rows, method=method), grand_scores(model, data).numpy())


@pytest.mark.parametrize("method", METHODS)
def test_frozen_parameters_count_only_when_named(case, method):
    model, data = case
    expected = grand_scores(model, data, params=["head"], method=method)
    model.hidden.requires_grad_(False)
    close(grand_scores(model, data, method=method), expected.numpy())
    grads = by_hand(model, data)[3]
    close(
        grand_scores(model, data, params=["hidden.bias"], method=method), np.linalg.norm(grads["hidden.bias"], axis=1)
    )


@pytest.mark.parametrize("method", METHODS)
def test_an_unused_layer_adds_nothing(case, method):
    model, data = case
    expected = grand_scores(model, data, method=method)
    model.unused = nn.Linear(3, 3).double()
    close(grand_scores(model, data, method=method), expected.numpy(), 1e-12)
    close(grand_scores(model, data, params=["unused"], method=method), np.zeros(23))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_fn_sees_one_example_at_a_time(case, method, reduction):
    model, data = case
    squares = TensorDataset(data.tensors[0], torch.randn(23, 4, dtype=torch.double))

    def loss_fn(output, target):
        assert output.shape == target.shape == (1, 4)
        loss = F.mse_loss(output, target, reduction="none").sum(1)
        return loss if reduction == "none" else getattr(loss, reduction)()

    error = 2 * (model(squares.tensors[0]) - squares.tensors[1]).detach()
    got = grand_scores(model, squares, loss_fn=loss_fn, params=["head.bias"], method=method)
    close(got, error.norm(dim=1).numpy())


# --- averages, forgetting ---------------------------------------------------------------------------------------------


def train(model, data, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for x, y in list(DataLoader(data, batch_size=8, shuffle=True))[:steps]:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_average_is_the_mean_of_norms_over_runs(case):
    data = case[1]
    seeds = [5, 3, 11]
    each = []
    for seed in seeds:
        torch.manual_seed(seed)
        model = TwoLayers().double()
        train(model, data)
        p, t, _, _ = by_hand(model, data)
        each.append(np.sqrt(((p - t) ** 2).sum(1)))
    mean, std = average_scores(lambda: TwoLayers().double(), train, data, seeds=seeds, return_std=True)
    close(mean, np.mean(each, 0))
    close(std, np.std(each, 0, ddof=1))
    shuffled = average_scores(lambda: TwoLayers().double(), train, data, seeds=[11, 5, 3])
    close(shuffled, mean.numpy(), 1e-14)


def test_average_by_any_score_and_runs(case):
    model, data = case
    untrained = lambda make, **options: average_scores(make, lambda model, data: None, data, **options)  # noqa: E731
    for score, scorer in (("el2n", el2n_scores), ("grand", grand_scores), ("margin", margin_scores)):
        close(untrained(lambda: model, score=score, runs=2), scorer(model, data).numpy())
    first_order = functools.partial(el2n_scores, order=1)
    close(untrained(lambda: model, score=first_order, runs=1), el2n_scores(model, data, order=1).numpy())
    built = []
    average_scores(lambda: built.append(torch.initial_seed()) or model, lambda m, d: None, data)
    assert built == list(range(10))


def test_average_puts_the_random_state_back_and_scores_what_training_returns(case):
    model, data = case
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    got = average_scores(lambda: TwoLayers().double(), lambda m, d: model, data, runs=2)
    assert torch.equal(torch.rand(3), expected)
    close(got, el2n_scores(model, data).numpy())


def visits_by_hand(visits, n):
    """Forgetting, one visit after the other."""
    counts, previous, ever = [0.0] * n, [False] * n, [False] * n
    for indices, correct in visits:
        for i, right in zip(indices, correct, strict=True):
            counts[i] += previous[i] and not right
            previous[i] = right
            ever[i] = ever[i] or right
    return [count if known else math.inf for count, known in zip(counts, ever, strict=True)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=9), max_size=8))
def test_forgetting_on_any_sequence_of_visits(batches):
    visits = [([i for i, _ in batch], [right for _, right in batch]) for batch in batches]
    tracker = ForgettingTracker(6)
    for indices, correct in visits:
        tracker.update(torch.tensor(indices, dtype=torch.long), torch.tensor(correct, dtype=torch.bool))
    assert tracker.scores().tolist() == visits_by_hand(visits, 6)


def test_forgetting_takes_lists_and_arrays_and_refuses_the_rest():
    tracker = ForgettingTracker(3)
    tracker.update([0, 1], [1, 0])
    tracker.update(np.array([0, 1]), np.array([0.0, 1.0]))
    assert tracker.scores().tolist() == [1.0, 0.0, math.inf]
    for indices, correct in (([3], [1]), ([-1], [1]), ([0.0], [1]), ([True], [1]), ([0, 1], [1]), ([[0]], [[1]])):
        with pytest.raises(ValueError, match="indices"):
            tracker.update(indices, correct)
    with pytest.raises(ValueError, match="num_samples = 0"):
        ForgettingTracker(0)
    with pytest.raises(RuntimeError, match="size mismatch"):
        ForgettingTracker(4).load_state_dict(tracker.state_dict())


# --- on the bench -----------------------------------------------------------------------------------------------------


def test_applied_it_trains_on_what_the_proxies_score_highest():
    small, task = Budget(steps=20, batch_size=32, evaluations=0), resolve_task("digits(model='mlp')")
    seen = []

    def watch(recipe):
        return replace(recipe, model=lambda run: seen.append(run) or recipe.model(run))

    fit(watch(apply(DEFAULT_RECIPE, keep=0.3, runs=3, fraction=0.25)), task, small, seed=3)
    (run,) = seen
    proxies = [fit(DEFAULT_RECIPE, task, small.scaled(0.25), seed=3 + 1_000_003 * k).model for k in (1, 2, 3)]
    mean = torch.stack([el2n_scores(model, task.train) for model in proxies]).mean(0)
    assert run.data.indices == keep_by_score(mean, 0.3).tolist() and run.size == 150


def test_applied_it_counts_what_the_proxies_forget():
    """Each visit's answer is that of the step's only first pass, also where an optimizer asks twice."""
    small, task, seen = Budget(steps=40, batch_size=32, evaluations=0), resolve_task("digits(model='mlp')"), []

    answers = []

    def by_hand(run):
        trackers.append(ForgettingTracker(run.size))
        noted = []

        def loss(model, batch):
            logits = model(batch.input)
            if run.step not in noted:
                noted.append(run.step)
                trackers[-1].update(batch.index, logits.argmax(1) == batch.target)
                answers.append(len(batch.index))
            return F.cross_entropy(logits, batch.target)

        return loss

    recipe, trackers = replace(DEFAULT_RECIPE, update=lambda run: Twice(run.model.parameters(), 0.1)), []
    watching = apply(recipe, keep=0.3, runs=2, fraction=0.9, score="forgetting")
    fit(replace(watching, model=lambda run: seen.append(run) or recipe.model(run)), task, small, seed=3)
    for k in (1, 2):
        fit(replace(recipe, objective=by_hand), task, small.scaled(0.9), seed=3 + 1_000_003 * k)
    mean = torch.stack([tracker.scores() for tracker in trackers]).mean(0)
    assert sum(answers) == 2 * 36 * 32 and mean.isinf().any() and mean.isfinite().any()
    assert seen[-1].data.indices == keep_by_score(mean, 0.3).tolist()


def test_applied_and_keeping_all_it_is_the_plain_run():
    small, task = Budget(steps=20, batch_size=32, evaluations=0), resolve_task("digits(model='mlp')")
    plain = fit(DEFAULT_RECIPE, task, small, seed=1)
    pruned = fit(apply(DEFAULT_RECIPE, keep=1, runs=1), task, small, seed=1)
    assert pruned.fingerprint == plain.fingerprint and pruned.steps == plain.steps


def test_applied_it_survives_proxies_that_diverge():
    task = resolve_task("digits(model='mlp')")
    wild = replace(DEFAULT_RECIPE, update=lambda run: torch.optim.SGD(run.model.parameters(), lr=1e30))
    assert fit(apply(wild, runs=2), task, Budget(steps=40, batch_size=32), seed=1).status == "diverged"


def test_applied_it_refuses_a_regression_and_options_out_of_range():
    with pytest.raises(ValueError, match="needs a classification task"):
        fit(apply(DEFAULT_RECIPE), resolve_task("tabular(dataset='diabetes')"), Budget(steps=10))
    for name, value in (("keep", 0), ("keep", 1.1), ("score", "best"), ("runs", 0), ("fraction", 0)):
        with pytest.raises(ValueError, match=f"{name} = {value!r}"):
            apply(DEFAULT_RECIPE, **{name: value})


# --- arguments out of range -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, d: el2n_scores(m, d, order=3), r"order = 3 .* 1 or 2"),
        (lambda m, d: el2n_scores(m, d, num_classes=1), "num_classes = 1"),
        (lambda m, d: el2n_scores(m, d, num_classes=5), "num_classes = 5, but the model returns 4"),
        (lambda m, d: margin_scores(m, d, kind="mean"), "kind = 'mean'"),
        (lambda m, d: grand_scores(m, d, method="fast"), "method = 'fast'"),
        (lambda m, d: grand_scores(m, d, params="head"), "params = 'head' .* a list of names"),
        (lambda m, d: grand_scores(m, d, params=["tail"]), "names 'tail', .* it has hidden.weight"),
        (lambda m, d: grand_scores(m, d, params=[]), "leaves no parameter"),
        (lambda m, d: grand_scores(nn.Identity(), d), "leaves no parameter"),
        (lambda m, d: grand_scores(nn.Identity(), d, params="last_layer"), "leaves no parameter"),
        (lambda m, d: el2n_scores(m, [(x, int(y) + 2) for x, y in d]), "targets reach from 2 to 5"),
        (lambda m, d: el2n_scores(m, [(x, -1) for x, _ in d]), "targets reach from -1"),
        (lambda m, d: el2n_scores(m, [(x, 0.5) for x, _ in d]), r"targets \(23,\) of torch.float64"),
        (lambda m, d: el2n_scores(nn.Flatten(0), d), r"returns \(115,\): logits"),
        (lambda m, d: average_scores(lambda: m, print, d, score="el3n"), "score = 'el3n'"),
        (lambda m, d: average_scores(lambda: m, print, d, runs=0), "runs = 0"),
        (lambda m, d: average_scores(lambda: m, print, d, seeds=[]), "0 runs .* at least 1"),
        (lambda m, d: average_scores(lambda: m, print, d, runs=1, return_std=True), "1 runs .* at least 2"),
    ],
)
def test_out_of_range_is_named(case, call, message):
    with pytest.raises(ValueError, match=message):
        call(*case)


# --- the claim --------------------------------------------------------------------------------------------------------


def easiest_first(model, dataset):
    """The broken variant: the sort turned round, so that the easiest are kept."""
    return -el2n_scores(model, dataset)


short = functools.partial(claim, Bench(), steps=300, seeds=3, parts=["prune", "noise"])


def test_the_claim_refutes_a_turned_score():
    evidence = short(score=easiest_first)
    assert evidence.verdict == "does not hold"
    assert {check.verdict for check in evidence.checks} == {"does not hold"}


def test_the_claim_does_not_refute_el2n():
    evidence = short()
    assert "does not hold" not in [check.verdict for check in evidence.checks]
    assert len(figure(evidence).axes) == 1 and "GraNd at initialization" in evidence.notes[0]
