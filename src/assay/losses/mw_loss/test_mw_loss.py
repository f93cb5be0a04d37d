from __future__ import annotations

import importlib
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from assay._processes import run_on_two
from assay.bench.arms import DEFAULT_RECIPE
from assay.bench.evidence import FAILS, Bench
from assay.bench.loop import fit
from assay.bench.recipe import Budget
from assay.bench.tasks import resolve_task
from assay.losses import contrastive_loss, mw_loss
from assay.losses._contract import Example
from assay.losses.mw_loss.claim import CL, MW, OFFSETS, claim, within_query
from assay.losses.mw_loss.mw_loss import apply
from assay.optim._contract import Twice

pair_sums = importlib.import_module("assay.losses.mw_loss.pair_sums")
EXACT = {"rtol": 0.0, "atol": 0.0}
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
ROWS, COLUMNS = 6, 8


# --- for the family's contract


def make():
    return torch.randn(ROWS, COLUMNS), torch.randperm(COLUMNS)[:ROWS]


def double_loop(scores, target, temperature=0.01):
    """Equation 3 of the paper, with the temperature, for each positive; the mean over S- in place of the sum."""
    rows, columns = scores.shape
    pool = [scores[i, j].item() for i in range(rows) for j in range(columns) if j != target[i]]
    return [
        sum(softplus(-(scores[i, target[i]].item() - s) / temperature) for s in pool) / len(pool) for i in range(rows)
    ]


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


PAPERS = {"mean": torch.Tensor.mean, "paper": lambda losses: losses.mean() * (ROWS * COLUMNS - ROWS)}
EXAMPLES = [
    Example(mw_loss, make, double_loop, {"temperature": 1.0}, by_example=False, reductions=PAPERS),
    Example(
        mw_loss,
        make,
        lambda scores, target, temperature, chunk_size: double_loop(scores, target, temperature),
        {"temperature": 0.5, "chunk_size": 4},
        by_example=False,
        reductions=PAPERS,
    ),
]


# --- value and gradient


def random_scores(rows=5, columns=7, seed=0):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def random_masks(rows=5, columns=7, seed=0):
    """Several positives in some rows, none in the second, and cells in neither mask."""
    drawn = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    positive, negative = drawn < 0.2, drawn > 0.4
    positive[1] = False
    positive[0, :2], negative[0, :2] = True, False
    return positive, negative


def value_and_gradient(scores, **options):
    scores = scores.clone().requires_grad_()
    loss = mw_loss(scores, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), scores)[0]


def pairs_of(scores, positive, negative):
    return [(p, n) for p in scores[positive].tolist() for n in scores[negative].tolist()]


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0, 10.0])
def test_mean_and_paper_are_a_double_loop(temperature):
    scores, target = random_scores(), torch.arange(5)
    losses = double_loop(scores, target, temperature)
    expected = sum(losses) / len(losses)
    assert mw_loss(scores, temperature=temperature).item() == pytest.approx(expected, rel=1e-10, abs=1e-10)
    paper = mw_loss(scores, target, temperature=temperature, reduction="paper").item()
    assert paper == pytest.approx(expected * (5 * 7 - 5), rel=1e-10)
    assert mw_loss(scores).item() == mw_loss(scores, temperature=0.01).item()


def test_gradient_is_that_of_the_formula():
    scores, tau = random_scores(), 0.3
    right = torch.eye(5, 7, dtype=torch.bool)
    positives, negatives = scores[right], scores[~right]
    slope = torch.sigmoid(-(positives[:, None] - negatives) / tau) / (len(positives) * len(negatives) * tau)
    expected = torch.zeros_like(scores)
    expected[right], expected[~right] = -slope.sum(1), slope.sum(0)
    torch.testing.assert_close(value_and_gradient(scores, temperature=tau)[1], expected, **TIGHT)


