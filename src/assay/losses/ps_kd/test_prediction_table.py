"""Where the predictions live: in memory, in a file, in a copy of the model, over several processes, in a checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assay._processes import run_on_two
from assay.losses import PSKD, soft_target_cross_entropy
from assay.losses.ps_kd.test_ps_kd import EXACT, C, N, examples, network, progressive, table_step, train


@pytest.mark.parametrize("options", [{}, {"topk": 2}, {"dtype": torch.float16}, {"dtype": torch.bfloat16, "topk": 3}])
def test_a_file_is_a_table_like_the_one_in_memory(tmp_path, options):
    (tmp_path / "p").write_bytes(b"\xff" * 99)  # of something else, and of another size
    stores = [PSKD(N, C, total_epochs=4, store=store, **options) for store in ("memory", tmp_path / "p")]
    for k in range(8):
        torch.manual_seed(k)
        logits = torch.randn(6, C)
        losses = [table_step(criterion, k, logits) for criterion in stores]
        torch.testing.assert_close(*losses, **EXACT)
    torch.testing.assert_close(*(s.table.read(torch.arange(N)) for s in stores), **EXACT)
    values = stores[0].table.values
    content = bytearray((tmp_path / "p").read_bytes())
    found = torch.frombuffer(content, dtype=values.dtype, count=values.numel())
    assert torch.equal(found.view_as(values), values)


def test_a_file_resumes_into_another_file(tmp_path):
    one, other = (PSKD(N, C, total_epochs=4, store=tmp_path / name) for name in "ab")
    table_step(one, 0, torch.randn(6, C))
    state = copy.deepcopy(one.state_dict())
    table_step(one, 2, torch.randn(6, C))
    other.load_state_dict(state)
    assert torch.equal(other.table.values, state["table.values"])
    assert (tmp_path / "b").stat().st_size == N * C * 4


def test_the_table_stays_where_it_is_when_the_module_moves():
    criterion = PSKD(N, C, total_epochs=1)
    nn.Sequential(criterion).half().to("meta")
    assert criterion.table.values.dtype == torch.float32 and criterion.table.values.device.type == "cpu"


def test_a_frozen_copy_of_the_model_is_the_teacher():
    model, (inputs, labels) = nn.Sequential(network(), nn.Dropout(0.5)), examples()
    criterion = PSKD(N, C, total_epochs=3, store="model")
    kinds = []
    for epoch in (1, 2, 3):
        criterion.set_epoch(epoch, model)
        before = copy.deepcopy(model).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)
        criterion.set_epoch(epoch, model)  # the same epoch: the copy stays
        criterion.set_epoch(epoch)
        soft = criterion.targets(labels, inputs)
        hard = F.one_hot(labels, C).double()
        expected = (
            hard if epoch == 1 else 0.8 * epoch / 3 * F.softmax(before(inputs), -1) + (1 - 0.8 * epoch / 3) * hard
        )
        torch.testing.assert_close(soft.double(), expected)
        logits = model(inputs)
        torch.testing.assert_close(
            criterion.loss(logits, labels, inputs), soft_target_cross_entropy(logits, soft.double())
        )
        kinds.append(type(criterion.get_extra_state()["teacher"]).__name__)
    assert kinds[0] == "NoneType" and not list(criterion.parameters()) and model.training
    pair = PSKD(N, 3, total_epochs=2, store="model")
    pair.set_epoch(2, nn.Bilinear(3, 3, 3).double())
    assert pair.targets(labels % 3, (inputs, inputs)).shape == (N, 3)


def test_a_teacher_needs_its_model():
    criterion = PSKD(N, C, total_epochs=3, store="model")
    with pytest.raises(ValueError, match=r"set_epoch\(epoch, model\)"):
        criterion.set_epoch(2)
    with pytest.raises(RuntimeError, match=r"set_epoch\(epoch, model\)"):
        criterion.update(torch.zeros(2, C), torch.arange(2))
    criterion.set_epoch(2, network())
    resumed = PSKD(N, C, total_epochs=3, store="model")
    resumed.load_state_dict(criterion.state_dict())
    inputs, labels = examples()
    with pytest.raises(RuntimeError, match="no model yet"):
        resumed.targets(labels, inputs)
    with pytest.raises(ValueError, match="indices is its input"):
        criterion.targets(labels[:-1], inputs)


def test_a_state_of_another_size_is_refused():
    state = PSKD(N, C, total_epochs=1).state_dict()
    for size in ((N + 1, C), (N, C + 1)):
        with pytest.raises(ValueError, match=r"num_samples, num_classes = \[12, 4\] in the state"):
            PSKD(*size, total_epochs=1).load_state_dict(state)
    with pytest.raises(RuntimeError, match="classes"):
        PSKD(N, C, total_epochs=1, topk=2).load_state_dict(state)


def test_resuming_in_the_middle_of_training_is_exact():
    criterion = PSKD(N, C, total_epochs=6)
    *_, straight = train(progressive(criterion))
    first, second = PSKD(N, C, total_epochs=6), PSKD(N, C, total_epochs=6)
    steps = iter(range(99))

    def interrupted(logits, labels, indices, epoch):
        step = next(steps)
        if step == 10:  # the second batch of the fourth epoch
            second.load_state_dict(first.state_dict())
        return progressive(first if step < 10 else second)(logits, labels, indices, epoch)

    *_, resumed = train(interrupted)
    torch.testing.assert_close(straight.state_dict(), resumed.state_dict(), **EXACT)
    assert torch.equal(criterion.table.values, second.table.values)


TWO_PROCESSES = """
from assay.losses import PSKD
for options in ({}, {"topk": 2, "dtype": torch.float16}, {"dtype": torch.bfloat16}):
    both, alone = (PSKD(12, 4, total_epochs=2, **options) for _ in range(2))
    torch.manual_seed(0)
    for step in range(5):
        logits, labels = torch.randn(7, 4), torch.randint(4, (7,))
        indices = torch.randperm(12)[:7]
        indices[6] = indices[0]  # as DistributedSampler pads
        if step == 3:
            labels[:4] = -100  # the first process has nothing to store
        mine = slice(0, 4) if rank == 0 else slice(4, 7)
        mix = {"partner": torch.arange(4)} if step == 4 and rank == 0 else {}
        both.loss(logits[mine], labels[mine], indices[mine], **mix)
        kept = (labels != -100) & (torch.arange(7) >= (4 if step == 4 else 0))
        size, dist.get_world_size = dist.get_world_size, lambda group=None: 1
        alone.update(logits[kept], indices[kept])
        dist.get_world_size = size
    for ours, expected in zip(both.buffers(), alone.buffers(), strict=True):
        assert torch.equal(ours, expected), (rank, options, ours, expected)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_processes_exchange_their_predictions(tmp_path):
    run_on_two(TWO_PROCESSES, tmp_path)
