from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.bench.arms import DEFAULT_RECIPE
from assay.bench.evidence import FAILS, HOLDS, Bench
from assay.bench.loop import DIVERGED, fit
from assay.bench.recipe import Budget
from assay.bench.tasks import resolve_task
from assay.losses import revealed_preference_loss, sequence_utility
from assay.losses._contract import CHECKS, Example, Exempt, has_the_right_gradients
from assay.losses.utility_probability.claim import (
    ANCESTRAL,
    WHOLE,
    claim,
    through_the_probabilities,
    tokens_first,
    trained,
)
from assay.losses.utility_probability.claim_transduction import STEPS, accuracy, beam, edit_distance, scores_of
from assay.losses.utility_probability.utility_probability import apply
from assay.optim._contract import Twice

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


# --- for the family's contract


def example():
    return 2 * torch.randn(6, 5), torch.randint(5, (6,))


def double_loop(scores, target, num_alternatives=None):
    losses = []
    for u, y in zip(scores.tolist(), target.tolist(), strict=True):
        total = sum(math.exp(value) for value in u)
        losses.append(sum(math.exp(value) / total * (value - u[y]) for value in u))
    return losses


def first_ignored(target):
    return target.index_fill(0, torch.tensor([0]), -100)


PLAIN = Example(revealed_preference_loss, example, double_loop, ignored=first_ignored)
EXAMPLES = [Exempt(revealed_preference_loss, "p is held fixed: its gradient is not that of its value. The rest below.")]


@pytest.mark.parametrize(
    "check", [check for check in CHECKS if check is not has_the_right_gradients], ids=lambda check: check.__name__
)
def test_the_rest_of_the_contract(check):
    check(PLAIN)


# --- the loss


@settings(deadline=None)
@given(scale=st.floats(0, 50), classes=st.integers(1, 9), seed=st.integers(0, 99))
def test_with_all_alternatives_the_gradient_is_that_of_cross_entropy(scale, classes, seed):
    draw = torch.Generator().manual_seed(seed)
    scores = (scale * torch.randn(7, classes, generator=draw, dtype=torch.float64)).requires_grad_()
    target = torch.randint(classes, (7,), generator=draw)
    for reduction in ("sum", "mean"):
        (ours,) = torch.autograd.grad(revealed_preference_loss(scores, target, reduction=reduction), scores)
        (theirs,) = torch.autograd.grad(F.cross_entropy(scores, target, reduction=reduction), scores)
        torch.testing.assert_close(ours, theirs, **CLOSE)
        by_hand = (F.softmax(scores.detach(), 1) - F.one_hot(target, classes)) / (7 if reduction == "mean" else 1)
        torch.testing.assert_close(ours, by_hand, **CLOSE)


def test_the_gradient_with_respect_to_weights_is_the_sum_of_pairwise_ones():
    """grad log p(y) = sum over y' of p(y') (grad u(y) - grad u(y')), each gradient by itself."""
    torch.manual_seed(0)
    weight, x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64)
    u, y = weight @ x.tanh(), 2
    each = [torch.autograd.grad(u[c], weight, retain_graph=True)[0] for c in range(4)]
    pairwise = sum(p * (each[y] - each[c]) for c, p in enumerate(F.softmax(u.detach(), 0)))
    (ours,) = torch.autograd.grad(revealed_preference_loss(u[None], torch.tensor([y])), weight)
    torch.testing.assert_close(ours, -pairwise, **CLOSE)


def test_the_value_is_cross_entropy_less_the_entropy():
    scores, target = PLAIN.data()
    p = F.softmax(scores, -1)
    expected = F.cross_entropy(scores, target, reduction="none") + (p * p.log()).sum(-1)
    torch.testing.assert_close(revealed_preference_loss(scores, target, reduction="none"), expected)


def draws(scores, target, alternatives, repeats, seed=0):
    """Gradients of ``repeats`` independent draws (repeats, C)."""
    rows = scores.expand(repeats, -1).clone().requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    loss = revealed_preference_loss(
        rows, target.expand(repeats), num_alternatives=alternatives, reduction="sum", generator=generator
    )
    return torch.autograd.grad(loss, rows)[0]


@pytest.mark.parametrize("alternatives", [1, 3])
def test_drawn_alternatives_give_the_gradient_without_bias(alternatives):
    scores, target = torch.tensor([[1.0, -0.5, 0.0, 2.0]], dtype=torch.float64), torch.tensor([1])
    gradients = draws(scores, target, alternatives, 20_000)
    expected = F.softmax(scores[0], 0) - F.one_hot(target[0], 4)
    error = gradients.std(0) / math.sqrt(len(gradients))
    assert ((gradients.mean(0) - expected).abs() < 4 * error).all()


