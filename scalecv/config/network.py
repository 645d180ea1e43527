"""Which network, and what it is to make small."""

from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator

from scalecv.config.frozen import Frozen, Scalar
from scalecv.errors import nearest

BandInit = Literal["red", "green", "blue", "mean", "zero"]
"""From which band of the starting weights one of the first layer's takes its own."""


class Model(Frozen):
    """Which network."""

    arch: str
    """Name in torchvision, timm/NAME, unet, fpn … of segmentation_models_pytorch, or package.module:function."""
    encoder: str = "resnet18"
    """Encoder of a segmentation network, by its name in segmentation_models_pytorch, or tu-NAME for one of timm."""
    in_channels: int | None = Field(None, ge=1)
    """Input channels; empty takes them from the dataset."""
    weights: str | None = None
    """Starting weights: imagenet (the library's own download), the URI of a safetensors file or bundle, runs:/ID, or
    models:/NAME@ALIAS."""
    weights_scope: Literal["fitting", "all", "encoder"] = "fitting"
    """fitting: what fits by name and shape, at least half; all: every weight must fit; encoder: all but the head, which
    starts fresh (decoder and head of a segmentation network, the last layer of a classifier)."""
    in_channels_init: Literal["copy", "mean", "zero"] | tuple[BandInit, ...] = "copy"
    """How the first layer of starting weights becomes that of other bands: copy (red, green, blue in turn), mean (each
    band their mean), zero (bands after the third start at zero), or a choice for each band. What is not zero is scaled
    by 3 / its number of bands, so that the layer's output keeps its size."""
    freeze: Literal["none", "encoder"] | tuple[Annotated[str, Field(min_length=1)], ...] = "none"
    """What does not learn and keeps its batch statistics: encoder (all but the head), or a list of modules by their
    dotted names, such as encoder.layer1."""
    stem: Literal["default", "small"] = "default"
    """small: 3x3 convolution without stride or pooling, for images of 16 to 64 px (resnets of torchvision)."""
    norm: Literal["batch", "sync", "group", "frozen"] = "batch"
    """batch as built; sync over workers; group instead of batch; frozen statistics."""
    args: dict[str, Scalar] = {}
    """Further arguments of the network's builder."""

    @field_validator("in_channels_init", mode="before")
    @classmethod
    def _known_bands(cls, v: object) -> object:
        ways, bands = ("copy", "mean", "zero"), get_args(BandInit)
        wrong = [one for one in v if one not in bands] if isinstance(v, list | tuple) else [v] if v not in ways else []
        if wrong:
            near = nearest(str(wrong[0]), [*ways, *bands])
            raise ValueError(
                f"'{wrong[0]}' is unknown{near}; expected copy, mean, zero, or a list with one of {', '.join(bands)} "
                "for each band"
            )
        return v

    @field_validator("freeze", mode="before")
    @classmethod
    def _one_name(cls, v: object) -> object:
        return (v,) if isinstance(v, str) and v not in ("none", "encoder") else v


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


LOSS_TERMS = ("cross_entropy", "bce", "dice", "jaccard", "focal")
