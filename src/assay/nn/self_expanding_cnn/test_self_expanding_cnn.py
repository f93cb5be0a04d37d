"""The network's surgery, the rule, and broken variants of its claim."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.evidence import FAILS, HOLDS, Bench
from assay.nn._contract import Example
from assay.nn.expand import (
    Expander,
    SelfExpandingCNN,
    insert_identity_conv,
    natural_expansion_score,
    widen_conv,
)
from assay.nn.self_expanding_cnn.claim import EXPANDED, RANDOM, SCRATCH, Chance, _train, claim, figure, measure

TINY = {"image_size": 4, "hidden": 3, "dropout": 0.0, "fc_dropout": 0.0}
EXAMPLES = [
    Example(partial(SelfExpandingCNN, 1, 2, (2, 1), **TINY), (3, 1, 4, 4)),
    Example(partial(SelfExpandingCNN, 1, 2, (2,), preserve="paper", **TINY), (3, 1, 4, 4)),
]
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


def net(channels: tuple[int, ...] = (3, 2, 4), **options: object) -> SelfExpandingCNN:
    """A network that has been trained a little."""
    torch.manual_seed(0)
    given = {"image_size": 8, "dropout": 0.0, "fc_dropout": 0.0, **options}
    model = SelfExpandingCNN(2, 5, channels, dtype=torch.float64, **given)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        train(model, optimizer)
    return model


def images(seed: int = 1) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(12, 2, 8, 8, dtype=torch.float64, generator=draw), torch.randint(5, (12,), generator=draw)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 1) -> None:
    x, y = images(seed)
    optimizer.zero_grad()
    F.cross_entropy(model.train()(x), y).backward()
    optimizer.step()


def test_the_architecture():
    model = SelfExpandingCNN(3, 10)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert [model.channels(b) for b in range(3)] == [16] * 3 and model.mix.in_channels == 32
    block = model.blocks[0]
    assert [type(m).__name__ for m in block[0]] == ["Conv2d", "Dropout", "BatchNorm2d", "LeakyReLU"]
    assert isinstance(block[1], nn.MaxPool2d) and block[0][1].p == 0.1 and model.head[5].p == 0.05
    x = torch.randn(2, 3, 32, 32)
    model.eval()
    first = block(x)
    last = model.blocks[2](model.blocks[1](first))
    joined = torch.cat([last, F.max_pool2d(first, 4)], 1)
    torch.testing.assert_close(model(x), model.head(model.mix(joined)))


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_an_exact_expansion_changes_no_output(block, training):
    model, x = net().train(training), images()[0]
    before = copy.deepcopy(model)(x)
    model.add_layer(block, calibration=x)
    assert model.training == training
    close(copy.deepcopy(model)(x), before)
    model.widen(block, 2, calibration=x)
    close(copy.deepcopy(model)(x), before)
    model.add_layer(block, calibration=x)
    close(copy.deepcopy(model)(x), before)
    model.widen(block, 3)
    close(copy.deepcopy(model)(x), before)


def test_without_calibration_evaluation_is_exact_for_any_images():
    model = net()
    before = model.eval()(images(2)[0])
    for block in (0, 1, 2):
        model.add_layer(block)
        model.widen(block, 1)
    close(model(images(2)[0]), before)
    assert model.train()(images()[0]).isfinite().all()


def test_the_papers_expansion_has_noise_fresh_statistics_and_leaky_relu():
    model = net(preserve="paper")
    before = model.eval()(images()[0])
    model.add_layer(1, noise=1e-2)
    conv, norm, act = model.blocks[1][1]
    torch.testing.assert_close(conv.weight, dirac(conv.weight), rtol=0, atol=0.05)
    assert not torch.equal(conv.weight, dirac(conv.weight)) and isinstance(act, nn.LeakyReLU)
    assert norm.weight.eq(1).all() and norm.running_var.eq(1).all() and conv.bias is None
    assert not torch.allclose(model.eval()(images()[0]), before)
    model.widen(1, 2, noise=1e-4)
    entered = model.blocks[2][0][0].weight[:, 2:]
    assert 0 < entered.abs().max() < 1e-3


def dirac(weight: Tensor) -> Tensor:
    return nn.init.dirac_(torch.empty_like(weight))


def test_new_channels_start_as_the_card_says():
    model = net()
    old = copy.deepcopy(model.state_dict())
    model.add_layer(0)
    model.widen(0, 2, noise=1e-4)
    first, added = model.blocks[0][0], model.blocks[0][1]
    torch.testing.assert_close(first[0].weight[:3], old["blocks.0.0.0.weight"], rtol=0, atol=0)
    assert 0 < first[0].weight[3:].abs().max() < 1e-3 and first[0].bias[3:].eq(0).all()
    assert first[2].weight[3:].eq(1).all() and first[2].bias[3:].eq(0).all()
    assert first[2].running_mean[3:].eq(0).all() and first[2].running_var[3:].eq(1).all()
    assert added[0].weight[:3, 3:].eq(0).all() and added[0].weight[3:].abs().min() > 0
    assert added[2].weight[3:].eq(1).all()
    assert model.blocks[1][0][0].weight[:, 3:].eq(0).all()
    mix = model.mix.weight  # the last block's four channels, then the first block's
    torch.testing.assert_close(mix[:, :7], old["mix.weight"], rtol=0, atol=0)
    assert mix.shape[1] == 9 and mix[:, 7:].eq(0).all()
    model.widen(2, 1)
    torch.testing.assert_close(model.mix.weight[:, [0, 1, 2, 3, 5, 6, 7]], old["mix.weight"], rtol=0, atol=0)
    assert model.mix.weight[:, 4].eq(0).all()


def test_twenty_random_expansions_and_the_state_dict_of_what_came_out():
    model, draw = net(capacity=4), torch.Generator().manual_seed(3)
    before = model.eval()(images()[0])
    for _ in range(20):
        block, deepen = (int(torch.randint(n, (), generator=draw)) for n in (3, 2))
        if deepen and model.added_layers(block) < 4:
            model.add_layer(block)
        else:
            model.widen(block, 1 + block)
    close(model.eval()(images()[0]), before)
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    train(model, torch.optim.Adam(model.parameters()))
    again = SelfExpandingCNN.from_state_dict(model.state_dict())
    assert again.structure() == model.structure() and repr(again) == repr(model)
    close(again.eval()(images()[0]), model.eval()(images()[0]), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"use SelfExpandingCNN\.from_state_dict"):
        net().load_state_dict({**net().state_dict(), "_extra_state": model.get_extra_state()})
    with pytest.raises(ValueError, match="_extra_state"):
        SelfExpandingCNN.from_state_dict({})


@pytest.mark.parametrize(
    "make", [partial(torch.optim.Adam, amsgrad=True), partial(torch.optim.SGD, lr=0.1, momentum=0.9)]
)
def test_the_optimizer_keeps_its_state_of_old_entries(make):
    model = net()
    head = list(model.head.parameters())
    body = [p for p in model.parameters() if all(p is not h for h in head)]
    optimizer = make([{"params": body}, {"params": head, "weight_decay": 0.1}])
    train(model, optimizer)
    weight, mix = model.blocks[0][0][0].weight, model.mix.weight
    old, old_mix = (
        {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, Tensor)} for p in (weight, mix)
    )
    for growth in (model.add_layer(0), model.widen(0, 2), model.widen(2, 1)):
        growth.follow(optimizer)
    ours = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in ours} == {id(p) for p in model.parameters()} and len(ours) == len(list(model.parameters()))
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == {id(p) for p in head}
    assert set(optimizer.state) <= set(ours)
    for key, value in optimizer.state[model.blocks[0][0][0].weight].items():
        if value is not None and value.dim():
            close(value[:3], old[key], rtol=0, atol=0)
            assert value[3:].eq(0).all()
        elif value is not None:
            assert value == old[key]
    for key, value in optimizer.state[model.mix.weight].items():
        if value is not None and value.dim():
            close(value[:, [0, 1, 2, 3, 5, 6, 7]], old_mix[key], rtol=0, atol=0)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer)
    assert not torch.equal(model.blocks[0][0][0].weight, before["blocks.0.0.0.weight"])


@pytest.mark.parametrize("preserve", ["exact", "paper"])
def test_new_parameters_get_a_gradient_within_two_steps(preserve):
    model = net(preserve=preserve)
    model.add_layer(1)
    model.widen(0, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer)
    train(model, optimizer)
    conv, _, act = model.blocks[1][1]
    assert conv.weight.grad.abs().min() > 0 and model.blocks[1][0][0].weight.grad[:, 3:].abs().min() > 0
    assert model.blocks[0][0][0].weight.grad[3:].abs().max() > 0
    assert preserve == "paper" or act.weight.grad.abs().max() > 0


def test_functions_on_networks_of_their_own():
    torch.manual_seed(0)
    seq = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.PReLU(), nn.Flatten(), nn.Linear(27, 2)).double()
    x = torch.randn(6, 1, 5, 5, dtype=torch.float64)
    before = seq.eval()(x)
    growth = widen_conv(seq[0], seq[1:], 2)
    close(seq.eval()(x), before)
    assert seq[4].in_features == 45 and seq[1].num_features == 5 and seq[2].num_parameters == 1
    assert [old.shape[0] for old, *_ in growth.replaced] == [3, 3, 3, 3, 2]
    insert_identity_conv(seq, 3, 5, kernel_size=5)
    close(seq.eval()(x), before)
    for wrong, match in (
        (partial(insert_identity_conv, seq, 9, 5), "index = 9"),
        (partial(insert_identity_conv, seq, 0, 1, kernel_size=2), "kernel_size = 2"),
        (partial(widen_conv, seq[0], [nn.Linear(7, 1)], 1), "next_modules = Linear"),
        (partial(widen_conv, seq[0], [nn.LayerNorm(5)], 1), "next_modules = LayerNorm"),
        (partial(widen_conv, nn.Conv2d(2, 2, 1, groups=2), [], 1), r"conv\.groups = 2"),
        (partial(widen_conv, seq[0], [], 0), "n = 0"),
    ):
        with pytest.raises(ValueError, match=f"{match}.* is out of range"):
            wrong()


def expander(model: SelfExpandingCNN, **options: object) -> Expander:
    """One that always expands."""
    return Expander(model, **{"threshold": 1e-6, "cooldown": 0, **options})


def test_the_rule_its_threshold_its_cool_down_and_its_bounds():
    batches = [images(1), images(2)]
    wanted = {"layer": 1.9, "width": 1.0, "none": 1.0}

    def score(grown, chosen, loss_fn, *, baseline_params):
        assert len(chosen) == 1 and baseline_params == before.num_parameters()
        layers = sum(grown.added_layers(b) for b in range(3)) - sum(before.added_layers(b) for b in range(3))
        kind = "layer" if layers else "width" if grown.num_parameters() > baseline_params else "none"
        return wanted[kind] + (0.01 if kind != "none" and grown.channels(1) > 2 else 0)

    model = net()
    before = copy.deepcopy(model)
    grow = expander(model, threshold=2.0, cooldown=2, score_batches=1, score=score)
    assert grow.maybe_expand(batches, F.cross_entropy) is None and not grow.history
    wanted["width"] = 2.01
    event = grow.maybe_expand(batches, F.cross_entropy)
    assert (event.kind, event.block, event.call) == ("width", 1, 2) and model.channels(1) == 4
    assert event.parameters == (before.num_parameters(), model.num_parameters()) and len(event.scores) == 7
    wanted["layer"] = 5.0
    before = copy.deepcopy(model)
    assert [grow.maybe_expand(batches, F.cross_entropy) for _ in range(2)] == [None, None]
    assert grow.maybe_expand(batches, F.cross_entropy).kind == "layer" and len(grow.history) == 2
    for options in ({"max_params": model.num_parameters()}, {}):
        full = net(capacity=0) if not options else model
        before = copy.deepcopy(full)
        assert expander(full, **options).maybe_expand(batches, F.cross_entropy) is None


def test_what_was_scored_is_what_is_put_in_and_scoring_leaves_no_trace():
    model, batches, seen = net(dropout=0.2), [images()], []
    model.train()
    model.blocks[1].eval()
    model.mix.weight.grad = torch.ones_like(model.mix.weight)
    state, flags, rng = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()], torch.get_rng_state()

    def score(grown, *given, **options):
        seen.append(copy.deepcopy(grown.state_dict()))
        return natural_expansion_score(grown, *given, **options)

    assert Expander(model, threshold=1e6, score=score).maybe_expand(batches, F.cross_entropy) is None
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    assert flags == [m.training for m in model.modules()] and torch.equal(rng, torch.get_rng_state())
    assert model.mix.weight.grad.eq(1).all()
    seen.clear()
    event = expander(model, score=score).maybe_expand(batches, F.cross_entropy)
    scored = seen[list(event.scores).index((event.kind, event.block)) - 1]
    torch.testing.assert_close(dict(model.state_dict()), dict(scored), rtol=0, atol=0)


def test_arguments_out_of_range():
    for wrong in ({"in_channels": 0}, {"channels": ()}, {"capacity": -1}, {"dropout": 1.0}, {"preserve": "no"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} = .* is out of range"):
            SelfExpandingCNN(**{"in_channels": 1, "num_classes": 2, **wrong})
    with pytest.raises(ValueError, match="image_size = 4 is out of range"):
        SelfExpandingCNN(1, 2, image_size=4)
    for wrong in ({"threshold": 0}, {"widen_by": 0}, {"cooldown": -1}, {"score_batches": 0}, {"max_params": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} = .* is out of range"):
            Expander(net(), **wrong)
    with pytest.raises(ValueError, match="block = 3 is out of range"):
        net().widen(3, 1)
    with pytest.raises(ValueError, match="block = 1 is out of range: fewer than 0 added layers"):
        net(capacity=0).add_layer(1)
    with pytest.raises(ValueError, match="batches = none"):
        expander(net()).maybe_expand([], F.cross_entropy)


class Late(Expander):
    """It chooses by chance, as the claim's control does, and not before the network has learned something."""

    def __init__(self, model: SelfExpandingCNN, *, threshold: float, cooldown: int) -> None:
        super().__init__(model, threshold=1e-9, cooldown=cooldown, score=Chance(0))
        self.resting = 7


