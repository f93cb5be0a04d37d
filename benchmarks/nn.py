"""Speed of layers, as ratios in one run.

    python benchmarks/nn.py [--markdown FILE] [--pairs 7] [--only NAME ...] [--compiled]

One thread, processor time, interleaved pairs with what a user would have instead, five times as many of quick calls:
the ratio of the minima, and the median of the pairs' ratios. Forward and backward where nothing else is said.
``--compiled`` adds the normalization layers through ``torch.compile``, against torch's eager and compiled ones. Peers
are measured where they are installed (``mambapy``, ``transformers``). By default the system's allocator returns large
memory after each use and pays for it again; ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1`` keeps it.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timing import command, conditions, in_turns, seconds, transient_bytes
from torch import Tensor, nn

from assay.bench.models import TokenBatchNorm
from assay.nn import (
    BatchGroupNorm2d,
    EvoNormB0,
    EvoNormS0,
    FDConv2d,
    LayerNormGRU,
    LayerNormLSTM,
    PowerNorm,
    RegionNormB,
    SoftmaxFreeAttention,
    TrAct,
    UnifiedNorm,
    fuse_unified_norm,
)
from assay.nn.functional import norm_aware_linear_attention, selective_scan


@dataclass
class Case:
    """A candidate and its reference, both calls without arguments."""

    name: str
    against: str
    reference: Callable[[], Any]
    candidate: Callable[[], Any]


def passes(layer: Callable[..., Any], *inputs: Tensor) -> Callable[[], None]:
    """Forward and backward, with gradients of inputs and parameters."""
    leaves = [x.detach().requires_grad_() for x in inputs if x.is_floating_point()]

    def call() -> None:
        output = layer(*leaves, *(x for x in inputs if not x.is_floating_point()))
        (output[0] if isinstance(output, tuple) else output).square().sum().backward()

    return call


def normalizations(compiled: bool) -> Iterator[Case]:
    """On tokens and images of two sizes: small ones show what a call costs, large ones what an element does."""
    for megabytes, tokens, images in ((2, (64, 32, 256), (32, 64, 16, 16)), (8, (16, 256, 512), (32, 64, 32, 32))):
        for name, make, against, reference, inputs in _normalizations(torch.randn(tokens), torch.randn(images)):
            name, plain = f"{name}, {megabytes} MB", passes(reference, *inputs)
            yield Case(name, against, plain, passes(make(), *inputs))
            if compiled:
                torch._dynamo.reset()
                mine = passes(torch.compile(make()), *inputs)
                yield Case(f"{name}, compiled", against, plain, mine)
                theirs = passes(torch.compile(copy.deepcopy(reference)), *inputs)
                yield Case(f"{name}, compiled", f"{against}, compiled", theirs, mine)


def _normalizations(
    tokens: Tensor, images: Tensor
) -> Iterator[tuple[str, Callable[[], nn.Module], str, nn.Module, tuple[Tensor, ...]]]:
    units, channels = tokens.shape[-1], images.shape[1]
    for groups in (1, 8):
        power = partial(PowerNorm, units, warmup_steps=0, groups=groups)
        yield (
            f"PowerNorm, {groups} groups" if groups > 1 else "PowerNorm",
            power,
            "LayerNorm",
            nn.LayerNorm(units),
            (tokens,),
        )
    bare = partial(PowerNorm, units, warmup_steps=0, group_scale=False)
    yield "PowerNorm, no group scale", bare, "LayerNorm", nn.LayerNorm(units), (tokens,)
    unified = partial(UnifiedNorm, units, warmup_steps=0)
    yield "UnifiedNorm", unified, "LayerNorm", nn.LayerNorm(units), (tokens,)
    yield "UnifiedNorm", unified, "BatchNorm over tokens", TokenBatchNorm(units), (tokens,)
    yield (
        "BatchGroupNorm2d",
        partial(BatchGroupNorm2d, channels, 16),
        "BatchNorm2d",
        nn.BatchNorm2d(channels),
        (images,),
    )
    batch = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
    yield "EvoNormB0", partial(EvoNormB0, channels), "BatchNorm2d and ReLU", batch, (images,)
    group = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU())
    yield "EvoNormS0", partial(EvoNormS0, channels), "GroupNorm and SiLU", group, (images,)
    mask = torch.rand_like(images[:, :1]) < 0.3
    for statistics, layer in (
        ("batch", nn.BatchNorm2d(channels)),
        ("instance", nn.InstanceNorm2d(channels, affine=True)),
    ):
        region = partial(RegionNormB, channels, statistics)
        yield f"RegionNormB, of the {statistics}", region, type(layer).__name__, WithoutMask(layer), (images, mask)


class WithoutMask(nn.Module):
    """A layer that is called as one with a mask is."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.layer(x)


