"""TrAct against its closed form and the plain layers, and broken variants of its claim."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from assay.bench.evidence import FAILS, HOLDS, Bench
from assay.nn import TrAct, TrActConv1d, TrActConv2d, TrActConv3d, TrActLinear, swap, untract
from assay.nn._contract import Example
from assay.nn.functional import precondition_first_layer_grad_, tract_linear
from assay.nn.tract import claim as room
from assay.nn.tract.claim import PATCHES, claim, figure

BY_DESIGN = {"gradient": False, "second_gradient": False}
EXAMPLES = [
    Example(partial(TrActLinear, 5, 3), (4, 5), nn.Linear(5, 3), **BY_DESIGN),
    Example(partial(TrActLinear, 5, 3, bias=False, l=0.3), (4, 2, 5), nn.Linear(5, 3, bias=False), **BY_DESIGN),
    Example(partial(TrActConv1d, 2, 4, 3, groups=2), (4, 2, 9), nn.Conv1d(2, 4, 3, groups=2), **BY_DESIGN),
    Example(partial(TrActConv2d, 2, 4, 3, stride=2, padding=1), (4, 2, 6, 5), nn.Conv2d(2, 4, 3, 2, 1), **BY_DESIGN),
    Example(
        partial(TrActConv2d, 2, 3, 3, padding=1, padding_mode="reflect"),
        (3, 2, 5, 4),
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
        **BY_DESIGN,
    ),
    Example(partial(TrActConv3d, 1, 2, 2, dilation=2), (3, 1, 4, 4, 3), nn.Conv3d(1, 2, 2, dilation=2), **BY_DESIGN),
]
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)

CONVOLUTIONS = [
    nn.Conv1d(2, 4, 3, stride=2, padding=2, dilation=2),
    nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(0, 1), groups=2),
    nn.Conv2d(2, 3, (4, 2), padding="same", dilation=(1, 2), bias=False),
    nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular", groups=3),
    nn.Conv2d(3, 2, 3, padding="valid", padding_mode="reflect"),
    nn.Conv3d(2, 2, (1, 2, 3), stride=(2, 1, 1), padding=1),
]


def gradients(layer: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and the gradients of a loss with respect to the input and the parameters."""
    x = x.clone().requires_grad_()
    output = layer(x)
    (output.square().mean() + output.sin().sum()).backward()
    return output.detach(), {"input": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


def formula(grad: Tensor, rows: Tensor, l: float) -> Tensor:
    return grad @ torch.linalg.inv(rows.T @ rows / len(rows) + l * torch.eye(rows.shape[1], dtype=rows.dtype))


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.01, 100))
def test_linear_gradient_is_the_plain_one_times_the_inverse(b, n, l):
    torch.manual_seed(b)
    plain, x = nn.Linear(n, 3).double(), torch.randn(b, n, dtype=torch.float64)
    ours = TrAct(copy.deepcopy(plain), l)
    (expected, plains), (output, found) = gradients(plain, x), gradients(ours, x)
    assert torch.equal(output, expected)
    close(found["input"], plains["input"])
    close(found["bias"], plains["bias"])
    close(found["weight"], formula(plains["weight"], x, l))


