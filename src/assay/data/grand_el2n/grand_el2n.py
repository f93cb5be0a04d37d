"""GraNd, EL2N, margins and forgetting: how hard each example is early in training, and what to keep of a dataset."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset

from assay.data._checks import count, one_of, share
from assay.data._grad_norms import GhostNorms, chosen_parameters, loop_norms, training_only, vmap_norms
from assay.data._scoring import Logits, check_scorable, distribution_of, error_norms, probabilities_of, score_examples
from assay.data._selection import ScoreSubset, keep_by_score
from assay.data._watching import WatchedBatches
from assay.data.grand_el2n.forgetting import ForgettingTracker
from assay.data.grand_el2n.pruning import PruningSampler

__all__ = [
    "ForgettingTracker",
    "PruningSampler",
    "ScoreSubset",
    "average_scores",
    "el2n_scores",
    "grand_scores",
    "keep_by_score",
    "margin_scores",
]

if TYPE_CHECKING:
    from assay.bench.recipe import Batch, Recipe, Run


def el2n_scores(
    model: nn.Module,
    dataset: Any,
    *,
    order: int = 2,
    batch_size: int = 256,
    num_classes: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """EL2N, the norm of the error that a model makes on each example.

    For an example (x, y) and logits f(x) of C classes ::

        score = || softmax(f(x)) - onehot(y) ||_order

    which lies in [0, sqrt 2] (in [0, 2] for ``order=1``): 0 for a confident right answer, sqrt(1 - 1/C) for a uniform
    one, the upper end for a confident wrong one. It approximates :func:`grand_scores` at the price of a forward pass.
    Score a model that was trained for a few epochs, and average over several (:func:`average_scores`).

    The model runs as in ``eval()``, in dataset order, and nothing of it changes: flags, gradients, buffers, random
    state. The dataset should apply no augmentation.

    Args:
        model: maps a batch of inputs to logits (b, C), or to an object that has them as ``logits``.
        dataset: map-style; example i is (input, target, ...) or a mapping with ``label`` or ``labels``. A target is a
            class in [0, C), or a row of C probabilities.
        order: 2, or 1 for the sum of absolute errors.
        batch_size: at least 1; it affects memory and speed only.
        num_classes: C, if the model's outputs are to be checked against it; at least 2.
        device: where the inputs are moved; None: where the model's first parameter is.

    Returns:
        Scores (N,) in dataset order, on the CPU.

    Raises:
        ValueError: an argument or a target out of range, an empty dataset, outputs that are no logits (b, C), or a
            batch normalization without running statistics (examples would affect each other's scores).

    Source:
        Paul, Ganguli, Dziugaite: Deep Learning on a Data Diet, NeurIPS 2021, arXiv 2107.07075.

    Example:
        >>> import torch
        >>> from assay.data import el2n_scores
        >>> logits = torch.tensor([[200.0, 0.0], [0.0, 0.0], [0.0, 200.0]])
        >>> dataset = torch.utils.data.TensorDataset(logits, torch.tensor([0, 0, 0]))
        >>> el2n_scores(torch.nn.Identity(), dataset)
        tensor([0.0000, 0.7071, 1.4142])
    """
    one_of("order", order, (1, 2))
    if num_classes is not None and num_classes < 2:
        raise ValueError(f"num_classes = {num_classes!r} is out of range: None or an integer >= 2")

    def score(network: Logits, inputs: Any, targets: Any) -> Tensor:
        return error_norms(network(inputs), targets, order=order, num_classes=num_classes)

    return score_examples(model, dataset, score, batch_size=batch_size, device=device)


def margin_scores(
    model: nn.Module,
    dataset: Any,
    *,
    kind: str = "max",
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> Tensor:
    """How far the wrong classes are ahead of the right one, in probability.

    With p = softmax(f(x)) ::

        kind "max":  score = max over k != y of (p_k - p_y)        in [-1, 1]
        kind "sum":  score = sum over k != y of (p_k - p_y)        in [-(C - 1), 1]

    Args:
        kind: ``"max"`` or ``"sum"``.
        model, dataset, batch_size, device: as in :func:`el2n_scores`; targets are classes.

    Returns:
        Scores (N,) in dataset order, on the CPU; larger is harder.

    Raises:
        ValueError: as in :func:`el2n_scores`.

    Source:
        The scores that accompany Paul, Ganguli, Dziugaite (NeurIPS 2021, arXiv 2107.07075) in the authors' code.

    Example:
        >>> import torch
        >>> from assay.data import margin_scores
        >>> p = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3]])
        >>> dataset = torch.utils.data.TensorDataset(p.log(), torch.tensor([0, 0]))
        >>> margin_scores(torch.nn.Identity(), dataset)
        tensor([-0.5000,  0.3000])
    """
    one_of("kind", kind, ("max", "sum"))

    def score(network: Logits, inputs: Any, targets: Any) -> Tensor:
        probabilities = probabilities_of(network(inputs), None)
        if targets.is_floating_point():
            raise ValueError("a margin needs classes as targets, not probabilities")
        right = distribution_of(targets, probabilities).bool()
        margins = probabilities - probabilities[right][:, None]
        if kind == "max":
            return margins.masked_fill(right, -math.inf).amax(1)
        return margins.sum(1)  # the right class adds p_y - p_y = 0

    return score_examples(model, dataset, score, batch_size=batch_size, device=device)


def grand_scores(
    model: nn.Module,
    dataset: Any,
    *,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    params: str | Sequence[str] = "all",
    method: str = "vmap",
    batch_size: int = 32,
    device: torch.device | str | None = None,
) -> Tensor:
    """GraNd, the norm of each single example's gradient.

    For an example (x, y) and the chosen parameters w ::

        score = || d loss_fn(f_w(x), y) / d w ||_2

    The model runs as in ``eval()``: batch normalization takes its running statistics, and its scale and shift count
    as parameters. At initialization the score is not expected to find what to keep; score after a few epochs.

    Args:
        model, dataset, device: as in :func:`el2n_scores`.
        loss_fn: ``loss_fn(output, target)``, called with batches of one example; None: cross-entropy.
        params: ``"all"``: every parameter that requires a gradient; ``"last_layer"``: those of the module registered
            last that has any; or names of parameters or modules.
        method: one number, three ways. ``"vmap"``: a vectorized backward pass, which holds ``batch_size`` times the
            chosen parameters. ``"loop"``: an example at a time; any model, least memory, slow. ``"ghost"``: one
            ordinary pass and closed forms for linear, convolution, embedding and normalization layers, which forms
            few gradients or none; what has no closed form takes the way of ``"vmap"``.
        batch_size: at least 1; it affects memory and speed only.

    Returns:
        Scores (N,) in dataset order, on the CPU.

    Raises:
        ValueError: as in :func:`el2n_scores`, or no such parameter.

    Source:
        Paul, Ganguli, Dziugaite: Deep Learning on a Data Diet, NeurIPS 2021, arXiv 2107.07075.

    Example:
        >>> import torch
        >>> from assay.data import grand_scores
        >>> model = torch.nn.Linear(2, 2)
        >>> _ = model.load_state_dict({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)})
        >>> dataset = torch.utils.data.TensorDataset(torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
        >>> grand_scores(model, dataset)  # error sqrt(1/2) times sqrt(|x|^2 + 1)
        tensor([0.7071, 1.0000])
        >>> grand_scores(model, dataset, params=["weight"], method="ghost")
        tensor([0.0000, 0.7071])
    """
    one_of("method", method, ("vmap", "loop", "ghost"))
    check_scorable(model, dataset)
    chosen = chosen_parameters(model, params)

    def loss(output: Tensor, target: Any) -> Tensor:
        # The sum leaves a scalar as it is and makes one of an unreduced loss.
        return (loss_fn or F.cross_entropy)(output, target).sum()

    with training_only(model, chosen):
        norms = GhostNorms(model) if method == "ghost" else {"vmap": vmap_norms, "loop": loop_norms}[method]

        def score(network: Logits, inputs: Any, targets: Any) -> Tensor:
            return norms(network, loss, inputs, targets)

        return score_examples(model, dataset, score, batch_size=batch_size, device=device, gradients=True)


Scorer = Callable[[nn.Module, Any], Tensor]
_SCORERS: dict[str, Scorer] = {"el2n": el2n_scores, "grand": grand_scores, "margin": margin_scores}


@overload
def average_scores(
    make_model: Callable[[], nn.Module],
    train_fn: Callable[[nn.Module, Any], Any],
    dataset: Any,
    *,
    score: str | Scorer = ...,
    runs: int = ...,
    seeds: Sequence[int] | None = ...,
    return_std: Literal[False] = ...,
) -> Tensor: ...
@overload
def average_scores(
    make_model: Callable[[], nn.Module],
    train_fn: Callable[[nn.Module, Any], Any],
    dataset: Any,
    *,
    score: str | Scorer = ...,
    runs: int = ...,
    seeds: Sequence[int] | None = ...,
    return_std: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def average_scores(
    make_model: Callable[[], nn.Module],
    train_fn: Callable[[nn.Module, Any], Any],
    dataset: Any,
    *,
    score: str | Scorer = "el2n",
    runs: int = 10,
    seeds: Sequence[int] | None = None,
    return_std: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The mean score of each example over independent trainings, by your own training function.

    Each run does ``torch.manual_seed(seed)``, ``model = make_model()``, ``train_fn(model, dataset)`` and scores the
    dataset; the mean is of scores (norms), not the score of a mean model. torch's random state is put back. A
    ``train_fn`` that needs the seed itself, for numpy say, finds it in ``torch.initial_seed()``.

    Args:
        make_model: a new network, initialised from torch's global generator.
        train_fn: trains the model on the dataset for a few epochs, in place; a module that it returns is scored
            instead.
        dataset: the dataset to score, without augmentation.
        score: ``"el2n"``, ``"grand"``, ``"margin"``, or a function ``(model, dataset) -> (N,)``.
        runs: number of trainings, at least 1; the paper's gain levels off at about 10.
        seeds: one seed per run instead of 0, 1, ..., runs - 1; their number then is that of the runs.
        return_std: also return each score's standard deviation over the runs (at least 2).

    Returns:
        The mean (N,); with ``return_std`` a pair (mean, standard deviation). The mean of R runs is known to about
        std / sqrt(R).

    Raises:
        ValueError: ``score``, ``runs`` or ``seeds`` out of range, or whatever the scorer refuses.

    Source:
        Paul, Ganguli, Dziugaite: Deep Learning on a Data Diet, NeurIPS 2021, arXiv 2107.07075.

    Example:
        >>> import torch
        >>> from assay.data import average_scores
        >>> dataset = torch.utils.data.TensorDataset(torch.eye(3), torch.arange(3))
        >>> def train(model, dataset):
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        ...     for _ in range(5):
        ...         optimizer.zero_grad()
        ...         torch.nn.functional.cross_entropy(model(dataset.tensors[0]), dataset.tensors[1]).backward()
        ...         optimizer.step()
        >>> mean, std = average_scores(lambda: torch.nn.Linear(3, 3), train, dataset, runs=4, return_std=True)
        >>> mean.shape, bool((std < mean).all())
        (torch.Size([3]), True)
    """
    seeds = range(count("runs", runs)) if seeds is None else seeds
    if len(seeds) < 1 + return_std:
        raise ValueError(f"{len(seeds)} runs (or seeds) are too few: at least {1 + return_std}")
    scorer = _scorer(score)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        model = make_model()
        trained = train_fn(model, dataset)
        return scorer(trained if isinstance(trained, nn.Module) else model, dataset)

    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=devices):
        scores = torch.stack([run(seed) for seed in seeds])
    mean = scores.double().mean(0).to(scores.dtype)
    return (mean, scores.double().std(0).to(scores.dtype)) if return_std else mean


