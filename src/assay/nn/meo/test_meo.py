"""Merged experts against plain loops over experts, the mixture that they replace, and a broken variant of the claim."""

from __future__ import annotations

import copy
import math
from functools import partial
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from assay import losses
from assay.bench.evidence import FAILS, HOLDS, Bench
from assay.nn import (
    MEOLinear,
    MoELinear,
    TokenAttention,
    noisy_top_k_gating,
    swap,
)
from assay.nn import _experts as experts_file
from assay.nn._contract import Example
from assay.nn.meo import layers
from assay.nn.meo.claim import claim, figure

TASK = torch.linspace(-1, 1, 15, dtype=torch.float64).view(3, 5)


def with_task(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, TASK.to(x.dtype))


def quiet(layer: type[nn.Module], *sizes: int, **options: object) -> partial[nn.Module]:
    """Without noise, so that training too is a function of the input."""
    return partial(layer, *sizes, noisy_gating=False, **options)


EXAMPLES = [
    Example(quiet(MEOLinear, 6, 4, num_experts=5, k=2), (3, 4, 6), nn.Linear(6, 4)),
    Example(quiet(MEOLinear, 6, 4, num_experts=3, k=2, level="token", bias=False), (3, 4, 6), nn.Linear(6, 4, False)),
    Example(quiet(MEOLinear, 6, 4, num_experts=5, k=2, level="task", task_dim=5), (3, 4, 6), None, with_task),
    Example(quiet(MoELinear, 6, 4, num_experts=5, k=2), (3, 4, 6), nn.Linear(6, 4)),
    Example(quiet(MoELinear, 6, 4, num_experts=3, k=2, level="token", bias=False), (3, 4, 6), nn.Linear(6, 4, False)),
    Example(partial(TokenAttention, 6, reduce_factor=2), (3, 4, 6)),
]
exactly = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
KINDS = [(level, k) for level in ("sequence", "token", "task") for k in (1, 2, 3, 5)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def disturbed(layer: nn.Module) -> nn.Module:
    """The gate away from zero, where all experts are alike to it."""
    layer = layer.double()
    with torch.no_grad():
        for number, tensor in enumerate(layer.parameters()):
            tensor.add_(normal(*tensor.shape, seed=number))
    return layer


def of_level(layer: type[nn.Module], level: str, k: int, **options: object) -> tuple[nn.Module, dict[str, Tensor]]:
    """A layer with five experts, and what its call needs besides x."""
    task_dim = 4 if level == "task" else None
    built = disturbed(layer(6, 3, 5, k, level=level, task_dim=task_dim, reduce_factor=2, **options))
    return built, {"task_embedding": normal(4, 2, 4)} if level == "task" else {}


@torch.no_grad()
def routed(seen: Tensor, layer: nn.Module, noise: Tensor | None) -> tuple[list[dict[int, float]], list[list[float]]]:
    """Gates and load of each row, number by number."""
    gates, load = [], []
    for n, h in enumerate(seen):
        clean = [float(h @ layer.w_gate[:, e]) for e in range(5)]
        std = [float(F.softplus(h @ layer.w_noise[:, e]) + layer.noise_epsilon) for e in range(5)]
        logits = clean if noise is None else [c + float(z) * s for c, z, s in zip(clean, noise[n], std, strict=True)]
        order = sorted(range(5), key=lambda e: -logits[e])[: layer.k]
        total = sum(math.exp(logits[e]) for e in order)
        gates.append({e: math.exp(logits[e]) / total for e in order})
        load.append([])
        for e in range(5):
            others = sorted((logits[o] for o in range(5) if o != e), reverse=True)
            if noise is None or layer.k == 5:
                load[-1].append(float(e in order))
            else:
                load[-1].append(NormalDist().cdf((clean[e] - others[layer.k - 1]) / std[e]))
    return gates, load


def balance(gates: list[dict[int, float]], load: list[list[float]]) -> Tensor:
    importance = torch.tensor([sum(row.get(e, 0.0) for row in gates) for e in range(5)], dtype=torch.float64)
    loads = torch.tensor(load, dtype=torch.float64).sum(0)
    return sum(v.var(correction=1) / (v.mean() ** 2 + 1e-10) for v in (importance, loads))


@pytest.mark.parametrize("kind", [MEOLinear, MoELinear])
@pytest.mark.parametrize("level, k", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_output_and_balance_loss_are_those_of_the_formula(kind, level, k, training):
    layer, more = of_level(kind, level, k)
    layer.train(training)
    x = normal(4, 7, 6)
    torch.manual_seed(3)
    y, aux = layer(x, **more, return_aux=True)

    inside = x
    if kind is MEOLinear and level == "token":
        down, up = layer.token_attention.down_proj, layer.token_attention.up_proj
        inside = x + F.relu(x @ down.weight.T + down.bias) @ up.weight.T + up.bias
    by_token = kind is MoELinear and level == "token"
    if level == "task":
        seen = (more["task_embedding"] @ layer.task_proj.weight.T + layer.task_proj.bias).mean(1)
    else:
        seen = x.flatten(0, 1) if by_token else inside.mean(1)
    torch.manual_seed(3)
    gates, load = routed(seen, layer, torch.randn(len(seen), 5, dtype=torch.float64) if training else None)
    expected = torch.zeros(4, 7, 3, dtype=torch.float64)
    for b in range(4):
        for t in range(7):
            for e, g in gates[7 * b + t if by_token else b].items():
                expected[b, t] += g * (layer.weight[e] @ inside[b, t] + layer.bias[e])
    exactly(y, expected)
    exactly(aux, balance(gates, load))
    assert layer.aux_loss is aux


@pytest.mark.parametrize("level, k", [(level, k) for level, k in KINDS if level != "token"])
def test_merging_equals_the_mixture(level, k):
    merged, more = of_level(MEOLinear, level, k)
    mixture, _ = of_level(MoELinear, level, k)
    mixture.load_state_dict(merged.state_dict())
    results = []
    for layer in (merged, mixture):
        torch.manual_seed(0)
        x = normal(4, 7, 6).requires_grad_()
        y = layer(x, **more)
        results.append([y, *torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()])])
    exactly(*results)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k", [1, 2])
