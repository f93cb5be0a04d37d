"""The three metric losses against the formulas in plain loops, at their edges, and in every precision."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from assay.losses import binomial_deviance, n_pair_loss, triplet_margin_loss

LABELS = torch.tensor([2, 0, 1, 0, 2, 0, 1, 2])
EXACT = {"rtol": 0.0, "atol": 1e-12}
LOSSES = (binomial_deviance, n_pair_loss, triplet_margin_loss)
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)


def embeddings(n=8, d=5, seed=0):
    return 2 * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(x, y):
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    return dot / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def binomial_by_hand(x, labels, alpha=2.0, beta=0.5, cost_pos=1.0, cost_neg=25.0):
    terms = {True: [], False: []}
    for i, j in itertools.combinations(range(len(x)), 2):
        same = labels[i] == labels[j]
        factor = -alpha * cost_pos if same else alpha * cost_neg
        terms[same].append(math.log1p(math.exp(factor * (cosine(x[i], x[j]) - beta))))
    return mean(terms[True]) + mean(terms[False])


def n_pair_by_hand(x, labels, scale=10.0, penalty=5e-4):
    if scale is not None:
        x = [[scale * a / math.sqrt(sum(b * b for b in row)) for a in row] for row in x]
    dot = [[sum(a * b for a, b in zip(one, other, strict=True)) for other in x] for one in x]
    terms = []
    for a, p in itertools.permutations(range(len(x)), 2):
        if labels[a] == labels[p]:
            rest = sum(math.exp(dot[a][n] - dot[a][p]) for n in range(len(x)) if labels[n] != labels[a])
            terms.append(math.log1p(rest))
    return mean(terms) + penalty / 2 * mean(dot[i][i] for i in range(len(x)))


def triplet_by_hand(x, labels, margin=0.1):
    return mean(
        max(0.0, margin + cosine(x[a], x[n]) - cosine(x[a], x[p]))
        for a, p, n in itertools.permutations(range(len(x)), 3)
        if labels[a] == labels[p] != labels[n]
    )


CASES = [
    (binomial_deviance, binomial_by_hand, {}),
    (binomial_deviance, binomial_by_hand, {"alpha": 1.0, "beta": 0.2, "cost_pos": 3.0, "cost_neg": 2.0}),
    (n_pair_loss, n_pair_by_hand, {}),
    (n_pair_loss, n_pair_by_hand, {"scale": 2.0, "penalty": 0.0}),
    (n_pair_loss, n_pair_by_hand, {"scale": None, "penalty": 0.1}),
    (triplet_margin_loss, triplet_by_hand, {}),
    (triplet_margin_loss, triplet_by_hand, {"margin": 0.7}),
]


@pytest.mark.parametrize(("loss", "by_hand", "options"), CASES)
@pytest.mark.parametrize("labels", [LABELS, LABELS.clamp(max=1), torch.arange(8), torch.zeros(8).long()])
def test_equals_the_formula_in_loops(loss, by_hand, options, labels):
    x = embeddings()
    expected = torch.tensor(by_hand(x.tolist(), labels.tolist(), **options), dtype=torch.float64)
    torch.testing.assert_close(loss(x, labels, **options), expected, **EXACT)


@pytest.mark.parametrize(("loss", "by_hand", "options"), CASES)
def test_has_the_right_gradients(loss, by_hand, options):
    torch.autograd.gradcheck(lambda x: loss(x, LABELS, **options), embeddings().requires_grad_())


def test_binomial_deviance_with_a_single_positive_pair_and_with_none():
    x = embeddings(3)
    pair = -F.logsigmoid(2.0 * (F.cosine_similarity(x[0], x[2], dim=0) - 0.5))
    negatives = [-F.logsigmoid(-50.0 * (F.cosine_similarity(x[i], x[1], dim=0) - 0.5)) for i in (0, 2)]
    torch.testing.assert_close(binomial_deviance(x, torch.tensor([4, 1, 4])), pair + sum(negatives) / 2, **EXACT)
    only = binomial_deviance(x[:2], torch.tensor([0, 1]))
    torch.testing.assert_close(only, negatives[0], **EXACT)
    torch.testing.assert_close(binomial_deviance(x[::2], torch.tensor([1, 1])), pair, **EXACT)


def test_far_from_the_border_the_logarithm_is_still_exact():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor(25 + math.log1p(math.exp(-25)), dtype=torch.float64)
    torch.testing.assert_close(binomial_deviance(x, torch.tensor([0, 1])), expected, rtol=1e-15, atol=0.0)


def test_pairs_of_two_are_symmetric_in_anchor_and_positive():
    """For batches of pairs the form with the positive as anchor, x_n . x_p - x_a . x_p, is the same mean."""
    labels, x = torch.arange(4).repeat_interleave(2), 10 * F.normalize(embeddings(), dim=1)
    terms = []
    for a in range(8):
        positive = x[a ^ 1]
        negatives = torch.stack([x[n] @ positive for n in range(8) if labels[n] != labels[a]])
        terms.append(torch.log1p((negatives - x[a] @ positive).exp().sum()))
    torch.testing.assert_close(n_pair_loss(embeddings(), labels, penalty=0.0), torch.stack(terms).mean(), **EXACT)


@pytest.mark.parametrize(("hard", "nearest"), [(1.0, 4), (0.5, 2), (0.0, 0)])
def test_the_triplet_loss_takes_the_nearest_and_random_ones(hard, nearest):
    """One anchor pair, negatives at known angles: the loss tells which were taken."""
    angles = torch.arange(12, dtype=torch.float64) * 0.1
    x = torch.stack([angles.cos(), angles.sin()], 1)
    x[1] = x[0]
    labels = torch.tensor([0, 0, *range(1, 11)])
    gaps = (x[2:] @ x[0]).tolist()  # margin + s_an - s_ap with both 1, largest first
    choices = itertools.combinations(range(nearest, 10), 4 - nearest)
    possible = torch.tensor([mean([*gaps[:nearest], *(gaps[i] for i in rest)]) for rest in choices])
    # Both anchors draw for themselves: the loss is the mean of two possible choices.
    possible = (possible[:, None] + possible).flatten() / 2
    taken = set()
    for seed in range(40):
        options = {"margin": 1.0, "negatives": 4, "hard": hard}
        one, again = (
            triplet_margin_loss(x, labels, **options, generator=torch.Generator().manual_seed(seed)) for _ in range(2)
        )
        assert one == again and (possible - one).abs().min() < 1e-6
        taken.add(round(one.item(), 9))
    assert (len(taken) == 1) == (nearest == 4) and (nearest == 4 or len(taken) > 10)


def test_negatives_beyond_what_there_is_are_all_of_them():
    x = embeddings()
    for negatives in (6, 7, 120):
        torch.testing.assert_close(
            triplet_margin_loss(x, LABELS, negatives=negatives, hard=0.3), triplet_margin_loss(x, LABELS), **EXACT
        )


@each_loss
def test_only_directions_count(loss):
    x = embeddings()
    lengths = torch.linspace(0.1, 30, len(x), dtype=torch.float64)[:, None]
    torch.testing.assert_close(loss(lengths * x, LABELS), loss(x, LABELS))


@each_loss
def test_every_precision_and_extreme_inputs(loss):
    exact = loss(embeddings(), LABELS)
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
        x = embeddings().to(dtype).requires_grad_()
        found = loss(x, LABELS)
        found.backward()
        assert found.dtype == x.grad.dtype == dtype and x.grad.isfinite().all()
        torch.testing.assert_close(found.double(), exact, rtol=close, atol=close)
    for extreme in (1e4 * embeddings().float().sign(), torch.full((8, 5), -1e4), torch.zeros(8, 5)):
        x = extreme.requires_grad_()
        found = loss(x, LABELS)
        assert found.isfinite() and torch.autograd.grad(found, x)[0].isfinite().all()
    assert loss(torch.zeros(0, 5), torch.zeros(0).long()) == 0


@each_loss
def test_compiles(loss):
    torch._dynamo.reset()
    outcomes = []
    for call in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        x = embeddings().requires_grad_()
        found = call(x, LABELS)
        outcomes.append([found.detach(), *torch.autograd.grad(found, x)])
    torch.testing.assert_close(*outcomes)


@each_loss
def test_what_does_not_fit_is_named(loss):
    with pytest.raises(ValueError, match=r"labels.shape = \(7,\) is out of range: \(8,\)"):
        loss(embeddings(), LABELS[1:])
    with pytest.raises(ValueError, match=r"embeddings.shape = \(8, 5, 1\) is out of range: \(N, d\)"):
        loss(embeddings()[..., None], LABELS)
    with pytest.raises(ValueError, match=r"embeddings.dtype = torch.int64 is out of range: floating point"):
        loss(embeddings().long(), LABELS)
    with pytest.raises(TypeError, match="no_such_argument"):
        loss(embeddings(), LABELS, no_such_argument=1)


@pytest.mark.parametrize(
    ("loss", "name", "values"),
    [
        (binomial_deviance, "alpha", (0.0, -1.0, math.inf)),
        (binomial_deviance, "beta", (math.nan,)),
        (binomial_deviance, "cost_pos", (0.0,)),
        (binomial_deviance, "cost_neg", (-1.0,)),
        (n_pair_loss, "scale", (0.0, math.inf)),
        (n_pair_loss, "penalty", (-1e-9,)),
        (triplet_margin_loss, "margin", (-0.1, math.nan)),
        (triplet_margin_loss, "negatives", (0, 1.5, True)),
        (triplet_margin_loss, "hard", (-0.1, 1.1)),
    ],
)
def test_arguments_out_of_range_are_named(loss, name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{name} = {value} is out of range"):
            loss(embeddings(), LABELS, **{name: value})
