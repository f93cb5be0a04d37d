"""Batches made of tuples: an anchor, another image of its class, and images of other classes, hard ones if known."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

# The shares of hard negatives in the authors' code.
FALSE_POSITIVE_OF_RIGHT, FALSE_POSITIVE_OF_WRONG, MISTAKEN_FOR = 0.5, 0.33, 0.5

_ATTEMPTS = 100


class TupleSampler(Sampler[list[int]]):
    """Batches of tuples (anchor, positive, negatives ...), for losses that compare images of a tuple.

    For each tuple a class c is drawn from those with at least two images left, and an anchor of it. The positive is
    another image of c. Given the class that an earlier stage predicted for each image, the negatives are hard ones::

        anchor predicted rightly:  each negative is, with probability 0.5, an image of another class predicted as c;
        anchor predicted as k:     the positive is one predicted rightly, if there is one left; each negative is, with
                                   probability 0.33, an image of another class predicted as c, and else, with
                                   probability 0.5, an image of class k.

    What is left to fill, also where such images have run out or no predictions are given, comes from other classes
    drawn at random, one of each until they have all had their turn. An epoch is one pass: no image is drawn twice,
    and it ends where no further tuple can be formed or the tuples do not fill a batch of every process. ``len`` is
    the number of batches in the current epoch, which may differ by a few from the next.

    It is a ``batch_sampler`` of a ``DataLoader``, or the batch seam of the bench. All processes form the same tuples
    and take their own batches of them. Call ``set_epoch`` before each epoch, also after a resume.

    Args:
        labels: (N,) the class of each image, integers.
        predictions: (N,) the class predicted for each; None: no hard negatives.
        tuple_size: at least 3.
        batch_size: images in a batch of one process, a multiple of ``tuple_size``.
        seed: with the epoch, it determines all draws; no global random state is touched.
        rank, world_size: this process, of how many.

    Raises:
        ValueError: an argument out of range, or labels from which not one batch can be formed.

    Source:
        Zhu et al.: Coarse-to-Fine: Learning Compact Discriminative Representation for Single-Stage Image Retrieval,
        ICCV 2023, arXiv 2308.04008, section 3.3; the probabilities are those of the authors' code.

    Example:
        >>> import torch
        >>> from assay.data import TupleSampler
        >>> labels = torch.arange(40) % 5
        >>> sampler = TupleSampler(labels, tuple_size=4, batch_size=8, seed=1)
        >>> (first, *_) = sampler
        >>> [labels[first[k : k + 4]].tolist() for k in (0, 4)]
        [[0, 0, 3, 2], [4, 4, 0, 2]]
    """

    def __init__(
        self,
        labels: Any,
        predictions: Any = None,
        *,
        tuple_size: int = 8,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.labels = _classes("labels", labels)
        self.predictions = None if predictions is None else _classes("predictions", predictions)
        if self.predictions is not None and len(self.predictions) != len(self.labels):
            shape = f"({len(self.predictions)},)"
            raise ValueError(f"predictions.shape = {shape} is out of range: that of the labels, ({len(self.labels)},)")
        if not isinstance(tuple_size, int) or tuple_size < 3:
            raise ValueError(f"tuple_size = {tuple_size!r} is out of range: an integer >= 3")
        if not isinstance(batch_size, int) or batch_size < 1 or batch_size % tuple_size:
            raise ValueError(f"batch_size = {batch_size!r} is out of range: a multiple of tuple_size = {tuple_size}")
        if not isinstance(world_size, int) or world_size < 1:
            raise ValueError(f"world_size = {world_size!r} is out of range: an integer >= 1")
        if not isinstance(rank, int) or not 0 <= rank < world_size:
            raise ValueError(f"rank = {rank!r} is out of range: [0, {world_size})")
        self.tuple_size, self.batch_size = tuple_size, batch_size
        self.seed, self.rank, self.world_size, self.epoch = seed, rank, world_size, 0
        self._plan: list[list[int]] | None = None
        if not len(self):
            needs = f"{world_size} x {batch_size} images in tuples of 2 of a class and {tuple_size - 2} of others"
            raise ValueError(
                f"batch_size = {batch_size} is out of range: the {len(self.labels)} labels give no {needs}"
            )

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0; other epochs have other tuples."""
        if epoch != self.epoch:
            self.epoch, self._plan = epoch, None

    def state_dict(self) -> dict[str, int]:
        """The epoch; with the constructor's arguments it says which tuples come."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.set_epoch(state["epoch"])

    def __len__(self) -> int:
        return len(self._batches())

    def __iter__(self) -> Iterator[list[int]]:
        return iter([list(batch) for batch in self._batches()])

    def _batches(self) -> list[list[int]]:
        """This process's batches of the current epoch, formed when first asked for."""
        attempt = 0
        # Few images may be drawn into too few tuples for a batch, by one draw and not by the next.
        while not self._plan and attempt < _ATTEMPTS:
            images = [image for group in self._tuples(attempt) for image in group]
            together = self.batch_size * self.world_size
            starts = range(self.batch_size * self.rank, len(images) // together * together, together)
            self._plan = [images[start : start + self.batch_size] for start in starts]
            attempt += 1
        return self._plan or []

    def _tuples(self, attempt: int) -> Iterator[list[int]]:
        # A string, because it is hashed by the same function everywhere, and a sum would repeat across seeds.
        draw = random.Random(f"{self.seed} {self.epoch}" + (f" {attempt}" if attempt else ""))
        left = _Left(self.labels, self.predictions)
        while (c := left.anchor_class(draw, self.tuple_size - 2)) is not None:
            anchor = left.take(left.of_class[c].draw(draw))
            rightly = self.predictions is None or self.predictions[anchor] == c
            pool = left.of_class[c] if rightly or not left.true.get(c) else left.true[c]
            chosen = [anchor, left.take(pool.draw(draw))]
            if self.predictions is not None:
                chosen += self._hard(draw, left, c, self.predictions[anchor])
            yield chosen + left.others(draw, c, self.tuple_size - len(chosen))

    def _hard(self, draw: random.Random, left: _Left, c: int, predicted: int) -> list[int]:
        chosen = []
        share = FALSE_POSITIVE_OF_RIGHT if predicted == c else FALSE_POSITIVE_OF_WRONG
        for _ in range(self.tuple_size - 2):
            pool = None
            if draw.random() < share and left.false.get(c):
                pool = left.false[c]
            elif predicted != c and draw.random() < MISTAKEN_FOR:
                pool = left.of_class.get(predicted)
            if pool:
                chosen.append(left.take(pool.draw(draw)))
        return chosen


class _Pool:
    """A set from which a random member is drawn, and any removed, in constant time."""

    def __init__(self, members: Iterable[int] = ()) -> None:
        self.members = list(members)
        self.place = {member: k for k, member in enumerate(self.members)}

    def __len__(self) -> int:
        return len(self.members)

    def draw(self, draw: random.Random) -> int:
        """A random member, which stays."""
        return self.members[draw.randrange(len(self.members))]

    def add(self, member: int) -> None:
        self.place[member] = len(self.members)
        self.members.append(member)

    def remove(self, member: int) -> None:
        k, last = self.place.pop(member), self.members.pop()
        if last != member:
            self.members[k], self.place[last] = last, k


class _Left:
    """The images of a pass that are not drawn yet: by class, and by what they were predicted as."""

    def __init__(self, labels: list[int], predictions: list[int] | None) -> None:
        self.labels, self.predictions = labels, predictions
        self.count = len(labels)
        self.of_class: dict[int, _Pool] = {}
        self.true: dict[int, _Pool] = {}  # predicted rightly
        self.false: dict[int, _Pool] = {}  # of another class, predicted as this one
        for image, label in enumerate(labels):
            self.of_class.setdefault(label, _Pool()).add(image)
            if predictions is not None:
                self._predicted_as(image).add(image)
        self.classes = _Pool(self.of_class)
        self.pairs = _Pool(c for c, pool in self.of_class.items() if len(pool) >= 2)

    def _predicted_as(self, image: int) -> _Pool:
        predicted = self.predictions[image]  # type: ignore[index]  # called only where there are predictions
        return (self.true if predicted == self.labels[image] else self.false).setdefault(predicted, _Pool())

    def take(self, image: int) -> int:
        c = self.labels[image]
        self.of_class[c].remove(image)
        self.count -= 1
        if self.predictions is not None:
            self._predicted_as(image).remove(image)
        if len(self.of_class[c]) == 1:
            self.pairs.remove(c)
        elif not self.of_class[c]:
            self.classes.remove(c)
        return image

    def anchor_class(self, draw: random.Random, negatives: int) -> int | None:
        """A class of two images or more beside which enough others are left; None if there is none."""
        if not self.pairs:
            return None
        c = self.pairs.draw(draw)
        if self.count - len(self.of_class[c]) >= negatives:
            return c
        enough = [k for k in self.pairs.members if self.count - len(self.of_class[k]) >= negatives]
        return draw.choice(enough) if enough else None

    def others(self, draw: random.Random, c: int, wanted: int) -> list[int]:
        """Images of classes other than c: one each of random ones, again and again until there are enough."""
        turn = draw.sample(self.classes.members, min(wanted + 1, len(self.classes)))  # one more, for c may be in it
        turn = [other for other in turn if other != c][:wanted]
        chosen: list[int] = []
        while len(chosen) < wanted:
            for other in turn[: wanted - len(chosen)]:
                chosen.append(self.take(self.of_class[other].draw(draw)))
            turn = [other for other in turn if self.of_class[other]]
        return chosen


def _classes(name: str, values: Any) -> list[int]:
    tensor = torch.as_tensor(values)
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} = {tuple(tensor.shape)} of {tensor.dtype} is out of range: (N,) integers")
    return tensor.tolist()
