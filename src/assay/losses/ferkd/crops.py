"""Regions of images: drawing them, cutting them out again, and mixing those of one image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_TRIES = 10


def random_crops(
    count: int,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    aspect: float = 1.0,
    flip: float = 0.5,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Boxes of random size, shape and place, as of a random resized crop, and whether each is mirrored.

    A box's share s of the image's area is uniform in ``scale``, its width over its height r log-uniform in ``ratio``
    (both in pixels), its place uniform. With W / H = ``aspect`` ::

        (h, w) = (sqrt(s aspect / r), sqrt(s r / aspect))        y ~ U(0, 1 - h), x ~ U(0, 1 - w)

    A box that is higher or wider than the image is drawn again; after ten tries it is the largest box of the nearest
    ratio in the middle.

    Args:
        count: how many, at least 1.
        scale: shares of the area, 0 < low <= high <= 1.
        ratio: width over height, 0 < low <= high.
        aspect: of the image, width over height.
        flip: the probability of a mirrored crop.
        generator: draws on the CPU; None is torch's global one.

    Returns:
        boxes (count, 4): (y, x, h, w) as shares of the image's height and width, float32; flips (count,), bool.

    Raises:
        ValueError: an argument out of range.

    Source:
        Szegedy et al.: Going Deeper with Convolutions, CVPR 2015, arXiv 1409.4842; boxes are stored with their labels
        by Shen and Xing, ECCV 2022, arXiv 2112.01528.

    Example:
        >>> import torch
        >>> from assay.data import random_crops
        >>> boxes, flips = random_crops(1000, scale=(0.25, 0.5), generator=torch.Generator().manual_seed(0))
        >>> area = boxes[:, 2] * boxes[:, 3]
        >>> bool((area > 0.249).all() and (area < 0.501).all()), bool((boxes[:, :2] + boxes[:, 2:] <= 1).all())
        (True, True)
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count = {count!r} is out of range: an integer >= 1")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale = {scale!r} is out of range: 0 < low <= high <= 1")
    if not 0 < ratio[0] <= ratio[1] < math.inf:
        raise ValueError(f"ratio = {ratio!r} is out of range: 0 < low <= high")
    if not 0 < aspect < math.inf:
        raise ValueError(f"aspect = {aspect!r} is out of range: (0, inf)")
    if not 0 <= flip <= 1:
        raise ValueError(f"flip = {flip!r} is out of range: [0, 1]")
    draws = torch.rand(count, _TRIES, 2, generator=generator, dtype=torch.float64)
    place = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    flips = torch.rand(count, generator=generator) < flip
    share = scale[0] + (scale[1] - scale[0]) * draws[..., 0]
    shape = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * draws[..., 1])
    sides = torch.stack([(share * aspect / shape).sqrt(), (share * shape / aspect).sqrt()], -1)
    fits = (sides <= 1).all(-1)
    first = fits.long().argmax(1)
    sides = sides[torch.arange(count), first]
    nearest = min(max(aspect, ratio[0]), ratio[1]) / aspect  # in the image's own shape
    largest = sides.new_tensor([min(1.0, 1 / nearest), min(1.0, nearest)])
    found = fits.any(1, keepdim=True)
    sides = torch.where(found, sides, largest)
    corner = torch.where(found, place, torch.full_like(place, 0.5)) * (1 - sides)
    boxes = torch.cat([corner, sides], 1).float()
    # Rounding to float32 must not push a box over the edge.
    boxes[:, :2] = torch.minimum(boxes[:, :2], 1 - boxes[:, 2:])
    return boxes, flips


def replay_crops(images: Tensor, boxes: Tensor, flips: Tensor, size: int | Sequence[int]) -> Tensor:
    """Cut boxes out of images and resize them, bilinearly, as one call on any device.

    Pixel i of n across a box that begins at pixel a and is s pixels wide is read at a + (i + 1/2) s / n - 1/2, between
    the centres of the box's own pixels. For boxes of whole pixels this is cropping followed by
    ``torch.nn.functional.interpolate(mode="bilinear")``, to rounding; other boxes need not be rounded. A crop is
    mirrored last. Nothing is smoothed before a large box is made small.

    Args:
        images: (b, c, H, W), floating point.
        boxes: (b, 4) or, for n crops of each image, (b, n, 4): (y, x, h, w) inside the image, as shares of its height
            and width.
        flips: (b,) or (b, n), bool.
        size: of the crops, (h, w) or one number for both.

    Returns:
        (b, c, h, w) or (b, n, c, h, w).

    Raises:
        ValueError: shapes that do not fit, a size below 1.

    Source:
        Shen and Xing: A Fast Knowledge Distillation Framework for Visual Recognition, ECCV 2022, arXiv 2112.01528.

    Example:
        >>> import torch
        >>> from assay.data import replay_crops
        >>> image = torch.arange(16.0).view(1, 1, 4, 4)
        >>> replay_crops(image, torch.tensor([[0.0, 0.5, 0.5, 0.5]]), torch.tensor([True]), size=2)
        tensor([[[[3., 2.],
                  [7., 6.]]]])
    """
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    if min(height, width) < 1:
        raise ValueError(f"size = {size!r} is out of range: at least 1")
    if images.dim() != 4 or not images.is_floating_point():
        said = f"{tuple(images.shape)} of {images.dtype}"
        raise ValueError(f"images.shape = {said} is out of range: (b, c, H, W), floating point")
    if boxes.dim() not in (2, 3) or boxes.shape[0] != len(images) or boxes.shape[-1] != 4:
        allowed = f"({len(images)}, 4) or ({len(images)}, n, 4)"
        raise ValueError(f"boxes.shape = {tuple(boxes.shape)} is out of range: {allowed}")
    if flips.shape != boxes.shape[:-1]:
        raise ValueError(f"flips.shape = {tuple(flips.shape)} is out of range: {tuple(boxes.shape[:-1])}")
    if boxes.dim() == 2:
        return replay_crops(images, boxes.unsqueeze(1), flips.unsqueeze(1), size).squeeze(1)
    precise = torch.promote_types(images.dtype, torch.float32)
    boxes, flips = boxes.to(images.device, precise), flips.to(images.device)
    y, x, h, w = boxes.unbind(-1)
    rows = _positions(y, h, images.shape[2], height)
    columns = _positions(x, w, images.shape[3], width)
    columns = torch.where(flips.unsqueeze(-1), columns.flip(-1), columns)
    b, n = flips.shape
    grid = torch.stack(
        [columns.unsqueeze(2).expand(b, n, height, width), rows.unsqueeze(3).expand(b, n, height, width)], -1
    )
    # The crops of an image stand one below the other in one sampling, so that no image is copied.
    crops = F.grid_sample(
        images.to(precise), grid.reshape(b, n * height, width, 2), padding_mode="border", align_corners=False
    )
    return crops.to(images.dtype).unflatten(2, (n, height)).transpose(1, 2)


def _positions(start: Tensor, share: Tensor, pixels: int, count: int) -> Tensor:
    """Where a box (b, n) is read along one side, (b, n, count), in [-1, 1] from edge to edge of the image."""
    start, side = (start * pixels).unsqueeze(-1), (share * pixels).unsqueeze(-1)
    at = start + (torch.arange(count, device=start.device, dtype=start.dtype) + 0.5) * side / count
    # No further out than the centres of the box's outermost pixels: its neighbours are no part of the crop.
    half = (side / 2).clamp(max=0.5)
    return 2 * at.clamp(start + half, start + side - half) / pixels - 1


def self_mix(
    images: Tensor,
    soft_targets: Tensor,
    group_ids: Tensor,
    *,
    alpha: float = 1.0,
    prob: float = 0.5,
    mode: str = "cutmix",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """SelfMix: CutMix or mixup among the crops of one image, so that their soft labels vary little.

    Each crop i meets another crop j of its own group: the groups' crops are put in a random order, and each one's
    partner is the next, that of the last the first. With lam ~ Beta(alpha, alpha), one for the batch ::

        cutmix: a box of sides sqrt(1 - lam) H and sqrt(1 - lam) W (whole pixels), centred anywhere and cut off at the
                image's edges, is taken from x_j, the rest from x_i;  lam <- the share of pixels that is x_i's
        mixup:  x = lam x_i + (1 - lam) x_j
        label = lam label_i + (1 - lam) label_j

    Args:
        images: (b, c, H, W); for mixup floating point.
        soft_targets: (b, C), floating point.
        group_ids: (b,), integers: which image a crop is of. A crop that is alone in its group stays as it is.
        alpha: of the Beta distribution, at least 0; 0 is lam = 1, which changes nothing.
        prob: the probability that the batch is mixed at all, in [0, 1].
        mode: ``"cutmix"`` or ``"mixup"``.
        generator: draws on the CPU; None is torch's global one.

    Returns:
        New images and soft targets; the arguments stay as they are.

    Raises:
        ValueError: an argument out of range, shapes that do not fit.

    Source:
        Shen: FerKD: Surgical Label Adaptation for Efficient Distillation, ICCV 2023, arXiv 2312.17473, after Yun et
        al.: CutMix, ICCV 2019, arXiv 1905.04899, and Zhang et al.: mixup, ICLR 2018, arXiv 1710.09412.

    Example:
        >>> import torch
        >>> from assay.data import self_mix
        >>> images, labels = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 2, 2), torch.eye(4)
        >>> mixed, soft = self_mix(images, labels, torch.tensor([0, 0, 1, 1]), prob=1.0, mode="mixup")
        >>> bool((mixed[:2] <= 1).all() and (mixed[2:] >= 2).all()), bool((soft[:2, 2:] == 0).all())
        (True, True)
    """
    _check_mix(images, soft_targets, group_ids, alpha, prob, mode)
    seed = int(torch.randint(2**62, (), generator=generator))
    draw = np.random.default_rng(seed)  # torch draws no Beta from a generator
    if draw.random() >= prob or alpha == 0:
        return images.clone(), soft_targets.clone()
    lam = float(draw.beta(alpha, alpha))
    partner = _partners(group_ids, torch.from_numpy(draw.permutation(len(images))).to(group_ids.device))
    if mode == "mixup":
        mixed = images.lerp(images[partner.to(images.device)], 1 - lam)
    else:
        rows, columns = (_cut(draw, side, lam) for side in images.shape[2:])
        mixed = images.clone()
        mixed[:, :, rows, columns] = images[partner.to(images.device), :, rows, columns]
        cut = (rows.stop - rows.start) * (columns.stop - columns.start)
        lam = 1 - cut / (images.shape[2] * images.shape[3])
    return mixed, soft_targets.lerp(soft_targets[partner.to(soft_targets.device)], 1 - lam)


def _cut(draw: np.random.Generator, side: int, lam: float) -> slice:
    length = int(side * math.sqrt(1 - lam))
    start = int(draw.integers(side)) - length // 2
    return slice(max(0, start), min(side, start + length))


def _partners(group_ids: Tensor, shuffled: Tensor) -> Tensor:
    """A permutation (b,) that goes once round each group, in the order that ``shuffled`` has them in."""
    order = shuffled[group_ids[shuffled].argsort(stable=True)]
    groups, place = group_ids[order], torch.arange(len(order), device=order.device)
    begins = torch.ones_like(groups, dtype=torch.bool)
    begins[1:] = groups[1:] != groups[:-1]
    start = (place * begins).cummax(0).values
    following = torch.where(begins.roll(-1), start, place + 1)
    return torch.empty_like(order).scatter_(0, order, order[following])


def _check_mix(images: Tensor, soft_targets: Tensor, group_ids: Tensor, alpha: float, prob: float, mode: str) -> None:
    if mode not in ("cutmix", "mixup"):
        raise ValueError(f"mode = {mode!r} is out of range: 'cutmix' or 'mixup'")
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha = {alpha!r} is out of range: [0, inf)")
    if not 0 <= prob <= 1:
        raise ValueError(f"prob = {prob!r} is out of range: [0, 1]")
    if images.dim() != 4:
        raise ValueError(f"images.shape = {tuple(images.shape)} is out of range: (b, c, H, W)")
    if mode == "mixup" and not images.is_floating_point():
        raise ValueError(f"images.dtype = {images.dtype} is out of range: floating point for mixup")
    if soft_targets.dim() != 2 or len(soft_targets) != len(images):
        raise ValueError(f"soft_targets.shape = {tuple(soft_targets.shape)} is out of range: ({len(images)}, C)")
    if not soft_targets.is_floating_point():
        raise ValueError(f"soft_targets.dtype = {soft_targets.dtype} is out of range: floating point")
    if group_ids.shape != images.shape[:1]:
        raise ValueError(f"group_ids.shape = {tuple(group_ids.shape)} is out of range: ({len(images)},)")
