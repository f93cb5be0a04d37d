"""The selective state space layer against its formula, and its contract."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from assay.nn import SelectiveSSM
from assay.nn._contract import CHECKS, Example

EXAMPLES = [
    Example(partial(SelectiveSSM, 2, d_state=2, d_conv=2), (2, 3, 2)),
    Example(partial(SelectiveSSM, 2, 1, 2, 1, bias=True, gate=False, bidirectional=True, causal_conv=False), (2, 2, 2)),
]
exactly = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_contract(example: Example, check: Callable[[Example], None]) -> None:
    check(example)


def layer(*args, **options) -> SelectiveSSM:
    torch.manual_seed(0)
    return SelectiveSSM(*args, dtype=torch.float64, **options)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slowly(ssm: SelectiveSSM, tokens: Tensor) -> Tensor:
    """The block for one sequence (L, d_model), token by token."""
    h, past, outputs = torch.zeros_like(ssm.A_log), [torch.zeros(ssm.d_inner).double()] * ssm.d_conv, []
    for token in tokens:
        x, z = (ssm.in_proj.weight @ token).chunk(2)
        past = [*past[1:], x]
        x = F.silu(sum(w * p for w, p in zip(ssm.conv1d.weight[:, 0].T, past, strict=True)) + ssm.conv1d.bias)
        dt, B, C = (ssm.x_proj.weight @ x).split([ssm.dt_rank, ssm.d_state, ssm.d_state])
        delta = F.softplus(ssm.dt_proj.weight @ dt + ssm.dt_proj.bias)[:, None]
        h = torch.exp(-delta * ssm.A_log.exp()) * h + delta * x[:, None] * B
        outputs.append(ssm.out_proj.weight @ ((h @ C + ssm.D * x) * F.silu(z)))
    return torch.stack(outputs)


def test_the_layer_is_its_formula_whole_in_parts_and_step_by_step():
    ssm, x = layer(20, 5), normal(2, 11, 20)
    expected = torch.stack([slowly(ssm, tokens) for tokens in x])
    exactly(ssm(x), expected)
    start, state = ssm(x[:, :2], return_state=True)
    middle, state = ssm(x[:, 2:8], state, True)
    outputs = [start, middle]
    for t in range(8, 11):
        output, state = ssm.step(x[:, t], state)
        outputs.append(output[:, None])
    exactly(torch.cat(outputs, 1), expected)
    exactly(ssm.step(x[:, 0], ssm.init_state(2))[0], expected[:, 0])


def test_no_output_depends_on_later_tokens():
    ssm, x = layer(4), normal(1, 9, 4)
    changed = torch.cat([x[:, :5], normal(1, 4, 4, seed=1)], 1)
    torch.testing.assert_close(ssm(x)[:, :5], ssm(changed)[:, :5], rtol=0, atol=0)


@pytest.mark.parametrize("causal_conv", [True, False])
def test_two_directions_of_the_same_weights_commute_with_flipping(causal_conv: bool):
    ssm, x = layer(4, bidirectional=True, causal_conv=causal_conv), normal(2, 9, 4)
    assert not torch.allclose(ssm(x.flip(1)), ssm(x).flip(1))
    for name in ("conv1d", "x_proj", "dt_proj"):
        ssm.get_submodule(f"{name}_b").load_state_dict(ssm.get_submodule(name).state_dict())
    ssm.A_b_log, ssm.D_b = ssm.A_log, ssm.D
    exactly(ssm(x.flip(1)), ssm(x).flip(1))


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "causal_conv": False}])
def test_padding_before_or_behind_is_left_out(options: dict):
    ssm, x = layer(4, **options), normal(2, 7, 4)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1]]).bool()
    found = ssm(x, mask=mask)
    exactly(found[0, :4], ssm(x[:1, :4])[0])
    exactly(found[1, 2:], ssm(x[1:, 2:])[0])


def test_first_weights_are_those_of_mamba():
    ssm = layer(64, 3)
    exactly(ssm.A_log.exp(), torch.tensor([1.0, 2.0, 3.0]).double().expand(128, 3))
    dt = F.softplus(ssm.dt_proj.bias)
    assert 1e-3 <= dt.min() < 2e-3 and 0.05 < dt.max() <= 0.1
    assert ssm.dt_proj.weight.abs().max() <= 4**-0.5 and ssm.A_log._no_weight_decay and ssm.D._no_weight_decay
    shapes = {name: tuple(value.shape) for name, value in ssm.state_dict().items()}
    assert shapes == {
        "A_log": (128, 3), "D": (128,), "in_proj.weight": (256, 64), "conv1d.weight": (128, 1, 4),
        "conv1d.bias": (128,), "x_proj.weight": (10, 128), "dt_proj.weight": (128, 4), "dt_proj.bias": (128,),
        "out_proj.weight": (64, 128),
    }  # fmt: skip
    before = copy.deepcopy(ssm.state_dict())
    ssm.reset_parameters()
    assert not torch.equal(before["dt_proj.bias"], ssm.dt_proj.bias) and torch.equal(before["A_log"], ssm.A_log)


def test_bad_arguments_are_named():
    for options in ({"d_state": 0}, {"dt_rank": "none"}, {"dt_min": 0.2}, {"dt_init": "zero"}, {"chunk_size": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} = .* is out of range"):
            SelectiveSSM(4, **options)
    with pytest.raises(ValueError, match=r"state = .* is out of range"):
        SelectiveSSM(4, bidirectional=True)(torch.randn(1, 2, 4), return_state=True)
