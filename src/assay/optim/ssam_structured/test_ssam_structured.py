"""Sparse SAM in patterns, what it spares autograd, and the implicit form against two passes by hand."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay.bench import Bench
from assay.bench.arms import DEFAULT_RECIPE
from assay.bench.loop import fit
from assay.bench.recipe import Budget
from assay.bench.tasks import resolve_task
from assay.nn import to_implicit_sparse
from assay.optim import SAM, SSAM, ImplicitSSAM
from assay.optim._wrapper_contract import BASES, EXACT, closure_of, network, train
from assay.optim.sam import FisherMask, fisher_diagonal, nm_mask, structured_mask
from assay.optim.ssam_structured import claim as room
from assay.optim.ssam_structured.ssam_structured import apply

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
PATTERNS = [
    {"pattern": "structured"},
    {"pattern": "structured", "granularity": "channel"},
    {"pattern": "nm", "n": 1, "m": 2},
]


def sparse(params, **options):
    return SSAM(params, torch.optim.SGD, 0.3, lr=0.1, momentum=0.9, **options)


OWN_STEP = ["ImplicitSSAM"]
DISTRIBUTED = [(sparse, options) for options in PATTERNS]


def implicit(seed=0):
    return to_implicit_sparse(network(seed))


def flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])


def data_of(size=12):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(size, 4, generator=draw, dtype=torch.float64), torch.randint(3, (size,), generator=draw)


def refreshed(optimizer, model):
    optimizer.update_mask(model=model, loss_fn=F.cross_entropy, data=data_of(), num_samples=12)
    return optimizer


# --- patterns of the explicit perturbation


@pytest.mark.parametrize("options", PATTERNS, ids=str)
def test_masks_are_the_patterns_of_the_fisher_information(options):
    model = network()
    optimizer = refreshed(sparse(model, sparsity=0.6, **options), model)
    fisher = fisher_diagonal(model, F.cross_entropy, data_of(), 12)
    if options["pattern"] == "structured":
        expected = structured_mask(fisher, 0.6, options.get("granularity", "tensor"))
    else:
        ones = {p: torch.ones_like(p, dtype=torch.bool) for p in fisher}
        expected = {p: nm_mask(f, 1, 2) if f.dim() > 1 else ones[p] for p, f in fisher.items()}
    torch.testing.assert_close(list(optimizer.mask.masks.values()), list(expected.values()))
    assert optimizer.mask_density() == flat(expected.values()).double().mean()
    across = FisherMask(pattern="nm", n=1, m=2, group_dim="out")
    refreshed(SAM(model, torch.optim.SGD, mask=across, lr=0.1), model)
    weight = model[3].weight
    assert torch.equal(across.masks[weight], nm_mask(fisher[weight], 1, 2, group_dim="out"))


@pytest.mark.parametrize("base, options", BASES)
def test_without_zeros_every_pattern_is_sam(base, options):
    ends = []
    for how in ({"pattern": "structured", "sparsity": 0.0}, {"pattern": "nm", "n": 3, "m": 3}, None):
        model = network()
        make = SSAM if how else SAM
        optimizer = make(model, base, 0.3, norm_eps=1e-7, **(how or {}), **options)
        ends.append(train(model, refreshed(optimizer, model) if how else optimizer, range(20)))
    torch.testing.assert_close(ends[0], ends[2], **CLOSE)
    torch.testing.assert_close(ends[1], ends[2], **CLOSE)


@pytest.mark.parametrize("norm", ["full", "active"])
def test_tensors_that_are_off_keep_their_bits_in_the_ascent(norm):
    model = network()
    optimizer = refreshed(sparse(model, pattern="structured", norm=norm), model)
    assert 0 < len(optimizer.mask.off) < 5
    before = {p: p.detach().clone() for p in model.parameters()}
    closure = closure_of(model, optimizer, 0)
    closure()
    whole = {p: p.grad.clone() for p in model.parameters()}
    optimizer.zero_grad()
    with optimizer.first_pass():
        closure()
    on = [p for p in model.parameters() if p not in optimizer.mask.off]
    assert all((p.grad is None) == (norm == "active") for p in optimizer.mask.off)
    length = flat(whole.values() if norm == "full" else [whole[p] for p in on]).norm()
    optimizer.first_step()
    assert all(torch.equal(p, before[p]) for p in optimizer.mask.off)
    for p in on:
        torch.testing.assert_close(p - before[p], 0.3 * whole[p] / length, rtol=1e-6, atol=1e-12)
    assert [p is q for p, (q, _) in zip(on, optimizer._saved, strict=True)] == [True] * len(on)
    closure()
    assert all(p.grad is not None for p in model.parameters()), "the second gradient is of all weights"
    optimizer.second_step()


def test_backward_ends_at_the_lowest_tensor_that_is_on():
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(5, 5), nn.Tanh()))).double()
    optimizer = sparse(model, pattern="structured", norm="active")
    params = list(model.parameters())
    optimizer.mask.set_masks([torch.full_like(p, i >= 4, dtype=torch.bool) for i, p in enumerate(params)])
    needed = []
    for layer in model:
        layer.register_forward_hook(lambda module, inputs, output: needed.append(output.requires_grad))
    x = torch.randn(3, 5, dtype=torch.float64)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert needed == [False] * 4 + [True] * 4 + [True] * 8
    assert all(p.requires_grad for p in params)


@pytest.mark.parametrize("case", ["all off", "error", "frozen"])
def test_what_autograd_is_spared_is_asked_again_afterwards(case):
    model = network()
    model[3].bias.requires_grad_(case != "frozen")
    optimizer = sparse(model, pattern="structured", norm="active", sparsity=1.0 if case == "all off" else 0.5)
    if case == "error":
        with pytest.raises(ZeroDivisionError), optimizer.first_pass():
            1 / 0  # noqa: B018
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, range(2))
    assert [p.requires_grad for p in model.parameters()] == [True] * 4 + [case != "frozen"]
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [True] * 4 + [case != "frozen"]


def test_checkpoints_hold_the_masks():
    for options in PATTERNS:
        model, other = network(), network(seed=9)
        optimizer = refreshed(sparse(model, **options), model)
        fresh = sparse(other, **options, seed=3)
        saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
        other.load_state_dict(saved[0])
        fresh.load_state_dict(saved[1])
        assert fresh.mask_density() == optimizer.mask_density() and len(fresh.mask.off) == len(optimizer.mask.off)
        torch.testing.assert_close(train(other, fresh), train(model, optimizer), **EXACT)


# --- the implicit perturbation


def test_an_implicit_step_is_two_passes_by_hand():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)).double()
    model = to_implicit_sparse(model)
    optimizer = ImplicitSSAM(model, torch.optim.SGD, 0.3, n=1, m=2, lr=0.1)
    refreshed(optimizer, model)
    fisher = fisher_diagonal(model, F.cross_entropy, data_of(), 12)
    masks = [nm_mask(fisher[layer.weight], 1, 2, group_dim="out") for layer in model]
    assert all(torch.equal(layer.mask, mask) for layer, mask in zip(model, masks, strict=True))
    x = torch.randn(5, 4, dtype=torch.float64)
    weights = [p.detach().clone() for p in model.parameters()]

    def exact(params):
        params = [p.detach().requires_grad_() for p in params]
        loss = x
        for weight, bias in zip(params[::2], params[1::2], strict=True):
            loss = F.linear(loss, weight, bias)
        return torch.autograd.grad(loss.square().sum(), params)

    first, activations, g = [], [x], None
    for layer in model:
        activations.append(F.linear(activations[-1], layer.weight, layer.bias))
    g = 2 * activations.pop()
    for layer, mask, a in zip(reversed(model), reversed(masks), reversed(activations), strict=True):
        first = [g.t() @ a, g.sum(0), *first]
        g = g @ (layer.weight * mask)
    norm = flat(first).norm()
    second = exact([w + 0.3 * f / (norm + 1e-7) for w, f in zip(weights, first, strict=True)])

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = [w - 0.1 * s for w, s in zip(weights, second, strict=True)]
    torch.testing.assert_close([p.detach() for p in model.parameters()], expected, **CLOSE)


@pytest.mark.parametrize("base, options", BASES)
def test_with_masks_of_ones_it_is_sam(base, options):
    models = [implicit(), network()]
    optimizers = [
        ImplicitSSAM(models[0], base, 0.3, n=4, m=4, adaptive=True, **options),
        SAM(models[1], base, 0.3, norm_eps=1e-7, adaptive=True, **options),
    ]
    ends = [train(model, optimizer, range(10)) for model, optimizer in zip(models, optimizers, strict=True)]
    torch.testing.assert_close(*ends, **CLOSE)


def test_layers_are_exact_again_after_every_step():
    model = implicit()
    optimizer = ImplicitSSAM(model, torch.optim.SGD, 0.3, lr=0.1)
    seen = []
    model[3].register_forward_hook(lambda module, *_: seen.append(module.origin))
    train(model, optimizer, range(1))
    assert seen == [False, True] and all(layer.origin for layer in optimizer.layers)

    def fails():
        raise KeyboardInterrupt

    for closures in ((fails,), (closure_of(model, optimizer, 0), fails)):
        before = flat(model.parameters())
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(*closures)
        assert all(layer.origin for layer in optimizer.layers) and torch.equal(flat(model.parameters()), before)
    two = copy.deepcopy((model, optimizer))
    optimizer.step(closure_of(model, optimizer, 5))
    closure = closure_of(two[0], two[1], 5)
    with two[1].first_pass():
        closure()
    two[1].first_step()
    with two[1]._statistics(False):
        closure()
    two[1].second_step()
    torch.testing.assert_close(two[0].state_dict(), model.state_dict(), **EXACT)


@pytest.mark.parametrize("options", [*PATTERNS, {"pattern": "unstructured"}], ids=str)
def test_implicit_checkpoints_and_copies_go_on_alike(options):
    model, other = implicit(), implicit(seed=9)
    optimizer = refreshed(ImplicitSSAM(model, torch.optim.AdamW, 0.3, **options, lr=0.01), model)
    train(model, optimizer, range(2))
    fresh = ImplicitSSAM(other, torch.optim.AdamW, 0.3, **options, seed=4, lr=0.3)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    other.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    pairs = [(other, fresh), copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    expected = train(model, optimizer, range(2, 4))
    for pair in pairs:
        torch.testing.assert_close(train(*pair, range(2, 4)), expected, **EXACT)
        assert pair[1].mask_density() == optimizer.mask_density()


def test_schedulers_drive_the_implicit_form():
    model = implicit()
    optimizer = ImplicitSSAM(model, torch.optim.SGD, 0.3, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    train(model, optimizer, range(1))
    scheduler.step()
    before = flat(model.parameters())
    train(model, optimizer, range(1))
    assert torch.equal(flat(model.parameters()), before)


def test_options_out_of_range_and_wrong_use_are_named():
    p = nn.Parameter(torch.ones(2))
    for options, message in [
        ({"pattern": "rows"}, "pattern = 'rows' is out of range: 'unstructured', 'structured', 'nm'"),
        ({"mask": "dynamic", "pattern": "nm"}, "pattern = 'nm' is out of range: the dynamic mask"),
        ({"n": 5}, "n = 5 is out of range"),
        ({"granularity": "row"}, "granularity = 'row' is out of range"),
        ({"norm": "half"}, "norm = 'half' is out of range: 'full', 'active'"),
    ]:
        with pytest.raises(ValueError, match=message):
            sparse([p], **options)
    with pytest.raises(ValueError, match="call to_implicit_sparse"):
        ImplicitSSAM(network(), torch.optim.SGD, lr=0.1)
    model = implicit()
    with pytest.raises(TypeError, match="speed"):
        ImplicitSSAM(model, torch.optim.SGD, lr=0.1, speed=1)
    with pytest.raises(RuntimeError, match="needs the gradient twice"):
        ImplicitSSAM(model, torch.optim.SGD, lr=0.1).step()
    model[0].weight.to_local = lambda: None
    with pytest.raises(RuntimeError, match="sharded"):
        ImplicitSSAM(model, torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("options", [{}, {"pattern": "nm", "rho": 0.2, "lr": 0.01}], ids=str)
def test_in_the_bench_it_has_its_pattern(options):
    task, budget = resolve_task("digits"), Budget(steps=30, batch_size=32, evaluations=0)
    result = fit(apply(DEFAULT_RECIPE, **options), task, budget, 7, test=True)
    assert result.status == "finished" and result.test > 0.5


# --- the claim


class AlwaysExact(ImplicitSSAM):
    """Broken: the layers' masks are never used, so that it is plain SAM."""

    def first_pass(self):
        return SAM.first_pass(self)


def test_layers_that_are_never_masked_are_found_out():
    name = "largest such cosine"
    verdicts = {}
    for method in (AlwaysExact, ImplicitSSAM):
        evidence = room.claim(Bench(quick=True), implicit=method, parts=["direction"])
        verdicts[method] = {check.name: check.verdict for check in evidence.checks}[name]
    assert verdicts == {AlwaysExact: "does not hold", ImplicitSSAM: "holds"}
