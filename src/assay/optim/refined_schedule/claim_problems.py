"""What the claim trains on: real data that needs no download, and many runs side by side."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.bench.datasets import digits


@dataclass(frozen=True)
class Problem:
    """What to train; all that is computed is computed for many runs at once, along the first dimension."""

    name: str
    optimizer: str
    data: Callable[[int], tuple[Tensor, ...]]  # seed -> x, y, and perhaps x and y for testing
    start: Callable[[int], list[Tensor]]
    predict: Callable[[list[Tensor], Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]  # (runs, batch, ...), (runs, batch) -> (runs,)
    batch: int
    steps: int
    largest_rate: float
    tuning_seeds: range
    seeds: int
    gated: Collection[str] = ()  # the schedules that have so many seeds, the others being only reported; (): all
    floor: Callable[[], float] = float
    slope: Callable[[Tensor, Tensor], Tensor] | None = None  # of each term of the loss, where x enters linearly

    @property
    def rates(self) -> np.ndarray:
        """Eight learning rates, half a decade apart."""
        return self.largest_rate * 10.0 ** (np.arange(-7, 1) / 2)

    def gradients(self, params: list[Tensor], x: Tensor, y: Tensor) -> Sequence[Tensor]:
        output = self.predict(params, x)
        if self.slope is None:
            return torch.autograd.grad(self.loss(output, y).sum(), params)
        return [(self.slope(output, y)[:, None] @ x)[:, 0] / self.batch]


def train(
    problem: Problem,
    factors: np.ndarray,
    rates: np.ndarray,
    seeds: Sequence[int],
    record: Callable[[list[Tensor]], None] | None = None,
) -> list[Tensor]:
    """A run for each seed and learning rate, side by side; the seed sets data, start and batches (with replacement)."""
    x, y, *_ = (torch.stack(tensors) for tensors in zip(*map(problem.data, seeds), strict=True))
    starts = (torch.stack(tensors) for tensors in zip(*map(problem.start, seeds), strict=True))
    params = [start.repeat_interleave(len(rates), 0).requires_grad_() for start in starts]
    shape = (factors.shape[-1], problem.batch)
    draws = [torch.randint(x.shape[1], shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    chosen = torch.arange(len(seeds))[:, None], torch.stack(draws, 1)  # (steps, seeds, batch)
    batches = zip(*(values[chosen].repeat_interleave(len(rates), 1) for values in (x, y)), strict=True)
    lr = (np.broadcast_to(factors, (len(seeds), shape[0]))[:, None] * rates[:, None]).reshape(-1, shape[0])
    update = Update(problem.optimizer, params)
    for now, (xs, ys) in zip(torch.tensor(lr.T), batches, strict=True):
        grads = problem.gradients(params, xs, ys)
        if record:
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            record(params)
        update(grads, now)
    return params


class Update:
    """SGD, SGD with momentum 0.9, and AdamW with torch's defaults, for runs with a learning rate each."""

    def __init__(self, kind: str, params: list[Tensor]) -> None:
        self.kind, self.params, self.t = kind, params, 0
        self.m, self.v = ([torch.zeros_like(p) for p in params] for _ in range(2))

    @torch.no_grad()
    def __call__(self, grads: Sequence[Tensor], lr: Tensor) -> None:
        self.t += 1
        for p, g, m, v in zip(self.params, grads, self.m, self.v, strict=True):
            rate = lr.to(p.dtype).view(-1, *[1] * (p.dim() - 1))
            if self.kind == "sgd":
                p -= rate * g
            elif self.kind == "momentum":
                p -= rate * m.mul_(0.9).add_(g)
            else:
                m.lerp_(g, 0.1)
                v.lerp_(g * g, 0.001)
                step = m / (1 - 0.9**self.t) / ((v / (1 - 0.999**self.t)).sqrt_() + 1e-8)
                p -= rate * (step + 0.01 * p)


