"""The score against a loop over examples and in closed form."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.nn.expand import natural_expansion_score


def case(n: int = 70) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
    )
    model.double()(torch.randn(20, 1, 4, 4, dtype=torch.float64))
    return model, torch.randn(n, 1, 4, 4, dtype=torch.float64), torch.randint(3, (n,))


def loop(model: nn.Module, x: torch.Tensor, y: torch.Tensor, damping: float) -> float:
    model.eval()
    examples = [
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(F.cross_entropy(model(a[None]), b[None]), model.parameters())]
        )
        for a, b in zip(x, y, strict=True)
    ]
    each = torch.stack(examples)
    return (each.mean(0).square() / (each.square().mean(0) + damping)).sum().item()


@pytest.mark.parametrize("damping", [1e-5, 1e-2])
def test_it_is_that_of_a_loop_over_examples_however_they_are_split(damping):
    model, x, y = case()
    rng = torch.get_rng_state()
    buffers = [b.clone() for b in model.buffers()]
    model.train()
    splits = ([(x, y)], list(zip(x.split(9), y.split(9), strict=True)))
    whole, parts = (
        natural_expansion_score(model, batches, F.cross_entropy, damping=damping, normalize=False) for batches in splits
    )
    assert model.training and torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    size = sum(p.numel() for p in model.parameters())
    assert whole == pytest.approx(loop(model, x, y, damping), rel=1e-8) and parts == pytest.approx(whole, rel=1e-10)
    each = natural_expansion_score(model, splits[0], F.cross_entropy, damping=damping)
    assert each == pytest.approx(whole / size, rel=1e-12) and 0 <= each <= 1


def test_closed_form_of_a_diagonal_linear_network():
    class Diagonal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.5, -1.0], dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.w

    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    model, target = Diagonal(), torch.zeros(2, 2, dtype=torch.float64)

    def half(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return 0.5 * (output - target).square().sum(1).mean()

    g = x.square() * model.w.detach()  # of each example
    eta = (g.mean(0).square() / (g.square().mean(0) + 1e-3)).sum().item()
    found = natural_expansion_score(model, [(x, target)], half, damping=1e-3, normalize=False)
    assert found == pytest.approx(eta, rel=1e-12)
    assert natural_expansion_score(model, [(0 * x, target)], half) == 0


def test_the_penalty_on_added_parameters():
    model, x, y = case(8)
    size = sum(p.numel() for p in model.parameters())
    plain = natural_expansion_score(model, [(x, y)], F.cross_entropy, baseline_params=size)
    scores = [natural_expansion_score(model, [(x, y)], F.cross_entropy, baseline_params=size - d) for d in (0, 10, 40)]
    assert scores[0] == plain and scores == sorted(scores, reverse=True)
    assert scores[2] == pytest.approx(plain * math.exp(-5e-5 * 40), rel=1e-12)
    squared = natural_expansion_score(model, [(x, y)], F.cross_entropy, baseline_params=size - 40, reg_power=2)
    assert squared == pytest.approx(plain * math.exp(-5e-5 * 1600), rel=1e-12)


def test_frozen_parameters_count_for_nothing_and_batches_for_the_degenerate_score():
    model, x, y = case(16)
    model[0].requires_grad_(False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    score = natural_expansion_score(model, [(x, y)], F.cross_entropy, fisher="batch", damping=1e-30)
    silent = 0  # every parameter with a gradient counts for 1
    for g in torch.autograd.grad(
        F.cross_entropy(model.eval()(x), y), [p for p in model.parameters() if p.requires_grad]
    ):
        silent += int(g.eq(0).sum())
    assert score == pytest.approx(1 - silent / trained, rel=1e-9)


def test_arguments_out_of_range():
    model, x, y = case(4)
    for wrong in ({"damping": 0}, {"reg": -1}, {"reg_power": 0}, {"fisher": "exact"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} = .* is out of range"):
            natural_expansion_score(model, [(x, y)], F.cross_entropy, **wrong)
    with pytest.raises(ValueError, match="batches = no example"):
        natural_expansion_score(model, [], F.cross_entropy)
    with pytest.raises(ValueError, match="no parameter"):
        natural_expansion_score(model.requires_grad_(False), [(x, y)], F.cross_entropy)
