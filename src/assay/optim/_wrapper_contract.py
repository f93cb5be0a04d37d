"""What every optimizer around another satisfies, on one page.

A room puts ``WRAPPERS = {"Name": make}`` into its test file, with ``make(params, base, **base_options)`` a wrapper of
the base class; ``test_contract.py`` runs :data:`WRAPPER_CHECKS` over all of them. All steps are taken with a closure.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from assay.optim import AdamP

Make = Callable[..., torch.optim.Optimizer]
EXACT = {"rtol": 0.0, "atol": 0.0}
BASES: list[tuple[type, dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    (AdamP, {"lr": 0.01, "weight_decay": 0.1}),
]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    # No bias before the normalization: its gradient is rounding noise, which Adam would blow up.
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()


def closure_of(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> Callable[[], Tensor]:
    """A loss of this step's own batch."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - x[:, :3]).square().mean()
        loss.backward()
        return loss

    return closure


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Any = range(4)) -> list[Tensor]:
    for step in steps:
        optimizer.step(closure_of(model, optimizer, step))
    return [value.detach().clone() for value in model.state_dict().values()]


def built(make: Make) -> Iterator[tuple[nn.Module, torch.optim.Optimizer]]:
    for base, options in BASES:
        model = network()
        yield model, make(model.parameters(), base, **options)


def it_trains_and_returns_the_loss(make: Make) -> None:
    for model, optimizer in built(make):
        before = [p.detach().clone() for p in model.parameters()]
        expected = closure_of(copy.deepcopy(model), optimizer, 0)()
        found = optimizer.step(closure_of(model, optimizer, 0))
        torch.testing.assert_close(found.detach(), expected.detach())
        assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def resuming_is_bit_exact(make: Make) -> None:
    for (model, optimizer), (base, options) in zip(built(make), BASES, strict=True):
        train(model, optimizer, range(3))
        saved = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict()], saved)
        saved.seek(0)
        other = network(seed=9)
        fresh = make(other.parameters(), base, **options)
        weights, state = torch.load(saved, weights_only=True)
        other.load_state_dict(weights)
        fresh.load_state_dict(state)
        torch.testing.assert_close(train(other, fresh, range(3, 6)), train(model, optimizer, range(3, 6)), **EXACT)


def copies_go_on_alike(make: Make) -> None:
    for pair in built(make):
        train(*pair, range(2))
        others = [copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))]
        expected = train(*pair, range(2, 4))
        for other in others:
            torch.testing.assert_close(train(*other, range(2, 4)), expected, **EXACT)


def schedulers_and_groups_are_the_bases(make: Make) -> None:
    model = network()
    parts = [{"params": model[0].parameters(), "lr": 0.0}, {"params": [*model[1].parameters(), *model[3].parameters()]}]
    optimizer = make(parts, torch.optim.SGD, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    first = [p.detach().clone() for p in model[0].parameters()]
    train(model, optimizer, range(1))
    assert all(torch.equal(p, q) for p, q in zip(model[0].parameters(), first, strict=True))
    scheduler.step()
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, range(1))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.float64))], "lr": 0.3})
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0, 0.3]


def without_a_gradient_nothing_moves(make: Make) -> None:
    for model, optimizer in built(make):
        model[0].requires_grad_(False)
        before = [p.detach().clone() for p in model[0].parameters()]
        train(model, optimizer)
        assert all(torch.equal(p, q) for p, q in zip(model[0].parameters(), before, strict=True))


def bad_input_is_refused(make: Make) -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match="speed"):
        make([p], torch.optim.SGD, lr=0.1, speed=1)
    with pytest.raises(ValueError, match="empty parameter list"):
        make([], torch.optim.SGD, lr=0.1)


WRAPPER_CHECKS = [
    it_trains_and_returns_the_loss,
    resuming_is_bit_exact,
    copies_go_on_alike,
    schedulers_and_groups_are_the_bases,
    without_a_gradient_nothing_moves,
    bad_input_is_refused,
]
