"""FerKD: of a teacher's labels for random crops, drop the hopeless, replace the doubtful, keep the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from assay._checks import in_range
from assay._modes import evaluating
from assay.data._scoring import batches
from assay.losses import soft_target_cross_entropy
from assay.losses.ferkd.crop_label_store import CropLabelStore
from assay.losses.ferkd.crops import random_crops, replay_crops, self_mix
from assay.losses.ferkd.soft_labels import compress_soft_labels, recover_soft_labels

if TYPE_CHECKING:
    from assay.bench.recipe import Batch, Objective, Recipe, Run

__all__ = [
    "CropLabelStore",
    "adapt_labels",
    "apply",
    "compress_soft_labels",
    "ferkd_loss",
    "ferkd_thresholds",
    "random_crops",
    "recover_soft_labels",
    "replay_crops",
    "self_mix",
]

DISCARDED, CALIBRATED, KEPT = 0, 1, 2


@torch.no_grad()
def adapt_labels(
    teacher_probs: Tensor,
    targets: Tensor,
    *,
    t_low: float,
    t_mid: float,
    t_top: float = 1.0,
    smoothing: float = 0.1,
    confidence: str = "max",
) -> tuple[Tensor, Tensor, Tensor]:
    """Each crop's label by how sure the teacher is of it: discarded, replaced by the softened truth, or the teacher's.

    With p the teacher's probabilities for one crop, k its image's class, and y = max_c p_c, or p_k with
    ``confidence="target"`` ::

        y < t_low or y > t_top     group 0: uninformative; keep is False (the label stays p, and is not to be used)
        t_low <= y < t_mid         group 1: hard; 1 - smoothing at k, smoothing / (C - 1) at every other class
        otherwise                  group 2: important; p, to the bit

    Args:
        teacher_probs: (b, C), floating point, rows >= 0 that sum to 1 (not checked).
        targets: (b,), int64, the annotated classes, in [0, C).
        t_low: at least 0.
        t_mid: at least ``t_low``; above 1 it replaces every label that is not discarded.
        t_top: at least ``t_low``; 1 discards nothing.
        smoothing: in [0, 1].
        confidence: ``"max"`` or ``"target"``.

    Returns:
        soft_targets (b, C) in the dtype of ``teacher_probs``; keep (b,), bool; group (b,), int64. None has a gradient.

    Raises:
        ValueError: an argument out of range, shapes that do not fit.

    Source:
        Shen: FerKD: Surgical Label Adaptation for Efficient Distillation, ICCV 2023, arXiv 2312.17473.

    Example:
        >>> import torch
        >>> from assay.losses import adapt_labels
        >>> probs = torch.tensor([[0.4, 0.3, 0.3], [0.6, 0.2, 0.2], [0.1, 0.1, 0.8]])
        >>> soft, keep, group = adapt_labels(probs, torch.tensor([0, 1, 2]), t_low=0.5, t_mid=0.7)
        >>> keep.tolist(), group.tolist()
        ([False, True, True], [0, 1, 2])
        >>> soft[1:]
        tensor([[0.0500, 0.9000, 0.0500],
                [0.1000, 0.1000, 0.8000]])
    """
    _check_labels(teacher_probs, targets)
    in_range("t_low", t_low, t_low >= 0, "[0, inf)")
    in_range("t_mid", t_mid, t_mid >= t_low, f"at least t_low = {t_low!r}")
    in_range("t_top", t_top, t_top >= t_low, f"at least t_low = {t_low!r}")
    in_range("smoothing", smoothing, 0 <= smoothing <= 1, "[0, 1]")
    in_range("confidence", confidence, confidence in ("max", "target"), "'max' or 'target'")
    own = targets.unsqueeze(1)
    sure = teacher_probs.amax(1) if confidence == "max" else teacher_probs.gather(1, own).squeeze(1)
    # In the thresholds' precision; a sum that rounding took above 1 does not make a crop surer than sure.
    sure = sure.to(torch.promote_types(sure.dtype, torch.float32)).clamp(max=1.0)
    keep = ~((sure < t_low) | (sure > t_top))
    hard = keep & (sure < t_mid)
    softened = torch.full_like(teacher_probs, smoothing / (teacher_probs.shape[1] - 1))
    softened = softened.scatter(1, own, 1 - smoothing)
    group = torch.where(keep, torch.where(hard, CALIBRATED, KEPT), DISCARDED)
    return torch.where(hard.unsqueeze(1), softened, teacher_probs), keep, group


def ferkd_loss(
    logits: Tensor,
    teacher_probs: Tensor,
    targets: Tensor,
    *,
    t_low: float,
    t_mid: float,
    t_top: float = 1.0,
    smoothing: float = 0.1,
    reduction: str = "mean",
    confidence: str = "max",
) -> Tensor:
    """Soft cross-entropy of a student with the adapted labels of its crops, over those that are not discarded.

    With (label_i, keep_i) from :func:`adapt_labels` ::

        loss = sum over i with keep_i of - sum_c label_ic log softmax(logits_i)_c  /  max(1, number of keep_i)

    There is no other term and no temperature. With ``t_low = t_mid = 0`` it is FKD's loss, the soft cross-entropy with
    the teacher's probabilities; with ``t_low = 0``, ``t_mid`` above 1 that of label smoothing, by torch's own measure
    ``label_smoothing = smoothing C / (C - 1)``. Half precision is summed in float32.

    Args:
        logits: (b, C), floating point, the student's.
        teacher_probs, targets, t_low, t_mid, t_top, smoothing, confidence: as in :func:`adapt_labels`.
        reduction: ``"mean"`` is over the crops that are not discarded, 0 if all are; ``"sum"``; ``"none"`` gives (b,),
            0 where discarded.

    Raises:
        ValueError: an argument out of range, shapes that do not fit.

    Source:
        Shen: FerKD: Surgical Label Adaptation for Efficient Distillation, ICCV 2023, arXiv 2312.17473.

    Example:
        >>> import torch
        >>> from assay.losses import ferkd_loss
        >>> probs = torch.tensor([[0.4, 0.3, 0.3], [0.6, 0.2, 0.2], [0.1, 0.1, 0.8]])
        >>> logits = torch.zeros(3, 3, requires_grad=True)
        >>> ferkd_loss(logits, probs, torch.tensor([0, 1, 2]), t_low=0.5, t_mid=0.7, reduction="none")
        tensor([0.0000, 1.0986, 1.0986], grad_fn=<MaskedFillBackward0>)
    """
    if logits.shape != teacher_probs.shape:
        shapes = f"{tuple(teacher_probs.shape)} with logits of shape {tuple(logits.shape)}"
        raise ValueError(f"teacher_probs.shape = {shapes} is out of range: both (b, C)")
    in_range("reduction", reduction, reduction in ("none", "mean", "sum"), "'none', 'mean' or 'sum'")
    probs = teacher_probs.to(torch.promote_types(teacher_probs.dtype, torch.float32))
    soft, keep, _ = adapt_labels(
        probs, targets, t_low=t_low, t_mid=t_mid, t_top=t_top, smoothing=smoothing, confidence=confidence
    )
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Logits as well as losses: a discarded crop's nan must not come back as 0 * nan in the gradient.
    precise = precise.masked_fill(~keep.unsqueeze(1), 0.0)
    losses = soft_target_cross_entropy(precise, soft, reduction="none").masked_fill(~keep, 0.0)
    if reduction == "mean":
        losses = losses.sum() / keep.sum().clamp(min=1)
    elif reduction == "sum":
        losses = losses.sum()
    return losses.to(logits.dtype)


def ferkd_thresholds(
    confidences: Tensor, q: tuple[float, float, float] = (0.02, 0.15, 1.0)
) -> tuple[float, float, float]:
    """``(t_low, t_mid, t_top)`` as quantiles of the teacher's confidences in the stored crops.

    With the default the least sure 2 % are discarded, the next 13 % get the softened truth, and none is too sure.
    Quantiles are interpolated linearly. Where the confidences are a sample, a q of 1 is its largest: put 1.0 in the
    place of ``t_top``, lest crops outside of the sample be discarded.

    Args:
        confidences: any shape, in [0, 1], not empty: ``probs.amax(-1)`` of the stored crops.
        q: three shares, 0 <= ... <= ... <= 1.

    Raises:
        ValueError: an argument out of range.

    Source:
        The thresholds are those of Shen, FerKD, arXiv 2312.17473; setting them by quantiles is Assay's.

    Example:
        >>> import torch
        >>> from assay.losses import ferkd_thresholds
        >>> ferkd_thresholds(torch.linspace(0, 1, 101), q=(0.0, 0.25, 1.0))
        (0.0, 0.25, 1.0)
    """
    good = len(q) == 3 and 0 <= q[0] <= q[1] <= q[2] <= 1
    in_range("q", q, good, "three shares that do not fall, in [0, 1]")
    values = confidences.detach().double().flatten().cpu().numpy()
    in_range("confidences", confidences.shape, values.size > 0, "at least one number")
    inside = bool(((values >= 0) & (values <= 1 + 1e-6)).all())
    in_range("confidences", (values.min(), values.max()), inside, "[0, 1]")
    low, mid, top = np.quantile(values, q)  # torch's refuses more than 2^24 numbers
    return float(low), float(mid), float(top)


def _check_labels(teacher_probs: Tensor, targets: Tensor) -> None:
    shape = tuple(teacher_probs.shape)
    if len(shape) != 2 or shape[1] < 2 or not teacher_probs.is_floating_point():
        said = f"{shape} of {teacher_probs.dtype}"
        raise ValueError(f"teacher_probs.shape = {said} is out of range: (b, C >= 2), floating point")
    if targets.shape != shape[:1]:
        raise ValueError(f"targets.shape = {tuple(targets.shape)} is out of range: ({shape[0]},)")


def apply(
    recipe: Recipe,
    *,
    discard: float = 0.02,
    calibrate: float = 0.15,
    smoothing: float = 0.1,
    crops: int = 16,
    num_crops: int = 4,
    min_scale: float = 0.7,
    flip: float = 0.0,
    mix: float = 0.5,
    fraction: float = 1.0,
) -> Recipe:
    """FerKD as a run's objective: a teacher trained by the recipe below labels crops, and the student sees only those.

    The teacher has ``fraction`` of the budget, on the same data, from its own initialization, and its time counts.
    It labels ``crops`` crops of every image. A batch of b examples becomes b crops: ``num_crops`` of each
    ``num_crops``-th image, so that a step costs what it costs without, and the budget means the same.
    ``mix`` is the probability of SelfMix.
    """
    share = {"discard": discard, "calibrate": calibrate, "smoothing": smoothing, "flip": flip, "mix": mix}
    for name, value in share.items():
        in_range(name, value, 0 <= value <= 1, "[0, 1]")
    in_range("calibrate", calibrate, discard + calibrate <= 1, f"[0, 1 - discard] with discard = {discard!r}")
    for name, value in {"min_scale": min_scale, "fraction": fraction}.items():
        in_range(name, value, 0 < value <= 1, "(0, 1]")
    in_range("crops", crops, isinstance(crops, int) and crops >= 1, "an integer >= 1")
    whole = isinstance(num_crops, int) and 1 <= num_crops <= crops
    in_range("num_crops", num_crops, whole, f"an integer in [1, crops = {crops}]")

    def objective(run: Run) -> Objective:
        images, _ = next(batches(run.data, 1, torch.device(run.device)))
        if run.task.classes is None or not isinstance(images, Tensor) or images.dim() != 4:
            raise ValueError("ferkd needs a classification task of images (b, c, h, w)")
        below = replace(run.recipe, objective=recipe.objective, data=lambda _: run.data)
        teacher = run.fit(below, fraction=fraction, seed=run.seed + 1_000_003).model
        draw = torch.Generator().manual_seed(run.seed)
        boxes, flips, probs, targets = _label_crops(run, teacher, crops, min_scale, flip, draw)
        sure = probs.amax(-1)
        # A teacher that diverged has no quantiles: its labels are not finite, nor will the loss be.
        finite = bool(sure.isfinite().all())
        q = (discard, discard + calibrate, 1.0)
        t_low, t_mid, _ = ferkd_thresholds(sure, q) if finite else (0.0, 0.0, 1.0)
        soft, keep, _ = adapt_labels(
            probs.flatten(0, 1), targets.repeat_interleave(crops), t_low=t_low, t_mid=t_mid, smoothing=smoothing
        )
        soft, keep = soft.view_as(probs), keep.view_as(sure)
        seen: dict[int, tuple[Tensor, Tensor]] = {}

        def replayed(batch: Batch) -> tuple[Tensor, Tensor]:
            size = len(batch.index)
            index = batch.index[::num_crops].cpu().unsqueeze(1)
            chosen = torch.rand(len(index), crops, generator=draw).argsort(1)[:, :num_crops]
            images = replay_crops(
                batch.input[::num_crops], boxes[index, chosen], flips[index, chosen], batch.input.shape[2:]
            )
            images, used = images.flatten(0, 1)[:size], keep[index, chosen].flatten()[:size]
            groups = torch.arange(size) // num_crops
            groups = torch.where(used, groups, size + torch.arange(size))  # a discarded crop is no one's partner
            images, labels = self_mix(
                images, soft[index, chosen].flatten(0, 1)[:size], groups, prob=mix, generator=draw
            )
            return images, labels.masked_fill(~used.unsqueeze(1), -1.0).to(images.device)

        def loss(model: Callable[[Any], Any], batch: Batch) -> Tensor:
            if run.step not in seen:  # an optimizer may ask for the loss of one step several times
                seen.clear()
                seen[run.step] = replayed(batch)
            images, labels = seen[run.step]
            return soft_target_cross_entropy(model(images), labels, ignore_index=-1)

        return loss

    return replace(recipe, objective=objective)


@torch.no_grad()
def _label_crops(
    run: Run, teacher: nn.Module, crops: int, min_scale: float, flip: float, draw: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes (N, R, 4), flips (N, R) and the teacher's probabilities (N, R, C) for crops of all images; labels (N,)."""
    parts = []
    with evaluating(teacher):
        for images, targets in batches(run.data, 64, torch.device(run.device)):
            b, (height, width) = len(images), images.shape[2:]
            boxes, flips = random_crops(
                b * crops, scale=(min_scale, 1.0), aspect=width / height, flip=flip, generator=draw
            )
            boxes, flips = boxes.view(b, crops, 4), flips.view(b, crops)
            probs = teacher(replay_crops(images, boxes, flips, (height, width)).flatten(0, 1)).float().softmax(1)
            parts.append((boxes, flips, probs.view(b, crops, -1).cpu(), targets.cpu()))
    boxes, flips, probs, targets = (torch.cat(part) for part in zip(*parts, strict=True))
    return boxes, flips, probs, targets
