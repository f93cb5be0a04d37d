from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch.utils._python_dispatch import TorchDispatchMode

from assay.bench.arms import DEFAULT_RECIPE
from assay.bench.loop import fit
from assay.bench.recipe import Budget
from assay.bench.tasks import resolve_task
from assay.losses import (
    chunked_decoupled_softmax,
    chunked_soft_topk_loss,
    decoupled_softmax,
    multilabel_bce,
    multilabel_softmax,
    soft_topk_loss,
)
from assay.losses._contract import Example, Exempt
from assay.losses.decoupled_softmax.decoupled_softmax import apply
from assay.optim._contract import Twice

C = 7
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
POSITIVES = [[2], [0, 3], [], [6, 1], [4], [5, 0]]
LOSSES = [
    decoupled_softmax,
    functools.partial(decoupled_softmax, normalize="sum"),
    functools.partial(soft_topk_loss, k=2, n_iter=60),
    functools.partial(soft_topk_loss, k="num_pos", n_iter=60),
    functools.partial(soft_topk_loss, k=torch.tensor([1, 2, 1, 3, 4, 6]), n_iter=60),
    multilabel_softmax,
    functools.partial(multilabel_softmax, normalize="mean"),
    multilabel_bce,
    functools.partial(multilabel_bce, normalize="sum"),
]


# --- for the family's contract: the formulas in plain loops


def make():
    target = torch.zeros(len(POSITIVES), C, dtype=torch.bool)
    for row, places in enumerate(POSITIVES):
        target[row, places] = True
    return 2 * torch.randn(target.shape), target


def rows(scores, target, temperature):
    for z, r in zip(scores.tolist(), target.tolist(), strict=True):
        yield [value / temperature for value in z], [j for j, value in enumerate(r) if value > 0]


def mean_or_sum(terms, normalize):
    return sum(terms) / (max(1, len(terms)) if normalize == "mean" else 1)


def decoupled_loop(scores, target, temperature=1.0, normalize="mean"):
    losses = []
    for s, positives in rows(scores, target, temperature):
        negatives = sum(math.exp(s[c]) for c in range(C) if c not in positives)
        terms = [math.log(math.exp(s[j]) + negatives) - s[j] for j in positives]
        losses.append(mean_or_sum(terms, normalize))
    return losses


def softmax_loop(scores, target, temperature=1.0, normalize="sum"):
    losses = []
    for s, positives in rows(scores, target, temperature):
        terms = [math.log(sum(math.exp(value) for value in s)) - s[j] for j in positives]
        losses.append(mean_or_sum(terms, normalize))
    return losses


def bce_loop(scores, target, temperature=1.0, normalize="mean"):
    losses = []
    for s, positives in rows(scores, target, temperature):
        terms = [math.log1p(math.exp(-s[c] if c in positives else s[c])) for c in range(C)]
        losses.append(mean_or_sum(terms, normalize))
    return losses


def topk_loop(scores, target, k=5, alpha=2.0, n_iter=64, temperature=1.0, normalize="mean"):
    losses = []
    for s, positives in rows(scores, target, temperature):
        places = max(1, len(positives)) if k == "num_pos" else k

        def excess(t, s=s, places=places):
            return sum(1 / (1 + math.exp(-alpha * (value + t))) for value in s) - places

        t = brentq(excess, -max(s) - 10, -min(s) + 10, xtol=1e-14)
        losses.append(mean_or_sum([math.log1p(math.exp(-alpha * (s[j] + t))) for j in positives], normalize))
    return losses


EXAMPLES = [
    Example(decoupled_softmax, make, decoupled_loop),
    Example(decoupled_softmax, make, decoupled_loop, {"temperature": 0.5, "normalize": "sum"}),
    Example(soft_topk_loss, make, topk_loop, {"k": 2, "n_iter": 48}),
    Example(soft_topk_loss, make, topk_loop, {"k": "num_pos", "n_iter": 48, "alpha": 0.7, "temperature": 0.5}),
    Example(multilabel_softmax, make, softmax_loop),
    Example(multilabel_softmax, make, softmax_loop, {"temperature": 0.5, "normalize": "mean"}),
    Example(multilabel_bce, make, bce_loop),
    Example(multilabel_bce, make, bce_loop, {"temperature": 0.5, "normalize": "sum"}),
    Exempt(chunked_decoupled_softmax, "takes embeddings"),
    Exempt(chunked_soft_topk_loss, "takes embeddings"),
]


