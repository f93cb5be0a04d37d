"""What every scorer of the family must satisfy: a score depends on the model and its own example, on nothing else.

A room whose test file has a function ``scorers() -> dict[str, scorer]`` is held to the checks for scorers, each called
as ``scorer(model, dataset, batch_size=...) -> (N,)``; one with ``trackers() -> dict[str, (make, feed, read)]`` to the
check for pieces with a memory: ``make()`` a new one, ``feed(piece, step)`` gives it something that depends on the
step alone, ``read(piece)`` is the tensor that it has arrived at; one with
``samplers() -> dict[str, (make, advance)]`` to the checks for samplers and batch samplers: ``make()`` a new one over
:data:`VISITED` examples, ``advance(sampler, e)`` what a loop does before epoch e = 0, 1, ...
"""

from __future__ import annotations

import copy
import inspect
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from assay.data import IndexedDataset

N = 11
VISITED = 24


def network() -> nn.Module:
    """Batch normalization with statistics of its own, dropout, and parts in different modes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(4 * 16, 3),
    ).double()
    with torch.no_grad():
        model(3 * torch.randn(20, 1, 4, 4, dtype=torch.double) + 1)
    model[1].eval()
    return model


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(N, 1, 4, 4, generator=generator, dtype=torch.double)
    return TensorDataset(inputs, torch.randint(3, (N,), generator=generator))


class Rows(Dataset[Any]):
    """Nothing but ``__len__`` and ``__getitem__``."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(dataset())


def one_score_per_example_in_dataset_order(scorer: Any) -> None:
    model, data = network(), dataset()
    scores = scorer(model, data)
    assert isinstance(scores, Tensor) and scores.shape == (N,) and scores.device.type == "cpu"
    assert not scores.requires_grad and scores.isfinite().all() and len(scores.unique()) == N
    alone = torch.cat([scorer(model, Subset(data, [i])) for i in range(N)])
    torch.testing.assert_close(scores, alone, rtol=1e-12, atol=1e-14)


def batch_size_does_not_matter(scorer: Any) -> None:
    expected = scorer(network(), dataset())
    for batch_size in (1, 3, N, N + 5):
        got = scorer(network(), dataset(), batch_size=batch_size)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="batch_size"):
            scorer(network(), dataset(), batch_size=wrong)


def any_map_style_dataset(scorer: Any) -> None:
    data = dataset()
    rows = [(x, int(y)) for x, y in data]
    same = [
        rows,
        Rows(rows),
        IndexedDataset(data),
        Rows([{"image": x, "label": y} for x, y in rows]),
        IndexedDataset([{"image": x, "labels": y} for x, y in rows]),
        Subset(data, range(N)),
        ConcatDataset([Subset(data, range(4)), Subset(data, range(4, N))]),
    ]
    expected = scorer(network(), data)
    for other in same:
        assert torch.equal(scorer(network(), other), expected)


def goes_with_a_data_loader(scorer: Any) -> None:
    """Scored in the middle of a pass over the same dataset, and its ranking loaded in batches."""
    data, model = dataset(), network()
    expected = scorer(model, data)
    torch.manual_seed(7)
    plain = [y.tolist() for _, y in DataLoader(data, batch_size=4, shuffle=True)]
    torch.manual_seed(7)
    seen = []
    for _, y in DataLoader(data, batch_size=4, shuffle=True):
        assert torch.equal(scorer(model, data), expected)
        seen.append(y.tolist())
    assert seen == plain
    hardest = expected.argsort(descending=True)[:5].tolist()
    loaded = torch.cat([x for x, _ in DataLoader(Subset(data, hardest), batch_size=2)])
    assert torch.equal(loaded, data.tensors[0][hardest])


