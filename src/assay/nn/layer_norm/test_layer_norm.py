"""The recurrent layers against their equations written out, torch's own, packed sequences, and a broken variant."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from assay.bench.claims import recorded
from assay.bench.evidence import FAILS, HOLDS, Bench
from assay.catalogue import find
from assay.nn import LayerNormGRU, LayerNormGRUCell, LayerNormLSTM, LayerNormLSTMCell, LayerNormRNNCell, swap
from assay.nn._contract import Example
from assay.nn.layer_norm.claim import GRADIENT, claim, figure


def output(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)[0]


EXAMPLES = [
    Example(partial(LayerNormLSTMCell, 3, 2), (3, 3), nn.LSTMCell(3, 2), forward=output),
    Example(partial(LayerNormGRUCell, 3, 2, bias=False), (3, 3), nn.GRUCell(3, 2, bias=False)),
    Example(partial(LayerNormRNNCell, 3, 2), (3, 3), nn.RNNCell(3, 2), bfloat16=0.1),
    Example(
        partial(LayerNormLSTM, 2, 2, batch_first=True, bidirectional=True),
        (2, 2, 2),
        nn.LSTM(2, 2, batch_first=True, bidirectional=True),
        forward=output,
    ),
    Example(partial(LayerNormGRU, 2, 2, batch_first=True), (2, 3, 2), nn.GRU(2, 2, batch_first=True), forward=output),
]
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


def ln(a: Tensor, norm: nn.LayerNorm) -> Tensor:
    mean = a.mean(-1, keepdim=True)
    return norm.weight * (a - mean) / ((a - mean).square().mean(-1, keepdim=True) + norm.eps).sqrt() + norm.bias


def shaken(layer: nn.Module) -> nn.Module:
    """In float64, with all parameters away from their special first values."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.double().parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def lstm_step(cell: LayerNormLSTMCell, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    sums = ln(h @ cell.weight_hh.T, cell.norm_hh) + ln(x @ cell.weight_ih.T, cell.norm_ih) + cell.bias
    i, f, g, o = sums.chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(ln(c, cell.norm_c)), c


def test_lstm_is_its_equations_with_all_gradients():
    cell, x = shaken(LayerNormLSTMCell(3, 4)), torch.randn(5, 2, 3, dtype=torch.float64)
    found = []
    for step in (lambda x, h, c: cell(x, (h, c)), partial(lstm_step, cell)):
        leaf = x.clone().requires_grad_()
        h = c = torch.full((2, 4), 0.1, dtype=torch.float64)
        for t in range(5):
            h, c = step(leaf[t], h, c)
        found.append([h, c, *torch.autograd.grad((h + 2 * c).sin().sum(), [leaf, *cell.parameters()])])
    close(*found)


def test_gru_and_plain_cells_are_their_equations():
    x, h = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    gru = shaken(LayerNormGRUCell(3, 4))
    (xr, xn), (hr, hn) = (w.split([8, 4], -1) for w in (x @ gru.weight_ih.T, h @ gru.weight_hh.T))
    r, z = (ln(xr, gru.norm_ih) + ln(hr, gru.norm_hh) + gru.bias[:8]).chunk(2, -1)
    n = torch.tanh(ln(xn, gru.norm_in) + gru.bias[8:] + torch.sigmoid(r) * ln(hn, gru.norm_hn))
    close(gru(x, h), (1 - torch.sigmoid(z)) * n + torch.sigmoid(z) * h)
    for name in ("tanh", "relu"):
        cell = shaken(LayerNormRNNCell(3, 4, nonlinearity=name))
        close(cell(x, h), getattr(torch, name)(ln(x @ cell.weight_ih.T + h @ cell.weight_hh.T, cell.norm_sum)))
    assert LayerNormRNNCell(3, 4, bias=False).norm_sum.bias is None


