"""Group DRO: weights on groups that follow their losses, and the loss that they weigh."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from assay._distributed import all_reduce_sum, world_size


@torch.no_grad()
def group_dro_weights(q: Tensor, group_loss: Tensor, step_size: float) -> Tensor:
    """One step of exponentiated gradient ascent on the weights of groups.

    ::

        q_s <- q_s exp(step_size * group_loss_s) / sum_r q_r exp(step_size * group_loss_r)

    so that after steps from a uniform q it is softmax(step_size * sum of the losses). Computed with logarithms, without
    overflow; a group of weight 0 keeps it. If a loss is not finite, q stays.

    Args:
        q: weights >= 0 that sum to 1, shape (S,).
        group_loss: the mean loss of each group, shape (S,); 0 for a group without examples.
        step_size: >= 0 and finite.

    Returns:
        The new q, of its shape and dtype, without gradient.

    Raises:
        ValueError: an argument out of range, or shapes that do not fit.

    Source: S. Sagawa et al., Distributionally Robust Neural Networks, ICLR 2020, arXiv 1911.08731.

    >>> import torch
    >>> from assay.losses import group_dro_weights
    >>> group_dro_weights(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0]), step_size=1.0)
    tensor([0.2689, 0.7311])
    """
    check_step_size(step_size)
    if q.dim() != 1 or group_loss.shape != q.shape:
        raise ValueError(f"group_loss.shape = {tuple(group_loss.shape)} is out of range: (S,), that of q")
    wide = torch.promote_types(torch.promote_types(q.dtype, group_loss.dtype), torch.float32)
    return ascended(q.to(wide).log(), group_loss.to(wide), step_size).exp().to(q.dtype)


class GroupDRO(nn.Module):
    """Group DRO: the loss of the groups, weighted by how badly they do; the baseline of the worst case.

    With L_s the mean loss of the examples of group s in the batch (0 if there is none) ::

        q_s <- q_s exp(step_size * L_s), normalised                     (in training mode; q starts uniform)
        loss = sum_s q_s L_s

    No gradient goes through q. Its logarithm is kept, in float64, in the buffer ``log_q``. Under
    DistributedDataParallel L_s is over the batches of all processes, q is the same in each, and the *average* of what
    the processes get is the loss.

    Args:
        n_groups: S >= 1.
        step_size: of q, >= 0 and finite; 0 weighs all groups alike, whatever their sizes.

    Called with losses (n,) of the examples and their groups (n,), integers from 0 to S - 1; gives a 0-d tensor.

    Raises:
        ValueError: an argument out of range, or shapes that do not fit.

    Source: S. Sagawa et al., Distributionally Robust Neural Networks, ICLR 2020, arXiv 1911.08731.

    >>> import torch
    >>> from assay.losses import GroupDRO
    >>> criterion = GroupDRO(n_groups=2, step_size=1.0)
    >>> criterion(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0, 0, 1]))
    tensor(0.7311)
    >>> criterion.q
    tensor([0.2689, 0.7311], dtype=torch.float64)
    """

    log_q: Tensor

    def __init__(self, n_groups: int, step_size: float = 0.01) -> None:
        super().__init__()
        check_step_size(step_size)
        self.n_groups, self.step_size = n_groups, step_size
        self.register_buffer("log_q", uniform(n_groups))

    @property
    def q(self) -> Tensor:
        """The weights of the groups, (S,)."""
        return self.log_q.exp()

    def forward(self, per_sample_loss: Tensor, groups: Tensor) -> Tensor:
        means, counts = group_means(per_sample_loss, groups, self.n_groups)
        self.log_q = self.log_q.to(means)
        if self.training:
            self.log_q = ascended(self.log_q, means, self.step_size)
        return weighted(per_sample_loss, example_weights(self.log_q, groups, counts))


@torch.no_grad()
def group_means(per_sample_loss: Tensor, groups: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """Mean loss of each group and number of its examples, over all processes, (S,) each; 0 for a group without any."""
    shape = per_sample_loss.shape
    if per_sample_loss.dim() != 1 or not len(per_sample_loss):
        raise ValueError(f"per_sample_loss.shape = {tuple(shape)} is out of range: (n,) with n >= 1")
    if groups.shape != shape or groups.is_floating_point():
        raise ValueError(f"groups.shape = {tuple(groups.shape)} is out of range: {tuple(shape)}, integers")
    if not 0 <= int(groups.min()) <= int(groups.max()) < n_groups:
        raise ValueError(f"groups = {groups.unique().tolist()} is out of range: integers from 0 to {n_groups - 1}")
    device = per_sample_loss.device
    losses = per_sample_loss.to(torch.float32 if device.type == "mps" else torch.float64)
    member = (groups.to(device) == torch.arange(n_groups, device=device).unsqueeze(1)).to(losses.dtype)
    sums, counts = all_reduce_sum(torch.stack([member @ losses, member.sum(1)]))
    return sums / counts.clamp(min=1), counts


def ascended(log_q: Tensor, group_loss: Tensor, step_size: float) -> Tensor:
    """log q after a step, normalised; unchanged where a loss is not finite, which q would never forget."""
    return torch.where(group_loss.isfinite().all(), torch.log_softmax(log_q + step_size * group_loss, 0), log_q)


def example_weights(log_q: Tensor, groups: Tensor, counts: Tensor) -> Tensor:
    """q_s over the number of examples of group s, for each example: with them a sum of losses is sum_s q_s L_s.

    Among processes that average their gradients, each weight is theirs times as large.
    """
    return world_size() * (log_q.exp() / counts.clamp(min=1))[groups.to(counts.device)]


def weighted(per_sample_loss: Tensor, weights: Tensor) -> Tensor:
    return (weights.to(per_sample_loss.dtype) * per_sample_loss).sum()


def uniform(n_groups: int) -> Tensor:
    """log q at the start."""
    if isinstance(n_groups, bool) or not isinstance(n_groups, int) or n_groups < 1:
        raise ValueError(f"n_groups = {n_groups!r} is out of range: an integer >= 1")
    return torch.full((n_groups,), -math.log(n_groups), dtype=torch.float64)


def check_step_size(step_size: float) -> None:
    if not 0 <= step_size < math.inf:
        raise ValueError(f"step_size = {step_size!r} is out of range: >= 0 and finite")
