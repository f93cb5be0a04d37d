"""Layer normalization in recurrent networks: layers of the cells, with the interface of torch's."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from assay._checks import in_range
from assay.nn.layer_norm.cells import Cell, LayerNormGRUCell, LayerNormLSTMCell, LayerNormRNNCell, State

__all__ = ["LayerNormGRU", "LayerNormGRUCell", "LayerNormLSTM", "LayerNormLSTMCell", "LayerNormRNNCell"]


class _Recurrent(nn.Module):
    """Layers and directions of a cell, over padded or packed sequences."""

    _cell: ClassVar[type[Cell]]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        **options: Any,
    ) -> None:
        super().__init__()
        in_range("num_layers", num_layers, num_layers >= 1, ">= 1")
        in_range("dropout", dropout, 0 <= dropout <= 1, "[0, 1]")
        self.input_size, self.hidden_size, self.num_layers, self.bias = input_size, hidden_size, num_layers, bias
        self.batch_first, self.dropout, self.bidirectional = batch_first, dropout, bidirectional
        self.directions = 2 if bidirectional else 1
        sizes = [input_size] + [self.directions * hidden_size] * (num_layers - 1)
        self.cells = nn.ModuleList(
            self._cell(size, hidden_size, bias, **options) for size in sizes for _ in range(self.directions)
        )

    def run(self, input: Tensor | PackedSequence, hx: State | None) -> tuple[Tensor | PackedSequence, State]:
        """Output, and the last state of every layer and direction, as torch's layers return them."""
        if isinstance(input, PackedSequence):
            return self._packed(input, hx)
        single = input.dim() == 2
        x = input.unsqueeze(1) if single else input.transpose(0, 1) if self.batch_first else input
        if x.dim() != 3 or x.shape[-1] != self.input_size:
            raise ValueError(f"input of shape {tuple(input.shape)}: a last size of {self.input_size} is wanted")
        if hx is not None and single:
            hx = tuple(part.unsqueeze(1) for part in hx)
        x, last = self._layers(x, hx, None)
        if single:
            return x.squeeze(1), tuple(part.squeeze(1) for part in last)
        return (x.transpose(0, 1) if self.batch_first else x), last

    def _packed(self, input: PackedSequence, hx: State | None) -> tuple[PackedSequence, State]:
        """In the order of the packed data, from the longest sequence to the shortest."""
        data, sizes, order, back = input
        x, lengths = pad_packed_sequence(PackedSequence(data, sizes))
        real = (torch.arange(len(x))[:, None] < lengths).unsqueeze(-1).to(x.device)
        if hx is not None and order is not None:
            hx = tuple(part.index_select(1, order) for part in hx)
        x, last = self._layers(x, hx, real)
        if back is not None:
            last = tuple(part.index_select(1, back) for part in last)
        return PackedSequence(pack_padded_sequence(x, lengths).data, sizes, order, back), last

    def _layers(self, x: Tensor, hx: State | None, real: Tensor | None) -> tuple[Tensor, State]:
        last: list[State] = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(self.directions):
                cell = self.cells[layer * self.directions + direction]
                assert isinstance(cell, Cell)
                state = cell.first(x, (x.shape[1],)) if hx is None else tuple(part[len(last)] for part in hx)
                output, state = _over_time(cell, x, state, real, backwards=direction == 1)
                outputs.append(output)
                last.append(state)
            x = torch.cat(outputs, -1)
            if self.dropout and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        return x, tuple(torch.stack(parts) for parts in zip(*last, strict=True))

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, batch_first={self.batch_first}, "
            f"dropout={self.dropout}, bidirectional={self.bidirectional}"
        )


