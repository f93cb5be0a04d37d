"""Trained transformers whose feed-forward layers become merged experts, in place and in the bench."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from assay.nn import MEOLinear, NoEffectWarning, convert_ffn_to_meo
from assay.nn.meo.meo import apply


def test_a_trained_model_computes_nearly_the_same_after_conversion():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), 2).eval()
    x = torch.randn(3, 5, 16)
    before, attention = encoder(x), encoder.layers[0].self_attn.out_proj
    exact = convert_ffn_to_meo(copy.deepcopy(encoder), 4, noise=0.0)
    torch.testing.assert_close(exact(x), before, rtol=1e-4, atol=1e-5)
    converted = convert_ffn_to_meo(encoder, 4, 3, level="token", reduce_factor=4)
    assert 1e-6 < (converted(x) - before).abs().max() < 0.3
    assert [type(layer.linear2) for layer in converted.layers] == [MEOLinear, MEOLinear]
    assert encoder.layers[0].self_attn.out_proj is attention and not converted.layers[0].linear1.training
    with pytest.warns(NoEffectWarning):
        convert_ffn_to_meo(nn.Sequential(nn.Linear(3, 3)), 4)
    with pytest.raises(ValueError, match="level = 'task' is out of range"):
        convert_ffn_to_meo(encoder, 4, level="task")


class Conv1D(nn.Module):
    """The layer of GPT-2 in transformers: a linear layer with the weight as (in, out)."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def test_the_feed_forward_layers_of_bert_and_gpt2_are_found_by_name():
    def parts(**children: nn.Module) -> nn.Module:
        return nn.ModuleDict(children)

    gpt = parts(attn=parts(c_proj=Conv1D(6, 6)), mlp=parts(c_fc=Conv1D(12, 6), c_proj=Conv1D(6, 12)))
    bert = parts(
        attention=parts(output=parts(dense=nn.Linear(6, 6))),
        intermediate=parts(dense=nn.Linear(6, 12)),
        output=parts(dense=nn.Linear(12, 6, bias=False)),
    )
    x, dense = torch.randn(2, 3, 6), gpt["mlp"]["c_fc"]
    for model, found in ((gpt, 2), (bert, 2)):
        model = nn.ModuleDict({"layer": convert_ffn_to_meo(nn.ModuleDict({"0": model}), 4, noise=0.0)})
        assert sum(isinstance(module, MEOLinear) for module in model.modules()) == found
    torch.testing.assert_close(gpt["mlp"]["c_fc"].eval()(x), dense(x))
    assert type(gpt["attn"]["c_proj"]) is Conv1D and type(bert["attention"]["output"]["dense"]) is nn.Linear
    assert bert["output"]["dense"].bias is None


def test_in_the_bench_the_balance_loss_is_added():
    from assay.bench.arms import DEFAULT_RECIPE
    from assay.bench.tasks import resolve_task

    run = SimpleNamespace(task=resolve_task("digits(model='vit')"))
    plain, recipe = DEFAULT_RECIPE, apply(DEFAULT_RECIPE, num_experts=4, level="token", coefficient=0.5)
    run.model = recipe.model(run)
    layers = [module for module in run.model.modules() if isinstance(module, MEOLinear)]
    assert len(layers) == 4 and not torch.allclose(layers[0].weight[0], layers[0].weight[1], atol=0.05)
    x, y = zip(*(run.task.train[i] for i in range(8)), strict=True)
    batch, found = SimpleNamespace(input=torch.stack(x), target=torch.stack(y)), []
    for each in (plain, recipe):
        torch.manual_seed(0)
        found.append(each.objective(run)(run.model, batch))
    torch.testing.assert_close(found[1] - found[0], 0.5 * sum(layer.aux_loss for layer in layers))
    with pytest.raises(ValueError, match="bytes that are to be predicted"):
        recipe.model(SimpleNamespace(task=resolve_task("text")))
    with pytest.raises(ValueError, match="coefficient = -1 is out of range"):
        apply(DEFAULT_RECIPE, coefficient=-1)
