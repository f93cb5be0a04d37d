"""What CFCD makes of a backbone's last map: a global descriptor, and local ones that are matched between images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay._modes import evaluating

# The image pyramid of DOLG's evaluation, which CFCD's follows: factors of sqrt(2).
DOLG_SCALES = (2**-1.5, 0.5, 2**-0.5, 1.0, 2**0.5)


def unit_rows(x: Tensor) -> Tensor:
    """Every row divided by its length; rows of zeros stay, with the gradient of x itself instead of a division by 0."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > 0, length, 1.0)


def local_descriptors(maps: Tensor) -> tuple[Tensor, Tensor]:
    """A feature map read as one descriptor for each place, and the attention of the places.

    ``descriptors[b, k] = maps[b, :, h, w]`` and ``attention[b, k] = sum over channels of |maps[b, :, h, w]|`` with
    k = h W + w.

    Args:
        maps: (B, D, H, W), the output of a convolutional backbone.

    Returns:
        descriptors (B, K, D), with gradient and not normalized, and attention (B, K), K = H W.

    Raises:
        ValueError: maps of another shape.

    Source:
        Zhu et al.: Coarse-to-Fine: Learning Compact Discriminative Representation for Single-Stage Image Retrieval,
        ICCV 2023, arXiv 2308.04008, section 3.3.

    Example:
        >>> import torch
        >>> from assay.losses import local_descriptors
        >>> descriptors, attention = local_descriptors(torch.randn(8, 64, 4, 5))
        >>> descriptors.shape, attention.shape
        (torch.Size([8, 20, 64]), torch.Size([8, 20]))
    """
    _check_maps(maps)
    return maps.flatten(2).transpose(1, 2), maps.abs().sum(1).flatten(1)


