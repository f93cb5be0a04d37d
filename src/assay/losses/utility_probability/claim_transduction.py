"""The claim's task, sorting symbols into synonyms, with a small GRU that learns it, and ways to read it out."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SYMBOLS, SHORTEST, LONGEST = 10, 8, 12
PAD, BEGIN, END = 0, 1, 2
# Symbol s has the output words 3 + s and 3 + SYMBOLS + s; inputs are the first of them.
WORDS = 3 + 2 * SYMBOLS
STEPS = LONGEST + 4  # of a decoder: an output may also be too long


class Pairs(NamedTuple):
    """Inputs (N, LONGEST) and one of their right outputs (N, LONGEST + 1), which ends with END; both padded."""

    source: Tensor
    target: Tensor


def pairs(count: int, generator: torch.Generator) -> Pairs:
    """Random symbols, and the same symbols sorted, each as one of its two words."""
    length = torch.randint(SHORTEST, LONGEST + 1, (count, 1), generator=generator)
    symbols = torch.randint(SYMBOLS, (count, LONGEST), generator=generator)
    outside = torch.arange(LONGEST) >= length
    ordered = symbols.masked_fill(outside, SYMBOLS).sort(1).values
    words = 3 + ordered + SYMBOLS * torch.randint(2, ordered.shape, generator=generator)
    target = F.pad(words.masked_fill(outside, PAD), (0, 1)).scatter(1, length, END)
    return Pairs((3 + symbols).masked_fill(outside, PAD), target)


def meaning(output: Tensor) -> Tensor:
    """Outputs with each word replaced by the first of its symbol: all right outputs of an input become one."""
    return torch.where(output >= 3 + SYMBOLS, output - SYMBOLS, output)


class Transducer(nn.Module):
    """A GRU reads the input, another writes the output from the last state of the first."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.reader, self.writer = (nn.GRU(width, width, batch_first=True) for _ in range(2))
        self.scores = nn.Linear(width, WORDS)

    def read(self, source: Tensor) -> Tensor:
        """The decoder's first state (N, width): the reader's at the last symbol."""
        states, _ = self.reader(self.embedding(source))
        last = (source != PAD).sum(1) - 1
        return states[torch.arange(len(source)), last]

    def write(self, state: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the next words (N, L, WORDS) after the words before them (N, L), and the last state."""
        states, last = self.writer(self.embedding(previous), state.unsqueeze(0))
        return self.scores(states), last.squeeze(0)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        begin = torch.full_like(target[:, :1], BEGIN)
        return self.write(self.read(source), torch.cat([begin, target[:, :-1]], 1))[0]


def train(data: Pairs, steps: int, rate: float, batch: int = 128) -> Transducer:
    """Maximum likelihood by Adam, the rate falling linearly to 0; draws from torch's global generator."""
    model = Transducer()
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    order: list[Tensor] = []
    for _ in range(steps):
        order = order or list(torch.randperm(len(data.source))[: len(data.source) // batch * batch].split(batch))
        chosen = order.pop()
        target = data.target[chosen]
        loss = F.cross_entropy(model(data.source[chosen], target).flatten(0, 1), target.flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def sample(
    model: Transducer, source: Tensor, count: int, generator: torch.Generator, temperature: float = 1.0
) -> Tensor:
    """``count`` outputs of each input, word by word: (N, count, STEPS), padded after END."""
    state = model.read(source).repeat_interleave(count, 0)
    word = torch.full((len(state), 1), BEGIN)
    words = []
    for _ in range(STEPS):
        scores, state = model.write(state, word)
        p = F.softmax(scores[:, 0] / temperature, -1)
        ended = (word == END) | (word == PAD)
        word = torch.multinomial(p, 1, generator=generator).masked_fill(ended, PAD)
        words.append(word)
    return torch.cat(words, 1).view(len(source), count, STEPS)


@torch.no_grad()
def beam(model: Transducer, source: Tensor, width: int) -> Tensor:
    """The output (N, STEPS) of highest log-probability that a beam of ``width`` finds; width 1 is greedy."""
    count = len(source)
    state = model.read(source).repeat_interleave(width, 0)
    words = torch.full((count, width, 1), BEGIN)
    total = torch.full((count, width), -torch.inf)
    total[:, 0] = 0.0
    only_pad = torch.full((WORDS,), -torch.inf).index_fill(0, torch.tensor([PAD]), 0.0)
    for _ in range(STEPS):
        scores, state = model.write(state, words[:, :, -1].reshape(-1, 1))
        gain = F.log_softmax(scores[:, 0], -1).view(count, width, WORDS)
        ended = ((words[:, :, -1] == END) | (words[:, :, -1] == PAD)).unsqueeze(-1)
        total, place = (total.unsqueeze(-1) + torch.where(ended, only_pad, gain)).flatten(1).topk(width)
        origin = place // WORDS
        words = torch.cat([words.gather(1, origin.unsqueeze(-1).expand_as(words)), (place % WORDS).unsqueeze(-1)], 2)
        state = state[(origin + width * torch.arange(count).unsqueeze(1)).flatten()]
    return words[:, 0, 1:]


@torch.no_grad()
def scores_of(model: Transducer, source: Tensor, outputs: Tensor) -> Tensor:
    """Scores (N, count, STEPS, WORDS) of outputs (N, count, STEPS)."""
    count = outputs.shape[1]
    flat = model(source.repeat_interleave(count, 0), outputs.flatten(0, 1))
    return flat.view(*outputs.shape, WORDS)


def accuracy(outputs: Tensor, target: Tensor) -> Tensor:
    """Per cent of the positions, END included, at which outputs (N, ..., STEPS) say what targets (N, L) mean."""
    right = F.pad(meaning(target), (0, STEPS - target.shape[1])).view(len(target), *[1] * (outputs.dim() - 2), STEPS)
    outputs = meaning(outputs)
    counted = (outputs != PAD) | (right != PAD)
    return 100 * ((outputs == right) & counted).sum(-1) / counted.sum(-1)


def lengths(outputs: Tensor) -> Tensor:
    """Number of words before END."""
    return ((outputs != PAD) & (outputs != END)).sum(-1)


def edit_distance(ones: Tensor, others: Tensor) -> Tensor:
    """Levenshtein distance of outputs (..., L) and (..., M), END and padding left out: (...)."""
    ends, other_ends = torch.broadcast_tensors(lengths(ones), lengths(others))
    # Row i of the table, j: distance of the first i words of one and the first j of the other.
    row = torch.arange(others.shape[-1] + 1, dtype=torch.int16).expand(*ends.shape, -1)
    found = row
    for i in range(ones.shape[-1]):
        swapped = row[..., :-1] + (ones[..., i, None] != others)
        cells = [row[..., 0] + 1]
        for cell in torch.minimum(swapped, row[..., 1:] + 1).unbind(-1):
            cells.append(torch.minimum(cell, cells[-1] + 1))
        row = torch.stack(cells, -1)
        found = torch.where((ends == i + 1).unsqueeze(-1), row, found)
    return found.gather(-1, other_ends.unsqueeze(-1)).squeeze(-1)
