"""The Fisher diagonal against closed forms and one backward pass per example."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from assay.optim.sam import fisher_diagonal
from assay.optim.ssam import fisher


def data_of(size=9):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(size, 4, generator=draw, dtype=torch.float64), torch.randint(3, (size,), generator=draw)


def by_hand(model, x, y):
    total = [torch.zeros_like(p) for p in model.parameters()]
    model.eval()
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        for sum_, g in zip(total, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            sum_ += g.square()
    model.train()
    return total


def normalized():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)).double()


def test_of_softmax_regression_it_is_the_closed_form():
    model = nn.Linear(4, 3).double()
    x, y = data_of()
    found = fisher_diagonal(model, F.cross_entropy, (x, y), 9)
    errors = model(x).softmax(1) - F.one_hot(y, 3)
    torch.testing.assert_close(found[model.weight], errors.square().T @ x.square())
    torch.testing.assert_close(found[model.bias], errors.square().sum(0))


@pytest.mark.parametrize("at_once", [2**24, 120, 1])
def test_it_is_one_backward_per_example(monkeypatch, at_once):
    monkeypatch.setattr(fisher, "AT_ONCE", at_once)
    model = normalized()
    x, y = data_of()
    found = fisher_diagonal(model, F.cross_entropy, (x, y), 100)
    assert list(found) == list(model.parameters())
    torch.testing.assert_close(list(found.values()), by_hand(model, x, y))
    assert not any(value.requires_grad for value in found.values())


def test_a_model_that_branches_on_values_is_differentiated_in_a_loop():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.unused = nn.Linear(4, 3).double(), nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.layer(x) if x.sum().item() > 0 else 2 * self.layer(x)

    model = Branching()
    x, y = data_of()
    with torch.no_grad():
        found = fisher_diagonal(model, F.cross_entropy, (x, y), 9)
    expected = torch.zeros(3, 4).double()
    for i in range(9):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        expected += torch.autograd.grad(loss, model.layer.weight)[0].square()
    torch.testing.assert_close(found[model.layer.weight], expected)
    assert not found[model.unused].any() and model.training


def test_data_may_come_in_every_form():
    model = normalized()
    x, y = data_of()
    whole = list(fisher_diagonal(model, F.cross_entropy, (x, y), 9).values())
    for data in (TensorDataset(x, y), DataLoader(TensorDataset(x, y), 4), [(x[:5], y[:5]), [x[5:], y[5:]]]):
        torch.testing.assert_close(list(fisher_diagonal(model, F.cross_entropy, data, 9).values()), whole)
    first = by_hand(model, x[:6], y[:6])
    loader = DataLoader(TensorDataset(x, y), 4)
    torch.testing.assert_close(list(fisher_diagonal(model, F.cross_entropy, loader, 6).values()), first)
    for data in ((x, y), TensorDataset(x, y)):
        order = torch.randperm(9, generator=torch.Generator().manual_seed(3))[:6]
        drawn = fisher_diagonal(model, F.cross_entropy, data, 6, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(list(drawn.values()), by_hand(model, x[order], y[order]))


def test_a_stream_is_read_no_further_than_needed():
    class Stream(IterableDataset):
        def __iter__(self):
            yield data_of(4)
            raise AssertionError("read on")

    model = normalized()
    found = fisher_diagonal(model, F.cross_entropy, Stream(), 4)
    torch.testing.assert_close(list(found.values()), by_hand(model, *data_of(4)))


def test_half_precision_is_squared_in_float32():
    model = nn.Linear(2, 1, bias=False).to(torch.bfloat16)
    x = torch.full((3, 2), 1e-15, dtype=torch.bfloat16)
    found = fisher_diagonal(model, lambda output, target: output.sum(), (x, torch.zeros(3)), 3)[model.weight]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, x.float().square().sum(0, keepdim=True))


def test_it_refuses():
    model, data = nn.Linear(4, 3).double(), data_of()
    with pytest.raises(ValueError, match="num_samples = 0 is out of range"):
        fisher_diagonal(model, F.cross_entropy, data, 0)
    with pytest.raises(ValueError, match="holds no example"):
        fisher_diagonal(model, F.cross_entropy, [], 3)
    model.weight.to_local = lambda: model.weight
    with pytest.raises(RuntimeError, match="sharded"):
        fisher_diagonal(model, F.cross_entropy, data, 3)
    with pytest.raises(ValueError, match="requires_grad"):
        fisher_diagonal(model.requires_grad_(False), F.cross_entropy, data, 3)
