"""An MLP that knows upright digits learns rotated ones: with Adam, block by block, with adapters, or its end alone."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.datasets import split_digits
from assay.bench.evidence import Bench, Evidence, Rows, at_least, at_most
from assay.optim.badam.badam import BAdam

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EPOCHS, BATCH, DEPTH, HALF = 25, 64, 4, 898
SWITCH_EVERY, RANK = 20, 4
ADAMW, BADAM, LORA, LAST, HEAD = "AdamW", "BAdam", "LoRA", "last block and head", "head"
ARMS = (ADAMW, BADAM, LORA, LAST, HEAD)
PARTS = ("accuracy", "time")
# Each the best of 1e-3, 3e-3, 1e-2 and 3e-2 by mean accuracy on 298 of the digits to train on, seeds 0 to 4.
RATES = {ADAMW: 1e-2, BADAM: 1e-2, LORA: 1e-2, LAST: 1e-2, HEAD: 1e-2}

Make = Callable[..., torch.optim.Optimizer]


def claim(
    bench: Bench,
    *,
    method: Make = BAdam,
    parts: Collection[str] = PARTS,
    arms: Collection[str] = ARMS,
    seeds: int = 50,
    epochs: int = EPOCHS,
) -> Evidence:
    """Test accuracy and bytes of state at each arm's own best rate; seconds of backward at a width that shows them."""
    rows, checks, notes = Rows(), [], []
    if "accuracy" in parts:
        rows += bench.rows(functools.partial(adapt, method=method, epochs=epochs), arms, bench.seeds(seeds))
        for arm, bound in ((LORA, 0), (ADAMW, -4), (LAST, 20)):
            if arm in arms:
                gain = rows.difference(BADAM, arm, "accuracy")
                checks.append(at_least(f"test accuracy, BAdam - {arm} (points)", gain, bound))
        if ADAMW in arms:
            checks.append(at_most("bytes of state, BAdam / AdamW", rows.ratio(BADAM, ADAMW, "bytes"), 0.35))
        for arm in arms:
            accuracy, loss, size = (rows.values(arm, metric).mean() for metric in ("accuracy", "loss", "bytes"))
            notes.append(f"{arm}: accuracy {accuracy:.1f}, training loss {loss:.3f}, {size:,.0f} bytes of state")
    if "time" in parts:
        timed = bench.rows(functools.partial(backward, method=method), (ADAMW, BADAM), bench.seeds(5))
        checks.append(
            at_most("seconds of backward at width 512, BAdam / AdamW", timed.ratio(BADAM, ADAMW, "seconds"), 0.9)
        )
        notes += [f"{arm}: {1e3 * timed.values(arm, 'seconds').mean():.2f} ms of backward" for arm in (ADAMW, BADAM)]
        rows += timed
    return Evidence(rows, checks, notes)


def network(width: int = 64) -> nn.Sequential:
    """Four layers of one width, and a head."""
    body = [layer for i in range(DEPTH) for layer in (nn.Linear(64 if i == 0 else width, width), nn.ReLU())]
    return nn.Sequential(*body, nn.Linear(width, 10))


def body() -> list[str]:
    """The names of the layers before the head."""
    return [str(2 * i) for i in range(DEPTH)]