def test_gathering_the_chosen_and_weighing_all_agree(k, bias):
    layer, _ = of_level(MEOLinear, "sequence", k, bias=bias)
    assert 2 * layer.k < layer.num_experts
    routing = layer._route(normal(4, 6))
    gathered = layer._merge(routing.weights, routing.experts, routing.gates)
    layer.k = 5  # from here on all experts are weighed by their gates
    weighed = layer._merge(routing.weights, routing.experts, routing.gates)
    torch.testing.assert_close(gathered, weighed, rtol=1e-12, atol=1e-12)
    assert (gathered[1] is None) == (not bias)


def test_all_experts_alike_are_their_average_and_one_is_itself():
    x = normal(2, 3, 6)
    layer = MEOLinear(6, 3, 4, k=4, dtype=torch.float64).eval()  # the gate starts at 0
    exactly(layer(x), F.linear(x, layer.weight.mean(0), layer.bias.mean(0)))
    single = disturbed(MEOLinear(6, 3, 4, k=1)).eval()
    for b, e in enumerate((x.mean(1) @ single.w_gate).argmax(1)):
        exactly(single(x)[b], F.linear(x[b], single.weight[e], single.bias[e]))


def test_one_task_for_the_batch_is_that_task_for_each_sequence():
    for kind in (MEOLinear, MoELinear):
        layer, _ = of_level(kind, "task", 2)
        layer.eval()
        x, task = normal(4, 7, 6), normal(3, 4)
        exactly(layer(x, task), layer(x, task.expand(4, 3, 4)))
        exactly(layer(x, task.unsqueeze(0)), layer(x, task))
        exactly(layer(x[:1], task), layer(x, task)[:1])


def test_gates_have_k_entries_that_sum_to_one():
    for training in (True, False):
        for k in (1, 3, 6):
            gates, load = noisy_top_k_gating(normal(9, 4), normal(4, 6), normal(4, 6), k, training=training)
            assert (gates > 0).sum(1).tolist() == [k] * 9
            exactly(gates.sum(1), torch.ones(9, dtype=torch.float64))
            exactly(load, (gates > 0).double().sum(0)) if not training or k == 6 else None
            assert load.shape == (6,)
    # A gate that underflows to 0 still belongs to a chosen expert.
    layer = MEOLinear(2, 2, 5, k=2).double().eval()
    with torch.no_grad():
        layer.w_gate[0] = torch.tensor([2000.0, 0, -1, -2, -3])
    x = torch.ones(1, 3, 2, dtype=torch.float64)
    exactly(layer(x), F.linear(x, layer.weight[0], layer.bias[0]))