@pytest.mark.parametrize("bias", [True, False])
def test_without_norms_it_is_torchs(bias):
    x, off = torch.randn(6, 3, 4, dtype=torch.float64), {"preact_norm": False, "cell_norm": False}
    lstm = nn.LSTM(4, 5, 2, bias=bias, bidirectional=True).double()
    state = tuple(torch.randn(4, 3, 5, dtype=torch.float64) for _ in range(2))
    close(LayerNormLSTM.from_lstm(lstm, **off)(x, state), lstm(x, state))
    cell = nn.LSTMCell(4, 5, bias=bias).double()
    close(LayerNormLSTMCell.from_lstm(cell, **off)(x[0]), cell(x[0]))
    with pytest.raises(ValueError, match="proj_size = 2 is out of range: 0"):
        LayerNormLSTM.from_lstm(nn.LSTM(4, 5, proj_size=2))


@pytest.mark.parametrize("kind", [LayerNormLSTM, LayerNormGRU])
def test_a_layer_is_its_cells_in_a_loop(kind):
    layer, x = shaken(kind(3, 4, num_layers=2, bidirectional=True)), torch.randn(5, 2, 3, dtype=torch.float64)
    found, last = layer(x)
    y = x
    states = []
    for pair in (layer.cells[:2], layer.cells[2:]):
        sides = []
        for cell, order in zip(pair, (range(5), range(4, -1, -1)), strict=True):
            state, outputs = None, {}
            for t in order:
                state = cell(y[t], state)
                outputs[t] = state[0] if kind is LayerNormLSTM else state
            sides.append(torch.stack([outputs[t] for t in range(5)]))
            states.append(state)
        y = torch.cat(sides, -1)
    close(found, y)
    expected = tuple(map(torch.stack, zip(*states, strict=True))) if kind is LayerNormLSTM else torch.stack(states)
    close(last, expected)
    first = copy.deepcopy(layer)
    first.batch_first = True
    close(first(x.transpose(0, 1))[0], found.transpose(0, 1))
    close(layer(x[:, 0])[0], found[:, 0])


@pytest.mark.parametrize("kind", [LayerNormLSTM, LayerNormGRU])
@pytest.mark.parametrize("sort", [True, False])
def test_packed_sequences_are_each_by_itself(kind, sort):
    layer = shaken(kind(3, 4, num_layers=2, bidirectional=True))
    sequences = [torch.randn(n, 3, dtype=torch.float64) for n in ((5, 3, 3, 1) if sort else (3, 5, 1, 3))]
    shape = (4, 4, 4)
    state = (
        tuple(torch.randn(shape, dtype=torch.float64) for _ in range(2))
        if kind is LayerNormLSTM
        else torch.randn(shape).double()
    )
    packed = pack_sequence(sequences, enforce_sorted=sort)
    result, last = layer(packed, state)
    assert torch.equal(result.batch_sizes, packed.batch_sizes)
    padded, lengths = pad_packed_sequence(result)
    for i, sequence in enumerate(sequences):
        own = tuple(part[:, i : i + 1] for part in state) if kind is LayerNormLSTM else state[:, i : i + 1]
        alone, ended = layer(sequence[:, None], own)
        close(padded[: lengths[i], i], alone[:, 0])
        pairs = zip(last, ended, strict=True) if kind is LayerNormLSTM else [(last, ended)]
        for found, expected in pairs:
            close(found[:, i], expected[:, 0])


def test_rescaled_and_recentred_weights_change_nothing():
    cell, x = shaken(LayerNormLSTMCell(3, 4, eps=1e-14)), torch.randn(2, 3, dtype=torch.float64)
    state = tuple(torch.randn(2, 4, dtype=torch.float64) for _ in range(2))
    expected = cell(x, state)
    with torch.no_grad():
        cell.weight_hh.mul_(3).add_(torch.randn(1, 4, dtype=torch.float64))  # one row added to all
        cell.weight_ih.mul_(0.2)
    close(cell(x, state), expected)
    close(cell(7 * x, state), expected)


