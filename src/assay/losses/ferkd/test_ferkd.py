from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.bench.arms import DEFAULT_RECIPE, resolve
from assay.bench.evidence import FAILS, Bench
from assay.bench.loop import fit
from assay.bench.recipe import Budget
from assay.bench.spec import parse_specs
from assay.bench.tasks import resolve_task
from assay.losses import (
    adapt_labels,
    compress_soft_labels,
    ferkd_loss,
    ferkd_thresholds,
    recover_soft_labels,
    soft_target_cross_entropy,
)
from assay.losses._contract import Example, Exempt
from assay.losses.ferkd import ferkd as room
from assay.losses.ferkd.claim import (
    FERKD,
    FERKD_WRONG,
    FKD_WRONG,
    claim,
    labelled,
    labels_of,
    with_the_teachers_own,
    without_discarding,
)
from assay.losses.ferkd.ferkd import apply
from assay.optim._contract import Twice

C = 5
EXACT = {"rtol": 0.0, "atol": 0.0}
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def example(rows=40, scale=2.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, C, generator=generator, dtype=torch.float64)
    probs = F.softmax(scale * torch.randn(rows, C, generator=generator, dtype=torch.float64), -1)
    return logits.to(dtype), probs.to(dtype), torch.randint(C, (rows,), generator=generator)


# --- for the family's contract: the teacher's probabilities and the label as one target


def ferkd_by_pair(input, target, **options):
    return ferkd_loss(input, target[:, :C], target[:, -1].long(), **options)


def pairs():
    """Confidences far from the thresholds, so that they keep their side in half precision."""
    peaks = torch.tensor([0.9, 0.5, 0.5, 0.25, 0.97, 0.9, 0.5])
    rows = torch.arange(7) % C
    probs = ((1 - peaks) / (C - 1)).unsqueeze(1).repeat(1, C).scatter(1, rows.unsqueeze(1), peaks.unsqueeze(1))
    probs = probs * (1 + 0.1 * torch.rand(7, C))
    return 2 * torch.randn(7, C), torch.cat([probs / probs.sum(1, keepdim=True), torch.randint(C, (7, 1)).float()], 1)


def by_rule(input, target, *, t_low, t_mid, t_top=1.0, smoothing=0.1, confidence="max"):
    """The rule in plain loops, case by case."""
    losses = []
    for z, (*p, label) in zip(input.tolist(), target.tolist(), strict=True):
        k, classes = int(label), len(p)
        y = max(p) if confidence == "max" else p[k]
        if y < t_low or y > t_top:
            losses.append(0.0)
            continue
        if t_low <= y < t_mid:
            p = [1 - smoothing if c == k else smoothing / (classes - 1) for c in range(classes)]
        log_sum = math.log(sum(math.exp(value) for value in z))
        losses.append(-sum(weight * (value - log_sum) for value, weight in zip(z, p, strict=True)))
    return losses


def kept_mean(losses):
    return losses.sum() / max(1, int((losses != 0).sum()))


def first_hopeless(target):
    target = target.clone()
    target[0, :C] = 1 / C
    return target


def pair(**options):
    reductions = {"mean": kept_mean, "sum": torch.Tensor.sum}
    return Example(ferkd_by_pair, pairs, by_rule, options, ignored=first_hopeless, reductions=reductions)


EXAMPLES = [
    Exempt(ferkd_loss, "takes the teacher's probabilities and the label; the examples below join them to one target"),
    pair(t_low=0.35, t_mid=0.7, t_top=0.94),
    pair(t_low=0.22, t_mid=0.7, smoothing=0.3),
]


# --- the labels


