"""The network that a bundle's facts describe, without its weights."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from scalecv.artifacts.bundle import FACTS, Call, Facts, MemberFacts, PixelFacts, UpscaleFacts
from scalecv.errors import IntegrityError

if TYPE_CHECKING:
    import torch

MOST_ARGUMENT = 1 << 14
"""Largest number among the builder's arguments that is taken from a bundle: a forged one could ask for any memory."""


def network(facts: Facts, *, allow_import: bool = False) -> "torch.nn.Module":
    """Gives logits of what `facts.pixels` describe.

    Args:
        facts: of the bundle.
        allow_import: let a network that was built by the user's own function import it.
    Raises: ConfigError: a name or argument that cannot be used. RuntimeError: a member wants other bands than there
        are.
    """
    if not facts.members:
        return _one(facts, allow_import=allow_import)
    from scalecv.models.ensemble import Ensemble

    members = [adapted(_one(one, allow_import=allow_import), one, facts.pixels) for one in facts.members]
    return Ensemble(members, [one.weight for one in facts.members])


def adapted(model: "torch.nn.Module", member: MemberFacts, pixels: PixelFacts) -> "torch.nn.Module":
    """A member's network as it takes the images of an ensemble.

    Args:
        model: the network, with its stage.
        member: its facts.
        pixels: of the ensemble's images.
    Raises: RuntimeError: it wants other bands than there are.
    """
    from scalecv.models import required_multiple
    from scalecv.models.ensemble import Member

    its, factor = member.pixels, member.upscale.factor if member.upscale else 1
    try:
        channels = _places(pixels, its)
    except ValueError:
        raise RuntimeError(
            f"a member sees the bands {its.bands or 'all'} of {its.channels}, of which images have {pixels.bands}"
        ) from None
    call = member.call
    multiple = -(-required_multiple(call.arch, call.encoder, call.args) // factor)
    moments = tuple((facts.mean, facts.std) for facts in (pixels, its))
    return Member(model, channels, *moments, scale=member.scale, multiple=multiple)


def behind(
    stage: UpscaleFacts, pixels: PixelFacts, network: "torch.nn.Module", *, allow_import: bool = False
) -> "torch.nn.Module":
    """A network behind the stage that enlarges its images; weights of a network that does it are not loaded yet.

    Args:
        stage: what enlarges.
        pixels: how the images that come are normalised.
        network: sees the larger ones.
        allow_import: let a stage whose network is the user's own function import it.
    """
    from scalecv.models import build_model
    from scalecv.models.enlarged import Bicubic, Enlarged, SuperResolution
    from scalecv.models.upscalers import factor_of

    if stage.call is None or stage.pixels is None:
        return Enlarged(network, Bicubic(stage.factor), stage.factor)
    times = 2 if stage.factor == factor_of(stage.call.arch, stage.call.args) ** 2 else 1
    larger = build_model(**stage.call.model_dump(), allow_import=allow_import)
    ours, its = ((facts.mean, facts.std) for facts in (pixels, stage.pixels))
    return Enlarged(network, SuperResolution(larger, times, ours, its), stage.factor)


def check_calls(uri: str, facts: Facts) -> None:
    """Raises: IntegrityError: a size that no network of ours was built with."""
    for call in _calls(facts):
        for name, value in call.args.items():
            if isinstance(value, int | float) and abs(value) > MOST_ARGUMENT:
                raise IntegrityError(
                    f"{uri}: {FACTS} builds {call.arch} with {name}={value}, at most {MOST_ARGUMENT} is taken"
                )


def _calls(facts: Facts) -> Iterator[Call]:
    each: list[Facts | MemberFacts] = [facts, *facts.members]
    for one in each:
        yield one.call
        if one.upscale and one.upscale.call:
            yield one.upscale.call


def _one(facts: Facts | MemberFacts, *, allow_import: bool) -> "torch.nn.Module":
    from scalecv.models import build_model

    model = build_model(**facts.call.model_dump(), allow_import=allow_import)
    return behind(facts.upscale, facts.pixels, model, allow_import=allow_import) if facts.upscale else model


def _places(pixels: PixelFacts, its: PixelFacts) -> list[int]:
    """Where a member's channels are among those of the images.

    Raises: ValueError: one is not there.
    """
    known = list(pixels.bands or range(1, pixels.channels + 1))
    return [known.index(band) for band in its.bands or range(1, its.channels + 1)]