def test_the_load_is_the_probability_to_stay_under_fresh_noise():
    x, w_gate, w_noise = normal(1, 3), normal(3, 5, seed=1), normal(3, 5, seed=2)
    torch.manual_seed(0)
    clean, std = x @ w_gate, F.softplus(x @ w_noise) + 0.01
    logits = clean + std * torch.randn(1, 5, dtype=torch.float64)
    torch.manual_seed(0)
    _, load = noisy_top_k_gating(x, w_gate, w_noise, 2, training=True)
    fresh = clean + std * normal(200_000, 5, seed=4)
    for e in range(5):
        others = torch.cat([logits[:, :e], logits[:, e + 1 :]], 1)
        share = (fresh[:, e] > others.topk(2).values[0, 1]).double().mean()
        assert abs(load[e] - share) < 0.01


def test_only_chosen_experts_learn_and_the_gate_learns_from_two():
    for k in (1, 2):
        layer = disturbed(MEOLinear(6, 3, 5, k=k, noisy_gating=False))
        x = normal(1, 4, 6)
        chosen = set((x.mean(1) @ layer.w_gate)[0].topk(k).indices.tolist())
        layer(x).sin().sum().backward()
        learns = {e for e in range(5) if layer.weight.grad[e].any() and layer.bias.grad[e].any()}
        assert learns == chosen and bool((layer.w_gate.grad.abs() > 1e-12).any()) == (k == 2)


def test_training_depends_on_the_generator_alone_and_evaluation_on_nothing():
    layer, x = disturbed(MEOLinear(6, 3, 5)), normal(4, 7, 6)

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return layer(x)

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    layer.eval()
    assert torch.equal(drawn(0), drawn(1))


def test_token_attention_starts_at_nothing():
    block = TokenAttention(130)
    assert block.down_proj.weight.shape == (2, 130) and block.down_proj.weight.any()
    assert not block(torch.randn(2, 3, 130)).any() and TokenAttention(8).down_proj.out_features == 1
    at_start, plain = MEOLinear(8, 3, 4, level="token"), MEOLinear(8, 3, 4)
    plain.load_state_dict(at_start.state_dict(), strict=False)
    torch.testing.assert_close(at_start.eval()(torch.ones(2, 3, 8)), plain.eval()(torch.ones(2, 3, 8)))


def test_experts_start_as_torch_draws_a_linear_layer():
    layer = MEOLinear(64, 50, 8)
    for tensor in (layer.weight, layer.bias):
        assert tensor.abs().max() <= 1 / 8 and abs(tensor.std() * 8 * 3**0.5 - 1) < 0.1
    assert not torch.equal(layer.weight[0], layer.weight[1]) and not layer.w_gate.any() and not layer.w_noise.any()
    assert MEOLinear(4, 4, 2, noisy_gating=False).w_noise is None


def test_balance_by_hand():
    even = torch.full((6, 3), 1 / 3)
    assert losses.load_balance(even, torch.full((3,), 6.0)) == 0
    one_sided = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert losses.load_balance(one_sided, torch.tensor([2.0, 0.0])).item() == pytest.approx(4)  # cv2 = 2 / 1, twice
    assert losses.load_balance(torch.ones(3, 1), torch.ones(1)) == 0
    assert losses.load_balance(torch.zeros(0, 3), torch.zeros(3)) == 0
    assert losses.load_balance(one_sided.bfloat16(), torch.tensor([2, 0])).item() == pytest.approx(4)


@pytest.mark.parametrize("kind", [MEOLinear, MoELinear])
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_padding_is_left_out(kind, level):
    layer, _ = of_level(kind, level, 2)
    layer.eval()
    x, lengths = normal(3, 6, 6), (6, 2, 4)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    filled = x.masked_fill(~mask[..., None], float("nan"))
    y, aux = layer(filled, mask=mask.long(), return_aux=True)
    seen = []
    for b, length in enumerate(lengths):
        exactly(y[b, :length], layer(x[b : b + 1, :length])[0])
        inside = x[b, :length]
        if kind is MEOLinear and level == "token":
            inside = inside + layer.token_attention(inside)
        seen.append(inside if kind is MoELinear and level == "token" else inside.mean(0, keepdim=True))
    exactly(aux, balance(*routed(torch.cat(seen), layer, None)))
    nobody = torch.zeros_like(mask)
    nobody[:2] = mask[:2]
    assert layer(torch.where(nobody[..., None], x, 0), mask=nobody, return_aux=True)[1].isfinite()