def _over_time(cell: Cell, x: Tensor, state: State, real: Tensor | None, backwards: bool) -> tuple[Tensor, State]:
    """Outputs (L, N, H) and the last state; where ``real`` (L, N, 1) is False the state stays as it is."""
    steps = cell.inputs(x).unbind(0)
    kept = [None] * len(steps) if real is None else list(real.unbind(0))
    outputs = []
    for part, keep in reversed(list(zip(steps, kept, strict=True))) if backwards else zip(steps, kept, strict=True):
        new = cell.advance(part, state)
        state = new if keep is None else tuple(torch.where(keep, n, s) for n, s in zip(new, state, strict=True))
        outputs.append(state[0])
    if backwards:
        outputs.reverse()
    output = torch.stack(outputs) if outputs else x.new_zeros(*x.shape[:2], cell.hidden_size)
    return output.to(x.dtype), state


class LayerNormLSTM(_Recurrent):
    """``torch.nn.LSTM`` with layer normalization at every step, of :class:`LayerNormLSTMCell`.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as in ``torch.nn.LSTM``.
        forget_bias, eps, preact_norm, cell_norm: as in :class:`LayerNormLSTMCell`.

    Input (L, N, I), (N, L, I) if ``batch_first``, (L, I), or a ``PackedSequence``, and (h0, c0) of shape
    (layers * directions, N, H) or None; returns the output and (hn, cn), in the shapes of ``torch.nn.LSTM``.

    Raises:
        ValueError: an argument out of range, or an input of another size.

    Source: J. L. Ba, J. R. Kiros, G. E. Hinton, Layer Normalization, 2016, arXiv 1607.06450.

    >>> import torch
    >>> from assay.nn import LayerNormLSTM
    >>> output, (h, c) = LayerNormLSTM(4, 8, num_layers=2, bidirectional=True)(torch.randn(5, 3, 4))
    >>> output.shape, h.shape
    (torch.Size([5, 3, 16]), torch.Size([4, 3, 8]))
    """

    _cell = LayerNormLSTMCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        forget_bias: float = 0.0,
        eps: float = 1e-5,
        preact_norm: bool = True,
        cell_norm: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {"forget_bias": forget_bias, "preact_norm": preact_norm, "cell_norm": cell_norm}
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        super().__init__(*sizes, **options, eps=eps, device=device, dtype=dtype)

    @classmethod
    def from_lstm(cls, lstm: nn.LSTM, **options: Any) -> LayerNormLSTM:
        """A layer with the weights of torch's, whose two biases are added; ``options`` as for the constructor.

        Raises:
            ValueError: an LSTM with projections.
        """
        in_range("proj_size", lstm.proj_size, not lstm.proj_size, "0")
        names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
        like = {"device": lstm.weight_ih_l0.device, "dtype": lstm.weight_ih_l0.dtype}
        new = cls(**{name: getattr(lstm, name) for name in names}, **{**like, **options})
        for cell, weights in zip(new.cells, lstm.all_weights, strict=True):
            assert isinstance(cell, LayerNormLSTMCell)
            ih, hh, *biases = weights
            cell._take(ih, hh, *(biases or (None, None)))
        return new.train(lstm.training)

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, State]:
        return self.run(input, hx)


class LayerNormGRU(_Recurrent):
    """``torch.nn.GRU`` with layer normalization at every step, of :class:`LayerNormGRUCell`.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as in ``torch.nn.GRU``.
        eps: > 0.

    Input and output as in ``torch.nn.GRU``; packed sequences too.

    Raises:
        ValueError: an argument out of range, or an input of another size.

    Source: J. L. Ba, J. R. Kiros, G. E. Hinton, Layer Normalization, 2016, arXiv 1607.06450.

    >>> import torch
    >>> from assay.nn import LayerNormGRU
    >>> output, h = LayerNormGRU(4, 8, batch_first=True)(torch.randn(3, 5, 4))
    >>> output.shape, h.shape
    (torch.Size([3, 5, 8]), torch.Size([1, 3, 8]))
    """

    _cell = LayerNormGRUCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        super().__init__(*sizes, eps=eps, device=device, dtype=dtype)

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        output, (last,) = self.run(input, None if hx is None else (hx,))
        return output, last
