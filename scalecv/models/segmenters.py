"""Segmentation networks of segmentation_models_pytorch, any encoder, any number of channels. Logits [B, K, H, W]."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from scalecv.errors import ConfigError, nearest
from scalecv.models.classifiers import build_with, check_args

# Largest stride of the features that each needs, from the defaults of segmentation_models_pytorch 0.6;
# U-Net resizes features to those it joins them with, so it takes any size.
ARCHITECTURES = {
    "unet": 1,
    "unetplusplus": 32,
    "unetpp": 32,
    "fpn": 32,
    "pspnet": 8,
    "linknet": 32,
    "manet": 32,
    "deeplabv3": 8,
    "deeplabv3plus": 16,
    "pan": 16,
    "upernet": 32,
    "segformer": 32,
    "dpt": 32,
}
DILATED = ("deeplabv3", "deeplabv3plus", "pan")
"""Those whose encoder must keep its last stages large, by dilated convolutions in place of strides."""
DILATION = re.compile("dilat|output_stride|stride|built: AssertionError", re.IGNORECASE)
ONE_SIZE = ("tu-vit_", "tu-deit", "tu-flexivit")
"""Encoders whose features all have one size; dpt takes them, the others do not."""
NO_MIT = ("linknet", "unetplusplus", "unetpp")


def library_name(arch: str) -> str:
    """The name of an architecture in segmentation_models_pytorch."""
    return "unetplusplus" if arch == "unetpp" else arch


def segmenter(arch: str, *, in_channels: int, outputs: int, encoder: str, args: dict[str, Any]) -> nn.Module:
    """A segmentation network that returns logits at the size of the image.

    Args:
        arch: a name in ARCHITECTURES.
        in_channels: bands of the image.
        outputs: channels of the logits.
        encoder: a name of segmentation_models_pytorch, or tu-NAME for one of timm.
        args: further arguments of the architecture.
    """
    import segmentation_models_pytorch as smp

    check_args(arch, args)
    check_encoder(encoder)
    _check_pair(arch, encoder)
    given = {"dynamic_img_size": True, **args} if arch == "dpt" else args
    what = f"{arch} with encoder {encoder}"
    try:
        model = build_with(
            what,
            partial(smp.create_model, library_name(arch)),
            encoder_name=encoder,
            encoder_weights=None,
            in_channels=in_channels,
            classes=outputs,
            activation=None,
            **given,
        )
    except ConfigError as error:
        if arch in DILATED and DILATION.search(str(error)):
            raise ConfigError(
                f"{what}: {arch} needs an encoder with dilated convolutions, and this one has none: take resnet…, "
                "efficientnet-…, mobilenet_v2 or mit_…, or an architecture without them (unet, fpn, upernet …)"
            ) from error
        raise
    if args:
        _check_size(model, what, args, in_channels)
    return model


def _check_pair(arch: str, encoder: str) -> None:
    """Raises: ConfigError: an encoder that an architecture cannot have, as its name tells."""
    if arch == "dpt" and (not encoder.startswith(("tu-vit", *ONE_SIZE)) or "patch14" in encoder):
        raise ConfigError(
            f"model.arch=dpt needs a tu-vit…, tu-deit… or tu-flexivit… encoder with patches of 8, 16 or 32 pixels, not "
            f"{encoder}: try tu-vit_tiny_patch16_224"
        )
    if arch != "dpt" and encoder.startswith(ONE_SIZE):
        raise ConfigError(
            f"model.arch={arch} needs features of several sizes, and {encoder} has one: take model.arch=dpt, or an "
            "encoder such as resnet18, tu-convnext_tiny"
        )
    if encoder.startswith("mit_b") and arch in NO_MIT:
        raise ConfigError(
            f"model.arch={arch} does not take the encoder {encoder}, which skips the first halving: take segformer, "
            "unet or fpn with it, or another encoder"
        )


def _check_size(model: nn.Module, what: str, args: Mapping[str, Any], in_channels: int) -> None:
    """Raises: ConfigError: arguments with which the logits have another size than the image."""
    made_for = args.get("img_size")  # some encoders take images of one size alone
    training, side = model.training, made_for if isinstance(made_for, int) else 128
    with torch.no_grad():
        found = model.eval()(torch.zeros(1, in_channels, side, side)).shape[-1]
    model.train(training)
    if found != side:
        raise ConfigError(
            f"model.args={dict(args)}: the logits of {what} have {found / side:g} times the size of the image; "
            "set model.args.upsampling so that they have the same"
        )


def check_encoder(encoder: str) -> None:
    """Raises: ConfigError: an encoder that neither segmentation_models_pytorch nor timm (tu-NAME) has."""
    import segmentation_models_pytorch as smp
    import timm

    if encoder.startswith("tu-"):
        name = encoder.removeprefix("tu-")
        if not timm.is_model(name.partition(".")[0]):
            near = nearest(name, timm.list_models()).replace("'", "'tu-", 1)
            raise ConfigError(f"unknown model.encoder '{encoder}'{near or '; see timm.list_models()'}")
        return
    known = smp.encoders.get_encoder_names()
    if encoder not in known and not encoder.startswith("timm-"):
        near = nearest(encoder, known)
        raise ConfigError(
            f"unknown model.encoder '{encoder}'{near or '; resnet18, efficientnet-b0, tu-NAME … was expected'}"
        )


def required_multiple(arch: str, encoder: str, args: Mapping[str, Any] | None = None) -> int:
    """Pixels of which the side of an image must be a multiple; 1 where any size fits."""
    args = args or {}
    multiple = ARCHITECTURES[arch]
    if arch == "unet":
        return 32 if encoder.startswith("tu-hrnet") else 1  # that joins its own branches, too
    if arch == "dpt":
        return multiple
    if arch in DILATED:
        multiple = int(args.get("encoder_output_stride", multiple))
    depth = args.get("encoder_depth")
    return min(multiple, 2**depth) if isinstance(depth, int) else multiple