def test_variance_falls_as_one_over_the_number_of_alternatives():
    scores, target = torch.tensor([[1.0, -0.5, 0.0, 2.0]], dtype=torch.float64), torch.tensor([1])
    p = F.softmax(scores[0], 0)
    for alternatives in (1, 4, 16):
        variance = draws(scores, target, alternatives, 20_000, seed=alternatives).var(0)
        torch.testing.assert_close(variance, p * (1 - p) / alternatives, rtol=0.06, atol=0)


def test_drawn_alternatives_are_a_mean_over_the_draws():
    """With the classes that a generator draws, the loss is the formula's, and no gradient goes through the draws."""
    scores, target = PLAIN.data()
    ones = scores.clone().requires_grad_()
    losses = revealed_preference_loss(
        ones, target, num_alternatives=3, reduction="none", generator=torch.Generator().manual_seed(3)
    )
    gradient = torch.autograd.grad(losses.sum(), ones)[0]
    for row, (y, loss) in enumerate(zip(target.tolist(), losses.tolist(), strict=True)):
        counts = ((gradient[row] + F.one_hot(target, 5)[row]) * 3).round()
        torch.testing.assert_close(gradient[row], counts / 3 - F.one_hot(target, 5)[row], **CLOSE)
        assert counts.sum() == 3 and (counts >= 0).all()
        chosen = [c for c in range(5) for _ in range(int(counts[c]))]
        assert loss == pytest.approx(sum(scores[row, c].item() - scores[row, y].item() for c in chosen) / 3)


def test_draws_come_from_the_generator_or_the_global_one_and_repeat():
    scores, target = torch.randn(40, 9), torch.randint(9, (40,))

    def loss(generator=None):
        return revealed_preference_loss(scores, target, num_alternatives=2, generator=generator)

    one, other = (loss(torch.Generator().manual_seed(5)) for _ in range(2))
    torch.manual_seed(5)
    assert one == other == loss() and loss() != one
    before = torch.get_rng_state()
    loss(torch.Generator().manual_seed(5)), revealed_preference_loss(scores, target)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("alternatives", [None, 20])
def test_classes_that_are_masked_out_are_no_alternatives(alternatives):
    torch.manual_seed(0)
    scores, target = torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 3
    scores[:, 3] = -math.inf
    scores.requires_grad_()
    loss = revealed_preference_loss(scores, target, num_alternatives=alternatives)
    gradient = torch.autograd.grad(loss, scores)[0]
    assert loss.isfinite() and gradient.isfinite().all() and not gradient[:, 3].any()
    assert revealed_preference_loss(scores, target.fill_(3), num_alternatives=alternatives) == math.inf


@pytest.mark.parametrize("alternatives", [None, 2])
def test_a_score_that_is_nan_is_seen_in_the_loss(alternatives):
    scores = torch.tensor([[0.0, 1.0, math.nan], [0.0, 0.0, 0.0]])
    losses = revealed_preference_loss(scores, torch.tensor([0, 0]), num_alternatives=alternatives, reduction="none")
    assert losses.isnan().tolist() == [True, False]


@pytest.mark.parametrize("alternatives", [None, 4])
def test_tokens_of_sequences_and_ignored_ones(alternatives):
    scores, target = torch.randn(2, 3, 5), torch.tensor([[0, 4, -100], [-100, 2, 1]])
    losses = []
    for s, t in ((scores, target), (scores.flatten(0, 1), target.flatten())):
        torch.manual_seed(1)
        losses.append(revealed_preference_loss(s, t, num_alternatives=alternatives, reduction="none").flatten())
    torch.testing.assert_close(*losses, rtol=0, atol=0)
    assert not losses[0][[2, 3]].any()
    dirty = scores.flatten(0, 1).index_fill(0, torch.tensor([2, 3]), math.nan).requires_grad_()
    loss = revealed_preference_loss(dirty, target.flatten(), num_alternatives=alternatives)
    assert loss.isfinite() and torch.autograd.grad(loss, dirty)[0].isfinite().all()
    torch.manual_seed(1)
    mean = revealed_preference_loss(scores, target, num_alternatives=alternatives)
    torch.testing.assert_close(mean, losses[0].sum() / 4)
    assert revealed_preference_loss(scores, torch.full((2, 3), -100), num_alternatives=alternatives) == 0
    assert revealed_preference_loss(scores, target.masked_fill(target < 0, 255), ignore_index=255).isfinite()


def test_targets_may_be_integers_of_any_size():
    scores, target = PLAIN.data()
    for dtype in (torch.uint8, torch.int32):
        small = target.to(dtype)
        assert revealed_preference_loss(scores, small) == revealed_preference_loss(scores, target)
        assert torch.equal(sequence_utility(scores[None], small[None]), sequence_utility(scores[None], target[None]))