@pytest.mark.parametrize("plain", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("batch", [1, 7])
def test_convolution_is_the_linear_layer_on_patches(plain, batch):
    plain, l = copy.deepcopy(plain).double(), 0.2
    x = torch.randn(batch, plain.in_channels, *(7, 6, 5)[: plain.weight.dim() - 2], dtype=torch.float64)
    ours = TrAct(copy.deepcopy(plain), l)
    (expected, plains), (output, found) = gradients(plain, x), gradients(ours, x)
    assert torch.equal(output, expected)
    close(found["input"], plains["input"])
    if plain.bias is not None:
        close(found["bias"], plains["bias"])
    # The patches, by asking the plain convolution for each value of them: a kernel with a single 1.
    inputs, kernel = plain.in_channels // plain.groups, plain.weight[0].shape
    for group, grad in enumerate(plains["weight"].chunk(plain.groups)):
        probe = copy.deepcopy(plain)
        part = x[:, group * inputs : (group + 1) * inputs]
        size = kernel.numel()
        probe.groups, probe.bias, probe.in_channels = 1, None, inputs
        probe.weight = nn.Parameter(torch.eye(size, dtype=x.dtype).view(size, *kernel))
        rows = probe(part).transpose(0, 1).flatten(1).T.detach()
        expected = formula(grad.flatten(1), rows, l)
        close(found["weight"].chunk(plain.groups)[group].flatten(1), expected)
    close(precondition_first_layer_grad_(plain, x, l).weight.grad, found["weight"])
    one = TrAct(copy.deepcopy(untract(ours)))
    close(one(x[0]), plain(x)[0])


def test_after_backward_on_a_plain_linear_layer():
    layer, x = nn.Linear(6, 3).double(), torch.randn(2, 2, 6, dtype=torch.float64)
    _, found = gradients(TrAct(copy.deepcopy(layer)), x)
    gradients(layer, x)
    close(precondition_first_layer_grad_(layer, x).weight.grad, found["weight"])
    with pytest.raises(ValueError, match=r"module.weight.grad = None is out of range"):
        precondition_first_layer_grad_(nn.Linear(6, 3), x)
    with pytest.raises(TypeError, match="module = ReLU"):
        precondition_first_layer_grad_(nn.ReLU(), x)


def test_limits():
    layer, x = nn.Linear(4, 2).double(), torch.linalg.qr(torch.randn(8, 4, dtype=torch.float64))[0] * 8**0.5
    _, plains = gradients(copy.deepcopy(layer), x)
    close(gradients(TrAct(copy.deepcopy(layer), 0.5), x)[1]["weight"], plains["weight"] / 1.5)  # white inputs
    far = gradients(TrAct(copy.deepcopy(layer), 1e8), x)[1]["weight"] * 1e8
    torch.testing.assert_close(far, plains["weight"], rtol=1e-7, atol=0)


def test_outputs_move_alike_at_any_contrast():
    x = F.normalize(torch.randn(1, 9, dtype=torch.float64)) * 10
    moves = []
    for contrast in (1, 10):
        weight = torch.zeros(1, 9, dtype=torch.float64, requires_grad=True)
        tract_linear(contrast * x, weight).sum().backward()
        moves.append((contrast * x @ weight.grad.T).item())
    assert moves[0] == pytest.approx(100 / 100.1, rel=1e-12)
    assert moves[1] == pytest.approx(moves[0], rel=0.01)


@pytest.mark.parametrize("scale", [0.0, 1.0, 255.0, 1e6])
@pytest.mark.parametrize("shape", [(32, 768), (1024, 64)])
def test_singular_and_badly_scaled_systems_are_solved(scale, shape):
    layer, x = TrAct(nn.Linear(shape[1], 4)), scale * torch.randn(shape[0], 5) @ torch.randn(5, shape[1])
    layer(x).sum().backward()
    assert layer.weight.grad.isfinite().all()
    assert (layer.weight.grad == 0).all() == (scale == 0)


def test_parameters_are_shared_and_checkpoints_fit():
    plain = nn.Conv2d(3, 4, 3)
    ours = TrAct(plain, 0.3)
    assert ours.weight is plain.weight and ours.bias is plain.bias and ours.l == 0.3
    assert ours.state_dict().keys() == plain.state_dict().keys()
    back = untract(ours)
    assert type(back) is nn.Conv2d and back.weight is plain.weight
    model = nn.Sequential(plain, nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    swap(model, nn.Conv2d, lambda name, layer: TrAct(layer) if name == "0" else layer)
    assert type(model[0]) is TrActConv2d and type(model[2]) is nn.Conv2d and not model[0].training


def test_into_a_transformer_on_patches():
    model = nn.Sequential(
        nn.Linear(12, 8), nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), nn.Linear(8, 2)
    )
    model[0] = TrAct(model[0])
    optimizer, x, y = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(8, 6, 12), torch.randint(2, (8, 6))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(x).flatten(0, 1), y.flatten()))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_what_is_not_supported_is_refused():
    for module in (nn.ReLU(), nn.ConvTranspose2d(1, 1, 3), parametrizations.weight_norm(nn.Linear(3, 2))):
        with pytest.raises(TypeError, match="is out of range: one of the classes Linear, Conv1d, Conv2d, Conv3d"):
            TrAct(module)
    with pytest.raises(TypeError, match="a layer made by TrAct"):
        untract(nn.Linear(3, 2))
    for l in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"l = {l} is out of range: > 0 and finite"):
            TrAct(nn.Linear(3, 2), l)
        with pytest.raises(ValueError, match=f"l = {l} is out of range"):
            TrActConv2d(1, 1, 3, l=l)
    layer = TrAct(nn.Linear(3, 2))
    (grad,) = torch.autograd.grad(layer(torch.randn(4, 3)).square().sum(), layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        grad.sum().backward()


def plain(layer: nn.Module) -> nn.Module:
    """The broken variant of the card: the layer as it is."""
    return layer


def test_the_claim_does_not_hold_for_the_plain_layer(monkeypatch):
    monkeypatch.setattr(room, "RATES", (0.5,))
    real, broken = (claim(Bench(), method=method, parts=(PATCHES,), seeds=3) for method in (TrAct, plain))
    assert (real.checks[0].verdict, broken.checks[0].verdict) == (HOLDS, FAILS)


def test_the_claim_runs_and_is_drawn():
    assert figure(claim(Bench(quick=True), seeds=2)) is not None
