"""What a teacher said of random regions of each image, on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from assay.losses.ferkd.soft_labels import compress_soft_labels, parse_kind, recover_soft_labels, split_label

_FORMAT = {"format": "assay.CropLabelStore", "version": 1}
_TYPES = {torch.float16: "<f2", torch.float32: "<f4", torch.float64: "<f8"}


class StoredCrops(NamedTuple):
    """Boxes (..., 4) float32, flips (...) bool, and the teacher's labels of the crops."""

    boxes: Tensor
    flips: Tensor
    labels: Tensor


class CropLabelStore:
    """Region-level teacher labels in files mapped into memory: of each image R crops, each with its label.

    A teacher looks once at R random crops of every image, and :meth:`write` keeps of each crop its box (y, x, h, w) as
    shares of the image's height and width, whether it was mirrored, and the compressed probabilities. In training
    :meth:`read` gives n of them, and no teacher is needed.

    Images are known by their position in the training set. They may be written in any order and again; the files grow
    as needed. Writing is resumable: opened anew with the same arguments the store goes on, and ``image_id in store``
    tells what is there already. The flag that says so is written after the crops themselves, so that a process which
    dies in between leaves an image that counts as not written. One process writes, any number read; a store may be
    handed to the workers of a ``DataLoader``.

    On disk ``path`` is a folder of three files, numbers little-endian and without padding:

    - ``header.json``: format and version, ``num_crops``, ``label``, ``dtype``, ``num_classes``, and ``crop``: the
      fields of one crop as numpy's structured dtypes name them: [name, type, shape];
    - ``crops.bin``: for image 0, 1, ... its R crops one after the other: ``box`` (4 float32), ``flip`` (1 byte),
      ``classes`` (K int16, int32 from 32,768 classes on) and ``values`` (K of ``dtype``). Hard labels have no values;
      full ones no classes and all C values;
    - ``written.bin``: a byte for each image, 1 if its crops are there.

    ``numpy.memmap("crops.bin", dtype=[(n, t, tuple(s)) for n, t, s in header["crop"]])`` reads it without this class.

    Args:
        path: the folder; made with the first write.
        num_crops: R, crops of each image, at least 1.
        label: a kind of label as in :func:`assay.losses.recover_soft_labels`.
        dtype: of the stored probabilities: float16, float32 or float64.

    Raises:
        ValueError: an argument out of range, or another than the store at ``path`` was made with; crops that do not
            fit; an image that was never written; files that are no such store.

    Source:
        Shen and Xing: A Fast Knowledge Distillation Framework for Visual Recognition, ECCV 2022, arXiv 2112.01528; used
        by Shen: FerKD, ICCV 2023, arXiv 2312.17473.

    Example:
        >>> import tempfile, torch
        >>> from assay.data import CropLabelStore, random_crops
        >>> store = CropLabelStore(tempfile.mkdtemp(), num_crops=8)
        >>> boxes, flips = random_crops(8)
        >>> store.write(3, boxes, flips, torch.randn(8, 100).softmax(1))
        >>> boxes, flips, probs = store.read(3, 2)
        >>> boxes.shape, flips.shape, probs.shape, 2 in store
        (torch.Size([2, 4]), torch.Size([2]), torch.Size([2, 100]), False)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        num_crops: int,
        label: str = "marginal_smoothing_k5",
        dtype: torch.dtype = torch.float16,
    ) -> None:
        if isinstance(num_crops, bool) or not isinstance(num_crops, int) or num_crops < 1:
            raise ValueError(f"num_crops = {num_crops!r} is out of range: an integer >= 1")
        if dtype not in _TYPES:
            raise ValueError(f"dtype = {dtype!r} is out of range: torch.float16, torch.float32 or torch.float64")
        parse_kind(label)
        self.path, self.num_crops, self.label, self.dtype = Path(path), num_crops, label, dtype
        self.num_classes: int | None = None
        self._crops: np.ndarray | None = None
        self._written = np.zeros(0, np.uint8)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"path = {str(self.path)!r} is out of range: a folder, or nothing yet")
        if self._header.exists():
            self._adopt(self._header)
            self._map()

    def write(self, image_id: int | Sequence[int] | Tensor, boxes: Tensor, flips: Tensor, probs: Tensor) -> None:
        """Keep the crops of an image, or of several; ones that are there already are replaced.

        Args:
            image_id: position in the training set, at least 0; or b different ones.
            boxes: (R, 4) or (b, R, 4): (y, x, h, w) in [0, 1], of some size, inside the image.
            flips: (R,) or (b, R), bool.
            probs: (R, C) or (b, R, C), the teacher's probabilities: >= 0, with a sum of 1 to 1 %.
        """
        ids, single = self._ids(image_id)
        boxes, flips, probs = (torch.as_tensor(part).detach().cpu() for part in (boxes, flips, probs))
        if single:
            boxes, flips, probs = boxes.unsqueeze(0), flips.unsqueeze(0), probs.unsqueeze(0)
        if self.num_classes is None and self._header.exists():  # made since, through another object
            self._adopt(self._header)
            self._map()
        self._check(ids, boxes, flips, probs)
        if self.num_classes is None:
            self._begin(probs.shape[2])
        self._grow(int(ids.max()) + 1)
        assert self._crops is not None
        records = np.zeros((len(ids), self.num_crops), self._crops.dtype)
        records["box"], records["flip"] = boxes.numpy(), flips.numpy()
        for name, part in self._fields(probs.flatten(0, 1)).items():
            records[name] = part.unflatten(0, records.shape).numpy()
        self._written[ids] = 0
        self._crops[ids] = records
        self._written[ids] = 1

    def read(
        self,
        image_id: int | Sequence[int] | Tensor,
        n: int | None = None,
        *,
        generator: torch.Generator | None = None,
        recover: bool = True,
    ) -> StoredCrops:
        """n different crops of an image, or of each of several, drawn at random.

        Args:
            image_id: position in the training set, or b of them.
            n: how many, in [1, R]; None gives all, in the order they were written in.
            generator: draws on the CPU; None is torch's global one.
            recover: probabilities over all classes; False leaves the labels compressed, as
                :func:`assay.losses.recover_soft_labels` takes them, to be recovered on the device.

        Returns:
            ``(boxes, flips, labels)``: (n, 4), (n,) and (n, C), with a dimension b before each if there are several
            images. Labels are float32, or as exact as they were stored.
        """
        ids, single = self._ids(image_id)
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= self.num_crops):
            raise ValueError(f"n = {n!r} is out of range: None or an integer in [1, {self.num_crops}]")
        if ids.max() >= len(self._written) or not self._written[ids].all():
            self._refresh(ids)
        assert self._crops is not None and self.num_classes is not None
        if n is None:
            records = self._crops[ids]
        else:
            chosen = torch.rand(len(ids), self.num_crops, generator=generator).argsort(1)[:, :n].numpy()
            records = self._crops[ids[:, None], chosen]
        labels = self._joined(records)
        if recover:
            labels = recover_soft_labels(labels, self.label, self.num_classes)
        boxes, flips = torch.from_numpy(records["box"].copy()), torch.from_numpy(records["flip"] != 0)
        found = StoredCrops(boxes, flips, labels.unflatten(0, records.shape))
        return StoredCrops(found.boxes[0], found.flips[0], found.labels[0]) if single else found

    @property
    def written(self) -> Tensor:
        """Positions of the images whose crops are there, ascending."""
        return torch.from_numpy(np.flatnonzero(self._written))

    def __len__(self) -> int:
        """How many images are there."""
        return int(np.count_nonzero(self._written))

    def __contains__(self, image_id: object) -> bool:
        if not isinstance(image_id, int | np.integer):
            return False
        return bool(0 <= image_id < len(self._written) and self._written[image_id])

    def flush(self) -> None:
        """Have the system write to the disk what it still holds; a process that ends needs none of it."""
        for part in (self._crops, self._written):
            if isinstance(part, np.memmap):
                part.flush()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_crops": None, "_written": np.zeros(0, np.uint8)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._header.exists():
            self._map()

    @property
    def _header(self) -> Path:
        return self.path / "header.json"

    def _said(self) -> dict[str, Any]:
        name = str(self.dtype).removeprefix("torch.")
        return {**_FORMAT, "num_crops": self.num_crops, "label": self.label, "dtype": name}

    def _adopt(self, header: Path) -> None:
        try:
            there = json.loads(header.read_text(encoding="utf-8"))
            self.num_classes = int(there["num_classes"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{header} is no header of a CropLabelStore ({type(error).__name__}: {error})") from error
        for name, value in self._said().items():
            if there.get(name) != value:
                raise ValueError(f"{name} = {value!r} is out of range: {there.get(name)!r}, as {header} has it")

    def _begin(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.path.mkdir(parents=True, exist_ok=True)
        said = {**self._said(), "num_classes": num_classes, "crop": self._layout()}
        beside = self._header.with_suffix(".new")
        beside.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self._header)  # whole or not at all

    def _layout(self) -> list[list[Any]]:
        assert self.num_classes is not None
        form, k = parse_kind(self.label)
        kept = 1 if form == "hard" else min(k or 5, self.num_classes)
        classes = ["classes", "<i2" if self.num_classes < 2**15 else "<i4", [kept]]
        values = ["values", _TYPES[self.dtype], [self.num_classes if form == "full" else kept]]
        label = [classes] if form == "hard" else [values] if form == "full" else [classes, values]
        return [["box", "<f4", [4]], ["flip", "|u1", []], *label]

    def _map(self) -> None:
        """See the files as they are now."""
        crop = np.dtype([(name, kind, tuple(shape)) for name, kind, shape in self._layout()])
        crops, written = self.path / "crops.bin", self.path / "written.bin"
        sizes = [file.stat().st_size if file.exists() else 0 for file in (crops, written)]
        images = min(sizes[0] // (crop.itemsize * self.num_crops), sizes[1])
        if images:
            # Without the right to write a store can still be read.
            mode: Any = "r+" if os.access(crops, os.W_OK) and os.access(written, os.W_OK) else "r"
            self._crops = np.memmap(crops, crop, mode, shape=(images, self.num_crops))
            self._written = np.memmap(written, np.uint8, mode, shape=(images,))

    def _grow(self, images: int) -> None:
        if images <= len(self._written):
            return
        crop = np.dtype([(name, kind, tuple(shape)) for name, kind, shape in self._layout()])
        for name, size in (("crops.bin", images * self.num_crops * crop.itemsize), ("written.bin", images)):
            with open(self.path / name, "ab") as file:
                file.truncate(size)
        self._map()

    def _refresh(self, ids: np.ndarray) -> None:
        """The images may have been written since, by the process that writes."""
        if self.num_classes is None and self._header.exists():
            self._adopt(self._header)
        if self.num_classes is not None:
            self._map()
        missing = [int(i) for i in ids if int(i) not in self]
        if missing:
            raise ValueError(f"image_id = {missing[0]} is out of range: its crops were never written to {self.path}")

    def _ids(self, image_id: int | Sequence[int] | Tensor) -> tuple[np.ndarray, bool]:
        ids = np.asarray(image_id)
        if ids.dtype.kind not in "iu" or ids.ndim > 1 or ids.size == 0 or ids.min() < 0:
            raise ValueError(f"image_id = {image_id!r} is out of range: an integer >= 0, or some of them")
        return ids.reshape(-1).astype(np.int64), ids.ndim == 0

    def _fields(self, probs: Tensor) -> dict[str, Tensor]:
        label = compress_soft_labels(probs, self.label)
        if parse_kind(self.label)[0] == "full":
            return {"values": label}
        classes, values = split_label(label, self.label)
        return {"classes": classes} if values is None else {"classes": classes, "values": values}

    def _joined(self, records: np.ndarray) -> Tensor:
        """Compressed labels of all records, one after the other, as :func:`compress_soft_labels` gave them."""
        form, _ = parse_kind(self.label)
        if form != "hard":
            values = torch.from_numpy(records["values"].copy()).flatten(0, 1)
            if form == "full":
                return values
        classes = torch.from_numpy(records["classes"].astype(np.int64)).flatten(0, 1)
        if form == "hard":
            return classes.squeeze(1)
        precise = torch.promote_types(values.dtype, torch.float32)
        label = torch.stack([classes.to(precise), values.to(precise)], 1)
        return label.squeeze(2) if form == "smoothing" else label

    def _check(self, ids: np.ndarray, boxes: Tensor, flips: Tensor, probs: Tensor) -> None:
        if len(np.unique(ids)) < len(ids):
            raise ValueError(f"image_id = {ids.tolist()} is out of range: different images")
        count = (len(ids), self.num_crops)
        if boxes.shape != (*count, 4):
            raise ValueError(f"boxes.shape = {tuple(boxes.shape)} is out of range: {(*count, 4)}")
        if flips.shape != count:
            raise ValueError(f"flips.shape = {tuple(flips.shape)} is out of range: {count}")
        classes = self.num_classes or (probs.shape[-1] if probs.dim() == 3 else "C")
        if probs.shape != (*count, classes) or classes == 1 or not probs.is_floating_point():
            said = f"{tuple(probs.shape)} of {probs.dtype}"
            raise ValueError(
                f"probs.shape = {said} is out of range: ({count[0]}, {count[1]}, {classes}), floating point"
            )
        corner, sides = boxes[..., :2], boxes[..., 2:]
        inside = (corner >= 0) & (sides > 0) & (corner + sides <= 1 + 1e-6)
        if not inside.all():
            wrong = boxes[~inside.all(-1)][0].tolist()
            raise ValueError(f"boxes = {wrong} is out of range: (y, x, h, w) inside [0, 1], h and w above 0")
        total = probs.double().sum(-1)
        if not ((probs >= 0).all() and ((total - 1).abs() <= 0.01).all()):
            raise ValueError("probs is out of range: each crop's probabilities are >= 0 and sum to 1")
