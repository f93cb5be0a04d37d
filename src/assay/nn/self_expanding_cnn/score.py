"""The natural expansion score: how fast a natural-gradient step would lower the loss, for each parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from assay._checks import in_range
from assay._modes import evaluating
from assay.optim import per_sample_grads

CHUNK = 64  # examples differentiated at once: bounds the memory to 64 times the parameters

Loss = Callable[[Any, Any], Tensor]


def natural_expansion_score(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    loss_fn: Loss,
    *,
    damping: float = 1e-5,
    baseline_params: int | None = None,
    reg: float = 5e-5,
    reg_power: float = 1,
    normalize: bool = True,
    fisher: str = "per_sample",
) -> float:
    """The natural expansion score of a network: compare those of several, on the same batches, to choose among them.

    With g_i the gradient of example i's loss, over all N examples and P parameters ::

        g = mean_i g_i,   F = mean_i g_i^2,   eta = sum_p g_p^2 / (F_p + damping)
        score = eta / P * exp(-reg * dp^reg_power)          dp = P - baseline_params

    eta is g^T F^-1 g with the diagonal of the empirical Fisher matrix: the rate at which a natural-gradient step lowers
    the loss. A parameter counts for at most 1, if all examples agree on it. The model runs as in evaluation (no
    dropout, running statistics); it, its gradients and the state of random numbers are left as they were.

    Args:
        model: any module that is called with one input; frozen parameters count for nothing.
        batches: pairs (input, target), at least one example in all. How they are split makes no difference.
        loss_fn: ``loss_fn(output, target)``, the mean over its examples.
        damping: > 0.
        baseline_params: the parameters of the network before it was expanded; None: as many as now, no penalty.
        reg: >= 0, the penalty on each added parameter.
        reg_power: > 0; 1 as the authors compute, 2 as the paper writes (with ``reg`` made for it).
        normalize: divide by P, without which a larger network has the larger score.
        fisher: "per_sample", or "batch": sum_b g_b^2 / (sum_b g_b^2 + damping) over the gradients g_b of whole batches,
            as the authors' program has it. It is near 1 for every parameter and every network; for comparison only.

    Raises:
        ValueError: an argument out of range, no example, or no parameter that requires a gradient.

    Source: B. Appolinary, A. Deaconu, S. Yang, Q. Li, Self Expanding Convolutional Neural Networks, 2024,
    arXiv 2401.05686; the score is from R. Mitchell et al., Self-Expanding Neural Networks, 2023, arXiv 2307.04526.

    >>> import torch
    >>> from assay.nn.expand import natural_expansion_score
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> x, y = torch.tensor([[1.0], [1.0]]), model(torch.ones(2, 1)).detach() + torch.tensor([[1.0], [3.0]])
    >>> score = natural_expansion_score(model, [(x, y)], torch.nn.functional.mse_loss)  # gradients -2 and -6: 16 / 20
    >>> round(score, 4)
    0.8
    """
    in_range("damping", damping, 0 < damping < math.inf, "> 0 and finite")
    in_range("reg", reg, 0 <= reg < math.inf, ">= 0 and finite")
    in_range("reg_power", reg_power, 0 < reg_power < math.inf, "> 0 and finite")
    in_range("fisher", fisher, fisher in ("per_sample", "batch"), "per_sample or batch")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("model has no parameter with requires_grad=True")
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    squares = {name: torch.zeros_like(p) for name, p in trained.items()}
    count = 0
    for grads in (_of_batches if fisher == "batch" else _of_examples)(model, batches, loss_fn):
        for name, g in grads.items():
            total[name] += g.sum(0)
            squares[name] += g.square().sum(0)
        count += len(g)
    if not count:
        raise ValueError("batches = no example is out of range: at least one example")
    size = sum(p.numel() for p in trained.values())
    if fisher == "batch":
        eta = sum((s / (s + damping)).sum().item() for s in squares.values())
    else:
        eta = sum(((total[n] / count).square() / (squares[n] / count + damping)).sum().item() for n in total)
    added = size - (size if baseline_params is None else baseline_params)
    return eta / (size if normalize else 1) * math.exp(-reg * math.copysign(abs(added) ** reg_power, added))


def _of_examples(model: nn.Module, batches: Iterable[Any], loss_fn: Loss) -> Iterable[dict[str, Tensor]]:
    for batch in batches:
        for start in range(0, len(tree_leaves(batch)[0]), CHUNK):
            part = slice(start, start + CHUNK)
            yield per_sample_grads(model, loss_fn, *tree_map(lambda t, part=part: t[part], tuple(batch)))


def _of_batches(model: nn.Module, batches: Iterable[Any], loss_fn: Loss) -> Iterable[dict[str, Tensor]]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for x, y in batches:
        with evaluating(model), torch.enable_grad():
            grads = torch.autograd.grad(loss_fn(model(x), y), list(trained.values()), materialize_grads=True)
        yield {name: g.unsqueeze(0) for name, g in zip(trained, grads, strict=True)}
