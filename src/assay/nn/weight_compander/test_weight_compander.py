"""The compander against its formula, as a layer's parametrization, and a broken variant of its claim."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from assay.bench.arms import DEFAULT_RECIPE
from assay.bench.evidence import FAILS, HOLDS, Bench
from assay.nn import NoEffectWarning, WeightCompander, compand, compander_groups, fuse_compander, weight_compander
from assay.nn._contract import Example
from assay.nn.weight_compander.claim import claim, figure
from assay.nn.weight_compander.weight_compander import _psi, apply, compander_of

EXAMPLES = [
    Example(partial(WeightCompander, 1.5, 0.7), (4, 5)),
    Example(partial(WeightCompander, 1.5, 0.7, learnable=True, shape=(3, 1)), (4, 3, 2), gradient=False),
]
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)).double()


def data() -> Tensor:
    return torch.randn(7, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@given(st.floats(-1e6, 1e6), st.floats(0.01, 100), st.floats(0.01, 100))
def test_the_formula_its_oddness_and_its_bound(v, a, b):
    psi = WeightCompander(a, b)
    w = psi(torch.tensor([v, -v], dtype=torch.float64))
    assert w[0].item() == pytest.approx(a * math.atan(v / b), rel=1e-12, abs=1e-300) and w[0] == -w[1]
    assert w.abs().max() < a * math.pi / 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_no_latent_weight_reaches_the_bound(dtype):
    v = torch.tensor([torch.finfo(dtype).max, -torch.finfo(dtype).max, 0.0], dtype=dtype)
    for a in (0.1, 0.3, 1.0, 7.0):
        w = WeightCompander(a, 1e-3)(v)
        bound = torch.tensor(a * math.pi / 2, dtype=dtype)
        assert w.dtype == dtype and w[2] == 0
        assert w.abs().max() < bound if dtype in (torch.float32, torch.float64) else w.abs().max() <= bound


def test_derivatives_and_inverse():
    psi = WeightCompander(0.3, 0.2)
    v = torch.linspace(-4, 4, 41, dtype=torch.float64, requires_grad=True)  # up to 20 b
    slope = torch.autograd.grad(psi(v).sum(), v)[0]
    close(slope, 1.5 / (1 + (v / 0.2).square()).detach())
    torch.testing.assert_close(psi.right_inverse(psi(v)), v, rtol=1e-6, atol=1e-6)
    assert psi.right_inverse(torch.tensor(99.0)).isfinite()
    a, b = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.3, 0.2))
    torch.autograd.gradcheck(_psi, (v, a, b))


def test_the_linear_limit_is_the_plain_layer():
    plain, ours, x = net(), net(), data()
    for layer in (ours[0], ours[4]):
        s = layer.weight.std().item()
        weight_compander(layer, a=1e6 * s, b=1e6 * s)
    outputs = []
    for model in (plain, ours):
        output = model(x)
        output.square().sum().backward()
        outputs.append([output.detach()] + [p.grad for p in sorted(model.parameters(), key=lambda p: p.shape)])
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("learnable", [False, True])
def test_the_two_ways_to_start(granularity, learnable):
    plain, x = net(), data()
    kept, moved = copy.deepcopy(plain), copy.deepcopy(plain)
    options = {"granularity": granularity, "learnable": learnable}
    assert compand(kept, init="preserve", **options) == compand(moved, **options) == 2
    torch.testing.assert_close(kept(x), plain(x), rtol=1e-6, atol=1e-6)
    v = plain[4].weight
    s = v.std() if granularity == "layer" else v.std(1, keepdim=True)
    close(moved[4].weight, 2 * s * torch.atan(v / s))
    close(moved[4].parametrizations.weight.original, v)


def test_what_is_trained_and_what_is_decayed():
    plain = sum(p.numel() for p in net().parameters())
    for learnable, more in ((False, 0), (True, 2 * 2)):
        model = net()
        compand(model, learnable=learnable)
        assert sum(p.numel() for p in model.parameters()) == plain + more
        groups = compander_groups(model, 0.1)
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0][: len(groups)] and len(groups) == 1 + learnable
        assert sum(p.numel() for p in groups[0]["params"]) == plain
        buffers = [name for name, _ in model.named_buffers() if "parametrizations" in name]
        assert [name.rpartition(".")[2] for name in buffers] == ["a0", "b0"] * 2
    assert len(compander_groups(net(), 0.0)) == 1


def test_learnable_scales_have_the_formulas_gradient_over_the_root_of_their_number():
    psi, v = WeightCompander(0.5, 0.25, learnable=True), torch.randn(40, 10, dtype=torch.float64)
    a, b = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.5, 0.25))
    ours = torch.autograd.grad(psi(v).sin().sum(), list(psi.parameters()))
    theirs = torch.autograd.grad((a * torch.atan(v / b)).sin().sum(), [a, b])
    close(list(ours), [theirs[0] * 0.5 / 20, theirs[1] * 0.25 / 20])  # d/d alpha = a d/da; 20 = sqrt(400)


def test_scales_stay_positive_under_any_update():
    layer = weight_compander(nn.Linear(8, 4), learnable=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=100.0)
    for sign in (1, 1, 1, -1, -1, -1, -1, -1, -1):
        optimizer.zero_grad()
        (sign * 1e3 * layer.weight.abs().sum()).backward()
        optimizer.step()
        psi = compander_of(layer)
        assert 0 < psi.a < math.inf and 0 < psi.b < math.inf and layer.weight.isfinite().all()


def test_fusing_and_loading():
    model, x = net(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=0.1)
    compand(model)
    for _ in range(3):  # the optimizer made before still has the parameters
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    model.eval()
    fresh = net(5).eval()
    compand(fresh)
    fresh.load_state_dict(model.state_dict())
    for other in (fresh, copy.deepcopy(model)):
        close(other(x), model(x))
    before = model(x)
    assert fuse_compander(model) is model
    close(model(x), before)
    assert list(model.state_dict()) == list(net().state_dict()) and type(model[0]) is nn.Conv1d
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


@pytest.mark.parametrize("init", ["standard", "preserve"])
def test_a_shared_weight_stays_shared(init):
    one, two = nn.Linear(5, 5).double(), nn.Linear(5, 5).double()
    two.weight = one.weight
    model = nn.Sequential(one, nn.Tanh(), two)
    w, s = one.weight.detach().clone(), one.weight.std().item()
    assert compand(model, init=init) == 2
    expected = w if init == "preserve" else 2 * s * torch.atan(w / s)
    for _ in range(2):
        close(one.weight, expected)
        close(two.weight, expected)
        fuse_compander(model)
    assert one.weight is two.weight


def test_beside_other_parametrizations():
    x = torch.randn(3, 6, dtype=torch.float64)
    normed = parametrizations.weight_norm(nn.Linear(6, 4).double())
    before, w = normed(x), normed.weight.detach()
    weight_compander(normed, init="preserve")
    torch.testing.assert_close(normed(x), before, rtol=1e-6, atol=1e-6)
    top = weight_compander(parametrizations.weight_norm(nn.Linear(6, 4).double()), a=1.0, b=0.5)
    assert top.weight.abs().max() < math.pi / 2
    below = parametrizations.spectral_norm(weight_compander(nn.Linear(6, 4).double())).eval()
    assert torch.linalg.matrix_norm(below.weight, 2).item() == pytest.approx(1, abs=0.05)
    for layer in (normed, top, below):
        output = layer(x)
        close(fuse_compander(layer)(x), output)
    torch.testing.assert_close(normed.weight.detach(), w, rtol=1e-6, atol=1e-6)


def test_which_layers_are_companded():
    model = nn.ModuleDict({"embedding": nn.Embedding(9, 4), "norm": nn.LayerNorm(4)})
    with pytest.warns(NoEffectWarning):
        assert compand(model) == 0
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert compand(model, skip=["linear2"]) == 2  # linear1 and the attention's projection
    assert compander_of(model.linear1) and not compander_of(model.linear2)
    assert compand(model, skip=[model.linear2], types=(nn.Linear, nn.LayerNorm), a=1.0, b=1.0) == 2
    model(torch.randn(2, 3, 8)).sum().backward()


def test_arguments_out_of_range_are_named():
    for name, value in [("a", 0.0), ("b", -1.0), ("a", math.inf)]:
        with pytest.raises(ValueError, match=f"{name} = {value} is out of range"):
            WeightCompander(**{"a": 1.0, "b": 1.0, name: value})
    for name, value in [("granularity", "row"), ("init", "zero"), ("name", "scale")]:
        with pytest.raises(ValueError, match=f"{name} = '{value}' is out of range"):
            weight_compander(nn.Linear(3, 2), **{name: value})
    with pytest.raises(ValueError, match=r"name = 'weight' is out of range: .* not companded yet"):
        weight_compander(weight_compander(nn.Linear(3, 2)))
    flat = nn.Linear(3, 2)
    nn.init.ones_(flat.weight)
    with pytest.raises(ValueError, match=r"a = tensor\(0\..*\) is out of range"):
        weight_compander(flat)
    with pytest.raises(ValueError, match=r"weight_decay = -1 is out of range"):
        compander_groups(flat, -1)
    with pytest.raises(ValueError, match=r"gain = 0 is out of range"):
        apply(DEFAULT_RECIPE, gain=0)


def test_in_the_bench_bound_and_gain_are_in_standard_deviations():
    from types import SimpleNamespace

    from assay.bench.recipe import Budget
    from assay.bench.tasks import resolve_task

    task = resolve_task("digits(model='mlp')")
    run = SimpleNamespace(task=task, data=task.train, budget=Budget())
    torch.manual_seed(3)
    plain = [m for m in DEFAULT_RECIPE.model(run).modules() if isinstance(m, nn.Linear)]
    torch.manual_seed(3)
    ours = [m for m in apply(DEFAULT_RECIPE, bound=4.0, gain=1.6).model(run).modules() if isinstance(m, nn.Linear)]
    for before, after in zip(plain, ours, strict=True):
        psi = compander_of(after)
        torch.testing.assert_close(psi.a, 4 * before.weight.std())
        torch.testing.assert_close(psi.a / psi.b, torch.tensor(1.6))


def identity(model: nn.Module) -> nn.Module:
    """The broken variant of the card: Psi is the identity, the weights are those that are trained."""
    return model


def test_the_claim_does_not_hold_for_the_identity():
    real, broken = (claim(Bench(quick=True), method=method, reported=False) for method in (compand, identity))
    assert real.checks[3].verdict == HOLDS  # the largest weight, which a tenth of the epochs is enough for
    assert [check.verdict for check in broken.checks[1:]] == [FAILS] * 3
    assert figure(real) is not None
