"""PerpGrad against the formula in plain loops, its invariants, and around other optimizers."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from assay._processes import run_on_two
from assay.bench import Bench
from assay.bench.arms import DEFAULT_RECIPE, resolve
from assay.bench.loop import fit
from assay.bench.recipe import Budget
from assay.bench.spec import parse_specs
from assay.bench.tasks import resolve_task
from assay.losses import softmax_collapse_fraction
from assay.optim import SAM, PerpGrad, nlm_alignment, orthogonalize_grad_
from assay.optim._contract import gradients, parameters
from assay.optim._wrapper_contract import network, train
from assay.optim.perpgrad import claim as room
from assay.optim.perpgrad import projection
from assay.optim.perpgrad.perpgrad import apply

EXACT = {"rtol": 0.0, "atol": 0.0}


def make(params, base, **base_options):
    return PerpGrad(base(params, **base_options))


def perp_sgd(params, **options):
    return make(params, torch.optim.SGD, lr=0.1, momentum=0.9, **options)


def perp_adamw(params, rescale=True):
    return PerpGrad(torch.optim.AdamW(params, lr=0.01), rescale=rescale)


WRAPPERS = {"PerpGrad": make}
DISTRIBUTED = [(perp_sgd, {}), (perp_adamw, {}), (perp_adamw, {"rescale": False})]


def oracle(p, g, rescale, eps=1e-30):
    """The formula element by element, in Python's own floating point."""
    w, g = p.detach().double().flatten().tolist(), g.double().flatten().tolist()
    share = sum(a * b for a, b in zip(w, g, strict=True)) / (sum(a * a for a in w) + eps)
    perp = [b - share * a for a, b in zip(w, g, strict=True)]
    norm, length = sum(b * b for b in g) ** 0.5, sum(b * b for b in perp) ** 0.5
    if length <= 1e-12 * norm:
        perp = [0.0] * len(perp)
    elif rescale:
        perp = [b * norm / (length + eps) for b in perp]
    return torch.tensor(perp, dtype=torch.float64).view(p.shape)