def leaves_everything_as_it_was(scorer: Any) -> None:
    model, data = network(), dataset()
    model[0].bias.grad = torch.ones(4, dtype=torch.double)
    model[5].bias.requires_grad_(False)

    def state() -> list[Any]:
        return [
            [module.training for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()],
            [len(module._forward_hooks) for module in model.modules()],
            [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
            [value.tolist() for value in model.state_dict().values()],
            [tensor.tolist() for tensor in data.tensors],
            torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002 - the global state is what is looked at
            random.getstate(),
            torch.is_grad_enabled(),
        ]

    before = copy.deepcopy(state())
    scorer(model, data)
    assert state() == before
    with pytest.raises(ZeroDivisionError):  # also when it ends in an error
        scorer(model, Failing())
    assert state() == before


class Failing(Rows):
    def __init__(self) -> None:
        super().__init__([(x, int(y)) for x, y in dataset()])

    def __getitem__(self, i: int) -> Any:
        return self.rows[i] if i < 8 else self.rows[i // 0]


def the_same_again(scorer: Any) -> None:
    """Whatever the random state, the model's mode, and whether the caller records gradients."""
    data = dataset()
    torch.manual_seed(1)
    expected = scorer(network(), data)
    torch.manual_seed(2)
    assert torch.equal(scorer(network(), data), expected)
    assert torch.equal(scorer(network().eval(), data), expected)
    with torch.no_grad():
        assert torch.equal(scorer(network(), data), expected)


def refuses_what_has_no_score(scorer: Any) -> None:
    data = dataset()
    with pytest.raises(ValueError, match="dataset is empty"):
        scorer(network(), Subset(data, []))
    with pytest.raises(ValueError, match="map-style"):
        scorer(network(), Stream())
    with pytest.raises(ValueError, match="input, target"):
        scorer(network(), Rows([x for x, _ in data]))
    with pytest.raises(ValueError, match="'label'"):
        scorer(network(), Rows([{"image": x} for x, _ in data]))
    mixing = network()
    mixing[1] = nn.BatchNorm2d(4, track_running_stats=False).double()
    with pytest.raises(ValueError, match="no running statistics"):
        scorer(mixing, data)
    with pytest.raises(TypeError):
        scorer(network(), data, no_such_option=1)


def takes_options_by_keyword_only(scorer: Any) -> None:
    function = getattr(scorer, "func", scorer)
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()][2:]
    assert kinds and set(kinds) == {inspect.Parameter.KEYWORD_ONLY}


def resumes(make: Any, feed: Any, read: Any) -> None:
    """Stopped after any step and loaded into a new one, through a file's formats, it arrives at the same."""
    whole = make()
    for step in range(6):
        feed(whole, step)
    for stop in range(6):
        first, second = make(), make()
        for step in range(stop):
            feed(first, step)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        feed(first, 5)  # what was saved is not tied to where it came from
        for step in range(stop, 6):
            feed(second, step)
        assert torch.equal(read(second), read(whole))


def visits(sampler: Any) -> list[int]:
    return [i for item in sampler for i in (item if isinstance(item, list) else [item])]


def it_visits_positions_as_often_as_it_says(make: Any, advance: Any) -> None:
    sampler = make()
    for epoch in range(3):
        advance(sampler, epoch)
        size, items = len(sampler), list(sampler)
        assert size == len(items) > 0
        assert all(type(i) is int and 0 <= i < VISITED for i in visits(items))


def orders_are_its_own(make: Any, advance: Any) -> None:
    """Equal makes give equal orders, another each epoch, and torch's global random state is not touched."""

    def orders(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        before, sampler, found = torch.get_rng_state(), make(), []
        for epoch in range(3):
            advance(sampler, epoch)
            found.append(visits(sampler))
        assert torch.equal(torch.get_rng_state(), before)
        return found

    first = orders(1)
    assert first == orders(2) and first[0] != first[1]


def a_data_loader_takes_it(make: Any, advance: Any) -> None:
    sampler, data = make(), IndexedDataset(TensorDataset(torch.arange(VISITED)))
    advance(sampler, 0)
    batched = isinstance(next(iter(make())), list)
    loader = DataLoader(data, **({"batch_sampler": sampler} if batched else {"sampler": sampler, "batch_size": 5}))
    other = make()
    advance(other, 0)
    assert torch.cat([index for _, index in loader]).tolist() == visits(other)


def it_goes_on_from_a_state_dict(make: Any, advance: Any) -> None:
    whole, stopped = make(), make()
    for epoch in range(2):
        for sampler in (whole, stopped):
            advance(sampler, epoch)
            visits(sampler)
    resumed = make()
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    for sampler in (whole, resumed):
        advance(sampler, 2)
    assert visits(resumed) == visits(whole)


SAMPLER_CHECKS = [
    it_visits_positions_as_often_as_it_says,
    orders_are_its_own,
    a_data_loader_takes_it,
    it_goes_on_from_a_state_dict,
]

SCORER_CHECKS = [
    one_score_per_example_in_dataset_order,
    batch_size_does_not_matter,
    any_map_style_dataset,
    goes_with_a_data_loader,
    leaves_everything_as_it_was,
    the_same_again,
    refuses_what_has_no_score,
    takes_options_by_keyword_only,
]
