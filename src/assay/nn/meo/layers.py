"""The layers: linear experts behind a noisy top-k gate, merged into one or mixed, and the token attention."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from assay._checks import in_range
from assay.nn._experts import Routing, check_k, dispatch, full_precision, load_balance, noisy_routing

LEVELS = ("sequence", "token", "task")
_MERGED = 2**28  # entries of merged matrices that are held at once (1 GiB in float32)


class TokenAttention(nn.Module):
    """The token-level attention block: a bottleneck that starts at zero, to be added to its input.

    ``up(relu(down(x)))`` with ``down`` from d = ``dim`` to max(1, d // ``reduce_factor``) and ``up`` back; ``up`` and
    both biases start at 0, so that ``x + TokenAttention(x)`` is x at first. Shapes: (*, d) -> (*, d).

    Args:
        dim: d >= 1.
        reduce_factor: >= 1.

    Raises:
        ValueError: an argument out of range.

    Source: S. He et al., Merging Experts into One, EMNLP 2023, arXiv 2310.09832.

    >>> import torch
    >>> from assay.nn import TokenAttention
    >>> TokenAttention(128)(torch.randn(2, 5, 128)).abs().max().item()
    0.0
    """

    def __init__(
        self,
        dim: int,
        reduce_factor: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("reduce_factor", reduce_factor)):
            in_range(name, value, isinstance(value, int) and value >= 1, "an integer >= 1")
        self.dim, self.reduce_factor = dim, reduce_factor
        narrow = max(1, dim // reduce_factor)
        self.down_proj = nn.Linear(dim, narrow, device=device, dtype=dtype)
        self.up_proj = nn.Linear(narrow, dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """``down`` as torch draws it, everything else 0."""
        self.down_proj.reset_parameters()
        for tensor in (self.down_proj.bias, self.up_proj.weight, self.up_proj.bias):
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        return self.up_proj(F.relu(self.down_proj(x)))


class _Experts(nn.Module):
    """Linear experts with a noisy top-k gate: what :class:`MEOLinear` and :class:`MoELinear` share."""

    bias: nn.Parameter | None
    w_noise: nn.Parameter | None
    aux_loss: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int,
        k: int = 2,
        *,
        level: str = "sequence",
        bias: bool = True,
        noisy_gating: bool = True,
        noise_epsilon: float = 1e-2,
        reduce_factor: int = 16,
        task_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "in_features": in_features,
            "out_features": out_features,
            "num_experts": num_experts,
            "reduce_factor": reduce_factor,
        }
        for name, value in sizes.items():
            in_range(name, value, isinstance(value, int) and value >= 1, "an integer >= 1")
        check_k(k, num_experts)
        in_range("level", level, level in LEVELS, "'sequence', 'token' or 'task'")
        in_range("noise_epsilon", noise_epsilon, noise_epsilon >= 0, ">= 0")
        in_range(
            "task_dim",
            task_dim,
            (task_dim is None) if level != "task" else isinstance(task_dim, int) and task_dim >= 1,
            "an integer >= 1 with level = 'task', None otherwise",
        )
        self.in_features, self.out_features, self.num_experts, self.k = in_features, out_features, num_experts, k
        self.level, self.noisy_gating, self.noise_epsilon = level, noisy_gating, noise_epsilon
        self.reduce_factor, self.task_dim = reduce_factor, task_dim
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, **factory))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(num_experts, out_features, **factory)) if bias else None
        )
        seen = in_features if task_dim is None else max(1, task_dim // reduce_factor)
        self.w_gate = nn.Parameter(torch.empty(seen, num_experts, **factory))
        noise = nn.Parameter(torch.empty(seen, num_experts, **factory)) if noisy_gating else None
        self.register_parameter("w_noise", noise)
        if task_dim is not None:
            self.task_proj = nn.Linear(task_dim, seen, **factory)
        self.aux_loss = None
        self._reset()

    def _reset(self) -> None:
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        nn.init.zeros_(self.w_gate)
        if self.w_noise is not None:
            nn.init.zeros_(self.w_noise)

    def reset_parameters(self) -> None:
        """Each expert as torch draws a ``Linear``; the gate at 0, so that at first the noise decides."""
        self._reset()
        if self.task_dim is not None:
            self.task_proj.reset_parameters()

    def forward(
        self,
        x: Tensor,
        task_embedding: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        return_aux: bool = False,
    ) -> Any:
        if x.dim() != 3 or x.shape[-1] != self.in_features:
            raise ValueError(f"x of shape {tuple(x.shape)}: (B, L, {self.in_features}) is wanted")
        if (self.level == "task") != (task_embedding is not None):
            raise ValueError(f"task_embedding is for level = 'task', and needed there: the level is {self.level!r}")
        if mask is not None and mask.shape != x.shape[:2]:
            raise ValueError(f"mask of shape {tuple(mask.shape)}: {tuple(x.shape[:2])} is wanted")
        mask = None if mask is None else mask.bool()
        y, aux = self._compute(x, task_embedding, mask)
        if not torch.compiler.is_exporting():  # an exported program cannot leave anything behind
            self.aux_loss = aux
        return (y, aux) if return_aux else y

    def _compute(self, x: Tensor, task_embedding: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _whole(self, x: Tensor, task_embedding: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What a gate for a whole sequence or task sees, (N, d), and which rows of it are real."""
        if task_embedding is not None:
            one = task_embedding if task_embedding.dim() == 3 else task_embedding.unsqueeze(0)
            return self.task_proj(one).mean(1), None
        if mask is None:
            return x.mean(1), None
        count = mask.sum(1, keepdim=True)
        return x.masked_fill(~mask.unsqueeze(-1), 0).sum(1) / count.clamp(min=1), count.squeeze(1) > 0

    def _gate(self, seen: Tensor, real: Tensor | None) -> tuple[Routing, Tensor]:
        """The routing of each row of ``seen`` and the balance loss over the real ones."""
        with full_precision(seen):
            routing = self._route(seen.to(self.w_gate.dtype))
            gates, load = routing.gates, routing.load
            if real is not None:
                gates, load = gates * real.unsqueeze(1), load * real.unsqueeze(1)
            return routing, load_balance(gates, load.sum(0))

    def _route(self, seen: Tensor) -> Routing:
        return noisy_routing(seen @ self.w_gate, self._noise(seen), self.k)

    def _noise(self, seen: Tensor) -> Tensor | None:
        """The deviation of the noise on the logits, where there is any."""
        if self.w_noise is None or not self.training:
            return None
        return F.softplus(seen @ self.w_noise) + self.noise_epsilon

    def __getstate__(self) -> dict[str, Any]:
        # The balance loss carries the graph of the last batch, which neither a copy nor a file can take along.
        return {**self.__dict__, "aux_loss": None}

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, num_experts={self.num_experts}, k={self.k}, "
            f"level={self.level!r}, bias={self.bias is not None}, noisy_gating={self.noisy_gating}"
        )


