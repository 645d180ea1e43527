"""Which network, and what it is to make small."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

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

    name: Literal["bce_focal_neg_iou"] | None = None
    """A mixture by its name: it gives the keys that are not set here the values of the mixture (see MIXTURES)."""
    cross_entropy: float = Field(0.0, ge=0)
    """Weight of cross-entropy over classes (per pixel for segmentation). Where no term has a weight, classify takes it
    alone, and segment bce (two classes) or cross_entropy, and dice."""
    bce: float = Field(0.0, ge=0)
    """Weight of binary cross-entropy per pixel (two classes)."""
    dice: float = Field(0.0, ge=0)
    """Weight of 1 - Dice, per image."""
    jaccard: float = Field(0.0, ge=0)
    """Weight of 1 - soft IoU, per image."""
    tversky: float = Field(0.0, ge=0)
    """Weight of 1 - Tversky index, per image: Dice with weights of false alarms and of misses."""
    lovasz: float = Field(0.0, ge=0)
    """Weight of the Lovász loss, per image: hinge for two classes, softmax for more."""
    pos_neg_iou: float = Field(0.0, ge=0)
    """Weight of pos_iou (1 - soft IoU of the foreground) + neg_iou (1 - that of the background), per image; two
    classes."""
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
    focal_alpha: float | None = Field(None, ge=0, le=1)
    """Focal loss of two classes: weight of positives, 1 - alpha that of negatives; empty weighs both with 1."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Label smoothing of the cross-entropy."""
    pos_weight: float = Field(1.0, gt=0)
    """Weight of positive pixels in binary cross-entropy."""
    neg_weight: float = Field(1.0, ge=0)
    """Weight of negative pixels in binary cross-entropy."""
    tversky_alpha: float = Field(0.3, ge=0)
    """Weight of false alarms in the Tversky index; alpha = beta = 0.5 is Dice."""
    tversky_beta: float = Field(0.7, ge=0)
    """Weight of misses in the Tversky index."""
    pos_iou: float = Field(0.85, ge=0)
    """Share of the foreground in pos_neg_iou."""
    neg_iou: float = Field(0.15, ge=0)
    """Share of the background in pos_neg_iou."""
    smooth: float = Field(1.0, gt=0)
    """Pixels added above and below the fraction in dice, jaccard, tversky and pos_neg_iou: an image without positives
    has a gradient."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: cross-entropy weighs a class by the inverse of its share in the training split."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, keys: Any) -> Any:
        """The keys of a named mixture, below those that are set."""
        if isinstance(keys, Mapping) and isinstance(keys.get("name"), str):
            return {**MIXTURES.get(keys["name"], {}), **keys}
        return keys

    @model_validator(mode="after")
    def _weighs(self) -> "Loss":
        if self.name and not self.terms():
            raise ValueError(f"name={self.name}, but every term of it has weight 0: leave out the weights, or the name")
        return self

    def terms(self) -> dict[str, float]:
        """The terms with a weight above zero."""
        every = {name: getattr(self, name) for name in LOSS_TERMS}
        return {name: weight for name, weight in every.items() if weight > 0}


IMAGE_TERMS = ("l1", "charbonnier", "mse")
"""Terms that compare images."""
LOSS_TERMS = (
    *("cross_entropy", "bce", "dice", "jaccard", "tversky", "lovasz", "pos_neg_iou", "focal"),
    *IMAGE_TERMS,
)
MIXTURES: dict[str, dict[str, Scalar]] = {
    "bce_focal_neg_iou": {
        "bce": 0.3,
        "pos_weight": 2.0,
        "neg_weight": 1.0,
        "focal": 0.3,
        "focal_gamma": 2.0,
        "focal_alpha": None,
        "pos_neg_iou": 0.4,
        "pos_iou": 0.85,
        "neg_iou": 0.15,
    },
}
"""What a loss.name stands for: values of the keys of `Loss`."""
