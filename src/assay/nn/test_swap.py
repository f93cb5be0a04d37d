"""Swapping layers: what is kept, what is shared, what is refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from assay.nn import NoEffectWarning, swap
from assay.nn._swap import like


class Scaled(nn.Module):
    """A layer in the family's style: the old layer's weight, and something of its own."""

    def __init__(self, num_features: int, gain: float = 1.0, eps: float = 1e-5, affine: bool = True, dtype=None):
        super().__init__()
        self.num_features, self.gain, self.eps = num_features, gain, eps
        self.weight = nn.Parameter(torch.ones(num_features, dtype=dtype)) if affine else None
        self.own = nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain * (1 if self.weight is None else self.weight) + self.own


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def trains(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model(x)
    before.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    optimizer.step()
    assert not torch.equal(model(x), before)


def test_settings_weights_buffers_and_mode_are_kept():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=None), nn.ReLU()).double()
    model(torch.randn(5, 3, 6, 6, dtype=torch.float64))
    old, x = copy.deepcopy(model).eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    weight = model.eval()[1].weight.requires_grad_(False)
    assert swap(model, nn.BatchNorm2d, nn.SyncBatchNorm) is model
    norm = model[1]
    assert (norm.num_features, norm.eps, norm.momentum, norm.affine) == (4, 1e-3, None, True)
    assert not norm.training and norm.weight is weight and not norm.weight.requires_grad and norm.bias.requires_grad
    torch.testing.assert_close(dict(norm.state_dict()), dict(old[1].state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(model(x), old(x))
    assert norm.running_mean.data_ptr() != old[1].running_mean.data_ptr()


@pytest.mark.parametrize(
    "old",
    [
        nn.Linear(3, 5, bias=False),
        nn.Linear(3, 5, dtype=torch.float64),
        nn.Conv2d(4, 6, (3, 1), stride=2, padding="valid", dilation=2, groups=2, padding_mode="reflect"),
        nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1),
        nn.LayerNorm((2, 3), eps=1e-3, bias=False),
        nn.LayerNorm(3, elementwise_affine=False),
        nn.GroupNorm(2, 4, affine=False),
        nn.RMSNorm(3),
        nn.Embedding(5, 3, padding_idx=1),
        nn.MultiheadAttention(6, 2, dropout=0.3, kdim=4, vdim=5, batch_first=True),
        nn.Softmax(dim=1),
        nn.PReLU(3),
    ],
    ids=repr,
)
def test_a_layer_is_rebuilt_from_its_own_attributes(old: nn.Module):
    class Same(type(old)):
        pass

    new = like(old, Same)
    assert new is not old and repr(new) == repr(old).replace(type(old).__name__, "Same", 1)
    torch.testing.assert_close(dict(new.state_dict()), dict(old.state_dict()), rtol=0, atol=0)


def test_settings_are_found_under_torchs_other_names():
    assert swap(nn.LayerNorm(6, eps=1e-3), nn.LayerNorm, Scaled).num_features == 6
    assert swap(nn.LayerNorm(6, elementwise_affine=False), nn.LayerNorm, Scaled).weight is None
    assert swap(nn.GroupNorm(2, 6, eps=1e-3), nn.GroupNorm, Scaled).eps == 1e-3
    assert swap(nn.BatchNorm1d(6), nn.BatchNorm1d, nn.LayerNorm).normalized_shape == (6,)
    with pytest.raises(TypeError, match="num_features, unknown to LayerNorm"):
        swap(nn.LayerNorm((2, 3)), nn.LayerNorm, Scaled)


def test_options_win_and_unknown_ones_are_refused():
    model = nn.Sequential(nn.LayerNorm(6, eps=1e-3))
    before = model[0]
    with pytest.raises(TypeError, match="gian"):
        swap(model, nn.LayerNorm, Scaled, gian=2.0)
    assert model[0] is before
    swap(model, nn.LayerNorm, Scaled, gain=2.0, eps=0.5)
    assert (model[0].gain, model[0].eps) == (2.0, 0.5)
    with pytest.raises(TypeError, match="num_groups, unknown to Scaled"):
        swap(model, Scaled, nn.GroupNorm)


def test_tied_weights_stay_tied_and_an_optimizer_goes_on():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    class Head(nn.Linear):
        pass

    swap(model, nn.Linear, Head)
    assert type(model["head"]) is Head and model["head"].weight is model["embed"].weight
    before = model["head"].weight.detach().clone()
    model["head"](model["embed"](torch.tensor([1, 2]))).sum().backward()
    optimizer.step()
    assert not torch.equal(model["head"].weight, before)


def test_a_shared_layer_is_replaced_by_one_layer():
    norm = nn.LayerNorm(4)
    model = nn.Sequential(norm, nn.Sequential(nn.Linear(4, 4), norm), norm)
    seen = []
    swap(model, nn.LayerNorm, lambda name, module: seen.append(name) or Scaled(4))
    assert model[0] is model[1][1] is model[2] and isinstance(model[0], Scaled) and seen == ["0"]


def test_the_root_itself_may_be_swapped():
    root = nn.BatchNorm1d(4).eval()
    new = swap(root, nn.BatchNorm1d, Scaled)
    assert isinstance(new, Scaled) and new.weight is root.weight and not new.training


def test_a_wholly_frozen_layer_stays_frozen():
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
    model[0].requires_grad_(False)
    swap(model, nn.LayerNorm, Scaled)
    assert [[p.requires_grad for p in layer.parameters()] for layer in model] == [[False, False], [True, True]]


def test_device_and_dtype_follow_also_where_the_signature_has_none():
    class Plain(nn.Module):
        def __init__(self, num_features: int):
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(num_features))

    assert swap(nn.BatchNorm1d(4, dtype=torch.float64), nn.BatchNorm1d, Plain).gate.dtype == torch.float64
    assert swap(nn.BatchNorm1d(4, device="meta"), nn.BatchNorm1d, Plain).gate.is_meta
    assert swap(nn.BatchNorm1d(4).bfloat16(), nn.BatchNorm1d, Scaled).own.dtype == torch.bfloat16
    assert swap(nn.BatchNorm1d(4, affine=False, track_running_stats=False), nn.BatchNorm1d, Scaled).weight is None


def test_running_statistics_are_carried_together_or_not_at_all():
    class Fewer(nn.BatchNorm1d):
        def __init__(self, num_features: int, momentum: float | None = 0.1):
            super().__init__(num_features, momentum=momentum)
            self.running_mean = torch.zeros(2)

    old = nn.BatchNorm1d(4, momentum=None)
    old(torch.randn(8, 4))
    new = like(old, Fewer)
    assert new.num_batches_tracked == 0 and new.running_var.eq(1).all()


def test_subclasses_are_left_alone_unless_named():
    class Mine(nn.LayerNorm):
        pass

    model = nn.Sequential(nn.LayerNorm(4), Mine(4))
    swap(model, nn.LayerNorm, Scaled)
    assert [type(layer) for layer in model] == [Scaled, Mine]
    with pytest.warns(NoEffectWarning, match=r"no LayerNorm; subclasses .* named: Mine"):
        assert swap(model, nn.LayerNorm, Scaled) is model
    swap(model, (nn.LayerNorm, Mine), Scaled)
    assert type(model[1]) is Scaled


def test_a_callable_may_choose_wrap_and_leave():
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + 1

    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval()
    first = model[0]
    swap(model, nn.Linear, lambda name, layer, only: Wrapped(layer) if name == only else layer, only="0")
    assert model[0].inner is first and not model[0].training and type(model[1]) is nn.Linear
    with pytest.warns(NoEffectWarning):
        swap(model, nn.Linear, lambda name, layer: layer)
    with pytest.raises(TypeError, match=r"returned None for '0.inner'"):
        swap(model, nn.Linear, lambda name, layer: None)


@pytest.mark.parametrize("old", ["LayerNorm", nn.LayerNorm(3), (), (nn.LayerNorm, int)])
def test_a_wrong_old_is_refused(old):
    with pytest.raises(TypeError, match="old = "):
        swap(nn.Sequential(), old, Scaled)


def test_a_small_cnn_trains_after_the_swap():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    swap(model, nn.BatchNorm2d, nn.GroupNorm, num_groups=2)
    assert (model[1].num_groups, model[1].num_channels) == (2, 4)
    trains(model, torch.randn(3, 1, 8, 8))


@pytest.mark.parametrize("old, new", [(nn.LayerNorm, Scaled), (nn.LayerNorm, nn.RMSNorm), (nn.Linear, "bias")])
def test_a_transformer_runs_the_new_layers_in_evaluation_too(old, new):
    """torch's fused encoder kernel reads ``norm1.weight`` and ``linear1.weight`` and would compute the old layers."""

    class Shifted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    model = encoder()
    swap(model, old, Shifted if new == "bias" else new)
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    trains(model, x)
    expected = [model(x), model(x, src_key_padding_mask=padding)]
    model.eval()
    with torch.no_grad():
        actual = [model(x), model(x, src_key_padding_mask=padding)]
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1][~padding], expected[1][~padding])
    torch.testing.assert_close(copy.deepcopy(model)(x), expected[0])


def test_a_transformer_without_swapped_layers_keeps_its_fused_kernel():
    model = nn.Sequential(encoder(), nn.LayerNorm(8))
    swap(model, nn.LayerNorm, lambda name, layer: Scaled(8) if name == "1" else layer)
    assert model[0].use_nested_tensor and model[0].layers[0].activation_relu_or_gelu
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swap(model, Scaled, nn.RMSNorm, normalized_shape=8)
