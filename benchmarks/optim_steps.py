"""What a whole training step costs under optimizers that change more than the update, and what projections cost.

    python benchmarks/optim_steps.py [--markdown FILE] [--pairs 9] [--only NAME ...] [--compile]

One thread, processor time, interleaved pairs. The model of the steps is an MLP of six layers of width 512 on batches of
256; forward, backward and update count. ``--compile`` compiles that model.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timing import command, conditions, in_turns
from torch import Tensor, nn

from assay.nn import to_implicit_sparse
from assay.optim import SAM, SSAM, BAdam, ImplicitSSAM
from assay.optim.lowrank import DCTProjector, SVDProjector

WIDTH, LAYERS, BATCH = 512, 6, 256
SGD: dict[str, Any] = {"lr": 1e-4, "momentum": 0.9}


@dataclass
class Case:
    """A candidate and what it is measured against; both are called once before."""

    name: str
    against: str
    reference: Callable[[], Any]
    candidate: Callable[[], Any]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, WIDTH, generator=draw), torch.randint(10, (BATCH,), generator=draw)


def stepping(
    make: Callable[[nn.Module], torch.optim.Optimizer],
    compile: bool = False,
    adapt: Callable[[nn.Module], Any] = lambda model: model,
    start: Callable[[Any, nn.Module], Any] = lambda optimizer, model: None,
) -> Callable[[], Any]:
    """Training steps of a model of their own: ``adapt`` changes the model first, ``start`` is called once at last."""
    model, (x, y) = network(), batch()
    adapt(model)
    optimizer = make(model)
    start(optimizer, model)
    call = torch.compile(model) if compile else model

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(call(x), y)
        loss.backward()
        return loss

    return functools.partial(optimizer.step, closure)


def steps(compile: bool) -> Iterator[Case]:
    """SAM and its sparse forms against SGD and SAM, BAdam against AdamW."""

    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), **SGD)

    def sam(model: nn.Module) -> torch.optim.Optimizer:
        return SAM(model, torch.optim.SGD, rho=0.05, **SGD)

    def fisher(optimizer: Any, model: nn.Module) -> None:
        optimizer.update_mask(model=model, loss_fn=F.cross_entropy, data=batch(), num_samples=16)

    plain, twice = stepping(sgd, compile), stepping(sam, compile)
    yield Case("SAM", "SGD", plain, twice)
    for name, options in (
        ("SSAM, half of the weights", {}),
        ("SSAM, half of the tensors", {"pattern": "structured", "norm": "active"}),
    ):
        make = functools.partial(
            lambda options, model: SSAM(model, torch.optim.SGD, rho=0.05, **options, **SGD), options
        )
        yield Case(name, "SAM", twice, stepping(make, compile, start=fisher))

    def implicit(model: nn.Module) -> torch.optim.Optimizer:
        return ImplicitSSAM(model, torch.optim.SGD, rho=0.05, **SGD)

    yield Case("implicit SSAM, 2 of 4", "SAM", twice, stepping(implicit, compile, adapt=to_implicit_sparse))

    def badam(model: nn.Module) -> torch.optim.Optimizer:
        blocks = [str(2 * i) for i in range(LAYERS + 1)]
        return BAdam(model.named_parameters(), lr=1e-4, blocks=blocks, switch_every=1, order="ascending")

    def adamw(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-4)

    whole, turns = stepping(adamw, compile), stepping(badam)
    # As many steps as there are blocks, so that each has its turn.
    rounds = [lambda call=call: [call() for _ in range(LAYERS + 1)] for call in (whole, turns)]
    yield Case("BAdam, each layer in turn", "AdamW", *rounds)


def projections() -> Iterator[Case]:
    """Choosing the subspace and projecting into it: columns of a cosine basis against singular vectors."""
    G = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    for rank, transform in itertools.product((64, 512), ("matmul", "fft")):
        svd = SVDProjector(G.shape, rank)
        dct = DCTProjector(G.shape, rank, transform=transform)
        name = f"DCT projection 1024 x 1024, {transform}, rank {rank}"
        yield Case(name, "SVD projection", functools.partial(svd.update, G), functools.partial(dct.update, G))


def table(pairs: int, only: list[str], compile: bool) -> str:
    torch.set_num_threads(1)
    lines = [conditions(pairs), "", "| what | in units of | min | median |", "|---|---|---|---|"]
    for case in itertools.chain(steps(compile), projections()):
        if only and not any(word in case.name for word in only):
            continue
        case.reference()
        case.candidate()
        found = in_turns(case.reference, case.candidate, pairs)
        lines.append(f"| {case.name} | {case.against} | {found.minimum:.3g} | {found.median:.3g} |")
    return "\n".join(lines)


if __name__ == "__main__":
    command(__doc__, table, "compile", "compile the model of the training steps", pairs=9)