class Adapted(nn.Module):
    """A linear layer that stays, plus a product of two thin matrices that does not."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(RANK, layer.in_features) / layer.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(layer.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T


def adapt(
    variant: str,
    seed: int,
    *,
    method: Make = BAdam,
    epochs: int = EPOCHS,
    lr: float | None = None,
    size: int | None = None,
) -> dict[str, Any]:
    """Adapt a trained network to digits turned by 90 degrees; ``size`` to train on tests on the rest of that half."""
    train, test = ((turned(x), y) for x, y in split_digits(1000 + seed, train=HALF))
    if size:
        train, test = (train[0][:size], train[1][:size]), (train[0][size:], train[1][size:])
    model = copy.deepcopy(trained(seed, epochs))
    torch.manual_seed(seed)
    optimizer = build(variant, model, RATES[variant] if lr is None else lr, method, seed)
    most = 0
    for _ in range(epochs):
        for chosen in torch.randperm(len(train[0])).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(train[0][chosen]), train[1][chosen]).backward()
            optimizer.step()
        most = max(most, state_bytes(optimizer))
    with torch.no_grad():
        accuracy = 100 * (model(test[0]).argmax(1) == test[1]).double().mean().item()
        loss = F.cross_entropy(model(train[0]), train[1]).item()
    return {"accuracy": accuracy, "loss": loss, "bytes": most}


def build(variant: str, model: nn.Sequential, lr: float, method: Make, seed: int) -> torch.optim.Optimizer:
    """The optimizer of an arm, and for LoRA the model's adapters; the head is always trained."""
    head = str(2 * DEPTH)
    if variant == BADAM:
        return method(
            model.named_parameters(), lr, blocks=body(), always_active=[head], switch_every=SWITCH_EVERY, seed=seed
        )
    trains = {ADAMW: [*body(), head], LAST: [body()[-1], head]}.get(variant, [head])
    for name, layer in model.named_children():
        if name not in trains:
            layer.requires_grad_(False)
            if variant == LORA and isinstance(layer, nn.Linear):
                model[int(name)] = Adapted(layer)
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr, weight_decay=0.0)


@functools.cache
def trained(seed: int, epochs: int) -> nn.Sequential:
    """A network that has learnt the upright digits."""
    (x, y), _ = split_digits(1000 + seed, train=HALF)
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    return model


def turned(pixels: Tensor) -> Tensor:
    return pixels.view(-1, 8, 8).rot90(1, (1, 2)).flatten(1)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all state tensors but the step counts."""
    tensors = [x for state in optimizer.state.values() for name, x in state.items() if name != "step"]
    return sum(x.numel() * x.element_size() for x in tensors)


def backward(variant: str, seed: int, *, method: Make = BAdam, times: int = 15) -> dict[str, Any]:
    """Seconds of backward at width 512: the median over steps, averaged over the visits of all blocks."""
    torch.manual_seed(seed)
    model, x, y = network(512), torch.randn(BATCH, 64), torch.randint(10, (BATCH,))
    options = {"blocks": body(), "always_active": [str(2 * DEPTH)], "switch_every": times}
    optimizer = method(model.named_parameters(), 1e-3, **options) if variant == BADAM else None
    seconds = []
    for _ in range(DEPTH * times):
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        start = time.perf_counter()
        loss.backward()
        seconds.append(time.perf_counter() - start)
        if optimizer is not None:
            optimizer.step()
    return {"seconds": torch.tensor(seconds, dtype=torch.float64).view(DEPTH, times).median(1).values.mean().item()}


def figure(evidence: Evidence) -> Figure:
    """Test accuracy over bytes of optimizer state, a dot for each seed and a line at the mean."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6, 3.5), layout="constrained")
    axes = drawing.subplots()
    measured = Rows(row for row in evidence.rows if "accuracy" in row)
    for place, arm in enumerate(ARMS):
        size, accuracy = measured.values(arm, "bytes") / 1024, measured.values(arm, "accuracy")
        axes.plot(size, accuracy, f"C{place}.", alpha=0.4, markersize=4)
        axes.plot(size.mean(), accuracy.mean(), f"C{place}_", markersize=22, markeredgewidth=2)
        left = arm == LORA  # where BAdam's name leaves it room
        axes.annotate(
            f"{arm} {accuracy.mean():.1f}",
            (size.mean(), accuracy.mean()),
            (-14 if left else 14, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
        )
    axes.set_xscale("log")
    axes.set_xlim(3, 600)
    axes.set_xlabel("state of the optimizer at its largest, KiB")
    axes.set_ylabel("test accuracy, %")
    axes.set_title("From upright digits to digits turned by 90 degrees", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    return drawing
