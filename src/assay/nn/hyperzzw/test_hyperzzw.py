"""Slow networks, the operator and the Terminator against the paper's formulas in loops, and a broken variant."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.evidence import FAILS, HOLDS, Bench
from assay.nn._contract import Example
from assay.nn.hyperzzw import (
    RGU,
    ContextSlowNet,
    GlobalHyperZZW,
    GroupIBS,
    HyperChannelInteraction,
    HyperInteraction,
    LocalHyperZZW,
    SFNEBlock,
    SlowNet,
    Terminator,
    hyper_zzw_elementwise,
    slow_neural_loss,
)
from assay.nn.hyperzzw.claim import claim, figure


def times_kernel(layer: nn.Module, x: Tensor) -> Tensor:
    return x * layer()


def depthwise(layer: nn.Module, x: Tensor) -> Tensor:
    return F.conv2d(x, layer(x).to(x.dtype), padding=1, groups=x.shape[1])


def with_itself(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x.flip(1))


def after_itself(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x[:, :1].sin())


# Where the local kernels' renormalization takes part, the backward pass is not the derivative, by design.
local = {"gradient": False, "second_gradient": False}
EXAMPLES = [
    Example(partial(SlowNet, 2, 3, 2, hidden=2, omega_0=0.2), (2, 2, 3, 3), forward=times_kernel),
    Example(partial(ContextSlowNet, 2, 3, hidden=4, omega_0=0.2), (3, 2, 4, 5), forward=depthwise, **local),
    Example(partial(GlobalHyperZZW, 2, 3, hidden=2, omega_0=0.2), (2, 2, 3, 3), forward=with_itself),
    Example(partial(LocalHyperZZW, 2, 3, hidden=4, omega_0=0.2), (3, 2, 4, 4), forward=with_itself, **local),
    Example(partial(RGU, 2, (4, 3)), (3, 2, 4, 3)),
    Example(partial(HyperChannelInteraction, 3, hidden=2, omega_0=0.2), (2, 3, 2, 3)),
    Example(partial(HyperInteraction, 2, (3, 2), hidden=2, omega_0=0.2), (2, 2, 3, 2), forward=with_itself),
    Example(partial(GroupIBS, 5, groups=4), (3, 5, 3, 3)),
    Example(
        partial(SFNEBlock, 2, 3, 4, (3, 5, 1, 3), n_previous=1, hidden=4, local_hidden=4, omega_0=0.2),
        (3, 2, 4, 4),
        forward=after_itself,
        bfloat16=0.1,
        **local,
    ),
    Example(
        partial(Terminator, 3, 1, 4, (2, 2), (0, 0), hidden=4, local_hidden=4, omega_0=0.2),
        (3, 1, 4, 4),
        bfloat16=0.1,
        **local,
    ),
]
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
double = {"dtype": torch.float64}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def disturbed(layer: nn.Module) -> nn.Module:
    """Parameters and running statistics away from their first values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.2 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
    return layer


def kernel_at(net: nn.Module, place: tuple[int, ...]) -> Tensor:
    """The slow network's formula for one place, (out_channels,)."""
    c = torch.tensor([-1 + 2 * at / max(1, n - 1) for at, n in zip(place, net.size, strict=True)], dtype=torch.float64)
    h = torch.sin(net.filters[0].weight @ c + net.filters[0].bias)
    for i in range(net.num_layers):
        wave = torch.sin(net.filters[i + 1].weight @ c + net.filters[i + 1].bias)
        h = wave * (net.linears[i].weight @ h + net.linears[i].bias) + net.bias_p[0, 0][place]
    return net.output.weight @ h + net.output.bias


@pytest.mark.parametrize("size, layers", [((5,), 1), ((3, 4), 3), ((2, 2, 3), 2)])
def test_a_slow_network_is_the_formula_at_every_place(size, layers):
    net = disturbed(SlowNet(len(size), size, 3, hidden=6, num_layers=layers, **double))
    kernel = net()
    assert kernel.shape == (1, 3, *size)
    for place in torch.cartesian_prod(*map(torch.arange, size)).view(-1, len(size)).tolist():
        close(kernel[0, :, *place], kernel_at(net, tuple(place)))