# --- what must hold


def example(seed=0):
    torch.manual_seed(seed)
    scores, target = make()
    return scores.double(), target


def gradient(loss, scores, target, **options):
    scores = scores.clone().requires_grad_()
    return torch.autograd.grad(loss(scores, target, **options), scores)[0]


def lists(target, *, padding=0):
    """A dense target as lists, in descending order of the columns, wider than needed."""
    longest = int((target > 0).sum(1).max()) + 2
    indices = torch.full((len(target), longest), padding)
    values = torch.zeros(len(target), longest, dtype=torch.float64)
    for row in range(len(target)):
        for place, column in enumerate(reversed((target[row] > 0).nonzero().flatten().tolist())):
            indices[row, place], values[row, place] = column, float(target[row, column])
    return indices, values


def test_one_positive_is_cross_entropy():
    scores, labels = 5 * torch.randn(8, C, dtype=torch.float64), torch.randint(C, (8,))
    expected = F.cross_entropy(scores / 0.3, labels)
    slope = gradient(lambda s, y: F.cross_entropy(s / 0.3, y), scores, labels)
    for target in (F.one_hot(labels, C), (labels[:, None], torch.ones(8, 1))):
        for loss in (decoupled_softmax, multilabel_softmax):
            torch.testing.assert_close(loss(scores, target, temperature=0.3), expected, **CLOSE)
            torch.testing.assert_close(gradient(loss, scores, target, temperature=0.3), slope, **CLOSE)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.floats(0.1, 30))
def test_positives_are_raised_and_negatives_lowered(seed, scale):
    scores, target = example(seed)
    slope = gradient(decoupled_softmax, scale * scores, target)
    assert (slope[target] <= 0).all() and (slope[~target] >= 0).all()
    topk = gradient(soft_topk_loss, scores, target, k=5)
    assert (topk[~target] >= 0).all()