def test_one_norm_over_all_gates_and_none_on_what_is_carried():
    torch.manual_seed(0)
    cell, x = LayerNormLSTMCell(3, 4).double(), torch.randn(2, 3, dtype=torch.float64)
    sums = x @ cell.weight_ih.T
    whole, each = F.layer_norm(sums, (16,)), F.layer_norm(sums.unflatten(-1, (4, 4)), (4,)).flatten(-2)
    close(cell.inputs(x), whole, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole, each, atol=0.1)
    with torch.no_grad():
        cell.bias.fill_(30.0)  # all gates open
    state = (torch.zeros(2, 4).double(), torch.zeros(2, 4).double())
    for _ in range(20):
        state = cell(x, state)
    close(state[1], torch.full((2, 4), 20.0, dtype=torch.float64))
    assert state[0].abs().max() <= 1


def test_first_values():
    cell = LayerNormLSTMCell(3, 4, forget_bias=2.0)
    assert cell.bias.tolist() == [0.0] * 4 + [2.0] * 4 + [0.0] * 8
    for gate in cell.weight_hh.chunk(4):
        torch.testing.assert_close(gate @ gate.T, torch.eye(4))
    with pytest.raises(ValueError, match=r"forget_bias = 1\.0 is out of range: 0 without bias"):
        LayerNormLSTMCell(3, 4, bias=False, forget_bias=1.0)


def test_dropout_is_between_layers_and_in_training_alone():
    layer, x = LayerNormLSTM(3, 4, num_layers=2, dropout=0.9), torch.randn(5, 2, 3)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_state_is_float32_under_autocast():
    layer = LayerNormLSTM(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y, (h, c) = layer(torch.randn(5, 2, 3).bfloat16())
    assert y.dtype == torch.bfloat16 and h.dtype == c.dtype == torch.float32


def test_in_a_torch_model_a_step_learns():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0])

    model = swap(Tagger(), nn.LSTM, LayerNormLSTM)
    assert model.lstm.batch_first
    optimizer, x, y = torch.optim.Adam(model.parameters(), lr=0.01), torch.randn(4, 6, 3), torch.randint(2, (24,))
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(x).flatten(0, 1), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_arguments_out_of_range_are_named():
    for name, value in [("input_size", 0), ("hidden_size", -1), ("eps", 0.0), ("num_layers", 0), ("dropout", 2.0)]:
        with pytest.raises(ValueError, match=f"{name} = {value} is out of range"):
            LayerNormLSTM(**{"input_size": 3, "hidden_size": 4, name: value})
    with pytest.raises(ValueError, match="nonlinearity = 'gelu' is out of range: tanh or relu"):
        LayerNormRNNCell(3, 4, nonlinearity="gelu")
    with pytest.raises(ValueError, match=r"input of shape \(5, 2, 4\)"):
        LayerNormGRU(3, 4)(torch.randn(5, 2, 4))
    with pytest.raises(ValueError, match=r"input of shape \(2, 4\)"):
        LayerNormGRUCell(3, 4)(torch.randn(2, 4))


class OutputNormed(nn.Module):
    """The broken variant of the card: a plain LSTM with layer normalization on its outputs."""

    def __init__(self, input_size: int, hidden_size: int, batch_first: bool) -> None:
        super().__init__()
        self.lstm = LayerNormLSTM(input_size, hidden_size, batch_first=batch_first, preact_norm=False, cell_norm=False)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.norm(self.lstm(x)[0]), None


def test_the_claim_does_not_hold_for_normalized_outputs():
    real, broken = (claim(Bench(), method=m, parts=(GRADIENT,), seeds=3) for m in (LayerNormLSTM, OutputNormed))
    assert (real.checks[0].verdict, broken.checks[0].verdict) == (HOLDS, FAILS)


def test_the_claim_is_drawn():
    evidence, _ = recorded(find("layer-norm"))
    assert figure(evidence) is not None
