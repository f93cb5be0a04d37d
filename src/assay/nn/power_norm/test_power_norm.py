"""PowerNorm against its recursions written out, PN-V, processes, masks, and a broken variant of its claim."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from assay._processes import run_on_two
from assay.bench.claims import recorded
from assay.bench.evidence import FAILS, HOLDS, Bench
from assay.catalogue import find
from assay.nn import GroupScale, PowerNorm, PowerNormV, convert_layernorm_
from assay.nn._contract import Example
from assay.nn.power_norm import claim as room
from assay.nn.power_norm.claim import BATCH, POWER, claim, figure, power

APPROXIMATE = {"gradient": False, "second_gradient": False}
EXAMPLES = [
    Example(partial(PowerNorm, 6, warmup_steps=0), (4, 3, 6), nn.LayerNorm(6), **APPROXIMATE),
    Example(partial(PowerNorm, 6, warmup_steps=5, groups=2, affine=False), (4, 6), nn.LayerNorm(6), **APPROXIMATE),
    Example(partial(PowerNorm, 4, warmup_steps=0, approx_backward=False), (3, 2, 4), nn.LayerNorm(4)),
    Example(partial(PowerNormV, 4, group_scale=False), (3, 2, 4), nn.LayerNorm(4)),
    Example(partial(GroupScale, 2), (3, 4), stateless=True),
]
close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)


def batches(count: int, *shape: int) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [
        tuple(scale * torch.randn(*shape, generator=draw, dtype=torch.float64) for scale in (3, 1))
        for _ in range(count)
    ]


def through(layer: nn.Module, x: Tensor, upstream: Tensor, **options: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x, **options)
    (y * upstream).sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("quirks", [False, True])
@pytest.mark.parametrize("warmup", [0, 1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_the_recursions(quirks, warmup, masked):
    norm = PowerNorm(4, warmup_steps=warmup, group_scale=False, alpha_bkw=0.8, reference_quirks=quirks).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1, 2, -1]))
        norm.bias.fill_(0.3)
    psi2, nu, eps = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), 1e-5
    mask = torch.zeros(5, 3, dtype=torch.bool)
    mask[3:, 1:] = masked
    for t, (x, upstream) in enumerate(batches(6, 5, 3, 4), start=1):
        y, grad = through(norm, x, upstream, **({"padding_mask": mask} if masked else {}))
        real = x[~mask]
        batch = real.square().mean(0)
        used = batch if t <= warmup else psi2
        xhat = x / (used + eps).sqrt()
        close(y, norm.weight * xhat + 0.3)
        g = norm.weight.detach() * upstream
        close(grad, (g - nu * xhat) / ((batch if quirks else used) + eps).sqrt())
        close(norm.weight.grad, (upstream * xhat).sum((0, 1)))
        close(norm.bias.grad, upstream.sum((0, 1)))
        counted = torch.ones_like(mask) if quirks else ~mask
        gamma, lam = xhat[counted].square().mean(0), (g * xhat)[counted].mean(0)
        nu = nu * (1 - 0.2 * gamma) + 0.2 * lam
        if t < warmup:
            psi2 = psi2 * (t - 1) / t + batch / t
        if t >= warmup or quirks:
            psi2 = 0.9 * psi2 + 0.1 * batch
        close(norm.nu, nu)
        close(norm.psi2, psi2)
    assert norm.step == 6
    close(norm.eval()(x), norm.weight * x / (psi2 + eps).sqrt() + 0.3)


def test_group_scale_comes_first():
    x = batches(1, 5, 6)[0][0]
    scaled = (
        x.unflatten(-1, (3, 2)) / (x.unflatten(-1, (3, 2)).square().mean(-1, keepdim=True) + 1e-5).sqrt()
    ).flatten(1)
    close(GroupScale(3)(x), scaled)
    with_scale, without = PowerNorm(6, groups=3).double(), PowerNorm(6, group_scale=False).double()
    close(with_scale(x), without(scaled))


def test_preset_to_the_batch_it_is_the_variant_without_running_values():
    x, upstream = batches(1, 7, 4)[0]
    options = {"group_scale": False, "alpha_fwd": 0.0}
    power, plain = PowerNorm(4, warmup_steps=0, alpha_bkw=0.0, **options).double(), PowerNormV(4, **options).double()
    power.psi2.copy_(x.square().mean(0))
    for _ in range(2):  # the second time nu is that of the batch
        (y, grad), (expected, exact) = through(power, x, upstream), through(plain, x, upstream)
    close(y, expected)
    torch.testing.assert_close(grad, exact, rtol=1e-5, atol=1e-5)  # up to eps over psi2


def test_no_mean_is_subtracted_and_scales_cancel():
    x = batches(1, 9, 4)[0][0]
    norm = partial(PowerNormV, 4, eps=1e-14, group_scale=False)
    close(norm().double()(7 * x), norm().double()(x))
    assert not torch.allclose(norm().double()(x + 1), norm().double()(x))


def test_limits_of_both_recursions():
    x, upstream = batches(1, 50, 4)[0]
    norm = PowerNorm(4, warmup_steps=0, group_scale=False, eps=1e-14).double()
    batch, gaps = x.square().mean(0), []
    for _ in range(400):
        through(norm, x, upstream)
        gaps.append((norm.psi2 - batch).abs())
    close(gaps[9] / gaps[8], torch.full((4,), 0.9, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    xhat = x / batch.sqrt()
    close(norm.nu, (upstream * xhat).mean(0) / xhat.square().mean(0))
    _, grad = through(norm, x, upstream)
    close((grad * xhat).mean(0), torch.zeros(4, dtype=torch.float64))


def test_evaluation_leaves_everything_as_it_is_and_tokens_alone():
    norm = PowerNorm(4, warmup_steps=2).double()
    for x, upstream in batches(4, 3, 5, 4):
        through(norm, x, upstream)
    before = copy.deepcopy(norm.state_dict())
    whole = norm.eval()(x)
    assert torch.equal(norm(x[1:2, 3:4]), whole[1:2, 3:4])
    through(norm, x, upstream)
    torch.testing.assert_close(dict(norm.state_dict()), dict(before), rtol=0, atol=0)


def test_padding_is_irrelevant():
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = True
    one, other = (PowerNorm(4, warmup_steps=1).double() for _ in range(2))
    for x, upstream in batches(3, 3, 5, 4):
        upstream = upstream * ~mask[..., None]
        moved = torch.where(mask[..., None], 100.0, x)
        (y, grad), (y2, grad2) = (
            through(one, x, upstream, padding_mask=mask),
            through(other, moved, upstream, padding_mask=mask),
        )
        close(y[~mask], y2[~mask])
        close(grad[~mask], grad2[~mask])
    close(dict(one.state_dict()), dict(other.state_dict()))
    through(one, x, upstream, padding_mask=torch.ones_like(mask))  # nothing real: nothing learned
    close(
        {k: v for k, v in one.state_dict().items() if k != "step"},
        {k: v for k, v in other.state_dict().items() if k != "step"},
    )


def test_two_forward_passes_before_one_backward():
    (x, upstream), (x2, _), _ = batches(3, 5, 4)
    norm = PowerNorm(4, warmup_steps=0).double()
    through(norm, x2, upstream)
    lonely = copy.deepcopy(norm)
    leaf = x.clone().requires_grad_()
    y = norm(leaf)
    norm(x2)
    (y * upstream).sum().backward()
    close(leaf.grad, through(lonely, x, upstream)[1])


def test_gradients_stay_bounded_on_heavy_tails():
    draw = torch.distributions.StudentT(torch.tensor(1.5, dtype=torch.float64))
    torch.manual_seed(0)
    norm, largest = PowerNorm(8, warmup_steps=50).double(), 0.0
    for _ in range(500):
        _, grad = through(norm, draw.sample((64, 8)), torch.randn(64, 8, dtype=torch.float64))
        largest = max(largest, grad.norm().item())
    assert largest < 100 * (64 * 8) ** 0.5


SYNCHRONIZED = """
from assay.nn import PowerNorm
torch.manual_seed(0)
x, upstream = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
here = slice(0, 4) if rank == 0 else slice(4, 6)
alone, shared = PowerNorm(4, warmup_steps=1).double(), PowerNorm(4, warmup_steps=1, sync=True).double()
ddp = torch.nn.parallel.DistributedDataParallel(shared, broadcast_buffers=False)
for _ in range(3):
    whole, part = x.clone().requires_grad_(), x[here].clone().requires_grad_()
    y, y_part = alone(whole), ddp(part)
    (y * upstream).sum().backward()
    (y_part * upstream[here]).sum().backward()
    torch.testing.assert_close(y_part, y[here])
    torch.testing.assert_close(part.grad, whole.grad[here])
