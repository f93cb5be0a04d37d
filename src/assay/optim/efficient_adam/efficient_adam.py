"""Efficient-Adam: data-parallel Adam that sends compressed updates both ways and remembers what was lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from assay._distributed import rank, world_size
from assay.optim.efficient_adam.compressors import (
    Compressor,
    Identity,
    LogQuantizer,
    ScaledSign,
    TopK,
    UniformQuantizer,
    pack_bits,
    unpack_bits,
)
from assay.optim.efficient_adam.round import Gradients, TwoWayAdam

__all__ = [
    "EfficientAdam",
    "Identity",
    "LogQuantizer",
    "ScaledSign",
    "SimulatedEfficientAdam",
    "TopK",
    "UniformQuantizer",
]


class EfficientAdam(TwoWayAdam):
    """Adam of many workers that send each other compressed updates instead of gradients.

    Every worker i of N holds the same parameters x, its own averages m^i and v^i of its own gradients g^i, and what its
    compressor Q_w has lost so far, e^i; the server, which each process plays for itself, holds e^s ::

        m^i = beta * m^i + (1 - beta) * g^i                  v^i = theta_t * v^i + (1 - theta_t) * (g^i)^2
        a^i = alpha_t * m^i / (sqrt(v^i) + eps) + e^i        (both averages corrected for their start, as Adam's)
        d^i = Q_w(a^i)                                       e^i = a^i - d^i
        b   = mean_i d^i + e^s,   d = Q_s(b)                 e^s = b - d
        x   = (1 - alpha_t * weight_decay) * x - d

    Only d^i and d travel, as packed bytes; ``traffic`` counts them. With one process, as where torch.distributed is
    not started, N is 1.

    Gradients must be each worker's own: do not wrap the model in DDP, or run backward under its ``no_sync()``. In the
    first step the parameters of rank 0 go to all. A worker without a gradient for a parameter sends its residual; a
    parameter without any gradient stays. If any worker has a gradient that is not finite, all skip the step.

    Args:
        params: parameters, or groups of them with options of their own; real, whole on every worker.
        lr: learning rate alpha, >= 0; a number or a tensor of one element.
        betas: (beta, theta), each in [0, 1).
        eps: added to the denominator, > 0.
        weight_decay: decoupled decay, >= 0; not compressed.
        worker_compressor, server_compressor: Q_w and Q_s: "sign" (ScaledSign), "identity", or an object from
            ``assay.optim.compress``.
        error_feedback: keep e^i and e^s; also "worker" or "server" for one of them.
        process_group: the workers; None: all processes.
        theta: "const": theta_t = theta; "1/t": theta_t = 1 - theta / t, with t the worker's steps.
        lr_decay: "none": alpha_t = lr; "sqrt": alpha_t = lr / sqrt(t), with t the rounds of the parameter.
        bucket: what has one scale: "tensor", or a number of elements of all tensors in a row.
        bias_correction: False: as the theory has it, uncorrected averages and v_0 = eps in place of eps in the
            denominator.
        topology: "gather": everyone gets all d^i and computes d; "server": rank 0 does, and sends d. Equal bits.
        min_size: number of elements below which a tensor goes uncompressed, >= 0.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: a sparse gradient, a complex or a sharded parameter (DTensor).

    Source: C. Chen et al., Efficient-Adam: Communication-Efficient Distributed Adam, 2022, arXiv 2205.14473.

    >>> import torch
    >>> from assay.optim import EfficientAdam
    >>> model = torch.nn.Linear(64, 10)
    >>> optimizer = EfficientAdam(model.parameters(), lr=1e-3)
    >>> model(torch.ones(4, 64)).square().mean().backward()
    >>> optimizer.step()
    """

    _together = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        worker_compressor: str | Compressor = "sign",
        server_compressor: str | Compressor = "sign",
        error_feedback: bool | str = True,
        process_group: dist.ProcessGroup | None = None,
        theta: str = "const",
        lr_decay: str = "none",
        bucket: str | int = "tensor",
        bias_correction: bool = True,
        topology: str = "gather",
        min_size: int = 0,
    ) -> None:
        if topology not in ("gather", "server"):
            raise ValueError(f"topology = {topology!r} is out of range: 'gather' or 'server'")
        self.process_group, self.topology = process_group, topology
        options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        options |= {"theta": theta, "lr_decay": lr_decay, "bias_correction": bias_correction}
        super().__init__(
            params, options, 1, worker_compressor=worker_compressor, server_compressor=server_compressor,
            error_feedback=error_feedback, bucket=bucket, min_size=min_size,
        )  # fmt: skip

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One round with the other workers, who must call it too; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._together:
            self._start_together()
        self._round([[p.grad for group in self.param_groups for p in group["params"]]])
        return loss

    def _start_together(self) -> None:
        if world_size(self.process_group) > 1:
            for group in self.param_groups:
                for p in group["params"]:
                    whole = p.detach().contiguous()
                    dist.broadcast(whole, self._root(), group=self.process_group)
                    p.copy_(whole)
        self._together = True

    def _root(self) -> int:
        return dist.get_global_rank(self.process_group, 0) if self.process_group else 0

    def _agree(self, present: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
        if world_size(self.process_group) == 1:
            return present, finite
        flags = torch.cat([finite, present[0]])
        device = self.param_groups[0]["params"][0].device
        received = self._all_gather(pack_bits(flags.int(), 1).to(device))
        rows = torch.stack([unpack_bits(data, 1, len(flags)).bool() for data in received]).cpu()
        return rows[:, 1:], rows[:, 0]

    def _exchange(self, sent: list[Tensor], params: list[Tensor]) -> Tensor:
        (mine,), group = sent, self.process_group
        if world_size(group) == 1:
            return self._answer([mine], params)
        if self.topology == "gather":
            return self._answer(self._all_gather(mine), params)
        serving = rank(group) == 0
        received = [torch.empty_like(mine) for _ in range(world_size(group))] if serving else None
        dist.gather(mine, received, dst=self._root(), group=group)
        answer = self._answer(received, params) if received else mine.new_empty(self.down.nbytes(self._wide(params)))
        dist.broadcast(answer, self._root(), group=group)
        self._count(mine.nbytes, answer.nbytes)
        return answer

    def _all_gather(self, mine: Tensor) -> list[Tensor]:
        received = [torch.empty_like(mine) for _ in range(world_size(self.process_group))]
        dist.all_gather(received, mine, group=self.process_group)
        self._count(mine.nbytes, mine.nbytes * (len(received) - 1))
        return received


class SimulatedEfficientAdam(TwoWayAdam):
    """:class:`EfficientAdam` of many workers in one process: the same bits, from lists of gradients.

    ``traffic`` counts what a worker would send to a server and receive from it.

    Args:
        params: parameters, or groups of them with options of their own.
        n_workers: N, >= 1.
        lr, betas, eps, weight_decay, worker_compressor, server_compressor, error_feedback, theta, lr_decay, bucket,
            bias_correction, min_size: as in :class:`EfficientAdam`.

    Raises:
        ValueError: an argument out of range, or gradients in another number than workers or parameters.
        RuntimeError: a sparse gradient, a complex or a sharded parameter.

    Source: C. Chen et al., Efficient-Adam: Communication-Efficient Distributed Adam, 2022, arXiv 2205.14473.

    >>> import torch
    >>> from assay.optim import SimulatedEfficientAdam
    >>> x = torch.nn.Parameter(torch.zeros(3))
    >>> optimizer = SimulatedEfficientAdam([x], n_workers=2, lr=0.5)
    >>> optimizer.step([[torch.tensor([1.0, 2.0, 3.0])], [torch.tensor([2.0, 1.0, -1.0])]])
    >>> x.tolist(), optimizer.traffic
    ([-0.3333333432674408, -0.3333333432674408, -0.3333333432674408], Traffic(sent=6, received=6))
    """

    def __init__(
        self,
        params: Any,
        n_workers: int,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        worker_compressor: str | Compressor = "sign",
        server_compressor: str | Compressor = "sign",
        error_feedback: bool | str = True,
        theta: str = "const",
        lr_decay: str = "none",
        bucket: str | int = "tensor",
        bias_correction: bool = True,
        min_size: int = 0,
    ) -> None:
        if not (isinstance(n_workers, int) and n_workers >= 1):
            raise ValueError(f"n_workers = {n_workers!r} is out of range: an integer >= 1")
        options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        options |= {"theta": theta, "lr_decay": lr_decay, "bias_correction": bias_correction}
        super().__init__(
            params, options, n_workers, worker_compressor=worker_compressor, server_compressor=server_compressor,
            error_feedback=error_feedback, bucket=bucket, min_size=min_size,
        )  # fmt: skip

    @torch.no_grad()
    def step(self, worker_grads: Sequence[Gradients]) -> None:  # type: ignore[override]
        """One round.

        Args:
            worker_grads: for each worker the gradients of all parameters, in their order; None for one that is missing.
        """
        count = sum(len(group["params"]) for group in self.param_groups)
        found = [len(grads) for grads in worker_grads]
        if found != [count] * self.workers:
            raise ValueError(f"worker_grads of lengths {found} is out of range: {self.workers} lists of {count}")
        self._round(worker_grads)

    def _agree(self, present: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
        flags = -(-(1 + present.shape[1]) // 8)
        self._count(flags, flags)
        return present, finite

    def _exchange(self, sent: list[Tensor], params: list[Tensor]) -> Tensor:
        answer = self._answer(sent, params)
        self._count(sent[0].nbytes, answer.nbytes)
        return answer
