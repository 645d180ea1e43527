"""Which network, and what it is to make small."""

from typing import Literal

from pydantic import Field

from scalecv.config.frozen import Frozen, Scalar


class Model(Frozen):
    """Which network."""

    arch: str
    """Name in torchvision, timm/NAME, unet, fpn … of segmentation_models_pytorch, or package.module:function."""
    encoder: str = "resnet18"
    """Encoder of a segmentation network, by its name in segmentation_models_pytorch."""
    in_channels: int | None = Field(None, ge=1)
    """Input channels; empty takes them from the dataset."""
    weights: str | None = None
    """Starting weights: imagenet (the library's own download), or the URI of a safetensors file or bundle."""
    stem: Literal["default", "small"] = "default"
    """small: 3x3 convolution without stride or pooling, for images of 16 to 64 px (resnets of torchvision)."""
    norm: Literal["batch", "sync", "group", "frozen"] = "batch"
    """batch as built; sync over workers; group instead of batch; frozen statistics."""
    args: dict[str, Scalar] = {}
    """Further arguments of the network's builder."""


class Loss(Frozen):
    """A weighted sum of named terms on logits; each term is averaged over the valid samples of the global batch."""

    cross_entropy: float = Field(0.0, ge=0)
    """Weight of cross-entropy over classes (per pixel for segmentation). Where no term has a weight, classify takes it
    alone, and segment bce (two classes) or cross_entropy, and dice."""
    bce: float = Field(0.0, ge=0)
    """Weight of binary cross-entropy per pixel (two classes)."""
    dice: float = Field(0.0, ge=0)
    """Weight of 1 - Dice, per image."""
    jaccard: float = Field(0.0, ge=0)
    """Weight of 1 - soft IoU, per image."""
    focal: float = Field(0.0, ge=0)
    """Weight of the focal loss."""
    l1: float = Field(0.0, ge=0)
    """Weight of the mean absolute difference of images (task=upscale, which takes it alone where no term has a
    weight)."""
    charbonnier: float = Field(0.0, ge=0)
    """Weight of the Charbonnier loss of images, an l1 that is smooth at zero (task=upscale)."""
    mse: float = Field(0.0, ge=0)
    """Weight of the mean squared difference of images (task=upscale)."""
    focal_gamma: float = Field(2.0, ge=0)
    """Focusing exponent of the focal loss."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Label smoothing of the cross-entropy."""
    pos_weight: float = Field(1.0, gt=0)
    """Weight of positive pixels in binary cross-entropy."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: cross-entropy weighs a class by the inverse of its share in the training split."""

    def terms(self) -> dict[str, float]:
        """The terms with a weight above zero."""
        every = {name: getattr(self, name) for name in LOSS_TERMS}
        return {name: weight for name, weight in every.items() if weight > 0}


IMAGE_TERMS = ("l1", "charbonnier", "mse")
"""Terms that compare images."""
LOSS_TERMS = ("cross_entropy", "bce", "dice", "jaccard", "focal", *IMAGE_TERMS)
