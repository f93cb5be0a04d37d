"""The intermediate model: what is averaged, what is not, and what is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from assay.data import average_checkpoints

EXACT = {"rtol": 0.0, "atol": 0.0}


def test_the_mean_of_checkpoints():
    def make():
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

    models = [make() for _ in range(3)]
    for k, model in enumerate(models):
        for _ in range(k + 1):
            model(torch.randn(5, 3))
    states = [model.state_dict() for model in models]
    before = copy.deepcopy(states)
    mean = average_checkpoints(iter(states))
    torch.testing.assert_close([dict(s) for s in states], [dict(s) for s in before], **EXACT)
    for name, value in mean.items():
        if name.endswith("num_batches_tracked"):
            assert value == 3 and value.dtype == torch.int64
        else:
            torch.testing.assert_close(value, sum(state[name] for state in states) / 3)
    intermediate = make()
    intermediate.load_state_dict(mean)
    mean["1.num_batches_tracked"].fill_(0)
    assert models[2][1].num_batches_tracked == 3  # nothing is shared with what was read
    torch.testing.assert_close(average_checkpoints([states[0]]), dict(states[0]), **EXACT)


def test_half_checkpoints_are_averaged_without_loss():
    values = [torch.full((2,), v, dtype=torch.float16) for v in (60000.0, 50000.0, 40000.0)]
    mean = average_checkpoints({"w": v} for v in values)["w"]
    assert mean.dtype == torch.float16 and (mean == 50000).all()


def test_checkpoints_that_do_not_fit():
    one = {"a": torch.ones(2), "b": torch.ones(2)}
    for states, message in [
        ([], "state_dicts is empty"),
        ([one, {"a": torch.ones(2)}], r"checkpoint 2 .* differ in the entries \['b'\]"),
        ([one, {"a": torch.ones(3), "b": torch.ones(2)}], r"a.shape = \(3,\) is out of range: \(2,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            average_checkpoints(states)
