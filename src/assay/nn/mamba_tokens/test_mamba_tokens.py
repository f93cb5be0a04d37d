"""Token dynamics against closed forms and scipy's integrator, the refinements, and a broken variant of the claim."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import solve_ivp
from torch import Tensor
from torch.nn.utils import parametrize

from assay.bench.evidence import FAILS, HOLDS, Bench
from assay.nn import SelectiveSSM, TokenReorder, constrain_dynamics, selective_scan, soft_sort
from assay.nn._contract import Example
from assay.nn.mamba_tokens.claim import claim, figure
from assay.nn.mamba_tokens.mamba_tokens import _Symmetric
from assay.nn.token_dynamics import classify, input_output_spectrum, simulate

exactly = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def sorted_tokens(layer: TokenReorder, x: Tensor) -> Tensor:
    return layer(x, x) @ x


EXAMPLES = [
    Example(partial(TokenReorder, 3, tau=0.8, power=2.0), (2, 4, 3), forward=sorted_tokens),
    Example(partial(TokenReorder, 3), (2, 4, 3), forward=sorted_tokens, bfloat16=0.1),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hidden_attention(x: Tensor, S_B: Tensor, S_C: Tensor, S_delta: Tensor, a: Tensor) -> Tensor:
    """P of the paper, (D, L, L), entry by entry."""
    delta, (length, width) = F.softplus(x @ S_delta.T), x.shape
    P = torch.zeros(width, length, length, dtype=x.dtype)
    for d in range(width):
        for i in range(length):
            for j in range(i + 1):
                passed = delta[j + 1 : i + 1, d].sum()
                P[d, i, j] = ((S_C @ x[i]) @ (S_B @ x[j])) * delta[j, d] * torch.exp(-a[d] * passed)
    return P


def test_a_selective_scan_is_the_hidden_attention():
    x, S_B, S_C, S_delta = normal(6, 3), normal(2, 3, seed=1), normal(2, 3, seed=2), normal(3, 3, seed=3)
    a = normal(3, seed=4).exp()
    P = hidden_attention(x, S_B, S_C, S_delta, a)
    delta, B, C = (x @ S_delta.T).T[None], (x @ S_B.T).T[None], (x @ S_C.T).T[None]
    for j in range(6):  # one column of the matrix at a time
        u = torch.zeros(1, 3, 6, dtype=torch.float64)
        u[..., j] = 1
        found = selective_scan(u, delta, -a[:, None].expand(3, 2), B, C, delta_softplus=True)
        exactly(found[0], P[:, :, j])


@pytest.mark.parametrize("seed", range(2))
def test_the_simulation_is_that_of_an_independent_integrator(seed: int):
    x0, S_B, S_C, S_delta = (
        0.5 * normal(*s, seed=10 * seed + i) for i, s in enumerate([(4, 2), (3, 2), (3, 2), (2, 2)])
    )
    a = normal(2, seed=seed).exp()

    def velocity(_: float, flat: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(flat).view(4, 2)
        return torch.einsum("dlj,jd->ld", hidden_attention(x, S_B, S_C, S_delta, a), x).flatten().numpy()

    found = simulate(x0, S_B, S_C, S_delta, a, t_max=0.5, rtol=1e-8, atol=1e-10)
    expected = solve_ivp(velocity, (0, 0.5), x0.flatten().numpy(), rtol=1e-9, atol=1e-11).y[:, -1]
    torch.testing.assert_close(found.x[-1].flatten(), torch.from_numpy(expected), rtol=1e-6, atol=1e-7)
    assert found.t[-1] == 0.5 and found.x.shape == (len(found.t), 4, 2) and found.blowup_time is None


def one_dimension(mu: float, S_delta: float, x0: list[float], **options):
    one = torch.ones(1, 1, dtype=torch.float64)
    x0 = torch.tensor(x0, dtype=torch.float64)[:, None]
    return classify(mu * one, one, S_delta * one, x0), simulate(x0, mu * one, one, S_delta * one, one[0], **options)


def test_the_first_token_alone_has_a_closed_form():
    _, found = one_dimension(-1.0, 0.0, [1.5], t_max=10.0, rtol=1e-9, atol=1e-9)  # dx/dt = -ln(2) x^3
    exact = 1 / (1 / 1.5**2 + 2 * np.log(2) * found.t).sqrt()
    torch.testing.assert_close(found.x[:, 0, 0], exact, rtol=1e-6, atol=1e-7)
    assert one_dimension(-1.0, 0.0, [0.0], t_max=1.0)[1].status == "converged"
    _, found = one_dimension(1.0, 0.0, [1.5], t_max=10.0)
    assert found.blowup_time == pytest.approx(1 / (2 * np.log(2) * 1.5**2), rel=1e-5)


def test_the_three_scenarios_in_one_dimension():
    said, found = one_dimension(-1.0, 0.5, [1.0, -0.8, 0.5, 1.2], t_max=200.0)
    largest = found.x.abs().amax((1, 2))
    assert said == "convergence" and found.status == "converged" and largest[-1] < 0.15
    assert (largest * found.t.sqrt()).max() < 2
    said, found = one_dimension(1.0, -1.0, [1.0, 1.0, 1.0, 1.0], t_max=50.0)
    assert said == "slow-divergence" and found.status == "diverging" and found.x[-1, -1] > found.x[-1, 0] > 1
    said, found = one_dimension(1.0, 1.0, [1.0, 1.0, 1.0, 1.0], t_max=50.0)
    assert said == "fast-divergence" and found.status == "blow-up" and 0 < found.blowup_time < 1


def test_the_class_depends_on_the_symmetric_part_and_not_on_scale():
    S_B, S_C = normal(3, 3), normal(3, 3, seed=1)
    assert classify(-S_C, S_C) == "convergence" and classify(S_C, S_C) == "divergence"
    assert classify(-3 * S_C, 0.1 * S_C) == "convergence" and classify(2 * S_B, S_C) == classify(S_B, S_C)
    assert classify(-S_C.bfloat16(), S_C.bfloat16()) == "convergence"
    wide = normal(2, 6)  # rank 2 of 6, rounded: zeros that are not quite
    assert classify(-wide.bfloat16(), wide.bfloat16()) == "convergence"
    turn = torch.tensor([[-0.1, 5.0], [0.0, -0.1]])  # eigenvalues below 0, but not those of the symmetric part
    assert classify(turn, torch.eye(2)) == "divergence"


@pytest.mark.parametrize("scenario", ["positive", "negative", "mixed"])
def test_a_constrained_layer_has_the_chosen_signs(scenario: str):
    torch.manual_seed(0)
    ssm = constrain_dynamics(SelectiveSSM(6, d_state=4, bidirectional=True, dtype=torch.float64), scenario)
    for project in (ssm.x_proj, ssm.x_proj_b):
        _, S_B, S_C = project.weight.split([1, 4, 4])
        eigenvalues = torch.linalg.eigvals(S_C.T @ S_B)
        assert eigenvalues.imag.abs().max() < 1e-9
        signs = [(eigenvalues.real > 1e-9).sum().item(), (eigenvalues.real < -1e-9).sum().item()]
        assert signs == {"positive": [4, 0], "negative": [0, 4], "mixed": [2, 2]}[scenario]
    nonzero = torch.linalg.eigvals(ssm.x_proj.weight[5:].T @ ssm.x_proj.weight[1:5]).real
    largest = nonzero[nonzero.abs().argsort()[-4:]].sort().values
    exactly(input_output_spectrum(ssm).real.sort().values, largest)
    x = normal(2, 5, 6)
    y, fresh = ssm(x), constrain_dynamics(SelectiveSSM(6, d_state=4, bidirectional=True, dtype=torch.float64), scenario)
    fresh.load_state_dict(ssm.state_dict())
    exactly(fresh(x), y)
    for name in ("x_proj", "x_proj_b"):
        parametrize.remove_parametrizations(ssm.get_submodule(name), "weight")
    exactly(ssm(x), y)


def test_soft_sort_sorts():
    scores = normal(3, 6).requires_grad_()
    for options in ({}, {"power": 2.0, "descending": False}, {"hard": True}):
        torch.testing.assert_close(soft_sort(scores, **options).sum(-1), torch.ones(3, 6).double())
    for descending in (True, False):
        expected = scores.sort(dim=-1, descending=descending).values
        for options in ({"tau": 1e-4}, {"hard": True}):
            P = soft_sort(scores, descending=descending, **options)
            exactly((P @ scores[..., None])[..., 0], expected)
    hard, soft = (torch.autograd.grad(soft_sort(scores, hard=h)[..., 0].sum(), scores)[0] for h in (True, False))
    exactly(hard, soft)
    tied = soft_sort(torch.zeros(4), hard=True)
    assert torch.equal(tied.sum(0), torch.ones(4)) and torch.equal(soft_sort(torch.zeros(4)), torch.full((4, 4), 0.25))


def test_reordering_by_scores_in_order_changes_nothing_and_restoring_puts_outputs_back():
    torch.manual_seed(0)
    reorder = TokenReorder(8, hard=True, restore=True, dtype=torch.float64)
    ssm, x = SelectiveSSM(4, d_conv=1, gate=False, reorder=reorder, dtype=torch.float64), normal(1, 6, 4)
    plain = copy.deepcopy(ssm)
    plain.reorder = None
    seen = F.silu(F.conv1d(ssm.in_proj(x).mT, ssm.conv1d.weight, ssm.conv1d.bias, groups=8))
    order = reorder.score(ssm.select(seen)[0].mT)[0, :, 0].argsort()
    exactly(ssm(x[:, order]), plain(x[:, order]))
    assert not torch.allclose(ssm(x), plain(x))
    exactly(ssm(x)[:, order], plain(x[:, order]))


def test_bad_arguments_are_named():
    one = torch.ones(1, 1)
    for make, options in (
        (partial(SelectiveSSM, 4, reorder=TokenReorder(8)), {"bidirectional": True}),
        (partial(constrain_dynamics, SelectiveSSM(4)), {"scenario": "none"}),
        (partial(constrain_dynamics, SelectiveSSM(4)), {"threshold": -1}),
        (partial(soft_sort, torch.ones(3)), {"tau": 0}),
        (partial(TokenReorder, 4), {"power": 0}),
        (partial(simulate, one, one, one, one, one[0], t_max=1.0), {"method": "euler"}),
    ):
        with pytest.raises(ValueError, match=f"{next(iter(options))} = .* is out of range"):
            make(**options)


class StepSizesLast(_Symmetric):
    """The broken variant of the card: the constrained rows stand where a layer does not read them as B and C."""

    def forward(self, weight: Tensor) -> Tensor:
        return super().forward(weight).roll(-self.sizes[0], 0)


def constrain_the_wrong_rows(ssm: SelectiveSSM, scenario: str) -> SelectiveSSM:
    broken = StepSizesLast(ssm.dt_rank, ssm.d_state, scenario, 0.7)
    parametrize.register_parametrization(ssm.x_proj, "weight", broken)
    return ssm


def test_the_claim_does_not_hold_for_the_constraint_on_the_wrong_rows():
    bench = Bench(quick=True)
    broken = claim(bench, method=constrain_the_wrong_rows, parts=("language",))
    assert broken.verdict == FAILS and broken.checks[0].verdict == FAILS
    real = claim(bench, parts=("language",))
    assert real.checks[0].verdict == HOLDS and real.checks[0].observed > 0.1
    assert figure(real) is not None


def test_forty_systems_end_as_predicted():
    assert claim(Bench(), parts=("simulation",)).verdict == HOLDS