@pytest.mark.parametrize("kind", [MEOLinear, MoELinear])
def test_parts_of_a_large_batch_give_what_the_whole_gives(kind, monkeypatch):
    layer = disturbed(kind(6, 3, 5, noisy_gating=False))
    copied, results = copy.deepcopy(layer), []
    for each, merged in ((layer, 10**6), (copied, 2 * 18)):
        monkeypatch.setattr(layers, "_MERGED", merged)
        x = normal(5, 7, 6).requires_grad_()
        y = each(x)
        results.append([y, *torch.autograd.grad(y.sin().sum(), [x, *each.parameters()])])
    exactly(*results)


@pytest.mark.parametrize("counts", [[0, 0, 0], [70, 0, 1], [64, 64, 0], [1, 200, 63]])
def test_blocks_are_pieces(counts):
    rows, weight, bias = normal(sum(counts), 4), normal(3, 5, 4), normal(3, 5)
    for b in (bias, None):
        both = [f(rows, weight, b, torch.tensor(counts)) for f in (experts_file._pieces, experts_file._blocks)]
        exactly(*both)


def flops(layer: nn.Module, length: int = 128) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randn(4, length, 32))
    return counter.get_total_flops()


def test_merged_experts_cost_about_as_much_as_one():
    single, eight = (flops(MEOLinear(32, 48, 32, k=k)) for k in (1, 8))
    assert eight <= 1.1 * single
    assert 7.5 <= flops(MoELinear(32, 48, 32, k=8)) / single <= 8.5
    assert flops(MoELinear(32, 48, 32, k=8, level="token")) >= 7.5 * single


def test_a_model_trains_with_swapped_layers_and_can_be_copied_then():
    model = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    swap(model, nn.Linear, MEOLinear, num_experts=4, level="token", reduce_factor=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    y = model(torch.randn(3, 5, 8))
    (y.square().mean() + 0.01 * (model.linear1.aux_loss + model.linear2.aux_loss)).backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert copy.deepcopy(model).linear1.aux_loss is None and model.linear1.aux_loss is not None


def test_wrong_arguments_are_refused():
    for options, named in [
        ({"k": 0}, "k = 0"),
        ({"k": 5}, "k = 5"),
        ({"num_experts": 0}, "num_experts = 0"),
        ({"level": "word"}, "level = 'word'"),
        ({"level": "task"}, "task_dim = None"),
        ({"task_dim": 3}, "task_dim = 3"),
        ({"noise_epsilon": -1}, "noise_epsilon = -1"),
        ({"reduce_factor": 0}, "reduce_factor = 0"),
    ]:
        for kind in (MEOLinear, MoELinear):
            with pytest.raises(ValueError, match=f"{named} is out of range"):
                kind(**{"in_features": 6, "out_features": 3, "num_experts": 4} | options)
    with pytest.raises(ValueError, match="dim = 0 is out of range"):
        TokenAttention(0)
    with pytest.raises(ValueError, match="k = 7 is out of range"):
        noisy_top_k_gating(torch.ones(2, 3), torch.ones(3, 5), torch.ones(3, 5), 7, training=True)
    with pytest.raises(ValueError, match="eps = -1 is out of range"):
        losses.load_balance(torch.ones(2, 2), torch.ones(2), eps=-1)
    layer = MEOLinear(6, 3, 4)
    with pytest.raises(ValueError, match=r"x of shape \(2, 6\)"):
        layer(torch.ones(2, 6))
    with pytest.raises(ValueError, match="task_embedding is for level = 'task'"):
        layer(torch.ones(2, 3, 6), torch.ones(2, 3, 6))
    with pytest.raises(ValueError, match=r"mask of shape \(2,\)"):
        layer(torch.ones(2, 3, 6), mask=torch.ones(2))


def test_the_claim_does_not_hold_for_mixed_outputs():
    bench = Bench(quick=True)
    broken, real = (claim(bench, method=method, seeds=1, cost_only=True) for method in (MoELinear, MEOLinear))
    assert broken.verdict == broken.checks[0].verdict == FAILS
    assert real.checks[0].verdict == HOLDS and real.checks[0].observed < 0.4
    assert figure(real) is not None
