"""GradNormLoRPLinear against its formula, and the contract of layers."""

import copy
import functools
import io

import pytest
import torch
from torch import nn

from assay.nn import GradNormLoRPLinear
from assay.nn import _contract as layers

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
LAYER_INPUT = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LAYER = layers.Example(functools.partial(GradNormLoRPLinear, nn.Linear(6, 4), 2), (5, 6), gradient=False)


# These two ask for the gradients of all parameters, and here the base is frozen.
OWN = (layers.survives_saving_and_copying, layers.compiles_to_one_graph)


@pytest.mark.parametrize("check", [c for c in layers.CHECKS if c not in OWN], ids=lambda check: check.__name__)
def test_the_layer_satisfies_the_contract_of_layers(check):
    check(LAYER)


def test_the_layer_can_be_saved_copied_and_compiled_to_one_graph():
    layer, fresh, file = LAYER.layer(), LAYER.make(dtype=torch.float64), io.BytesIO()
    fresh.load_state_dict(layer.state_dict())
    torch.save(layer, file)
    file.seek(0)
    compiled = copy.deepcopy(layer)
    compiled.compile(fullgraph=True, backend="aot_eager_decomp_partition")

    def step(layer):
        trained = [p for p in layer.parameters() if p.requires_grad]
        y = layer(LAYER_INPUT)
        return [y.detach(), *torch.autograd.grad(y.sin().sum(), trained)]

    for other in (fresh, copy.deepcopy(layer), torch.load(file, weights_only=False), compiled):
        torch.testing.assert_close(step(other), step(layer), **CLOSE)


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_begins_as_its_base_and_merges_into_one(bias):
    base = nn.Linear(6, 4, bias=bias)
    x, layer = torch.randn(2, 3, 6), GradNormLoRPLinear(base, rank=2, alpha=4)
    torch.testing.assert_close(layer(x), base(x), rtol=1e-6, atol=1e-6)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {
        "lora_A", "lora_B", "lora_magnitude_vector"
    }  # fmt: skip
    with torch.no_grad():
        for p in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            p.add_(torch.randn_like(p))
    merged = layer.merge()
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged(x), layer(x), rtol=1e-5, atol=1e-5)
    W = base.weight + 2 * layer.lora_B @ layer.lora_A
    W = layer.lora_magnitude_vector[:, None] * W / W.norm(dim=1, keepdim=True)
    torch.testing.assert_close(merged.weight, W, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged.weight.norm(dim=1), layer.lora_magnitude_vector.abs(), rtol=1e-5, atol=1e-5)


def test_the_norm_is_a_constant_in_the_gradient():
    torch.manual_seed(0)
    layer = GradNormLoRPLinear(nn.Linear(6, 4, bias=False).double(), rank=2)
    with torch.no_grad():
        layer.lora_B.normal_()
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    found = torch.autograd.grad((layer(x) * y).sum(), [layer.lora_A, layer.lora_B, layer.lora_magnitude_vector])
    dW, c = y.T @ x, layer.row_scale().detach()[:, None]
    expected = [8 * layer.lora_B.T @ (c * dW), 8 * (c * dW) @ layer.lora_A.T]
    V = layer.direction().detach()
    expected.append((dW * V).sum(1) / V.norm(dim=1))
    torch.testing.assert_close(found, tuple(x.detach() for x in expected), **CLOSE)


def test_dropout_acts_on_the_update_in_training_only():
    layer = GradNormLoRPLinear(nn.Linear(6, 4), rank=2, dropout=0.5)
    x = torch.ones(1000, 6)
    torch.testing.assert_close(layer(x), layer.base(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        layer.lora_B.normal_()
    assert layer(x).std(0).min() > 0
    assert layer.eval()(x).std(0).max() < 1e-6


def test_bad_arguments_are_refused_by_name():
    for option, value in (("rank", 0), ("alpha", 0.0), ("dropout", 1.0)):
        with pytest.raises(ValueError, match=f"{option} = .* is out of range"):
            GradNormLoRPLinear(nn.Linear(3, 2), **{option: value})
    with pytest.raises(TypeError, match=r"base = .* is out of range"):
        GradNormLoRPLinear(nn.Conv1d(3, 2, 1))
