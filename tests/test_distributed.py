"""What processes hold together: forward and backward equal those of one process that has it all."""

import torch

from assay._distributed import all_gather_rows, all_reduce_max, all_reduce_sum, rank, world_size
from assay._processes import run_on_two

SCRIPT = """
from assay._distributed import all_gather_rows, all_reduce_max, all_reduce_sum, rank, world_size
assert rank_ == rank() and world_size() == 2
torch.manual_seed(0)
whole = torch.randn(5, 3, dtype=torch.float64)
weights = torch.randn(2, 5, 3, dtype=torch.float64)       # what each process asks of the gathered rows
mine = whole[:2] if rank_ == 0 else whole[2:]              # unequal shares
x = mine.clone().requires_grad_()
rows = all_gather_rows(x)
torch.testing.assert_close(rows, whole, rtol=0, atol=0)
(rows * weights[rank_]).sum().backward()
torch.testing.assert_close(x.grad, weights.sum(0)[:2] if rank_ == 0 else weights.sum(0)[2:])

y = (whole[rank_]).clone().requires_grad_()
total = all_reduce_sum(y)
torch.testing.assert_close(total, whole[0] + whole[1])
(total * weights[rank_, 0]).sum().backward()
torch.testing.assert_close(y.grad, weights[:, 0].sum(0))
torch.testing.assert_close(all_reduce_max(y), torch.maximum(whole[0], whole[1]), rtol=0, atol=0)
""".replace("rank_", "RANK")


def test_two_processes_equal_one(tmp_path):
    run_on_two("RANK = rank\n" + SCRIPT, tmp_path)


def test_alone_nothing_changes():
    x = torch.randn(3, 2, requires_grad=True)
    assert all_gather_rows(x) is x and all_reduce_sum(x) is x
    assert torch.equal(all_reduce_max(x), x) and (world_size(), rank()) == (1, 0)
