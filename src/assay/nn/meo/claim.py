"""Which package of the standard library a piece of source is from: feed-forward experts mixed, merged, or only one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from assay.bench.datasets import Examples
from assay.bench.evidence import Bench, Evidence, Rows, at_least, at_most
from assay.nn import swap
from assay.nn.meo.meo import MEOLinear, MoELinear

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTH, WIDTH, HIDDEN, EXPERTS = 96, 48, 96, 8
STEPS, BATCH, COEFFICIENT = 250, 32, 0.01
DENSE, MOE, MERGED, SINGLE, TOKEN = "dense", "MoE, k = 4", "MEO, k = 4", "MEO, k = 1", "MEO token, k = 4"
BEST = {DENSE: 3e-3, MOE: 1e-3, MERGED: 3e-3, SINGLE: 3e-3, TOKEN: 3e-3}


def claim(
    bench: Bench, *, method: Callable[..., nn.Module] = MEOLinear, seeds: int = 6, cost_only: bool = False
) -> Evidence:
    """Test accuracy after equally many steps, and what the feed-forward layers cost.

    Each arm has the learning rate of 0.001, 0.003, 0.01 that is best on seeds 0 and 1.
    """
    arms = (MOE, MERGED) if cost_only else tuple(BEST)
    rows = bench.rows(functools.partial(measure, method=method, bench=bench), arms, bench.seeds(seeds))

    def points(variant: str, baseline: str) -> Any:
        return 100 * rows.difference(variant, baseline, "accuracy")

    cost = rows.ratio(MERGED, MOE, "flops").max()
    checks = [at_most("FLOPs of the feed-forward layers, MEO / MoE, k = 4", cost, 0.45)]
    if cost_only:
        return Evidence(rows, checks)
    checks += [
        at_least("accuracy, MEO - MoE, k = 4, points", points(MERGED, MOE), -1.0),
        at_least("accuracy, MEO token - MEO, k = 4, points", points(TOKEN, MERGED), -0.5),
        at_least("accuracy, MEO k = 4 - k = 1, points", points(MERGED, SINGLE), -0.5),
    ]
    return Evidence(rows, checks, [note(rows, arm) for arm in BEST])


def note(rows: Rows, arm: str) -> str:
    accuracy, flops = rows.values(arm, "accuracy"), rows.values(arm, "flops")
    return f"{arm}: accuracy {accuracy.mean():.1%}, {flops.mean() / 1e6:.2f} MFLOPs per sequence"


def measure(
    arm: str, seed: int, *, method: Callable[..., nn.Module], bench: Bench, lr: float | None = None
) -> dict[str, float]:
    (x, y), (test_x, test_y) = pieces()
    torch.manual_seed(seed)
    model = Classifier(arm, method)
    optimizer = torch.optim.Adam(model.parameters(), lr or BEST[arm])
    order = torch.Generator().manual_seed(seed)
    for _ in range(bench.scale(STEPS)):
        chosen = torch.randint(len(x), (BATCH,), generator=order)
        optimizer.zero_grad()
        balance = 0.0
        loss = F.cross_entropy(model(x[chosen]), y[chosen])
        for layer in (model.block.linear1, model.block.linear2):
            balance = balance + getattr(layer, "aux_loss", 0.0)
        (loss + COEFFICIENT * balance).backward()
        optimizer.step()
    model.eval()
    test_x, test_y = (part[:: 10 if bench.quick else 1] for part in (test_x, test_y))
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in test_x.split(300)])
    return {"accuracy": (found == test_y).double().mean().item(), "flops": feed_forward_flops(model, x[:BATCH])}


class Classifier(nn.Module):
    """One transformer layer over bytes, and the mean of its outputs."""

    def __init__(self, arm: str, method: Callable[..., nn.Module]):
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(1, LENGTH, WIDTH))
        self.block = nn.TransformerEncoderLayer(
            WIDTH, 4, HIDDEN, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 6))
        if arm != DENSE:
            layer, options = (MoELinear, {"level": "token"}) if arm == MOE else (method, {})
            if arm == TOKEN:
                options = {"level": "token", "reduce_factor": 16}
            swap(self.block, nn.Linear, layer, num_experts=EXPERTS, k=1 if arm == SINGLE else 4, **options)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(tokens) + self.position).mean(1))


def feed_forward_flops(model: Classifier, tokens: Tensor) -> float:
    """Per sequence, in evaluation."""
    x, hidden = torch.randn(*tokens.shape, WIDTH), torch.randn(*tokens.shape, HIDDEN)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.block.linear1(x)
        model.block.linear2(hidden)
    return counter.get_total_flops() / len(tokens)


@functools.cache
def pieces() -> tuple[Examples, Examples]:
    """Pieces of 96 bytes from six packages, 1,000 of each to train on and 250 of each from other files to test on."""
    packages = ["asyncio", "email", "xml", "unittest", "encodings", "tkinter" if find_spec("tkinter") else "json"]
    draw = torch.Generator().manual_seed(0)
    found: list[list[Tensor]] = [[], [], [], []]
    for label, package in enumerate(packages):
        folder = Path(functools.__file__).parent / package
        files = [path.read_bytes() for path in sorted(folder.rglob("*.py")) if "test" not in path.parts]
        files = [files[i] for i in torch.randperm(len(files), generator=draw).tolist()]
        held_out, size = [], 0
        while size < sum(map(len, files)) / 4:
            held_out.append(files.pop())
            size += len(held_out[-1])
        for place, (source, count) in enumerate(((files, 1000), (held_out, 250))):
            data = torch.frombuffer(bytearray(b"".join(source)), dtype=torch.uint8)
            starts = torch.randint(len(data) - LENGTH, (count, 1), generator=draw)
            found[2 * place].append(data[starts + torch.arange(LENGTH)].long())
            found[2 * place + 1].append(torch.full((count,), label))
    x, y, test_x, test_y = map(torch.cat, found)
    return (x, y), (test_x, test_y)


def figure(evidence: Evidence) -> Figure:
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6, 3.5), layout="constrained")
    axes = drawing.subplots()
    found = {row["variant"] for row in evidence.rows}
    for arm, style in zip(BEST, "osD^v", strict=True):
        if arm not in found:
            continue
        accuracy, flops = 100 * evidence.rows.values(arm, "accuracy"), evidence.rows.values(arm, "flops") / 1e6
        axes.errorbar(flops.mean(), accuracy.mean(), accuracy.std(), fmt=style, capsize=3, label=arm)
    axes.set_xlabel("MFLOPs of the feed-forward layers per sequence")
    axes.set_ylabel("test accuracy, %")
    axes.set_title("Package of a piece of source, mean and spread over seeds", fontsize="medium")
    axes.set_xlim(left=0)
    axes.legend(fontsize="small")
    return drawing
