"""The inverse against torch's, the attention against its formula, and a broken variant of the claim."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.claims import recorded
from assay.bench.evidence import FAILS, HOLDS, Bench
from assay.catalogue import find
from assay.nn import SOFT, SoftmaxFreeAttention, SoftmaxFreeBlock, gaussian_kernel, newton_pinv
from assay.nn._contract import Example
from assay.nn.soft_attention_free.claim import GROWTH, claim, figure

# Newton's iteration has to be over before its gradient is that of the inverse.
converged = {"max_iter": 40, "ridge": 0.1}
EXAMPLES = [
    Example(partial(SoftmaxFreeAttention, 4, 2, ratio=2, **converged), (2, 4, 4), bfloat16=0.05),
    Example(
        partial(
            SoftmaxFreeAttention, 2, 1, ratio=2, landmarks="pool", normalize=True, conv_size=0, qkv_bias=False,
            **converged,
        ),
        (2, 9, 2),
        bfloat16=0.05,
    ),
    Example(partial(SoftmaxFreeAttention, 2, 1, ratio=1, conv_size=1), (2, 4, 2), bfloat16=0.05),
    Example(partial(SoftmaxFreeBlock, 2, 1, 2, 1, mlp_ratio=1, **converged), (2, 4, 2), bfloat16=0.1),
    Example(
        partial(
            SOFT, 32, 2, 1, embed_dims=(2, 2, 2, 2), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), mlp_ratio=1,
            ratios=(4, 2, 1), conv_sizes=(1, 1, 1), max_iter=6,
        ),
        (2, 1, 32, 32),
        gradient=False,
        bfloat16=0.1,
    ),
]  # fmt: skip
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive_definite(*batch: int, size: int = 5, condition: float = 100.0) -> Tensor:
    Q = torch.linalg.qr(normal(*batch, size, size)).Q
    return Q * torch.logspace(0, -torch.tensor(condition).log10().item(), size, dtype=torch.float64) @ Q.mT


def test_the_inverse():
    A = positive_definite(3, 2, condition=20)
    close(newton_pinv(A, max_iter=60, ridge=0.0), torch.linalg.inv(A), atol=1e-8)
    A = positive_definite(3)
    eye = torch.eye(5, dtype=torch.float64)
    assert torch.allclose(newton_pinv(A), torch.linalg.inv(A + 0.01 * eye), rtol=1e-3)
    V = 1.8 / A.abs().sum(-1).amax(-1)[:, None, None] ** 2 * (A + 0.01 * eye)
    close(newton_pinv(A, max_iter=0), V)
    close(newton_pinv(torch.ones(1, 1).double(), max_iter=60, ridge=3.0), torch.full((1, 1), 0.25).double())
    close(newton_pinv(A, max_iter=1), 2 * V - V @ (A + 0.01 * eye) @ V)


def test_the_gradient_is_that_of_the_inverse_and_the_iteration_is_not_gone_through():
    A, upstream = positive_definite(2).requires_grad_(), normal(2, 5, 5, seed=1)
    exact = torch.linalg.inv(A + 0.01 * torch.eye(5, dtype=torch.float64))
    expected = torch.autograd.grad(exact, A, upstream)[0]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        found = newton_pinv(A, max_iter=40)
    assert len(saved) == 1
    torch.testing.assert_close(torch.autograd.grad(found, A, upstream)[0], expected, rtol=1e-6, atol=1e-6)
    small = positive_definite(size=3, condition=4).requires_grad_()
    torch.autograd.gradcheck(partial(newton_pinv, max_iter=30), (small,))
    torch.autograd.gradgradcheck(partial(newton_pinv, max_iter=30), (small,))


def test_the_kernel():
    q, k = normal(2, 6, 3), normal(2, 4, 3, seed=1)
    close(gaussian_kernel(q, k), (-torch.cdist(q, k).square() / 2).exp())
    S = gaussian_kernel(q, q)
    close(S, S.mT)
    close(S.diagonal(dim1=-2, dim2=-1), torch.ones(2, 6, dtype=torch.float64))
    close(gaussian_kernel(q + 3, q + 3), S)
    far = gaussian_kernel(100 * q.float(), 100 * q.float())
    assert ((far >= 0) & (far <= 1)).all()


def layer(**options: object) -> SoftmaxFreeAttention:
    torch.manual_seed(0)
    made = SoftmaxFreeAttention(6, 2, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("landmarks", ["conv", "pool"])
def test_the_attention_is_its_formula(landmarks, normalize):
    made, x = layer(ratio=2, landmarks=landmarks, normalize=normalize), normal(2, 24, 6)
    y = torch.zeros(2, 2, 24, 3, dtype=torch.float64)
    q, v = made.q(x) / 3**0.25, made.v(x)
    for b in range(2):
        for h in range(2):
            own, values = (t[b, :, 3 * h : 3 * h + 3] for t in (q, v))
            maps = own.T.reshape(1, 3, 4, 6)
            if landmarks == "conv":
                found = F.conv2d(maps, made.sample.weight, stride=2)[0].flatten(1).T
                found = F.gelu(F.layer_norm(found, (3,), made.sample_norm.weight, made.sample_norm.bias))
            else:
                found = F.avg_pool2d(maps, 2)[0].flatten(1).T
            P, A = gaussian_kernel(own, found), gaussian_kernel(found, found)
            inverse = newton_pinv(A)
            if normalize:
                D = torch.diag(A.sum(1) ** -0.5)
                inverse = D @ inverse @ D
            near = F.conv2d(values.T.reshape(3, 1, 4, 6), made.conv.weight[h : h + 1], padding=1)
            y[b, h] = P @ inverse @ P.T @ values + near.flatten(1).T
    close(made(x, (4, 6)), made.proj(y.transpose(1, 2).flatten(2)))


def test_with_all_tokens_as_landmarks_it_is_the_kernel_itself():
    made, x = layer(ratio=1, conv_size=0), normal(2, 9, 6)
    q, v = (t.unflatten(-1, (2, 3)).transpose(1, 2) for t in (made.q(x) / 3**0.25, made.v(x)))
    S = gaussian_kernel(q, q)
    close(made(x), made.proj((S @ v).transpose(1, 2).flatten(2)))
    apart = 3 * normal(2, 2, 9, 3, seed=1)  # well enough conditioned to be inverted without a ridge
    made.max_iter, made.ridge = 60, 0.0
    torch.testing.assert_close(made._mixed(apart, v, apart), gaussian_kernel(apart, apart) @ v, rtol=1e-5, atol=1e-5)


def test_tokens_may_be_permuted_where_landmarks_stay():
    made, order = layer(), torch.randperm(10)
    q, v, few = normal(1, 2, 10, 3), normal(1, 2, 10, 3, seed=1), normal(1, 2, 4, 3, seed=2)
    close(made._mixed(q[..., order, :], v[..., order, :], few), made._mixed(q, v, few)[..., order, :])


def test_normalization_bounds_the_map():
    q, few = 0.3 * normal(200, 3), 0.3 * normal(8, 3, seed=1)
    P, A = gaussian_kernel(q, few), gaussian_kernel(few, few)
    D = torch.diag(A.sum(1) ** -0.5)
    inverse = newton_pinv(A)
    plain, bounded = (torch.linalg.eigvalsh(P @ M @ P.T).max() for M in (inverse, D @ inverse @ D))
    assert bounded < plain / 4


def test_nothing_of_the_size_of_the_kernel_of_all_tokens_is_kept():
    made, x = layer(ratio=8), normal(1, 1024, 6)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        made(x, (32, 32))
    assert max(sizes) < 1024 * 1024 // 8


def test_sequences_and_grids_of_any_size():
    x = normal(2, 30, 6)
    assert layer(ratio=(5, 1))(x, (30, 1)).shape == x.shape
    assert layer(ratio=4, landmarks="pool")(x, (5, 6)).shape == x.shape
    with pytest.raises(ValueError, match=r"hw = \(5, 6\) is out of range: at least ratio = \(8, 8\)"):
        layer(ratio=8)(x, (5, 6))
    with pytest.raises(ValueError, match=r"hw = \(4, 6\) is out of range: \(H, W\) with H W = N = 30"):
        layer()(x, (4, 6))


def test_the_block_normalizes_afterwards():
    block, x = SoftmaxFreeBlock(6, 2, 2, dtype=torch.float64), normal(2, 16, 6)
    y = F.layer_norm(x + block.attn(x), (6,))
    hidden = F.gelu(block.fc1(y), approximate="tanh")
    close(block(x), F.layer_norm(y + block.fc2(hidden), (6,)))


def test_the_pyramid():
    torch.manual_seed(0)
    model = SOFT(64, 5, embed_dims=(4, 8, 8, 16), depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4))
    attentions = [m for m in model.modules() if isinstance(m, SoftmaxFreeAttention)]
    assert [a.ratio[0] for a in attentions] == [8, 4, 4, 2]
    assert [p.shape[2] for p in model.positions] == [16, 8, 4, 2]
    x = torch.randn(2, 3, 64, 64)
    F.cross_entropy(model(x), torch.tensor([0, 3])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, 5)


def test_arguments_out_of_range_are_named():
    bad = {"num_heads": 0, "dim": 7, "ratio": 0, "conv_size": 2, "ridge": -1.0, "landmarks": "mean", "max_iter": -1}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=f"{name} = {value!r} is out of range"):
            SoftmaxFreeAttention(**{"dim": 6, "num_heads": 2, name: value})
    with pytest.raises(ValueError, match=r"A = \(2, 3\) is out of range"):
        newton_pinv(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"drop = 1\.0 is out of range"):
        SoftmaxFreeBlock(6, 2, drop=1.0)
    with pytest.raises(ValueError, match=r"ratios = \(8, 4\) is out of range: 3 numbers"):
        SOFT(64, ratios=(8, 4))


def of_all_tokens(dim: int, num_heads: int, ratio: int) -> nn.Module:
    """The broken variant of the card: the kernel of all tokens is made."""
    return SoftmaxFreeAttention(dim, num_heads, ratio=1)


def test_the_claim_does_not_hold_where_the_whole_kernel_is_made():
    real, broken = (
        claim(Bench(), method=method, parts=(GROWTH,), seeds=1) for method in (SoftmaxFreeAttention, of_all_tokens)
    )
    assert (real.checks[1].verdict, broken.checks[1].verdict) == (HOLDS, FAILS)


def test_the_claim_is_drawn():
    evidence, _ = recorded(find("soft-attention-free"))
    assert figure(evidence) is not None
