"""Hostile files in the place of weights: each is refused by name."""

import pytest
import torch

from scalecv.errors import ConfigError
from scalecv.models import build_model, weights
from tests.security import hostile

SAFETENSORS = hostile.safetensors_cases()
PICKLES = hostile.pickle_cases()


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_hostile_safetensors_file_is_refused(name, watched, tmp_path):
    with pytest.raises(weights.BadWeights) as refused:
        weights.tensors(SAFETENSORS[name])
    assert len(str(refused.value)) < 400


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", PICKLES)
def test_a_hostile_file_of_torch_is_refused_and_nothing_else_is_tried(name, watched, tmp_path, canary):
    (tmp_path / "evil.pt").write_bytes(PICKLES[name])
    with pytest.raises(ConfigError, match=r"model.weights=.*evil.pt cannot be read: .*safetensors.torch.save_file"):
        weights.load_weights(torch.nn.Linear(2, 2), str(tmp_path / "evil.pt"))


@pytest.mark.parametrize("wrapped", [None, "state_dict", "model"])
def test_a_state_dict_of_torch_save_is_taken(wrapped, watched, tmp_path):
    torch.manual_seed(1)
    kept = build_model("resnet10", in_channels=3, outputs=2, args={"width": 8}).state_dict()
    (tmp_path / "mine.pth").write_bytes(hostile.saved({"epoch": 3, wrapped: kept} if wrapped else kept).read())
    torch.manual_seed(2)
    model = build_model("resnet10", in_channels=3, outputs=2, args={"width": 8})
    weights.load_weights(model, str(tmp_path / "mine.pth"))
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())


def test_what_a_file_is_decides_not_its_name(watched, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(PICKLES["os.system"])
    with pytest.raises(ConfigError, match="cannot be read: not a safetensors file"):
        weights.load_weights(torch.nn.Linear(2, 2), str(tmp_path / "a.safetensors"))
