"""The reference loop: pairing, order, evaluation apart from the clock, divergence."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from assay.bench import Budget, Task, fit
from assay.bench.arms import DEFAULT_RECIPE, EpochBatches, linear_decay
from assay.bench.loop import evaluate, gather, state_bytes
from assay.bench.tasks import resolve_task

from .my_task import task

SMALL = Budget(steps=12, batch_size=20, evaluations=3)


def test_equal_seeds_are_bitwise_equal_and_others_are_not():
    first, again, other = (fit(DEFAULT_RECIPE, task, SMALL, seed) for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_methods_that_draw_random_numbers_get_the_same_weights_and_order():
    seen = {}

    def spy(name, extra_draws):
        def data(run):
            torch.rand(extra_draws)
            return run.task.train

        def batch(run):
            seen[name] = [p.detach().clone() for p in run.model.parameters()], []
            for indices in EpochBatches(run.size, 20, run.order):
                seen[name][1].append(indices.tolist())
                yield indices

        return replace(DEFAULT_RECIPE, data=data, batch=lambda run: list(batch(run)))

    for name, draws in (("a", 0), ("b", 1000)):
        fit(spy(name, draws), task, SMALL, seed=3)
    assert all(torch.equal(p, q) for p, q in zip(seen["a"][0], seen["b"][0], strict=True))
    assert seen["a"][1] == seen["b"][1]


def test_a_pilot_changes_neither_weights_nor_order_but_counts_in_the_seconds():
    def with_pilot(run):
        assert run.fit(DEFAULT_RECIPE, fraction=0.5, seed=99).steps == 6
        return run.task.train

    plain = fit(DEFAULT_RECIPE, task, SMALL, seed=4)
    piloted = fit(replace(DEFAULT_RECIPE, data=with_pilot), task, SMALL, seed=4)
    assert piloted.fingerprint == plain.fingerprint
    assert piloted.preparation > plain.preparation
    assert piloted.seconds > piloted.preparation


def test_the_budget_is_examples_whatever_the_batch_size():
    def batch(run):
        return [list(range(40))]

    result = fit(replace(DEFAULT_RECIPE, batch=batch), task, SMALL, seed=0)
    assert (result.steps, result.examples) == (6, 240)


def test_curve_has_the_asked_points_and_ends_at_the_end():
    result = fit(DEFAULT_RECIPE, task, SMALL, seed=0, test=True)
    assert [point["examples"] for point in result.curve] == [80, 160, 240]
    assert result.curve[-1]["validation"] == result.validation
    assert 0 <= result.test <= 1


def test_the_schedule_multiplies_each_groups_own_rate():
    rates = []

    def update(run):
        first, *rest = run.model.parameters()
        return torch.optim.SGD([{"params": [first], "lr": 0.5}, {"params": rest}], lr=0.1)

    recipe = replace(DEFAULT_RECIPE, update=update, schedule=lambda run: lambda progress: 1 - progress)
    fit(recipe, task, SMALL, 0, before_update=lambda run: rates.append([g["lr"] for g in run.optimizer.param_groups]))
    assert rates[0] == [0.5, 0.1]
    assert rates[6] == pytest.approx([0.25, 0.05])


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged_and_keeps_the_curve():
    def objective(run):
        return lambda model, batch: run.task.loss(model(batch.input), batch.target) * (math.nan if run.step >= 8 else 1)

    result = fit(replace(DEFAULT_RECIPE, objective=objective), task, SMALL, seed=0, test=True)
    assert (result.status, result.steps, result.test) == ("diverged", 8, None)
    assert len(result.curve) == 2


def test_evaluation_leaves_mode_and_statistics_alone():
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(task, model, task.test)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_metric_of_the_whole_split_sees_all_of_it():
    sizes = []

    def metric(output, target):
        sizes.append(len(target))
        return 1.0

    big = TensorDataset(torch.randn(1300, 2), torch.zeros(1300, dtype=torch.long))
    evaluate(replace(task, metric=metric, whole_split=True, test=big), nn.Linear(2, 2), big)
    assert sizes == [1300]


def test_a_mean_metric_is_weighted_by_examples():
    data = TensorDataset(torch.cat([torch.ones(512, 1), torch.zeros(100, 1)]), torch.zeros(612))
    value = evaluate(replace(task, metric=lambda output, target: output.mean()), nn.Identity(), data)
    assert value == pytest.approx(512 / 612)


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(d, list(range(200))), lambda d: list(d)])
def test_gather_takes_any_map_style_dataset(wrap):
    index = torch.tensor([5, 3, 3])
    x, y = gather(wrap(task.train), index)
    assert torch.equal(x, task.train.tensors[0][index]) and torch.equal(y, task.train.tensors[1][index])


def test_state_bytes_are_exact():
    model = nn.Linear(10, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 10)).sum().backward()
    optimizer.step()
    assert state_bytes(optimizer) == 2 * 33 * 4 + 2 * 4


def test_batches_are_a_permutation_without_the_remainder():
    batches = EpochBatches(23, 5, torch.Generator().manual_seed(0))
    first, second = (torch.cat(list(batches)) for _ in range(2))
    assert len(first) == len(set(first.tolist())) == 20
    assert first.tolist() != second.tolist()


def test_default_schedule_warms_up_and_decays_to_zero():
    factors = [linear_decay(k / 300) for k in range(300)]
    assert 0 < factors[0] < factors[14] and max(factors) > 0.94
    assert 0 < factors[-1] < 0.01


@pytest.mark.parametrize("name", ["digits", "digits(model='mlp')", "digits(model='vit')", "tabular",
                                  "tabular(dataset='wine')", "tabular(dataset='diabetes')", "text"])  # fmt: skip
def test_embedded_tasks_learn_and_their_splits_do_not_overlap(name):
    embedded = resolve_task(name)
    budget = Budget(steps=100, batch_size=32, evaluations=2)
    result = fit(DEFAULT_RECIPE, embedded, budget, seed=0, test=True)
    assert result.status == "finished"
    torch.manual_seed(0)
    untrained = evaluate(embedded, embedded.model(), embedded.test)
    assert (result.test > untrained) == (embedded.direction == "max")
    rows = [{tuple(x.flatten().tolist()) for x, _ in split} for split in (embedded.train, embedded.test)]
    # Equal windows of text (blank lines, rulers) do occur in different files.
    assert len(rows[0] & rows[1]) <= 0.01 * len(rows[1])


def test_tasks_are_the_same_every_time():
    first, again = (resolve_task.__wrapped__("text") for _ in range(2))
    assert torch.equal(first.train.tensors[0], again.train.tensors[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": TensorDataset(torch.zeros(0, 2), torch.zeros(0))}, "the train dataset is empty"),
        ({"direction": "up"}, "direction = 'up' is out of range"),
    ],
)
def test_a_bad_task_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(task, **changes)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"batch_size": 0}, {"steps": 1.5}, {"evaluations": -1}])
def test_a_bad_budget_is_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name} = .* is out of range"):
        Budget(**settings)


def test_task_is_public():
    assert isinstance(task, Task)


def test_the_state_of_wrapped_tensors_is_what_they_hold():
    class Codes(torch.Tensor):
        @staticmethod
        def __new__(cls, codes):
            return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

        def __init__(self, codes):
            self.codes = codes

        def __tensor_flatten__(self):
            return ["codes"], None

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise AssertionError(f"{function} is not for codes")

    p = torch.nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.SGD([p], lr=0.1)
    optimizer.state[p]["momentum_buffer"] = Codes(torch.zeros(1000, dtype=torch.uint8))
    assert state_bytes(optimizer) == 1000
