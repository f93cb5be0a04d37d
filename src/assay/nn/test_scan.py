"""The scans against loops over numbers, and their gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from assay.nn import linear_scan, selective_scan

exactly = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("length", [1, 2, 37, 64])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 5, 100])
@pytest.mark.parametrize("reverse", [False, True])
def test_linear_scan_is_the_loop(length: int, chunk_size: int | None, reverse: bool):
    a, b, first = normal(2, length, 1), normal(length, 3, seed=1), normal(2, 3, seed=2)
    states, state = torch.empty(2, length, 3, dtype=torch.float64), first
    for t in reversed(range(length)) if reverse else range(length):
        state = states[:, t] = a[:, t] * state + b[t]
    arguments = {"initial": first, "reverse": reverse}
    exactly(linear_scan(a, b, chunk_size=chunk_size, **arguments), states)
    exactly(linear_scan(a, b, backend="sequential", **arguments), states)
    moved = linear_scan(a.transpose(1, 2), b.T, dim=-1, chunk_size=chunk_size, **arguments)
    exactly(moved, states.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_linear_scan_has_gradients_of_both_orders(dtype: torch.dtype, reverse: bool, chunk_size: int):
    inputs = [x.requires_grad_() for x in (normal(2, 5, 1, dtype=dtype), normal(2, 5, 2, dtype=dtype, seed=1))]

    def call(a: Tensor, b: Tensor, first: Tensor) -> Tensor:
        return linear_scan(a, b, initial=first, reverse=reverse, chunk_size=chunk_size)

    inputs.append(normal(2, 2, dtype=dtype, seed=2).requires_grad_())
    assert gradcheck(call, inputs) and gradgradcheck(call, inputs)


def arguments(
    length: int, kind: str = "selective", dtype: torch.dtype = torch.float64, channels: int = 6, batch: int = 2
) -> dict[str, Tensor]:
    d, n = channels, (channels + 1) // 2
    shape = {"constant": (d, n), "selective": (batch, n, length), "grouped": (batch, 3, n, length)}[kind]
    made = {
        "u": normal(batch, d, length),
        "delta": normal(batch, d, length, seed=1),
        "A": -normal(d, n, seed=2).exp(),
        "B": normal(*shape, seed=3),
        "C": normal(*shape, seed=4),
        "D": normal(d, seed=5),
        "z": normal(batch, d, length, seed=6),
        "delta_bias": normal(d, seed=7),
        "initial_state": normal(batch, d, n, seed=8),
    }
    return {name: x.to(dtype) for name, x in made.items()}


def slowly(u, delta, A, B, C, D=None, z=None, delta_bias=None, initial_state=None) -> tuple[Tensor, Tensor]:
    """The formula of the paper, a number at a time in the state."""
    (batch, channels, length), n = u.shape, A.shape[1]
    y, h = torch.zeros_like(u), torch.zeros(batch, channels, n, dtype=u.dtype)
    if initial_state is not None:
        h = initial_state.clone()
    for t in range(length):
        for d in range(channels):

            def at(weights: Tensor, d: int = d, t: int = t) -> Tensor:
                if weights.dim() == 2:
                    return weights[d].expand(batch, n)
                return weights[..., t] if weights.dim() == 3 else weights[:, d * weights.shape[1] // channels, :, t]

            dt = torch.nn.functional.softplus(delta[:, d, t] + (0 if delta_bias is None else delta_bias[d]))
            h[:, d] = torch.exp(dt[:, None] * A[d]) * h[:, d] + dt[:, None] * at(B) * u[:, d, t, None]
            y[:, d, t] = (at(C) * h[:, d]).sum(1) + (0 if D is None else D[d] * u[:, d, t])
    return (y if z is None else y * z * torch.sigmoid(z)), h


@pytest.mark.parametrize("length", [1, 2, 37])
@pytest.mark.parametrize("kind", ["constant", "selective", "grouped"])
def test_selective_scan_is_the_formula(length: int, kind: str):
    full = arguments(length, kind)
    for left_out in ([], ["D"], ["z"], ["delta_bias", "initial_state"], ["D", "z", "delta_bias"]):
        given = {name: x for name, x in full.items() if name not in left_out}
        for options in ({}, {"chunk_size": 1}, {"chunk_size": 5}, {"backend": "sequential"}):
            found = selective_scan(**given, delta_softplus=True, return_last_state=True, **options)
            exactly(found, slowly(**given))


@pytest.mark.parametrize("length", [64, 1000])
def test_selective_scan_and_its_gradients_are_those_of_the_loop(length: int):
    given = {name: x.requires_grad_() for name, x in arguments(length).items()}

    def pass_(**options) -> list[Tensor]:
        y, last = selective_scan(**given, delta_softplus=True, return_last_state=True, **options)
        return [y, *torch.autograd.grad(y.square().sum() + last.sin().sum(), list(given.values()))]

    expected = pass_(backend="sequential")
    for chunk_size in (None, 7, 64, 2000):
        torch.testing.assert_close(pass_(chunk_size=chunk_size), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["constant", "selective", "grouped"])
def test_selective_scan_has_gradients_of_both_orders(kind: str):
    given = {name: x.requires_grad_() for name, x in arguments(3, kind, channels=3, batch=1).items()}

    def call(*values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(given, values, strict=True))
        named["delta"] = named["delta"] + 0.3 * named["u"]  # arguments that depend on one another, as in a layer
        return selective_scan(**named, delta_softplus=True, return_last_state=True, chunk_size=2)

    assert gradcheck(call, list(given.values())) and gradgradcheck(call, list(given.values()))


def test_a_sequence_may_come_in_two_parts():
    given = arguments(9)
    first, initial, rest = {}, given["initial_state"], {}
    for name, x in given.items():
        first[name], rest[name] = (x[..., :4], x[..., 4:]) if x.shape[-1] == 9 else (x, x)
    y1, state = selective_scan(**first | {"initial_state": initial}, return_last_state=True)
    y2 = selective_scan(**rest | {"initial_state": state})
    exactly(torch.cat([y1, y2], -1), selective_scan(**given))


def test_extreme_step_sizes_and_long_sequences_stay_finite():
    given = {name: x.requires_grad_() for name, x in arguments(8192, dtype=torch.float32).items()}
    with torch.no_grad():
        given["delta"][..., ::7] = 1e4
        given["delta"][..., 1::7] = -1e4
    y = selective_scan(**given, delta_softplus=True)
    grads = torch.autograd.grad(y.sum(), list(given.values()))
    assert all(x.isfinite().all() for x in (y, *grads))
    frozen = arguments(5) | {"delta": torch.full((2, 6, 5), -1e5, dtype=torch.float64)}
    del frozen["initial_state"], frozen["z"]
    exactly(selective_scan(**frozen, delta_softplus=True), frozen["D"][:, None] * frozen["u"])


def test_low_precision_is_computed_in_float32():
    given = arguments(64)
    exact = selective_scan(**given, delta_softplus=True)
    half = selective_scan(**{name: x.bfloat16() for name, x in given.items()}, delta_softplus=True)
    assert half.dtype == torch.bfloat16 and (half - exact).norm() < 0.02 * exact.norm()
    a, b = normal(3, 400, 2).sigmoid().bfloat16(), normal(3, 400, 2, seed=1).bfloat16()
    torch.testing.assert_close(linear_scan(a, b), linear_scan(a.double(), b.double()).bfloat16())


@pytest.mark.parametrize("options", [{"chunk_size": 0}, {"backend": "fast"}])
def test_bad_arguments_are_named(options: dict):
    with pytest.raises(ValueError, match=f"{next(iter(options))} = .* is out of range"):
        linear_scan(normal(1, 2), normal(1, 2), **options)
    with pytest.raises(ValueError, match=f"{next(iter(options))} = .* is out of range"):
        selective_scan(**arguments(3), **options)
    with pytest.raises(ValueError, match=r"C = .* is out of range"):
        selective_scan(**arguments(3) | {"C": normal(2, 4, 3, 3)})