def test_gradients_of_gradients():
    positive, negative = random_masks()
    weights = torch.linspace(0.5, 2, int(positive.sum()), dtype=torch.float64)

    def weighted(scores):
        options = {"positive_mask": positive, "negative_mask": negative, "chunk_size": 2}
        return (weights * mw_loss(scores, temperature=0.4, reduction="none", **options)).sum()

    scores = random_scores().requires_grad_()
    assert torch.autograd.gradcheck(weighted, scores) and torch.autograd.gradgradcheck(weighted, scores)
    assert torch.autograd.gradgradcheck(lambda x: mw_loss(x, temperature=0.4), scores)


@pytest.mark.parametrize("pairs", ["exact", "binned"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_pull_positives_up_and_sum_to_zero(masked, pairs):
    scores, (positive, negative) = random_scores(), random_masks()
    if not masked:
        positive = torch.eye(5, 7, dtype=torch.bool)
        negative = ~positive
    options = {"positive_mask": positive, "negative_mask": negative} if masked else {}
    gradient = value_and_gradient(scores, temperature=0.2, pairs=pairs, **options)[1]
    assert abs(gradient.sum().item()) < (1e-12 if pairs == "exact" else 1e-7)
    assert (gradient[positive] < 0).all() and (gradient[negative] > 0).all()
    assert (gradient[~(positive | negative)] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "paper", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_chunks_change_nothing(masked, reduction, monkeypatch):
    positive, negative = random_masks()
    options = {"positive_mask": positive, "negative_mask": negative} if masked else {}
    found = [value_and_gradient(random_scores(), reduction=reduction, chunk_size=c, **options) for c in (1, 3, None)]
    monkeypatch.setattr(pair_sums, "block_size", lambda x: 5)  # the negatives, too, are cut
    found.append(value_and_gradient(random_scores(), reduction=reduction, **options))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], **TIGHT)


def test_no_more_pairs_at_a_time_than_asked_for(monkeypatch):
    sizes, blocks = [], pair_sums._blocks

    def watched(*arguments):
        for rows, columns, x in blocks(*arguments):
            sizes.append(x.numel())
            yield rows, columns, x

    monkeypatch.setattr(pair_sums, "_blocks", watched)
    scores = random_scores(60, 60)
    value_and_gradient(scores, chunk_size=2)
    assert set(sizes) == {2 * 60 * 59} and len(sizes) == 2 * 30
    sizes.clear()
    value_and_gradient(scores)
    assert max(sizes) <= 1 << 17 and sum(sizes) == 2 * 60 * 60 * 59


# --- what the loss knows


@pytest.mark.parametrize("pairs", ["exact", "binned"])
def test_offset_of_a_row_counts_here_and_not_in_the_contrastive_loss(pairs):
    scores, tau = random_scores(), 0.1
    rows = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    options = {"temperature": tau, "pairs": pairs}
    assert mw_loss(scores + 0.75, **options).item() == pytest.approx(mw_loss(scores, **options).item(), abs=1e-7)
    assert abs(mw_loss(scores + rows, **options) - mw_loss(scores, **options)) > 0.1
    moved = contrastive_loss(scores + rows, temperature=tau)
    assert moved.item() == pytest.approx(contrastive_loss(scores, temperature=tau).item(), abs=1e-10)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 9999), st.sampled_from([0.01, 0.1, 1.0, 10.0]), st.integers(2, 6), st.integers(0, 3))
def test_bounds_the_share_of_wrongly_ordered_pairs(seed, temperature, rows, more):
    scores = random_scores(rows, rows + more, seed)
    right = torch.eye(rows, rows + more, dtype=torch.bool)
    pairs = pairs_of(scores, right, ~right)
    share = sum(p < n for p, n in pairs) / len(pairs)
    assert share <= mw_loss(scores, temperature=temperature).item() / math.log(2)


def test_tends_to_the_hinge():
    scores, right = random_scores(), torch.eye(5, 7, dtype=torch.bool)
    pairs = pairs_of(scores, right, ~right)
    hinge = sum(max(0.0, n - p) for p, n in pairs) / len(pairs)
    assert 1e-6 * mw_loss(scores, temperature=1e-6).item() == pytest.approx(hinge, rel=1e-5)