def test_a_slow_networks_first_weights():
    torch.manual_seed(0)
    net = SlowNet(2, 8, 400, hidden=2000, num_layers=2, omega_0=1.5, alpha=6.0, beta=2.0)
    for layer, part in enumerate(net.filters):
        # A linear layer of two inputs has weights of variance 1/6; Gamma(a, b) has the second moment a (a + 1) / b^2.
        shape = 6.0 / (layer + 1)
        expected = (2 * math.pi * 1.5) ** 2 / 6 * shape * (shape + 1) / 4
        assert part.weight.square().mean().item() == pytest.approx(expected, rel=0.15) and not part.bias.any()
    assert all(part.bias.eq(1).all() for part in net.linears) and not net.output.bias.any() and not net.bias_p.any()
    assert net.output.weight.var().item() == pytest.approx(1 / 2000 / 64, rel=0.05)


def test_only_p_grows_with_the_size():
    count = [sum(p.numel() for p in SlowNet(2, size, 5).parameters()) - size * size for size in (4, 9)]
    assert count[0] == count[1]


def test_a_local_kernel_is_the_formula_with_the_batchs_context():
    net, x = disturbed(ContextSlowNet(3, 3, hidden=4, num_layers=2, **double)), normal(5, 3, 7, 6)
    kernel = net(x)
    pooled = F.adaptive_avg_pool2d(x, 3)
    reduced = F.conv2d(pooled, net.reduce.weight[:, :, None, None], net.reduce.bias).mean(0)
    context = F.gelu(F.conv2d(reduced[None], net.mix.weight[:, :, None, None], net.mix.bias))[0]
    # The norm runs over all places of a hidden channel, so the layers are computed for all of them, one after another.
    grid = torch.tensor([[u - 1.0, v - 1.0] for u in range(3) for v in range(3)], dtype=torch.float64)
    h = torch.sin(grid @ net.filters[0].weight.T + net.filters[0].bias)
    for i in range(2):
        wave = torch.sin(grid @ net.filters[i + 1].weight.T + net.filters[i + 1].bias)
        h = wave * (h @ net.linears[i].weight.T + net.linears[i].bias) + net.bias_p.flatten()[:, None]
        h = net.alphas[i] * h + net.betas[i] * h / h.norm(dim=0)
        h = h * (context.flatten(1).T @ net.contexts[i].weight.T + net.contexts[i].bias)
    expected = h @ net.output.weight.T + net.output.bias
    close(kernel, expected.T.reshape(3, 1, 3, 3))
    before = net.running_context.clone()
    net(x)
    close(net.running_context, 0.9 * before + 0.1 * pooled.mean(0))
    close(net.eval()(x), net(normal(2, 3, 9, 9)))  # the running mean alone
    assert (net(x) - kernel).abs().max() > 1e-6


def test_the_renormalization_passes_the_gradient_of_the_normed_part_alone():
    net, x = ContextSlowNet(2, 3, hidden=4, num_layers=1, **double), normal(3, 2, 5, 5)
    nn.init.zeros_(net.betas[0])
    net(x).sum().backward()
    assert not net.linears[0].weight.grad.any() and net.contexts[0].weight.grad.any() and net.alphas[0].grad.any()


def test_the_global_operator_is_a_loop_over_examples_and_channels():
    zzw, a, b = disturbed(GlobalHyperZZW(3, 4, hidden=5, **double)), normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    kernel, y = zzw.slow_net(), zzw(a, b)
    for n in range(2):
        for c in range(3):
            for i in range(4):
                for j in range(4):
                    expected = sum(a[n, c, i, k] * kernel[0, c, i, k] * b[n, c, k, j] for k in range(4))
                    assert y[n, c, i, j].item() == pytest.approx(expected.item(), abs=1e-10)
    for bias, expected in ((1.0, a @ b), (0.0, 0 * a)):
        nn.init.zeros_(zzw.slow_net.output.weight)
        nn.init.constant_(zzw.slow_net.output.bias, bias)
        close(zzw(a, b), expected)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 5\): \(B, C, \*\(4, 4\)\) is wanted"):
        zzw(normal(2, 3, 4, 5), b)


def instance(x: Tensor) -> Tensor:
    return F.instance_norm(x, eps=1e-5)


