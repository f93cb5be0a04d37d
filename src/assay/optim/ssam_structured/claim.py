"""Digits with wrong labels: SAM and its sparse patterns, explicit and implicit; what they save, where they point."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.datasets import split_digits
from assay.bench.evidence import Bench, Evidence, Rows, at_least, at_most
from assay.bench.models import accuracy
from assay.nn import to_implicit_sparse
from assay.optim import SAM, SSAM
from assay.optim.ssam.claim import noisy_digits, shuffled
from assay.optim.ssam_structured.ssam_structured import ImplicitSSAM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAMPLES = 64
PATTERNS: dict[str, dict[str, Any]] = {
    "unstructured": {"pattern": "unstructured"},
    "tensors": {"pattern": "structured"},
    "channels": {"pattern": "structured", "granularity": "channel"},
    "2:4": {"pattern": "nm"},
}
SPARSE = (*PATTERNS, "implicit 2:4")
EPOCHS = {"MLP": 60, "CNN": 30}
RHO = {"MLP": 0.4, "CNN": 0.1}
SEEDS = {"MLP": 4, "CNN": 5}
MORE = {"CNN": (("SGD", "SAM", "2:4"), 10)}
"""Five seeds left 2:4 on the CNN open: it is read from ten."""
PARTS = ("accuracy", "time", "direction")


def claim(
    bench: Bench,
    *,
    explicit: Callable[..., SAM] = SSAM,
    implicit: Callable[..., SAM] = ImplicitSSAM,
    parts: Collection[str] = PARTS,
) -> Evidence:
    """Test accuracy, in points; time of a step; cosine of the implicit perturbation with SAM's.

    Each form was given its own best radius, which is the same for all on each network: of {0.2, 0.4, 0.8} on seeds 1
    and 2 for the MLP, of {0.05, 0.1, 0.2, 0.4} on seed 1 for the CNN.
    """
    rows, checks, notes = Rows(), [], []
    if "accuracy" in parts:
        for network, seeds in SEEDS.items():
            run = functools.partial(train, network, explicit=explicit, implicit=implicit)
            run = functools.partial(run, epochs=bench.scale(EPOCHS[network]))
            found = bench.rows(run, ("SGD", "SAM", *SPARSE), bench.seeds(seeds))
            variants, count = MORE.get(network, ((), seeds))
            found += bench.rows(run, variants, bench.seeds(count)[len(bench.seeds(seeds)) :])
            for variant in SPARSE:
                for baseline, bound in (("SGD", 0.0), ("SAM", -1.5)):
                    name = f"test accuracy, {network}, {variant} - {baseline}, points"
                    checks.append(at_least(name, gain(found, variant, baseline), bound))
            for variant in ("SGD", "SAM", *SPARSE):
                notes.append(f"{network}, {variant}: test accuracy {found.values(variant, 'accuracy').mean():.2f}")
            rows += Rows({**row, "variant": f"{network}, {row['variant']}"} for row in found)
    if "time" in parts:
        found = bench.rows(
            functools.partial(seconds, explicit=explicit, steps=bench.scale(15, 3)), ["time"], bench.seeds(6)
        )
        checks.append(at_most("time of a step, tensors / SAM", found.values("time", "active"), 0.93))
        notes.append(
            f"time of a step with the norm of the whole gradient / SAM: {found.values('time', 'full').mean():.2f}"
        )
        rows += found
    if "direction" in parts:
        run = functools.partial(cosines, implicit=implicit, epochs=bench.scale(10, 2))
        found = bench.rows(run, ["direction"], bench.seeds(5))
        checks.append(at_least("cosine of implicit and SAM's perturbation", found.values("direction", "cosine"), 0.5))
        checks.append(at_most("largest such cosine", found.values("direction", "largest").max(), 0.999))
        rows += found
    return Evidence(rows, checks, notes)


def gain(rows: Rows, variant: str, baseline: str) -> np.ndarray:
    """Accuracy gained, paired over the seeds that both have: the first ones."""
    values, others = (rows.values(name, "accuracy") for name in (variant, baseline))
    shared = min(len(values), len(others))
    return values[:shared] - others[:shared]


def network_of(network: str) -> nn.Module:
    if network == "MLP":
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
    )


def train(
    network: str, variant: str, seed: int, *, explicit: Any = SSAM, implicit: Any = ImplicitSSAM, epochs: int,
    rho: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Half of the digits, 30 % of their labels wrong, to train on; accuracy on the other half."""
    (x, y), (x_test, y_test) = noisy_digits(seed)
    torch.manual_seed(seed)
    model, options = network_of(network), {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    rho = RHO[network] if rho is None else rho
    optimizer: Any
    if variant == "SGD":
        optimizer = torch.optim.SGD(model.parameters(), **options)
    elif variant == "SAM":
        optimizer = SAM(model, torch.optim.SGD, rho, **options)
    elif variant in PATTERNS:
        optimizer = explicit(model, torch.optim.SGD, rho, seed=seed, **PATTERNS[variant], **options)
    else:
        model = to_implicit_sparse(model)
        optimizer = implicit(model, torch.optim.SGD, rho, seed=seed, **options)
    batches = [list(shuffled(len(x), seed, epoch)) for epoch in range(epochs)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, sum(map(len, batches)))
    for epoch in batches:
        if variant in SPARSE:
            optimizer.update_mask(model=model, loss_fn=F.cross_entropy, data=(x, y), num_samples=SAMPLES)
        for index in epoch:
            optimizer.step(closure_of(optimizer, model, x[index], y[index]))
            schedule.step()
    return {"accuracy": 100 * accuracy(model, x_test, y_test)}


def closure_of(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def wide() -> nn.Module:
    hidden = [layer for _ in range(6) for layer in (nn.Linear(512, 512), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(512, 10))


def seconds(variant: str, seed: int, *, explicit: Callable[..., SAM], steps: int) -> dict[str, Any]:
    """Processor time of a step in units of SAM's, taken in turn: six layers of width 512, batches of 256."""
    (x, y), _ = split_digits(1000 + seed)
    torch.manual_seed(seed)
    x = (x @ torch.randn(64, 512) / 8).relu()  # as wide as the network
    start = wide().state_dict()
    took: dict[str, list[float]] = {"SAM": [], "active": [], "full": []}
    runs = {}
    for name in took:
        model = wide()
        model.load_state_dict(start)
        if name == "SAM":
            optimizer = SAM(model, torch.optim.SGD, 0.1, lr=0.1)
        else:
            optimizer = explicit(model, torch.optim.SGD, 0.1, pattern="structured", norm=name, seed=seed, lr=0.1)
            optimizer.update_mask(model=model, loss_fn=F.cross_entropy, data=(x, y), num_samples=SAMPLES)
        runs[name] = optimizer, closure_of(optimizer, model, x[:256], y[:256])
    for _ in range(steps):
        for name, (optimizer, closure) in runs.items():
            begin = time.process_time()
            optimizer.step(closure)
            took[name].append(time.process_time() - begin)
    median = {name: float(np.median(values)) for name, values in took.items()}
    return {"SAM, seconds": median["SAM"], **{name: median[name] / median["SAM"] for name in ("active", "full")}}


def cosines(variant: str, seed: int, *, implicit: Callable[..., SAM], epochs: int) -> dict[str, Any]:
    """Cosine of the implicit perturbation with SAM's at the same weights and batch, along an implicit run."""
    (x, y), _ = noisy_digits(seed)
    torch.manual_seed(seed)
    model = to_implicit_sparse(network_of("MLP"))
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    optimizer = implicit(model, torch.optim.SGD, RHO["MLP"], seed=seed, **options)
    found = []
    for epoch in range(epochs):
        optimizer.update_mask(model=model, loss_fn=F.cross_entropy, data=(x, y), num_samples=SAMPLES)
        for step, index in enumerate(shuffled(len(x), seed, epoch)):
            closure = closure_of(optimizer, model, x[index], y[index])
            if step == 0:
                with optimizer.first_pass():
                    closure()
                implied = torch.cat([p.grad.flatten() for p in model.parameters()])
                closure()
                exact = torch.cat([p.grad.flatten() for p in model.parameters()])
                found.append(F.cosine_similarity(implied, exact, dim=0).item())
            optimizer.step(closure)
    return {"cosine": float(np.mean(found)), "largest": max(found), "curve": [round(value, 4) for value in found]}


def figure(evidence: Evidence) -> Figure:
    """Test accuracy of every form: each seed a dot, the mean a line."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7, 3.5), layout="constrained")
    for axes, network in zip(drawing.subplots(1, 2), SEEDS, strict=True):
        variants = ("SGD", "SAM", *SPARSE)
        for i, variant in enumerate(variants):
            values = [row["accuracy"] for row in evidence.rows if row["variant"] == f"{network}, {variant}"]
            axes.plot(values, [i] * len(values), ".", color="C0" if variant in SPARSE else "C1", alpha=0.6)
            axes.plot([np.mean(values)], [i], "|", color="black", markersize=14)
        axes.set_yticks(range(len(variants)), variants)
        axes.invert_yaxis()
        axes.set_xlabel("test accuracy, %")
        axes.set_title(network, fontsize="medium")
    return drawing
