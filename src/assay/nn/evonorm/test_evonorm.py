"""The six layers against the paper's formulas, and their conversion from batch normalization."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.recipe import Budget
from assay.nn import (
    EvoNormB0,
    EvoNormB1,
    EvoNormB2,
    EvoNormS0,
    EvoNormS1,
    EvoNormS2,
    convert_bn_act_,
    evonorm,
)
from assay.nn._contract import Example, step
from assay.nn._swap import NoEffectWarning
from assay.nn.evonorm.evonorm import apply
from assay.nn.evonorm.layers import LAYERS
from assay.nn.evonorm_search import GraphLayer, LayerGraph

BATCH, SAMPLE = ("B0", "B1", "B2"), ("S0", "S1", "S2")
EXAMPLES = [
    Example(partial(EvoNormB0, 2), (3, 2, 2, 3), nn.BatchNorm2d(2)),
    Example(partial(EvoNormB0, 2, nonlinear=False), (3, 2, 2, 3), nn.BatchNorm2d(2)),
    Example(partial(EvoNormB1, 2, momentum=0.3), (3, 2, 4), nn.BatchNorm1d(2)),
    Example(partial(EvoNormB2, 2), (2, 2, 2, 1, 3), nn.BatchNorm3d(2)),
    Example(partial(EvoNormS0, 4, groups=2), (3, 4, 2, 2), nn.BatchNorm2d(4)),
    Example(partial(EvoNormS1, 4, group_size=4), (3, 4), nn.BatchNorm1d(4)),
    Example(partial(EvoNormS2, 4, groups=2), (2, 4, 2, 1, 2), nn.BatchNorm3d(4)),
    Example(partial(EvoNormS2, 4, groups=2, nonlinear=False), (2, 4, 3), nn.GroupNorm(2, 4)),
    Example(partial(GraphLayer, LayerGraph.from_name("BN-ReLU"), 2), (3, 2, 2, 2)),
    Example(partial(GraphLayer, LayerGraph.from_name("S0"), 4, groups=2), (2, 4, 2, 2)),
]
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


def normal(*shape: int) -> Tensor:
    return 2 * torch.randn(shape, dtype=torch.float64) + 0.5


def layer_of(name: str, channels: int = 4, **options) -> nn.Module:
    """In float64, its parameters away from their first values."""
    torch.manual_seed(1)
    layer = evonorm(name, channels, **({"groups": 2} if name in SAMPLE else {}), **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def formula(name: str, layer: nn.Module, x: Tensor, batch_var: Tensor) -> Tensor:
    """Element by element as the paper writes it."""
    y = torch.empty_like(x)
    eps = {"B0": 1e-3}.get(name, 1e-5)
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            a, group = x[b, c], x[b, c // 2 * 2 : c // 2 * 2 + 2]
            std_batch = (batch_var[c] + eps).sqrt()
            std, rms = (a.var(correction=0) + eps).sqrt(), (a.square().mean() + eps).sqrt()
            if name == "B0":
                z = a / torch.maximum(std_batch, layer.v[c] * a + std)
            elif name == "B1":
                z = a / torch.maximum(std_batch, (a + 1) * rms)
            elif name == "B2":
                z = a / torch.maximum(std_batch, rms - a)
            else:
                v = layer.v[c] if name == "S0" else 1.0
                squares = group.square().mean() if name == "S2" else group.var(correction=0)
                z = a * torch.sigmoid(v * a) / (squares + eps).sqrt()
            y[b, c] = z * layer.weight[c] + layer.bias[c]
    return y


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("space", [(3, 5), (7,), (2, 3, 2)])
def test_the_formula_twice_in_training_and_in_evaluation(name, space):
    layer, running = layer_of(name), torch.ones(4, dtype=torch.float64)
    for training in (True, True, False):
        layer.train(training)
        x = normal(3, 4, *space)
        values = x.transpose(0, 1).flatten(1)
        var = values.var(1, correction=0) if training else running
        parameters = list(layer.parameters())
        if training and name in BATCH:
            running = 0.9 * running + 0.1 * values.var(1)
            expected = step(
                lambda t: formula(name, layer, t, t.transpose(0, 1).flatten(1).var(1, correction=0)), x, parameters
            )
        else:
            expected = step(lambda t, var=var: formula(name, layer, t, var), x, parameters)
        close(step(layer, x, parameters), expected)
    if name in BATCH:
        close(layer.running_var, running)


@pytest.mark.parametrize("name", LAYERS)
def test_without_the_nonlinearity_it_is_the_affine_map(name):
    layer = layer_of(name, nonlinear=False)
    x = normal(3, 4, 2, 2)
    close(layer(x), x * layer.weight.view(4, 1, 1) + layer.bias.view(4, 1, 1))
    assert [key for key, _ in layer.named_parameters()] == ["weight", "bias"]
    assert name not in BATCH or layer.running_var.eq(1).all()


@pytest.mark.parametrize("name", SAMPLE)
def test_samples_do_not_meet(name):
    layer, x = layer_of(name), normal(4, 4, 3, 3)
    whole = layer(x)
    assert torch.equal(layer.eval()(x), whole)
    other = torch.cat([x[:1], 100 * normal(3, 4, 3, 3)])
    assert torch.equal(layer(other)[0], whole[0])


def test_special_cases():
    x = normal(3, 4, 3, 3)
    s0 = evonorm("S0", 4, groups=1).double()
    nn.init.zeros_(s0.v)
    close(s0(x), 0.5 * x / (x.flatten(1).var(1, correction=0) + 1e-5).sqrt().view(3, 1, 1, 1))
    assert not torch.allclose(layer_of("S1")(3 * x), layer_of("S1")(x))
    b0 = evonorm("B0", 4, momentum=0.0).double().eval()
    nn.init.zeros_(b0.v)
    b0.running_var.fill_(1e4)
    close(b0(x), x / (1e4 + 1e-3) ** 0.5)  # the instance's deviation is far smaller


def test_the_maximum_is_taken_element_by_element():
    b2 = evonorm("B2", 1).double().eval()  # running variance 1
    x = torch.tensor([[[-3.0, -1.0, 0.5, 2.0]]], dtype=torch.float64)
    rms = (x.square().mean() + 1e-5).sqrt()
    one = torch.tensor(1 + 1e-5, dtype=torch.float64).sqrt()
    denominators = torch.stack([rms + 3, rms + 1, torch.maximum(rms - 0.5, one), one])
    close(b2(x).flatten(), x.flatten() / denominators)
    for sign in (1, -1):
        y = b2(sign * x.abs())
        assert (y * sign > 0).all()
    assert y.abs().max() < 1  # the left branch bends large negative values


@pytest.mark.parametrize("name", LAYERS)
def test_half_precision_has_its_moments_in_float32(name):
    layer = layer_of(name).float()
    x = (300 * torch.randn(2, 4, 8, 8)).half()  # squares that float16 does not hold
    y = layer(x)
    assert y.dtype == torch.float16 and y.isfinite().all()
    torch.testing.assert_close(y, layer(x.float()).half())


@pytest.mark.parametrize("name", LAYERS)
def test_channels_last_stays_so(name):
    layer, x = layer_of(name), normal(2, 4, 3, 5)
    y = layer(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    close(y.contiguous(), layer(x))


def test_arguments_out_of_range_are_named():
    for name, options in [("num_features", {"num_features": 0}), ("eps", {"eps": 0.0}), ("momentum", {"momentum": 2})]:
        with pytest.raises(ValueError, match=f"{name} = .* is out of range"):
            EvoNormB1(**{"num_features": 4, **options})
    for name, value in [("groups", 3), ("groups", 0), ("group_size", 3), ("group_size", 0)]:
        with pytest.raises(ValueError, match=f"{name} = {value} is out of range: a divisor of num_features = 4"):
            EvoNormS2(4, **{name: value})
    with pytest.raises(ValueError, match="groups = 32 is out of range"):
        EvoNormS0(16)
    with pytest.raises(ValueError, match="name = 'B3' is out of range: B0 or B1"):
        evonorm("B3", 4)
    with pytest.raises(ValueError, match=r"input of shape \(2, 4\): .* at least one dimension after C"):
        EvoNormB0(4)(torch.randn(2, 4))
    with pytest.raises(ValueError, match="with C = 4 is wanted"):
        EvoNormS0(4, 2)(torch.randn(2, 3, 4, 4))
    with pytest.raises(ValueError, match="one value per channel in training"):
        EvoNormB0(4)(torch.randn(1, 4, 1, 1))


class Block(nn.Module):
    """A residual block whose activation module stands at two places, as in torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