@torch.no_grad()
def last_loss(problem: Problem, params: list[Tensor], seeds: Sequence[int]) -> np.ndarray:
    """Over all training data, for each run, above the least possible where that is known."""
    x, y, *_ = (torch.stack(tensors) for tensors in zip(*map(problem.data, seeds), strict=True))
    x, y = (values.repeat_interleave(len(params[0]) // len(seeds), 0) for values in (x, y))
    return problem.loss(problem.predict(params, x), y).double().numpy() - problem.floor()


@functools.cache
def diabetes() -> tuple[Tensor, ...]:
    """Inputs and target standardized, with a constant input."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    return torch.tensor(np.c_[x, np.ones(len(x))]), torch.tensor(y)


@functools.cache
def least_absolute_error() -> float:
    """The minimum of mean |Xw - y|, by linear programming over w and the residuals' sizes."""
    from scipy.optimize import linprog

    x, y = (tensor.numpy() for tensor in diabetes())
    n, d = x.shape
    cost = np.r_[np.zeros(d), np.full(n, 1 / n)]
    sides = np.block([[x, -np.eye(n)], [-x, -np.eye(n)]])
    return linprog(cost, sides, np.r_[y, -y], bounds=[(None, None)] * d + [(0, None)] * n).fun


@functools.cache
def cancer() -> tuple[Tensor, ...]:
    """Inputs standardized, with a constant input; labels -1 and 1."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    return torch.tensor(np.c_[(x - x.mean(0)) / x.std(0), np.ones(len(x))]), torch.tensor(2.0 * y - 1)


@functools.lru_cache(maxsize=4)
def noisy_digits(seed: int) -> tuple[Tensor, ...]:
    """1,347 digits, a fifth of them with a label drawn at random from the other nine, and 450 to test with."""
    images, labels = digits()
    draw = torch.Generator().manual_seed(1000 + seed)
    order = torch.randperm(len(images), generator=draw)
    train, test = order[:1347], order[1347:]
    wrong = torch.rand(len(train), generator=draw) < 0.2
    noise = torch.randint(1, 10, (len(train),), generator=draw)
    return images[train], (labels[train] + wrong * noise) % 10, images[test], labels[test]


def mlp_start(seed: int) -> list[Tensor]:
    """64-64-64-10 with torch's initialization; weights as (in, out), biases as (1, out)."""
    torch.manual_seed(seed)
    layers = [nn.Linear(64, size) for size in (64, 64, 10)]
    return [tensor.detach() for layer in layers for tensor in (layer.weight.T, layer.bias.unsqueeze(0))]


def mlp(params: list[Tensor], x: Tensor) -> Tensor:
    for i in range(0, len(params), 2):
        x = torch.baddbmm(params[i + 1], F.relu(x) if i else x, params[i])
    return x


def cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)


def linear_problem(data: Callable[[], tuple[Tensor, ...]], **rest: Any) -> Problem:
    return Problem(
        optimizer="sgd",
        data=lambda seed: data(),
        start=lambda seed: [data()[0].new_zeros(data()[0].shape[1])],
        predict=lambda params, x: (x @ params[0].detach()[..., None])[..., 0],
        steps=1000,
        tuning_seeds=range(20),
        **rest,
    )


def digits_problem(optimizer: str, **rest: Any) -> Problem:
    return Problem(
        name=f"digits, {optimizer}",
        optimizer=optimizer,
        data=noisy_digits,
        start=mlp_start,
        predict=mlp,
        loss=cross_entropy,
        batch=16,
        steps=800,
        tuning_seeds=range(10),
        gated=("linear", "cosine", "constant"),
        **rest,
    )


_ALL = (
    linear_problem(
        diabetes,
        name="diabetes",
        loss=lambda output, y: (output - y).abs().mean(1),
        slope=lambda output, y: (output - y).sign(),
        batch=4,
        largest_rate=10**0.5,
        seeds=60,
        floor=least_absolute_error,
    ),
    digits_problem("momentum", largest_rate=10.0, seeds=16),
    digits_problem("adamw", largest_rate=10**-0.5, seeds=100),
    linear_problem(
        cancer,
        name="breast cancer",
        loss=lambda output, y: F.softplus(-y * output).mean(1),
        slope=lambda output, y: -y * torch.sigmoid(-y * output),
        batch=16,
        largest_rate=10**1.5,
        seeds=20,
    ),
)
PROBLEMS = {problem.name: problem for problem in _ALL}