def fused() -> Iterator[Case]:
    """Inference of a normalization and the linear layer behind it."""
    x, linear = torch.randn(2048, 256), nn.Linear(256, 256)
    model = fuse_unified_norm(nn.Sequential(UnifiedNorm(256), copy.deepcopy(linear)).eval())
    with_norm = nn.Sequential(nn.LayerNorm(256), linear)

    def inference(layer: nn.Module) -> Callable[[], None]:
        @torch.no_grad()
        def call() -> None:
            layer(x)

        return call

    yield Case("UnifiedNorm and Linear, fused, inference", "Linear alone", inference(linear), inference(model))
    yield Case(
        "UnifiedNorm and Linear, fused, inference", "LayerNorm and Linear", inference(with_norm), inference(model)
    )


def recurrent() -> Iterator[Case]:
    for examples, units in ((64, 48), (32, 256)):
        x = torch.randn(60, examples, units)
        for ours, torchs in ((LayerNormLSTM, nn.LSTM), (LayerNormGRU, nn.GRU)):
            name = f"{ours.__name__}, {units} units"
            yield Case(name, torchs.__name__, passes(torchs(units, units), x), passes(ours(units, units), x))


def first_layers() -> Iterator[Case]:
    for name, layer, x in (
        ("TrAct, 3x3 convolution of 32x32", nn.Conv2d(3, 64, 3, padding=1), torch.randn(64, 3, 32, 32)),
        ("TrAct, 16x16 patches of 224x224", nn.Conv2d(3, 192, 16, 16), torch.randn(16, 3, 224, 224)),
    ):
        yield Case(name, "the plain layer", passes(layer, x), passes(TrAct(copy.deepcopy(layer)), x))


def convolutions() -> Iterator[Case]:
    for channels, side, examples in ((24, 32, 8), (64, 56, 4), (128, 16, 16)):
        x, plain = torch.randn(examples, channels, side, side), nn.Conv2d(channels, channels, 3, padding=1)
        name = f"FDConv2d, {channels} channels, {side}x{side}, {examples} examples"
        yield Case(name, "Conv2d", passes(plain, x), passes(FDConv2d.from_conv(plain), x))
        without = FDConv2d.from_conv(plain, fbm=False)
        yield Case(f"{name}, without bands", "Conv2d", passes(plain, x), passes(without, x))


