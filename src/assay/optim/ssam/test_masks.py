"""The masks of sparse SAM against rules in plain loops."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from assay.optim import SAM, SSAM
from assay.optim._wrapper_contract import EXACT, closure_of, network, train
from assay.optim.sam import DynamicMask, RandomMask
from assay.optim.ssam.masks import SCORES, largest


def flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])


def masks_of(optimizer):
    return flat(optimizer.mask.masks.values())


def data_of(seed=0, size=12):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=draw, dtype=torch.float64), torch.randint(3, (size,), generator=draw)


# --- Fisher


def test_the_fisher_mask_holds_the_largest_of_all_weights_together():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    data = data_of()
    optimizer = SSAM(model, torch.optim.SGD, 0.3, sparsity=0.7, lr=0.1)
    assert masks_of(optimizer).sum() == int(43 * (1 - 0.7)) == 12
    optimizer.update_mask(model=model, loss_fn=F.cross_entropy, data=data, num_samples=99)
    fisher = torch.zeros(43, dtype=torch.float64)
    for x, y in zip(*data, strict=True):
        loss = F.cross_entropy(model(x[None]), y[None])
        fisher += flat(torch.autograd.grad(loss, list(model.parameters()))).square()
    kept = fisher.argsort(descending=True)[:12]
    assert masks_of(optimizer).nonzero().flatten().tolist() == sorted(kept.tolist())
    assert optimizer.mask_density() == 12 / 43
    assert all(mask.dtype == torch.bool for mask in optimizer.mask.masks.values())


def test_a_fisher_refresh_leaves_no_trace_and_frozen_weights_count_last():
    model = network()
    model[3].weight.requires_grad_(False)
    optimizer = SSAM(model, torch.optim.SGD, 0.3, sparsity=0.5, lr=0.1)
    before = copy.deepcopy(model.state_dict())
    data = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)
    optimizer.update_mask(model=model, loss_fn=F.mse_loss, data=data, num_samples=10)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), **EXACT)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert not optimizer.mask.masks[model[3].weight].any()
    first = masks_of(optimizer)
    optimizer.update_mask(model=model, loss_fn=F.mse_loss, data=data, num_samples=10)
    assert not torch.equal(masks_of(optimizer), first), "the same ten examples were drawn again"


def test_the_reference_order_begins_with_a_step_of_the_base():
    models = [network(), network()]
    optimizer = SSAM(models[0], torch.optim.SGD, 0.3, refresh="after", lr=0.1)
    assert optimizer.mask_density() == 0
    base = torch.optim.SGD(models[1].parameters(), lr=0.1)
    torch.testing.assert_close(train(models[0], optimizer, [0]), train(models[1], base, [0]), **EXACT)


# --- exchange


def exchange_by_hand(mask, drop, grow, sparsity, share):
    """Which weights are live after an exchange, by sorting Python lists."""
    size, live = len(mask), [i for i, on in enumerate(mask) if on]
    kept = min(int((size - size * sparsity) * (1 - share)), len(live))
    kept += max(0, len(live) - kept - (size - len(live)))
    stay = sorted(live, key=lambda i: -drop[i])[:kept]
    dead = sorted((i for i in range(size) if not mask[i]), key=lambda i: -grow[i])
    return sorted(stay + dead[: len(live) - kept])


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 12), st.sampled_from(SCORES[:2]), st.sampled_from(SCORES[:2]))
def test_an_exchange_is_the_one_by_hand(sparsity, drop_rate, epoch, drop, grow):
    p = nn.Parameter(torch.randn(6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(epoch)))
    q = nn.Parameter(torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(epoch)))
    optimizer = SAM([p, q], torch.optim.SGD, mask=DynamicMask(sparsity, drop_rate, drop, grow, T_end=12), lr=0.1)
    p.grad, q.grad = torch.randn_like(p), torch.randn_like(q)
    scores = {"gradient": flat([p.grad, q.grad]).abs().tolist(), "weight": flat([p, q]).abs().tolist()}
    before = masks_of(optimizer)
    assert before.sum() == 47 - math.ceil(47 * sparsity)
    optimizer.mask.refresh(optimizer, epoch=epoch)
    after = masks_of(optimizer)
    share = drop_rate / 2 * (1 + math.cos(math.pi * epoch / 12))
    expected = exchange_by_hand(before.tolist(), scores[drop], scores[grow], sparsity, share)
    assert after.nonzero().flatten().tolist() == expected
    assert after.sum() == before.sum()


def test_what_is_dropped_does_not_grow_again_at_once():
    p = nn.Parameter(torch.randn(50))
    optimizer = SAM([p], torch.optim.SGD, mask=DynamicMask(0.5, 1.0, "weight", "weight"), lr=0.1)
    before = masks_of(optimizer)
    optimizer.mask.refresh(optimizer)
    assert torch.equal(masks_of(optimizer), ~before)


def test_the_share_falls_to_zero_and_a_rate_of_zero_keeps_the_mask():
    mask = DynamicMask(0.5, 0.6, T_start=10, T_end=20)
    assert [mask.exchanged(t) for t in (0, 10, 20, 30)] == [0.6, 0.6, 0.0, 0.0]
    assert mask.exchanged(15) == pytest.approx(0.3)
    for sparsity in (0.3, 0.9):
        model = network()
        optimizer = SSAM(model, torch.optim.SGD, 0.3, mask="dynamic", sparsity=sparsity, drop_rate=0.0, lr=0.1)
        before = masks_of(optimizer)
        for step in range(3):
            optimizer.update_mask(epoch=step, T_end=3)
            optimizer.step(closure_of(model, optimizer, step))
        assert torch.equal(masks_of(optimizer), before)


@pytest.mark.parametrize("refresh", ["before", "after"])
def test_the_mask_is_chosen_in_the_step_around_its_ascent(refresh):
    model = network()
    options = {"mask": "dynamic", "drop": "weight", "grow": "weight", "refresh": refresh, "lr": 0.0}
    optimizer = SSAM(model, torch.optim.SGD, 5.0, **options)
    first = masks_of(optimizer)
    optimizer.update_mask(epoch=0, T_end=2)
    assert torch.equal(masks_of(optimizer), first), "chosen without a gradient"
    closure_of(model, optimizer, 0)()
    before = flat(model.parameters())
    optimizer.first_step()
    eps = flat(model.parameters()) - before
    scores = (before if refresh == "before" else before + eps).abs().tolist()
    expected = exchange_by_hand(first.tolist(), scores, scores, 0.5, 0.5)
    assert masks_of(optimizer).nonzero().flatten().tolist() == expected
    assert torch.equal(eps != 0, masks_of(optimizer) if refresh == "before" else first)
    optimizer.second_step()
    second = masks_of(optimizer)
    train(model, optimizer)
    assert torch.equal(masks_of(optimizer), second), "chosen again without being asked"


def test_random_masks_are_drawn_anew_and_alike_from_a_seed():
    def three(seed):
        optimizer = SAM(network(), torch.optim.SGD, mask=RandomMask(0.25, seed=seed), lr=0.1)
        found = [masks_of(optimizer)]
        for _ in range(2):
            optimizer.update_mask()
            found.append(masks_of(optimizer))
        return found

    one, same, other = three(0), three(0), three(1)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert all(mask.sum() == int(57 * 0.75) for mask in one)
    assert len({tuple(mask.tolist()) for mask in [*one, *other]}) == 6


def test_the_largest_are_found_across_tensors_and_dtypes():
    scores = [torch.tensor([[1.0, 9.0]], dtype=torch.bfloat16), torch.tensor(5.0), torch.empty(0), torch.tensor([7.0])]
    assert [mask.tolist() for mask in largest(scores, 2)] == [[[False, True]], False, [], [True]]
    assert not any(mask.any() for mask in largest(scores, 0))
