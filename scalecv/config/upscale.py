"""The stage that enlarges images before the network sees them."""

from typing import Literal

from pydantic import model_validator

from scalecv.config.frozen import Frozen


class Upscale(Frozen):
    """Images enlarged on the device, after decoding and augmentation; nothing of it is stored."""

    factor: Literal[1, 2, 4] = 1
    """Times by which the side of each image grows before the network sees it; 1 leaves it. Truth is enlarged with it in
    training, scores are those of the native pixels."""
    method: Literal["bicubic", "sr"] = "bicubic"
    """bicubic, or sr: a frozen network of task=upscale."""
    model: str | None = None
    """That network (sr): a bundle, runs:/ID or models:/NAME@ALIAS. Its weights become part of this run's bundle."""

    @model_validator(mode="after")
    def _fits(self) -> "Upscale":
        if self.method == "sr" and self.factor > 1 and not self.model:
            raise ValueError("upscale.method=sr needs upscale.model: the bundle of a run of task=upscale, or runs:/ID")
        if self.method == "bicubic" and self.model:
            raise ValueError("upscale.model is used by upscale.method=sr only: set that, or leave upscale.model out")
        return self
