"""Products with the Hessian and the Gauss-Newton matrix against dense ones, and Lanczos against eigenvalues."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, aslinearoperator, eigsh
from torch import nn

from assay._processes import run_on_two
from assay.optim import curvature_operator, lanczos, spectral_density

EXACT = {"rtol": 0.0, "atol": 0.0}
CLOSE = {"rtol": 1e-8, "atol": 1e-10}


def example(dtype=torch.float64):
    """A small network and a batch of nine."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    return model, torch.randn(9, 3, dtype=dtype), torch.randint(3, (9,))


def named(model, flat):
    parts = flat.split([p.numel() for p in model.parameters()])
    return {name: part.view_as(p) for (name, p), part in zip(model.named_parameters(), parts, strict=True)}


def dense(model, x, y, kind, loss=F.cross_entropy):
    """The matrix, by torch.func."""
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def output(v):
        return torch.func.functional_call(model, named(model, v), (x,))

    if kind == "hessian":
        return torch.func.hessian(lambda v: loss(output(v), y))(flat)
    jacobian = torch.func.jacrev(output)(flat)
    inner = torch.func.hessian(lambda f: loss(f, y))(output(flat))
    return torch.einsum("aip,aibj,bjq->pq", jacobian, inner, jacobian)


def symmetric(n, seed=0):
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a + a.T


# --- the operator


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("cuts", [[9], [2, 7], [4, 4, 1]])
def test_it_is_the_dense_matrix_whatever_the_batches(kind, cuts):
    model, x, y = example()
    op = curvature_operator(model, F.cross_entropy, zip(x.split(cuts), y.split(cuts), strict=True), kind=kind)
    expected = dense(model, x, y, kind)
    torch.testing.assert_close(op @ torch.eye(len(expected), dtype=torch.float64), expected, **CLOSE)
    torch.testing.assert_close(torch.from_numpy(op @ np.eye(len(expected))), expected, **CLOSE)
    eigenvalues = torch.linalg.eigvalsh(expected)
    assert kind == "hessian" or eigenvalues[0] > -1e-12
    assert kind == "ggn" or eigenvalues[0] < -1e-3, "the example is not one where the two differ"


def test_it_is_symmetric_and_scipys():
    model, x, y = example(torch.float32)
    op = curvature_operator(model, F.cross_entropy, [(x, y)])
    assert isinstance(op, LinearOperator) and op.dtype == np.float32 and op.shape == (31, 31)
    u, v = torch.randn(2, 31)
    assert (u @ (op @ v)).item() == pytest.approx((v @ (op @ u)).item(), rel=1e-4)
    assert op.H is op and op.T is op
    assert (op @ v).dtype == torch.float32 and op.matvec(v.numpy()).dtype == np.float32
    found, top = eigsh(op, k=1)
    assert found[0] == pytest.approx(lanczos(op, 31)[0].abs().max().item(), rel=1e-4)
    np.testing.assert_allclose(op.matvec(top), found[0] * top, atol=1e-4)


def test_it_follows_the_parameters_and_leaves_no_trace():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 3)).double()
    model[2].eval()
    _, x, y = example()
    model(x)  # moves the running statistics once
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for kind in ("hessian", "ggn"):
        op = curvature_operator(model, F.cross_entropy, [(x, y)], kind=kind)
        state = torch.get_rng_state()
        first = op @ torch.ones(op.shape[0])
        assert torch.equal(torch.get_rng_state(), state)
        with torch.no_grad():
            second = op @ torch.ones(op.shape[0])
            model[4].bias.add_(1)
            third = op @ torch.ones(op.shape[0])
            model[4].bias.copy_(before["4.bias"])
        assert torch.equal(first, second) and not torch.equal(first, third)
        flags = [module.training for module in model]
        model.eval()
        torch.testing.assert_close(first, dense(model, x, y, kind).sum(1), **CLOSE)
        for module, training in zip(model, flags, strict=True):
            module.training = training
    torch.testing.assert_close(dict(model.state_dict()), before, **EXACT)
    assert (model[0].weight.grad == 1).all() and model[4].weight.grad is None and not model[2].training


def test_frozen_unused_and_tied_parameters():
    model, x, y = example()
    expected = {kind: dense(model, x, y, kind)[16:, 16:] for kind in ("hessian", "ggn")}
    model[0].requires_grad_(False)
    for kind, matrix in expected.items():
        op = curvature_operator(model, F.cross_entropy, [(x, y)], kind=kind)
        torch.testing.assert_close(op @ torch.eye(15), matrix, **CLOSE)
    model.unused = nn.Linear(2, 1).double()
    model.forward = lambda x: model[2](torch.tanh(model[0](x)))
    for kind, matrix in expected.items():
        op = curvature_operator(model, F.cross_entropy, [(x, y)], kind=kind)
        torch.testing.assert_close(op @ torch.eye(18), F.pad(matrix, (0, 3, 0, 3)), **CLOSE)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    tied[2].weight = tied[0].weight
    assert curvature_operator(tied, F.cross_entropy, [(x, y)]).shape == (15, 15)


