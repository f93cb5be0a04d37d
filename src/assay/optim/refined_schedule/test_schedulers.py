from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LinearLR, SequentialLR

from assay.optim import LinearDecayLR, RefinedLR, refine_schedule


def optimizer_of(*rates: float | torch.Tensor) -> torch.optim.Optimizer:
    groups = [{"params": [torch.zeros(2, requires_grad=True)], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, momentum=0.9)


def run(scheduler, steps: int) -> np.ndarray:
    """The learning rates of that many optimizer steps, shape (steps, groups)."""
    rates = []
    for _ in range(steps):
        rates.append([float(group["lr"]) for group in scheduler.optimizer.param_groups])
        for group in scheduler.optimizer.param_groups:
            group["params"][0].grad = torch.ones(2)
        scheduler.optimizer.step()
        scheduler.step()
    return np.array(rates)


ETA = refine_schedule([9, 5, 3, 2, 1, 1, 1, 2, 1, 1, 2, 2])
SCHEDULERS = {
    "linear": lambda optimizer: LinearDecayLR(optimizer, 12, warmup_steps=3, min_factor=0.1),
    "refined": lambda optimizer: RefinedLR(optimizer, ETA),
}
each_scheduler = pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)


def test_linear_decay_by_hand():
    rates = run(LinearDecayLR(optimizer_of(2.0), 5), 8)[:, 0]
    np.testing.assert_allclose(rates, [2, 1.6, 1.2, 0.8, 0.4, 0, 0, 0], atol=1e-15)
    rates = run(LinearDecayLR(optimizer_of(1.0), 6, warmup_steps=2, min_factor=0.2), 8)[:, 0]
    np.testing.assert_allclose(rates, [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2], atol=1e-15)


def test_without_warm_up_linear_decay_never_rises():
    assert (np.diff(run(LinearDecayLR(optimizer_of(1.0), 50), 60)[:, 0]) <= 0).all()


def test_a_refined_schedule_is_followed_and_its_end_is_kept():
    np.testing.assert_array_equal(run(RefinedLR(optimizer_of(0.3), ETA), 15)[:, 0], 0.3 * np.r_[ETA, 0, 0, 0])
    np.testing.assert_array_equal(run(RefinedLR(optimizer_of(1.0), [1, 0.5]), 4)[:, 0], [1, 0.5, 0.5, 0.5])


@each_scheduler
def test_groups_keep_the_ratio_of_their_rates(make):
    rates = run(make(optimizer_of(1.0, 0.01)), 15)
    np.testing.assert_allclose(rates[:, 1], 0.01 * rates[:, 0], rtol=1e-14)
    tensor = run(make(optimizer_of(torch.tensor(1.0, dtype=torch.float64))), 15)
    np.testing.assert_array_equal(tensor, rates[:, :1])


@each_scheduler
@pytest.mark.parametrize("at", [1, 5, 13])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(make, at):
    whole = run(make(optimizer_of(0.5, 0.1)), 15)
    first = make(optimizer_of(0.5, 0.1))
    run(first, at)
    file = io.BytesIO()
    torch.save({"optimizer": first.optimizer.state_dict(), "scheduler": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = make(optimizer_of(0.9, 0.9))  # other rates: those of the state count
    second.optimizer.load_state_dict(saved["optimizer"])
    second.load_state_dict(saved["scheduler"])
    np.testing.assert_array_equal(run(second, 15 - at), whole[at:])

    third = optimizer_of(0.9, 0.9)
    third.load_state_dict(saved["optimizer"])
    third = make(third)  # made late, it still knows the base rates
    assert third.base_lrs == [0.5, 0.1] and third.optimizer.param_groups[0]["initial_lr"] == 0.5


@pytest.mark.parametrize("at", [1, 5, 13])
def test_resuming_by_last_epoch_keeps_the_base_rates(at):
    optimizer = optimizer_of(0.5, 0.1)
    whole = run(RefinedLR(optimizer_of(0.5, 0.1), ETA), 15)
    run(RefinedLR(optimizer, ETA), at)
    np.testing.assert_array_equal(run(RefinedLR(optimizer, ETA, last_epoch=at - 1), 15 - at), whole[at:])
    with pytest.raises(KeyError, match="initial_lr"):
        RefinedLR(optimizer_of(0.5), ETA, last_epoch=3)


@each_scheduler
def test_after_another_scheduler_it_begins_at_its_beginning(make):
    optimizer = optimizer_of(1.0, 0.1)
    chained = SequentialLR(optimizer, [LinearLR(optimizer, 0.25, total_iters=4), make(optimizer)], [4])
    rates = run(chained, 20)
    np.testing.assert_allclose(rates[:4, 0], [0.25, 0.4375, 0.625, 0.8125])
    np.testing.assert_allclose(rates[4:], run(make(optimizer_of(1.0, 0.1)), 16), rtol=1e-14)
    optimizer = optimizer_of(1.0)
    first = SequentialLR(optimizer, [make(optimizer), LinearLR(optimizer, 1.0)], [12])
    np.testing.assert_allclose(run(first, 14)[:, 0], np.r_[run(make(optimizer_of(1.0)), 12)[:, 0], 1, 1])


def test_bad_schedules_are_refused():
    for name, value in [("total_steps", 0), ("total_steps", 2.0), ("warmup_steps", 5), ("min_factor", 1.5)]:
        with pytest.raises(ValueError, match=f"{name} = {value} is out of range"):
            LinearDecayLR(optimizer_of(1.0), **{"total_steps": 5, name: value})
    for schedule in ([], [[1.0]], [1.0, np.nan], [1.0, -0.1]):
        with pytest.raises(ValueError, match="schedule"):
            RefinedLR(optimizer_of(1.0), schedule)