class MEOLinear(_Experts):
    """E linear experts of which k are merged into one for each sequence or task, in place of ``torch.nn.Linear``.

    ::

        g = softmax over the k largest of E noisy logits of the sequence (:func:`assay.nn.noisy_top_k_gating`)
        y = (sum_e g_e W_e) x + sum_e g_e b_e

    For k chosen experts that is ``sum_e g_e (W_e x + b_e)`` at about the cost of one. What the gate sees, by ``level``:

    - "sequence": the mean of the sequence's tokens.
    - "token": the same after ``x <- x + TokenAttention(x)``, which tells tokens apart where the experts no longer do.
    - "task": an embedding of the task, ``Linear(task_dim, task_dim // reduce_factor)``, mean over its tokens.

    Every call leaves the balance loss, unscaled, in ``aux_loss``; add it to the loss with a coefficient of about 0.01.

    Shapes: x (B, L, ``in_features``) -> (B, L, ``out_features``); ``task_embedding`` (B, T, ``task_dim``), or for one
    task in the whole batch (T, ``task_dim``) or (1, T, ``task_dim``); ``mask`` (B, L), true for real tokens, which
    alone are seen by the gate; ``return_aux=True`` returns (y, balance loss).

    Args:
        in_features, out_features: >= 1.
        num_experts: E >= 1.
        k: in [1, E].
        level: "sequence", "token" or "task".
        bias: whether the experts have one.
        noisy_gating: add learned noise to the logits in training.
        noise_epsilon: smallest deviation of that noise, >= 0.
        reduce_factor: how much narrower the token attention or the task's projection is, >= 1.
        task_dim: width of the task embedding, for level "task".

    Raises:
        ValueError: an argument out of range; on input, a wrong shape or a ``task_embedding`` missing or not expected.

    Source: S. He, R.-Z. Fan, L. Ding, L. Shen, T. Zhou, D. Tao, Merging Experts into One: Improving Computational
    Efficiency of Mixture of Experts, EMNLP 2023, arXiv 2310.09832.

    >>> import torch
    >>> from assay.nn import MEOLinear
    >>> layer = MEOLinear(16, 32, num_experts=8, k=2)
    >>> y = layer(torch.randn(4, 10, 16))
    >>> y.shape, layer.aux_loss.shape
    (torch.Size([4, 10, 32]), torch.Size([]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int,
        k: int = 2,
        *,
        level: str = "sequence",
        bias: bool = True,
        noisy_gating: bool = True,
        noise_epsilon: float = 1e-2,
        reduce_factor: int = 16,
        task_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            num_experts,
            k,
            level=level,
            bias=bias,
            noisy_gating=noisy_gating,
            noise_epsilon=noise_epsilon,
            reduce_factor=reduce_factor,
            task_dim=task_dim,
            device=device,
            dtype=dtype,
        )
        if level == "token":
            self.token_attention = TokenAttention(in_features, reduce_factor, device, dtype)

    def reset_parameters(self) -> None:
        """Each expert as torch draws a ``Linear``; gate and token attention at 0."""
        super().reset_parameters()
        if self.level == "token":
            self.token_attention.reset_parameters()

    def _compute(self, x: Tensor, task_embedding: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.level == "token":
            x = x + self.token_attention(x)
        routing, aux = self._gate(*self._whole(x, task_embedding, mask))
        if self.level == "task" and routing.gates.shape[0] == 1:  # one expert for all: no batch of matrices
            weight, bias = self._merge(routing.weights, routing.experts, routing.gates)
            return F.linear(x, weight[0], None if bias is None else bias[0]), aux
        chosen = (routing.weights, routing.experts, routing.gates)
        most = max(1, _MERGED // self.weight[0].numel())
        if torch.compiler.is_compiling() or x.shape[0] <= most:
            return self._apply_merged(x, *chosen), aux
        # A batch of large merged matrices would not fit: each part's are made again for the backward pass.
        parts = zip(*(tensor.split(most) for tensor in (x, *chosen)), strict=True)
        return torch.cat([checkpoint(self._apply_merged, *part, use_reentrant=False) for part in parts]), aux

    def _apply_merged(self, x: Tensor, weights: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        weight, bias = self._merge(weights, experts, gates)
        weight = weight.transpose(1, 2)
        return x @ weight if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight)

    def _merge(self, weights: Tensor, experts: Tensor, gates: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gates' averages of the experts' weights and biases, one for each row of gates."""
        tensors = [self.weight.flatten(1)] if self.bias is None else [self.weight.flatten(1), self.bias]
        if 2 * self.k < self.num_experts:
            picked = (tensor.index_select(0, experts.flatten()).unflatten(0, experts.shape) for tensor in tensors)
            merged = [torch.bmm(weights.unsqueeze(1), each).squeeze(1) for each in picked]
        else:
            merged = [gates @ tensor for tensor in tensors]
        return merged[0].unflatten(1, self.weight.shape[1:]), merged[1] if len(merged) > 1 else None


