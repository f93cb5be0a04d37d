"""A task as a user would write it: a model, three datasets, a loss, a metric."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from assay import Task
from assay.bench import Budget


def _points(count: int, seed: int) -> TensorDataset:
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x.prod(1) > 0).long())


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))


def _accuracy(output, target):
    return (output.argmax(1) == target).float().mean()


task = Task(
    name="quadrants",
    model=_model,
    train=_points(200, 0),
    validation=_points(100, 1),
    test=_points(200, 2),
    loss=nn.CrossEntropyLoss(),
    metric=_accuracy,
    metric_name="accuracy",
    budget=Budget(steps=40, batch_size=20, evaluations=4),
    classes=2,
)
