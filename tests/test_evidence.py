"""What claims share: their evidence on the disk, their data, their measures."""

import json
import math
from types import SimpleNamespace

import torch
from torch import nn

from assay.bench.claims import record, recorded
from assay.bench.datasets import modular_addition
from assay.bench.evidence import Evidence, Rows, at_most
from assay.bench.models import accuracy


def test_numbers_that_json_does_not_know_come_back(tmp_path):
    path = tmp_path / "evidence.json"
    card = SimpleNamespace(id="some", files=lambda: {"evidence": path})
    losses = (1.0, math.nan, math.inf, -math.inf)
    rows = Rows([{"variant": "a", "seed": seed, "loss": loss, "curve": [loss]} for seed, loss in enumerate(losses)])
    evidence = Evidence(rows, [at_most("loss", rows.values("a", "loss"), 2.0)], ["NaN is no number"])
    record(card, evidence, "assay run some --record")
    assert "NaN," not in path.read_text() and json.loads(path.read_text(), parse_constant=lambda name: 1 / 0)
    found, _ = recorded(card)
    assert repr(list(found.rows)) == repr(list(rows)) and found.notes == evidence.notes
    assert repr(found.checks) == repr(evidence.checks) and found.verdict == evidence.verdict


def test_modular_addition_is_all_pairs_once():
    (x, y), (unseen, sums) = modular_addition(3, modulus=5)
    assert len(x) == 12 and len(unseen) == 13
    a, b = torch.cat([x, unseen]).view(25, 2, 5).argmax(2).unbind(1)
    assert torch.equal((a + b) % 5, torch.cat([y, sums]))
    assert len({(int(i), int(j)) for i, j in zip(a, b, strict=True)}) == 25
    assert not torch.equal(modular_addition(4, modulus=5)[0][0], x)


def test_accuracy_is_of_evaluation_and_leaves_the_mode():
    model = nn.Sequential(nn.Dropout(1.0), nn.Identity())
    x, y = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]), torch.tensor([1, 0, 0, 1])
    assert accuracy(model, x, y) == 0.75
    assert model.training and model[0].training
