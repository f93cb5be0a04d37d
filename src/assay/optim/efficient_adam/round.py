"""A round of Efficient-Adam: what the distributed optimizer and its twin in one process have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from assay.optim._checkpoint import as_saved
from assay.optim._rule import NOT_OPTIONS, at_least_zero, below_one
from assay.optim.efficient_adam.compressors import Compressor, Identity, ScaledSign
from assay.optim.efficient_adam.wire import Wire

COMPRESSORS: dict[str, Compressor] = {"sign": ScaledSign(), "identity": Identity()}
FEEDBACK = {True: ("worker", "server"), False: (), "worker": ("worker",), "server": ("server",)}

Gradients = Sequence[Tensor | None]


class Traffic(NamedTuple):
    """Bytes on the wire since the start, of one worker; payloads and flags."""

    sent: int
    received: int


class TwoWayAdam(torch.optim.Optimizer):
    """Local Adam steps of some workers, compressed, averaged, compressed again, and applied.

    What belongs to workers has, in the state, one row for each worker of this process. A subclass says how bytes
    travel: :meth:`_agree` on which gradients there are, and :meth:`_exchange` of updates.
    """

    def __init__(
        self,
        params: Any,
        options: dict[str, Any],
        workers: int,
        *,
        worker_compressor: str | Compressor,
        server_compressor: str | Compressor,
        error_feedback: bool | str,
        bucket: str | int,
        min_size: int,
    ) -> None:
        if error_feedback not in FEEDBACK:
            raise ValueError(f"error_feedback = {error_feedback!r} is out of range: True, False, 'worker' or 'server'")
        if bucket != "tensor" and not (isinstance(bucket, int) and bucket >= 1):
            raise ValueError(f"bucket = {bucket!r} is out of range: 'tensor' or an integer >= 1")
        at_least_zero({"min_size": min_size}, "min_size")
        self.workers, self.feedback = workers, FEEDBACK[error_feedback]
        self.up = Wire(_compressor("worker_compressor", worker_compressor), bucket, min_size)
        self.down = Wire(_compressor("server_compressor", server_compressor), bucket, min_size)
        self.traffic = Traffic(0, 0)
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; unknown options and values out of range are refused."""
        if unknown := param_group.keys() - self.defaults.keys() - NOT_OPTIONS:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(map(repr, sorted(unknown)))}")
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if hasattr(p, "to_local"):
                raise RuntimeError(f"{type(self).__name__} needs whole parameters on every worker, not shards of them")
            if p.is_complex():
                raise RuntimeError(f"{type(self).__name__} does not support complex parameters")

    def __getstate__(self) -> dict[str, Any]:
        # Torch's own leaves out what a subclass adds. Schedulers put a step of their own over the method.
        mine = {name: value for name, value in self.__dict__.items() if not name.startswith("_") and name != "step"}
        return {**super().__getstate__(), **mine}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for p, name, value in as_saved(self, state_dict):
            self.state[p][name] = value

    def _agree(self, present: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
        """Of all workers: which gradients (workers, parameters) are there, and whose are all finite (workers,)."""
        raise NotImplementedError

    def _exchange(self, sent: list[Tensor], params: list[Tensor]) -> Tensor:
        """The server's answer to what the workers of this process send."""
        raise NotImplementedError

    def _round(self, grads: Sequence[Gradients]) -> None:
        """One round, given the gradients of all parameters for each worker of this process."""
        if any(g is not None and g.is_sparse for worker in grads for g in worker):
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        present = torch.tensor([[g is not None for g in worker] for worker in grads])
        finite = torch.tensor([all(bool(g.isfinite().all()) for g in worker if g is not None) for worker in grads])
        present, finite = self._agree(present, finite)
        if not finite.all() or not present.any():
            return  # nobody moves, and nothing is forgotten
        every = [(group, p) for group in self.param_groups for p in group["params"]]
        chosen = [i for i, some in enumerate(present.any(0).tolist()) if some]
        params = [every[i][1] for i in chosen]
        for i in chosen:
            self._begin(*every[i])
        sent = []
        for k, worker in enumerate(grads):
            updates = [self._update(*every[i], worker[i], k) for i in chosen]
            sent.append(self.up.encode(updates))
            if "worker" in self.feedback:
                for p, a, d in zip(params, updates, self.up.decode(sent[k], updates), strict=True):
                    self.state[p]["worker_error"][k].copy_(a - d)
        answer = self._exchange(sent, params)
        for i, d in zip(chosen, self.down.decode(answer, self._wide(params)), strict=True):
            group, p = every[i]
            p.copy_(p.to(d.dtype) * (1 - self._rate(group, p) * group["weight_decay"]) - d)

    def _begin(self, group: dict[str, Any], p: Tensor) -> None:
        """Count the round of a parameter; in its first one make its state."""
        state = self.state[p]
        if not state:
            (wide,) = self._wide([p])
            state |= {"round": 0, "step": [0] * self.workers}
            names = ("exp_avg", "exp_avg_sq", "worker_error")
            for name in names if "worker" in self.feedback else names[:2]:
                state[name] = wide.new_zeros(self.workers, *p.shape)
            if not group["bias_correction"]:
                state["exp_avg_sq"].fill_(group["eps"])
        state["round"] += 1

    def _update(self, group: dict[str, Any], p: Tensor, g: Tensor | None, k: int) -> Tensor:
        """What worker k wants to subtract from p: its own Adam step, and what it could not send before."""
        state = self.state[p]
        m, v = state["exp_avg"][k], state["exp_avg_sq"][k]
        a = torch.zeros_like(m)
        if g is not None:
            state["step"][k] += 1
            t, (beta, theta), g = state["step"][k], group["betas"], g.to(m.dtype)
            m.mul_(beta).add_(g, alpha=1 - beta)
            kept = theta if group["theta"] == "const" else 1 - theta / t
            v.mul_(kept).addcmul_(g, g, value=1 - kept)
            if group["bias_correction"]:
                a = m / (1 - beta**t) / ((v / (1 - _product(group, t))).sqrt() + group["eps"])
            else:
                a = m / v.sqrt()
            a = a * self._rate(group, p)
        return a + state["worker_error"][k] if "worker" in self.feedback else a

    def _answer(self, received: Sequence[Tensor], params: list[Tensor]) -> Tensor:
        """The server's part: the mean of the workers' updates, and what it could not send before, as bytes."""
        wide = self._wide(params)
        total = self.up.decode(received[0], wide)
        for data in received[1:]:
            total = [x + y for x, y in zip(total, self.up.decode(data, wide), strict=True)]
        mean = [x / len(received) for x in total]
        if "server" not in self.feedback:
            return self.down.encode(mean)
        errors = [
            self.state[p].setdefault("server_error", torch.zeros_like(b)) for p, b in zip(params, mean, strict=True)
        ]
        mean = [b + error for b, error in zip(mean, errors, strict=True)]
        answer = self.down.encode(mean)
        for error, b, d in zip(errors, mean, self.down.decode(answer, wide), strict=True):
            error.copy_(b - d)
        return answer

    def _rate(self, group: dict[str, Any], p: Tensor) -> Any:
        return group["lr"] / math.sqrt(self.state[p]["round"]) if group["lr_decay"] == "sqrt" else group["lr"]

    @staticmethod
    def _wide(params: Sequence[Tensor]) -> list[Tensor]:
        """Stand-ins for updates of these parameters: they are in float32 at least."""
        return [p.detach().to(torch.promote_types(p.dtype, torch.float32)) for p in params]

    def _count(self, sent: int, received: int) -> None:
        self.traffic = Traffic(self.traffic.sent + sent, self.traffic.received + received)


def _product(group: dict[str, Any], t: int) -> float:
    """How much of v_0 is left after t steps: the product of the theta_s, s = 1, ..., t."""
    theta = group["betas"][1]
    if group["theta"] == "const":
        return theta**t
    return math.exp(math.lgamma(t + 1 - theta) - math.lgamma(1 - theta) - math.lgamma(t + 1))


def _check(options: dict[str, Any]) -> None:
    at_least_zero(options, "lr", "weight_decay")
    below_one(options, "betas")
    if not options["eps"] > 0:
        raise ValueError(f"eps = {options['eps']!r} is out of range: a number > 0")
    for name, allowed in (("theta", ("const", "1/t")), ("lr_decay", ("none", "sqrt"))):
        if options[name] not in allowed:
            raise ValueError(f"{name} = {options[name]!r} is out of range: {' or '.join(map(repr, allowed))}")
    if options["theta"] == "1/t" and not options["betas"][1]:
        raise ValueError(f"betas = {options['betas']!r} is out of range: with theta = '1/t' the second is above 0")


def _compressor(name: str, said: str | Compressor) -> Compressor:
    if isinstance(said, str):
        if said not in COMPRESSORS:
            raise ValueError(f"{name} = {said!r} is out of range: {', '.join(map(repr, COMPRESSORS))} or a compressor")
        return COMPRESSORS[said]
    return said
