"""Stable-SPAM against the paper's formulas number by number, its parts, and its invariants."""

import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from assay.bench import Bench
from assay.optim import StableSPAM, _rule, adaclip, adagn
from assay.optim._contract import gradients, parameters, same, walk
from assay.optim.stable_spam.claim import claim, fake_quant_int4

DISTRIBUTED = [
    (StableSPAM, {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3}),
    (StableSPAM, {"lr": 0.01, "gamma3": 0.5, "amsgrad": True, "total_steps": 4, "reset_interval": 3, "eps": 1e-3}),
]
CLOSE = {"rtol": 1e-10, "atol": 1e-11}


def processed(grads, gamma1=0.7, gamma2=0.9, gamma3=0.999, eps=1e-8):
    """AdaClip and AdaGN of a list of gradients, by the paper's formulas."""
    T = mu = nu = 0.0
    for t, g in enumerate(grads, start=1):
        biggest = g.abs().max().item()
        T = gamma3 * T + (1 - gamma3) * biggest
        That = T / (1 - gamma3**t)
        # Within rounding of the threshold nothing is clipped: the first gradient is the case.
        g = torch.where(g.abs() > That * (1 + 1e-12), g * That / biggest, g)
        n = g.square().sum().sqrt().item()
        mu, nu = gamma1 * mu + (1 - gamma1) * n, gamma2 * nu + (1 - gamma2) * n**2
        yield g / n * (mu / (1 - gamma1**t)) / (math.sqrt(nu / (1 - gamma2**t)) + eps) if n else g


def by_hand(
    params, steps, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, gamma1=0.7, gamma2=0.9, gamma3=0.999,
    reset_interval=1000, total_steps=None, eta_min=0.5, amsgrad=False,
):  # fmt: skip
    """The method, tensor by tensor; gradients come from the same stream as in ``walk``."""
    params = [nn.Parameter(p.detach().clone()) for p in params]
    state = [{"T": 0.0, "mu": 0.0, "nu": 0.0, "k": 0, "m": 0 * p, "v": 0 * p, "top": 0 * p} for p in params]
    with torch.no_grad():
        for step in gradients(params, steps):
            t, s = step + 1, 1.0
            if total_steps:
                s = eta_min + (1 - eta_min) * (1 + math.cos(math.pi * min(t, total_steps + 1) / (total_steps + 1))) / 2
            b1, b2, g1 = betas[0] * s, betas[1], (betas[0] if gamma1 is None else gamma1) * s
            for p, memory in zip(params, state, strict=True):
                if p.numel() == 0:
                    continue
                p *= 1 - lr * weight_decay
                g, biggest = p.grad, p.grad.abs().max()
                memory["T"] = gamma3 * memory["T"] + (1 - gamma3) * biggest
                That = memory["T"] / (1 - gamma3**t)
                g = torch.where(g.abs() > That * (1 + 1e-12), g * That / biggest, g)
                n = g.square().sum().sqrt()
                memory["mu"] = g1 * memory["mu"] + (1 - g1) * n
                memory["nu"] = gamma2 * memory["nu"] + (1 - gamma2) * n**2
                g = g / n * memory["mu"] / (1 - g1**t) / ((memory["nu"] / (1 - gamma2**t)).sqrt() + eps)
                if reset_interval and t % reset_interval == 0:
                    memory |= {"k": 0, "m": 0 * p, "v": 0 * p, "top": 0 * p}
                memory["k"] += 1
                memory["m"] = b1 * memory["m"] + (1 - b1) * g
                memory["v"] = b2 * memory["v"] + (1 - b2) * g**2
                memory["top"] = torch.maximum(memory["top"], memory["v"])
                v = memory["top"] if amsgrad else memory["v"]
                k = memory["k"]
                p -= lr / (1 - b1**k) * memory["m"] / (v.sqrt() / math.sqrt(1 - b2**k) + eps)
    return params


