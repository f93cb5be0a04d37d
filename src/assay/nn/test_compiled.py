"""What is written otherwise for a compiler computes what it computes without one."""

from __future__ import annotations

import copy
import shutil
from functools import partial

import pytest
import torch
from torch import nn

from assay.nn import PowerNorm, RegionNormB, UnifiedNorm
from assay.nn._compiled import total

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
BACKEND = "aot_eager_decomp_partition"


@pytest.mark.parametrize("dynamic", [False, True])
def test_sums_over_blocks_with_and_without_a_rest(dynamic: bool):
    torch._dynamo.reset()
    compiled = torch.compile(total, backend=BACKEND, fullgraph=True, dynamic=dynamic)
    for rows in (2, 64, 128, 200, 321):
        x = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
        close(compiled(x), x.sum(0))
        (grad,) = torch.autograd.grad(compiled(x).square().sum(), x)
        close(grad, 2 * x.detach().sum(0).expand_as(x))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        partial(PowerNorm, 6, warmup_steps=2, groups=2),
        partial(PowerNorm, 6, warmup_steps=0, approx_backward=False),
        partial(PowerNorm, 6, warmup_steps=0, group_scale=False, affine=False, reference_quirks=True),
        partial(UnifiedNorm, 6, warmup_steps=2, window_size=2, outlier_filtration=True),
    ],
)
def test_training_over_tokens_is_that_without_a_compiler(make: partial[nn.Module], masked: bool):
    torch._dynamo.reset()
    plain = make().double()
    compiled = copy.deepcopy(plain)
    compiled.compile(backend=BACKEND, fullgraph=True)
    padding = torch.zeros(5, 67, dtype=torch.bool)
    padding[:, 60:] = masked
    for seed in range(4):
        torch.manual_seed(seed)
        x, weight = torch.randn(5, 67, 6, dtype=torch.float64), torch.randn(5, 67, 6, dtype=torch.float64)
        found = []
        for layer in (plain, compiled):
            leaf = x.clone().requires_grad_()
            y = layer(leaf, padding if masked else None)
            found.append((y, torch.autograd.grad((y * weight).sum(), [leaf, *layer.parameters()])))
        close(*found)
        close(dict(plain.named_buffers()), dict(compiled.named_buffers()))


@pytest.mark.parametrize("make", [partial(PowerNorm, 6, warmup_steps=0), partial(UnifiedNorm, 6, warmup_steps=0)])
def test_two_forward_passes_before_their_backward_passes(make: partial[nn.Module]):
    torch._dynamo.reset()
    plain = make().double()
    compiled = copy.deepcopy(plain)
    compiled.compile(backend=BACKEND, fullgraph=True)
    torch.manual_seed(0)
    for _ in range(2):
        inputs = [torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        found = []
        for layer in (plain, compiled):
            first, second = (layer(x).sin().sum() for x in inputs)
            found.append([torch.autograd.grad(loss, x) for loss, x in ((first, inputs[0]), (second, inputs[1]))])
        close(*found)
        close(dict(plain.named_buffers()), dict(compiled.named_buffers()))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++")
def test_machine_code_computes_the_same():
    """One of each, as a user compiles them."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    tokens, images, mask = torch.randn(4, 70, 8), torch.randn(2, 4, 6, 6), torch.rand(2, 1, 6, 6)
    for layer, inputs in ((PowerNorm(8, warmup_steps=0), (tokens,)), (RegionNormB(4), (images, mask))):
        found = []
        for function in (copy.deepcopy(layer), torch.compile(layer, fullgraph=True)):
            leaf = inputs[0].clone().requires_grad_()
            y = function(leaf, *inputs[1:])
            found.append((y, *torch.autograd.grad(y.sin().sum(), [leaf, *function.parameters()])))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
