"""The rule that expands a network where its natural expansion score grows most."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from assay._checks import in_range
from assay.nn.self_expanding_cnn.score import Loss, natural_expansion_score
from assay.nn.self_expanding_cnn.surgery import Growth

if TYPE_CHECKING:
    from assay.nn.self_expanding_cnn.self_expanding_cnn import SelfExpandingCNN

LAYER, WIDTH = "layer", "width"


@dataclass(frozen=True)
class ExpansionEvent:
    """An expansion: ``kind`` "layer" or "width" of a ``block``, at the ``call``-th call of ``maybe_expand``.

    ``scores`` has the score of the network as it was under ``("none", -1)`` and of each candidate under its kind and
    block; ``parameters`` their number before and after.
    """

    kind: str
    block: int
    call: int
    scores: dict[tuple[str, int], float]
    parameters: tuple[int, int]


class Expander:
    """Expands a network when the natural expansion score says that it pays. Call it once an epoch.

    With eta_c the score of the network, eta_l the best of those with one layer more and eta_i the best of those with
    wider blocks, each on a copy and on the same batches ::

        eta_l > eta_i and eta_l / eta_c > threshold     the layer is added
        eta_i > eta_l and eta_i / eta_c > threshold     the block is widened
        otherwise                                       nothing

    and after an expansion nothing for ``cooldown`` calls. Blocks that have their ``capacity`` of added layers are no
    candidates. What is put in is what was scored, to the last random weight. An optimizer given with the call takes
    up the new parameters, and its state of the old ones stays. Save checkpoints between calls: see ``history``.

    Args:
        model: a :class:`SelfExpandingCNN`.
        threshold: > 0.
        widen_by: > 0, new channels; may be changed between calls.
        cooldown: >= 0.
        score_batches: > 0, how many of the batches are scored; None: all.
        max_params: no expansion beyond this number of parameters; None: no bound.
        score: what is compared, called as ``score(model, batches, loss_fn, baseline_params=...)``. Options of
            :func:`natural_expansion_score` are set by ``functools.partial``.

    Raises:
        ValueError: an argument out of range.

    Source: B. Appolinary, A. Deaconu, S. Yang, Q. Li, Self Expanding Convolutional Neural Networks, 2024,
    arXiv 2401.05686.

    >>> import torch
    >>> from assay.nn.expand import Expander, SelfExpandingCNN
    >>> model = SelfExpandingCNN(1, 3, (2, 2), image_size=8)
    >>> optimizer = torch.optim.Adam(model.parameters())
    >>> expander = Expander(model, threshold=0.5)
    >>> batches = [(torch.randn(16, 1, 8, 8), torch.randint(3, (16,)))]
    >>> event = expander.maybe_expand(batches, torch.nn.functional.cross_entropy, optimizer)
    >>> event.parameters[1] == model.num_parameters() > event.parameters[0]
    True
    """

    def __init__(
        self,
        model: SelfExpandingCNN,
        *,
        threshold: float = 2.0,
        widen_by: int = 2,
        cooldown: int = 10,
        score_batches: int | None = None,
        max_params: int | None = None,
        score: Callable[..., float] = natural_expansion_score,
    ) -> None:
        in_range("threshold", threshold, 0 < threshold < math.inf, "> 0 and finite")
        in_range("widen_by", widen_by, widen_by > 0, "an integer > 0")
        in_range("cooldown", cooldown, cooldown >= 0, "an integer >= 0")
        in_range("score_batches", score_batches, score_batches is None or score_batches > 0, "None or an integer > 0")
        in_range("max_params", max_params, max_params is None or max_params > 0, "None or an integer > 0")
        self.model, self.threshold, self.widen_by, self.cooldown = model, threshold, widen_by, cooldown
        self.score_batches, self.max_params, self.score = score_batches, max_params, score
        self.history: list[ExpansionEvent] = []
        self.calls = self.resting = 0

    def maybe_expand(
        self, batches: Iterable[tuple[Any, Any]], loss_fn: Loss, optimizer: torch.optim.Optimizer | None = None
    ) -> ExpansionEvent | None:
        """Expand the model, in place, by one layer or the width of one block, or leave it.

        Args:
            batches: pairs (images, target); the images of the first also calibrate the batch norms of what is new.
            loss_fn: ``loss_fn(output, target)``, the mean over its examples.
            optimizer: of the model's parameters; None: make it anew after an expansion.

        Returns:
            What was done, or None.

        Raises:
            ValueError: no batch.
        """
        self.calls += 1
        if self.resting:
            self.resting -= 1
            return None
        candidates = [
            (kind, block)
            for kind in (LAYER, WIDTH)
            for block in range(len(self.model.blocks))
            if self.model.added_layers(block) < self.model.capacity
        ]
        chosen = list(islice(batches, self.score_batches))
        if not chosen:
            raise ValueError("batches = none is out of range: at least one")
        before = self.model.num_parameters()
        scores: dict[tuple[str, int], float] = {}
        cards = {p.device for p in self.model.parameters() if p.is_cuda}
        for kind, block in candidates:
            with torch.random.fork_rng(devices=cards):
                grown = copy.deepcopy(self.model)
                self._expand(grown, kind, block, chosen)
            if self.max_params is None or grown.num_parameters() <= self.max_params:
                scores[kind, block] = self.score(grown, chosen, loss_fn, baseline_params=before)
        if not scores:
            return None
        best = {kind: max((s for (k, _), s in scores.items() if k == kind), default=0.0) for kind in (LAYER, WIDTH)}
        now = self.score(self.model, chosen, loss_fn, baseline_params=before)
        kind = LAYER if best[LAYER] > best[WIDTH] else WIDTH
        if best[LAYER] == best[WIDTH] or not best[kind] > self.threshold * now:
            return None
        block = next(block for (k, block), score in scores.items() if k == kind and score == best[kind])
        growth = self._expand(self.model, kind, block, chosen)
        if optimizer is not None:
            growth.follow(optimizer)
        self.resting = self.cooldown
        after = self.model.num_parameters()
        event = ExpansionEvent(kind, block, self.calls, {("none", -1): now, **scores}, (before, after))
        self.history.append(event)
        return event

    def _expand(self, model: SelfExpandingCNN, kind: str, block: int, batches: list[tuple[Any, Any]]) -> Growth:
        if kind == LAYER:
            return model.add_layer(block, calibration=batches[0][0])
        return model.widen(block, self.widen_by, calibration=batches[0][0])