def apply(recipe: Recipe, *, keep: float = 0.75, score: str = "el2n", runs: int = 5, fraction: float = 0.1) -> Recipe:
    """Train on the hardest ``keep`` of the data, by the mean score of ``runs`` proxies.

    Each proxy is trained by the recipe itself for ``fraction`` of the budget, from its own initialization and order;
    the proxies' cost counts. Score ``"forgetting"`` is counted while they train, all others are taken at their end. The
    pruned run has the same number of steps as the full one.
    """
    share("keep", keep)
    if not callable(score):
        one_of("score", score, (*_SCORERS, "forgetting"))
    count("runs", runs)
    share("fraction", fraction)

    def data(run: Run) -> Any:
        if run.task.classes is None:
            raise ValueError(f"grand-el2n needs a classification task; {run.task.name!r} has no classes")
        dataset = recipe.data(run)
        found = []
        for k in range(runs):
            proxy, tracker = replace(recipe, data=lambda _: dataset), ForgettingTracker(len(dataset))  # type: ignore[arg-type]
            if score == "forgetting":
                proxy = replace(proxy, batch=functools.partial(_tracked, recipe, tracker))
            fit = run.fit(proxy, fraction=fraction, seed=run.seed + 1_000_003 * (k + 1))
            found.append(tracker.scores() if score == "forgetting" else _scorer(score)(fit.model, dataset))
        scores = torch.stack(found).double()
        # A proxy that has diverged ranks nothing. If all have, the run will diverge as well.
        usable = [row for row in scores if not row.isnan().any() and not row.isinf().all()]
        if not usable:
            return dataset
        kept = keep_by_score(torch.stack(usable).mean(0), keep)
        return Subset(dataset, kept.tolist())  # plain, which the bench's loop gathers without a Python loop

    return replace(recipe, data=data)


def _tracked(recipe: Recipe, tracker: ForgettingTracker, run: Run) -> WatchedBatches:
    """The recipe's batches, with the answers to them counted."""

    def note(run: Run, batch: Batch, logits: Tensor) -> None:
        tracker.update(batch.index, logits.argmax(-1) == batch.target)

    return WatchedBatches(recipe.batch(run), note)


def _scorer(score: str | Scorer) -> Scorer:
    if callable(score):
        return score
    one_of("score", score, tuple(_SCORERS))
    return _SCORERS[score]
