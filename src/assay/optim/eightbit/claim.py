"""Adam with states of 8 and of 32 bits at the same hyper-parameters: digits, and a language model over bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.datasets import split_digits
from assay.bench.evidence import Bench, Evidence, Rows, at_least, at_most
from assay.bench.models import ByteTransformer
from assay.bench.tasks import byte_loss, resolve_task
from assay.optim.eightbit.eightbit import Adam8bit, StableEmbedding

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Make = Callable[..., torch.optim.Optimizer]
PARTS = ("digits", "rates", "text")
SEEDS = {"digits": 20, "linear": 5, "rates": 5, "text": 4}
LR, EPOCHS, STEPS = 1e-3, 15, 300
WHOLE = 2**30  # elements of a block: one scale for a tensor
BITS_32, BITS_8, GUARDED, STABLE = "32 bits", "8 bits", "8 bits, nonzero_v", "8 bits, stable embedding"
TENSOR_WISE, LINEAR, LINEAR_TENSOR_WISE = "one scale a tensor", "linear map", "linear map, one scale a tensor"
GUESSING = 0.1


class LinearAdam8bit(Adam8bit):
    """The ablation of the map: 256 values at equal distances."""

    @staticmethod
    def map(signed: bool) -> Tensor:
        return torch.arange(-127, 129) / 128 if signed else torch.arange(256) / 255


def claim(
    bench: Bench, *, method: Make = Adam8bit, parts: Collection[str] = PARTS, seeds: Mapping[str, int] = SEEDS
) -> Evidence:
    """Accuracy and loss of 8 against 32 bits, bytes of state, and what the map and the blocks contribute.

    Nothing is tuned: both sides take Adam's usual rate of 1e-3. Part "rates" shows higher ones and gates nothing. A
    network that ends without finite weights has the accuracy of guessing.
    """
    rows, checks, notes = Rows(), [], []
    small = functools.partial(method, min_8bit_size=256)
    arms = {
        BITS_32: torch.optim.Adam,
        BITS_8: small,
        TENSOR_WISE: functools.partial(small, block_size=WHOLE),
        LINEAR: functools.partial(LinearAdam8bit, min_8bit_size=256),
        LINEAR_TENSOR_WISE: functools.partial(LinearAdam8bit, min_8bit_size=256, block_size=WHOLE),
        GUARDED: functools.partial(small, nonzero_v=True),
    }
    if "digits" in parts:
        run = functools.partial(digits, arms, LR, bench.scale(EPOCHS))
        found = bench.rows(run, [BITS_32, BITS_8, TENSOR_WISE], bench.seeds(seeds["digits"]))
        few = bench.seeds(min(seeds["digits"], seeds["linear"]))
        found += bench.rows(run, [LINEAR, LINEAR_TENSOR_WISE], few)
        size = found.ratio(BITS_8, BITS_32, "bytes")[0]
        checks.append(
            at_least("digits: accuracy, 8 bits - 32 bits", found.difference(BITS_8, BITS_32, "accuracy"), -0.005)
        )
        checks.append(at_most("digits: bytes of state, 8 bits / 32 bits", size, 0.27))
        for arm in (TENSOR_WISE, LINEAR, LINEAR_TENSOR_WISE):
            other = found.values(arm, "accuracy")
            ahead = found.values(BITS_8, "accuracy")[: len(other)] - other
            checks.append(at_least(f"digits: accuracy, 8 bits - {arm}", ahead, 0.02))
            notes.append(diverged(found, arm, "digits, rate 0.001"))
        rows += found
    if "rates" in parts:
        for lr in (3e-3, 1e-2):
            run = functools.partial(digits, arms, lr, bench.scale(EPOCHS))
            found = bench.rows(run, [BITS_32, BITS_8, GUARDED], bench.seeds(seeds["rates"]))
            notes += [diverged(found, arm, f"digits, rate {lr}") for arm in (BITS_32, BITS_8, GUARDED)]
            rows += [row | {"variant": f"{row['variant']}, rate {lr}"} for row in found]
    if "text" in parts:
        arms = {BITS_32: torch.optim.Adam, BITS_8: method, STABLE: method}
        found = bench.rows(functools.partial(text, arms, bench.scale(STEPS)), arms, bench.seeds(seeds["text"]))
        checks.append(at_most("text: loss, 8 bits - 32 bits", found.difference(BITS_8, BITS_32, "loss"), 0.02))
        more = found.difference(STABLE, BITS_8, "loss")
        checks.append(at_most("text: loss, stable embedding - embedding, both with 8 bits", more, 0.02))
        for arm in arms:
            losses = found.values(arm, "loss")
            notes.append(
                f"text, {arm}: loss {losses.mean():.3f}, standard deviation over seeds {losses.std(ddof=1):.4f}"
            )
        rows += [row | {"variant": f"text: {row['variant']}"} for row in found]
    return Evidence(rows, checks, notes)


def diverged(rows: Rows, arm: str, where: str) -> str:
    accuracy = rows.values(arm, "accuracy")
    count = int((~rows.values(arm, "finite").astype(bool)).sum())
    return f"{where}, {arm}: accuracy {100 * accuracy.mean():.1f} %, {count} of {len(accuracy)} seeds diverged"


def digits(arms: dict[str, Make], lr: float, epochs: int, variant: str, seed: int) -> dict[str, Any]:
    """Train an MLP 64-128-128-10 on half of the digits; test accuracy on the other half, and bytes of state."""
    train, test = split_digits(1000 + seed, train=898)
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(64, 128), nn.ReLU()),
        *(nn.Linear(128, 128), nn.ReLU()),
        nn.Linear(128, 10),
    )
    optimizer = arms[variant](model.parameters(), lr=lr)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(len(train[0]), generator=order).split(64):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(train[0][chosen]), train[1][chosen])
            loss.backward()
            optimizer.step()
        if not loss.isfinite():
            break
    with torch.no_grad():
        logits = model(test[0])
    finite = bool(logits.isfinite().all())
    accuracy = (logits.argmax(1) == test[1]).double().mean().item() if finite else GUESSING
    return {"accuracy": accuracy, "finite": finite, "bytes": state_bytes(optimizer)}


def text(arms: dict[str, Make], steps: int, variant: str, seed: int) -> dict[str, Any]:
    """Train a transformer of two layers, width 96, on source text; mean cross-entropy in nats on another file."""
    task = resolve_task("text")
    inputs, targets = task.train.tensors
    torch.manual_seed(seed)
    model = ByteTransformer(64, width=96)
    if variant == STABLE:
        model.embedding = StableEmbedding(256, 96)
    optimizer = arms[variant](model.parameters(), lr=LR)
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (8,), generator=order)
        optimizer.zero_grad()
        byte_loss(model(inputs[chosen]), targets[chosen]).backward()
        optimizer.step()
    with torch.no_grad():
        inputs, targets = task.test.tensors
        loss = byte_loss(model(inputs), targets).item()
    return {"loss": loss, "bytes": state_bytes(optimizer)}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors of an optimizer's state."""
    return sum(x.nbytes for state in optimizer.state.values() for x in state.values())


def figure(evidence: Evidence) -> Figure:
    """Every run: accuracy on digits at three rates, and the language model's loss."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 4.2), layout="constrained")
    left, right = drawing.subplots(1, 2, width_ratios=(2, 1))
    for axes, metric, scale in ((left, "accuracy", 100), (right, "loss", 1)):
        rows = [row for row in evidence.rows if metric in row]
        variants = list(dict.fromkeys(row["variant"] for row in rows))
        for height, variant in enumerate(variants):
            values = [scale * row[metric] for row in rows if row["variant"] == variant]
            axes.plot(values, [height] * len(values), "C0o" if "32 bits" in variant else "C1o", alpha=0.5)
        axes.set_yticks(
            range(len(variants)), [variant.removeprefix("text: ") for variant in variants], fontsize="small"
        )
        axes.invert_yaxis()
    left.set_xlabel("test accuracy on digits, %; 10 where it diverged")
    right.set_xlabel("loss on text, nats a byte")
    return drawing
