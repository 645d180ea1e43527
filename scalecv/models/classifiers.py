"""Classification networks: torchvision's, timm's, our small resnet10, and one's own. Logits [B, K]."""

from collections import OrderedDict
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from scalecv.errors import ConfigError, nearest

TIMM = "timm/"
# Arguments that are set elsewhere in the experiment, that change what the network returns, or that read pickles.
RESERVED = (
    "in_channels in_chans outputs num_classes classes encoder encoder_name encoder_weights weights weights_backbone "
    "pretrained pretrained_cfg pretrained_cfg_overlay pretrained_strict checkpoint_path cache_dir features_only "
    "aux_logits aux_params activation progress scriptable exportable"
).split()


def check_args(arch: str, args: dict[str, Any]) -> None:
    """Raises: ConfigError: an argument that is not the user's to set."""
    if taken := sorted(set(args) & set(RESERVED)):
        raise ConfigError(
            f"model.args.{taken[0]} of {arch} is not free: channels, outputs and weights follow from the dataset "
            "and from model.in_channels, model.encoder and model.weights; remove it"
        )


def build_with(arch: str, function: Any, **arguments: Any) -> nn.Module:
    """What a library's builder returns.

    Raises: ConfigError: the builder refuses its arguments, or returns something else than a network.
    """
    try:
        model = function(**arguments)
    except (TypeError, ValueError, KeyError, AssertionError, NotImplementedError, RuntimeError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"model {arch} cannot be built: {said}; check model.encoder and model.args") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {arch} is a {type(model).__name__}, expected a torch.nn.Module")
    return model


@cache
def torchvision_names() -> tuple[str, ...]:
    """The names of torchvision's classification networks."""
    import torchvision.models

    return tuple(torchvision.models.list_models(module=torchvision.models))


def torchvision_builder(arch: str, known: list[str]) -> Any:
    """The builder of a torchvision network, by its name.

    Raises: ConfigError: no network of torchvision or in `known` has the name.
    """
    names = torchvision_names()
    if arch not in names:
        near = nearest(arch, [*known, *names])
        raise ConfigError(
            f"unknown model.arch '{arch}'{near or '; a name of torchvision, timm/NAME, unet, fpn … was expected'}"
        )
    return partial(torchvision_classifier, arch)


def torchvision_classifier(
    arch: str, *, in_channels: int, outputs: int, encoder: str, args: dict[str, Any]
) -> nn.Module:
    """A torchvision classification network for any number of channels."""
    import torchvision.models

    check_args(arch, args)
    extra = {"aux_logits": False} if arch in ("googlenet", "inception_v3") else {}
    if arch in ("googlenet", "inception_v3"):
        args = {"init_weights": True, **args}
    model = build_with(
        arch, torchvision.models.get_model, name=arch, weights=None, num_classes=outputs, **extra, **args
    )
    if in_channels != 3:
        replace_first_conv(model, in_channels)
    return model


def timm_classifier(arch: str, *, in_channels: int, outputs: int, encoder: str, args: dict[str, Any]) -> nn.Module:
    """A timm network, `arch` being timm/NAME."""
    import timm

    check_args(arch, args)
    name = arch.removeprefix(TIMM)
    if not timm.is_model(name.partition(".")[0]):
        near = nearest(name, timm.list_models()).replace("'", "'timm/", 1)
        raise ConfigError(f"unknown model.arch '{arch}'{near or '; see timm.list_models()'}")
    create = partial(timm.create_model, name, pretrained=False)
    return build_with(arch, create, in_chans=in_channels, num_classes=outputs, **args)


def imported(arch: str, *, in_channels: int, outputs: int, encoder: str, args: dict[str, Any]) -> nn.Module:
    """One's own network: package.module:function, called as function(in_channels=, outputs=, **args)."""
    module_name, _, name = arch.partition(":")
    try:
        function = getattr(import_module(module_name), name, None)
    except ImportError as error:
        raise ConfigError(f"model.arch={arch}: cannot import {module_name}: {error}") from error
    if not callable(function):
        raise ConfigError(f"model.arch={arch}: {module_name} has no function '{name}'")
    return build_with(arch, function, in_channels=in_channels, outputs=outputs, **args)


def resnet10(
    *,
    in_channels: int,
    outputs: int,
    encoder: str = "",
    args: dict[str, Any] | None = None,
) -> nn.Module:
    """A residual network of four basic blocks, small enough for a CPU: 1.2 M parameters at width 32.

    Args:
        args: width, channels of the first of the four stages (32).
    """
    from torchvision.models.resnet import BasicBlock

    given = dict(args or {})
    width = given.pop("width", 32)
    if given or not isinstance(width, int) or width < 1:
        raise ConfigError(f"model.args={args}: resnet10 takes width alone, a whole number from 1")

    def stage(before: int, after: int, stride: int) -> nn.Module:
        shortcut = None
        if stride != 1 or before != after:
            shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        block: nn.Module = BasicBlock(before, after, stride, shortcut)
        return nn.Sequential(block)

    model = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, width, 7, 2, 3, bias=False),
            bn1=nn.BatchNorm2d(width),
            relu=nn.ReLU(inplace=True),
            maxpool=nn.MaxPool2d(3, 2, 1),
            layer1=stage(width, width, 1),
            layer2=stage(width, 2 * width, 2),
            layer3=stage(2 * width, 4 * width, 2),
            layer4=stage(4 * width, 8 * width, 2),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(8 * width, outputs),
        )
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def small_stem(model: nn.Module, arch: str) -> None:
    """Start a resnet with a 3x3 convolution without stride and without pooling (the usual form for CIFAR).

    Raises: ConfigError: the network has no such stem.
    """
    first = getattr(model, "conv1", None)
    if not isinstance(first, nn.Conv2d) or not isinstance(getattr(model, "maxpool", None), nn.MaxPool2d):
        raise ConfigError(f"model.stem=small is for the resnets of torchvision and resnet10, not for {arch}; remove it")
    conv = nn.Conv2d(first.in_channels, first.out_channels, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    model.conv1 = conv
    model.maxpool = nn.Identity()


def replace_first_conv(model: nn.Module, in_channels: int) -> None:
    """Let the first convolution take another number of channels, with new weights.

    They are drawn with the spread of the old ones, scaled so that the output keeps its variance.
    Raises: ConfigError: the network does not start with a convolution.
    """
    convs = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    name, module = next(convs, ("", None))
    if module is None:
        raise ConfigError(f"{type(model).__name__} has no convolution that could take {in_channels} channels")
    conv = nn.Conv2d(
        in_channels,
        module.out_channels,
        module.kernel_size,  # type: ignore[arg-type]  # torch types it as a tuple of any length
        module.stride,  # type: ignore[arg-type]
        module.padding,  # type: ignore[arg-type]
        module.dilation,  # type: ignore[arg-type]
        bias=module.bias is not None,
    )
    with torch.no_grad():
        spread: Tensor = module.weight.std() * (module.in_channels / in_channels) ** 0.5
        conv.weight.normal_(0.0, float(spread))
        if conv.bias is not None:
            conv.bias.zero_()
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, conv)
