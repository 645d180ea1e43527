"""Every kind of network by its name: channels, outputs, stems, and what is refused before building."""

import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from scalecv.errors import ConfigError
from scalecv.models import MODELS, build_model, check_arch, required_multiple, task_of
from scalecv.models.facts import latency_ms, model_facts
from scalecv.models.library import check_imagenet


def tiny(in_channels, outputs, width=4):
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, outputs)
    )


@pytest.mark.parametrize(
    ("arch", "side", "extra"),
    [
        ("resnet10", 8, {"stem": "small"}),
        ("resnet10", 32, {"args": {"width": 8}}),
        ("resnet18", 32, {"stem": "small"}),
        ("resnet18", 32, {}),
        ("mobilenet_v3_small", 32, {}),
        ("efficientnet_b0", 32, {}),
        ("vit_b_16", 32, {"args": {"image_size": 32, "dropout": 0.1}}),
        ("timm/resnet18", 32, {}),
        ("timm/vit_tiny_patch16_224", 32, {"args": {"img_size": 32}}),
    ],
)
@pytest.mark.parametrize("channels", [1, 5])
def test_classifiers(arch, side, extra, channels):
    model = build_model(arch, in_channels=channels, outputs=7, **extra)
    assert model(torch.randn(2, channels, side, side)).shape == (2, 7)
    assert task_of(arch) == "classify" and required_multiple(arch, "") == 1


@pytest.mark.parametrize("arch", [name for name, _ in MODELS.items() if task_of(name) == "segment"])
def test_segmenters_of_four_bands(arch):
    encoder = "tu-vit_tiny_patch16_224" if arch == "dpt" else "resnet18"
    side = 128 if arch == "pan" else 64
    model = build_model(arch, in_channels=4, outputs=3, encoder=encoder)
    logits = model(torch.randn(2, 4, side, side))
    assert logits.shape == (2, 3, side, side)
    assert logits.min() < 0 < logits.max()
    logits.mean().backward()