def test_no_example_at_all():
    for alternatives in (None, 3):
        loss = revealed_preference_loss(
            torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), num_alternatives=alternatives
        )
        assert loss == 0


def test_with_draws_it_compiles_and_works_under_autocast():
    torch._dynamo.reset()
    target = torch.randint(5, (6,))
    compiled = torch.compile(revealed_preference_loss, backend="aot_eager", fullgraph=True)
    scores = torch.randn(6, 5, requires_grad=True)
    compiled(scores, target, num_alternatives=2).backward()
    assert scores.grad.isfinite().all() and scores.grad.any()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = torch.nn.functional.linear(torch.randn(6, 3), torch.randn(5, 3, requires_grad=True))
        loss = revealed_preference_loss(logits, target, num_alternatives=2)
    assert logits.dtype == loss.dtype == torch.bfloat16 and loss.isfinite()


# --- utilities of sequences


def sequences():
    torch.manual_seed(0)
    logits, target = torch.randn(3, 4, 6, dtype=torch.float64), torch.randint(6, (3, 4))
    return logits, target, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0])
def test_sequence_utility_by_the_formula(penalty):
    logits, target, mask = sequences()
    expected = []
    for z, y, m in zip(logits.tolist(), target.tolist(), mask.tolist(), strict=True):
        kept = [z_t[y_t] - math.log(sum(map(math.exp, z_t))) for z_t, y_t, m_t in zip(z, y, m, strict=True) if m_t]
        expected.append(sum(kept) / max(1, len(kept)) ** penalty)
    utility = sequence_utility(logits, target, length_penalty=penalty, mask=mask)
    torch.testing.assert_close(utility, torch.tensor(expected, dtype=torch.float64), **CLOSE)


def test_sequence_utility_is_minus_cross_entropy_and_with_penalty_one_the_mean():
    logits, target, _ = sequences()
    losses = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
    torch.testing.assert_close(sequence_utility(logits, target), -losses.sum(1), **CLOSE)
    torch.testing.assert_close(sequence_utility(logits, target, length_penalty=1.0), -losses.mean(1), **CLOSE)
    torch.testing.assert_close(
        sequence_utility(logits.view(3, 1, 4, 6), target.view(3, 1, 4)), -losses.sum(1, keepdim=True), **CLOSE
    )


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
def test_padding_may_hold_anything(junk):
    logits, target, mask = sequences()
    outside = mask == 0
    clean = sequence_utility(logits, target, mask=mask, length_penalty=1.0)
    dirty = logits.masked_fill(outside.unsqueeze(-1), junk).requires_grad_()
    for labels, by in ((target.masked_fill(outside, 99), mask.bool()), (target.masked_fill(outside, -100), None)):
        utility = sequence_utility(dirty, labels, mask=by, length_penalty=1.0)
        torch.testing.assert_close(utility, clean, **CLOSE)
        gradient = torch.autograd.grad(utility.sum(), dirty)[0]
        assert gradient.isfinite().all() and not gradient[outside].any()


def test_sequence_utility_has_the_right_gradient_and_sums_in_float32():
    logits, target, mask = sequences()
    torch.autograd.gradcheck(
        lambda z: sequence_utility(z, target, mask=mask, length_penalty=0.7), logits.requires_grad_()
    )
    half = sequence_utility(logits.detach().bfloat16(), target)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), sequence_utility(logits.detach(), target), rtol=0.02, atol=0.02)


# --- wrong use


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda s, t: revealed_preference_loss(s, t, num_alternatives=0),
            "num_alternatives = 0 is out of range: None or",
        ),
        (lambda s, t: revealed_preference_loss(s, t, num_alternatives=1.5), "num_alternatives = 1.5 is out of range"),
        (lambda s, t: revealed_preference_loss(s, t.float()), "target.dtype = torch.float32 is out of range: integer"),
        (lambda s, t: revealed_preference_loss(s.long(), t), "scores.dtype = torch.int64 is out of range: floating"),
        (lambda s, t: revealed_preference_loss(s, t[:2]), r"target.shape = \(2,\) with scores of shape \(3, 4\)"),
        (lambda s, t: sequence_utility(s, t), r"target.shape = \(3,\) with logits of shape \(3, 4\)"),
        (
            lambda s, t: sequence_utility(s[None], t[None], length_penalty=-1),
            r"length_penalty = -1 is out of range: \[0",
        ),
        (lambda s, t: sequence_utility(s[None], t[None], mask=t), r"mask.shape = \(3,\) is out of range: \(1, 3\)"),
        (lambda s, t: apply(DEFAULT_RECIPE, num_alternatives=-1), "num_alternatives = -1 is out of range"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3, 4), torch.zeros(3, dtype=torch.long))