@settings(deadline=None)
@given(
    thresholds=st.tuples(*[st.floats(0, 1.1)] * 3).map(sorted),
    smoothing=st.floats(0, 1),
    confidence=st.sampled_from(["max", "target"]),
    seed=st.integers(0, 99),
)
def test_labels_are_distributions_and_groups_a_partition(thresholds, smoothing, confidence, seed):
    _, probs, targets = example(seed=seed)
    low, mid, top = thresholds
    soft, keep, group = adapt_labels(
        probs, targets, t_low=low, t_mid=mid, t_top=top, smoothing=smoothing, confidence=confidence
    )
    sure = probs.max(1).values if confidence == "max" else probs[torch.arange(len(probs)), targets]
    # As in the thresholds' precision: what is nearer to one than float32 tells may fall on either side.
    clear = min((sure - t).abs().min() for t in thresholds) > 1e-6
    assert (soft >= 0).all() and keep.dtype == torch.bool and group.dtype == torch.long
    torch.testing.assert_close(soft.sum(1), torch.ones(len(soft), dtype=torch.float64), **CLOSE)
    assert torch.bincount(group, minlength=3).sum() == len(probs) and torch.equal(keep, group != 0)
    assert torch.equal(soft[group != 1], probs[group != 1])
    truth = F.one_hot(targets, C).double()
    softened = (1 - smoothing) * truth + smoothing / (C - 1) * (1 - truth)
    torch.testing.assert_close(soft[group == 1], softened[group == 1], **CLOSE)
    if clear:
        expected = [0 if y < low or y > top else 1 if y < mid else 2 for y in sure.tolist()]
        assert group.tolist() == expected


def test_thresholds_are_half_open_and_the_upper_one_strict():
    probs, targets = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.125, 0.875]]), torch.zeros(3, dtype=torch.long)

    def groups(**thresholds):
        return adapt_labels(probs, targets, **thresholds)[2].tolist()

    assert groups(t_low=0.5, t_mid=0.75) == [2, 1, 2]
    assert groups(t_low=0.75, t_mid=0.75) == [2, 0, 2]
    assert groups(t_low=0.75, t_mid=0.875) == [1, 0, 2]
    assert groups(t_low=0.5, t_mid=0.5, t_top=0.75) == [2, 2, 0]
    assert groups(t_low=0.5, t_mid=2.0, t_top=0.75) == [1, 1, 0]  # being too sure comes first
    assert groups(t_low=0.0, t_mid=0.25, t_top=0.3) == [0, 0, 0]
    by_target = adapt_labels(probs, targets, t_low=0.2, t_mid=0.4, t_top=0.45, confidence="target")
    assert by_target[2].tolist() == [1, 0, 0]


def test_a_sum_rounded_above_one_is_not_too_sure():
    probs = torch.tensor([[1.0000001, 0.0]])
    assert adapt_labels(probs, torch.tensor([0]), t_low=0, t_mid=0)[1].all()


def test_raising_t_mid_only_calibrates_more():
    _, probs, targets = example()
    before = None
    for t_mid in torch.linspace(0.3, 1.01, 20).tolist():
        group = adapt_labels(probs, targets, t_low=0.3, t_mid=t_mid, t_top=0.95)[2]
        if before is not None:
            changed = group != before
            assert (before[changed] == 2).all() and (group[changed] == 1).all()
        before = group
    assert not (before == 2).any()


# --- the loss


def test_without_thresholds_it_is_fkd_to_rounding():
    logits, probs, targets = example()
    loss = ferkd_loss(logits, probs, targets, t_low=0, t_mid=0, t_top=1)
    torch.testing.assert_close(loss, soft_target_cross_entropy(logits, probs), **CLOSE)
    by_matrix = -torch.bmm(probs.unsqueeze(1), F.log_softmax(logits, 1).unsqueeze(2)).mean()
    torch.testing.assert_close(loss, by_matrix, **CLOSE)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_with_every_label_replaced_it_is_label_smoothing(smoothing):
    logits, probs, targets = example()
    loss = ferkd_loss(logits, probs, targets, t_low=0, t_mid=1.001, smoothing=smoothing)
    torchs = F.cross_entropy(logits, targets, label_smoothing=smoothing * C / (C - 1))
    torch.testing.assert_close(loss, torchs, **CLOSE)


def test_discarded_crops_change_nothing_whatever_they_are():
    logits, probs, targets = example()
    keep = adapt_labels(probs, targets, t_low=0.5, t_mid=0.6, t_top=0.9)[1]
    assert 0 < keep.sum() < len(keep)
    loss = functools.partial(ferkd_loss, t_low=0.5, t_mid=0.6, t_top=0.9)
    expected = loss(logits[keep], probs[keep], targets[keep])
    twice = torch.cat([torch.arange(len(keep)), (~keep).nonzero().flatten()])
    for bad in (0.0, math.inf, math.nan):
        x = logits.masked_fill(~keep.unsqueeze(1), bad)[twice].requires_grad_()
        value = loss(x, probs[twice], targets[twice])
        torch.testing.assert_close(value, expected, **CLOSE)
        (gradient,) = torch.autograd.grad(value, x)
        assert gradient.isfinite().all() and gradient[: len(keep)][keep].any(1).all()
        assert not gradient[: len(keep)][~keep].any() and not gradient[len(keep) :].any()