def match_descriptors(
    query: Tensor, positive: Tensor, attention: Tensor, *, ratio: float = 0.9, attention_keep: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Pairs of local descriptors of two images that show the same, one to one.

    With rows scaled to unit length and d their Euclidean distance, the nearest row q of ``query`` is matched to the
    row p of ``positive`` if ::

        p is the nearest row of ``positive`` to q as well;
        d(q, p) <= ratio * d(q2, p)        for q2 the second nearest row of ``query`` to p;
        p is among the floor(attention_keep * K) rows of ``positive`` with the most attention.

    Args:
        query: (L, D), of the anchor image; L at least 1.
        positive: (K, D), of an image of the same class; K at least 1.
        attention: (K,), of the positive's rows.
        ratio: Lowe's, in (0, 1].
        attention_keep: share of the positive's rows that may match, in (0, 1].

    Returns:
        Two LongTensors (M,), rows of ``query`` and of ``positive``, in the order of the latter. No gradient. Of equal
        distances and equal attentions the first row's counts; where q and q2 both lie on p, there is no match.

    Raises:
        ValueError: an argument out of range, shapes that do not fit.

    Source:
        Zhu et al., ICCV 2023, arXiv 2308.04008, section 3.3.

    Example:
        >>> import torch
        >>> from assay.losses import match_descriptors
        >>> query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> positive = torch.tensor([[0.1, 3.0], [1.0, 1.0], [5.0, 0.2]])
        >>> match_descriptors(query, positive, torch.tensor([2.0, 3.0, 1.0]), attention_keep=1.0)
        (tensor([1, 0]), tensor([0, 2]))
        >>> match_descriptors(query, positive, torch.tensor([3.0, 2.0, 1.0]))  # one of three rows may match
        (tensor([1]), tensor([0]))
    """
    if query.dim() != 2 or positive.dim() != 2 or query.shape[1] != positive.shape[1] or not len(query):
        shapes = f"{tuple(query.shape)} with positive of shape {tuple(positive.shape)}"
        raise ValueError(f"query.shape = {shapes} is out of range: (L, D) and (K, D), L >= 1")
    if attention.shape != positive.shape[:1]:
        raise ValueError(f"attention.shape = {tuple(attention.shape)} is out of range: ({len(positive)},)")
    for name, value in (("ratio", ratio), ("attention_keep", attention_keep)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} = {value!r} is out of range: (0, 1]")
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        # Not through |q|^2 + |p|^2 - 2 q p, which has no digits left for the small distances that matter here.
        exactly = "donot_use_mm_for_euclid_dist"
        distance = torch.cdist(_precise_rows(query), _precise_rows(positive), compute_mode=exactly)  # (L, K)
        nearest = distance.argmin(0)
        first = distance.gather(0, nearest[None])[0]
        second = distance.scatter(0, nearest[None], math.inf).amin(0)
        places = torch.arange(len(positive), device=query.device)
        kept = torch.zeros_like(places, dtype=torch.bool)
        share = math.floor(attention_keep * len(positive) + 1e-9)
        kept[attention.argsort(descending=True, stable=True)[:share]] = True
        reciprocal = distance.argmin(1)[nearest] == places
        matched = reciprocal & (first <= ratio * second) & (second > 0) & kept
        p = matched.nonzero().squeeze(1)
        return nearest[p], p


def local_descriptor_triplet(
    descriptors: Tensor,
    attention: Tensor,
    *,
    margin: float = 0.1,
    ratio: float = 0.9,
    attention_keep: float = 0.5,
    reduction: str = "sum",
) -> Tensor:
    """Triplet loss of the matched local descriptors of one tuple: anchor, positive, and negatives.

    With unit rows, (q, p) the M matches of :func:`match_descriptors` between ``descriptors[0]`` and
    ``descriptors[1]``, and n(q) the row nearest to q of a negative image, found without gradient ::

        loss = sum over matches (q, p) and negative images of  max(0, |q - p|^2 - |q - n(q)|^2 + margin)

    Where nothing matches it is 0, attached to the graph. The authors' weight of the sum of all tuples, beside the
    cross-entropy, is 0.05 in the paper (the default with which their code runs is 1).

    Args:
        descriptors: (T, K, D), T at least 3: anchor, positive, then images of other classes. Any length of rows.
        attention: (T, K), as from :func:`local_descriptors`; only that of the positive counts.
        margin: at least 0.
        ratio, attention_keep: as in :func:`match_descriptors`.
        reduction: ``"none"`` gives (M, T - 2); ``"sum"``; ``"mean"`` over matches and negatives, 0 without a match.

    Raises:
        ValueError: an argument out of range, shapes that do not fit.

    Source:
        Zhu et al., ICCV 2023, arXiv 2308.04008, section 3.3.

    Example:
        >>> import torch
        >>> from assay.losses import local_descriptor_triplet
        >>> anchor = torch.eye(4)  # four places, four unlike descriptors
        >>> tuple_of_three = torch.stack([anchor, anchor, anchor.roll(1, 0) + anchor])
        >>> attention = torch.tensor([4.0, 3.0, 2.0, 1.0]).expand(3, 4)
        >>> local_descriptor_triplet(tuple_of_three, attention, margin=1.0)  # 2 matches, |q - n|^2 = 2 - sqrt(2)
        tensor(0.8284)
    """
    if descriptors.dim() != 3 or len(descriptors) < 3 or not descriptors.shape[1]:
        raise ValueError(f"descriptors.shape = {tuple(descriptors.shape)} is out of range: (T, K, D), T >= 3, K >= 1")
    if attention.shape != descriptors.shape[:2]:
        shape = tuple(descriptors.shape[:2])
        raise ValueError(f"attention.shape = {tuple(attention.shape)} is out of range: {shape}")
    if not margin >= 0:
        raise ValueError(f"margin = {margin!r} is out of range: at least 0")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction = {reduction!r} is out of range: 'none', 'mean' or 'sum'")
    rows = _precise_rows(descriptors)
    q, p = match_descriptors(rows[0], rows[1], attention[1], ratio=ratio, attention_keep=attention_keep)
    anchor, positive, negatives = rows[0][q], rows[1][p], rows[2:]
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        nearest = (anchor @ negatives.transpose(1, 2)).argmax(2)  # (T - 2, M); among unit rows, the largest cosine
    images = torch.arange(len(negatives), device=rows.device)[:, None]
    apart = (anchor - negatives[images, nearest]).square().sum(2).T
    losses = F.relu((anchor - positive).square().sum(1)[:, None] - apart + margin)
    if reduction == "none":
        return losses.to(descriptors.dtype)
    total = losses.sum()
    if reduction == "mean":
        total = total / max(1, losses.numel())
    return total.to(descriptors.dtype)


class GlobalDescriptor(nn.Module):
    """CFCD's descriptor of an image: generalized-mean pooling, a linear layer, batch normalization, unit length.

    For a map F and a channel c ::

        g_c = (mean over places of max(F_c, eps)^p)^(1/p)
        descriptor = norm(linear(g)) / |norm(linear(g))|

    p = 1 is average pooling, a large p approaches the maximum. p is not trained.

    Args:
        in_channels: D of the maps, at least 1.
        out_features: d of the descriptor, at least 1; the paper has 512.
        p: greater than 0; the paper has 3.
        eps: greater than 0; what is smaller, all that is negative, counts as this.

    Raises:
        ValueError: an argument out of range, maps of another shape.

    Source:
        Zhu et al., ICCV 2023, arXiv 2308.04008, section 3.1.

    Example:
        >>> import torch
        >>> from assay.nn import GlobalDescriptor
        >>> descriptor = GlobalDescriptor(64, 32)
        >>> descriptor(torch.rand(8, 64, 7, 7)).square().sum(1)
        tensor([1.0000, 1.0000, ...
    """

    def __init__(self, in_channels: int, out_features: int = 512, *, p: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_features", out_features)):
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} = {value!r} is out of range: an integer >= 1")
        for name, number in (("p", p), ("eps", eps)):
            if not 0 < number < math.inf:
                raise ValueError(f"{name} = {number!r} is out of range: greater than 0")
        self.in_channels, self.p, self.eps = in_channels, p, eps
        self.linear = nn.Linear(in_channels, out_features)
        self.norm = nn.BatchNorm1d(out_features)

    def forward(self, maps: Tensor) -> Tensor:
        """Descriptors (B, d) of unit length, of maps (B, D, H, W)."""
        _check_maps(maps)
        if maps.shape[1] != self.in_channels:
            raise ValueError(f"maps.shape = {tuple(maps.shape)} is out of range: (B, {self.in_channels}, H, W)")
        places = maps.flatten(2)
        powers = places.to(torch.promote_types(maps.dtype, torch.float32)).clamp(min=self.eps) ** self.p
        pooled = powers.mean(2) ** (1 / self.p)
        return unit_rows(self.norm(self.linear(pooled.to(maps.dtype))))

    def extra_repr(self) -> str:
        return f"p={self.p}, eps={self.eps}"


def multi_scale_descriptors(model: nn.Module, images: Tensor, *, scales: Sequence[float] = DOLG_SCALES) -> Tensor:
    """The descriptors of an image at several sizes, averaged: for evaluation.

    ``unit(mean over s of unit(model(images resized by s)))`` with unit(x) = x / |x|, resized bilinearly. The model
    runs as in ``eval()``, without gradient, and is left as it was.

    Args:
        model: maps images to descriptors (B, d).
        images: (B, c, H, W).
        scales: factors greater than 0, at least one; by default those of DOLG, from 0.35 to 1.41.

    Returns:
        (B, d) of unit length.

    Raises:
        ValueError: a scale out of range.

    Source:
        Zhu et al., ICCV 2023, arXiv 2308.04008, section 4.1, after Yang et al.: DOLG, ICCV 2021, arXiv 2108.02927.

    Example:
        >>> import torch
        >>> from assay.nn import GlobalDescriptor, multi_scale_descriptors
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), GlobalDescriptor(8, 4))
        >>> multi_scale_descriptors(model, torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 4])
    """
    if not len(scales) or not all(0 < scale < math.inf for scale in scales):
        raise ValueError(f"scales = {scales!r} is out of range: factors greater than 0, at least one")
    with evaluating(model), torch.no_grad():
        return unit_rows(torch.stack([unit_rows(model(_resized(images, scale))) for scale in scales]).mean(0))


def _resized(images: Tensor, scale: float) -> Tensor:
    return images if scale == 1 else F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)


def _precise_rows(x: Tensor) -> Tensor:
    return unit_rows(x.to(torch.promote_types(x.dtype, torch.float32)))


def _check_maps(maps: Tensor) -> None:
    if maps.dim() != 4:
        raise ValueError(f"maps.shape = {tuple(maps.shape)} is out of range: (B, D, H, W)")
