"""Dominance: shares of squared updates, of AdaTask's and of those that torch's optimizers took."""

import functools

import pytest
import torch
from torch import nn

from assay.optim import AdaTask, task_update_au
from assay.optim._contract import parameters
from assay.optim.adatask.test_adatask import BASES, direction, random_gradients


@pytest.mark.parametrize("base", BASES)
def test_shares_are_of_the_squared_updates(base):
    params = parameters()[:3]
    optimizer = AdaTask(params, 2, base=base, track_au=True, au_decay=0.8)
    histories, au = [[[] for _ in params] for _ in range(2)], [[0.0] * 3 for _ in range(2)]
    for step in range(6):
        found = random_gradients(params, 2, step)
        found = [found[0], [10 * g for g in found[1]]]
        if step == 3:
            found[1] = [None] * 3
        optimizer.step_from_grads(found)
        for k in range(2):
            for i in range(3):
                if found[k][i] is not None:
                    histories[k][i].append(found[k][i])
                    au[k][i] = 0.8 * au[k][i] + 0.2 * direction(base, histories[k][i]) ** 2
    shares = optimizer.dominance()
    for i, p in enumerate(params):
        expected = torch.stack([(au[k][i] / (au[0][i] + au[1][i])).mean() for k in range(2)])
        torch.testing.assert_close(shares[p], expected, rtol=1e-9, atol=0)
        assert shares[p].sum().item() == pytest.approx(1)


def test_only_what_moves_has_a_share():
    moved, still, apart = (nn.Parameter(torch.ones(4)) for _ in range(3))
    optimizer = AdaTask([{"params": [moved, still]}, {"params": [apart], "shared": False}], 2, track_au=True)
    g = torch.tensor([1.0, 1.0, 0.0, 0.0])
    optimizer.step_from_grads([[g, 0 * g, g], [g.flip(0), 0 * g, g]])
    found = optimizer.dominance()
    assert list(found) == [moved] and found[moved].tolist() == [0.5, 0.5]
    optimizer.step_from_grads([[g, None, g], [None, None, g]])
    assert optimizer.dominance()[moved][0] == 0.5
    with pytest.raises(RuntimeError, match="track_au=True"):
        AdaTask([moved], 2).dominance()


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(torch.optim.Adam, lr=0.01, betas=(0.8, 0.9)),
        functools.partial(torch.optim.AdamW, lr=0.01, amsgrad=True, weight_decay=0.0),
        functools.partial(torch.optim.RMSprop, lr=0.01),
        functools.partial(torch.optim.Adagrad, lr=0.01, lr_decay=0.1),
    ],
)
def test_shares_of_an_ordinary_optimizer_are_of_its_own_steps(make):
    params = parameters()[:3]
    optimizer, memory = make(params), {}
    for step in range(5):
        found = random_gradients(params, 2, step)
        found = [found[0], [100 * g for g in found[1]]]
        for p, *parts in zip(params, *found, strict=True):
            p.grad = sum(parts)
        starts = [p.detach().clone() for p in params]
        averages = {p: [part["au"].clone() for part in parts] for p, parts in memory.items()}
        optimizer.step()
        shares = task_update_au(optimizer, found, memory, decay=0.5)
        for p, start in zip(params, starts, strict=True):
            new = [part["au"] for part in memory[p]]
            one, other = ((2 * now - old).sqrt() for now, old in zip(new, averages.get(p, [0.0, 0.0]), strict=True))
            # What each task moved adds up to the step, or cancels.
            gaps = [(moved - (start - p.detach()).abs()).abs() for moved in (one + other, (one - other).abs())]
            assert (torch.minimum(*gaps) < 1e-8).all()
            expected = torch.stack([(au / (new[0] + new[1])).mean() for au in new])
            torch.testing.assert_close(shares[p], expected, rtol=1e-9, atol=0)
            assert shares[p][1] > 0.9


def test_ordinary_shares_refuse_what_they_cannot_measure():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    for optimizer in (torch.optim.SGD([p], lr=0.1), torch.optim.RMSprop([p], momentum=0.9)):
        optimizer.step()
        with pytest.raises(TypeError, match="optimizer is out of range"):
            task_update_au(optimizer, [[p.grad], [None]], {})
    with pytest.raises(ValueError, match="decay = 1 is out of range"):
        task_update_au(torch.optim.Adam([p]), [], {}, decay=1)
    with pytest.raises(ValueError, match="a list of 1 gradients for each task"):
        task_update_au(torch.optim.Adam([p]), [[]], {})
    assert task_update_au(torch.optim.Adam([p]), [[None], [None]], {}) == {}
