from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from assay.optim.refined_schedule.claim_problems import PROBLEMS, Update, last_loss, train


@pytest.mark.parametrize("name", ["diabetes", "breast cancer"])
def test_gradients_and_runs_side_by_side_are_those_of_single_runs(name):
    problem, eta, rates = PROBLEMS[name], np.linspace(1, 0, 30), np.array([0.1, 0.02])
    x, y = problem.data(0)
    w = torch.randn(2, x.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (expected,) = torch.autograd.grad(problem.loss((w @ x.T), y).sum(), w)
    found = replace(problem, batch=len(x)).gradients([w], x.expand(2, *x.shape), y.expand(2, -1))
    torch.testing.assert_close(found[0], expected)
    together = train(problem, eta, rates, [3, 4])[0]
    for k, (seed, rate) in enumerate([(3, 0.1), (3, 0.02), (4, 0.1), (4, 0.02)]):
        alone = train(problem, eta, np.array([rate]), [seed])
        torch.testing.assert_close(together[k], alone[0][0])
        assert last_loss(problem, alone, [seed]) == pytest.approx(last_loss(problem, [together], [3, 4])[k])


@pytest.mark.parametrize("kind, make", [("momentum", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_updates_are_those_of_torch(kind, make):
    ours, theirs = (torch.ones(1, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    options = {"momentum": 0.9} if kind == "momentum" else {}
    update, optimizer = Update(kind, [ours]), make([theirs], lr=0.1, **options)
    for g in torch.randn(5, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)):
        theirs.grad = g
        optimizer.step()
        update([g], torch.tensor([0.1], dtype=torch.float64))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
