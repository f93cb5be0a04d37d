"""PS-KD: a network's own predictions of the previous epoch soften its targets, more from epoch to epoch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay._checks import in_range
from assay.losses.ps_kd.prediction_table import PredictionTable

if TYPE_CHECKING:
    from assay.bench.recipe import Batch, Objective, Recipe, Run


def soft_target_cross_entropy(
    logits: Tensor, soft_targets: Tensor, *, reduction: str = "mean", ignore_index: int | None = None
) -> Tensor:
    """Cross-entropy with a distribution over the classes as each example's target.

    For one example with logits z and target t ::

        loss = - sum_c t_c log softmax(z)_c

    whose gradient with respect to z is ``softmax(z) - t`` where t sums to 1. A class of target 0 adds nothing, also
    where its logit is -inf. Half precision is summed in float32.

    Args:
        logits: (..., C), floating point.
        soft_targets: same shape, rows >= 0 that sum to 1 (not checked); may carry a gradient.
        reduction: ``"none"`` gives (...); ``"sum"``; ``"mean"`` is over the examples that are not ignored, and 0 if
            all are (torch gives nan there).
        ignore_index: an example whose whole row has this value is ignored, as a label of this value is by
            ``torch.nn.functional.cross_entropy``; ``PSKD.targets`` marks its ignored examples so.

    Raises:
        ValueError: shapes that differ or have no class dimension, targets that are integers, an unknown reduction.

    Source:
        Kim et al.: Self-Knowledge Distillation with Progressive Refinement of Targets, ICCV 2021, arXiv 2006.12000.

    Example:
        >>> import torch
        >>> from assay.losses import soft_target_cross_entropy
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> soft_target_cross_entropy(logits, torch.tensor([[0.75, 0.25], [1.0, 0.0]]), reduction="none")
        tensor([0.6269, 0.6931])
    """
    if logits.dim() < 1 or soft_targets.shape != logits.shape:
        shapes = f"{tuple(soft_targets.shape)} with logits of shape {tuple(logits.shape)}"
        raise ValueError(f"soft_targets.shape = {shapes} is out of range: both (..., C)")
    if not soft_targets.is_floating_point():
        raise ValueError(f"soft_targets.dtype = {soft_targets.dtype} is out of range: floating point")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction = {reduction!r} is out of range: 'none', 'mean' or 'sum'")
    precise = torch.promote_types(logits.dtype, torch.float32)
    log_p, t = F.log_softmax(logits, -1, dtype=precise), soft_targets.to(precise)
    count: Tensor | int = max(1, log_p[..., 0].numel())
    if ignore_index is not None:
        used = (soft_targets != ignore_index).any(-1)
        t, count = t.masked_fill(~used.unsqueeze(-1), 0.0), used.sum().clamp(min=1)
    # 0 * -inf is nan; where the logit is finite the product stays, for the gradient with respect to t.
    losses = -(t * log_p.masked_fill((t == 0) & log_p.isneginf(), 0.0)).sum(-1)
    if reduction == "none":
        return losses.to(logits.dtype)
    total = losses.sum()
    if reduction == "mean":
        total = total / count
    return total.to(logits.dtype)


def pskd_schedule(epoch: int, total_epochs: int, alpha_T: float = 0.8) -> float:
    """How much of the target of an epoch is the previous epoch's prediction.

    ``alpha_t = alpha_T * t / total_epochs`` for t = ``epoch``, counted from 1: ``alpha_T / total_epochs`` in the first
    epoch, ``alpha_T`` in the last one and in any later. Epoch 0 counts as the first.

    Args:
        epoch: 1, ..., ``total_epochs``; at least 0.
        total_epochs: at least 1.
        alpha_T: in [0, 1].

    Raises:
        ValueError: an argument out of range.

    Source:
        Kim et al., arXiv 2006.12000, section 3.2.

    Example:
        >>> from assay.losses import pskd_schedule
        >>> [pskd_schedule(epoch, 4) for epoch in (1, 2, 4)]
        [0.2, 0.4, 0.8]
    """
    in_range("epoch", epoch, isinstance(epoch, Integral) and epoch >= 0, "an integer >= 0")
    in_range("total_epochs", total_epochs, isinstance(total_epochs, Integral) and total_epochs >= 1, "an integer >= 1")
    in_range("alpha_T", alpha_T, 0 <= alpha_T <= 1, "[0, 1]")
    return alpha_T * min(max(epoch, 1), total_epochs) / total_epochs


class PSKD(nn.Module):
    """Progressive self-knowledge distillation: the model's predictions of one epoch are teacher in the next.

    In epoch t, for example i with label y_i, logits z_i and P_i what the model predicted for it an epoch before ::

        alpha_t = alpha_T * t / total_epochs
        target  = (1 - alpha_t) onehot(y_i) + alpha_t P_i            (onehot(y_i) where there is no P_i yet)
        loss    = mean over i of - sum_c target_c log softmax(z_i)_c
        P_i    <- softmax(z_i), without gradient

    :meth:`loss` does it all; the prediction that it stores is the one of the training pass, on the augmented input and
    before the optimizer's step. The parts, :meth:`targets` and :meth:`update`, are there for loops of another shape.

    Where P comes from, ``store``:

    - ``"memory"``: a table of ``num_samples`` rows, by default on the CPU in float32: 4 N C bytes, less with
      ``dtype=torch.float16`` or ``topk`` (6 bytes an entry in float32: value and class). No further forward pass.
    - a ``pathlib.Path``: the same table in a file of that name, mapped into memory; one that exists is overwritten.
    - ``"model"``, where a table would be too large (tokens of a translation): a frozen copy of the model, made by
      ``set_epoch(epoch, model)`` when a new epoch begins, predicts in evaluation mode. ``indices`` is then the batch's
      input, which is what that copy is called with (a tuple is unpacked): one more forward pass a batch.

    In a process group (DDP) all processes call :meth:`loss` together and exchange predictions, so each holds all of
    P. In ``eval()`` mode :meth:`loss` stores nothing. ``state_dict()`` holds all that a run needs to resume exactly;
    the table stays on its device and in its dtype when the module is moved or cast.

    Args:
        num_samples: N, rows of the table; ``indices`` are in [0, N).
        num_classes: C, at least 2.
        total_epochs: T, at least 1.
        alpha_T: in [0, 1]; 0 is training with cross-entropy.
        store: ``"memory"``, ``"model"`` or a Path.
        dtype: of the table, floating point of 2 bytes or more. Rows of half precision are renormalized when read.
        device: of the table.
        topk: None, or how many entries of a row are kept, in [1, C]; the rest of the mass is spread evenly.
        ignore_index: examples with this label add nothing to the loss and are not stored.
        store_mixed: whether predictions of mixed examples (``partner``) are stored, at the index of the first.

    Raises:
        ValueError: an argument out of range, shapes that do not fit, a label or an index out of range.
        RuntimeError: ``store="model"`` in an epoch after the first without a model.

    Source:
        Kim et al.: Self-Knowledge Distillation with Progressive Refinement of Targets, ICCV 2021, arXiv 2006.12000.

    Example:
        >>> import torch
        >>> from assay.losses import PSKD
        >>> criterion = PSKD(num_samples=5, num_classes=2, total_epochs=2)
        >>> labels, indices = torch.tensor([0, 1]), torch.tensor([4, 2])
        >>> criterion.loss(torch.zeros(2, 2, requires_grad=True), labels, indices)
        tensor(0.6931, grad_fn=<DivBackward0>)
        >>> criterion.set_epoch(2)
        >>> criterion.targets(labels, indices)
        tensor([[0.6000, 0.4000],
                [0.4000, 0.6000]])
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        total_epochs: int,
        alpha_T: float = 0.8,
        store: str | Path = "memory",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        topk: int | None = None,
        ignore_index: int = -100,
        store_mixed: bool = False,
    ) -> None:
        super().__init__()
        in_range("num_samples", num_samples, isinstance(num_samples, Integral) and num_samples >= 1, "an integer >= 1")
        in_range("num_classes", num_classes, isinstance(num_classes, Integral) and num_classes >= 2, "an integer >= 2")
        in_range("store", store, store in ("memory", "model") or isinstance(store, Path), "'memory', 'model', a Path")
        in_range("dtype", dtype, dtype.is_floating_point and dtype.itemsize > 1, "floating point of 2 bytes or more")
        whole = isinstance(topk, Integral) and 1 <= topk <= num_classes
        in_range("topk", topk, topk is None or whole, f"None or an integer in [1, {num_classes}]")
        on_cpu = torch.device(device).type == "cpu"
        in_range("device", device, on_cpu or not isinstance(store, Path), "'cpu' where store is a Path")
        pskd_schedule(1, total_epochs, alpha_T)
        self.num_samples, self.num_classes = num_samples, num_classes
        self.total_epochs, self.alpha_T, self.epoch = total_epochs, alpha_T, 1
        self._first = 1  # what the caller's loop calls the first epoch
        self.ignore_index, self.store_mixed = ignore_index, store_mixed
        self.table: PredictionTable | None = None
        if store != "model":
            file = store if isinstance(store, Path) else None
            self.table = PredictionTable(num_samples, num_classes, dtype=dtype, device=device, topk=topk, file=file)
        # In a tuple, so that the teacher is no submodule: it is neither moved, nor trained, nor in parameters().
        self._teacher: tuple[nn.Module] | None = None
        self._saved_teacher: Mapping[str, Any] | None = None

    @property
    def alpha(self) -> float:
        """alpha_t of the current epoch."""
        return pskd_schedule(self.epoch, self.total_epochs, self.alpha_T)

    def set_epoch(self, epoch: int, model: nn.Module | None = None) -> None:
        """Begin an epoch; ``store="model"`` needs the model as the epoch before left it.

        Epochs count from 1, or from 0 in a loop that says so by a ``set_epoch(0)``. Calling it again in the same epoch
        changes nothing, so it is safe after a resume in the middle of an epoch.
        """
        pskd_schedule(epoch, self.total_epochs, self.alpha_T)  # refuses what is no epoch
        if epoch == 0:
            self._first = 0
        epoch += 1 - self._first
        if self.table is None and epoch > 1 and (epoch != self.epoch or self._saved_teacher is not None):
            if model is None:
                raise ValueError("model = None is out of range: store = 'model' needs set_epoch(epoch, model)")
            self._teach(model, self._saved_teacher if epoch == self.epoch else None)
        self.epoch = epoch

    @torch.no_grad()
    def targets(
        self, labels: Tensor, indices: Any, *, partner: Tensor | None = None, lam: float | Tensor = 1.0
    ) -> Tensor:
        """Soft targets (..., C) for labels (...), on their device, in the table's precision (at least float32).

        For CutMix or mixup with a ``partner`` for each example (positions in the batch, as from ``randperm``) they are
        ``lam * target + (1 - lam) * target[partner]``; ``lam`` is a number or one per example, in [0, 1].
        Rows of ignored examples are filled with ``ignore_index``.
        """
        ignored = labels == self.ignore_index
        outside = ~ignored & ((labels < 0) | (labels >= self.num_classes))
        if outside.any():
            allowed = f"[0, {self.num_classes}) or ignore_index = {self.ignore_index}"
            raise ValueError(f"labels = {labels[outside][0].item()} is out of range: {allowed}")
        rows, known = self._predictions(labels, indices)
        hard = F.one_hot(labels.masked_fill(ignored, 0).long(), self.num_classes).to(rows.dtype)
        target = torch.where(known.unsqueeze(-1), (1 - self.alpha) * hard + self.alpha * rows, hard)
        if partner is not None:
            share = torch.as_tensor(lam, dtype=target.dtype, device=target.device)
            in_range("lam", lam, bool(((share >= 0) & (share <= 1)).all()), "[0, 1]")
            share = share.view(*share.shape, *[1] * (target.dim() - share.dim()))
            target, ignored = share * target + (1 - share) * target[partner], ignored | ignored[partner]
        return target.masked_fill(ignored.unsqueeze(-1), self.ignore_index)

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        indices: Any,
        *,
        partner: Tensor | None = None,
        lam: float | Tensor = 1.0,
        reduction: str = "mean",
    ) -> Tensor:
        """The loss of logits (..., C) against the soft targets; then, in training mode, their predictions are stored.

        ``partner`` and ``lam`` as in :meth:`targets`, ``reduction`` as in :func:`soft_target_cross_entropy`.
        """
        if logits.shape != (*labels.shape, self.num_classes):
            expected = (*labels.shape, self.num_classes)
            raise ValueError(f"logits.shape = {tuple(logits.shape)} is out of range: {expected} for these labels")
        soft = self.targets(labels, indices, partner=partner, lam=lam)
        loss = soft_target_cross_entropy(logits, soft, reduction=reduction, ignore_index=self.ignore_index)
        if self.training and self.table is not None:
            # Also when nothing is to be stored: in a process group the others may be waiting with their rows.
            used = (labels != self.ignore_index) & (partner is None or self.store_mixed)
            self.update(logits[used], indices[used.to(indices.device)])
        return loss

    @torch.no_grad()
    def update(self, logits: Tensor, indices: Tensor) -> None:
        """Store ``softmax(logits)`` as the predictions for ``indices``; of equal indices the last one stays."""
        if self.table is None:
            raise RuntimeError("store = 'model' keeps no predictions: call set_epoch(epoch, model) in every epoch")
        if logits.shape != (*indices.shape, self.num_classes):
            expected = (*indices.shape, self.num_classes)
            raise ValueError(f"logits.shape = {tuple(logits.shape)} is out of range: {expected} for these indices")
        self._check(indices)
        precise = torch.promote_types(logits.dtype, torch.float32)
        self.table.write(indices.flatten(), F.softmax(logits.flatten(0, -2), -1, dtype=precise))

    def _predictions(self, labels: Tensor, indices: Any) -> tuple[Tensor, Tensor]:
        """P for a batch (..., C), and whether there is one (...)."""
        if self.table is not None:
            if indices.shape != labels.shape:
                shapes = f"{tuple(indices.shape)} with labels of shape {tuple(labels.shape)}"
                raise ValueError(f"indices.shape = {shapes} is out of range: the same shape")
            self._check(indices)
            rows, known = self.table.read(indices.flatten().to(self.table.values.device))
            return rows.to(labels.device).view(*labels.shape, -1), known.to(labels.device).view(labels.shape)
        if self.epoch == 1:
            return torch.zeros(*labels.shape, self.num_classes, device=labels.device), torch.zeros_like(labels).bool()
        if self._teacher is None:
            raise RuntimeError("no model yet: store = 'model' needs set_epoch(epoch, model)")
        logits = self._teacher[0](*indices) if isinstance(indices, tuple) else self._teacher[0](indices)
        if logits.shape != (*labels.shape, self.num_classes):
            shapes = f"{tuple(logits.shape)} for labels of shape {tuple(labels.shape)}"
            raise ValueError(f"the model's output has shape {shapes}; with store = 'model', indices is its input")
        precise = torch.promote_types(logits.dtype, torch.float32)
        return F.softmax(logits, -1, dtype=precise), torch.ones_like(labels).bool()

    def _teach(self, model: nn.Module, state: Mapping[str, Any] | None) -> None:
        model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        teacher = copy.deepcopy(model).requires_grad_(False).eval()
        if state is not None:
            teacher.load_state_dict(state)
        self._teacher, self._saved_teacher = (teacher,), None

    def _check(self, indices: Tensor) -> None:
        outside = (indices < 0) | (indices >= self.num_samples)
        if outside.any():
            raise ValueError(f"indices = {indices[outside][0].item()} is out of range: [0, {self.num_samples})")

    def get_extra_state(self) -> dict[str, Any]:
        teacher = self._teacher[0].state_dict() if self._teacher else self._saved_teacher
        size = [self.num_samples, self.num_classes]
        return {"size": size, "epoch": self.epoch, "first": self._first, "teacher": teacher}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        size = [self.num_samples, self.num_classes]
        if state["size"] != size:
            raise ValueError(f"num_samples, num_classes = {state['size']} in the state is out of range: {size}")
        self.epoch, self._first = state["epoch"], state["first"]
        self._teacher, self._saved_teacher = None, state["teacher"]


def apply(recipe: Recipe, *, alpha_T: float = 0.8) -> Recipe:
    """PS-KD as a run's objective, over the epochs that its budget holds."""

    def objective(run: Run) -> Objective:
        if run.task.classes is None:
            raise ValueError("ps-kd needs a classification task")
        criterion = PSKD(run.size, run.task.classes, total_epochs=run.epochs, alpha_T=alpha_T)
        soft: dict[int, Tensor] = {}

        def loss(model: Callable[[Any], Any], batch: Batch) -> Tensor:
            logits = model(batch.input)
            if run.step not in soft:  # an optimizer may ask for the loss of one step several times
                soft.clear()
                criterion.set_epoch(batch.epoch + 1)
                soft[run.step] = criterion.targets(batch.target, batch.index)
                criterion.update(logits, batch.index)
            return soft_target_cross_entropy(logits, soft[run.step])

        return loss

    return replace(recipe, objective=objective)