def test_of_discarded_crops_alone_it_is_zero_with_a_graph():
    logits, probs, targets = example()
    for reduction in ("mean", "sum", "none"):
        x = logits.clone().requires_grad_()
        loss = ferkd_loss(x, probs, targets, t_low=1.1, t_mid=1.1, t_top=1.1, reduction=reduction)
        assert not loss.any() and loss.shape == ((len(x),) if reduction == "none" else ())
        assert not torch.autograd.grad(loss.sum(), x)[0].any()
    assert ferkd_loss(logits[:0], probs[:0], targets[:0], t_low=0, t_mid=0) == 0


def test_no_gradient_reaches_the_teacher():
    logits, probs, targets = example()
    probs.requires_grad_()
    soft, *_ = adapt_labels(probs, targets, t_low=0.3, t_mid=0.6)
    loss = ferkd_loss(logits.requires_grad_(), probs, targets, t_low=0.3, t_mid=0.6)
    assert not soft.requires_grad
    loss.backward()
    assert probs.grad is None and logits.grad.any()


def test_confidence_may_be_that_of_the_annotated_class():
    logits, probs, targets = example()
    options = {"t_low": 0.1, "t_mid": 0.4, "confidence": "target"}
    target = torch.cat([probs, targets.unsqueeze(1)], 1)
    losses = ferkd_loss(logits, probs, targets, **options, reduction="none")
    torch.testing.assert_close(losses.tolist(), by_rule(logits, target, **options), rtol=1e-9, atol=1e-9)


def test_half_precision_teachers_and_students():
    logits, probs, targets = example(dtype=torch.float32)
    options = {"t_low": 0.5, "t_mid": 0.6}
    soft = ferkd_loss(logits, probs.half(), targets, **options)
    torch.testing.assert_close(soft, ferkd_loss(logits, probs.half().float(), targets, **options), **EXACT)
    many = torch.full((4096, C), 1 / C).half()
    loss = ferkd_loss(60 * torch.eye(C)[torch.arange(4096) % C].half(), many, torch.arange(4096) % C, t_low=0, t_mid=0)
    assert loss.dtype == torch.float16 and loss == 48


# --- thresholds


def test_thresholds_are_quantiles():
    sure = torch.rand(3, 1001, generator=torch.Generator().manual_seed(0))
    expected = sure.double().quantile(torch.tensor([0.02, 0.15, 1.0], dtype=torch.float64))
    assert ferkd_thresholds(sure) == pytest.approx(expected.tolist(), rel=1e-12)
    low, mid, top = ferkd_thresholds(sure, (0.1, 0.3, 0.9))
    probs = torch.stack([sure.flatten(), torch.zeros(3003)], 1)
    group = adapt_labels(probs, torch.zeros(3003, dtype=torch.long), t_low=low, t_mid=mid, t_top=top)[2]
    np.testing.assert_allclose(torch.bincount(group) / 3003, [0.2, 0.2, 0.6], atol=2e-3)


def test_thresholds_at_the_ends_discard_nothing():
    probs = F.softmax(torch.randn(500, C), 1)
    low, mid, top = ferkd_thresholds(probs.amax(1), (0.0, 0.0, 1.0))
    assert adapt_labels(probs, torch.zeros(500, dtype=torch.long), t_low=low, t_mid=mid, t_top=top)[2].eq(2).all()


# --- compressed labels


KINDS = ("hard", "smoothing", "marginal_smoothing_k2", "marginal_smoothing_k5", "marginal_smoothing_k10", "full")
KINDS += ("marginal_renorm", "marginal_renorm_k3")


def recovered_by_loops(row, kind):
    """What each kind says of a row of probabilities, from the definition."""
    order = sorted(range(len(row)), key=lambda c: -row[c])
    if kind == "full":
        return row
    if kind == "hard":
        return [float(c == order[0]) for c in range(len(row))]
    count = {"smoothing": 1, "marginal_renorm": 5}.get(kind) or int(kind.rpartition("k")[2])
    top = order[:count]
    total = sum(row[c] for c in top)
    if "renorm" in kind:
        return [row[c] / total if c in top else 0.0 for c in range(len(row))]
    rest = (1 - total) / max(1, len(row) - len(top))
    return [row[c] if c in top else rest for c in range(len(row))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [2, 5, 12, 1000])
