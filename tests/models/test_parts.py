"""Frozen parts stay as they are, bit for bit; a name that is not there is refused with the nearest one."""

import copy

import pytest
import torch

from scalecv.errors import ConfigError
from scalecv.models import build_model
from scalecv.models.parts import factors_of, freeze, head_names


def step(model):
    """One update of all that learns, after the loop's own `train()`."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01, weight_decay=0.1)
    model(torch.randn(4, 4, 64, 64)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("arch", "what", "stays", "moves"),
    [
        (
            "resnet10",
            "encoder",
            ["conv1.weight", "bn1.running_mean", "layer4.0.bn2.num_batches_tracked"],
            ["fc.weight"],
        ),
        ("unet", "encoder", ["encoder.bn1.running_var", "encoder.layer4.1.conv2.weight"], ["decoder.blocks.0"]),
        (
            "resnet10",
            ("bn1", "layer1"),
            ["bn1.running_mean", "layer1.0.conv1.weight"],
            ["conv1.weight", "layer2.0.bn1"],
        ),
        (
            "timm/efficientnet_b0",
            "encoder",
            ["bn1.running_mean", "blocks.6.0.se.conv_reduce.bias"],
            ["classifier.bias"],
        ),
    ],
)
def test_frozen_parts_are_the_same_bits_after_an_update(arch, what, stays, moves):
    model = build_model(arch, in_channels=4, outputs=2)
    names = list(model.state_dict())
    assert 0 < freeze(model, what) < sum(p.numel() for p in model.parameters())
    assert list(model.state_dict()) == names
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        step(model)
    after = model.state_dict()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen | set(stays) <= {name for name in names if torch.equal(before[name], after[name])}
    for name in moves:
        assert any(not torch.equal(before[n], after[n]) for n in names if n.startswith(name)), name
    if what == "encoder":
        assert {n for n in names if not torch.equal(before[n], after[n])} <= head_names(model)


def test_names_that_are_not_there_and_nothing_left_to_learn():
    model = build_model("unet", in_channels=3, outputs=1)
    for what, said in (
        (("encoder.layr1",), r"model.freeze: no part .* 'encoder.layr1'; did you mean 'encoder.layer1'"),
        (("zzz",), "it has encoder, decoder, segmentation_head"),
        (("encoder", "decoder", "segmentation_head"), "leaves nothing that could learn"),
    ):
        with pytest.raises(ConfigError, match=said):
            freeze(model, what)
    with pytest.raises(ConfigError, match=r"train.lr_factors: no part .*did you mean 'decoder'"):
        factors_of(model, {"decodr": 0.1})
    freeze(model, "encoder")
    with pytest.raises(ConfigError, match=r"all of 'encoder\.layer1' is frozen"):
        factors_of(model, {"encoder.layer1": 0.1})


def test_the_longest_name_gives_the_factor():
    model = build_model("resnet10", in_channels=3, outputs=2)
    found = factors_of(model, {"layer4.0.bn1": 3.0, "encoder": 0.1, "layer4": 0.5})
    assert found["conv1.weight"] == 0.1 and found["layer4.0.conv1.weight"] == 0.5 and found["layer4.0.bn1.bias"] == 3.0
    assert "fc.weight" not in found