class Functional(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())))


def test_pairs_in_a_chain_become_one_layer():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.BatchNorm2d(4), nn.Tanh()).double()
    with torch.no_grad():
        model[1].weight.fill_(2)
        model[1].running_var.fill_(3)
    weight = model[1].weight
    assert convert_bn_act_(model.eval(), "B0") is model
    assert [type(m).__name__ for m in model] == ["Conv2d", "EvoNormB0", "Identity", "EvoNormB0", "Tanh"]
    assert model[1].nonlinear and not model[3].nonlinear and not model[1].training
    assert model[1].weight is weight and model[1].running_var.eq(3).all() and model[1].v.dtype == torch.float64
    assert type(convert_bn_act_(nn.BatchNorm2d(4), "B1")) is EvoNormB1


@pytest.mark.parametrize("name", ["B0", "S0"])
def test_pairs_in_a_forward_pass_become_one_layer(name):
    torch.manual_seed(0)
    norm = partial(evonorm, name, **({"group_size": 2} if name == "S0" else {}))
    model = nn.Sequential(nn.Conv2d(1, 4, 1), Block(), Functional()).double()
    before, x = copy.deepcopy(model), normal(2, 1, 5, 5)
    assert convert_bn_act_(model, norm) is model
    for block, last in ((1, False), (2, True)):
        for place, nonlinear in (("bn1", True), ("bn2", last)):
            setattr(before[block], place, norm(4, nonlinear=nonlinear).double())
    state = {key: value for key, value in before.state_dict().items() if key in model.state_dict()}
    model.load_state_dict(state)
    hidden = before[0](x)
    inner = before[1]
    hidden = (inner.bn2(inner.conv2(inner.bn1(inner.conv1(hidden)))) + hidden).relu()
    inner = before[2]
    close(model(x), inner.bn2(inner.conv2(inner.bn1(inner.conv1(hidden)))))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = model(x).square().mean()
    start.backward()
    optimizer.step()
    assert model(x).square().mean() < start


class Untraceable(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


def test_what_cannot_be_converted_is_left_alone():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), Untraceable())
    with pytest.raises(ValueError, match="2 of class Untraceable cannot be traced"):
        convert_bn_act_(model, "B0")
    assert type(model[0]) is nn.BatchNorm2d and type(model[1]) is nn.ReLU
    with pytest.warns(NoEffectWarning):
        convert_bn_act_(nn.Sequential(nn.Linear(2, 2)), "B0")


def test_in_the_bench_it_takes_the_place_of_pairs():
    from types import SimpleNamespace

    from assay.bench.arms import DEFAULT_RECIPE
    from assay.bench.tasks import resolve_task

    task = resolve_task("digits")
    run = SimpleNamespace(task=task, data=task.train, budget=Budget())
    for name, kind in (("B0", EvoNormB0), ("S0", EvoNormS0)):
        layers = [m for m in apply(DEFAULT_RECIPE, name=name).model(run).modules() if isinstance(m, kind)]
        assert len(layers) == 3 and all(layer.nonlinear for layer in layers)
    with pytest.raises(ValueError, match="name = 'X' is out of range"):
        apply(DEFAULT_RECIPE, name="X")
