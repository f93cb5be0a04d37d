"""Walking a dataset in order with a model in evaluation mode: what every scorer does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map
from torch.utils.data import TensorDataset, default_collate

from assay._modes import evaluating
from assay.data._checks import count

Score = Callable[["Logits", Any, Any], Tensor]


class Logits(nn.Module):
    """A model seen as a function of one argument that returns its logits as a tensor.

    A mapping is passed on as keywords, and an output with an attribute ``logits`` is replaced by it, so that models
    and rows in the manner of Hugging Face work like any others.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Tensor:
        output = self.model(**inputs) if isinstance(inputs, Mapping) else self.model(inputs)
        return getattr(output, "logits", output)


def score_examples(
    model: nn.Module,
    dataset: Any,
    score: Score,
    *,
    batch_size: int,
    device: torch.device | str | None = None,
    gradients: bool = False,
) -> Tensor:
    """``score(network, inputs, targets)``, a vector of b scores, over the whole dataset in its order: (N,) on the CPU.

    The model runs in evaluation mode and is left as it was, and so is torch's random state.
    """
    check_scorable(model, dataset)
    count("batch_size", batch_size)
    place = torch.device(device) if device is not None else _device(model)
    forked = [place] if place.type == "cuda" else []
    network = Logits(model)
    with evaluating(model), torch.random.fork_rng(devices=forked), torch.set_grad_enabled(gradients):
        scores = [score(network, x, y).detach().cpu() for x, y in batches(dataset, batch_size, place)]
    return torch.cat(scores)


def check_scorable(model: nn.Module, dataset: Any) -> None:
    """Refuse what has no score per example: nothing to score, nothing to index, or examples that see each other."""
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise ValueError(f"dataset is a {type(dataset).__name__}, not a map-style dataset (__len__ and __getitem__)")
    if len(dataset) == 0:
        raise ValueError("dataset is empty: there is nothing to score")
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"{name} ({type(module).__name__}) keeps no running statistics: it normalizes by the batch, so a "
                "score would depend on the other examples in it"
            )


def batches(dataset: Any, batch_size: int, device: torch.device) -> Iterator[tuple[Any, Any]]:
    """Collated (inputs, targets) in dataset order.

    No DataLoader: each new iterator of one draws from torch's global generator.
    """
    many = getattr(dataset, "__getitems__", None)
    for start in range(0, len(dataset), batch_size):
        stop = min(start + batch_size, len(dataset))
        if type(dataset) is TensorDataset:
            batch: Any = dataset[start:stop]
        else:
            indices = list(range(start, stop))
            batch = default_collate(many(indices) if many else [dataset[i] for i in indices])
        yield tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, _inputs_and_targets(batch))


def _inputs_and_targets(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        for key in ("label", "labels"):
            inputs = {name: value for name, value in batch.items() if name not in (key, "index")}
            if key in batch and inputs:
                return (inputs if len(inputs) > 1 else next(iter(inputs.values()))), batch[key]
        raise ValueError(f"dataset yields rows with {sorted(batch)}: 'label' (or 'labels') and an input are needed")
    if isinstance(batch, Sequence) and len(batch) >= 2:
        return batch[0], batch[1]
    raise ValueError(f"dataset yields a {type(batch).__name__}: an example is (input, target, ...) or a mapping")


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def probabilities_of(logits: Any, num_classes: int | None) -> Tensor:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model returns {found}: logits (b, C) of at least two classes are needed")
    if num_classes not in (None, logits.shape[1]):
        raise ValueError(f"num_classes = {num_classes!r}, but the model returns {logits.shape[1]} logits")
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)


def distribution_of(targets: Tensor, probabilities: Tensor) -> Tensor:
    """Targets as rows of probabilities: one-hot for classes."""
    classes = probabilities.shape[1]
    if targets.is_floating_point() and targets.shape == probabilities.shape:
        return targets.to(probabilities.dtype)
    if targets.is_floating_point() or targets.dim() != 1:
        raise ValueError(f"targets {tuple(targets.shape)} of {targets.dtype}: classes (b,) or probabilities (b, C)")
    if targets.min() < 0 or targets.max() >= classes:
        raise ValueError(f"targets reach from {targets.min()} to {targets.max()}, but the model has {classes} classes")
    return F.one_hot(targets.long(), classes).to(probabilities.dtype)


def error_norms(logits: Any, targets: Tensor, *, order: int = 2, num_classes: int | None = None) -> Tensor:
    """|| softmax(logits) - onehot(targets) || of each example of a batch, (b,)."""
    probabilities = probabilities_of(logits, num_classes)
    return torch.linalg.vector_norm(probabilities - distribution_of(targets, probabilities), ord=order, dim=1)
