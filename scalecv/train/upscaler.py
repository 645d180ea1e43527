"""The stage of a run that enlarges images: found and checked before workers start, built on each rank."""

from typing import TYPE_CHECKING

from scalecv.artifacts import bundle, networks
from scalecv.batches.pixels import Pixels, pixels_of
from scalecv.config import Experiment, Upscale
from scalecv.errors import ConfigError, DataError
from scalecv.shards.manifest import Manifest

if TYPE_CHECKING:
    import torch

HASH_TAG = "upscale/weights_hash"


def find(experiment: Experiment) -> bundle.UpscaleFacts | None:
    """What an experiment's bundles say of the stage; None where images stay as they are.

    Raises: ConfigError: upscale.model is no bundle of task=upscale, or does not reach upscale.factor.
    """
    wanted = experiment.upscale
    if wanted.factor == 1:
        return None
    if wanted.method == "bicubic" or wanted.model is None:
        return bundle.UpscaleFacts(method="bicubic", factor=wanted.factor)
    try:
        facts = bundle.read_facts(wanted.model)
    except DataError as error:
        raise ConfigError(f"upscale.model: {error}") from None
    if facts.task != "upscale":
        raise ConfigError(
            f"upscale.model={wanted.model} is a model for task={facts.task}: name the bundle of a run of task=upscale"
        )
    factor = _factor(facts)
    if wanted.factor not in (factor, factor**2):
        raise ConfigError(
            f"upscale.factor={wanted.factor}, but upscale.model={wanted.model} enlarges {factor} times: set "
            f"upscale.factor={factor}, or train one with model.args.factor={wanted.factor}"
        )
    return bundle.UpscaleFacts(
        method="sr",
        factor=wanted.factor,
        call=facts.call,
        pixels=facts.pixels,
        weights_hash=facts.weights_hash,
    )


def factor_of(uri: str) -> int:
    """How many times the network of a bundle of task=upscale enlarges."""
    return _factor(bundle.read_facts(uri))


def _factor(facts: bundle.Facts) -> int:
    return int(facts.call.args.get("factor") or 2)


def check(experiment: Experiment, manifest: Manifest) -> None:
    """Raises: ConfigError: upscale.model is no such network, or was trained on other bands or types of values."""
    found = find(experiment)
    if found is None or found.pixels is None:
        return
    ours = bundle.pixel_facts(pixels_of(manifest, experiment.data, experiment.data.uri))
    for name in ("bands", "color", "channels", "source_dtype"):
        mine, its = getattr(ours, name), getattr(found.pixels, name)
        if mine != its:
            raise ConfigError(
                f"upscale.model={experiment.upscale.model} was trained with {name}={its}, images of "
                f"{experiment.data.uri} have {name}={mine}: train one on the same bands"
            )


def behind(
    stage: bundle.UpscaleFacts, wanted: Upscale, pixels: Pixels, network: "torch.nn.Module", *, allow_import: bool
) -> "torch.nn.Module":
    """A network behind its stage, whose weights are those of upscale.model."""
    from scalecv.models.enlarged import SuperResolution

    model = networks.behind(stage, bundle.pixel_facts(pixels), network, allow_import=allow_import)
    enlarge = model.get_submodule("enlarge")
    if isinstance(enlarge, SuperResolution) and wanted.model:
        facts = bundle.read_facts(wanted.model)
        enlarge.network.load_state_dict(bundle.read_weights(wanted.model, facts))
    return model


def check_same(now: bundle.UpscaleFacts | None, before: bundle.UpscaleFacts | None) -> None:
    """Raises: ConfigError: the run began with other weights of upscale.model than are there now."""
    one, other = (facts.weights_hash if facts else None for facts in (now, before))
    if one != other:
        raise ConfigError(
            f"upscale.model has the weights {str(one)[:12]}, the run began with {str(other)[:12]}: put those back, or "
            "start over under another name"
        )


def tags(stage: bundle.UpscaleFacts | None) -> dict[str, str]:
    """What the record of a run says of the network that enlarges."""
    return {HASH_TAG: stage.weights_hash} if stage and stage.weights_hash else {}
