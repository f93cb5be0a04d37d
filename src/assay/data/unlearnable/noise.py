"""The noise that protects a dataset, and the dataset with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from assay.data._selection import check_positions


class Noise(Tensor):
    """Noise for the N images of a dataset: an int8 tensor (N, C, H, W), each entry a number of 255ths.

    It is a tensor like any other, and what is computed from it is a plain one. ``max_abs`` is its largest absolute
    entry; it never exceeds 255 times the radius that it was made with.

    Args:
        values: int8, (N, ...), one entry for every example in dataset order, in [-127, 127]; shared, not copied.

    Raises:
        ValueError: ``values`` of another kind.

    Source:
        Fu et al.: Robust Unlearnable Examples, ICLR 2022, arXiv 2203.14533.

    Example:
        >>> import torch
        >>> from assay.data import Noise
        >>> images = torch.tensor([[[[250, 5]]], [[[100, 100]]]], dtype=torch.uint8)
        >>> dataset = torch.utils.data.TensorDataset(images, torch.tensor([0, 1]))
        >>> noise = Noise(torch.tensor([[[[8, -8]]], [[[3, 0]]]], dtype=torch.int8))
        >>> noise.max_abs
        8
        >>> protected = noise.apply(dataset)
        >>> protected[0][0].tolist(), protected[1][0].tolist()
        ([[[255, 0]]], [[[103, 100]]])
    """

    # What is computed from noise is no noise any more.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(cls, values: Tensor) -> Noise:
        if not isinstance(values, Tensor) or values.dtype != torch.int8 or values.dim() < 1:
            found = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"values = {found} is out of range: an int8 tensor (N, ...)")
        if (values == -128).any():
            raise ValueError("values = -128 is out of range: [-127, 127]")
        return values.detach().as_subclass(cls)

    def __deepcopy__(self, memo: dict[int, Any]) -> Noise:
        return Noise(self.clone())

    @property
    def max_abs(self) -> int:
        """Largest absolute entry, in 255ths."""
        return int(self.abs().max()) if self.numel() else 0

    def apply(
        self,
        dataset: Any,
        fraction: float = 1.0,
        indices: Any = None,
        *,
        transform: Callable[[Tensor], Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> ProtectedDataset:
        """The dataset with the noise on its images, for all of it or for a part.

        An image of type uint8 becomes ``clip(image + noise, 0, 255)``, of type uint8 again; one of floating point
        ``clip(image + noise / 255, 0, 1)``. The noise belongs under any augmentation, which is why the dataset must
        give images without it: pass it as ``transform``, or wrap what is returned.

        Args:
            dataset: map-style, of N examples (image, label, ...), in the order for which the noise was made; images
                are tensors or arrays of the noise's shape, uint8 or floating point in [0, 1].
            fraction: share of the examples that is protected, in [0, 1], rounded to whole examples and drawn anew
                with each call.
            indices: which examples to protect, instead of a share.
            transform: called with each image, protected or not, after the noise.
            generator: draws the share; None: torch's global one.

        Returns:
            A map-style dataset of the same N examples; its ``indices`` are the protected ones, ascending.

        Raises:
            ValueError: an argument out of range, a dataset of another size, or images of another kind.
        """
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise ValueError(
                f"dataset is a {type(dataset).__name__}, not a map-style dataset (__len__ and __getitem__)"
            )
        if len(dataset) != len(self):
            raise ValueError(f"len(dataset) = {len(dataset)} is out of range: {len(self)}, the noise's examples")
        if isinstance(fraction, bool) or not 0 <= fraction <= 1:
            raise ValueError(f"fraction = {fraction!r} is out of range: [0, 1]")
        if indices is None:
            device = "cpu" if generator is None else generator.device
            drawn = (
                torch.randperm(len(self), generator=generator, device=device)
                if fraction < 1
                else torch.arange(len(self))
            )
            chosen = drawn[: round(fraction * len(self))].cpu()
        elif fraction != 1:
            raise ValueError(f"fraction = {fraction!r} is out of range: 1, where indices are given")
        else:
            chosen = check_positions(indices, len(self)).unique()
        return ProtectedDataset(dataset, self, chosen.sort().values, transform)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a plain tensor, which ``torch.load(path, weights_only=True)`` reads as well."""
        torch.save(self.cpu().as_subclass(Tensor), Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Noise:
        """What :meth:`save` wrote; nothing else than tensors is unpickled."""
        return cls(torch.load(Path(path), map_location="cpu", weights_only=True))


class ProtectedDataset(Dataset[Any]):
    """A dataset with noise on the images at ``indices``; made by :meth:`Noise.apply`."""

    def __init__(
        self, dataset: Any, noise: Noise, indices: Tensor, transform: Callable[[Tensor], Any] | None = None
    ) -> None:
        self.dataset, self.indices, self.transform = dataset, indices, transform
        self.noise = noise.cpu().as_subclass(Tensor)
        self._protected = torch.zeros(len(noise), dtype=torch.bool).index_fill(0, indices, True)

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, index: int) -> Any:
        position = self._position(index)
        return self._with_noise(self.dataset[position], position)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """A whole batch at once, where the dataset can give one faster than by examples."""
        positions = [self._position(index) for index in indices]
        return [self._with_noise(*pair) for pair in zip(examples(self.dataset, positions), positions, strict=True)]

    def _position(self, index: int) -> int:
        size, position = len(self), int(index)
        if not -size <= position < size:
            raise IndexError(f"index = {position} is out of range: [0, {size})")
        return position % size

    def _with_noise(self, example: Any, position: int) -> tuple[Any, ...]:
        image = as_image(example)
        if self._protected[position]:
            image = add(image, self.noise[position])
        return (image if self.transform is None else self.transform(image), *example[1:])


def add(images: Tensor, noise: Tensor) -> Tensor:
    """Images and noise of equal shape: uint8 stays uint8, floating point stays in [0, 1]."""
    if images.shape != noise.shape:
        raise ValueError(f"images.shape = {tuple(images.shape)} is out of range: {tuple(noise.shape)}, as the noise")
    if images.dtype == torch.uint8:
        return (images.short() + noise).clamp(0, 255).to(torch.uint8)
    return (images + noise.to(images) / 255).clamp(0, 1)


def as_image(example: Any) -> Tensor:
    """The image of an example (image, label, ...) as a tensor."""
    if not isinstance(example, tuple | list) or len(example) < 2:
        raise ValueError(f"dataset yields a {type(example).__name__}: an example is (image, label, ...)")
    try:
        image = torch.as_tensor(example[0])
    except (TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"dataset yields a {type(example[0]).__name__} as image, not a tensor or an array") from error
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise ValueError(f"dataset yields images of {image.dtype}: uint8, or floating point in [0, 1]")
    return image


def examples(dataset: Any, positions: Sequence[int]) -> list[Any]:
    many = getattr(dataset, "__getitems__", None)
    return many(positions) if many else [dataset[position] for position in positions]