@pytest.mark.parametrize("options", [
    {},
    {"lr": 0.05, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.3},
    {"gamma3": 0.5, "gamma1": None, "gamma2": 0.99},
    {"gamma3": 0.0, "gamma1": 0.0, "gamma2": 0.0, "betas": (0.0, 0.5)},
    {"gamma3": 0.9, "reset_interval": 3},
    {"gamma3": 0.9, "reset_interval": 1, "amsgrad": True},
    {"reset_interval": 4, "amsgrad": True, "betas": (0.9, 0.5)},
    {"total_steps": 5, "eta_min": 0.2, "reset_interval": None},
    StableSPAM.preset("bf16"),
    StableSPAM.preset("4bit"),
])  # fmt: skip
def test_trajectory_is_the_formula(options):
    same(walk(StableSPAM, parameters(), steps=8, **options), by_hand(parameters(), 8, **options), **CLOSE)


def stream(seed, steps=12, shape=(5, 4), spike=None):
    generator = torch.Generator().manual_seed(seed)
    grads = list(torch.randn(steps, *shape, generator=generator, dtype=torch.float64))
    return [1e4 * g if step == spike else g for step, g in enumerate(grads)]


def path_of(grads, start=None, **options):
    """Where a parameter goes with the given gradients, and its optimizer."""
    p = nn.Parameter(torch.zeros_like(grads[0]) if start is None else start.clone())
    optimizer, path = StableSPAM([p], **options), [p.detach().clone()]
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
        assert torch.equal(p.grad, grad) or grad.isnan().any(), "the gradient was written"
        path.append(p.detach().clone())
    return torch.stack(path), optimizer


def test_its_parts_are_the_functions():
    """Adam on what adaclip and adagn make of the gradients is the optimizer, and they are the formula."""
    grads, clip, norm, found = stream(0, spike=7), None, None, []
    for g in grads:
        before = g.clone()
        clipped, clip = adaclip(g, clip, gamma3=0.9)
        made, norm = adagn(clipped, norm, gamma1=0.6, gamma2=0.8)
        found.append(made)
        assert torch.equal(g, before)
    gammas = {"gamma1": 0.6, "gamma2": 0.8, "gamma3": 0.9}
    torch.testing.assert_close(torch.stack(found), torch.stack(list(processed(grads, **gammas))), **CLOSE)
    whole, _ = path_of(grads, lr=0.1, **gammas)
    after, _ = path_of(found, lr=0.1, clip=False, normalize=False)
    torch.testing.assert_close(whole, after, **CLOSE)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9999), st.floats(0.0, 0.999), st.floats(1.0, 1e4))
def test_adaclip_scales_what_is_beyond_the_threshold(seed, gamma3, spike):
    state = None
    for t, g in enumerate(stream(seed, 4), start=1):
        g = g * spike if t == 3 else g
        out, state = adaclip(g, state, gamma3=gamma3)
        That = state.largest / (1 - gamma3**t)
        assert (out.abs() <= That * (1 + 1e-12)).all() and (out.sign() == g.sign()).all()
        small = g.abs() <= That
        assert torch.equal(out[small], g[small])
        # Scaled by one factor, not cut off: the order among the spikes stays.
        torch.testing.assert_close(out[~small], g[~small] * (That / g.abs().max()), **CLOSE)
        if t == 1:
            torch.testing.assert_close(out, g, rtol=1e-12, atol=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9999), st.floats(0.0, 0.99), st.floats(0.0, 0.999), st.sampled_from([1e-3, 1.0, 1e3]))
def test_adagn_gives_the_norm_that_it_says(seed, gamma1, gamma2, scale):
    state = constant = None
    for t, g in enumerate(stream(seed, 4), start=1):
        out, state = adagn(scale * g, state, gamma1, gamma2)
        expected = state.norm / (1 - gamma1**t) / ((state.square / (1 - gamma2**t)).sqrt() + 1e-8)
        torch.testing.assert_close(out.norm(), expected, rtol=1e-10, atol=0)
        same_norm, constant = adagn(scale * g / g.norm(), constant, gamma1, gamma2)
        assert same_norm.norm().item() == pytest.approx(1, abs=1e-7 / scale)