def test_recovered_labels_are_as_defined(kind, classes):
    probs = F.softmax(3 * torch.randn(6, classes, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 1)
    rows = recover_soft_labels(compress_soft_labels(probs, kind), kind, classes)
    expected = torch.tensor([recovered_by_loops(row, kind) for row in probs.tolist()], dtype=rows.dtype)
    torch.testing.assert_close(rows, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(rows.sum(1), torch.ones(6, dtype=rows.dtype), rtol=1e-12, atol=1e-12)


def test_all_classes_kept_is_the_full_label():
    probs = F.softmax(torch.randn(9, C, dtype=torch.float64), 1)
    for kind in ("marginal_smoothing_k5", "marginal_smoothing_k10", "marginal_renorm", "full"):
        torch.testing.assert_close(recover_soft_labels(compress_soft_labels(probs, kind), kind, C), probs, **CLOSE)


def test_labels_as_the_published_files_hold_them():
    """The layout of FKD's files: classes and values as two rows of one tensor, a hard label as classes."""
    label = torch.tensor([[[7, 1, 3, 0, 9], [0.5, 0.2, 0.1, 0.05, 0.05]]])
    expected = torch.full((1, 20), 0.1 / 15)
    expected[0, [7, 1, 3, 0, 9]] = label[0, 1]
    torch.testing.assert_close(recover_soft_labels(label, "marginal_smoothing_k5", 20), expected, rtol=1e-6, atol=1e-7)
    expected = torch.zeros(1, 20).index_put((torch.tensor(0), torch.tensor([7, 1, 3, 0, 9])), label[0, 1] / 0.9)
    torch.testing.assert_close(recover_soft_labels(label, "marginal_renorm", 20), expected, rtol=1e-6, atol=1e-7)
    smooth = recover_soft_labels(torch.tensor([[2.0, 0.7]]), "smoothing", 4)
    torch.testing.assert_close(smooth, torch.tensor([[0.1, 0.1, 0.7, 0.1]]))
    for hard in (torch.tensor([1, 0]), torch.tensor([[1], [0]])):
        assert recover_soft_labels(hard, "hard", 3).tolist() == [[0, 1, 0], [1, 0, 0]]


@given(seed=st.integers(0, 999), scale=st.floats(0, 30), kind=st.sampled_from(KINDS[1:]), classes=st.integers(2, 30))
def test_half_precision_labels_are_distributions_and_keep_their_largest(seed, scale, kind, classes):
    probs = F.softmax(scale * torch.randn(4, classes, generator=torch.Generator().manual_seed(seed)), 1)
    compressed = compress_soft_labels(probs, kind).half()
    rows = recover_soft_labels(compressed, kind, classes)
    assert rows.dtype == torch.float32 and (rows >= 0).all()
    torch.testing.assert_close(rows.sum(1), torch.ones(4), rtol=0, atol=2e-6)
    if kind == "marginal_smoothing_k5":
        top = probs.topk(min(5, classes), 1)
        torch.testing.assert_close(rows.gather(1, top.indices), top.values, rtol=2e-3, atol=1e-3)


# --- wrong use


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, p, y: adapt_labels(p, y, t_low=-0.1, t_mid=0.5), "t_low = -0.1 is out of range"),
        (lambda z, p, y: adapt_labels(p, y, t_low=math.nan, t_mid=0.5), "t_low = nan"),
        (lambda z, p, y: adapt_labels(p, y, t_low=0.6, t_mid=0.5), "t_mid = 0.5 is out of range: at least t_low = 0.6"),
        (lambda z, p, y: adapt_labels(p, y, t_low=0.6, t_mid=0.7, t_top=0.5), "t_top = 0.5"),
        (lambda z, p, y: adapt_labels(p, y, t_low=0, t_mid=0, smoothing=1.5), "smoothing = 1.5"),
        (lambda z, p, y: adapt_labels(p, y, t_low=0, t_mid=0, confidence="top"), "confidence = 'top'"),
        (lambda z, p, y: adapt_labels(p[0], y, t_low=0, t_mid=0), r"teacher_probs.shape = \(5,\)"),
        (lambda z, p, y: adapt_labels(p[:, :1], y, t_low=0, t_mid=0), r"teacher_probs.shape = \(40, 1\)"),
        (lambda z, p, y: adapt_labels(p.long(), y, t_low=0, t_mid=0), "floating point"),
        (lambda z, p, y: adapt_labels(p, y[1:], t_low=0, t_mid=0), r"targets.shape = \(39,\) is out of range: \(40,\)"),
        (lambda z, p, y: ferkd_loss(z[1:], p, y, t_low=0, t_mid=0), r"teacher_probs.shape = \(40, 5\) with logits"),
        (lambda z, p, y: ferkd_loss(z, p, y, t_low=0, t_mid=0, reduction="all"), "reduction = 'all'"),
        (lambda z, p, y: ferkd_thresholds(p, (0.2, 0.1, 1)), r"q = \(0.2, 0.1, 1\)"),
        (lambda z, p, y: ferkd_thresholds(p, (0.2, 0.3)), r"q = \(0.2, 0.3\)"),
        (lambda z, p, y: ferkd_thresholds(p[:0]), "at least one number"),
        (lambda z, p, y: ferkd_thresholds(2 * p / p.amax()), r"confidences = .* is out of range: \[0, 1\]"),
        (lambda z, p, y: ferkd_thresholds(p * math.nan), "confidences"),
        (lambda z, p, y: compress_soft_labels(p, "marginal_smoothing_k0"), "kind = 'marginal_smoothing_k0'"),
        (lambda z, p, y: compress_soft_labels(p, "soft"), "kind = 'soft' is out of range: 'hard', 'smoothing'"),
        (lambda z, p, y: compress_soft_labels(y, "hard"), r"probs.shape = \(40,\) of torch.int64"),
        (lambda z, p, y: recover_soft_labels(p, "marginal_smoothing_k5", 9), r"compressed.shape = .* \(b, 2, 5\)"),
        (lambda z, p, y: recover_soft_labels(torch.zeros(1, 2, 9), "marginal_renorm", 5), "K <= 5"),
        (lambda z, p, y: recover_soft_labels(p, "full", 9), r"\(b, 9\) for 'full'"),
        (lambda z, p, y: recover_soft_labels(p, "smoothing", 5), r"\(b, 2\) for 'smoothing'"),
        (lambda z, p, y: recover_soft_labels(p, "hard", 5), r"\(b,\) for 'hard'"),
        (lambda z, p, y: recover_soft_labels(y, "hard", 1), "num_classes = 1"),
    ],
)
def test_arguments_out_of_range_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*example())


