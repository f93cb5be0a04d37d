"""Rules on sharded and replicated parameters: two processes on this machine give what one would."""

import importlib

import pytest
import torch
import torch.distributed as dist
from torch import nn

from assay import catalogue
from assay._processes import run_on_two


def offered():
    """(optimizer, options) that the rooms' test files list under ``DISTRIBUTED``."""
    for card in catalogue.search(family="optim"):
        test = importlib.import_module(f"{card.module.rpartition('.')[0]}.test_{card.folder.name}")
        yield from getattr(test, "DISTRIBUTED", [])


def network() -> nn.Module:
    torch.manual_seed(0)
    # 7 rows do not divide by 2: one process holds more than the other.
    return nn.Sequential(nn.Linear(6, 7, bias=False), nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, 4)).double()


def train(model: nn.Module, make, options, inputs: torch.Tensor, steps: int = 5) -> nn.Module:
    optimizer = make(model.parameters(), **options)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return model


def whole_batch() -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def check(rank: int, kind: str) -> None:
    """This process's part of training on two, for every optimizer."""
    for make, options in offered():
        expected = train(network(), make, options, whole_batch()).state_dict()
        part = whole_batch().chunk(2)[rank]
        if kind == "ddp":
            model = train(nn.parallel.DistributedDataParallel(network()), make, options, part).module
            found = model.state_dict()
        else:
            from torch.distributed.fsdp import fully_shard

            mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
            model = train(fully_shard(network(), mesh=mesh), make, options, part)
            found = {key: value.full_tensor() for key, value in model.state_dict().items()}
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-11, msg=f"{make} {options} {key}")


@pytest.mark.parametrize("kind", ["fsdp2", "ddp"])
def test_two_processes_are_one(kind, tmp_path):
    run_on_two(f"from assay.optim.test_distributed import check\ncheck(rank, {kind!r})", tmp_path)