def test_zero_gradients():
    zeros = torch.zeros(3)
    out, state = adaclip(zeros, None)
    assert not out.any() and not adagn(out, None)[0].any() and state.largest == 0
    path, _ = path_of([zeros] * 3, start=torch.ones(3), lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(path[-1], torch.full((3,), 0.95**3))


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e3])
def test_the_scale_of_the_gradients_does_not_count(scale):
    grads = stream(1)
    path, _ = path_of(grads, lr=0.1)
    torch.testing.assert_close(path_of([scale * g for g in grads], lr=0.1)[0], path, rtol=1e-5, atol=1e-5)


def test_a_spike_moves_little_and_is_forgotten_in_the_end():
    def moves(make, spike):
        return make(stream(2, 200, spike=spike), lr=0.1)[0].diff(dim=0).flatten(1).norm(dim=1)

    calm, spiked = moves(path_of, None), moves(path_of, 12)
    assert (spiked[12:] < 10 * calm[12:]).all() and (spiked[180:] > 0.5 * calm[180:]).all()

    def adam(grads, lr):
        return path_of(grads, lr=lr, clip=False, normalize=False)

    assert (moves(adam, 12)[180:] < 0.3 * moves(adam, None)[180:]).all(), "Adam is lamed by the spike"


@pytest.mark.parametrize("amsgrad", [False, True])
def test_without_its_parts_it_is_adamw(amsgrad):
    options = {"lr": 0.01, "weight_decay": 0.1, "amsgrad": amsgrad}
    mine = walk(StableSPAM, parameters(), steps=20, clip=False, normalize=False, reset_interval=0, **options)
    same(mine, walk(torch.optim.AdamW, parameters(), steps=20, **options), rtol=1e-11, atol=1e-12)


def test_after_a_restart_it_is_adams_first_step():
    grads = stream(3, 7)
    path, optimizer = path_of(grads, lr=0.1, reset_interval=5)
    g = list(processed(grads))[4]
    torch.testing.assert_close(path[4] - path[5], 0.1 * g / (g.abs() + 1e-8), **CLOSE)
    statistics = next(iter(optimizer.state.values()))["statistics"]
    assert statistics[3:].tolist() == [7, 3]
    _, never = path_of(grads, lr=0.1, reset_interval=None)
    torch.testing.assert_close(next(iter(never.state.values()))["statistics"][:4], statistics[:4], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("bad", "compiled"), [(math.inf, False), (-math.inf, False), (math.nan, False), (math.nan, True)]
)
def test_a_gradient_that_is_not_finite_is_left_out(bad, compiled, monkeypatch):
    """Also the decay and the counts; compiled it goes by weights of 0, as on other devices than the CPU."""
    monkeypatch.setattr(_rule, "COMPILER", "aot_eager")
    broken = stream(4, 1)[0]
    broken[2, 1] = bad
    grads = stream(5, 6)
    options = {"lr": 0.1, "weight_decay": 0.5, "start": torch.ones(5, 4, dtype=torch.float64)}
    expected, _ = path_of(grads, **options)
    for place in (0, 3):
        found, _ = path_of([*grads[:place], broken, *grads[place:]], compile=compiled, **options)
        assert torch.equal(found[place], found[place + 1])
        torch.testing.assert_close(torch.cat([found[:place], found[place + 1 :]]), expected, **CLOSE)