def test_the_local_operator():
    zzw, a, b = disturbed(LocalHyperZZW(3, 5, hidden=4, **double)), normal(2, 3, 6, 7), normal(2, 3, 6, 7, seed=1)
    kernel = copy.deepcopy(zzw.slow_net)(a)
    maps = torch.stack([F.conv2d(b[:, c : c + 1], kernel[c : c + 1], padding=2)[:, 0] for c in range(3)], 1)
    expected = F.gelu(F.batch_norm(zzw.mixer(maps), None, None, training=True)) + zzw.bias
    close(zzw(a, b), expected)


def test_the_gated_unit_and_the_interactions():
    x, out = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    rgu = disturbed(RGU(3, 4, **double))
    q = F.gelu(instance(rgu.k(x) * rgu.q(rgu.v(x)))) + rgu.bias_p
    close(rgu(x), rgu.y(q))
    close(hyper_zzw_elementwise(out, x), out * x**2)
    channel = disturbed(HyperChannelInteraction(3, hidden=4, **double))
    hk = channel.slow_net().flatten()
    for n in range(2):
        for c in range(3):
            close(channel(x)[n, c], x[n, c] * torch.sigmoid(hk[c] * x[n, c].mean() ** 2))
    both = disturbed(HyperInteraction(3, 4, hidden=4, **double))
    hk, spatial = both.channel.slow_net().flatten(), both.slow_net()[0, 0]
    for n in range(2):
        s = spatial * out[n].mean(0) ** 2
        for c in range(3):
            close(both(out, x)[n, c], x[n, c] * torch.sigmoid(s * hk[c] * out[n, c].mean() ** 2))


@pytest.mark.parametrize("channels, groups", [(24, 12), (6, 12), (7, 3)])
def test_groups_are_standardized_in_turn_over_the_batch_and_alone(channels, groups):
    x = normal(4, channels, 5, 3) * 3 + 2
    y, start = GroupIBS(channels, groups, **double)(x), 0
    for i, part in enumerate(torch.arange(channels).tensor_split(min(groups, channels))):
        group = y[:, start : start + len(part)]
        over = (0, 2, 3) if i % 2 == 0 else (2, 3)
        assert group.mean(over).abs().max() < 1e-10
        torch.testing.assert_close(group.var(over, correction=0), torch.ones_like(group.mean(over)), rtol=0, atol=1e-4)
        start += len(part)


def test_the_block_is_its_branches_in_order():
    block = disturbed(SFNEBlock(4, 3, 5, (3, 1, 5, 3), n_previous=2, hidden=4, local_hidden=4, **double))
    x, before, earlier = normal(3, 4, 5, 5), normal(3, 2, 5, 5, seed=1), normal(3, 1, 5, 5, seed=2)
    twin, y = copy.deepcopy(block), block(x, before, earlier)
    context = x * twin.hyper_kernel()
    fast = instance(twin.rgu_slow(context) + twin.rgu(x))
    mixed, weighed = instance(twin.mixer(x)), instance(twin.channel(x))
    out = torch.matmul(context, fast)
    local = [twin.local[0](x, weighed), twin.local[1](weighed, x), twin.local[2](mixed, x), twin.local[3](x, mixed)]
    parts = [out, local[1], torch.cat([before, before], 1), fast, context @ mixed, local[0], out * torch.sigmoid(out)]
    parts += [local[2], context @ weighed, local[3], torch.cat([earlier] * 4, 1), twin.hyper(out, x)]
    close(y, F.gelu(twin.norm(twin.bottleneck(torch.cat(parts, 1)))) + twin.bias)
    with pytest.raises(ValueError, match="1 earlier features: n_previous = 2 are wanted"):
        block(x, before)


def test_dropout_leaves_out_whole_channels_in_training_only():
    block, x = SFNEBlock(2, 6, 4, dropout=0.5, **double), normal(3, 2, 4, 4)
    nn.init.ones_(block.bias)
    share = block(x).flatten(2).eq(0).all(2).double().mean()
    assert 0.2 < share < 0.8 and not block.eval()(x).eq(0).any()


def test_the_network_of_the_paper():
    model = Terminator(10)
    assert [tuple(block.hyper_kernel().shape[1:]) for block in model.blocks] == [
        (channels, 32, 32) for channels in (3, 12, 36, 72, 144)
    ]
    assert model.head.in_features == 288 and model.earlier == [[], [], [0], [1], [2, 1]]
    assert [block.zzw.slow_net.num_layers for block in model.blocks] == [3, 2, 2, 2, 2]