def scans() -> Iterator[Case]:
    """The selective scan at batch 8, 256 steps, 64 channels and 16 states."""
    arguments = scan_arguments(256)
    ours = passes(partial(selective_scan, delta_softplus=True), *arguments)
    sequential = partial(selective_scan, delta_softplus=True, backend="sequential")
    yield Case("selective_scan", "a loop over unbind", passes(sequential, *arguments), ours)
    try:
        pscan = importlib.import_module("mambapy.pscan").pscan
    except ImportError:
        pass
    else:

        def peer(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
            delta, B, C = F.softplus(delta).mT, B.mT, C.mT
            states = pscan((delta[..., None] * A).exp(), delta[..., None] * B[:, :, None] * u.mT[..., None])
            return (states @ C[..., None])[..., 0]

        yield Case("selective_scan", "mambapy's parallel scan", passes(peer, *arguments), ours)
    try:
        mamba = importlib.import_module("transformers")
    except ImportError:
        return
    from assay.nn import SelectiveSSM

    config = mamba.MambaConfig(hidden_size=64, num_hidden_layers=1, state_size=16, use_mambapy=False)
    block = importlib.import_module("transformers.models.mamba.modeling_mamba").MambaMixer(config, 0)
    x = torch.randn(8, 256, 64)
    yield Case("SelectiveSSM", "transformers' MambaMixer, slow path", passes(block, x), passes(SelectiveSSM(64), x))


def scan_arguments(length: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((8, 64, length), (8, 64, length), (64, 16), (8, 16, length), (8, 16, length))
    u, delta, A, B, C = (torch.randn(shape, generator=draw) for shape in shapes)
    return [u, delta, -A.exp(), B, C]


def attentions() -> Iterator[Case]:
    for tokens in (1024, 4096, 16384):
        q, k, v = (torch.randn(1, 4, tokens, 32) for _ in range(3))
        softmax = passes(F.scaled_dot_product_attention, q, k, v)
        for causal in (False, True):
            linear = passes(partial(norm_aware_linear_attention, causal=causal), q, k, v)
            name = f"norm_aware_linear_attention, {'causal, ' if causal else ''}{tokens:,} tokens"
            yield Case(name, "scaled_dot_product_attention", softmax, linear)
        x = torch.randn(1, tokens, 128)
        soft, plain = softmax_free(tokens), SoftmaxAttention(128, 4)
        name = f"SoftmaxFreeAttention, 64 landmarks, {tokens:,} tokens"
        yield Case(name, "the same with scaled_dot_product_attention", passes(plain, x), passes(soft, x))


class SoftmaxAttention(nn.Module):
    """The layer that a user would have: two linear maps around softmax attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


def softmax_free(tokens: int) -> nn.Module:
    """With 64 landmarks at any size."""
    return SoftmaxFreeAttention(128, 4, ratio=math.isqrt(tokens) // 8)


def growth() -> list[str]:
    """Exponents of time and memory from 1,024 to 16,384 steps or tokens, fitted on logarithms."""
    lines = ["| what | exponent of time | exponent of memory |", "|---|---|---|"]
    sizes = (1024, 4096, 16384)

    def attention(tokens: int) -> Callable[[], None]:
        return passes(norm_aware_linear_attention, *(torch.randn(1, 4, tokens, 32) for _ in range(3)))

    def scan(steps: int) -> Callable[[], None]:
        return passes(partial(selective_scan, delta_softplus=True), *(x[:1] for x in scan_arguments(steps)[:2]),
                      scan_arguments(1)[2], *(x[:1] for x in scan_arguments(steps)[3:]))  # fmt: skip

    def soft(tokens: int) -> Callable[[], None]:
        return passes(softmax_free(tokens), torch.randn(1, tokens, 128))

    kinds = {"norm_aware_linear_attention": attention, "SoftmaxFreeAttention": soft, "selective_scan": scan}
    for name, make in kinds.items():
        calls = [make(size) for size in sizes]
        times = [min(seconds(call) for _ in range(4)) for call in calls]
        memory = [transient_bytes(call) for call in calls]
        lines.append(f"| {name} | {slope(sizes, times):.2f} | {slope(sizes, memory):.2f} |")
    return lines


def slope(sizes: tuple[int, ...], values: list[float]) -> float:
    x, y = ([math.log(v) for v in row] for row in (sizes, values))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return products / sum((a - mean_x) ** 2 for a in x)


def cases(compiled: bool) -> Iterator[Case]:
    yield from normalizations(compiled)
    yield from fused()
    yield from recurrent()
    yield from first_layers()
    yield from convolutions()
    yield from scans()
    yield from attentions()


def table(pairs: int, only: list[str], compiled: bool) -> str:
    torch.set_num_threads(1)
    lines = [conditions(pairs), "", "| what | instead of | min | median |", "|---|---|---|---|"]
    for case in cases(compiled):
        if only and not any(word in case.name for word in only):
            continue
        for call in (case.reference, case.candidate) * 2:
            call()  # warm up, and compile
        quick = seconds(case.reference) < 0.05
        found = in_turns(case.reference, case.candidate, 5 * pairs if quick else pairs)
        lines.append(f"| {case.name} | {case.against} | {found.minimum:.2f} | {found.median:.2f} |")
    if not only or "growth" in only:
        lines += ["", *growth()]
    return "\n".join(lines)


if __name__ == "__main__":
    command(__doc__, table, "compiled", "also the normalization layers through torch.compile", pairs=7)
