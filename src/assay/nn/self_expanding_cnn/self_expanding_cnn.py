"""Self-expanding convolutional networks: a small network that adds a layer or channels when that would pay."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from assay._checks import in_range
from assay.nn.self_expanding_cnn.expander import Expander, ExpansionEvent
from assay.nn.self_expanding_cnn.score import natural_expansion_score
from assay.nn.self_expanding_cnn.surgery import PRESERVE, Growth, insert_identity_conv, widen_conv

__all__ = [
    "Expander",
    "ExpansionEvent",
    "Growth",
    "SelfExpandingCNN",
    "insert_identity_conv",
    "natural_expansion_score",
    "widen_conv",
]
SLOPE = 0.2


class SelfExpandingCNN(nn.Module):
    """A convolutional network for images whose blocks can be deepened and widened while it trains.

    ::

        block   conv 3x3 -> dropout -> batch norm -> LeakyReLU(0.2) [-> layers added later] -> max pool
        head    [last block, first block max-pooled to its size] -> conv 1x1 -> LeakyReLU -> linear -> batch norm
                -> LeakyReLU -> dropout -> linear

    ``add_layer`` and ``widen`` change it in place, and with ``preserve="exact"`` leave its outputs as they are.
    :class:`Expander` calls them where the natural expansion score says that it pays.

    Args:
        in_channels, num_classes: > 0.
        channels: of the blocks, one or more numbers > 0.
        image_size: height and width of the images; ``pool`` to the number of blocks at least.
        capacity: >= 0, how many layers may be added to a block.
        dropout, fc_dropout: in [0, 1), in the blocks and in the head.
        pool: > 0, what each block divides height and width by.
        hidden: > 0, width of the head.
        preserve: "exact", or "paper": a fresh batch norm and LeakyReLU after an added layer, small random weights
            instead of zeros for new channels.

    Shapes: (N, in_channels, image_size, image_size) to logits (N, num_classes).

    ``state_dict`` records the structure; :meth:`from_state_dict` builds an expanded network from it.

    Raises:
        ValueError: an argument out of range; loading the state of a network of another structure.

    Source: B. Appolinary, A. Deaconu, S. Yang, Q. Li, Self Expanding Convolutional Neural Networks, 2024,
    arXiv 2401.05686.

    >>> import torch
    >>> from assay.nn.expand import SelfExpandingCNN
    >>> model = SelfExpandingCNN(1, 10, (2, 2), image_size=8).eval()
    >>> x = torch.randn(3, 1, 8, 8)
    >>> before, size = model(x), model.num_parameters()
    >>> growth = model.widen(0, 2)
    >>> growth = model.add_layer(1)
    >>> size, model.num_parameters(), torch.allclose(model(x), before, atol=1e-5)
    (1186, 1308, True)
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: Sequence[int] = (16, 16, 16),
        *,
        image_size: int = 32,
        capacity: int = 10,
        dropout: float = 0.1,
        fc_dropout: float = 0.05,
        pool: int = 2,
        hidden: int = 20,
        preserve: str = "exact",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in_channels": in_channels, "num_classes": num_classes, "pool": pool, "hidden": hidden}
        for name, size in sizes.items():
            in_range(name, size, size > 0, "an integer > 0")
        in_range("channels", channels, len(channels) > 0 and min(channels) > 0, "one or more integers > 0")
        in_range("capacity", capacity, capacity >= 0, "an integer >= 0")
        for name, share in (("dropout", dropout), ("fc_dropout", fc_dropout)):
            in_range(name, share, 0 <= share < 1, "in [0, 1)")
        in_range("preserve", preserve, preserve in PRESERVE, " or ".join(PRESERVE))
        last = image_size // pool ** len(channels)
        in_range("image_size", image_size, last > 0, f"at least pool ** blocks = {pool ** len(channels)}")
        self.in_channels, self.num_classes, self.image_size = in_channels, num_classes, image_size
        self.dropout, self.fc_dropout, self.pool, self.hidden = dropout, fc_dropout, pool, hidden
        self.capacity, self.preserve = capacity, preserve
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Sequential(
                    nn.Conv2d(before, after, 3, padding="same", **factory),
                    nn.Dropout(dropout),
                    nn.BatchNorm2d(after, **factory),
                    nn.LeakyReLU(SLOPE),
                ),
                nn.MaxPool2d(pool),
            )
            for before, after in zip((in_channels, *channels), channels, strict=False)
        )
        # With a single block there is nothing to skip.
        self.skip = nn.MaxPool2d(pool ** (len(channels) - 1)) if len(channels) > 1 else None
        joined = channels[-1] + (channels[0] if self.skip is not None else 0)
        self.mix = nn.Conv2d(joined, num_classes, 1, **factory)
        self.head = nn.Sequential(
            nn.LeakyReLU(SLOPE),
            nn.Flatten(),
            nn.Linear(num_classes * last**2, hidden, **factory),
            nn.BatchNorm1d(hidden, **factory),
            nn.LeakyReLU(SLOPE),
            nn.Dropout(fc_dropout),
            nn.Linear(hidden, num_classes, **factory),
        )

    def forward(self, x: Tensor) -> Tensor:
        block, *others = self.blocks
        first = x = block(x)
        for block in others:
            x = block(x)
        if self.skip is not None:
            x = torch.cat([x, self.skip(first)], 1)
        return self.head(self.mix(x))

    def _layers(self, block: int) -> nn.Sequential:
        in_range("block", block, 0 <= block < len(self.blocks), f"0 to {len(self.blocks) - 1}")
        found = self.blocks[block]
        assert isinstance(found, nn.Sequential)
        return found

    def channels(self, block: int) -> int:
        """Width of a block."""
        return next(m.out_channels for m in self._layers(block).modules() if isinstance(m, nn.Conv2d))

    def added_layers(self, block: int) -> int:
        """How many layers have been added to a block."""
        return len(self._layers(block)) - 2

    def num_parameters(self) -> int:
        """How many there are."""
        return sum(p.numel() for p in self.parameters())

    def add_layer(self, block: int, noise: float = 1e-4, *, calibration: Tensor | None = None) -> Growth:
        """Put a convolution that is the identity at the end of a block, before its pooling, in place.

        Args:
            block: 0 to the number of blocks - 1.
            noise: >= 0, on the identity's kernel, for ``preserve="paper"``; "exact" adds none.
            calibration: images for "exact": for this batch the output stays the same in training too (but for dropout),
                and in evaluation it does for any. None: in evaluation only.

        Returns:
            The :class:`Growth`; call its ``follow(optimizer)``, as :class:`Expander` does.

        Raises:
            ValueError: an argument out of range, or a block that has ``capacity`` added layers.
        """
        layers = self._layers(block)
        in_range("block", block, self.added_layers(block) < self.capacity, f"fewer than {self.capacity} added layers")
        arriving = None
        if calibration is not None and self.preserve == "exact":
            arriving = self._in_training(block, calibration)[0]
        return insert_identity_conv(
            layers,
            len(layers) - 1,
            self.channels(block),
            noise=noise,
            preserve=self.preserve,
            negative_slope=SLOPE,
            calibration=arriving,
        )

    @torch.no_grad()
    def _in_training(self, block: int, images: Tensor) -> tuple[Tensor, nn.Sequential]:
        """What a batch in training is before the pooling of a block, without dropout, and a block that has seen it.

        The statistics of that block, a copy, are the batch's; this network stays as it is.
        """
        parts = [copy.deepcopy(self._layers(i)) for i in range(block + 1)]
        for module in nn.ModuleList(parts).train().modules():
            if isinstance(module, nn.Dropout):
                module.eval()
            elif isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        for part in parts[:-1]:
            images = part(images)
        return parts[-1][:-1](images), parts[-1]

    def widen(self, block: int, n: int, noise: float = 1e-4, *, calibration: Tensor | None = None) -> Growth:
        """Give every convolution of a block ``n`` output channels more, in place.

        Args:
            block: 0 to the number of blocks - 1.
            n: > 0.
            noise: >= 0, the standard deviation of new filters (and with ``preserve="paper"`` of what later layers make
                of them; "exact": 0).
            calibration: images whose statistics the new channels' batch norms start with; None: mean 0, variance 1,
                under which such small filters give next to nothing in evaluation, and so in the score.

        Returns:
            The :class:`Growth`; call its ``follow(optimizer)``, as :class:`Expander` does.

        Raises:
            ValueError: an argument out of range.
        """
        layers, width = self._layers(block), self.channels(block)
        modules = [m for m in layers.modules() if not isinstance(m, nn.Sequential)]
        at = [i for i, m in enumerate(modules) if isinstance(m, nn.Conv2d)]
        growth = Growth()
        for start, end in zip(at, [*at[1:], None], strict=True):
            following: list[nn.Module | tuple[nn.Module, int]] = [*modules[start + 1 : end]]
            if end is not None:
                following.append(modules[end])
            else:
                following += self._consumers(block)
            conv = modules[start]
            assert isinstance(conv, nn.Conv2d) and conv.out_channels == width
            part = widen_conv(conv, following, n, noise=noise, preserve=self.preserve)
            growth.replaced += part.replaced
        if calibration is not None:
            seen = self._in_training(block, calibration)[1]
            for mine, batch in zip(layers.modules(), seen.modules(), strict=True):
                if isinstance(mine, nn.BatchNorm2d):
                    mine.running_mean[width:] = batch.running_mean[width:]  # type: ignore[index]
                    mine.running_var[width:] = batch.running_var[width:]  # type: ignore[index]
        return growth

    def _consumers(self, block: int) -> list[nn.Module | tuple[nn.Module, int]]:
        last = len(self.blocks) - 1
        # The last block's channels come first in the 1x1 convolution, and grow before those of the skip.
        found: list[nn.Module | tuple[nn.Module, int]] = []
        if block == last:
            found.append((self.mix, 0))
        else:
            found.append(next(m for m in self._layers(block + 1).modules() if isinstance(m, nn.Conv2d)))
            if block == 0:
                found.append((self.mix, self.channels(last)))
        return found

    def structure(self) -> dict[str, Any]:
        """The arguments that build this network before it was expanded at its present widths, and its added layers."""
        names = ("in_channels", "num_classes", "image_size", "capacity", "dropout", "fc_dropout", "pool", "hidden")
        return {
            **{name: getattr(self, name) for name in (*names, "preserve")},
            "channels": [self.channels(block) for block in range(len(self.blocks))],
            "added": [self.added_layers(block) for block in range(len(self.blocks))],
        }

    def get_extra_state(self) -> Tensor:
        # A tensor, so that formats which know only tensors keep it.
        return torch.tensor(list(json.dumps(self.structure()).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        theirs, ours = _read(state), self.structure()
        if (theirs["channels"], theirs["added"]) != (ours["channels"], ours["added"]):
            raise ValueError(
                f"the state is of a network with channels {theirs['channels']} and {theirs['added']} added layers, "
                f"this one has {ours['channels']} and {ours['added']}: use SelfExpandingCNN.from_state_dict(state)"
            )

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> SelfExpandingCNN:
        """The network, expanded as it was, that a ``state_dict`` of this class describes, with its values.

        Raises:
            ValueError: the state holds no structure.
        """
        if "_extra_state" not in state:
            raise ValueError("state = no '_extra_state' is out of range: a state_dict of a SelfExpandingCNN")
        structure = _read(state["_extra_state"])
        added, sample = structure.pop("added"), state["mix.weight"]
        model = cls(**structure, device=sample.device, dtype=sample.dtype)
        for block, layers in enumerate(added):
            for _ in range(layers):
                model.add_layer(block)
        model.load_state_dict(state)
        return model

    def extra_repr(self) -> str:
        return f"preserve={self.preserve!r}, capacity={self.capacity}"


def _read(state: Tensor) -> dict[str, Any]:
    return json.loads(bytes(state.tolist()).decode())
