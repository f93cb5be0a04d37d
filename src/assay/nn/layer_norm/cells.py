"""Recurrent cells whose sums are normalized at every step, each example by itself."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay._checks import in_range

State = tuple[Tensor, ...]


class Cell(nn.Module):
    """What the cells share: a part of x that can be computed for all steps at once, and a step with that part."""

    states: ClassVar[int] = 1
    gates: ClassVar[int] = 1
    bias: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        eps: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        for name, value in (("input_size", input_size), ("hidden_size", hidden_size)):
            in_range(name, value, value >= 1, ">= 1")
        in_range("eps", eps, 0 < eps < math.inf, "> 0 and finite")
        self.input_size, self.hidden_size, self.eps = input_size, hidden_size, eps
        self.factory: dict[str, Any] = {"device": device, "dtype": dtype}
        rows = self.gates * hidden_size
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size, **self.factory))
        self.weight_hh = nn.Parameter(torch.empty(rows, hidden_size, **self.factory))
        self.register_parameter("bias", nn.Parameter(torch.zeros(rows, **self.factory)) if bias else None)
        for weight in (self.weight_ih, self.weight_hh):
            for gate in weight.detach().chunk(self.gates):
                if not gate.is_meta:
                    nn.init.orthogonal_(gate)

    def norm(self, size: int) -> nn.LayerNorm:
        return nn.LayerNorm(size, eps=self.eps, **self.factory)

    def inputs(self, x: Tensor) -> Tensor:
        """What x adds to a step, for any leading dimensions."""
        raise NotImplementedError

    def advance(self, inputs: Tensor, state: State) -> State:
        """The next state; the first of its tensors is the output."""
        raise NotImplementedError

    def first(self, x: Tensor, batch: tuple[int, ...]) -> State:
        """Zeros, in float32 at least."""
        zero = x.new_zeros(*batch, self.hidden_size, dtype=torch.promote_types(x.dtype, torch.float32))
        return (zero,) * self.states

    def run(self, x: Tensor, state: State | None) -> State:
        if x.shape[-1] != self.input_size:
            raise ValueError(f"input of shape {tuple(x.shape)}: (..., I) with I = {self.input_size} is wanted")
        return self.advance(self.inputs(x), self.first(x, tuple(x.shape[:-1])) if state is None else state)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, bias={self.bias is not None}, eps={self.eps}"


def normed(x: Tensor, norm: nn.LayerNorm | None) -> Tensor:
    """Layer normalization in float32 at least; the input in that dtype where there is none."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if norm is None:
        return x.to(dtype)
    weight, bias = (p if p is None else p.to(dtype) for p in (norm.weight, norm.bias))
    return F.layer_norm(x.to(dtype), norm.normalized_shape, weight, bias, norm.eps)


class LayerNormLSTMCell(Cell):
    """``torch.nn.LSTMCell`` with layer normalization of both sums and of what is read from the cell.

    ::

        i, f, g, o = LN(W_ih x) + LN(W_hh h) + b          each LN over all 4 H sums of an example
        c' = sigmoid(f) c + sigmoid(i) tanh(g)
        h' = sigmoid(o) tanh(LN(c'))                        c' itself goes on as it is

    with LN(a) = weight (a - mean(a)) / sqrt(var(a) + eps) + bias, and a weight and a bias for each of the three.
    Statistics and state are in float32 at least.

    Args:
        input_size, hidden_size: I, H >= 1.
        bias: learn b, of shape (4 H,).
        forget_bias: first value of b for the gate f; needs ``bias`` unless 0.
        eps: > 0.
        preact_norm: normalize the two sums.
        cell_norm: normalize c' where it is read.

    Input (N, I) or (I,), and (h, c) of shape (N, H) or (H,) or None for zeros; returns the next (h, c).

    Raises:
        ValueError: an argument out of range, or an input of another size.

    Source: J. L. Ba, J. R. Kiros, G. E. Hinton, Layer Normalization, 2016, arXiv 1607.06450.

    >>> import torch
    >>> from assay.nn import LayerNormLSTMCell
    >>> h, c = LayerNormLSTMCell(4, 8)(torch.randn(3, 4))
    >>> h.shape, c.shape
    (torch.Size([3, 8]), torch.Size([3, 8]))
    """

    states, gates = 2, 4

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        forget_bias: float = 0.0,
        eps: float = 1e-5,
        preact_norm: bool = True,
        cell_norm: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, eps, device, dtype)
        in_range("forget_bias", forget_bias, math.isfinite(forget_bias) and (bias or not forget_bias), "0 without bias")
        if self.bias is not None:
            nn.init.constant_(self.bias.detach().chunk(4)[1], forget_bias)
        self.norm_ih, self.norm_hh = (self.norm(4 * hidden_size) if preact_norm else None for _ in range(2))
        self.norm_c = self.norm(hidden_size) if cell_norm else None

    @classmethod
    def from_lstm(cls, cell: nn.LSTMCell, **options: Any) -> LayerNormLSTMCell:
        """A cell with the weights of torch's, whose two biases are added; ``options`` as for the constructor."""
        like = {"device": cell.weight_ih.device, "dtype": cell.weight_ih.dtype}
        new = cls(cell.input_size, cell.hidden_size, cell.bias, **{**like, **options})
        biases = (cell.bias_ih, cell.bias_hh) if cell.bias else (None, None)
        return new._take(cell.weight_ih, cell.weight_hh, *biases)

    @torch.no_grad()
    def _take(
        self, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None
    ) -> LayerNormLSTMCell:
        self.weight_ih.copy_(weight_ih)
        self.weight_hh.copy_(weight_hh)
        if self.bias is not None and bias_ih is not None and bias_hh is not None:
            self.bias.copy_(bias_ih + bias_hh)
        return self

    def inputs(self, x: Tensor) -> Tensor:
        part = normed(F.linear(x, self.weight_ih), self.norm_ih)
        return part if self.bias is None else part + self.bias

    def advance(self, inputs: Tensor, state: State) -> State:
        h, c = state
        sums = inputs + normed(F.linear(h.to(self.weight_hh.dtype), self.weight_hh), self.norm_hh)
        i, f, g, o = sums.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * normed(c, self.norm_c).tanh(), c

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        h, c = self.run(input, hx)
        return h.to(input.dtype), c


