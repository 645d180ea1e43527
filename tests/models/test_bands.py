"""How weights for red, green and blue become those of other bands, by hand and in each library's networks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from scalecv.errors import ConfigError
from scalecv.models import build_model
from scalecv.models.bands import adapt_channels
from scalecv.models.weights import load_weights

RGB = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)
"""One output, red 1, green 2, blue 6; their mean is 3."""


@pytest.mark.parametrize(
    ("init", "bands", "expected"),
    [
        ("copy", 3, [1, 2, 6]),
        ("copy", 4, [0.75, 1.5, 4.5, 0.75]),
        ("copy", 1, [3]),
        ("mean", 4, [2.25, 2.25, 2.25, 2.25]),
        ("mean", 1, [9]),
        ("zero", 3, [1, 2, 6]),
        ("zero", 5, [1, 2, 6, 0, 0]),
        ("zero", 2, [1.5, 3]),
        (("red", "green", "blue", "red"), 4, [0.75, 1.5, 4.5, 0.75]),
        (("blue", "green", "red"), 3, [6, 2, 1]),
        (("red", "green", "blue", "zero"), 4, [1, 2, 6, 0]),
        (("mean", "red", "zero"), 3, [4.5, 1.5, 0]),
    ],
)
def test_by_hand(init, bands, expected):
    assert adapt_channels(RGB, bands, init).flatten().tolist() == expected


def test_what_cannot_be_is_refused():
    for init, weight, said in (
        (("red", "green"), RGB, "names 2 bands, the images have 4"),
        (("zero",) * 4, RGB, "zero for every band"),
        (("red", "green", "blue", "zero"), RGB.repeat(1, 2, 1, 1), "starting weights are for 6 bands"),
    ):
        with pytest.raises(ConfigError, match=said):
            adapt_channels(weight, 4, init)


NETWORKS = {
    "resnet18": ("resnet18", {}, ["conv1.weight"]),
    "timm": ("timm/resnet18", {}, ["conv1.weight"]),
    "smp": ("unet", {"encoder": "resnet18"}, ["encoder.conv1.weight"]),
    "branches": (
        "unet",
        {"encoder": "mobileone_s0"},
        [f"encoder.stage0.rbr_{name}.weight" for name in ("conv.0.conv", "scale.conv")],
    ),
    "smp-timm": ("fpn", {"encoder": "tu-resnet18"}, ["encoder.model.conv1.weight"]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_library_takes_the_bands_in_the_same_way(name, tmp_path):
    arch, extra, first = NETWORKS[name]
    rgb = build_model(arch, in_channels=3, outputs=2, **extra).state_dict()
    save_file(rgb, str(tmp_path / "rgb.safetensors"))
    model = build_model(arch, in_channels=4, outputs=2, **extra)
    told = load_weights(model, str(tmp_path / "rgb.safetensors"), init="zero", scope="all")
    own = model.state_dict()
    for layer in first:
        assert torch.equal(own[layer][:, :3], rgb[layer]) and not own[layer][:, 3].any(), layer
    assert told.left == () and told.adapted == f"{', '.join(first)} from 3 to 4 bands by zero"
    x = torch.randn(1, 4, 64, 64)
    three = build_model(arch, in_channels=3, outputs=2, **extra)
    three.load_state_dict(rgb)
    torch.testing.assert_close(model.eval()(x), three.eval()(x[:, :3]), msg="the new band changes nothing yet")


OFFLINE = """
import json, os, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from scalecv.models import build_model
from scalecv.models.library import imagenet_state
from scalecv.models.weights import load_state
home = Path(sys.argv[1])
torch.manual_seed(1)
import torchvision, segmentation_models_pytorch as smp
plain = torchvision.models.resnet18().state_dict()
for arch in ("resnet18", "unet"):  # files where the libraries look before they download
    if arch == "resnet18":
        name = torchvision.models.get_model_weights(arch).DEFAULT.url.rpartition("/")[2]
        (home / "hub/checkpoints").mkdir(parents=True)
        torch.save(plain, home / "hub/checkpoints" / name)
    else:
        its = smp.encoders.encoders["resnet18"]["pretrained_settings"]["imagenet"]
        repo = home / "hf" / ("models--" + its["repo_id"].replace("/", "--")) / "snapshots" / its["revision"]
        repo.mkdir(parents=True)
        (repo / "config.json").write_text("{}")
        save_file(smp.encoders.get_encoder("resnet18").state_dict() | {
            k: v for k, v in plain.items() if not k.startswith("fc")}, str(repo / "model.safetensors"))
    model = build_model(arch, in_channels=4, outputs=2)
    state = imagenet_state(arch, "resnet18")
    told = load_state(model, state, "imagenet", init="mean", scope="encoder")
    first = model.state_dict()[("encoder." if arch == "unet" else "") + "conv1.weight"]
    expected = plain["conv1.weight"].mean(1, keepdim=True).expand(-1, 4, -1, -1) * 0.75
    assert torch.equal(first, expected), arch
    print(len(told.loaded), sorted({n.split(".")[0] for n in told.left}))
try:
    imagenet_state("timm/resnet18", "")
except Exception as error:
    print(type(error).__name__, error)
"""


def test_imagenet_weights_of_the_libraries_are_adapted_here_and_offline_is_one_clear_error(tmp_path):
    keys = {"TORCH_HOME": tmp_path, "HF_HUB_CACHE": tmp_path / "hf", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | {name: str(value) for name, value in keys.items()}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-W", "ignore", "-c", OFFLINE, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert said.returncode == 0, said.stderr[-2000:]
    lines = said.stdout.strip().splitlines()
    assert lines[0] == "120 ['fc']" and lines[1] == "120 ['decoder', 'segmentation_head']"
    assert lines[2].startswith("ConfigError the ImageNet weights of timm/resnet18 could not be had")
    assert "set model.weights=URI" in lines[2]
