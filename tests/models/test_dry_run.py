"""Images that a network cannot train on are refused without computing; nothing of the network changes."""

import pytest
import torch

from scalecv.errors import ConfigError
from scalecv.models import build_model
from scalecv.models.dry_run import check_fits


@pytest.mark.parametrize(
    ("arch", "shape", "extra", "said"),
    [
        (
            "deeplabv3plus",
            (1, 4, 64, 64),
            {},
            r"single values in images of 64x64 pixels, 1 at a time.*model.norm=frozen",
        ),
        ("pan", (2, 4, 64, 64), {}, r"images of 64x64 pixels vanish .*model.arch=pan .*data.size_px"),
        ("vgg11_bn", (2, 4, 16, 16), {}, "vanish"),
        ("pan", (1, 4, 128, 128), {"norm": "group"}, "single values"),
        ("unet", (2, 4, 288, 288), {"encoder": "tu-swin_tiny_patch4_window7_224"}, r"288x288.*args=\{img_size: 288\}"),
        ("vit_b_16", (2, 4, 64, 64), {}, r"64x64 .*Expected 224.*image_size of torchvision"),
        ("vit_b_16", (2, 4, 64, 64), {"args": {"image_size": 64}}, None),
        ("unet", (2, 4, 300, 300), {"encoder": "tu-hrnet_w18_small"}, r"300x300 .*data.size_px to a multiple of 32"),
        ("fpn", (2, 4, 272, 272), {}, r"272x272 .*data.size_px to a multiple of 32"),
        ("dpt", (2, 4, 240, 240), {"encoder": "tu-vit_tiny_patch16_224"}, r"data.size_px to a multiple of 32"),
        ("deeplabv3plus", (2, 4, 64, 64), {}, None),
        ("deeplabv3plus", (1, 4, 64, 64), {"norm": "group"}, None),
        ("pspnet", (1, 4, 64, 64), {"norm": "frozen"}, None),
        ("unet", (2, 4, 16, 16), {"norm": "sync"}, None),
    ],
)
def test_what_a_size_allows(arch, shape, extra, said):
    model = build_model(arch, in_channels=4, outputs=2, **extra)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if said:
        with pytest.raises(ConfigError, match=said):
            check_fits(model, shape, arch)
    else:
        check_fits(model, shape, arch)
        side = () if arch.startswith("vit") else shape[2:]
        assert model(torch.randn(shape)).shape == (shape[0], 2, *side)
        return
    after = model.state_dict()
    assert model.training and all(torch.equal(before[name], after[name]) for name in before)
