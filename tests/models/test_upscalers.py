"""Networks that enlarge, and the stage before a network."""

import numpy as np
import pytest
import torch
from PIL import Image

from scalecv.errors import ConfigError
from scalecv.models import build_model, enlarged, required_multiple
from scalecv.models.upscalers import bicubic, reduced
from scalecv.schema import IGNORE


@pytest.mark.parametrize("arch", ["espcn", "edsr"])
@pytest.mark.parametrize("factor", [2, 4])
def test_an_untrained_network_is_bicubic_and_learns(arch, factor):
    model = build_model(arch, in_channels=5, outputs=5, args={"width": 8, "blocks": 2, "factor": factor})
    images = torch.randn(2, 5, 12, 16)
    larger = model(images)
    assert larger.shape == (2, 5, 12 * factor, 16 * factor) and torch.equal(larger, bicubic(images, factor))
    (larger - 1).square().mean().backward()
    assert model.last.weight.grad.abs().sum() > 0
    assert required_multiple(arch, "", {"factor": factor}) == 1


def test_enlarging_and_reducing_are_those_of_pillow():
    values = torch.rand(1, 1, 24, 32) * 100
    picture = Image.fromarray(values[0, 0].numpy())
    for found, size in ((bicubic(values, 2), (64, 48)), (reduced(values, 2), (16, 12)), (reduced(values, 4), (8, 6))):
        wanted = torch.from_numpy(np.array(picture.resize(size, Image.Resampling.BICUBIC))).view(found.shape)
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)


def test_what_cannot_be_built_is_refused():
    for args, said in (({"factor": 3}, "2 or 4"), ({"width": 0}, "from 1 to"), ({"widht": 9}, "did you mean 'width'")):
        with pytest.raises(ConfigError, match=said):
            build_model("edsr", in_channels=1, outputs=1, args=args)
    with pytest.raises(ConfigError, match="gives the 3 bands"):
        build_model("edsr", in_channels=3, outputs=1)


def test_logits_come_back_as_mean_probabilities():
    """One logit and several; probabilities near 0 and 1 stay finite."""
    logits = torch.randn(2, 1, 8, 12) * 4
    found = torch.sigmoid(enlarged.to_native(logits, 4))
    torch.testing.assert_close(found, torch.sigmoid(logits).unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5)))
    logits = torch.randn(2, 5, 8, 12) * 4
    found = torch.softmax(enlarged.to_native(logits, 2), 1)
    torch.testing.assert_close(found, torch.softmax(logits, 1).unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)))
    assert enlarged.to_native(torch.tensor([-500.0, 500.0]).view(1, 1, 1, 2).repeat(1, 1, 2, 2), 2).isfinite().all()
    vector = torch.randn(3, 7)
    assert enlarged.to_native(vector, 2) is vector


def test_a_network_behind_the_stage():
    """It learns at the enlarged size and answers at the native one; what enlarges neither learns nor moves."""
    network = torch.nn.Conv2d(2, 1, 1)
    larger = build_model("espcn", in_channels=2, outputs=2)
    moments = ((1.0, 2.0), (3.0, 4.0))
    model = enlarged.Enlarged(network, enlarged.SuperResolution(larger, 2, moments, ((0.0, 5.0), (2.0, 8.0))), 4)
    images = torch.randn(3, 2, 6, 6)
    assert model(images).shape == (3, 1, 24, 24) and model.eval()(images).shape == (3, 1, 6, 6)
    model.train()
    model(images).mean().backward()
    assert not larger.training and all(p.grad is None and not p.requires_grad for p in larger.parameters())
    assert network.weight.grad is not None
    # An untrained one is bicubic, so other means and deviations in between change nothing.
    torch.testing.assert_close(model.enlarge(images), bicubic(bicubic(images, 2), 2))


def test_truth_is_enlarged_by_nearest_and_unlabelled_pixels_stay_so():
    mask = torch.tensor([[[0, 1], [IGNORE, 0]]])
    found = enlarged.truth({"mask": mask, "valid": torch.tensor([True])}, 2)["mask"]
    assert found.tolist() == [[[0, 0, 1, 1], [0, 0, 1, 1], [IGNORE, IGNORE, 0, 0], [IGNORE, IGNORE, 0, 0]]]
    assert enlarged.truth({"mask": mask}, 1)["mask"] is mask and "mask" not in enlarged.truth({}, 2)
