"""Segmentation networks of segmentation_models_pytorch, any encoder, any number of channels. Logits [B, K, H, W]."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from scalecv.errors import ConfigError, nearest
from scalecv.models.classifiers import build_with, check_args
from scalecv.models.weights import library_weights

# Largest stride of the features that each needs, from the defaults of segmentation_models_pytorch 0.6;
# U-Net resizes features to those it joins them with, so it takes any size.
ARCHITECTURES = {
    "unet": 1,
    "unetplusplus": 32,
    "fpn": 32,
    "pspnet": 8,
    "linknet": 32,
    "manet": 32,
    "deeplabv3": 8,
    "deeplabv3plus": 16,
    "pan": 16,
    "upernet": 32,
    "segformer": 32,
    "dpt": 16,
}


def segmenter(
    arch: str, *, in_channels: int, outputs: int, encoder: str, imagenet: bool, args: dict[str, Any]
) -> nn.Module:
    """A segmentation network that returns logits at the size of the image.

    Args:
        arch: a name in ARCHITECTURES.
        encoder: a name of segmentation_models_pytorch, or tu-NAME for one of timm.
        imagenet: the encoder starts from the library's ImageNet weights, adapted to the channels.
    """
    import segmentation_models_pytorch as smp

    check_args(arch, args)
    check_encoder(encoder)
    if arch == "dpt":
        if not encoder.startswith("tu-vit"):
            raise ConfigError(f"model.arch=dpt needs a tu-vit… encoder, not {encoder}: try tu-vit_tiny_patch16_224")
        args = {"dynamic_img_size": True, **args}
    create = partial(
        smp.create_model, arch, encoder_name=encoder, in_channels=in_channels, classes=outputs, activation=None, **args
    )
    what = f"{arch} with encoder {encoder}"
    model: nn.Module
    if imagenet:
        name = True if encoder.startswith("tu-") else "imagenet"
        model = library_weights(what, partial(create, encoder_weights=name))
    else:
        model = build_with(what, create, encoder_weights=None)
    if args:
        _check_size(model, what, args, in_channels)
    return model


def _check_size(model: nn.Module, what: str, args: Mapping[str, Any], in_channels: int) -> None:
    """Raises: ConfigError: arguments with which the logits have another size than the image."""
    training, side = model.training, 128
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
    """Pixels of which the side of an image must be a multiple; 1 where any size fits.

    Raises: ConfigError: a dpt encoder whose name does not tell its patch size.
    """
    args = args or {}
    multiple = ARCHITECTURES[arch]
    if arch == "unet":
        return 1
    if arch in ("deeplabv3", "deeplabv3plus", "pan"):
        multiple = int(args.get("encoder_output_stride", multiple))
    elif arch == "dpt":
        patch = encoder.partition("patch")[2].partition("_")[0]
        return int(patch) if patch.isdigit() else multiple
    depth = args.get("encoder_depth")
    return min(multiple, 2**depth) if isinstance(depth, int) else multiple
