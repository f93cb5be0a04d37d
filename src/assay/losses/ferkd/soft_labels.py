"""A teacher's probabilities in few numbers, and back."""

from __future__ import annotations

import re

import torch
from torch import Tensor

KINDS = "'hard', 'smoothing', 'marginal_smoothing_kK', 'marginal_renorm', 'marginal_renorm_kK' or 'full'"


def recover_soft_labels(compressed: Tensor, kind: str, num_classes: int) -> Tensor:
    """Probabilities over all classes from a compressed teacher label.

    Of a label with classes k_1, ..., k_K and values v_1, ..., v_K, C = ``num_classes`` ::

        hard                     1 at the class, 0 elsewhere
        smoothing                v_1 at k_1, (1 - v_1) / (C - 1) elsewhere
        marginal_smoothing_kK    v_i at k_i, (1 - sum of v) / (C - K) elsewhere
        marginal_renorm          v_i / (sum of v) at k_i, 0 elsewhere
        full                     as it is

    Each row sums to 1 and has nothing below 0: where rounding took the sum of v above 1, v is scaled down to it; where
    K = C it is scaled to it, and so is a full label of half precision.

    Args:
        compressed: as :func:`compress_soft_labels` gives it. hard: (b,) or (b, 1), classes; smoothing: (b, 2), class
            and value; marginal: (b, 2, K), a row of classes and a row of values; full: (b, C).
        kind: ``"hard"``, ``"smoothing"``, ``"marginal_smoothing_k5"``, ``"marginal_smoothing_k10"`` (or any other K),
            ``"marginal_renorm"`` (any K; ``"marginal_renorm_k5"`` insists on it) or ``"full"``. Where there are fewer
            classes than K, K is their number.
        num_classes: C, at least 2.

    Returns:
        (b, C) in the precision of ``compressed``, at least float32.

    Raises:
        ValueError: an unknown kind, a shape that is not the kind's, ``num_classes`` out of range.

    Source:
        Shen and Xing: A Fast Knowledge Distillation Framework for Visual Recognition, ECCV 2022, arXiv 2112.01528; used
        by Shen: FerKD, ICCV 2023, arXiv 2312.17473.

    Example:
        >>> import torch
        >>> from assay.losses import recover_soft_labels
        >>> recover_soft_labels(torch.tensor([[[2, 0], [0.5, 0.25]]]), "marginal_smoothing_k2", num_classes=4)
        tensor([[0.2500, 0.1250, 0.5000, 0.1250]])
    """
    form, _ = parse_kind(kind)
    _check_classes(num_classes)
    _check_shape(compressed, kind, num_classes)
    precise = torch.promote_types(compressed.dtype, torch.float32)
    if form == "full":
        rows = compressed.to(precise)
        exact = compressed.dtype in (torch.float32, torch.float64)
        return rows if exact else rows / rows.sum(1, keepdim=True)
    classes, values = split_label(compressed, kind)
    if values is None:
        return torch.zeros(len(classes), num_classes, device=classes.device).scatter_(1, classes, 1.0)
    values, total = values.to(precise), values.to(precise).sum(1, keepdim=True)
    if form == "marginal_renorm":
        rest = torch.zeros_like(total)
        values = values / total.clamp(min=1e-12)
    elif classes.shape[1] == num_classes:
        rest = torch.zeros_like(total)
        values = values / total
    else:
        rest = (1 - total).clamp(min=0) / (num_classes - classes.shape[1])
        values = values / total.clamp(min=1)
    return rest.repeat(1, num_classes).scatter_(1, classes, values)


def compress_soft_labels(probs: Tensor, kind: str) -> Tensor:
    """A teacher's probabilities in the few numbers that :func:`recover_soft_labels` reads.

    The K largest are kept, the largest first: ``classes, values = top K of probs``.

    Args:
        probs: (b, C), floating point, rows >= 0 that sum to 1 (not checked).
        kind: as in :func:`recover_soft_labels`; ``"marginal_renorm"`` keeps 5.

    Returns:
        hard: (b,), int64; smoothing: (b, 2); marginal: (b, 2, K); full: (b, C); at least float32, so that a class is
        exact up to the number 2^24.

    Raises:
        ValueError: an unknown kind; probabilities that are not (b, C) and floating point.

    Source:
        Shen and Xing, arXiv 2112.01528, section 3.

    Example:
        >>> import torch
        >>> from assay.losses import compress_soft_labels
        >>> compress_soft_labels(torch.tensor([[0.25, 0.125, 0.5, 0.125]]), "marginal_smoothing_k2")
        tensor([[[2.0000, 0.0000],
                 [0.5000, 0.2500]]])
    """
    form, k = parse_kind(kind)
    if probs.dim() != 2 or not probs.is_floating_point():
        said = f"{tuple(probs.shape)} of {probs.dtype}"
        raise ValueError(f"probs.shape = {said} is out of range: (b, C), floating point")
    _check_classes(probs.shape[1])
    if form == "hard":
        return probs.argmax(1)
    probs = probs.to(torch.promote_types(probs.dtype, torch.float32))
    if form == "full":
        return probs
    top = probs.topk(min(k or 5, probs.shape[1]), dim=1)
    label = torch.stack([top.indices.to(probs.dtype), top.values], 1)
    return label.squeeze(2) if form == "smoothing" else label


def parse_kind(kind: str) -> tuple[str, int | None]:
    """(form, K) of a kind; K is None where it does not say."""
    if kind in ("hard", "full"):
        return kind, None
    if kind == "smoothing":
        return kind, 1
    found = re.fullmatch(r"(marginal_smoothing)_k([1-9]\d*)|(marginal_renorm)(?:_k([1-9]\d*))?", str(kind))
    if not found:
        raise ValueError(f"kind = {kind!r} is out of range: {KINDS}")
    count = found[2] or found[4]
    return found[1] or found[3], int(count) if count else None


def split_label(compressed: Tensor, kind: str) -> tuple[Tensor, Tensor | None]:
    """Classes (b, K) and values (b, K) of a compressed label that is not full; a hard one has no values."""
    form, _ = parse_kind(kind)
    if form == "hard":
        return compressed.reshape(-1, 1).long(), None
    label = compressed.unsqueeze(2) if form == "smoothing" else compressed
    return label[:, 0].long(), label[:, 1]


def _check_shape(compressed: Tensor, kind: str, num_classes: int) -> None:
    form, k = parse_kind(kind)
    shape, most = tuple(compressed.shape), min(k or num_classes, num_classes)
    if form == "hard":
        good, allowed = shape[1:] in ((), (1,)) and len(shape) > 0, "(b,)"
    elif form == "smoothing":
        good, allowed = len(shape) == 2 and shape[1] == 2, "(b, 2)"
    elif form == "full":
        good, allowed = len(shape) == 2 and shape[1] == num_classes, f"(b, {num_classes})"
    else:
        fits = len(shape) == 3 and shape[1] == 2
        good = fits and (shape[2] == most if k else 1 <= shape[2] <= most)
        allowed = f"(b, 2, {most})" if k else f"(b, 2, K) with K <= {most}"
    if not good:
        raise ValueError(f"compressed.shape = {shape} is out of range: {allowed} for {kind!r}")


def _check_classes(num_classes: int) -> None:
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(f"num_classes = {num_classes!r} is out of range: an integer >= 2")
