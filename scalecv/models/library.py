"""ImageNet weights as torchvision, timm and segmentation_models_pytorch publish them, for images of three bands.

They come as a state dict: how they become those of other bands is decided in `bands`, not by each library in its way
(timm repeats the bands, segmentation_models_pytorch copies red into band 4 where its documentation says random).
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from scalecv.errors import ConfigError
from scalecv.models.classifiers import TIMM
from scalecv.models.segmenters import ARCHITECTURES, library_name

T = TypeVar("T")
OWN = ("resnet10", "espcn", "edsr")
"""Networks of scalecv, which nobody has trained on ImageNet."""


def imagenet_state(arch: str, encoder: str, args: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """The weights of a network by their names in it; of a segmentation network those of its encoder.

    Args:
        arch: as in `build_model`, which knows it already.
        encoder: of a segmentation network.
        args: of the network's builder.
    Raises: ConfigError: it has none, or they could not be had.
    """
    check_imagenet(arch, encoder)
    if arch in ARCHITECTURES:
        what = f"encoder {encoder}"
        state = library_weights(what, partial(_segmenter, arch, encoder, dict(args or {}))).state_dict()
        return {name: value for name, value in state.items() if name.startswith("encoder.")}
    if arch.startswith(TIMM):
        return library_weights(arch, partial(_timm, arch, dict(args or {}))).state_dict()
    return library_weights(arch, partial(_torchvision, arch))


def check_imagenet(arch: str, encoder: str) -> None:
    """See that somebody has published ImageNet weights for a network, without fetching them.

    Raises: ConfigError: nobody has, with what is possible.
    """
    if ":" in arch or arch in OWN:
        other = {"resnet10": "a network that has some (resnet18, timm/NAME), "}.get(arch, "")
        raise ConfigError(
            f"model.arch={arch} has no ImageNet weights: take {other}"
            "model.weights=runs:/ID or a safetensors file of the same network, or leave model.weights empty"
        )
    what, named = f"model.arch={arch}", arch.removeprefix(TIMM) if arch.startswith(TIMM) else None
    if arch in ARCHITECTURES:
        what, named = f"model.encoder={encoder}", encoder.removeprefix("tu-") if encoder.startswith("tu-") else None
    if named:
        import timm

        has = timm.is_model_pretrained(named)
    elif arch in ARCHITECTURES:
        import segmentation_models_pytorch as smp

        has = "imagenet" in smp.encoders.encoders.get(encoder, {}).get("pretrained_settings", ("imagenet",))
    else:
        return  # torchvision has published weights for each of its networks
    if not has:
        raise ConfigError(
            f"{what} has no published ImageNet weights: take another, such as resnet18 or one that "
            "timm.list_models(pretrained=True) names, set model.weights to a file, or leave it empty"
        )


def library_weights(what: str, fetch: Callable[[], T]) -> T:
    """What a library's download returns.

    Raises: ConfigError: it failed, mostly because the machine has no way to the library's server.
    """
    try:
        return fetch()
    except Exception as error:  # each library raises its own: URLError, HTTPError, HfHubHTTPError, RuntimeError …
        said = (str(error).splitlines() or [""])[0][:200]
        raise ConfigError(
            f"the ImageNet weights of {what} could not be had ({type(error).__name__}: {said}): put a safetensors "
            "file where the workers can read it and set model.weights=URI, or leave model.weights empty"
        ) from error


def _segmenter(arch: str, encoder: str, args: dict[str, Any]) -> nn.Module:
    import segmentation_models_pytorch as smp

    weights = True if encoder.startswith("tu-") else "imagenet"
    if arch == "dpt":
        args = {"dynamic_img_size": True, **args}
    network: nn.Module = smp.create_model(library_name(arch), encoder_name=encoder, encoder_weights=weights, **args)
    return network


def _timm(arch: str, args: dict[str, Any]) -> nn.Module:
    import timm

    network: nn.Module = timm.create_model(arch.removeprefix(TIMM), pretrained=True, **args)
    return network


def _torchvision(arch: str) -> dict[str, Tensor]:
    import torchvision.models

    published = torchvision.models.get_model_weights(arch).DEFAULT
    state: dict[str, Tensor] = published.get_state_dict(progress=False, check_hash=True, weights_only=True)
    # The files of DenseNet are older than its names: norm.1 there is norm1 here.
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name): value for name, value in state.items()}