# --- in the bench


def fitted(recipe, seed=7):
    return fit(recipe, resolve_task("digits(model='mlp')"), Budget(steps=20, batch_size=60, evaluations=0), seed)


def test_in_the_bench_it_is_the_objective():
    recipe = replace(DEFAULT_RECIPE, update=lambda run: torch.optim.SGD(run.model.parameters(), 0.1))

    def by_hand(run):
        def loss(model, batch):
            scores = model(batch.input)
            drawn = torch.multinomial(F.softmax(scores.detach(), -1), 5, replacement=True)
            return (scores.gather(1, drawn).mean(1) - scores.gather(1, batch.target[:, None])[:, 0]).mean()

        return loss

    ours, theirs = fitted(apply(recipe, num_alternatives=5)), fitted(replace(recipe, objective=by_hand))
    torch.testing.assert_close(ours.model.state_dict(), theirs.model.state_dict(), rtol=1e-4, atol=1e-6)
    assert ours.fingerprint == fitted(apply(recipe, num_alternatives=5)).fingerprint
    assert ours.fingerprint != fitted(apply(recipe)).fingerprint
    exact = fitted(apply(recipe, num_alternatives=None)).model.state_dict()
    torch.testing.assert_close(exact, fitted(recipe).model.state_dict(), rtol=1e-4, atol=1e-6)


def test_in_the_bench_a_run_may_ask_twice_or_diverge():
    twice = replace(DEFAULT_RECIPE, update=lambda run: Twice(run.model.parameters(), 0.1))
    assert fitted(apply(twice)).steps == 20
    broken = replace(DEFAULT_RECIPE, update=lambda run: torch.optim.SGD(run.model.parameters(), 1e30))
    assert fitted(apply(broken)).status == DIVERGED
    with pytest.raises(ValueError, match="utility-probability needs a classification task"):
        task = replace(resolve_task("digits(model='mlp')"), classes=None)
        fit(apply(DEFAULT_RECIPE), task, Budget(steps=1, batch_size=60, evaluations=0), 7)


# --- the claim


GRADIENT, ODDS = 0, 1


@pytest.mark.parametrize(
    "pieces, fails",
    [({}, None), ({"transform": tokens_first}, ODDS), ({"loss": through_the_probabilities}, GRADIENT)],
)
def test_broken_variants_are_found_out(pieces, fails):
    evidence = claim(Bench(), variants=(ANCESTRAL, WHOLE), seeds=1, steps=20, **pieces)
    for place in (GRADIENT, ODDS):
        assert evidence.checks[place].verdict == (FAILS if place == fails else HOLDS)
    assert fails is None or evidence.verdict == FAILS


def levenshtein(one, other):
    table = {(i, 0): i for i in range(len(one) + 1)} | {(0, j): j for j in range(len(other) + 1)}
    for i, a in enumerate(one, 1):
        for j, b in enumerate(other, 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a != b))
    return table[len(one), len(other)]


def test_edit_distance_and_accuracy_of_padded_outputs():
    draw = torch.Generator().manual_seed(0)
    outputs = torch.randint(3, 6, (6, 5), generator=draw)
    for row, length in enumerate((0, 1, 2, 3, 4, 5)):
        outputs[row, length:] = 0
        outputs[row, length : length + 1] = 2  # END, where there is room
    words = [[word for word in row if word > 2] for row in outputs.tolist()]
    found = edit_distance(outputs.unsqueeze(1), outputs.unsqueeze(0))
    assert found.tolist() == [[levenshtein(one, other) for other in words] for one in words]
    # 13 is the other word of 3; the third output lacks a word, so that END is wrong too.
    target = torch.tensor([[3, 4, 2, 0]])
    said = F.pad(torch.tensor([[[3, 4, 2], [13, 14, 2], [3, 2, 0], [3, 5, 5]]]), (0, STEPS - 3))
    torch.testing.assert_close(accuracy(said, target), torch.tensor([[100.0, 100.0, 100 / 3, 100 / 3]]))


def test_a_wider_beam_finds_more_probable_outputs_and_all_of_them_end_in_padding():
    run = trained(3, 20)
    source = run.testing.source[:40]
    scores = []
    for width in (1, 64):
        outputs = beam(run.model, source, width).unsqueeze(1)
        scores.append(sequence_utility(scores_of(run.model, source, outputs), outputs, mask=outputs != 0))
    assert scores[1].sum() > scores[0].sum() and (scores[1] >= scores[0] - 1e-4).float().mean() > 0.9
    greedy = run.model(source, beam(run.model, source, 1)).argmax(-1)
    said = beam(run.model, source, 1)
    assert torch.equal(greedy.masked_fill(said == 0, 0), said)