# --- in the bench


SMALL = Budget(steps=20, batch_size=30, evaluations=0)


@pytest.fixture
def watched(monkeypatch):
    """Notes what the room's objective stores in the preparation, and each batch that the student is shown."""
    notes = {"stored": [], "labels": [], "inputs": []}
    label_crops = room._label_crops

    def stores(*args):
        notes["stored"].append(label_crops(*args))
        notes["inputs"].clear()  # of the teacher's training
        return notes["stored"][-1]

    def compares(logits, soft, **options):
        notes["labels"].append(soft)
        return soft_target_cross_entropy(logits, soft, **options)

    def model(run):
        network = run.task.model()
        network.register_forward_pre_hook(
            lambda module, args: notes["inputs"].append(args[0]) if module.training else None
        )
        return network

    monkeypatch.setattr(room, "_label_crops", stores)
    monkeypatch.setattr(room, "soft_target_cross_entropy", compares)
    recipe = replace(DEFAULT_RECIPE, model=model, update=lambda run: Twice(run.model.parameters(), 0.1))
    return recipe, notes


def test_in_the_bench_it_is_the_objective(watched):
    """As many crops as the batch has examples, 4 of each fourth image, with the labels of the rule."""
    recipe, notes = watched
    task = resolve_task("digits")
    result = fit(apply(recipe, mix=0.0, discard=0.1, calibrate=0.2, flip=0.5), task, SMALL, 7)
    assert result.steps == 20 and result.examples == 600 and result.preparation > 0
    ((boxes, flips, probs, targets),) = notes["stored"]
    assert boxes.shape == (500, 16, 4) and flips.any() and torch.equal(targets, task.train.tensors[1])
    low, mid, _ = ferkd_thresholds(probs.amax(-1), (0.1, 0.3, 1.0))
    soft, keep, _ = adapt_labels(probs.flatten(0, 1), targets.repeat_interleave(16), t_low=low, t_mid=mid)
    soft = soft.masked_fill(~keep.unsqueeze(1), -1.0).view_as(probs)
    stored = room.replay_crops(task.train.tensors[0], boxes, flips, (8, 8))
    batch = torch.randperm(500, generator=torch.Generator().manual_seed(7))[:30]
    first, again, second = notes["inputs"][:3]
    assert first.shape == (30, 1, 8, 8) and len(notes["inputs"]) == len(notes["labels"]) == 40
    torch.testing.assert_close(first, again, **EXACT)  # one step's batch, though its loss is asked for twice
    assert not torch.equal(first, second)
    used = set()
    for place in range(30):
        image = int(batch[place // 4 * 4])
        same = (stored[image] - first[place]).flatten(1).abs().amax(1) < 1e-6
        same &= (soft[image] == notes["labels"][0][place]).all(1)
        assert same.any()
        used.add((image, int(same.nonzero()[0])))
    assert len(used) == 30  # different crops of an image


def test_in_the_bench_crops_mix_with_those_of_their_image_alone(watched):
    recipe, notes = watched
    fit(apply(recipe, mix=1.0, num_crops=2, crops=2, discard=0.5, calibrate=0.0), resolve_task("digits"), SMALL, 7)
    probs = notes["stored"][0][2]
    keep = probs.amax(-1) >= ferkd_thresholds(probs.amax(-1), (0.5, 0.5, 1.0))[0]
    batch = torch.randperm(500, generator=torch.Generator().manual_seed(7))[:30]
    changed = 0
    for image, pair in zip(batch[::2].tolist(), notes["labels"][0].view(15, 2, 10), strict=True):
        assert int((pair[:, 0] == -1).sum()) == int((~keep[image]).sum())
        if keep[image].sum() < 2:  # alone: as it is
            assert all((label == -1).all() or (probs[image] == label).all(1).any() for label in pair)
        else:
            torch.testing.assert_close(pair.sum(0), probs[image].sum(0))  # weights lam and 1 - lam, exchanged
            changed += int(not torch.equal(pair.sort(0).values, probs[image].sort(0).values))
    assert changed > 0


def test_in_the_bench_it_composes():
    for words in ("ferkd(crops=4)+adamp", "batch-group-norm+ferkd(crops=4, num_crops=1)", "grand-el2n(runs=1)+ferkd"):
        arm = resolve(parse_specs(words)[0])
        result = fit(arm.recipe(arm.options(0)), resolve_task("digits"), SMALL, 1)
        assert result.status == "finished" and result.steps == 20, words


def test_in_the_bench_a_teacher_that_diverges_is_a_run_that_does():
    wild = replace(DEFAULT_RECIPE, update=lambda run: torch.optim.SGD(run.model.parameters(), lr=1e30))
    assert fit(apply(wild), resolve_task("digits"), SMALL, 1).status == "diverged"


def test_in_the_bench_it_refuses_what_has_no_crops_and_options_out_of_range():
    for task in ("tabular", "tabular(dataset='diabetes')"):
        with pytest.raises(ValueError, match="ferkd needs a classification task of images"):
            fit(apply(DEFAULT_RECIPE), resolve_task(task), SMALL, 1)
    for name, value in [
        ("discard", -0.1), ("calibrate", 0.99), ("smoothing", 2), ("flip", 1.1), ("mix", -1), ("min_scale", 0),
        ("fraction", 0), ("crops", 0), ("num_crops", 17), ("num_crops", 0),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} = {value} is out of range"):
            apply(DEFAULT_RECIPE, **{name: value})


# --- the claim


@pytest.mark.parametrize("method", [with_the_teachers_own, without_discarding, adapt_labels])
def test_broken_variants_are_found_out(method):
    evidence = claim(Bench(), adapt=method, variants=[FERKD], seeds=2, epochs=1, steps=60)
    assert (evidence.verdict == FAILS) == (method is not adapt_labels)


def test_what_the_wrong_teacher_says_is_put_right_by_the_rule():
    crops = labelled(0, 60)
    wrong = crops.targets < 3
    for variant, share in ((FKD_WRONG, 0.0), (FERKD_WRONG, 1.0)):
        labels, _ = labels_of(variant, crops, adapt_labels)
        assert (labels.argmax(1) == crops.targets)[wrong].double().mean() == share
    assert (labels_of(FERKD_WRONG, crops, with_the_teachers_own)[0].argmax(1) != crops.targets)[wrong].all()