def test_where_nothing_curves_the_product_is_zero():
    model, x, _ = example()
    linear = nn.Linear(3, 1).double()
    for kind in ("hessian", "ggn"):
        assert not (curvature_operator(linear, lambda out, _: out.mean(), [(x, x)], kind=kind) @ torch.ones(4)).any()
    assert not (curvature_operator(model, lambda out, _: out.mean(), [(x, x)], kind="ggn") @ torch.ones(31)).any()


def test_attention_and_autocast():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).double()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    op = curvature_operator(layer, F.mse_loss, [(x, x)])
    u, v = torch.randn(2, op.shape[0], dtype=torch.float64)
    torch.testing.assert_close(u @ (op @ v), v @ (op @ u), **CLOSE)
    model, x, y = example(torch.float32)
    op = curvature_operator(model, F.cross_entropy, [(x, y)])
    plain = op @ torch.ones(31)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(op @ torch.ones(31), plain, **EXACT)


def test_half_precision_and_inputs_that_are_dicts():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))

        def forward(self, batch):
            return (batch["a"] + batch["b"]) @ self.weight.float()

    batch = {"a": torch.eye(2), "b": torch.eye(2)}
    op = curvature_operator(Sum(), F.mse_loss, [(batch, torch.zeros(2))])
    torch.testing.assert_close(op @ torch.ones(2), torch.tensor([4.0, 4.0]))


def test_two_processes_have_the_matrix_of_all_their_batches(tmp_path):
    run_on_two("from assay.optim.test_curvature import on_each_process\non_each_process(rank)", tmp_path)


def on_each_process(rank):
    model, x, y = example()
    whole = dense(model, x, y, "hessian")
    model = nn.parallel.DistributedDataParallel(model)
    cut = slice(0, 2) if rank == 0 else slice(2, 9)
    op = curvature_operator(model, F.cross_entropy, [(x[cut], y[cut])])
    torch.testing.assert_close(op @ torch.eye(31, dtype=torch.float64), whole, **CLOSE)
    values, _ = lanczos(op, 5)
    everyones = [torch.zeros_like(values) for _ in range(2)]
    torch.distributed.all_gather(everyones, values)
    torch.testing.assert_close(*everyones, **EXACT)
    model.module[0].weight.to_local = lambda: None
    with pytest.raises(RuntimeError, match="sharded"):
        curvature_operator(model, F.cross_entropy, [(x, y)])


def test_what_the_operator_cannot_use_is_refused_by_name():
    model, x, y = example()
    with pytest.raises(ValueError, match="kind = 'fisher' is out of range"):
        curvature_operator(model, F.cross_entropy, [(x, y)], kind="fisher")
    with pytest.raises(ValueError, match=r"batches = \[\] is out of range"):
        curvature_operator(model, F.cross_entropy, [])
    with pytest.raises(ValueError, match="a batch without a tensor of examples"):
        curvature_operator(model, F.cross_entropy, [(1, 2)])
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        curvature_operator(nn.Tanh(), F.mse_loss, [(x, x)])
    with pytest.raises(ValueError, match=r"v.shape = \(30,\) is out of range: \(31,\)"):
        curvature_operator(model, F.cross_entropy, [(x, y)]) @ torch.ones(30)
    with pytest.raises(RuntimeError, match="complex or sharded"):
        curvature_operator(nn.Linear(3, 3, dtype=torch.complex64), F.mse_loss, [(x, x)])
    model.forward = lambda x: (x @ model[0].weight.T,)
    with pytest.raises(TypeError, match="returns a tensor, not tuple"):
        curvature_operator(model, lambda out, _: out[0].sum(), [(x, x)], kind="ggn") @ torch.ones(31)


# --- Lanczos


def test_as_many_steps_as_rows_give_all_eigenvalues():
    a = symmetric(50)
    values, weights = lanczos(a, 50)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(a), rtol=0, atol=1e-8)
    assert weights.sum().item() == pytest.approx(1, abs=1e-12) and (weights >= 0).all()
    for op in (a.numpy(), aslinearoperator(a.numpy())):
        torch.testing.assert_close(lanczos(op, 50), (values, weights), rtol=0, atol=1e-8)
    assert len(lanczos(a, 80)[0]) == 50


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12))
def test_ritz_values_lie_inside_and_widen(seed, steps):
    a, v0 = symmetric(20, seed), torch.randn(20, generator=torch.Generator().manual_seed(seed + 1))
    true = torch.linalg.eigvalsh(a)
    fewer, more = lanczos(a, steps - 1, v0=v0)[0], lanczos(a, steps, v0=v0)[0]
    slack = 1e-9 * true.abs().max()
    assert true[0] - slack <= more[0] <= fewer[0] + slack and fewer[-1] - slack <= more[-1] <= true[-1] + slack


