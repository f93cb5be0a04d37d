"""What is around the visits: half precision, groups and schedules, checkpoints, names, and what is refused."""

import functools
import io

import pytest
import torch
from torch import nn

from assay.optim import BAdam, BlockWrapper, PerpGrad, infer_blocks
from assay.optim.badam.test_badam import EXACT, LAYERS, backward, make, network, train

# --- half precision


@pytest.mark.parametrize(("master", "moves"), [(torch.float32, True), (None, False)])
def test_steps_below_the_rounding_of_bfloat16_add_up_in_the_master(master, moves):
    p = nn.Parameter(torch.full((4, 4), 1.0, dtype=torch.bfloat16))
    optimizer = BAdam([("w", p)], lr=1e-4, blocks=["w"], switch_every=200, master_dtype=master)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p.dtype == torch.bfloat16
    assert torch.equal(p, torch.full_like(p, 1.0 - 100 * 1e-4 if moves else 1.0))


def test_a_visit_in_bfloat16_is_adamw_on_the_float32_copy():
    model = network(torch.bfloat16)
    optimizer = make(model, order="ascending", weight_decay=0.1)
    master = nn.Parameter(model[0].weight.detach().float())
    adamw = torch.optim.AdamW([master], lr=0.01, weight_decay=0.1)
    for step in range(4):
        backward(model, step)
        master.grad = model[0].weight.grad.float()
        adamw.step()
        optimizer.step()
        assert torch.equal(model[0].weight, master.bfloat16())
    assert optimizer.current_block == 1


# --- groups, schedules, checkpoints


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("at", [2, 4, 13])
def test_a_checkpoint_goes_on_bit_for_bit(dtype, at):
    def fresh(seed=3):
        model = network(dtype)
        return model, make(model, blocks=["0", "2"], always_active=["4"], weight_decay=0.1, seed=seed)

    model, optimizer = fresh()
    whole, blocks = train(model, optimizer, range(24))
    model, optimizer = fresh()
    train(model, optimizer, range(at))
    saved = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], saved)
    saved.seek(0)
    model, optimizer = fresh(seed=9)
    weights, state = torch.load(saved, weights_only=True)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    path, rest = train(model, optimizer, range(at, 24))
    assert rest == blocks[at:]
    torch.testing.assert_close(path, whole[at:], **EXACT)


