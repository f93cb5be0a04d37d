"""The ways to step are one step, and a checkpoint goes on with it."""

import copy
import functools
import io

import pytest
import torch
from torch import nn

from assay.optim import AdaTask
from assay.optim._contract import EXACT
from assay.optim.adatask.test_adatask import BASES, Net, train

# --- the ways to step


def test_task_by_task_is_all_at_once():
    def at_once(model, optimizer, step):
        return optimizer.step(model.losses(step))

    def as_tensor(model, optimizer, step):
        return optimizer.step(torch.stack(model.losses(step)))

    def as_function(model, optimizer, step):
        return optimizer.step(lambda: model.losses(step))

    def task_by_task(model, optimizer, step):
        for k in (1, 0):
            optimizer.accumulate(k, model.losses(step)[k])
        return optimizer.step()

    def in_halves(model, optimizer, step):
        for _ in range(2):
            for k in (0, 1):
                optimizer.accumulate(k, 0.5 * model.losses(step)[k])
        return optimizer.step()

    def after_backward(model, optimizer, step):
        for k in (0, 1):
            model.losses(step)[k].backward()
            optimizer.accumulate(k)

        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        return None

    def by_hand(model, optimizer, step):
        optimizer.step_from_grads(optimizer.task_gradients(model.losses(step)))

    def run(way):
        model = Net()
        optimizer = AdaTask(model.parameters(), 2, lr=0.01, task_weights=[1.0, 2.0])
        losses = [way(model, optimizer, step) for step in range(6)]
        return [p.detach() for p in model.parameters()], losses

    params, losses = run(at_once)
    for way in (as_tensor, as_function, task_by_task, in_halves, after_backward, by_hand):
        found, said = run(way)
        torch.testing.assert_close(found, params, rtol=1e-10, atol=1e-12)
        if way not in (after_backward, by_hand):
            torch.testing.assert_close(said, losses, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("retain_graph", [True, False])
def test_graphs_are_freed_unless_they_are_wanted(retain_graph):
    p, other = nn.Parameter(torch.ones(3)), torch.ones(3, requires_grad=True)
    optimizer = AdaTask([p], 2)
    losses = [(p + k * other.exp()).square().sum() for k in (1, 2, 3)]
    optimizer.accumulate(0, losses[2], retain_graph=retain_graph)
    optimizer.step(losses[:2], retain_graph=retain_graph)
    for loss in losses[1:]:
        if retain_graph:
            torch.autograd.grad(loss, other)
        else:
            with pytest.raises(RuntimeError, match="second time"):
                torch.autograd.grad(loss, other)


def test_pending_gradients_are_used_once():
    model = Net()
    optimizer = AdaTask(model.parameters(), 2)
    optimizer.accumulate(0, model.losses(0)[0])
    optimizer.step()
    for call in (optimizer.step, functools.partial(optimizer.step, None)):
        with pytest.raises(RuntimeError, match="needs each task's gradient"):
            call()


# --- checkpoints


@pytest.mark.parametrize("base", BASES)
def test_a_checkpoint_goes_on_bit_for_bit(base):
    make = functools.partial(AdaTask, n_tasks=2, lr=0.01, base=base, track_au=True)
    whole = Net()
    expected = make(whole.parameters())
    train(expected, whole, 6)
    model = Net()
    optimizer = make(model.parameters())
    train(optimizer, model, 3)
    saved = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], saved)
    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    model = Net()
    model.load_state_dict(weights)
    optimizer = make(model.parameters())
    optimizer.load_state_dict(state)
    copied, twin = copy.deepcopy((model, optimizer))
    for one, other in ((model, optimizer), (copied, twin)):
        for step in range(3, 6):
            other.step(one.losses(step))
        torch.testing.assert_close(list(one.parameters()), list(whole.parameters()), **EXACT)
        torch.testing.assert_close(list(other.dominance().values()), list(expected.dominance().values()), **EXACT)
    for options in ({"n_tasks": 3}, {"n_tasks": 2, "base": "adam" if base != "adam" else "rmsprop"}):
        with pytest.raises(ValueError, match="state_dict is out of range"):
            AdaTask(model.parameters(), **options).load_state_dict(state)


def test_step_counts_survive_loading_into_half_precision():
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = AdaTask([p], 2)
    for _ in range(301):
        optimizer.step_from_grads([[torch.ones_like(p)]] * 2)
    other = AdaTask([p], 2)
    other.load_state_dict(optimizer.state_dict())
    assert other.state[p]["step"].tolist() == [301, 301, 0]