def test_weights_are_the_quadrature_of_the_starting_vector():
    a, v = symmetric(30), torch.randn(30, generator=torch.Generator().manual_seed(5)).double()
    values, weights = lanczos(a, 6, v0=3 * v)
    v, power = v / v.norm(), v / v.norm()
    for k in range(12):  # exact up to degree 2 * steps - 1
        assert (weights * values**k).sum().item() == pytest.approx((v @ power).item(), rel=1e-9)
        power = a @ power


def test_without_reorthogonalization_eigenvalues_come_twice():
    a = torch.diag(torch.cat([torch.linspace(0, 1, 199), torch.tensor([10.0])])).double()
    plain, whole = lanczos(a, 60, reorthogonalize=False)[0], lanczos(a, 60)[0]
    assert (plain > 9.999).sum() >= 2 and (whole > 9.999).sum() == 1


def test_an_invariant_subspace_ends_it():
    values, weights = lanczos(torch.diag(torch.tensor([3.0, 3.0, 1.0, 1.0, 1.0])), 5)
    assert len(values) == 2 and values.tolist() == pytest.approx([1, 3], abs=1e-6)
    values, weights = lanczos(torch.zeros(4, 4), 3)
    assert values.tolist() == [0] and weights.tolist() == [1]


def test_seeds_fix_the_start_and_leave_torchs_random_numbers():
    a, state = symmetric(40).float(), torch.get_rng_state()
    first, again, other = (lanczos(a, 4, seed=seed) for seed in (1, 1, 2))
    torch.testing.assert_close(first, again, **EXACT)
    assert not torch.equal(first[0], other[0])
    density = [spectral_density(a, 4, 2, seed=seed) for seed in (1, 1, 2)]
    torch.testing.assert_close(density[0], density[1], **EXACT)
    assert not torch.equal(density[0][0], density[2][0])
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(lanczos(a.to(torch.bfloat16), 4)[0], lanczos(a, 4)[0], rtol=0.02, atol=0.1)
    torch.testing.assert_close(lanczos(a.round().long(), 4)[0], lanczos(a.round(), 4)[0], rtol=1e-5, atol=1e-5)


def test_an_operator_of_tensors_need_only_have_a_shape():
    class Doubled:  # as those of curvlinops are
        shape, dtype, device = (3, 3), torch.float32, torch.device("cpu")

        def __matmul__(self, v):
            assert isinstance(v, torch.Tensor)
            return 2 * v

    assert lanczos(Doubled(), 3)[0].tolist() == pytest.approx([2.0])


def test_the_density_has_the_spectrums_moments():
    a = symmetric(200)
    values, weights = spectral_density(a, 15, 20)
    true = torch.linalg.eigvalsh(a)
    assert weights.sum().item() == pytest.approx(1, abs=1e-12) and (values.diff() >= 0).all()
    assert len(values) == 15 * 20
    for function in (lambda x: x, torch.square, lambda x: torch.exp(-((x / 10) ** 2))):
        expected, spread = function(true).mean().item(), function(true).std().item()
        assert abs((weights @ function(values)).item() - expected) < 4 * spread * (2 / (200 * 20)) ** 0.5
    diagonal = torch.diag(torch.arange(1.0, 9.0))
    assert (spectral_density(diagonal, 8, 1)[1] @ spectral_density(diagonal, 8, 1)[0]).item() == pytest.approx(4.5)


def test_what_lanczos_cannot_use_is_refused_by_name():
    a = symmetric(4)
    for arguments, options, message in [
        ((a, 0), {}, "steps = 0 is out of range"),
        ((a, 2.0), {}, "steps = 2.0 is out of range"),
        ((a[:3],), {}, r"op of shape \(3, 4\) is out of range"),
        ((3,), {}, r"op of shape \(\) is out of range"),
        ((a,), {"v0": torch.zeros(4)}, r"v0 of shape \(4,\) is out of range"),
        ((a,), {"v0": torch.ones(3)}, r"v0 of shape \(3,\) is out of range"),
    ]:
        with pytest.raises(ValueError, match=message):
            lanczos(*arguments, **options)
    with pytest.raises(ValueError, match="probes = 0 is out of range"):
        spectral_density(a, 2, 0)
    a[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="not finite"):
        lanczos(a)
