"""The diagonal of the empirical Fisher information: how much each weight matters to the likelihood of single labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset, IterableDataset, default_collate

from assay._modes import evaluating
from assay.optim._per_sample import per_sample_grads

AT_ONCE = 2**24
"""Numbers that the gradients of the examples differentiated together may hold: 64 MiB in float32."""


def fisher_diagonal(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    data: Any,
    num_samples: int,
    *,
    generator: torch.Generator | None = None,
) -> dict[nn.Parameter, Tensor]:
    """The diagonal empirical Fisher information of every parameter, summed over ``num_samples`` examples.

    For a weight w_j, with one gradient per example and the true labels ::

        F_j = sum_i (d loss_fn(model(x_i), y_i) / d w_j)^2

    the square of each example's gradient, not of their mean. With cross-entropy, loss_fn is -log p(y | x). The model
    runs as in ``eval()`` (the running statistics of normalization layers are used and stay as they are, dropout is off)
    and gets its flags back; gradients and parameters are not touched.

    Args:
        model: called with one argument; parameters without ``requires_grad`` are left out. Of a model in
            DistributedDataParallel give its ``module``.
        loss_fn: ``loss_fn(output, target)``, a scalar; it is called with batches of one example.
        data: a tuple (inputs, targets) of examples along their first dimension; or a ``Dataset``; or anything that
            yields batches (inputs, targets), such as a DataLoader. Inputs may be tuples, lists or dicts of tensors.
        num_samples: how many examples, >= 1; all of the data where there are fewer. Of a tuple or a Dataset they are
            drawn at random, of batches they are the first.
        generator: draws them; None is torch's own.

    Returns:
        ``{parameter: F}``, each F in its parameter's shape, in float32 at least.

    Raises:
        ValueError: ``num_samples`` below 1, no example in ``data``, or no parameter that requires a gradient.
        RuntimeError: a sharded parameter (``DTensor``).

    Source: P. Mi et al., Make Sharpness-Aware Minimization Stronger, NeurIPS 2022, arXiv 2210.05177.

    >>> import torch
    >>> from assay.optim.sam import fisher_diagonal
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> fisher_diagonal(model, torch.nn.functional.mse_loss, data, 2)[model.weight].tolist()
    [[4.0, 64.0]]
    """
    if num_samples < 1:
        raise ValueError(f"num_samples = {num_samples!r} is out of range: an integer >= 1")
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("model has no parameter with requires_grad=True")
    if any(hasattr(p, "to_local") for p in params.values()):
        raise RuntimeError("fisher_diagonal does not differentiate sharded parameters: compute it on a whole model")
    device = next(iter(params.values())).device
    fisher = {p: torch.zeros_like(p, dtype=_wide(p), requires_grad=False) for p in params.values()}
    chunk = max(1, AT_ONCE // sum(p.numel() for p in params.values()))
    seen = 0
    for inputs, targets in _examples(data, num_samples, generator):
        inputs, targets = tree_map(lambda t: t.to(device), (inputs, targets))
        size = len(tree_leaves(inputs)[0])
        for start in range(0, size, chunk):
            x, y = _part((inputs, targets), slice(start, start + chunk))
            for name, grads in _each(model, loss_fn, x, y).items():
                fisher[params[name]].add_(grads.to(_wide(grads)).square_().sum(0))
        seen += size
    if not seen:
        raise ValueError("data holds no example")
    return fisher


def _examples(data: Any, count: int, generator: torch.Generator | None) -> Iterator[Any]:
    """Batches of ``count`` examples together, or of all that there are."""
    if isinstance(data, tuple):
        size = len(tree_leaves(data)[0])
        yield _part(data, torch.randperm(size, generator=generator)[:count])
    elif isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        size = len(data)  # type: ignore[arg-type]
        for chosen in torch.randperm(size, generator=generator)[:count].split(256):
            yield default_collate([data[i] for i in chosen.tolist()])
    else:
        for batch in data:
            batch = tuple(batch)
            yield _part(batch, slice(count))
            count -= len(tree_leaves(batch)[0])
            if count <= 0:
                return


def _each(model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], x: Any, y: Any) -> dict[str, Tensor]:
    """The gradient of each example by itself, under the parameter's name."""
    try:
        return per_sample_grads(model, loss_fn, x, y)
    except RuntimeError:  # a model that branches on values, or too much memory: one example after the other
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        rows = []
        with evaluating(model), torch.enable_grad():
            for i in range(len(tree_leaves(x)[0])):
                one = _part((x, y), slice(i, i + 1))
                loss = loss_fn(model(one[0]), one[1])
                found = torch.autograd.grad(loss, list(params.values()), allow_unused=True, materialize_grads=True)
                rows.append(found)
        return {name: torch.stack(column) for name, column in zip(params, zip(*rows, strict=True), strict=True)}


def _part(tree: Any, index: Any) -> Any:
    return tree_map(lambda t: t[index], tree)


def _wide(x: Tensor) -> torch.dtype:
    # Squares of small gradients vanish in half precision.
    return torch.promote_types(x.dtype, torch.float32)
