from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.optim import per_sample_grads


class Tied(nn.Module):
    """Batch normalization, dropout, a frozen layer, a weight used twice, and a dict for an input."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(5, 3).requires_grad_(False)

    def forward(self, x):
        hidden = self.drop(torch.tanh(self.norm(self.first(x["a"] + x["b"]))))
        return self.frozen(torch.tanh(self.second(hidden)))


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_per_sample_grads_are_autograds(chunk_size):
    torch.manual_seed(0)
    model = Tied().double()
    model.norm.running_mean.normal_()
    model.drop.eval()
    x = {"a": torch.randn(7, 5).double(), "b": torch.randn(7, 5).double()}
    y = torch.randint(3, (7,))
    flags = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    found = per_sample_grads(model, F.cross_entropy, x, y, chunk_size=chunk_size)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert list(found) == list(params) == ["first.weight", "first.bias", "norm.weight", "norm.bias", "second.bias"]
    model.eval()
    for i in range(7):
        loss = F.cross_entropy(model({k: v[i : i + 1] for k, v in x.items()}), y[i : i + 1])
        for (name, p), g in zip(params.items(), torch.autograd.grad(loss, list(params.values())), strict=True):
            torch.testing.assert_close(found[name][i], g, rtol=1e-10, atol=1e-12)
            assert found[name].shape == (7, *p.shape)
            assert not found[name].requires_grad
    F.cross_entropy(model(x), y).backward()
    for name, p in params.items():
        torch.testing.assert_close(found[name].mean(0), p.grad, rtol=1e-10, atol=1e-12)


def test_per_sample_grads_of_attention_and_under_no_grad():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 2))
    x, y = torch.randn(4, 3, 8), torch.randn(4, 2)
    with torch.no_grad():
        found = per_sample_grads(model, F.mse_loss, x, y)
    model.eval()
    F.mse_loss(model(x), y).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name].mean(0), p.grad, rtol=1e-4, atol=1e-6)


def test_per_sample_grads_restores_flags_after_an_error():
    model = nn.Linear(2, 1)
    with pytest.raises(RuntimeError):
        per_sample_grads(model, F.mse_loss, torch.ones(3, 5), torch.ones(3, 1))
    assert model.training


def test_per_sample_grads_refuses():
    with pytest.raises(ValueError, match="chunk_size"):
        per_sample_grads(nn.Linear(1, 1), F.mse_loss, torch.ones(1, 1), torch.ones(1, 1), chunk_size=0)
    with pytest.raises(ValueError, match="requires_grad"):
        per_sample_grads(nn.ReLU(), F.mse_loss, torch.ones(1, 1), torch.ones(1, 1))