class Box(Late):
    """The broken variant of the card: an "identity" with 1 in every place of its kernel, as the authors have it."""

    def _expand(self, model, kind, block, batches):
        growth = model.add_layer(block, calibration=batches[0][0])
        with torch.no_grad():
            conv = model.blocks[block][-2][0]
            conv.weight.copy_(torch.eye(len(conv.weight))[..., None, None].expand_as(conv.weight))
        return growth


def test_the_claim_does_not_hold_for_a_box_filter():
    real, box = (claim(Bench(quick=True), method=method, seeds=1, reported=False) for method in (Late, Box))
    assert [check.verdict for check in real.checks[:2]] == [HOLDS, HOLDS]
    assert box.checks[1].verdict == FAILS
    assert figure(real) is not None


@pytest.mark.parametrize("variant", [SCRATCH, RANDOM])
def test_an_arm_is_the_same_whether_or_not_the_expanded_network_was_trained_before(variant):
    run = partial(measure, seed=0, method=Late, bench=Bench(quick=True))
    _train.cache_clear()
    first = run(variant)
    assert run(EXPANDED)["expansions"] == 1
    _train.cache_clear()
    run(EXPANDED)
    assert run(variant) == first


def test_the_claim_does_not_hold_for_the_authors_score():
    def degenerate(model: SelfExpandingCNN, *, threshold: float, cooldown: int) -> Expander:
        score = partial(natural_expansion_score, fisher="batch", damping=1e-12)
        return Expander(model, threshold=threshold, cooldown=cooldown, score=score)

    real, broken = (
        claim(Bench(quick=True), method=method, seeds=1, reported=False) for method in (Expander, degenerate)
    )
    assert [evidence.checks[0].verdict for evidence in (real, broken)] == [HOLDS, FAILS]