def test_numbers_and_tensors_give_the_same(monkeypatch):
    """In pieces with numbers, and whole with tensors as on a GPU or compiled."""
    monkeypatch.setattr(_rule, "COMPILER", "aot_eager")
    for shape in ((3, _rule.PIECE // 2), ()):
        grads = stream(6, 5, shape=shape, spike=3)
        options = {"lr": 0.1, "gamma3": 0.5, "total_steps": 3, "reset_interval": 4}
        torch.testing.assert_close(path_of(grads, compile=True, **options)[0], path_of(grads, **options)[0], **CLOSE)


def test_half_precision_statistics_survive_a_checkpoint():
    def run(p, optimizer, grads):
        for g in grads:
            p.grad = g.bfloat16()
            optimizer.step()

    p, q = (nn.Parameter(torch.ones(5, 4, dtype=torch.bfloat16)) for _ in range(2))
    first, second = StableSPAM([p], lr=0.01), StableSPAM([q], lr=0.01)
    run(p, first, stream(7, 300))
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second.load_state_dict(torch.load(saved, weights_only=True))
    statistics = second.state[q]["statistics"]
    assert statistics.dtype == torch.float32 and statistics[3:].tolist() == [300, 300]
    assert torch.equal(statistics, first.state[p]["statistics"])
    assert statistics is not first.state[p]["statistics"]


def test_a_group_has_its_own_gammas():
    grads = stream(8, 6)
    params = [nn.Parameter(torch.zeros(5, 4, dtype=torch.float64)) for _ in range(2)]
    optimizer = StableSPAM([{"params": params[:1], "gamma1": 0.0}, {"params": params[1:]}], lr=0.1)
    for g in grads:
        for p in params:
            p.grad = g
        optimizer.step()
    torch.testing.assert_close(params[0].detach(), path_of(grads, lr=0.1, gamma1=0.0)[0][-1], **CLOSE)
    assert not torch.equal(*params)


@pytest.mark.parametrize(("options", "message"), [
    ({"eps": -1.0}, r"eps = -1\.0 is out of range"),
    ({"weight_decay": -1.0}, r"weight_decay = -1\.0 is out of range"),
    ({"betas": (1.0, 0.9)}, "betas = .* is out of range"),
    ({"gamma1": 1.0}, r"gamma1 = 1\.0 is out of range"),
    ({"gamma2": -0.1}, r"gamma2 = -0\.1 is out of range"),
    ({"gamma3": 1.0}, r"gamma3 = 1\.0 is out of range"),
    ({"reset_interval": -1}, "reset_interval = -1 is out of range: None or an integer >= 0"),
    ({"reset_interval": 2.5}, r"reset_interval = 2\.5 is out of range"),
    ({"total_steps": 0}, "total_steps = 0 is out of range"),
    ({"eta_min": 1.5}, r"eta_min = 1\.5 is out of range"),
])  # fmt: skip
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        StableSPAM([nn.Parameter(torch.ones(2))], **options)


def test_functions_and_presets_name_what_is_out_of_range():
    g = torch.ones(2)
    for call, message in [
        (lambda: adaclip(g, None, gamma3=1.0), "gamma3 = 1.0"),
        (lambda: adagn(g, None, gamma1=-1), "gamma1 = -1"),
        (lambda: adagn(g, None, eps=-1), "eps = -1"),
        (lambda: StableSPAM.preset("8bit"), "name = '8bit' is out of range: one of bf16, 4bit"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_int4_weights_have_sixteen_levels_a_group():
    w = torch.randn(3, 128, requires_grad=True)
    rounded = fake_quant_int4(w, 64)
    groups, errors = rounded.detach().unflatten(1, (-1, 64)), (rounded - w).detach().unflatten(1, (-1, 64))
    assert all(len(group.unique()) <= 32 for group in groups.flatten(0, 1))  # 16, some of them twice by rounding
    width = w.detach().unflatten(1, (-1, 64)).aminmax(dim=2)
    assert (errors.abs() <= (width.max - width.min)[..., None] / 30 + 1e-6).all()
    rounded.sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))


class PlainAdam(StableSPAM):
    """The broken variant: neither AdaClip nor AdaGN."""

    def __init__(self, *args, **options):
        super().__init__(*args, clip=False, normalize=False, **options)


def test_without_its_parts_the_claim_fails():
    short = {"steps": 150, "rates": (3e-3,), "usual": (3e-3,), "parts": ()}
    (broken,) = claim(Bench(), method=PlainAdam, seeds=2, **short).checks
    (true,) = claim(Bench(), seeds=4, **short).checks
    assert (broken.verdict, true.verdict) == ("does not hold", "holds")