torch.testing.assert_close(dict(shared.state_dict()), dict(alone.state_dict()))
"""


def test_synchronized_over_processes_it_is_one_batch(tmp_path):
    run_on_two(SYNCHRONIZED, tmp_path)


def test_conversion_of_a_transformer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    with torch.no_grad():
        model.layers[0].norm1.weight.fill_(2)
    assert convert_layernorm_(model, partial(PowerNorm, warmup_steps=1, groups=2)) is model
    norms = [m for m in model.modules() if isinstance(m, PowerNorm)]
    assert len(norms) == 4 and (norms[0].weight == 2).all()
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(4, 5, 8)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append((model(x) - x.flip(-1)).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert model.eval()(x).isfinite().all()
    with pytest.raises(ValueError, match=r"normalized_shape = \(3, 4\) is out of range: one dimension"):
        convert_layernorm_(nn.Sequential(nn.LayerNorm((3, 4))), PowerNorm)


def test_arguments_out_of_range_are_named():
    for name, value in [("num_features", 0), ("eps", 0.0), ("alpha_fwd", 1.0), ("alpha_bkw", -0.1), ("groups", 4)]:
        with pytest.raises(ValueError, match=f"{name} = {value} is out of range"):
            PowerNorm(**{"num_features": 6, name: value})
    with pytest.raises(ValueError, match="warmup_steps = -1 is out of range"):
        PowerNorm(6, warmup_steps=-1)
    with pytest.raises(ValueError, match=r"input of shape \(3, 5\): \(\.\.\., C\) with C = 6"):
        PowerNorm(6)(torch.randn(3, 5))
    with pytest.raises(ValueError, match="padding_mask of shape"):
        PowerNorm(6)(torch.randn(2, 3, 6), torch.zeros(3, 2, dtype=torch.bool))


def test_the_claim_does_not_hold_for_the_batchs_own_statistics(monkeypatch):
    # So slow that the statistics hardly drift: what is left is how they vary from batch to batch.
    short = {"STEPS": 40, "WATCHED": 20, "WARMUP": 5, "UNSEEN": 16, "RATES": {BATCH: 1e-5, POWER: 1e-5}}
    for name, value in short.items():
        monkeypatch.setattr(room, name, value)
    real, broken = (
        claim(Bench(), method=method, arms=(BATCH, POWER), seeds=3) for method in (power, partial(PowerNormV, groups=4))
    )
    assert (real.checks[1].verdict, broken.checks[1].verdict) == (HOLDS, FAILS)


def test_the_claim_is_drawn():
    evidence, _ = recorded(find("power-norm"))
    assert figure(evidence) is not None