def small(seed=0, dtype=torch.float64):
    """A matrix, a vector, a scalar, a kernel, one of its views that no flat view fits, and an empty one."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [(7, 5), (7,), (), (4, 3, 2, 2), (0, 3)]
    params = [nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)) for shape in shapes]
    params.append(nn.Parameter(torch.randn(6, 8, generator=draw, dtype=torch.float64).to(dtype).t()[::2]))
    for p in params:
        p.grad = torch.randn(p.shape, generator=draw, dtype=torch.float64).to(dtype)
    return params


@pytest.mark.parametrize("rescale", [True, False])
def test_it_is_the_formula_for_every_shape(rescale):
    params = small()
    expected = [oracle(p, p.grad, rescale) for p in params]
    before, places = [p.detach().clone() for p in params], [p.grad.data_ptr() for p in params]
    orthogonalize_grad_(iter(params), rescale=rescale)
    torch.testing.assert_close([p.grad for p in params], expected, rtol=1e-12, atol=1e-14)
    assert [p.grad.data_ptr() for p in params] == places, "a gradient that is a view of a bucket must stay one"
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_eps_stands_in_both_denominators():
    p = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    p.grad = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for rescale in (False, True):
        p.grad = torch.tensor([1.0, 0.3], dtype=torch.float64)
        expected = oracle(p, p.grad, rescale, eps=0.5)
        orthogonalize_grad_(p, rescale=rescale, eps=0.5)
        torch.testing.assert_close(p.grad, expected, rtol=1e-13, atol=0)
    p.grad = torch.tensor([1e-30, -1e-30], dtype=torch.float64)
    expected = oracle(p, p.grad, True)
    orthogonalize_grad_(p)
    torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=0)
    p.data.zero_()
    p.grad = torch.tensor([1.0, 0.3], dtype=torch.float64)
    orthogonalize_grad_(p, eps=0.0)
    assert p.grad.tolist() == [1.0, 0.3]


@pytest.mark.parametrize(("dtype", "orthogonal"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("parallel", [0.0, 10.0, 1e4])
@pytest.mark.parametrize("rescale", [True, False])
def test_orthogonal_to_the_weight_and_of_the_length_said(dtype, orthogonal, parallel, rescale):
    draw = torch.Generator().manual_seed(3)
    params = [nn.Parameter(torch.randn(n, generator=draw, dtype=dtype)) for n in (30, 5_000)]
    for p in params:
        p.grad = torch.randn(p.shape, generator=draw, dtype=dtype) - parallel * p.detach()
    grads = [p.grad.double() for p in params]
    orthogonalize_grad_(params, rescale=rescale)
    for p, g in zip(params, grads, strict=True):
        w, found = p.detach().double(), p.grad.double()
        assert abs(w @ found) <= orthogonal * w.norm() * found.norm()
        assert found @ g >= 0
        squared = g @ g - (0 if rescale else (w @ g) ** 2 / (w @ w))
        # Without rescaling the difference of two nearly equal numbers is left, known to their rounding.
        rounding = 4 * torch.finfo(dtype).eps * (1 if rescale else (g @ g / squared).sqrt().item())
        torch.testing.assert_close(found @ found, squared, rtol=max(1e-6, rounding), atol=0)


@given(st.integers(0, 10_000), st.lists(st.integers(1, 5), max_size=3), st.booleans(), st.floats(-8, 8))
@settings(max_examples=40, deadline=None)
def test_invariances(seed, shape, rescale, exponent):
    draw = torch.Generator().manual_seed(seed)
    w, g = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))

    def projected(w, g):
        p = nn.Parameter(w.clone())
        p.grad = g.clone()
        orthogonalize_grad_(p, rescale=rescale)
        return p.grad

    once, scale = projected(w, g), 10.0**exponent
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(projected(w, once), once, **close)
    torch.testing.assert_close(projected(-scale * w, g), once, **close)
    torch.testing.assert_close(projected(w, scale * g) / scale, once, **close)


def test_degenerate_gradients():
    ones = torch.arange(1.0, 4.0)
    zero_weight, parallel, no_gradient, zero_gradient, single = (
        nn.Parameter(x.clone()) for x in [ones] * 4 + [ones[:1]]
    )
    zero_weight.data.zero_()
    zero_weight.grad, parallel.grad, zero_gradient.grad = ones.clone(), -0.1 * ones, torch.zeros(3)
    single.grad = torch.tensor([0.3])
    orthogonalize_grad_([zero_weight, parallel, no_gradient, zero_gradient, single])
    assert torch.equal(zero_weight.grad, ones)
    assert no_gradient.grad is None
    assert not parallel.grad.any() and not zero_gradient.grad.any() and not single.grad.any()


def test_sparse_and_complex_gradients_are_left_alone():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    number = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    number.grad = torch.ones_like(number)
    orthogonalize_grad_([embedding.weight, number])
    assert torch.equal(embedding.weight.grad.to_dense()[1], torch.ones(2))
    assert torch.equal(number.grad, torch.ones_like(number))
    assert nlm_alignment([embedding.weight, number]).shape == (0,)


def test_half_precision_is_summed_in_float32():
    draw = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(50_000, generator=draw).bfloat16())
    p.grad = (torch.randn(50_000, generator=draw) + 0.5 * p.detach().float()).bfloat16()
    wide = nn.Parameter(p.detach().float())
    wide.grad = p.grad.float()
    orthogonalize_grad_([p, wide])
    assert p.grad.dtype == torch.bfloat16
    torch.testing.assert_close(p.grad, wide.grad.bfloat16(), **EXACT)


def test_lists_are_cut_without_a_trace(monkeypatch):
    whole, parts = small(), small()
    orthogonalize_grad_(whole)
    monkeypatch.setattr(projection, "LIST", 20)
    orthogonalize_grad_(parts)
    torch.testing.assert_close([p.grad for p in parts], [p.grad for p in whole], **EXACT)
    torch.testing.assert_close(nlm_alignment(parts), nlm_alignment(whole), **EXACT)


def test_it_compiles_to_one_graph():
    def project(params):
        orthogonalize_grad_(params)
        return params[0].grad + 0

    eager, compiled = small()[:4], small()[:4]
    project(eager)
    torch.compile(project, backend="aot_eager", fullgraph=True)(compiled)
    torch.testing.assert_close([p.grad for p in compiled], [p.grad for p in eager], rtol=1e-12, atol=1e-14)


def test_with_sgd_norms_grow_by_pythagoras():
    params = parameters()
    optimizer = PerpGrad(torch.optim.SGD(params, lr=0.1))
    for _ in gradients(params, 3):
        before = [p.detach().square().sum() for p in params]
        optimizer.step()
        expected = [n + 0.01 * p.grad.square().sum() for n, p in zip(before, params, strict=True)]
        torch.testing.assert_close([p.detach().square().sum() for p in params], expected, rtol=1e-9, atol=1e-12)


def test_the_base_sees_the_projected_gradients_and_its_momentum_stays_as_it_is():
    params, others = parameters(), parameters()
    optimizer, base = perp_adamw(params), torch.optim.AdamW(others, lr=0.01)
    for _ in zip(gradients(params, 5), gradients(others, 5), strict=True):
        for q in others:
            if q.numel() < 1000:
                q.grad = oracle(q, q.grad, True)
            else:
                orthogonalize_grad_(q)
        optimizer.step()
        base.step()
    torch.testing.assert_close([p.detach() for p in params], [q.detach() for q in others], rtol=1e-10, atol=1e-12)


def test_a_scale_invariant_network_is_trained_as_by_the_base():
    def run(wrap):
        torch.manual_seed(0)
        w = nn.Parameter(torch.randn(6, dtype=torch.float64))
        x = torch.randn(20, 6, dtype=torch.float64)
        optimizer = wrap(torch.optim.SGD([w], lr=0.5, momentum=0.9))
        for _ in range(50):
            optimizer.zero_grad()
            (x @ (w / w.norm()) - x[:, 0]).square().mean().backward()
            optimizer.step()
        return w.detach()

    torch.testing.assert_close(run(PerpGrad), run(lambda base: base), rtol=1e-6, atol=1e-9)


def test_a_closure_is_called_once_and_its_gradients_are_the_ones_projected():
    model, by_hand = network(), network()
    optimizer, base = make(model.parameters(), torch.optim.SGD, lr=0.1), torch.optim.SGD(by_hand.parameters(), lr=0.1)
    x, calls = torch.ones(8, 4, dtype=torch.float64), []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    for p in model.parameters():
        p.grad = torch.full_like(p, 1e6)  # stale: from a step before
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    expected = by_hand(x).square().sum()
    expected.backward()
    orthogonalize_grad_(by_hand.parameters())
    base.step()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(list(model.parameters()), list(by_hand.parameters()), **EXACT)


def test_it_may_be_a_hook_of_the_optimizer():
    params, others = small(), small()
    hooked = torch.optim.AdamW(params, lr=0.1)
    hooked.register_step_pre_hook(lambda *_: orthogonalize_grad_(params))
    hooked.step()
    PerpGrad(torch.optim.AdamW(others, lr=0.1)).step()
    torch.testing.assert_close([p.detach() for p in params], [p.detach() for p in others], **EXACT)


@pytest.mark.parametrize("how", ["function", "collection"])
def test_excluded_parameters_keep_their_gradients(how):
    params = small()
    vectors = [p for p in params if p.dim() <= 1]
    exclude = is_vector if how == "function" else iter(vectors)
    optimizer = PerpGrad(torch.optim.SGD(params, lr=0.1), exclude=exclude)
    before, expected = [p.grad.clone() for p in params], [oracle(p, p.grad, True) for p in params]
    params, optimizer = pickle.loads(pickle.dumps((params, optimizer)))
    for p, g in zip(params, before, strict=True):
        p.grad = g.clone()  # pickle leaves gradients out
    optimizer.step()
    for p, g, projected in zip(params, before, expected, strict=True):
        torch.testing.assert_close(p.grad, g if p.dim() <= 1 else projected, rtol=1e-12, atol=1e-14)


def is_vector(p):
    return p.dim() <= 1


def test_groups_state_checkpoints_and_hooks_are_the_bases():
    model = network()
    base = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-4)
    optimizer = PerpGrad(base, eps=1e-20)
    assert optimizer.param_groups is base.param_groups and base.param_groups[0]["eps"] == 1e-4
    seen = []
    optimizer.register_step_pre_hook(lambda opt, *_: seen.append(opt))
    optimizer.register_step_post_hook(lambda opt, *_: seen.append(opt))
    for register in ("state_dict_pre", "load_state_dict_pre", "load_state_dict_post"):
        getattr(optimizer, f"register_{register}_hook")(lambda opt, *_: seen.append(opt))
    optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "note": 1})
    train(model, optimizer, range(2))
    assert seen == [base] * 4
    saved = optimizer.state_dict()
    assert saved.keys() == {"state", "param_groups", "note"} and saved["state"][0]["exp_avg"].any()
    plain = torch.optim.AdamW(network().parameters())
    plain.load_state_dict(copy.deepcopy(saved))
    optimizer.load_state_dict(saved)
    assert seen == [base] * 7
    assert optimizer.state is base.state and optimizer.param_groups is base.param_groups


def test_other_wrappers_may_stand_around_it():
    model, by_hand = network(), network()
    wrapped = SAM(model.parameters(), perp_adamw(model.parameters()), rho=0.05)
    sam = SAM(by_hand.parameters(), torch.optim.AdamW, rho=0.05, lr=0.01)
    sam.base.register_step_pre_hook(lambda *_: orthogonalize_grad_(by_hand.parameters()))
    torch.testing.assert_close(train(model, wrapped), train(by_hand, sam), **EXACT)


def test_alignment_is_the_cosine():
    model = network()
    model(torch.ones(3, 4, dtype=torch.float64) * torch.arange(3)[:, None]).sin().sum().backward()
    model[3].bias.grad = None
    named = nlm_alignment(model)
    assert list(named) == ["0.weight", "1.weight", "1.bias", "3.weight"]
    for name, p in model.named_parameters():
        if p.grad is not None and p.detach().any():
            expected = F.cosine_similarity(p.detach().flatten(), -p.grad.flatten(), 0).abs()
            torch.testing.assert_close(named[name], expected, rtol=1e-9, atol=1e-12)
    assert named["1.bias"] == 0, "a weight of zeros has no direction"
    torch.testing.assert_close(nlm_alignment(model.named_parameters()), named, **EXACT)
    torch.testing.assert_close(nlm_alignment(model.parameters()), torch.stack(list(named.values())), **EXACT)
    torch.testing.assert_close(nlm_alignment(model[3].weight), named["3.weight"], **EXACT)
    with pytest.raises(ValueError, match="params = a tensor is out of range"):
        nlm_alignment(model[3].bias)


def test_scaling_a_homogeneous_network_is_what_alignment_finds():
    """On one pair that is right by far, -g of a positively homogeneous network has a part along w > 0."""
    w = nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 3.0]], dtype=torch.float64))
    F.cross_entropy(torch.eye(2, dtype=torch.float64) @ w.T, torch.tensor([0, 1])).backward()
    assert (w.detach() * -w.grad).sum() > 0
    assert nlm_alignment(w) == pytest.approx(0.5**0.5)


@pytest.mark.parametrize(("dtype", "edge"), [(torch.float32, 16.6), (torch.float64, 36.7), (torch.bfloat16, 5.6)])
def test_collapse_begins_where_the_dtype_ends(dtype, edge):
    logits = torch.tensor([[edge * 0.95, 0.0], [edge * 1.1, 0.0], [0.0, edge * 1.1]], dtype=torch.float64)
    target = torch.zeros(3, dtype=torch.long)
    assert softmax_collapse_fraction(logits, target, dtype).item() == pytest.approx(1 / 3)


def test_collapse_is_a_loss_of_exactly_zero():
    draw = torch.Generator().manual_seed(0)
    logits, target = 12 * torch.randn(4, 500, 3, generator=draw), torch.randint(3, (4, 500), generator=draw)
    losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    found = softmax_collapse_fraction(logits, target)
    assert 0.05 < found < 0.4 and found == (losses == 0).float().mean()
    assert softmax_collapse_fraction(logits + 1e4, target.int(), torch.float64) < found


def test_bad_input_is_refused_by_name():
    p = nn.Parameter(torch.ones(2))
    base = torch.optim.SGD([p], lr=0.1)
    for eps in (-1e-30, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"eps = .* is out of range"):
            PerpGrad(base, eps=eps)
        with pytest.raises(ValueError, match=r"eps = .* is out of range"):
            orthogonalize_grad_([p], eps=eps)
    with pytest.raises(TypeError, match=r"optimizer = .* is out of range"):
        PerpGrad(torch.optim.SGD)
    for exclude in (p, 3, ["weight"]):
        with pytest.raises(TypeError, match="exclude is out of range"):
            PerpGrad(base, exclude=exclude)
    PerpGrad(base, exclude=[])
    target = torch.tensor([0])
    with pytest.raises(ValueError, match=r"target.shape = \(1,\) is out of range: \(2,\)"):
        softmax_collapse_fraction(torch.zeros(2, 3), target)
    with pytest.raises(ValueError, match=r"logits.shape = \(0, 3\) is out of range"):
        softmax_collapse_fraction(torch.zeros(0, 3), target[:0])
    with pytest.raises(ValueError, match=r"dtype = torch\.int64 is out of range"):
        softmax_collapse_fraction(torch.zeros(1, 3), target, torch.int64)
    for name in ("lr", "weight_decay"):
        with pytest.raises(ValueError, match=f"{name} = -1 is out of range"):
            apply(DEFAULT_RECIPE, **{name: -1})


def test_in_the_bench_it_stands_around_the_recipes_optimizer():
    task, budget = resolve_task("digits(model='mlp')"), Budget(steps=5, batch_size=60, evaluations=0)

    def by_hand(run):
        optimizer = torch.optim.AdamW(run.model.parameters(), lr=0.01, weight_decay=0.1)
        optimizer.register_step_pre_hook(lambda *_: orthogonalize_grad_(run.model.parameters()))
        # Its own closure would come after the hook.
        step = optimizer.step
        optimizer.step = lambda closure: (closure(), step())
        return optimizer

    (specs,), (base,) = parse_specs("perpgrad"), parse_specs("adamw")
    recipe = resolve(specs, base).recipe({"perpgrad.lr": 0.01, "perpgrad.weight_decay": 0.1})
    ones = fit(recipe, task, budget, 7).model
    others = fit(replace(DEFAULT_RECIPE, update=by_hand), task, budget, 7).model
    torch.testing.assert_close(ones.state_dict(), others.state_dict(), **EXACT)
    plain = replace(DEFAULT_RECIPE, update=lambda run: torch.optim.Rprop(run.model.parameters()))
    fit(apply(plain, rescale=False), task, budget, 7)
    with pytest.raises(ValueError, match="perpgrad: Rprop has no option weight_decay"):
        fit(apply(plain, weight_decay=0.1), task, budget, 7)


SHARDED = """
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from assay.optim import nlm_alignment, orthogonalize_grad_
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
draw = torch.Generator().manual_seed(0)
for dtype, close in ((torch.float64, {"rtol": 1e-9, "atol": 1e-12}), (torch.bfloat16, {"rtol": 1e-2, "atol": 1e-2})):
    whole = [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in ((7, 5), (4,), (1, 4))]
    params = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in whole]  # the last: one has none
    for i, (p, q) in enumerate(zip(params, whole)):
        q.grad = torch.randn(q.shape, generator=draw).to(dtype)
        p.grad = distribute_tensor(q.grad, mesh, [Replicate() if i == 0 else Shard(0)])
    torch.testing.assert_close(nlm_alignment(params).to(dtype), nlm_alignment(whole).to(dtype), **close)
    orthogonalize_grad_(params)
    orthogonalize_grad_(whole)
    for p, q in zip(params, whole):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, **close)
"""


def test_shards_are_projected_as_one(tmp_path):
    """One of them may be empty, and a gradient may be placed otherwise than its parameter."""
    run_on_two(SHARDED, tmp_path)


class NoOp(PerpGrad):
    """The broken variant: the gradients stay as they are."""

    def _projected(self):
        return iter(())


def test_the_claim_fails_for_a_wrapper_that_does_nothing():
    broken = room.claim(Bench(quick=True), method=NoOp, reported=(), epochs=30)
    assert broken.verdict == broken.checks[0].verdict == "does not hold"
    assert room.grok(room.PERP, 100, epochs=100, method=PerpGrad)["test"] > 0.95
