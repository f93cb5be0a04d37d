"""Three ways to a single example's gradient norm, over layers of every kind: they give one number."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from assay.data import grand_scores
from assay.data._grad_norms import GhostNorms


def close(scores, expected, tolerance):
    np.testing.assert_allclose(scores.numpy(), expected, rtol=tolerance, atol=1e-12)


def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 12, bias=False), nn.BatchNorm1d(12), nn.ReLU(inplace=True), nn.Linear(12, 4)
    )


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2),
        nn.GroupNorm(4, 8),
        nn.GELU(),
        nn.Conv2d(8, 8, (4, 3), padding="same", padding_mode="circular", groups=8),
        nn.Conv2d(8, 6, 1, padding="valid"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


class Tokens(nn.Module):
    """Embedding, normalization over the last dimension, and a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 8, padding_idx=0)
        self.norm, self.scale = nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-6)
        self.twice, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, images):
        tokens = (images.flatten(1)[:, :12].abs() * 4).long().clamp(max=8)
        hidden = self.norm(self.embedding(tokens))
        hidden = hidden + torch.tanh(self.twice(torch.tanh(self.twice(hidden))))
        return self.head(self.scale(hidden).mean(1))


class Shapes(nn.Module):
    """Convolutions over one and three dimensions, and a wide layer on few positions."""

    def __init__(self):
        super().__init__()
        self.line, self.cube = nn.Conv1d(8, 3, 3, stride=2), nn.Conv3d(1, 4, 2, padding=(1, 0, 1), dilation=2)
        self.wide = nn.Linear(32, 16)

    def forward(self, images):
        cube = self.cube(images.reshape(len(images), 1, 4, 4, 4)).flatten(2).mean(2)
        rest = self.line(images[:, 0]).mean((1, 2)) + torch.tanh(self.wide(images.view(-1, 2, 32))).mean((1, 2))
        return cube * rest[:, None]


def images(model, n=17):
    """Images for a model whose batch normalization has seen some data."""
    torch.manual_seed(3)
    model = model.double().train()
    with torch.no_grad():
        model(2 * torch.randn(32, 1, 8, 8, dtype=torch.double) + 1)
    return TensorDataset(torch.randn(n, 1, 8, 8, dtype=torch.double), torch.randint(4, (n,)))


@pytest.mark.parametrize("make", [mlp, cnn, Tokens, Shapes])
def test_three_methods_agree_and_ghost_needs_no_gradient(make):
    torch.manual_seed(0)
    model = make()
    data = images(model)
    expected = grand_scores(model, data, method="loop")
    close(grand_scores(model, data, method="vmap"), expected.numpy(), 1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(grand_scores(model, data, method="ghost", batch_size=5), expected.numpy(), 1e-10)
    assert GhostNorms(model).rest == []


def test_methods_agree_in_single_precision():
    torch.manual_seed(0)
    model = cnn()
    data = images(model)
    model, data = model.float(), TensorDataset(data.tensors[0].float(), data.tensors[1])
    expected = grand_scores(model, data, method="loop").numpy()
    for method in ("vmap", "ghost"):
        close(grand_scores(model, data, method=method), expected, 1e-5)


class Odd(nn.Module):
    """What has no closed form: a parameter of the model itself, a transposed convolution, tied weights, attention."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(8))
        self.up = nn.ConvTranspose2d(1, 2, 2)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, images):
        hidden = self.up(images).mean(1)[:, :8, :8] + self.offset
        hidden = self.second(torch.tanh(self.first(hidden)))
        return self.head(self.attention(hidden, hidden, hidden, need_weights=False)[0].mean(1))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_ghost_takes_the_way_of_vmap_where_there_is_no_closed_form():
    torch.manual_seed(0)
    model = Odd().double()
    data = images(model)
    ghost = GhostNorms(model)
    assert ghost.layers == [model.head]
    names = {id(p): name for name, p in model.named_parameters()}
    assert {"offset", "up.weight", "first.weight", "second.bias"} <= {names[id(p)] for p in ghost.rest}
    close(grand_scores(model, data, method="ghost"), grand_scores(model, data, method="loop").numpy(), 1e-10)


class Hidden(nn.Module):
    """Uses its layer's weight outside the layer's call as well, where no hook can see it."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, images):
        flat = images.flatten(1)
        return self.head(torch.tanh(self.layer(flat)) + flat @ self.layer.weight)


class SequenceFirst(nn.Module):
    """Its layer's first dimension is the position, not the example."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, images):
        return self.head(torch.tanh(self.layer(images[:, 0].transpose(0, 1))).mean(0))


@pytest.mark.parametrize("make", [Hidden, SequenceFirst])
@pytest.mark.parametrize("n", [8, 17])
def test_ghost_notices_what_its_hooks_cannot_see(make, n):
    torch.manual_seed(0)
    model = make()
    data = images(model, n)
    with pytest.warns(UserWarning, match="do not add up"):
        scores = grand_scores(model, data, method="ghost")
    close(scores, grand_scores(model, data, method="loop").numpy(), 1e-10)
