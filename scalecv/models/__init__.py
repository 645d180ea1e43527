"""Networks by name: every builder returns logits, [B, K] for classification, [B, K, H, W] for segmentation, and
larger images [B, C, f*H, f*W] for upscaling.

`MODELS` holds the names with a builder of their own. Besides them stand torchvision's classification
networks by their names, `timm/NAME`, and one's own as `package.module:function`, which is imported only
when the caller says that the name comes from the user's own experiment or command line.
The weights are drawn from torch's generator: the caller seeds it. Starting weights come after that: see `weights`.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from torch import nn

from scalecv.errors import ConfigError, nearest
from scalecv.models import classifiers, segmenters, upscalers
from scalecv.models.norms import change_norm

Scalar = bool | int | float | str | None
Builder = Callable[..., nn.Module]
"""Called as (in_channels=, outputs=, encoder=, args=)."""

MODELS: dict[str, Builder] = {
    "resnet10": classifiers.resnet10,
    **{arch: partial(segmenters.segmenter, arch) for arch in segmenters.ARCHITECTURES},
    **{arch: partial(upscalers.upscaler, arch) for arch in upscalers.ARCHITECTURES},
}


def build_model(
    arch: str,
    *,
    in_channels: int,
    outputs: int,
    encoder: str = "resnet18",
    stem: Literal["default", "small"] = "default",
    norm: Literal["batch", "sync", "group", "frozen"] = "batch",
    args: Mapping[str, Scalar] | None = None,
    allow_import: bool = False,
) -> nn.Module:
    """The network that a name stands for.

    Args:
        arch: a name in MODELS, in torchvision, timm/NAME, or package.module:function.
        in_channels: channels of the images, any number from 1.
        outputs: channels of the logits.
        encoder: encoder of a segmentation network; the others do not look at it.
        stem: small starts without stride and pooling, for images of 8 to 64 px (resnets).
        norm: what stands in place of batch normalisation, see `norms.change_norm`.
        args: further arguments of the builder.
        allow_import: True only where the name comes from the user's own experiment or command line.
    Raises: ConfigError: a name, encoder or argument that cannot be used.
    """
    if in_channels < 1 or outputs < 1:
        raise ConfigError(f"model {arch}: in_channels={in_channels} and outputs={outputs} must be at least 1")
    build = find_builder(arch, allow_import=allow_import)
    model = build(in_channels=in_channels, outputs=outputs, encoder=encoder, args=dict(args or {}))
    if stem == "small":
        classifiers.small_stem(model, arch)
    return change_norm(model, norm)


def find_builder(arch: str, *, allow_import: bool = False) -> Builder:
    """The builder that a name stands for.

    Raises: ConfigError: nobody knows the name (with the nearest that is known), or it may not be imported.
    """
    if ":" in arch:
        if not allow_import:
            raise ConfigError(
                f"model.arch={arch}: imports are taken only from the user's own experiment or command line, "
                "never from a bundle or checkpoint; allow it for a bundle of your own with --allow-import"
            )
        return partial(classifiers.imported, arch)
    if arch in MODELS:
        return MODELS[arch]
    if arch.startswith(classifiers.TIMM):
        return partial(classifiers.timm_classifier, arch)
    build: Builder = classifiers.torchvision_builder(arch, known=list(MODELS))
    return build


def check_arch(task: str, arch: str) -> None:
    """See that a network is there and that a task can take it; one's own function is its author's affair.

    Raises: ConfigError: nobody knows the name, or it stands for a network of another task; with the nearest that fits.
    """
    timm = arch.startswith(classifiers.TIMM)
    own = {"segment": list(segmenters.ARCHITECTURES), "upscale": list(upscalers.ARCHITECTURES)}
    fitting = own.get(task) or ["resnet10", *classifiers.torchvision_names()]
    if ":" in arch or arch in fitting or (timm and task == "classify"):
        return
    near = nearest(arch, fitting)
    expected = f"expected {', '.join(own[task])}" if task in own else "expected a name of torchvision, or timm/NAME"
    if timm or arch in MODELS or arch in classifiers.torchvision_names():
        gives = task_of(arch)
        raise ConfigError(f"model.arch={arch} is a network to {gives}, the task is {task}{near or f'; {expected}'}")
    raise ConfigError(f"unknown model.arch '{arch}' for task={task}{near or f'; {expected}'}")


def task_of(arch: str) -> Literal["classify", "segment", "upscale"] | None:
    """The task whose logits a network gives; None where only its author knows (package.module:function)."""
    if ":" in arch:
        return None
    if arch in upscalers.ARCHITECTURES:
        return "upscale"
    return "segment" if arch in segmenters.ARCHITECTURES else "classify"


def misfit(
    task: str, arch: str, encoder: str, args: Mapping[str, Any], sides: tuple[int, int], factor: int
) -> tuple[str, int] | None:
    """Why a network cannot take images of a size, and a side that it can take; None where it can.

    Args:
        sides: width and height of images, before they are enlarged.
        factor: how many times they are enlarged before the network; 1 leaves them.
    """
    multiple = required_multiple(arch, encoder, args)
    if task == "upscale":
        multiple = math.lcm(multiple, upscalers.factor_of(arch, args))
    if not any(side * factor % multiple for side in sides):
        return None
    step = multiple // math.gcd(multiple, factor)
    larger = f" enlarged {factor} times" if factor > 1 else ""
    said = f"images have {sides[0]}x{sides[1]} pixels, and {arch} with {encoder} needs multiples of {multiple}{larger}"
    return said, max(step, round(sides[0] / step) * step)


def required_multiple(arch: str, encoder: str, args: Mapping[str, Any] | None = None) -> int:
    """Pixels of which the side of an image must be a multiple; 1 where any size fits."""
    return segmenters.required_multiple(arch, encoder, args) if arch in segmenters.ARCHITECTURES else 1