def test_logits_of_aux_networks_are_plain_tensors():
    model = build_model("googlenet", in_channels=2, outputs=3)
    assert model.train()(torch.randn(2, 2, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize(
    ("arch", "args", "encoder", "multiple"),
    [
        ("unet", {}, "resnet18", 1),
        ("fpn", {}, "resnet18", 32),
        ("fpn", {"encoder_depth": 4, "upsampling": 2}, "resnet18", 16),
        ("linknet", {"encoder_depth": 4}, "resnet18", 16),
        ("pspnet", {}, "resnet18", 8),
        ("deeplabv3plus", {}, "resnet18", 16),
        ("deeplabv3plus", {"encoder_output_stride": 8}, "resnet18", 8),
        ("dpt", {}, "tu-vit_small_patch8_224", 32),
        ("dpt", {}, "tu-vit_tiny_patch16_224", 32),
        ("dpt", {}, "tu-deit_tiny_patch16_224", 32),
        ("unet", {}, "tu-hrnet_w18_small", 32),
        ("unet", {}, "efficientnet-b7", 1),
        ("unet", {"img_size": 96}, "tu-swin_tiny_patch4_window7_224", 1),
    ],
)
def test_required_multiple_is_the_one_the_network_has(arch, args, encoder, multiple):
    assert required_multiple(arch, encoder, args) == multiple
    model = build_model(arch, in_channels=3, outputs=1, encoder=encoder, args=args).eval()
    with torch.no_grad():
        side = args.get("img_size", 64 + multiple)
        assert model(torch.randn(1, 3, side, side)).shape[-2:] == (side, side)
        if multiple > 1:
            with pytest.raises(RuntimeError, match=r"divisible|must match"):
                model(torch.randn(1, 3, side - min(multiple // 2, 16), side))


@pytest.mark.parametrize(
    ("arch", "extra", "said"),
    [
        ("resnet81", {}, "unknown model.arch 'resnet81'; did you mean 'resnet18'"),
        ("unett", {}, "did you mean 'unet'"),
        ("zzz", {}, "was expected"),
        ("timm/resnet81", {}, "did you mean 'timm/resnet"),
        ("unet", {"encoder": "resnet81"}, "did you mean 'resnet18'"),
        ("unet", {"encoder": "tu-resnet81"}, "did you mean 'tu-resnet"),
        ("unet", {"stem": "small"}, "model.stem=small is for"),
        ("vit_b_16", {"stem": "small"}, "model.stem=small is for"),
        ("timm/vit_tiny_patch16_224", {"stem": "small"}, "model.stem=small is for"),
        ("resnet18", {"args": {"widht": 3}}, "cannot be built: .*widht"),
        ("unet", {"args": {"activation": "sigmoid"}}, "model.args.activation of unet is not free"),
        ("timm/resnet18", {"args": {"checkpoint_path": "x.pth"}}, "checkpoint_path"),
        ("resnet10", {"args": {"width": "wide"}}, "takes width alone"),
        ("dpt", {}, "needs a tu-vit"),
        ("dpt", {"encoder": "tu-vit_small_patch14_dinov2"}, "patches of 8, 16 or 32 pixels"),
        ("fpn", {"encoder": "tu-deit_tiny_patch16_224"}, "take model.arch=dpt"),
        ("pan", {"encoder": "tu-hrnet_w18_small"}, "needs an encoder with dilated convolutions"),
        ("fpn", {"args": {"encoder_depth": 4}}, "2 times the size of the image"),
        ("deeplabv3", {"encoder": "vgg11"}, "needs an encoder with dilated convolutions.*take resnet"),
        ("pan", {"encoder": "densenet121"}, "needs an encoder with dilated convolutions"),
        ("linknet", {"encoder": "mit_b0"}, "does not take the encoder mit_b0.*take segformer"),
        ("unetpp", {"encoder": "mit_b0"}, "does not take the encoder mit_b0"),
        ("unet", {"encoder": "tu-vit_tiny_patch16_224"}, "take model.arch=dpt"),
        ("timm/local-dir:x", {}, "only from the user's own"),
        ("os:system", {}, "only from the user's own experiment or command line"),
    ],
)
def test_refused_with_what_to_do(arch, extra, said):
    with pytest.raises(ConfigError, match=said):
        build_model(arch, in_channels=3, outputs=2, **extra)


def test_imports_only_where_allowed():
    name = f"{__name__}:tiny"
    with pytest.raises(ConfigError, match="only from the user's own"):
        build_model(name, in_channels=6, outputs=3)
    model = build_model(name, in_channels=6, outputs=3, args={"width": 5}, allow_import=True)
    assert model(torch.randn(2, 6, 4, 4)).shape == (2, 3)
    assert task_of(name) is None
    for wrong, said in ((f"{__name__}:nothing", "no function"), ("no_such_package:f", "cannot import")):
        with pytest.raises(ConfigError, match=said):
            build_model(wrong, in_channels=6, outputs=3, allow_import=True)
    with pytest.raises(ConfigError, match=r"expected a torch\.nn\.Module"):
        build_model("builtins:dict", in_channels=6, outputs=3, allow_import=True)


@pytest.mark.parametrize("arch", ["resnet10", "resnet18", "timm/resnet18", "unet"])
def test_the_seed_decides_the_weights(arch):
    def weights(seed):
        torch.manual_seed(seed)
        return build_model(
            arch, in_channels=4, outputs=2, stem="small" if arch == "resnet18" else "default"
        ).state_dict()

    one, same, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_first_layer_for_more_bands_keeps_the_size_of_its_output():
    three = build_model("resnet18", in_channels=3, outputs=2)
    twelve = build_model("resnet18", in_channels=12, outputs=2)
    with torch.no_grad():
        a = three.conv1(torch.randn(8, 3, 32, 32)).std()
        b = twelve.conv1(torch.randn(8, 12, 32, 32)).std()
    assert 0.8 < float(b / a) < 1.25


def test_importing_the_models_is_light():
    heavy = ["torchvision", "timm", "segmentation_models_pytorch", "ray", "mlflow", "rasterio", "matplotlib"]
    code = f"import sys, scalecv.models, scalecv.models.losses; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_facts_of_a_network_worked_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 64, 2)).train()
    facts = model_facts(model, (3, 8, 8))
    assert facts["parameters"] == facts["trainable"] == 3 * 4 * 9 + 4 + 8 + 4 * 64 * 2 + 2
    assert facts["flops"] == 2 * (3 * 4 * 9 * 64 + 4 * 64 * 2)
    assert facts["size_mb"] == pytest.approx((4 * (facts["parameters"] + 8) + 8) / 1e6)
    assert model.training and model[1].num_batches_tracked == 0


def test_a_small_stem_sees_small_images_at_their_size_and_enlarging_them_is_told_as_cost():
    sides = []
    for stem in ("small", "default"):
        model = build_model("resnet10", in_channels=3, outputs=10, stem=stem, args={"width": 8})
        model.layer1.register_forward_hook(lambda _, given, __: sides.append(given[0].shape[-1]))
        model.eval()(torch.zeros(1, 3, 32, 32))
    assert sides == [32, 8]
    native, enlarged = (model_facts(model, (3, side, side))["flops"] for side in (32, 224))
    assert enlarged / native == pytest.approx(49, rel=0.01), "as many times the pixels"


def test_the_time_of_an_image_is_that_of_one_alone_after_the_first_passes():
    shapes = []

    class Slow(nn.Module):
        def forward(self, x):
            shapes.append(tuple(x.shape))
            time.sleep(0.2 if len(shapes) <= 2 else 0.01)
            return x

    p50, p95 = latency_ms(Slow(), (3, 8, 8))
    assert 10 <= p50 <= p95 < 150
    assert set(shapes) == {(1, 3, 8, 8)}


@pytest.mark.parametrize(
    ("task", "arch", "said"),
    [
        ("segment", "unett", "unknown model.arch 'unett' for task=segment; did you mean 'unet'"),
        ("segment", "resnet18", "model.arch=resnet18 is a network to classify, the task is segment; expected unet, "),
        ("segment", "edsrr", "unknown model.arch 'edsrr' for task=segment; expected unet, "),
        ("classify", "resnet81", "unknown model.arch 'resnet81' for task=classify; did you mean 'resnet18'"),
        ("classify", "unett", "unknown model.arch 'unett' for task=classify; expected a name of torchvision"),
        ("classify", "unet", "model.arch=unet is a network to segment, the task is classify; expected"),
        ("upscale", "espnc", "unknown model.arch 'espnc' for task=upscale; did you mean 'espcn'"),
        ("upscale", "timm/resnet18", "is a network to classify, the task is upscale; expected espcn, edsr"),
    ],
)
def test_an_unknown_name_is_told_the_nearest_of_its_task(task, arch, said):
    with pytest.raises(ConfigError, match=said):
        check_arch(task, arch)


def test_known_names_fit_their_tasks():
    for arch in (*MODELS, "resnet18", "timm/resnet18"):
        check_arch(task_of(arch), arch)
    check_arch("segment", "mine:build")


@pytest.mark.parametrize(
    ("arch", "encoder", "said"),
    [
        ("espcn", "", "model.arch=espcn has no ImageNet weights: take model.weights=runs:/ID or a safetensors file"),
        ("resnet10", "", "resnet10 has no ImageNet weights: take a network that has some .resnet18, timm/NAME"),
        ("mine:build", "", "model.arch=mine:build has no ImageNet weights"),
        ("timm/botnet50ts_256", "", "model.arch=timm/botnet50ts_256 has no published ImageNet weights: take another"),
        ("unet", "dpn92", "model.encoder=dpn92 has no published ImageNet weights"),
        ("fpn", "tu-botnet50ts_256", "model.encoder=tu-botnet50ts_256 has no published ImageNet weights"),
    ],
)
def test_weights_that_nobody_has_published_are_refused_with_what_is_possible(arch, encoder, said):
    with pytest.raises(ConfigError, match=said):
        check_imagenet(arch, encoder)


def test_published_weights_are_known():
    pairs = [("resnet18", ""), ("timm/resnet18", ""), ("timm/resnet18.a1_in1k", ""), ("unet", "resnet18")]
    for arch, encoder in (*pairs, ("unet", "mit_b0"), ("fpn", "tu-convnext_tiny"), ("dpt", "tu-vit_tiny_patch16_224")):
        check_imagenet(arch, encoder)
