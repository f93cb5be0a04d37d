"""The family's contract over every optimizer that a card makes public, and the engine against torch's own."""

import functools
import importlib
import inspect
import itertools

import pytest
import torch

from assay import catalogue
from assay.optim import _rule
from assay.optim._contract import CHECKS, EXACT, gradients, parameters, same, walk
from assay.optim._many import Many
from assay.optim._rule import RuleOptimizer
from assay.optim._wrapper_contract import WRAPPER_CHECKS


def rooms():
    for card in catalogue.search(family="optim"):
        yield card, importlib.import_module(f"{card.module.rpartition('.')[0]}.test_{card.folder.name}")


def optimizers():
    for card, test in rooms():
        for name in (name for name, owner in catalogue.public_names("assay.optim") if owner is card):
            found = card.load(name)
            if inspect.isclass(found) and issubclass(found, torch.optim.Optimizer) and name not in wrappers_of(test):
                example = getattr(test, "EXAMPLE", {}).get(name, {})
                yield pytest.param(functools.partial(found, **example) if example else found, id=name)


def wrappers_of(test):
    """Optimizers around others, and those whose step takes more than gradients: they are held to their own checks."""
    return {**getattr(test, "WRAPPERS", {}), **dict.fromkeys(getattr(test, "OWN_STEP", ()))}


def wrappers():
    for _, test in rooms():
        for name, make in getattr(test, "WRAPPERS", {}).items():
            yield pytest.param(make, id=name)


@pytest.mark.parametrize("check", WRAPPER_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("make", list(wrappers()))
def test_wrapper(make, check):
    check(make)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("make", list(optimizers()))
def test_optimizer(make, check, monkeypatch):
    check(make, monkeypatch) if "monkeypatch" in inspect.signature(check).parameters else check(make)


class Adam(RuleOptimizer):
    """Plain AdamW as a rule: the engine's own yardstick."""

    slots = ("exp_avg", "exp_avg_sq")

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, **how):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, **how)

    @staticmethod
    def rule(p, g, m, v, *, lr, t, betas, eps, weight_decay):
        m.lerp_(g, 1 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        p.mul_(1 - lr * weight_decay)
        p.sub_(v.sqrt().div_((1 - betas[1] ** t) ** 0.5).add_(eps).reciprocal_().mul_(m).mul_(lr / (1 - betas[0] ** t)))


def test_adam_as_a_rule_is_torchs_adamw():
    mine, torchs = walk(Adam, parameters(), steps=20), walk(torch.optim.AdamW, parameters(), steps=20)
    for p, q in zip(mine, torchs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("check", CHECKS[:3], ids=lambda check: check.__name__)
def test_engine_runs_it_alike_on_every_path(check, monkeypatch):
    check(Adam, monkeypatch) if "monkeypatch" in inspect.signature(check).parameters else check(Adam)


def test_mixed_dtypes_in_a_group_decay_once():
    params = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    optimizer = Adam(params, lr=0.1, weight_decay=0.5)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert [p[0].item() for p in params] == pytest.approx([0.95, 0.95])


def test_parameters_count_their_own_steps():
    params = parameters()
    late = params[0]
    optimizer = Adam(params)
    for step in gradients(params, 3):
        if step < 2:
            late.grad = None
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [1] + [3] * (len(params) - 1)
    alone = parameters()[:1]
    single = Adam(alone)
    alone[0].grad = late.grad.clone()
    single.step()
    torch.testing.assert_close(alone[0], late, **EXACT)


def test_large_tensors_are_cut_and_small_ones_listed():
    seen = []

    class Spy(Adam):
        @staticmethod
        def rule(p, *rest, **options):
            seen.append(len(p.tensors) if isinstance(p, Many) else p.numel())

    params = [torch.nn.Parameter(torch.ones(n)) for n in (3, 4, _rule.PIECE * 2 + 1)]
    for p in params:
        p.grad = torch.ones_like(p)
    Spy(params).step()
    assert seen == [_rule.PIECE, _rule.PIECE, 1, 2]


def test_options_added_after_a_checkpoint_get_their_default():
    params = parameters()
    optimizer = Adam(params)
    state = optimizer.state_dict()
    del state["param_groups"][0]["foreach"]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["foreach"] is None


def test_a_native_kernel_is_not_promised():
    with pytest.raises(ValueError, match="fused = True is out of range"):
        Adam(parameters(), fused=True)


def test_complex_parameters_are_refused():
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="complex"):
        Adam([p]).step()


def test_many_says_which_operator_is_missing():
    with pytest.raises(AttributeError, match="cholesky: no list operator"):
        Many([torch.ones(1)]).cholesky()


class Descent(RuleOptimizer):
    """Plain descent that sees every parameter whole."""

    slots = ()

    def __init__(self, params, **how):
        super().__init__(params, {"lr": 0.1}, **how)

    @staticmethod
    def elementwise(p):
        return False

    @staticmethod
    def rule(p, g, *, lr, t):
        p.sub_(g.mul(lr))


def test_compiled_scalars_are_written(monkeypatch):
    monkeypatch.setattr(_rule, "COMPILER", "aot_eager")
    params = [torch.nn.Parameter(torch.ones((), dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    for p in params:
        p.grad = torch.ones_like(p)
    Descent(params, compile=True).step()
    assert [p.item() for p in params] == pytest.approx([0.9, 0.9])


def test_compiled_matrices_share_a_graph_and_many_kinds_are_no_error(monkeypatch):
    monkeypatch.setattr(_rule, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    walk(Descent, [torch.nn.Parameter(torch.ones(n, 2 * n)) for n in range(2, 12)], steps=1, compile=True)
    assert graphs["unique_graphs"] == before + 1
    # More kinds than the eight graphs that torch allows a function.
    shapes = itertools.product((1, 3), (1, 4), (1, 5), (1, 6))
    walk(Descent, [torch.nn.Parameter(torch.ones(shape)) for shape in shapes], steps=1, compile=True)


def test_compiled_float32_starts_as_exactly_as_eager(monkeypatch):
    """1 - 0.999^t in float32 would be wrong in the fifth digit."""
    monkeypatch.setattr(_rule, "COMPILER", "aot_eager")
    _rule._compiled.cache_clear()
    eager, compiled = (walk(Adam, parameters(torch.float32), steps=2, lr=0.1, **how) for how in ({}, {"compile": True}))
    same(compiled, eager, rtol=1e-6, atol=1e-6)


def test_groups_may_be_labelled_but_not_misspelt():
    params = parameters()
    assert Adam([{"params": params[:1], "name": "first", "lr_scale": 0.5}]).param_groups[0]["name"] == "first"
    with pytest.raises(TypeError, match="has no option 'weight_deacy'"):
        Adam([{"params": params, "weight_deacy": 0.1}])
