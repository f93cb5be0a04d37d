"""StableEmbedding is an embedding and a layer normalization, and its weight keeps its mark."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F

from assay.nn import StableEmbedding
from assay.optim import AdamW8bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_an_embedding_and_a_normalization(dtype):
    torch.manual_seed(0)
    layer = StableEmbedding(30, 16, padding_idx=0, dtype=dtype)
    layer.norm.weight.data.normal_()
    layer.norm.bias.data.normal_()
    tokens = torch.randint(30, (4, 5))
    tokens[0, 0] = 0
    output = layer(tokens)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer.norm.weight.dtype == wide and output.dtype == dtype
    found = torch.autograd.grad(output.float().square().sum(), list(layer.parameters()))
    weight, scale, shift = (
        p.detach().to(wide).requires_grad_() for p in (layer.weight, layer.norm.weight, layer.norm.bias)
    )
    rows = F.embedding(tokens, weight, padding_idx=0)
    centred = rows - rows.mean(-1, keepdim=True)
    expected = (centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale + shift).to(dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype != torch.bfloat16 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(output, expected, **tolerance)
    gradients = torch.autograd.grad(expected.float().square().sum(), [weight, scale, shift])
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one.to(wide), other, rtol=tolerance["rtol"] * 10, atol=tolerance["atol"] * 10)
    assert (found[0][0] == 0).all()


def test_it_starts_uniform_and_normalized():
    torch.manual_seed(0)
    layer = StableEmbedding(500, 64, padding_idx=3)
    bound = (6 / 564) ** 0.5
    weight = layer.weight.detach()
    assert (
        (weight[3] == 0).all()
        and weight.abs().max() <= bound
        and weight.std() == pytest.approx(bound / 3**0.5, rel=0.02)
    )
    rows = layer(torch.arange(4, 500))
    torch.testing.assert_close(rows.mean(-1), torch.zeros(496), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows.var(-1, unbiased=False), torch.ones(496), atol=5e-3, rtol=0)
    assert (layer(torch.tensor(3)) == 0).all()
    assert list(layer.state_dict()) == ["weight", "norm.weight", "norm.bias"]


def pickled(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("change", [lambda x: x, copy.deepcopy, pickled, lambda x: x.to(torch.bfloat16)])
def test_its_weight_has_a_state_of_32_bits(change):
    layer = change(StableEmbedding(100, 64))
    optimizer = AdamW8bit(layer.parameters())
    layer(torch.arange(10)).float().square().sum().backward()
    optimizer.step()
    assert optimizer.state[layer.weight]["exp_avg"].dtype == torch.float32


def test_sparse_gradients_are_refused_by_the_optimizer():
    layer = StableEmbedding(100, 64, sparse=True)
    layer(torch.arange(10)).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        AdamW8bit(layer.parameters()).step()
