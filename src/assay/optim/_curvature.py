"""Products with the Hessian and the Gauss-Newton matrix of a model, and what Lanczos' method learns from a few.

The matrices are never formed: a product costs about two gradients, whatever the number of parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from assay._distributed import all_reduce_sum
from assay._modes import evaluating

KINDS = ("hessian", "ggn")
Loss = Callable[[Any, Any], Tensor]


def curvature_operator(
    model: nn.Module, loss_fn: Loss, batches: Iterable[tuple[Any, Any]], *, kind: str = "hessian"
) -> CurvatureOperator:
    """The Hessian or the Gauss-Newton matrix of a model's mean loss over some batches, as a linear operator.

    With w the P parameters that require a gradient as one vector, in the order of ``model.parameters()``, f_i(w) the
    output for example i and l_i the loss of an output ::

        "hessian":  H = mean_i  d^2 l_i(f_i(w)) / dw^2
        "ggn":      G = mean_i  J_i^T (d^2 l_i / df_i^2) J_i            J_i = df_i / dw

    G leaves out the curvature of f. It is positive semi-definite where the loss is convex in the output, as
    cross-entropy and squared error are. Of a batch's loss ``loss_fn`` must be the mean; batches count by their size.

    ``operator @ v`` takes a tensor or an array of shape (P,) or (P, k); ``matvec``, ``shape``, ``dtype`` and so on are
    those of ``scipy.sparse.linalg.LinearOperator``, so that ``eigsh(operator, k=1)`` works. Products are taken at the
    parameters as they are then, in their dtype (float32 at least). The model runs as in ``eval()``: running statistics
    are used and not moved. Autocast is off. Neither ``.grad`` nor buffers are touched.

    Where a process group is initialized, every process brings its own batches and the product is that of all
    together; all processes must then ask for the same products.

    Args:
        model: called with a batch's first entry; for ``"ggn"`` its output is a tensor.
        loss_fn: ``loss_fn(output, target)``, a scalar that can be differentiated twice.
        batches: pairs (input, target) of tensors, or tuples, lists or dicts of them, with the examples along the first
            dimension. They are kept, so that all products are with one matrix.
        kind: ``"hessian"`` or ``"ggn"``.

    Raises:
        ValueError: an unknown kind; no batch; no parameter with ``requires_grad``.
        RuntimeError: complex or sharded parameters (``DTensor``).

    Source: B. Pearlmutter, Fast exact multiplication by the Hessian, 1994; N. Schraudolph, Fast curvature
    matrix-vector products, 2002.

    >>> import torch
    >>> from assay.optim import curvature_operator
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> H = curvature_operator(model, torch.nn.functional.mse_loss, [(x, y)])
    >>> H @ torch.tensor([1.0, 1.0])
    tensor([1., 4.])
    """
    return CurvatureOperator(model, loss_fn, batches, kind)


class CurvatureOperator(LinearOperator):
    """What :func:`curvature_operator` returns."""

    def __init__(self, model: nn.Module, loss_fn: Loss, batches: Iterable[tuple[Any, Any]], kind: str) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind = {kind!r} is out of range: 'hessian' or 'ggn'")
        # DistributedDataParallel would reduce gradients in the middle of a product.
        self.model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.loss_fn, self.kind = loss_fn, kind
        self.batches = [(batch, _examples(batch)) for batch in batches]
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        if not self.batches:
            raise ValueError("batches = [] is out of range: at least one pair (input, target)")
        if not self.params:
            raise ValueError("model has no parameter with requires_grad=True")
        if any(p.is_complex() or hasattr(p, "to_local") for p in self.params):
            raise RuntimeError("curvature_operator does not support complex or sharded parameters")
        self.sizes = [p.numel() for p in self.params]
        self.device = self.params[0].device
        self.tensor_dtype = functools.reduce(torch.promote_types, (p.dtype for p in self.params), torch.float32)
        n = sum(self.sizes)
        super().__init__(np.dtype(str(self.tensor_dtype).removeprefix("torch.")), (n, n))

    def product(self, v: Tensor) -> Tensor:
        """The matrix times a vector of shape (P,), in the operator's dtype and on its device."""
        if v.shape != (self.shape[1],):
            raise ValueError(f"v.shape = {tuple(v.shape)} is out of range: ({self.shape[1]},)")
        v = v.detach().to(self.device, self.tensor_dtype)
        parts = [part.view(p.shape).to(p) for part, p in zip(v.split(self.sizes), self.params, strict=True)]
        of_batch = self._hessian_product if self.kind == "hessian" else self._ggn_product
        total, count = torch.zeros_like(v), 0
        # Only this kernel of attention can be differentiated twice.
        with evaluating(self.model), torch.autocast(self.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
            for batch, examples in self.batches:
                with torch.enable_grad():
                    found = of_batch(batch, parts)
                total += examples * torch.cat([x.detach().reshape(-1).to(v) for x in found])
                count += examples
        return all_reduce_sum(total) / all_reduce_sum(torch.tensor(float(count), device=self.device))

    def _hessian_product(self, batch: tuple[Any, Any], parts: list[Tensor]) -> Any:
        loss = self.loss_fn(self.model(batch[0]), batch[1])
        gradient = torch.autograd.grad(loss, self.params, create_graph=True, materialize_grads=True)
        return self._pulled(gradient, self.params, parts)

    def _ggn_product(self, batch: tuple[Any, Any], parts: list[Tensor]) -> Any:
        output = self.model(batch[0])
        if not isinstance(output, Tensor):
            raise TypeError(f"the Gauss-Newton matrix needs a model that returns a tensor, not {type(output).__name__}")
        # J^T u is linear in u: its derivative, applied to v, is J v.
        u = torch.zeros_like(output, requires_grad=True)
        pulled = torch.autograd.grad(output, self.params, u, create_graph=True, materialize_grads=True)
        (moved,) = self._pulled(pulled, [u], parts)
        gradient = torch.autograd.grad(self.loss_fn(output, batch[1]), [output], create_graph=True)
        (curved,) = self._pulled(gradient, [output], [moved])
        return torch.autograd.grad(output, self.params, curved, materialize_grads=True)

    @staticmethod
    def _pulled(of: Any, to: list[Tensor], v: list[Tensor]) -> Any:
        """d <of, v> / d to, where what does not depend on ``to`` counts as constant."""
        pairs = [(x, part) for x, part in zip(of, v, strict=True) if x.requires_grad]
        if not pairs:
            return [torch.zeros_like(x) for x in to]
        outputs, along = ([x for x, _ in pairs], [part for _, part in pairs])
        return torch.autograd.grad(outputs, to, along, retain_graph=True, materialize_grads=True)

    def __matmul__(self, other: Any) -> Any:
        if not isinstance(other, Tensor):
            return super().__matmul__(other)
        return torch.stack([self.product(x) for x in other.T], 1) if other.dim() == 2 else self.product(other)

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self.product(torch.as_tensor(np.ascontiguousarray(x.reshape(-1)))).cpu().numpy()

    def _adjoint(self) -> CurvatureOperator:
        return self  # symmetric

    _transpose = _adjoint


def lanczos(
    op: Any, steps: int = 20, *, v0: Tensor | None = None, seed: int = 0, reorthogonalize: bool = True
) -> tuple[Tensor, Tensor]:
    """Ritz values of a symmetric operator from a few products, with their weights in the starting vector.

    From v_1 = v0 / ||v0||, with w orthogonalized against all v_i so far, twice, if ``reorthogonalize`` ::

        w = op @ v_j - beta_{j-1} v_{j-1};   alpha_j = <w, v_j>;   w = w - alpha_j v_j
        beta_j = ||w||;   v_{j+1} = w / beta_j                                      j = 1 .. steps
        T = tridiagonal(alpha, beta) = Y diag(ritz_values) Y^T;   weights_i = (first entry of column i of Y)^2

    The extreme Ritz values converge first, from inside the spectrum. The weights sum to 1, and
    ``sum_i weights_i f(ritz_values_i)`` is <v_1, f(op) v_1> to high order. Without re-orthogonalization rounding makes
    copies of eigenvalues that have converged. If beta_j vanishes, v0 lies in an invariant subspace, and fewer values
    are returned: those of that subspace.

    Args:
        op: what :func:`curvature_operator` returns; or a square tensor, an array, a SciPy ``LinearOperator``, or an
            object with a ``shape`` that is multiplied by tensors (as curvlinops' are).
        steps: number of products, >= 1; at most as many as ``op`` has rows are taken.
        v0: shape (n,), not zero; None draws a normal one.
        seed: of that draw, which is made on the CPU, by a generator of its own.
        reorthogonalize: costs a matrix of shape (steps, n), which is needed anyway, and about 4 n steps^2 operations.

    Returns:
        (ritz_values, weights), float64 on the CPU, shape (m,) with m <= steps, ascending.

    Raises:
        ValueError: an argument out of range.
        FloatingPointError: a product that is not finite.

    Source: C. Lanczos, 1950; G. Golub and G. Meurant, Matrices, Moments and Quadrature, 2010.

    >>> import torch
    >>> from assay.optim import lanczos
    >>> values, weights = lanczos(torch.diag(torch.tensor([1.0, 2.0, 4.0]).double()), 3, v0=torch.ones(3))
    >>> values.numpy().round(6).tolist(), weights.numpy().round(6).tolist()
    ([1.0, 2.0, 4.0], [0.333333, 0.333333, 0.333333])
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps = {steps!r} is out of range: an integer >= 1")
    times, like, n = _product(op)
    if v0 is None:
        v0 = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)
    v = v0.detach().to(like)
    if v.shape != (n,) or not (v.isfinite().all() and v.any()):
        raise ValueError(f"v0 of shape {tuple(v.shape)} is out of range: ({n},), finite and not zero")
    basis = like.new_zeros(min(steps, n), n)
    diagonal: list[float] = []
    off: list[float] = []
    v, small = v / v.norm(), 100 * torch.finfo(like.dtype).eps
    wide = torch.float32 if like.device.type == "mps" else torch.float64
    for j in range(len(basis)):
        basis[j] = v
        w = times(v).to(like)
        if j:
            w = w - off[-1] * basis[j - 1]
        # T in float64: its eigenvalues are what is wanted, and it is small.
        diagonal.append(torch.dot(w.to(wide), v.to(wide)).item())
        w = w - diagonal[-1] * v
        for _ in range(2 * reorthogonalize):
            w = w - basis[: j + 1].T @ (basis[: j + 1] @ w)
        beta = w.to(wide).norm().item()
        if not np.isfinite([diagonal[-1], beta]).all():
            raise FloatingPointError("op @ v is not finite")
        if j + 1 == len(basis) or beta <= small * max(map(abs, diagonal + off)):
            break
        off.append(beta)
        v = w / beta
    size = len(diagonal)
    t = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    t[range(size - 1), range(1, size)] = t[range(1, size), range(size - 1)] = torch.tensor(off, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(t)
    return values, vectors[0].square()


def spectral_density(op: Any, steps: int, probes: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Where the eigenvalues of a symmetric operator lie: stochastic Lanczos quadrature.

    The Ritz values of ``probes`` runs of :func:`lanczos` from random signs, with their weights divided by ``probes``:
    a discrete density that has the mass of the spectrum where that has its own ::

        sum_i weights_i f(values_i)  ~  trace f(op) / n

    Args:
        op: as for :func:`lanczos`.
        steps: products in each run, >= 1; polynomials f up to degree 2 steps - 1 have no error but that of the probes.
        probes: number of runs, >= 1; the error of the probes falls as 1 / sqrt(n * probes).
        seed: of the random signs, which a generator of their own draws on the CPU.

    Returns:
        (values, weights), float64 on the CPU, ascending; the weights sum to 1.

    Raises:
        ValueError: an argument out of range.
        FloatingPointError: a product that is not finite.

    Source: S. Ubaru, J. Chen, Y. Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, 2017.

    >>> import torch
    >>> from assay.optim import spectral_density
    >>> values, weights = spectral_density(torch.diag(torch.arange(1.0, 101.0)), steps=10, probes=4)
    >>> round((weights @ values).item(), 3)  # the mean eigenvalue
    50.5
    """
    if not isinstance(probes, int) or probes < 1:
        raise ValueError(f"probes = {probes!r} is out of range: an integer >= 1")
    generator = torch.Generator().manual_seed(seed)
    _, like, n = _product(op)
    signs = (2.0 * torch.randint(2, (n,), generator=generator) - 1 for _ in range(probes))
    runs = [lanczos(op, steps, v0=sign.to(like)) for sign in signs]
    values, order = torch.cat([values for values, _ in runs]).sort()
    return values, torch.cat([weights for _, weights in runs])[order] / probes


def _product(op: Any) -> tuple[Callable[[Tensor], Tensor], Tensor, int]:
    """(v -> op @ v on tensors, an empty tensor of op's dtype and device, number of rows)."""
    shape = tuple(getattr(op, "shape", ()))
    if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
        raise ValueError(f"op of shape {shape} is out of range: a square matrix or operator")
    if isinstance(op, CurvatureOperator):
        return op.product, torch.empty(0, dtype=op.tensor_dtype, device=op.device), shape[0]
    if isinstance(op.dtype, torch.dtype):  # a matrix, or curvlinops' operators since their version 3
        dtype = torch.promote_types(op.dtype, torch.float32)
        op = op.to(dtype) if isinstance(op, Tensor) else op
        return lambda v: op @ v, torch.empty(0, dtype=dtype, device=getattr(op, "device", None)), shape[0]
    dtype = torch.float32 if op.dtype == np.float32 else torch.float64
    return lambda v: torch.as_tensor(op @ v.numpy()), torch.empty(0, dtype=dtype), shape[0]


def _examples(batch: tuple[Any, Any]) -> int:
    """The size of a batch, along the first dimension of its first tensor."""
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim():
            return len(leaf)
    raise ValueError("a batch without a tensor of examples is out of range: a pair (input, target)")