@pytest.mark.parametrize("pairs", ["exact", "binned"])
def test_equal_scores_are_log_two_and_no_pair_is_zero(pairs):
    for scores in (torch.zeros(4, 4), torch.full((3, 5), -0.7)):
        assert mw_loss(scores, pairs=pairs).item() == pytest.approx(math.log(2), rel=1e-6)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for shape, options in (
        ((1, 1), {}),
        ((2, 3), {"positive_mask": nothing}),
        ((2, 3), {"positive_mask": ~nothing}),
        ((2, 3), {"negative_mask": nothing}),
    ):
        for reduction in ("mean", "paper", "none"):
            loss, gradient = value_and_gradient(torch.ones(shape), reduction=reduction, pairs=pairs, **options)
            assert not loss.any() and not gradient.any()


@pytest.mark.parametrize("pairs", ["exact", "binned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_scores_stay_finite(dtype, pairs):
    scores = 1e4 * random_scores().sign().to(dtype)
    loss, gradient = value_and_gradient(scores, pairs=pairs)
    assert loss.isfinite() and loss > 1e5 and gradient.isfinite().all()
    assert value_and_gradient(1e4 * torch.eye(4, dtype=dtype), pairs=pairs)[0] == 0


def test_rows_may_be_permuted_with_their_columns():
    scores, order = random_scores(6, 6), torch.randperm(6)
    assert mw_loss(scores[order][:, order]).item() == pytest.approx(mw_loss(scores).item(), rel=1e-12)
    target = torch.tensor([3, 0, 5, 1, 1, 2])  # two queries may share a column
    assert mw_loss(scores[order], target[order]).item() == pytest.approx(mw_loss(scores, target).item(), rel=1e-12)


# --- masks


@pytest.mark.parametrize("pairs", ["exact", "binned"])
def test_several_positives_and_ignored_cells(pairs):
    scores, (positive, negative) = random_scores(), random_masks()
    options = {"positive_mask": positive, "negative_mask": negative, "temperature": 0.2, "pairs": pairs}
    each = [
        sum(softplus((n - p) / 0.2) for n in scores[negative].tolist()) / int(negative.sum())
        for p in scores[positive].tolist()
    ]
    close = {"rtol": 1e-10, "atol": 1e-10} if pairs == "exact" else {"rtol": 0, "atol": 3e-8}
    expected = torch.tensor(each, dtype=torch.float64)
    torch.testing.assert_close(mw_loss(scores, reduction="none", **options), expected, **close)
    torch.testing.assert_close(mw_loss(scores, torch.zeros(5).long(), **options), expected.mean(), **close)
    changed = torch.where(positive | negative, scores, 100 * random_scores(seed=1))
    assert mw_loss(changed, **options) == mw_loss(scores, **options)


def test_masks_fill_in_for_each_other():
    scores, target = random_scores(), torch.tensor([2, 2, 0, 6, 4])
    positive = F.one_hot(target, 7).bool()
    torch.testing.assert_close(mw_loss(scores, positive_mask=positive), mw_loss(scores, target), **TIGHT)
    duplicate = torch.ones(5, 7, dtype=torch.bool)
    duplicate[0, 4] = False  # the positive of row 4 answers row 0 as well
    explicit = mw_loss(scores, positive_mask=positive, negative_mask=duplicate & ~positive)
    torch.testing.assert_close(mw_loss(scores, target, negative_mask=duplicate), explicit, **EXACT)


# --- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    scores = random_scores(8, 8).to(dtype)
    expected = mw_loss(scores.float())
    assert mw_loss(scores).dtype == dtype
    torch.testing.assert_close(mw_loss(scores), expected.to(dtype), **EXACT)
    query, document = (F.normalize(random_scores(8, 4, seed).float(), dim=1) for seed in (1, 2))
    with torch.autocast("cpu", dtype):
        scores = query @ document.T
        found = mw_loss(scores), contrastive_loss(scores), mw_loss(scores, pairs="binned")
    assert scores.dtype == dtype and all(loss.dtype == torch.float32 for loss in found)
    torch.testing.assert_close(found[0], mw_loss(scores.float()), **EXACT)
    torch.testing.assert_close(found[1], contrastive_loss(scores.float()), **EXACT)
    torch.testing.assert_close(found[2], found[0], rtol=1e-6, atol=1e-7)


def test_contrastive_loss_is_the_log_of_a_share():
    scores, target, tau = random_scores(), torch.tensor([2, 2, 0, 6, 4]), 0.2
    expected = 0.0
    for i in range(5):
        shares = [math.exp(s / tau) for s in scores[i].tolist()]
        expected -= math.log(shares[target[i]] / sum(shares)) / 5
    assert contrastive_loss(scores, target, temperature=tau).item() == pytest.approx(expected, rel=1e-12)
    assert contrastive_loss(scores, torch.arange(5)) == contrastive_loss(scores)


# --- across processes


TWO_PROCESSES = """
import copy
from assay._distributed import all_gather_rows
from assay.losses import mw_loss
from torch.nn.parallel import DistributedDataParallel

torch.manual_seed(0)
encoders = torch.nn.ModuleDict(dict(query=torch.nn.Linear(4, 3), document=torch.nn.Linear(4, 3))).double()
queries, documents = torch.randn(5, 4).double(), torch.randn(7, 4).double()
rows, columns = ((slice(0, 2), slice(0, 3)), (slice(2, 5), slice(3, 7)))[rank]

class Scores(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoders = copy.deepcopy(encoders)

    def forward(self, queries, documents):
        return self.encoders.query(queries) @ all_gather_rows(self.encoders.document(documents)).T

def trained(scores, lr, parameters, **options):
    optimizer = torch.optim.SGD(parameters, lr)
    for _ in range(3):
        optimizer.zero_grad()
        loss = mw_loss(scores(), **options)
        loss.backward()
        optimizer.step()
    return [loss.detach()] + [p.detach() for p in parameters]

for pairs, close in (("exact", 1e-12), ("binned", 1e-6)):
    for reduction, lr in (("mean", 0.5), ("paper", 0.02)):
        options = dict(pairs=pairs, reduction=reduction, temperature=0.5)
        ours, alone = DistributedDataParallel(Scores()), copy.deepcopy(encoders)
        pooled = options | dict(group=dist.group.WORLD)
        split = trained(lambda: ours(queries[rows], documents[columns]), lr, list(ours.parameters()), **pooled)
        scores = lambda: alone.query(queries) @ alone.document(documents).T
        whole = trained(scores, lr, list(alone.parameters()), **options)
        torch.testing.assert_close(split, whole, rtol=close, atol=close)

scores, drawn = torch.randn(5, 7).double(), torch.rand(5, 7)
masks = [dict(), dict(positive_mask=drawn < 0.3, negative_mask=drawn > 0.5), dict(negative_mask=drawn > 0.5)]
masks.append(dict(positive_mask=(drawn < 0.5) & (torch.arange(5) < 2)[:, None]))  # the second process has none
close = dict(rtol=0, atol=1e-7)
for mask in masks:
    for pairs in ("exact", "binned"):
        options = dict(pairs=pairs, temperature=0.5)
        mine = {name: m[rows] for name, m in mask.items()} | dict(group=dist.group.WORLD)
        x, y = scores.clone().requires_grad_(), scores.clone().requires_grad_()
        split, whole = mw_loss(x[rows], **mine, **options), mw_loss(y, **mask, **options)
        torch.testing.assert_close(split, whole, **close)
        (split / 2).backward()  # the average over two processes
        whole.backward()
        torch.testing.assert_close(x.grad[rows], y.grad[rows], **close)
        each = mw_loss(y, reduction="none", **mask, **options)
        own = mw_loss(x[rows], reduction="none", **mine, **options)
        first = int(mask["positive_mask"][: rows.start].sum()) if "positive_mask" in mask else rows.start
        torch.testing.assert_close(own, each[first : first + len(own)], **close)
"""


def test_two_processes_are_one(tmp_path):
    """Shares of unequal size, trained by DDP, end with the weights and losses of one process with all rows."""
    run_on_two(TWO_PROCESSES, tmp_path)


# --- wrong use


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0.0}, r"temperature = 0.0 is out of range: \(0, inf\)"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"reduction": "sum"}, "reduction = 'sum' is out of range: 'mean', 'paper' or 'none'"),
        ({"pairs": "fast"}, "pairs = 'fast' is out of range: 'auto', 'exact' or 'binned'"),
        ({"chunk_size": 0}, "chunk_size = 0 is out of range: None, or an integer >= 1"),
        ({"chunk_size": True}, "chunk_size = True"),
        ({"target": torch.arange(3)}, r"target.shape = \(3,\) is out of range: \(2,\)"),
        ({"target": torch.tensor([0.0, 1.0])}, "target.dtype = torch.float32"),
        ({"target": torch.tensor([0, 3])}, r"target = 3 is out of range: \[0, 3\)"),
        ({"target": torch.tensor([-1, 0])}, "target = -1 is out of range"),
        ({"positive_mask": torch.ones(2, 2, dtype=torch.bool)}, r"positive_mask.shape = \(2, 2\) .* \(2, 3\)"),
        ({"negative_mask": torch.ones(2, 3)}, "negative_mask.dtype = torch.float32 is out of range: torch.bool"),
        (dict.fromkeys(("positive_mask", "negative_mask"), torch.eye(2, 3).bool()), r"cell \[0, 0\] is in positive_"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        mw_loss(torch.zeros(2, 3), **options)


def test_scores_that_do_not_fit_are_named():
    for loss in (mw_loss, contrastive_loss):
        with pytest.raises(ValueError, match=r"scores.shape = \(3,\) is out of range: \(B, M\)"):
            loss(torch.zeros(3))
        with pytest.raises(ValueError, match=r"scores.dtype = torch.int64 is out of range"):
            loss(torch.zeros(2, 2, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"scores.shape = \(3, 2\) is out of range: at least 3 columns"):
            loss(torch.zeros(3, 2))
        assert loss(torch.zeros(3, 2), torch.tensor([0, 1, 1])).item() == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="temperature = -1"):
        contrastive_loss(torch.zeros(2, 2), temperature=-1)


# --- in the bench


def test_in_the_bench_it_is_the_objective():
    """The weights are those of a loss written by hand, also with an optimizer that asks for a loss twice."""
    task, budget = resolve_task("digits(model='mlp')"), Budget(steps=20, batch_size=32, evaluations=0)

    def by_hand(model, batch):
        logits = model(batch.input)
        right = F.one_hot(batch.target, 10).bool()
        return F.softplus((logits[~right] - logits[right][:, None]) / 2.0).mean()

    recipe = replace(DEFAULT_RECIPE, update=lambda run: Twice(run.model.parameters(), 0.1))
    ones = fit(apply(recipe, temperature=2.0), task, budget, 7).model
    others = fit(replace(recipe, objective=lambda run: by_hand), task, budget, 7).model
    torch.testing.assert_close(ones.state_dict(), others.state_dict(), rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="mw-loss needs a classification task"):
        fit(apply(recipe), replace(task, classes=None), budget, 7)
    with pytest.raises(ValueError, match="temperature = 0 is out of range"):
        apply(recipe, temperature=0)


# --- the claim


@pytest.mark.parametrize("method", [within_query, mw_loss])
def test_the_broken_variant_is_found_out(method):
    evidence = claim(Bench(), method=method, variants=(CL, MW, OFFSETS), seeds=3, steps=50)
    failed = [check.name for check in evidence.checks if check.verdict == FAILS]
    assert ("offsets" in " ".join(failed)) == (method is within_query)