class LayerNormGRUCell(Cell):
    """``torch.nn.GRUCell`` with layer normalization of the sums.

    ::

        r, z = LN(W_ih x) + LN(W_hh h) + b                each LN over the 2 H sums of both gates
        n  = tanh(LN(W_in x) + b_n + sigmoid(r) LN(W_hn h))
        h' = (1 - sigmoid(z)) n + sigmoid(z) h

    each LN with a weight and a bias of its own. z keeps, as in torch; in the paper it renews.

    Args:
        input_size, hidden_size: I, H >= 1.
        bias: learn b and b_n, of shape (3 H,).
        eps: > 0.

    Input (N, I) or (I,), and h of shape (N, H) or (H,) or None for zeros; returns the next h.

    Raises:
        ValueError: an argument out of range, or an input of another size.

    Source: J. L. Ba, J. R. Kiros, G. E. Hinton, Layer Normalization, 2016, arXiv 1607.06450.

    >>> import torch
    >>> from assay.nn import LayerNormGRUCell
    >>> LayerNormGRUCell(4, 8)(torch.randn(3, 4)).shape
    torch.Size([3, 8])
    """

    gates = 3

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, eps, device, dtype)
        self.norm_ih, self.norm_hh = self.norm(2 * hidden_size), self.norm(2 * hidden_size)
        self.norm_in, self.norm_hn = self.norm(hidden_size), self.norm(hidden_size)

    def inputs(self, x: Tensor) -> Tensor:
        part = self._normed(F.linear(x, self.weight_ih), self.norm_ih, self.norm_in)
        return part if self.bias is None else part + self.bias

    def _normed(self, sums: Tensor, gates: nn.LayerNorm, candidate: nn.LayerNorm) -> Tensor:
        both, last = sums.split([2 * self.hidden_size, self.hidden_size], -1)
        return torch.cat([normed(both, gates), normed(last, candidate)], -1)

    def advance(self, inputs: Tensor, state: State) -> State:
        (h,) = state
        sums = self._normed(F.linear(h.to(self.weight_hh.dtype), self.weight_hh), self.norm_hh, self.norm_hn)
        (r, z, n), (hr, hz, hn) = inputs.chunk(3, -1), sums.chunk(3, -1)
        keep = (z + hz).sigmoid()
        return (torch.lerp((n + (r + hr).sigmoid() * hn).tanh(), h.to(keep.dtype), keep),)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return self.run(input, None if hx is None else (hx,))[0].to(input.dtype)


class LayerNormRNNCell(Cell):
    """``torch.nn.RNNCell`` with layer normalization of its sum: ``h' = f(LN(W_hh h + W_ih x))``.

    Args:
        input_size, hidden_size: I, H >= 1.
        bias: learn the bias of LN.
        nonlinearity: f, "tanh" or "relu".
        eps: > 0.

    Input (N, I) or (I,), and h of shape (N, H) or (H,) or None for zeros; returns the next h.

    Raises:
        ValueError: an argument out of range, or an input of another size.

    Source: J. L. Ba, J. R. Kiros, G. E. Hinton, Layer Normalization, 2016, arXiv 1607.06450.

    >>> import torch
    >>> from assay.nn import LayerNormRNNCell
    >>> LayerNormRNNCell(4, 8)(torch.randn(3, 4)).shape
    torch.Size([3, 8])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, False, eps, device, dtype)
        in_range("nonlinearity", nonlinearity, nonlinearity in ("tanh", "relu"), "tanh or relu")
        self.nonlinearity = nonlinearity
        self.norm_sum = nn.LayerNorm(hidden_size, eps=eps, bias=bias, **self.factory)

    def inputs(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_ih)

    def advance(self, inputs: Tensor, state: State) -> State:
        total = normed(inputs + F.linear(state[0].to(self.weight_hh.dtype), self.weight_hh), self.norm_sum)
        return (total.tanh() if self.nonlinearity == "tanh" else total.relu(),)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return self.run(input, None if hx is None else (hx,))[0].to(input.dtype)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, nonlinearity={self.nonlinearity!r}, eps={self.eps}"
