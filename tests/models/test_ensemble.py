"""Means of networks: of their probabilities, each with images of its own, and of their weights."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scalecv.models import build_model
from scalecv.models.ensemble import Ensemble, Member
from scalecv.models.soup import mean_of, renew_statistics

MEAN, STD = (100.0, 50.0, 10.0), (20.0, 10.0, 5.0)


def pixelwise(channels, outputs, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(channels, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, outputs, 1))


def raw(size=16):
    return torch.rand(4, 3, size, size) * 100


def seen(images, channels, mean, std):
    shape = (1, -1, 1, 1)
    return (images[:, channels] - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


@pytest.mark.parametrize("outputs", [1, 2, 5])
def test_the_mean_is_that_of_members_that_see_their_own_bands_and_normalisation(outputs):
    images = raw()
    nets = [pixelwise(3, outputs, 0), pixelwise(2, outputs, 1)]
    its = ([2, 0], (7.0, 80.0), (3.0, 30.0))
    made = Ensemble(
        [Member(nets[0], [0, 1, 2], (MEAN, STD), (MEAN, STD)), Member(nets[1], its[0], (MEAN, STD), its[1:])],
        [0.25, 0.75],
    )
    alone = [nets[0](seen(images, [0, 1, 2], MEAN, STD)), nets[1](seen(images, *its))]
    how = torch.sigmoid if outputs == 1 else lambda z: torch.softmax(z, 1)
    expected = 0.25 * how(alone[0]) + 0.75 * how(alone[1])
    torch.testing.assert_close(how(made(seen(images, [0, 1, 2], MEAN, STD))), expected, rtol=0, atol=1e-6)


def test_a_member_may_see_smaller_images():
    images, net = raw(32), pixelwise(3, 2, 0)
    member = Member(net, [0, 1, 2], (MEAN, STD), (MEAN, STD), scale=(0.5, 0.5), multiple=16)
    given = seen(images, [0, 1, 2], MEAN, STD)
    small = F.interpolate(given, (16, 16), mode="bilinear", antialias=True)
    expected = F.interpolate(net(small), (32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(member(given), expected)
    assert member(seen(raw(40), [0, 1, 2], MEAN, STD)).shape == (4, 2, 40, 40)  # 20 px is no multiple of 16


@pytest.mark.parametrize("sure", [0.0, 60.0, 500.0])
def test_certain_members_give_numbers(sure):
    z = torch.tensor([[[[sure]]], [[[-sure]]]])
    logits = Ensemble([nn.Identity(), nn.Identity()], [0.5, 0.5])(z)
    torch.testing.assert_close(torch.sigmoid(logits), torch.sigmoid(z))
    assert torch.isfinite(logits).all()


def test_it_is_exported():
    nets = [pixelwise(3, 2, seed) for seed in (0, 1)]
    made = Ensemble(
        [Member(nets[0], [0, 1, 2], (MEAN, STD), (MEAN, STD)), Member(nets[1], [2, 1, 0], (MEAN, STD), (MEAN, STD))],
        [0.5, 0.5],
    ).eval()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(torch.export.export(made, (images,)).module()(images), made(images))


def test_the_mean_of_weights_by_hand():
    one = {"a": torch.tensor([1.0, 3.0]), "seen": torch.tensor(5)}
    other = {"a": torch.tensor([3.0, 5.0]), "seen": torch.tensor(9)}
    found = mean_of([one, other])
    assert found["a"].tolist() == [2.0, 4.0] and found["seen"].item() == 5
    with pytest.raises(ValueError, match="several shapes"):
        mean_of([one, {"a": torch.zeros(3), "seen": torch.tensor(0)}])


@pytest.mark.parametrize("norm", ["batch", "sync", "frozen", "group"])
def test_statistics_are_those_of_the_images(norm):
    torch.manual_seed(0)
    net = build_model("resnet10", in_channels=3, outputs=2, stem="small", norm=norm, args={"width": 4})
    before = copy.deepcopy(net.state_dict())
    images = [torch.randn(32, 3, 16, 16) * 3 + 1 for _ in range(3)]
    renewed = renew_statistics(net, images)
    assert not net.training and (renewed > 0) == (norm in ("batch", "sync"))
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert all("running_" in name or "num_batches" in name for name in changed) and bool(changed) == (renewed > 0)
    if renewed:
        first = next(m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        shown = []
        first.register_forward_pre_hook(lambda module, given: shown.append(given[0]))
        with torch.no_grad():
            for batch in images:
                net(batch)
        mean = torch.stack([one.mean((0, 2, 3)) for one in shown]).mean(0)
        torch.testing.assert_close(first.running_mean, mean, rtol=1e-4, atol=1e-5)
        assert first.momentum == 0.1
