"""Gradients of single examples, shared by the methods that measure how much they disagree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from assay._modes import evaluating


def per_sample_grads(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    *,
    chunk_size: int | None = None,
) -> dict[str, Tensor]:
    """The gradient of each example's loss, by one vectorized backward pass.

    For every parameter w of ``model`` with ``requires_grad`` and every example i ::

        grads[name of w][i] = d loss_fn(model(inputs[i:i+1]), targets[i:i+1]) / d w

    so that, for a ``loss_fn`` that averages over the batch, ``grads[name].mean(0)`` is what ``backward()`` would put
    into ``w.grad``. The model runs as in ``eval()`` and its flags are put back: batch normalization takes its running
    statistics, because batch statistics would tie the examples together, and dropout is off. Normalization within an
    example (LayerNorm, GroupNorm) needs no such care. Neither the parameters nor their ``.grad`` are touched.

    Args:
        model: any module that is called with one argument; frozen parameters are left out, tied ones appear once.
        loss_fn: ``loss_fn(output, target)``, a scalar; it is called with batches of one example.
        inputs: a tensor of b examples along its first dimension, or a tuple, list or dict of such tensors.
        targets: likewise.
        chunk_size: how many examples are differentiated at once, at least 1; None means all. It bounds the memory of
            the activations; the result holds b times the parameters in any case.

    Returns:
        ``{name: tensor of shape (b, *w.shape)}``, detached, in the order of ``model.named_parameters()``.

    Raises:
        ValueError: ``chunk_size`` below 1, or no parameter requires a gradient.

    Example:
        >>> import torch
        >>> from assay.optim import per_sample_grads
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> per_sample_grads(model, torch.nn.functional.mse_loss, x, y)["weight"].tolist()
        [[[2.0, 0.0]], [[0.0, 8.0]]]
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size!r} is out of range: None or an integer >= 1")
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("model has no parameter with requires_grad=True")

    def loss(params: dict[str, Tensor], x: Any, y: Any) -> Tensor:
        one = tree_map(lambda t: t.unsqueeze(0), (x, y))
        return loss_fn(torch.func.functional_call(model, params, (one[0],)), one[1])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="different", chunk_size=chunk_size)
    # Only this kernel of attention is vectorized over examples; the others run one by one.
    with evaluating(model), sdpa_kernel(SDPBackend.MATH):
        return each(params, inputs, targets)
