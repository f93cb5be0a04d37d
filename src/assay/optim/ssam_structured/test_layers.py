"""The implicitly sparse layers against torch's own, and their masked gradient by hand."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from assay.nn import ImplicitSparseConv2d, ImplicitSparseLinear, to_implicit_sparse
from assay.nn._contract import CHECKS, Example
from assay.nn._swap import NoEffectWarning

EXAMPLES = [
    Example(partial(ImplicitSparseLinear, 5, 3), (4, 5), nn.Linear(5, 3)),
    Example(partial(ImplicitSparseConv2d, 2, 4, 3, padding=1, bias=False), (2, 2, 5, 4), nn.Conv2d(2, 4, 3, padding=1)),
]
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
CONVOLUTIONS = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (1, 2), "padding": (2, 0), "dilation": (2, 1), "bias": False},
    {"groups": 2, "padding": "same"},
    {"groups": 4, "padding": "same", "dilation": 2, "kernel_size": (4, 3)},
    {"padding": 2, "padding_mode": "circular", "stride": 2},
    {"padding": "valid", "padding_mode": "zeros"},
    {"padding": (1, 2), "padding_mode": "reflect"},
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_in_the_exact_mode_they_are_layers_like_any(example, check):
    check(example)


def linear(**options):
    torch.manual_seed(0)
    return nn.Linear(6, 4, **options).double(), torch.randn(3, 5, 6, dtype=torch.float64)


def convolution(kernel_size=3, **options):
    torch.manual_seed(0)
    return nn.Conv2d(4, 8, kernel_size, **options).double(), torch.randn(2, 4, 7, 9, dtype=torch.float64)


PAIRS = [linear(), linear(bias=False), *(convolution(**options) for options in CONVOLUTIONS)]


def masked(plain, mask):
    layer = to_implicit_sparse(copy.deepcopy(plain))
    layer.set_mask(mask)
    layer.set_origin(False)
    return layer


def gradients(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return y, torch.autograd.grad(y, [x, *layer.parameters()], g)


@pytest.mark.parametrize("plain, x", PAIRS, ids=lambda pair: str(pair)[:40])
def test_only_the_inputs_gradient_goes_through_the_mask(plain, x):
    draw = torch.Generator().manual_seed(2)
    mask = torch.rand(plain.weight.shape, generator=draw) < 0.5
    y, (_, *exact) = gradients(plain, x)
    found, (to_input, *others) = gradients(masked(plain, mask), x)
    assert torch.equal(found, y)
    torch.testing.assert_close(others, exact, **CLOSE)
    sparse = copy.deepcopy(plain)
    sparse.weight.data *= mask
    torch.testing.assert_close(to_input, gradients(sparse, x)[1][0], **CLOSE)


@pytest.mark.parametrize("plain, x", PAIRS, ids=lambda pair: str(pair)[:40])
def test_with_a_mask_of_ones_they_are_torchs(plain, x):
    layer = masked(plain, torch.ones_like(plain.weight))
    y, expected = gradients(plain, x)
    found, given = gradients(layer, x)
    assert torch.equal(found, y)
    torch.testing.assert_close(given, expected, **CLOSE)
    for mode, mask in ((True, torch.zeros_like(plain.weight)), (False, None)):
        layer.set_mask(mask)
        layer.set_origin(mode)
        torch.testing.assert_close(gradients(layer, x)[1], expected, **CLOSE)


def test_linear_by_hand():
    plain, x = linear()
    mask = torch.rand(4, 6) < 0.5
    _, (to_input, weight, bias) = gradients(masked(plain, mask), x)
    g = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(to_input, g @ (plain.weight * mask), **CLOSE)
    torch.testing.assert_close(weight, torch.einsum("abo,abi->oi", g, x), **CLOSE)
    torch.testing.assert_close(bias, g.sum((0, 1)), **CLOSE)


@pytest.mark.parametrize("plain, x", [linear(), convolution(groups=2, stride=2)], ids=["linear", "convolution"])
def test_gradcheck(plain, x):
    layer = masked(plain, torch.ones_like(plain.weight))
    inputs = x[:1, :4].detach().requires_grad_()
    torch.autograd.gradcheck(layer, inputs)
    torch.autograd.gradgradcheck(layer, inputs)


@pytest.mark.parametrize("plain, x", [linear(), convolution(groups=2)], ids=["linear", "convolution"])
def test_single_inputs_frozen_weights_and_first_layers(plain, x):
    layer = masked(plain, torch.rand(plain.weight.shape) < 0.5)
    one = x[0, 0] if isinstance(plain, nn.Linear) else x[0]
    assert torch.equal(layer(one), plain(one))
    layer(one).sum().backward()  # the input needs no gradient
    weight = layer.weight.grad
    plain(one).sum().backward()
    torch.testing.assert_close(weight, plain.weight.grad, **CLOSE)
    layer.requires_grad_(False)
    layer(one.requires_grad_()).sum().backward()
    assert one.grad.shape == one.shape


def test_a_layer_used_twice_and_compiled():
    torch._dynamo.reset()
    plain, x = nn.Linear(6, 6).double(), torch.randn(3, 6, dtype=torch.float64)
    layer = masked(plain, torch.rand(6, 6) < 0.5)
    inner = layer(x.clone().requires_grad_())
    outer = layer(inner.tanh())
    g = 2 * outer
    through = (g @ (layer.weight * layer.mask)) * (1 - inner.tanh() ** 2)
    expected = g.t() @ inner.tanh() + through.t() @ x
    grad = torch.autograd.grad(outer.square().sum(), layer.weight)[0]
    torch.testing.assert_close(grad, expected, **CLOSE)
    for pair in (
        (masked(*[linear()[0], torch.ones(4, 6) > 0]), linear()[1]),
        (
            masked(convolution()[0], torch.rand(8, 4, 3, 3) < 0.5),
            convolution()[1],
        ),
    ):
        compiled = torch.compile(pair[0], fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(gradients(compiled, pair[1]), gradients(*pair), **CLOSE)


@pytest.mark.parametrize("plain, x", [linear(), convolution()], ids=["linear", "convolution"])
def test_autocast_reaches_the_masked_mode(plain, x):
    layer = masked(plain.float(), torch.rand(plain.weight.shape) < 0.5)
    x = x.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32
    plain.double()


def test_conversion_keeps_parameters_keys_and_outputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(100, 3)).double()
    x, before = torch.randn(2, 1, 5, 5, dtype=torch.float64), list(model.parameters())
    expected, keys = model(x), list(model.state_dict())
    assert to_implicit_sparse(model) is model
    assert [type(layer) for layer in model] == [ImplicitSparseConv2d, nn.BatchNorm2d, nn.Flatten, ImplicitSparseLinear]
    assert all(p is q for p, q in zip(model.parameters(), before, strict=True))
    model[0].set_mask(torch.ones(4, 1, 3, 3))
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), expected)
    with pytest.warns(NoEffectWarning):
        to_implicit_sparse(nn.ReLU())
    with pytest.raises(ValueError, match=r"mask.shape = \(3,\) is out of range: \(4, 1, 3, 3\)"):
        model[0].set_mask(torch.ones(3))