class MoELinear(_Experts):
    """The vanilla sparse mixture of E linear experts, with the gate and the arguments of :class:`MEOLinear`.

    ``y = sum over the k chosen e of g_e (W_e x + b_e)``: each token is multiplied by k matrices. ``level`` says what
    the gate sees: at "sequence" and "task" it is that of :class:`MEOLinear`, whose output this then equals; at "token"
    each token has a gate of its own, and the output of a masked token is 0.

    >>> import torch
    >>> from assay.nn import MEOLinear, MoELinear
    >>> one, other = MEOLinear(16, 32, num_experts=8).eval(), MoELinear(16, 32, num_experts=8).eval()
    >>> other.load_state_dict(one.state_dict())
    <All keys matched successfully>
    >>> x = torch.randn(4, 10, 16)
    >>> torch.allclose(one(x), other(x), atol=1e-6)
    True
    """

    def _compute(self, x: Tensor, task_embedding: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        tokens = x.flatten(0, 1)
        if self.level == "token":
            real = None if mask is None else mask.flatten()
            if real is not None:
                tokens = tokens.masked_fill(~real.unsqueeze(1), 0)
            routing, aux = self._gate(tokens, real)
            if real is not None:
                routing = routing._replace(weights=routing.weights * real.unsqueeze(1))
        else:
            routing, aux = self._gate(*self._whole(x, task_embedding, mask))
            # Each token goes where its sequence goes.
            each = ((*x.shape[:2], -1) for _ in routing)
            routing = Routing(*(t.unsqueeze(1).expand(*to).flatten(0, 1) for t, to in zip(routing, each, strict=True)))
        return dispatch(tokens, self.weight, self.bias, routing).unflatten(0, x.shape[:2]), aux
