from __future__ import annotations

from assay._processes import run_on_two

SHARDED = """
import functools
from assay.losses import decoupled_softmax, log_soft_topk, multilabel_bce, multilabel_softmax, soft_topk, soft_topk_loss

draw = torch.Generator().manual_seed(0)
scores = 2 * torch.randn(5, 9, generator=draw, dtype=torch.float64)
indices = torch.stack([torch.randperm(9, generator=draw)[:4] for _ in range(5)])
values = torch.rand(5, 4, generator=draw, dtype=torch.float64)
values = values * (torch.arange(4) < torch.tensor([4, 0, 1, 2, 3])[:, None])
dense = torch.zeros(5, 9, dtype=torch.float64).scatter_add(1, indices, values)
here = slice(0, 6) if rank == 0 else slice(6, 9)
half = functools.partial(soft_topk_loss, n_iter=60)
cases = [
    (decoupled_softmax, {}), (decoupled_softmax, {"temperature": 0.5, "normalize": "sum"}),
    (multilabel_softmax, {}), (multilabel_bce, {}), (multilabel_bce, {"normalize": "sum"}),
    (half, {"k": 2, "sample_positives": False}), (half, {"k": "num_pos"}),
    (half, {"k": torch.tensor([5, 1, 2, 3, 4]), "sample_positives": False}),
]
sampled = [
    (decoupled_softmax, {"num_sampled_positives": 2}), (half, {"k": 2}), (half, {"k": torch.tensor([2, 1, 1, 1, 3])}),
]
for number, (loss, options) in enumerate(cases + sampled):
    drawn = number >= len(cases)
    for reduction in ("mean", "none"):
        for target, own in (((indices, values), (indices, values)), (dense, dense[:, here])):
            if drawn and target is dense:
                try:
                    loss(scores[:, here], own, group=dist.group.WORLD, **options)
                    raise AssertionError("a dense slice was sampled")
                except ValueError as error:
                    assert "where positives are sampled" in str(error)
                continue
            seeds = {"generator": torch.Generator().manual_seed(7)} if drawn else {}
            whole = scores.clone().requires_grad_()
            expected = loss(whole, target, reduction=reduction, **options, **seeds)
            expected.pow(2).sum().backward()
            # Rank 0's draws count.
            seeds = {"generator": torch.Generator().manual_seed(7 + rank)} if drawn else {}
            part = scores[:, here].clone().requires_grad_()
            found = loss(part, own, reduction=reduction, group=dist.group.WORLD, **options, **seeds)
            found.pow(2).sum().backward()
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(part.grad, whole.grad[:, here], rtol=1e-9, atol=1e-12)

g = torch.randn(5, 9, generator=draw, dtype=torch.float64)
for operator in (soft_topk, log_soft_topk):
    for k in (3, torch.tensor([1, 8, 2, 4, 3])):
        whole, part = scores.clone().requires_grad_(), scores[:, here].clone().requires_grad_()
        expected, found = operator(whole, k, 1.5), operator(part, k, 1.5, group=dist.group.WORLD)
        expected.backward(g)
        found.backward(g[:, here])
        torch.testing.assert_close(found, expected[:, here], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(part.grad, whole.grad[:, here], rtol=1e-9, atol=1e-12)
"""


def test_labels_over_two_processes_are_as_in_one(tmp_path):
    run_on_two(SHARDED, tmp_path)