def test_of_the_plain_softmax_that_is_false():
    scores = torch.tensor([[4.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    target = torch.tensor([[True, True, True, False]])
    assert F.softmax(scores, 1)[0, 0] > 1 / 3
    for normalize in ("mean", "sum"):
        assert gradient(multilabel_softmax, scores, target, normalize=normalize)[0, 0] > 0
        assert gradient(decoupled_softmax, scores, target, normalize=normalize)[0, 0] < 0


def test_positives_do_not_see_each_other():
    scores = torch.randn(C, dtype=torch.float64)
    target = torch.arange(C)[None] < 3
    between = torch.autograd.functional.hessian(lambda s: decoupled_softmax(s[None], target), scores)[:3, :3]
    assert not between[~torch.eye(3, dtype=torch.bool)].any() and between.diagonal().all()
    plain = torch.autograd.functional.hessian(lambda s: multilabel_softmax(s[None], target), scores)[:3, :3]
    assert plain.all()


@pytest.mark.parametrize("loss", LOSSES[:-2])
def test_an_offset_of_a_row_changes_nothing(loss):
    scores, target = example()
    offset = 50 * torch.randn(len(scores), 1, dtype=torch.float64)
    torch.testing.assert_close(loss(scores + offset, target), loss(scores, target), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("padding", [0, -1, 10**9])
@pytest.mark.parametrize("loss", LOSSES)
def test_lists_and_masks_are_the_same(loss, padding):
    scores, target = example()
    weights = torch.rand(target.shape, dtype=torch.float64)
    padded, in_lists = lists(target, padding=padding), lists(torch.where(target, weights, 0.0))[1]
    for dense, listed in (({}, {}), ({"weights": weights}, {"weights": in_lists})):
        torch.testing.assert_close(loss(scores, padded, **listed), loss(scores, target, **dense), **CLOSE)
        slopes = gradient(loss, scores, padded, **listed), gradient(loss, scores, target, **dense)
        torch.testing.assert_close(*slopes, **CLOSE)
    for dtype in (torch.float64, torch.int64):
        torch.testing.assert_close(loss(scores, 3 * target.to(dtype)), loss(scores, target), **CLOSE)


def test_a_weight_is_a_factor_of_its_term_alone():
    scores, target = example()
    weights = torch.rand(target.shape, dtype=torch.float64)
    for loss in LOSSES[:2]:
        expected = torch.zeros(len(scores), dtype=torch.float64)
        for row, places in enumerate(POSITIVES):
            for j in places:
                kept = [c for c in range(C) if c == j or c not in places]
                term = F.cross_entropy(scores[row, kept], torch.tensor(kept.index(j)))
                expected[row] += weights[row, j] * term / (len(places) if loss is decoupled_softmax else 1)
        torch.testing.assert_close(loss(scores, target, weights=weights, reduction="none"), expected, **CLOSE)


@pytest.mark.parametrize("loss", LOSSES)
def test_queries_without_positives_or_negatives_are_numbers(loss):
    scores, _ = example()
    for fill in (False, True):
        target = torch.full(scores.shape, fill)
        for given_target in (target, lists(target)):
            losses = loss(scores, given_target, reduction="none", **sampling_off(loss))
            slope = gradient(loss, scores, given_target, **sampling_off(loss))
            assert losses.isfinite().all() and slope.isfinite().all()
            if not fill and getattr(loss, "func", loss) is not multilabel_bce:
                assert not losses.any() and not slope.any()
    full = torch.ones(scores.shape, dtype=torch.bool)
    assert decoupled_softmax(scores, full) == 0 and not gradient(decoupled_softmax, scores, full).any()


def sampling_off(loss):
    return {"sample_positives": False} if getattr(loss, "func", loss) is soft_topk_loss else {}


def test_labels_of_score_minus_infinity_take_no_part():
    scores, target = example()
    out = torch.zeros_like(target)
    out[:, -1], out[1] = ~target[:, -1], ~target[1]  # of the second query every negative
    for loss in (decoupled_softmax, multilabel_softmax):
        masked = scores.masked_fill(out, -math.inf)
        for row, places in enumerate(POSITIVES):
            kept = ~out[row]
            expected = loss(scores[row : row + 1, kept], target[row : row + 1, kept])
            torch.testing.assert_close(loss(masked[row : row + 1], target[row : row + 1]), expected, **CLOSE)
            assert len(places) == target[row, kept].sum()
        slope = gradient(loss, masked, target)
        assert slope.isfinite().all() and not slope[out].any()


def test_a_constant_of_minus_100_for_minus_infinity_is_the_same_for_moderate_scores():
    """As in the authors' code, written out: -100 in place of positives in the denominator."""
    scores, target = example()
    scores = 20 * scores / scores.abs().max()
    total = torch.zeros((), dtype=torch.float64)
    for row, places in enumerate(POSITIVES):
        negatives = scores[row].index_fill(0, torch.tensor(places, dtype=torch.int64), -100.0).logsumexp(0)
        for j in places:
            total -= (scores[row, j] - torch.logaddexp(negatives, scores[row, j])) / len(places) / len(scores)
    torch.testing.assert_close(decoupled_softmax(scores, target), total, **CLOSE)


# --- sampled positives


def test_positives_that_are_not_drawn_take_no_part():
    scores, target = example()
    cases = [
        (functools.partial(decoupled_softmax, num_sampled_positives=1), decoupled_softmax),
        (functools.partial(soft_topk_loss, k=1, n_iter=60), functools.partial(soft_topk_loss, k=1, n_iter=60)),
    ]
    for sampled, whole in cases:
        for given_target in (target, lists(target)):
            slope = gradient(sampled, scores, given_target, generator=torch.Generator().manual_seed(3))
            again = sampled(scores, given_target, generator=torch.Generator().manual_seed(3), reduction="none")
            for row, places in enumerate(POSITIVES):
                drawn = [j for j in places if slope[row, j] != 0]
                assert len(drawn) == min(1, len(places))
                kept = [c for c in range(C) if c not in places or c in drawn]
                rest = whole(scores[row : row + 1, kept], target[row : row + 1, kept])
                torch.testing.assert_close(again[row], rest, **CLOSE)


def test_more_draws_than_positives_are_all_of_them():
    scores, target = example()
    for given_target in (target, lists(target)):
        for number in (2, 100):
            sampled = decoupled_softmax(scores, given_target, num_sampled_positives=number)
            torch.testing.assert_close(sampled, decoupled_softmax(scores, target), **CLOSE)


def test_draws_are_by_relevance_without_replacement_and_from_the_generator():
    n, relevance = 40_000, torch.tensor([1.0, 3.0, 0.0, 4.0])
    target = relevance.expand(n, 4)
    state = torch.get_rng_state()
    for k, expected in ((1, [1 / 8, 3 / 8, 0, 1 / 2]), (2, None)):
        if expected is None:
            p = (relevance / 8).tolist()
            pairs = {(i, j): p[i] * p[j] / (1 - p[i]) for i in range(4) for j in range(4) if i != j}
            expected = [sum(q for pair, q in pairs.items() if c in pair) for c in range(4)]
        for loss in (
            functools.partial(decoupled_softmax, num_sampled_positives=k),
            functools.partial(soft_topk_loss, k=torch.full((n,), k)),
        ):
            scores = torch.zeros(n, 4)
            slope = gradient(loss, scores, target, generator=torch.Generator().manual_seed(1), reduction="sum")
            # Of the top-k loss a positive's gradient is 0 where no label but the drawn ones is left to push.
            drawn = (slope < 0).double().mean(0)
            torch.testing.assert_close(drawn, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0.01)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_plain_softmax_keeps_what_is_not_drawn_as_negatives():
    scores, target = example()
    many = scores.repeat(4000, 1), target.repeat(4000, 1)
    drawn = multilabel_softmax(*many, num_sampled_positives=1, generator=torch.Generator().manual_seed(0))
    expected = multilabel_softmax(scores, target, normalize="mean")
    torch.testing.assert_close(drawn, expected, rtol=0.02, atol=0)


# --- the top-k loss


def test_a_number_for_each_query_is_a_loop_over_queries():
    scores, target = example()
    k = torch.tensor([1, 2, 3, 4, 5, 6])
    each = [soft_topk_loss(scores[i : i + 1], target[i : i + 1], k=int(k[i])) for i in range(6)]
    torch.testing.assert_close(soft_topk_loss(scores, target, k=k, reduction="none"), torch.stack(each), **CLOSE)
    numbers = torch.tensor([max(1, len(places)) for places in POSITIVES])
    by_name = soft_topk_loss(scores, target, k="num_pos")
    torch.testing.assert_close(by_name, soft_topk_loss(scores, target, k=numbers), **CLOSE)


def test_alpha_sharpens_after_the_temperature():
    scores, target = example()
    ones = soft_topk_loss(scores, target, k=2, alpha=3.0, temperature=0.5)
    torch.testing.assert_close(ones, soft_topk_loss(scores / 0.5, target, k=2, alpha=3.0), **CLOSE)
    torch.testing.assert_close(ones, soft_topk_loss(scores, target, k=2, alpha=6.0), rtol=1e-8, atol=1e-8)


def test_without_sampling_more_positives_than_places_share_them():
    scores, target = torch.zeros(1, 6, dtype=torch.float64), torch.arange(6)[None] < 3
    loss = soft_topk_loss(scores, target, k=1, sample_positives=False, n_iter=60)
    torch.testing.assert_close(loss, torch.tensor(math.log(6), dtype=torch.float64))


# --- memory, autocast, compilation


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("loss", [*LOSSES[:2], *LOSSES[5:], functools.partial(soft_topk_loss, k=5)])
def test_no_tensor_is_larger_than_the_scores(loss):
    scores = torch.randn(20, 300, requires_grad=True)
    target = torch.stack([torch.randperm(300)[:40] for _ in range(20)]), torch.ones(20, 40)
    with Largest() as largest:
        loss(scores, target).backward()
    assert largest.elements <= 20 * 301


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_and_autocast_are_computed_in_single(loss):
    scores, target = example()
    half = scores.bfloat16()
    exact = loss(half.double(), target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(half.float(), target).double(), exact, rtol=1e-5, atol=1e-5)
    assert loss(half, target).dtype == torch.bfloat16
    torch.testing.assert_close(loss(half, target).double(), exact, rtol=0.01, atol=0.01)


def test_lists_and_draws_compile():
    scores, target = example()
    torch._dynamo.reset()
    compiled = torch.compile(decoupled_softmax, backend="aot_eager", fullgraph=True)
    found = compiled(scores, lists(target), num_sampled_positives=2)
    torch.testing.assert_close(found, decoupled_softmax(scores, target), **CLOSE)


def test_a_temperature_may_be_learned():
    scores, target = example()
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    for loss in LOSSES:
        assert torch.autograd.gradcheck(lambda t, f=loss: f(scores, target, temperature=t), temperature)


# --- wrong use


@pytest.mark.parametrize(
    "loss, options, message",
    [
        (decoupled_softmax, {"temperature": 0}, "temperature = 0 is out of range: above 0"),
        (decoupled_softmax, {"temperature": math.nan}, "temperature = nan is out of range"),
        (decoupled_softmax, {"normalize": "none"}, "normalize = 'none' is out of range: 'mean' or 'sum'"),
        (decoupled_softmax, {"num_sampled_positives": 0}, "num_sampled_positives = 0 is out of range"),
        (decoupled_softmax, {"num_sampled_positives": 1.5}, "num_sampled_positives = 1.5 is out of range"),
        (decoupled_softmax, {"weights": torch.ones(6, 2)}, r"weights.shape = \(6, 2\) is out of range: \(6, 7\)"),
        (soft_topk_loss, {"k": 0}, r"k = 0 is out of range: an integer in \[1, 6\]"),
        (soft_topk_loss, {"k": 7}, r"k = 7 is out of range: an integer in \[1, 6\]"),
        (soft_topk_loss, {"k": 2.5}, "k = 2.5 is out of range"),
        (soft_topk_loss, {"k": "all"}, "k = 'all' is out of range: .* 'num_pos'"),
        (soft_topk_loss, {"k": torch.tensor([1, 2])}, r"k = torch.int64 of shape \(2,\) is out of range"),
        (soft_topk_loss, {"k": torch.tensor([1, 2, 3, 4, 5, 9])}, "k = 9 is out of range"),
        (soft_topk_loss, {"alpha": 0.0}, "alpha = 0.0 is out of range: above 0"),
        (soft_topk_loss, {"n_iter": 0}, "n_iter = 0 is out of range: an integer >= 1"),
        (multilabel_softmax, {"reduction": "max"}, "reduction = 'max' is out of range"),
        (multilabel_bce, {"normalize": None}, "normalize = None is out of range"),
    ],
)
def test_arguments_out_of_range_are_named(loss, options, message):
    with pytest.raises(ValueError, match=message):
        loss(*example(), **options)


def test_what_does_not_fit_is_named():
    scores, target = example()
    indices, values = lists(target)
    for given_scores, given_target, message in [
        (scores, target[:, :-1], r"target.shape = \(6, 6\) is out of range: \(6, 7\)"),
        (scores, (indices[:-1], values), r"target\[0\].shape = \(5, 4\) is out of range: \(6, P\)"),
        (scores, (indices, values[:, 1:]), r"target\[1\].shape = \(6, 3\) is out of range: \(6, 4\)"),
        (scores, (indices + C, values), r"target\[0\] = \d+ is out of range: \[0, 7\)"),
        (scores[0], target, r"scores = torch.float64 of shape \(7,\) is out of range"),
        (scores.long(), target, "scores = torch.int64 of shape"),
    ]:
        for loss in (decoupled_softmax, soft_topk_loss, multilabel_softmax, multilabel_bce):
            with pytest.raises(ValueError, match=message):
                loss(given_scores, given_target)


# --- in the bench


def test_in_the_bench_it_is_the_objective():
    task, budget = resolve_task("digits(model='mlp')"), Budget(steps=20, batch_size=60, evaluations=0)

    recipe = replace(DEFAULT_RECIPE, update=lambda run: Twice(run.model.parameters(), 0.1))

    def by_hand(run):
        def loss(model, batch):
            return soft_topk_loss(model(batch.input), F.one_hot(batch.target, 10), k=2, alpha=0.8)

        return loss

    ones = fit(apply(recipe, k=2, alpha=0.8), task, budget, 7).model
    others = fit(replace(recipe, objective=by_hand), task, budget, 7).model
    torch.testing.assert_close(ones.state_dict(), others.state_dict(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="decoupled-softmax needs a classification task"):
        fit(apply(recipe), replace(task, classes=None), budget, 7)
    with pytest.raises(ValueError, match=r"k = 10 is out of range: an integer in \[1, 9\]"):
        fit(apply(recipe, k=10), task, budget, 7)
    for option in ({"k": 0}, {"alpha": -1.0}):
        with pytest.raises(ValueError, match="is out of range"):
            apply(recipe, **option)
