"""Noting what a model answers to each batch of a run, without a pass of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.bench.recipe import Batch, Batches, Run


class WatchedBatches:
    """The batches of another batch seam; ``note(run, batch, output)`` is told the first output of every step.

    The objective need not know: the output is caught on its way out of the model, once a step, however often an
    optimizer asks for the loss.
    """

    def __init__(self, batches: Batches, note: Callable[[Run, Batch, Any], None]) -> None:
        self.batches, self.note = batches, note

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def before_update(self, run: Run, batch: Batch) -> None:
        announce = getattr(self.batches, "before_update", None)
        if announce:
            announce(run, batch)

        def first(module: Any, inputs: Any, output: Any) -> None:
            handle.remove()
            self.note(run, batch, output.detach())

        handle = run.model.register_forward_hook(first)