def small(**kw: object) -> Terminator:
    torch.manual_seed(0)
    block = {"hidden": 4, "local_hidden": 4} | kw
    return Terminator(3, 1, 4, (4, 2, 1, 1, 1), (0,) * 5, **block, **double)


def test_every_slow_network_learns_and_the_slow_loss_is_for_them_alone():
    model, x = small(), normal(4, 1, 4, 4)
    model(x).square().sum().backward()
    nets = {name: net for name, net in model.named_modules() if isinstance(net, (SlowNet, ContextSlowNet))}
    assert len(nets) == 5 * 8
    silent = [n for n, net in nets.items() if not any(p.grad is not None and p.grad.any() for p in net.parameters())]
    assert not silent
    model.zero_grad()
    slow_neural_loss(model.hyper_kernels()).backward()
    touched = {name.partition(".slow_net")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {f"blocks.{i}.zzw" for i in range(5)}


def test_the_slow_loss():
    first, second, third = normal(1, 2, 3, 3), normal(1, 4, 3, 3, seed=1), normal(1, 12, 3, 3, seed=2)
    pairs = [
        (torch.cat([first] * 2, 1), second),
        (torch.cat([first] * 6, 1), third),
        (torch.cat([second] * 3, 1), third),
    ]
    expected = sum((a - b).square().mean() for a, b in pairs)
    for factors in (None, (2, 3), (2, 3, 5)):
        close(slow_neural_loss([first, second, third], factors), expected)
    sums = [k.sum(1) for k in (first, second, third)]
    expected = sum((sums[j] - sums[i]).square().mean() for j, i in [(0, 1), (0, 2), (1, 2)])
    close(slow_neural_loss([first, second, third], mode="channel_sum"), expected)
    tiled = slow_neural_loss([first, first.repeat(1, 2, 1, 1), first.repeat(1, 6, 1, 1)])
    assert tiled == 0 and slow_neural_loss([first]) == 0


def test_evaluation_takes_one_example_or_as_the_author_has_it_the_batchs_statistics():
    model, x = small(), normal(6, 1, 4, 4)
    model.blocks[0](x)
    model.eval()
    close(torch.cat([model(x[i : i + 1]) for i in range(6)]), model(x))
    theirs = small(batch_stats_eval=True)
    trained = theirs(x)
    close(theirs.eval()(x), trained)
    assert (theirs(x[:3]) - trained[:3]).abs().max() > 1e-6


def test_arguments_out_of_range_are_named():
    for name, value in [("hidden", 0), ("num_layers", 0), ("omega_0", 0), ("alpha", -1.0), ("beta", 0.0)]:
        with pytest.raises(ValueError, match=f"{name} = {value} is out of range"):
            SlowNet(2, 4, 3, **{name: value})
    block = {"bottleneck_factor": 0, "local_kernel_sizes": (3, 5), "n_previous": 3, "dropout": 1.0}
    for name, value in block.items():
        with pytest.raises(ValueError, match=f"{name} = .* is out of range"):
            SFNEBlock(**{"in_channels": 2, "bottleneck_factor": 2, "size": 4, name: value})
    for call in (
        lambda: LocalHyperZZW(2, 4),
        lambda: GlobalHyperZZW(2, (4, 4)),
        lambda: GroupIBS(0),
        lambda: SlowNet(2, (3,), 2),
        lambda: Terminator(3, dropout=(0,)),
        lambda: slow_neural_loss([torch.zeros(1, 2, 2)], mode="mean"),
        lambda: slow_neural_loss([]),
    ):
        with pytest.raises(ValueError, match="is out of range"):
            call()


class Unstandardized(Terminator):
    """The broken variant of the card: the blocks' group standardization is left out."""

    def __init__(self, *arguments: object, **options: object):
        super().__init__(*arguments, **options)
        for block in self.blocks:
            block.norm = nn.Identity()


def test_the_claim_does_not_hold_without_the_standardization():
    from assay.nn.hyperzzw.claim import LOSS, OURS

    real, broken = (
        claim(Bench(quick=True), method=method, arms=(OURS, LOSS)) for method in (Terminator, Unstandardized)
    )
    assert real.checks[0].verdict == HOLDS and real.checks[0].observed < 1e-4
    assert broken.checks[0].verdict == FAILS and broken.checks[0].observed > 1e-2
    assert figure(real) is not None
