from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from assay._processes import run_on_two
from assay.optim import GradNormRecorder


def with_gradients(*gradients: torch.Tensor | None) -> list[torch.Tensor]:
    params = []
    for g in gradients:
        p = torch.zeros(3 if g is None else g.shape, dtype=torch.float32 if g is None else g.dtype, requires_grad=True)
        p.grad = g
        params.append(p)
    return params


def test_the_norm_is_that_of_all_gradients_together():
    rng = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in [(3, 4), (5,), ()]]
    flat = torch.cat([g.flatten() for g in grads])
    for norm, expected in [("l1", flat.abs().sum()), ("l2", flat.square().sum().sqrt())]:
        recorder = GradNormRecorder(with_gradients(None, *grads), norm)
        recorder.record()
        assert recorder.norms.tolist() == pytest.approx([expected.item()], rel=1e-14)


def test_gradients_of_all_kinds():
    dense = torch.tensor([3.0, -4.0])
    kinds = {
        "half": dense.half() * 8192,  # the square of it is infinite in half precision
        "complex": torch.tensor([3.0 - 4.0j]),
        "sparse": torch.sparse_coo_tensor([[1, 3, 1]], [2.0, -4.0, 1.0], (9,), check_invariants=True),
        "empty": torch.zeros(0),
    }
    for norm, size in (("l1", 7.0), ("l2", 5.0)):
        for kind, grad in kinds.items():
            recorder = GradNormRecorder(with_gradients(grad), norm)
            recorder.record()
            assert recorder.norms.tolist() == [{"half": 8192 * size, "empty": 0.0}.get(kind, size)]
        recorder = GradNormRecorder(with_gradients(*kinds.values(), dense.double()), norm)
        recorder.record()
        sizes = np.array([8192 * size, size, size, size])
        assert recorder.norms[0] == pytest.approx(sizes.sum() if norm == "l1" else np.linalg.norm(sizes), rel=1e-7)


def test_it_sees_what_the_optimizer_sees():
    (p,) = with_gradients(torch.tensor([30.0, 40.0]))
    recorder = GradNormRecorder([p])
    torch.nn.utils.clip_grad_norm_([p], 1.0)
    recorder.record()
    assert recorder.norms[0] == pytest.approx(1.0, rel=1e-6)
    assert p.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-6)


def test_a_long_record_survives_a_restart_and_a_file(tmp_path):
    (p,) = with_gradients(torch.zeros(1, dtype=torch.float64))
    recorder = GradNormRecorder([p], "l1")
    values = [0.1 + k for k in range(600)] + [float("inf"), float("nan")]
    for k, value in enumerate(values):
        if k == 300:
            state = json.loads(json.dumps(recorder.state_dict()))
            recorder = GradNormRecorder([p], "l1")
            recorder.load_state_dict(state)
        p.grad.fill_(value)
        recorder.record()
    np.testing.assert_array_equal(recorder.norms, values)
    recorder.save(tmp_path / "norms.json")
    other = GradNormRecorder([p], "l1")
    other.load(tmp_path / "norms.json")
    np.testing.assert_array_equal(other.norms, [*values[:600], np.nan, np.nan])
    strict = json.loads((tmp_path / "norms.json").read_text(), parse_constant=pytest.fail)
    assert strict["norm"] == "l1" and strict["norms"][:600] == values[:600]


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="params is empty"):
        GradNormRecorder([])
    with pytest.raises(ValueError, match="norm = 'l3' is out of range"):
        GradNormRecorder(with_gradients(None), "l3")
    with pytest.raises(RuntimeError, match="between backward"):
        GradNormRecorder(with_gradients(None)).record()
    with pytest.raises(ValueError, match="'l1' norms for a recorder with norm = 'l2'"):
        GradNormRecorder(with_gradients(None)).load_state_dict({"norm": "l1", "norms": []})


TWO_PROCESSES = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from assay.optim import GradNormRecorder
mesh = init_device_mesh("cpu", (2,))
values = [torch.arange(1.0, 6.0, dtype=torch.float64) * k for k in (1, 2, 3, 4)]
params = [distribute_tensor(torch.zeros_like(values[0]), mesh, [place]).requires_grad_()
          for place in (Shard(0), Replicate(), Shard(0))]
for p, value in zip(params, values):
    p.grad = distribute_tensor(value, mesh, p.placements)
params[2].grad = DTensor.from_local(values[2] * (rank + 1) / 3, mesh, [Partial()])
params.append(torch.zeros(5, dtype=torch.float64, requires_grad=True))  # as under DDP: the same everywhere
params[3].grad = values[3]
unused = torch.distributed.tensor.zeros(5, device_mesh=mesh, placements=[Shard(0)]).requires_grad_()
for norm in ("l1", "l2"):
    recorder = GradNormRecorder([*params, unused], norm)
    recorder.record()
    expected = torch.cat(values).norm(p=int(norm[1])).item()
    assert abs(recorder.norms[0] / expected - 1) < 1e-12, (norm, recorder.norms, expected)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_shards_are_summed_and_replicas_counted_once(tmp_path):
    run_on_two(TWO_PROCESSES, tmp_path)
