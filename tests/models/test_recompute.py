"""The same gradients and running statistics with less kept: measured by what autograd holds, not by time."""

import copy

import pytest
import torch
from torch import nn

from scalecv.errors import ConfigError
from scalecv.models import build_model
from scalecv.models.recompute import recompute_blocks


def plain(*layers):
    return lambda: nn.Sequential(*layers)


def built(arch, **keys):
    return lambda: build_model(arch, in_channels=3, outputs=2, **keys)


SEQUENCE = [layer for width in (3, 8, 8, 8) for layer in (nn.Conv2d(width, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU())]


def step(model, images):
    """Loss, and bytes that the forward pass keeps besides the weights."""
    held, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(images).square().mean()
    loss.backward()
    return loss.detach(), sum(held.values())


@pytest.mark.parametrize(
    ("build", "share"),
    [
        (built("resnet10"), 0.8),
        (built("densenet121"), 0.6),
        (built("timm/convnext_atto"), 0.3),
        (built("unet"), 0.5),
        (built("unet", encoder="tu-convnext_atto"), 0.4),
        (plain(*SEQUENCE, nn.Dropout(0.5), nn.Conv2d(8, 2, 1)), 0.6),
    ],
    ids=["blocks", "lists", "timm", "unet", "unet-timm", "sequence"],
)
def test_the_same_gradients_with_less_kept(build, share):
    torch.manual_seed(0)
    model = build().train()
    again = copy.deepcopy(model)
    assert recompute_blocks(again, "net") > 0
    images = torch.randn(2, 3, 64, 64)
    (loss, kept), (same, less) = step(model, images), step(copy.deepcopy(again), images)
    assert torch.equal(loss, same) and less < share * kept, less / kept
    _, less = step(again, images)
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        assert one.grad is None or torch.allclose(one.grad, other.grad, rtol=1e-6, atol=1e-6), name
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), again.buffers(), strict=True)), (
        "moved once, not twice"
    )
    assert list(model.state_dict()) == list(again.state_dict())
    assert torch.equal(model.eval()(images), again.eval()(images))


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ConfigError, match=r"train.recompute=true: tiny has no blocks"):
        recompute_blocks(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), "tiny")
