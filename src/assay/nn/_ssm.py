"""The layer around the selective scan: the block of Mamba, for whole sequences and step by step."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay._checks import in_range
from assay.nn._scan import selective_scan


class SSMState(NamedTuple):
    """What :class:`SelectiveSSM` remembers of the steps before: its last inputs to the convolution, and its state."""

    conv: Tensor
    ssm: Tensor


@torch.no_grad()
def first_step_sizes_(bias: Tensor, dt_min: float = 1e-3, dt_max: float = 0.1, floor: float = 1e-4) -> None:
    """Overwrite ``bias`` so that its softplus is even in the logarithm between ``dt_min`` and ``dt_max``."""
    spread = math.log(dt_max) - math.log(dt_min)
    dt = torch.exp(torch.rand_like(bias) * spread + math.log(dt_min)).clamp(min=floor)
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))


class SelectiveSSM(nn.Module):
    """Mix the tokens of a sequence by a selective state space model (Mamba's block), in time linear in the length::

        x, z        = in_proj(input)                       d_inner = expand * d_model channels each
        x           = silu(conv1d(x))                      depthwise, over the last d_conv tokens
        dt, B, C    = x_proj(x)                            dt_rank, d_state, d_state numbers per token
        delta       = softplus(dt_proj(dt))
        h_t         = exp(-delta_t exp(A_log)) * h_{t-1} + delta_t x_t B_t
        output      = out_proj((C_t . h_t + D x_t) silu(z_t))

    Shapes (batch, L, d_model) to the same. Names and shapes of the parameters are those of ``mamba_ssm.Mamba``, whose
    checkpoints load; with ``bidirectional`` the second direction's are ``conv1d_b``, ``x_proj_b``, ``dt_proj_b``,
    ``A_b_log`` and ``D_b``, as in Vision Mamba.

    Args:
        d_model: width of the tokens, >= 1.
        d_state: numbers of state per channel, >= 1.
        d_conv: width of the convolution, >= 1.
        expand: d_inner / d_model, >= 1.
        dt_rank: width of the bottleneck from which step sizes are made, >= 1, or "auto" for ceil(d_model / 16).
        dt_min, dt_max: the range, 0 < dt_min <= dt_max, from which first step sizes are drawn, evenly in the logarithm.
        dt_init: first weight of ``dt_proj``: "random", uniform up to ``dt_scale / sqrt(dt_rank)``, or "constant".
        dt_init_floor: first step sizes are no smaller.
        conv_bias, bias: whether the convolution, and the two outer projections, have a bias.
        gate: multiply by silu(z); without it ``in_proj`` makes x alone.
        bidirectional: add a scan from the last token to the first, with weights of its own.
        causal_conv: the convolution sees the token and those before; else it is centred.
        reorder: a module ``(x, dt) -> permutation`` that puts tokens into another order before they are scanned, such
            as :class:`assay.nn.TokenReorder`.
        chunk_size: steps that the scan holds at once, >= 1, or None to choose.

    Raises:
        ValueError: an argument out of range; a state given to a layer that does not run from left to right.

    Source: A. Gu, T. Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, 2023, arXiv 2312.00752.

    >>> import torch
    >>> from assay.nn import SelectiveSSM
    >>> layer, x = SelectiveSSM(8), torch.randn(2, 5, 8)
    >>> y, state = layer(x, return_state=True)
    >>> following, state = layer.step(torch.randn(2, 8), state)
    >>> y.shape, following.shape
    (torch.Size([2, 5, 8]), torch.Size([2, 8]))
    """

    A_log: nn.Parameter
    D: nn.Parameter

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        *,
        gate: bool = True,
        bidirectional: bool = False,
        causal_conv: bool = True,
        reorder: nn.Module | None = None,
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"d_model": d_model, "d_state": d_state, "d_conv": d_conv, "expand": expand}.items():
            in_range(name, value, value >= 1, "an integer >= 1")
        rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        in_range("dt_rank", dt_rank, dt_rank == "auto" if isinstance(dt_rank, str) else rank >= 1, '>= 1, or "auto"')
        in_range("dt_min", dt_min, 0 < dt_min <= dt_max, f"0 < dt_min <= dt_max = {dt_max}")
        in_range("dt_init", dt_init, dt_init in ("random", "constant"), "'random' or 'constant'")
        apart = reorder is None or not bidirectional or getattr(reorder, "restore", False)
        in_range("bidirectional", bidirectional, apart, "False with a reorder that does not restore")
        in_range("chunk_size", chunk_size, chunk_size is None or chunk_size >= 1, "an integer >= 1, or None")
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner, self.dt_rank = expand * d_model, rank
        self.dt_min, self.dt_max, self.dt_init, self.dt_scale = dt_min, dt_max, dt_init, dt_scale
        self.dt_init_floor, self.gate, self.bidirectional = dt_init_floor, gate, bidirectional
        self.causal_conv, self.chunk_size, self.reorder = causal_conv, chunk_size, reorder
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = self.d_inner
        self.in_proj = nn.Linear(d_model, inner * (2 if gate else 1), bias=bias, **factory)
        for end in ("", "_b") if bidirectional else ("",):
            conv = nn.Conv1d(inner, inner, d_conv, groups=inner, bias=conv_bias, **factory)
            self.add_module(f"conv1d{end}", conv)
            self.add_module(f"x_proj{end}", nn.Linear(inner, rank + 2 * d_state, bias=False, **factory))
            self.add_module(f"dt_proj{end}", nn.Linear(rank, inner, **factory))
            for name, shape in ((f"A{end}_log", (inner, d_state)), (f"D{end}", (inner,))):
                parameter = nn.Parameter(torch.empty(shape, **factory))
                parameter._no_weight_decay = True  # type: ignore[attr-defined]
                self.register_parameter(name, parameter)
        self.out_proj = nn.Linear(inner, d_model, bias=bias, **factory)
        self._first_weights()

    @torch.no_grad()
    def _first_weights(self) -> None:
        for end in ("", "_b") if self.bidirectional else ("",):
            project = getattr(self, f"dt_proj{end}")
            bound = self.dt_rank**-0.5 * self.dt_scale
            if self.dt_init == "random":
                nn.init.uniform_(project.weight, -bound, bound)
            else:
                nn.init.constant_(project.weight, bound)
            first_step_sizes_(project.bias, self.dt_min, self.dt_max, self.dt_init_floor)
            log = getattr(self, f"A{end}_log")
            log.copy_(torch.arange(1, self.d_state + 1, dtype=torch.float64, device=log.device).log().expand_as(log))
            nn.init.ones_(getattr(self, f"D{end}"))

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d)):
                module.reset_parameters()
        self._first_weights()

    def forward(
        self, input: Tensor, state: SSMState | None = None, return_state: bool = False, *, mask: Tensor | None = None
    ) -> Any:
        """Mix (batch, L, d_model); with ``return_state`` also the state that goes on, as ``state``, with what follows.

        ``mask`` of shape (batch, L), True at tokens and False at the padding before or behind them, leaves the padding
        out exactly; what is returned there means nothing.
        """
        if state is not None or return_state:
            streams = not self.bidirectional and self.causal_conv and self.reorder is None
            in_range("state", state, streams, "only with causal_conv, without bidirectional and reorder")
        in_range("mask", mask, mask is None or self.reorder is None, "only without reorder")
        x = self.in_proj(input).transpose(1, 2)
        gate = None
        if self.gate:
            x, gate = x.chunk(2, 1)
        if mask is not None:
            x = x.masked_fill(~mask[:, None], 0)
        y, after = self._direction(x, gate, mask, "", state, return_state)
        if self.bidirectional:
            back = None if gate is None else gate.flip(2)
            y = y + self._direction(x.flip(2), back, None if mask is None else mask.flip(1), "_b")[0].flip(2)
        output = self.out_proj(y.transpose(1, 2))
        return (output, after) if return_state else output

    def _direction(
        self,
        x: Tensor,
        gate: Tensor | None,
        mask: Tensor | None,
        end: str,
        state: SSMState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, SSMState | None]:
        """From (batch, d_inner, L) behind ``in_proj`` to what goes into ``out_proj``, from left to right."""
        conv = getattr(self, f"conv1d{end}")
        if state is None:
            right = 0 if self.causal_conv else (self.d_conv - 1) // 2
            window = F.pad(x, (self.d_conv - 1 - right, right))
        else:
            window = torch.cat([state.conv.to(x.dtype)[..., 1:], x], 2)
        x = F.silu(F.conv1d(window, conv.weight, conv.bias, groups=self.d_inner))
        delta, B, C = self.select(x, end)
        order = None
        if self.reorder is not None:
            order = self.reorder(x.transpose(1, 2), delta.transpose(1, 2))
            x = (order @ x.transpose(1, 2)).transpose(1, 2)
            delta, B, C = self.select(x, end)
        delta = delta.to(torch.promote_types(delta.dtype, torch.float32)) + getattr(self, f"dt_proj{end}").bias[:, None]
        delta = F.softplus(delta)
        if mask is not None:
            delta = delta.masked_fill(~mask[:, None], 0)  # the state stays as it is
        A, D = -torch.exp(getattr(self, f"A{end}_log")), getattr(self, f"D{end}")
        initial = None if state is None else state.ssm
        options: dict[str, Any] = {"initial_state": initial, "chunk_size": self.chunk_size}
        found = selective_scan(x, delta, A, B, C, D, gate, return_last_state=return_state, **options)
        if not isinstance(found, tuple):
            if order is not None and getattr(self.reorder, "restore", False):
                found = found @ order
            return found, None
        # As in mamba_ssm it holds d_conv inputs, of which the next step needs all but the first.
        buffer = F.pad(window, (1, 0))[..., -self.d_conv :]
        return found[0], SSMState(buffer, found[1])

    def select(self, x: Tensor, end: str = "") -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes before bias and softplus, B and C, chosen by tokens (batch, d_inner, L) behind the convolution."""
        sizes = [self.dt_rank, self.d_state, self.d_state]
        dt, B, C = getattr(self, f"x_proj{end}")(x.transpose(1, 2)).split(sizes, -1)
        delta = F.linear(dt, getattr(self, f"dt_proj{end}").weight)  # the bias is added once, before the softplus
        return delta.transpose(1, 2), B.transpose(1, 2), C.transpose(1, 2)

    def init_state(self, batch: int) -> SSMState:
        """The state before the first token."""
        weight = self.in_proj.weight
        conv = weight.new_zeros(batch, self.d_inner, self.d_conv)
        exact = torch.promote_types(weight.dtype, torch.float32)
        return SSMState(conv, weight.new_zeros(batch, self.d_inner, self.d_state, dtype=exact))

    def step(self, input: Tensor, state: SSMState) -> tuple[Tensor, SSMState]:
        """One token (batch, d_model): its output and the state after it."""
        output, after = self(input[:, None], state, True)
        return output[:, 0], after

    def extra_repr(self) -> str:
        said = f"{self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, expand={self.expand}"
        flags = {"gate": self.gate, "bidirectional": self.bidirectional, "causal_conv": self.causal_conv}
        return ", ".join([said, *(f"{name}={value}" for name, value in flags.items())])