def test_a_checkpoint_of_something_else_is_refused():
    model = network()
    for state, message in [
        (torch.optim.AdamW(model.parameters()).state_dict(), "a checkpoint with 3 blocks"),
        (
            make(network(), blocks=["0", "2", "4", ""][:2], always_active=["4"]).state_dict(),
            "a checkpoint with 3 blocks",
        ),
        (make(network(torch.bfloat16)).state_dict(), "with a master copy"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(model).load_state_dict(state)


def test_a_scheduler_drives_whatever_is_active():
    model = network()
    optimizer = make(model, betas=(0.0, 0.0), eps=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    groups = list(optimizer.param_groups)
    for step in range(12):
        block = int(LAYERS[optimizer.current_block])
        before = model[block].weight.detach().clone()
        backward(model, step)
        optimizer.step()
        torch.testing.assert_close((model[block].weight - before).abs(), torch.full_like(before, 0.01 / (step + 1)))
        scheduler.step()
    assert all(one is other for one, other in zip(groups, optimizer.param_groups, strict=True))
    assert [len(group["params"]) for group in optimizer.param_groups] == [6]


def test_vectors_do_not_decay_unless_their_group_says_so():
    model = network()
    optimizer = make(model, weight_decay=0.1)
    assert [(group["weight_decay"], [p.dim() for p in group["params"]]) for group in optimizer.param_groups] == [
        (0.1, [2, 2, 2]),
        (0.0, [1, 1, 1]),
    ]
    pairs = list(model.named_parameters())
    groups = [{"params": pairs[:2], "weight_decay": 0.3}, {"params": pairs[2:4], "lr": 0.5}, {"params": pairs[4:5]}]
    optimizer = BAdam(groups, lr=0.01, weight_decay=0.1, blocks=LAYERS)
    optimizer.add_param_group({"params": pairs[5:]})
    found = [(group["lr"], group["weight_decay"], group["param_names"]) for group in optimizer.param_groups]
    assert found == [
        (0.01, 0.3, ["0.weight", "0.bias"]),
        (0.5, 0.1, ["2.weight"]),
        (0.5, 0.0, ["2.bias"]),
        (0.01, 0.1, ["4.weight"]),
        (0.01, 0.0, ["4.bias"]),
    ]


def test_added_parameters_join_the_block_of_their_name():
    model, new = network(), nn.Linear(2, 2).double()
    optimizer = make(model, order="ascending", weight_decay=0.1)
    optimizer.add_param_group({"params": [(f"2.extra.{name}", p) for name, p in new.named_parameters()], "lr": 0.5})
    assert not new.weight.requires_grad
    optimizer.switch_block(1)
    assert optimizer.active_names() == ["2.weight", "2.bias", "2.extra.weight", "2.extra.bias"]
    assert new.weight.requires_grad
    with pytest.warns(UserWarning, match="BAdam freezes what is in no block: other"):
        optimizer.add_param_group({"params": [("other", nn.Parameter(torch.ones(2)))]})
    with pytest.raises(ValueError, match=r"betas = .* is out of range"):
        optimizer.add_param_group({"params": [("0.more", nn.Parameter(torch.ones(2)))], "betas": (1.0, 0.9)})


def test_other_optimizers_go_by_blocks_too():
    model, other = network(), network()
    base = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    optimizer = BlockWrapper(lambda groups: PerpGrad(base(groups)), model, blocks=LAYERS, switch_every=3, order="fixed")
    train(model, optimizer, range(3))
    alone = PerpGrad(base(other[0].parameters()))
    for step in range(3):
        backward(other, step)
        alone.step()
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()), **EXACT)
    assert not optimizer.state


# --- names


def test_layers_are_found_by_their_number():
    def names(*names):
        return [(name, torch.zeros(1)) for name in names]

    llama = names("model.embed_tokens.weight", *(f"model.layers.{i}.{x}.weight" for i in range(11) for x in "ab"),
                  "model.norm.weight", "lm_head.weight")  # fmt: skip
    layers = [[f"model.layers.{i}"] for i in range(11)]
    assert infer_blocks(llama) == layers
    assert infer_blocks(llama, include_embedding=True, include_head=True) == [
        ["model.embed_tokens.weight"],
        *layers,
        ["model.norm.weight", "lm_head.weight"],
    ]
    gpt = names(
        "transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.mlp.layers.1.weight", "transformer.h.1.b"
    )
    assert infer_blocks(gpt, include_embedding=True) == [
        ["transformer.wte.weight", "transformer.wpe.weight"],
        ["transformer.h.0"],
        ["transformer.h.1"],
    ]
    t5 = names("encoder.block.0.layer.0.w", "encoder.block.0.layer.1.w", "decoder.block.0.layer.0.w")
    assert infer_blocks(t5) == [["encoder.block.0"], ["decoder.block.0"]]
    with pytest.raises(ValueError, match="give blocks by hand"):
        infer_blocks(names("mylayers.0.weight", "layer1.conv.weight"))


def test_a_prefix_is_whole_components_and_the_first_block_wins():
    params = {f"layers.{i}.w": nn.Parameter(torch.ones(1)) for i in (1, 10, 2)}
    pairs = [*params.items(), ("head.w", params["layers.1.w"])]
    optimizer = BAdam(pairs, blocks=[["layers.10"], "layers.1.", ["head", "layers.2"]], order="ascending")
    assert optimizer.active_names() == ["layers.10.w"]
    optimizer.switch_block()
    assert optimizer.active_names() == ["layers.1.w", "head.w"]
    optimizer.switch_block()
    assert optimizer.active_names() == ["layers.2.w"]
    with pytest.raises(ValueError, match=r"blocks\[2\] = \['head'\] is out of range: no parameter is left for it"):
        BAdam(pairs, blocks=["layers.10", "layers.1", "head", "layers.2"])


def test_what_is_in_no_block_is_frozen_and_said():
    model = network()
    with pytest.warns(UserWarning, match=r"BAdam freezes what is in no block: 4\.weight, 4\.bias") as caught:
        optimizer = make(model, blocks=["0", "2"])
    assert len(caught) == 1
    before = model[4].weight.detach().clone()
    train(model, optimizer, range(10))
    assert torch.equal(model[4].weight, before) and not model[4].weight.requires_grad


def test_the_length_of_a_visit_from_the_data():
    def length(num_samples):
        return make(network(), switch_every="auto", num_samples=num_samples, batch_size=10).switch_every

    assert [length(n) for n in (100, 2100, 90_000)] == [50, 70, 100]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("betas", (1.0, 0.9)),
        ("eps", -1e-8),
        ("weight_decay", -0.1),
        ("switch_every", 0),
        ("switch_every", 2.5),
        ("order", "cyclic"),
        ("master_dtype", torch.int32),
        ("blocks", ["0", "nothing"]),
        ("always_active", ["head"]),
    ],
)
def test_values_out_of_range_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=rf"{option}.* = .* is out of range"):
        make(network(), **{option: value})


def test_what_else_is_refused():
    with pytest.raises(ValueError, match=r"batch_size = None is out of range"):
        make(network(), switch_every="auto", num_samples=3)
    with pytest.raises(TypeError, match="base_factory = SGD is out of range"):
        BlockWrapper(torch.optim.SGD(network().parameters(), lr=0.1), network().named_parameters(), blocks=LAYERS)
