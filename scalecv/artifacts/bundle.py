"""A bundle: all that is needed to use a model, without pickle and without training code.

model.safetensors   weights
bundle.json         task, architecture call, pixels (bands, size, mean, std), classes, threshold, data,
                    metrics,
and the size and SHA-256 of the weights: any flipped bit is noticed before use
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from scalecv import storage
from scalecv.config import Augment, Frozen, Scalar
from scalecv.errors import DataError, IntegrityError

if TYPE_CHECKING:
    import torch

    from scalecv.batches.pixels import Pixels

FORMAT = 1
FACTS = "bundle.json"
WEIGHTS = "model.safetensors"
MOST_FACTS_BYTES = 16 << 20
MOST_SCALE = 64


Side = Annotated[int, Field(ge=1, le=1 << 16)]


class Call(Frozen):
    """The arguments that build the network."""

    arch: str
    encoder: str
    in_channels: int = Field(ge=1, le=1 << 16)
    outputs: int = Field(ge=1, le=1 << 20)
    stem: Literal["default", "small"]
    norm: Literal["batch", "sync", "group", "frozen"]
    args: dict[str, Scalar] = {}


class PixelFacts(Frozen):
    """How an encoded image becomes the network's input (see batches.pixels.Pixels)."""

    bands: tuple[int, ...] | None
    color: str
    channels: int = Field(ge=1, le=1 << 16)
    dtype: str
    source_dtype: str
    size_px: int | None = Field(ge=1, le=8192)
    resize: Literal["stretch", "crop"]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mask_values: tuple[int, ...] = ()
    mask_ignore: int | None = None
    span: tuple[float, ...] = ()
    sides_px: tuple[Side, Side] | None = None

    @model_validator(mode="after")
    def _fits(self) -> "PixelFacts":
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} deviations for {self.channels} channels")
        return self


class UpscaleFacts(Frozen):
    """How images are enlarged before the network sees them; the weights of a network that does it are in the bundle."""

    method: Literal["bicubic", "sr"]
    factor: Literal[2, 4]
    call: Call | None = None
    """The arguments that build the network of sr."""
    pixels: PixelFacts | None = None
    """What it was trained on."""
    weights_hash: str | None = None
    """Of its own bundle."""

    @model_validator(mode="after")
    def _whole(self) -> "UpscaleFacts":
        if self.method == "sr" and not (self.call and self.pixels and self.weights_hash):
            raise ValueError("sr needs call, pixels and weights_hash of its network")
        return self


class Origin(Frozen):
    """A trained model that is part of another."""

    name: str
    run_id: str | None = None
    """Its MLflow run."""
    weights_hash: str


class MemberFacts(Frozen):
    """One network of several whose probabilities are averaged; its weights lie under `members.NUMBER.network.`."""

    weight: float = Field(gt=0, le=1)
    """Its share of the mean; those of all members add up to 1."""
    call: Call
    pixels: PixelFacts
    """What it was trained on."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Height and width of its images, in those of the bundle's."""
    upscale: UpscaleFacts | None = None
    origins: tuple[Origin, ...] = ()
    """The model that it is, or those whose weights it is the mean of."""

    @field_validator("scale")
    @classmethod
    def _is_size(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not all(1 / MOST_SCALE <= side <= MOST_SCALE for side in scale):
            raise ValueError(f"{scale} lies outside 1/{MOST_SCALE} to {MOST_SCALE}")
        return scale


class DataFacts(Frozen):
    """Which data the weights saw."""

    uri: str
    version: int
    fingerprint: str


class Facts(Frozen):
    """The content of bundle.json."""

    format: int = FORMAT
    scalecv: str
    name: str
    task: Literal["classify", "segment", "upscale"]
    call: Call
    pixels: PixelFacts
    upscale: UpscaleFacts | None = None
    """The stage before the network, where there is one."""
    members: tuple[MemberFacts, ...] = Field((), max_length=64)
    """The networks of an ensemble; `call` is then that of the first, and `pixels` what all their images are made of."""
    origins: tuple[Origin, ...] = ()
    """Models whose weights these are the mean of; empty for one that was trained."""
    classes: tuple[str, ...]
    data: DataFacts
    loss: dict[str, float | str | None] = {}
    """The loss section of the experiment."""
    threshold: float = Field(0.5, gt=0, lt=1)
    """Probability from which on two classes are told as the second; more classes have none."""
    metrics: dict[str, float] = {}
    epoch: int = Field(0, ge=0)
    weights_hash: str
    """SHA-256 over names, dtypes, shapes and values; does not depend on the file format."""
    weights_sha256: str
    weights_bytes: int = Field(ge=0)

    @property
    def factor(self) -> int:
        """How many times images are enlarged before a network sees them, at most."""
        return max(one.factor if one else 1 for one in (self.upscale, *(member.upscale for member in self.members)))

    @model_validator(mode="after")
    def _adds_up(self) -> "Facts":
        if self.members and abs(sum(one.weight for one in self.members) - 1) > 1e-6:
            raise ValueError("the weights of the members do not add up to 1")
        return self


@dataclass(frozen=True)
class Bundle:
    """An opened bundle."""

    uri: str
    facts: Facts
    model: "torch.nn.Module"
    """In eval mode, gives logits."""

    def pixels(self) -> "Pixels":
        """How images become this model's input."""
        from scalecv.batches.pixels import Pixels

        told, is_image = self.facts.pixels.model_dump(), self.facts.task == "upscale"
        return Pixels(**told, classes=self.facts.classes, augment=Augment(), marks_data=is_image)


def weights_hash(state: "dict[str, torch.Tensor]") -> str:
    """SHA-256 over the sorted names, dtypes, shapes and values of a state dict."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pixel_facts(pixels: "Pixels") -> PixelFacts:
    """The part of `Pixels` that belongs to a bundle."""
    known = asdict(pixels)
    return PixelFacts(**{name: known[name] for name in PixelFacts.model_fields})


def parts(state: "dict[str, torch.Tensor]", **facts: Any) -> dict[str, bytes]:
    """The files of a bundle for a state dict; `facts` are the fields of `Facts` but for the hashes."""
    from safetensors.torch import save

    from scalecv import __version__

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    weights = save(plain)
    told = Facts(
        scalecv=__version__,
        weights_hash=weights_hash(plain),
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        weights_bytes=len(weights),
        **facts,
    )
    return {WEIGHTS: weights, FACTS: json.dumps(told.model_dump(mode="json"), indent=1).encode()}


def read_facts(uri: str) -> Facts:
    """The facts of the bundle in a folder.

    Raises: DataError: no bundle there. IntegrityError: the file is damaged or of another format.
    """
    where = storage.join(uri, FACTS)
    try:
        data = storage.get(where)
        if len(data) > MOST_FACTS_BYTES:
            raise IntegrityError(f"{where} has {len(data)} bytes, a bundle's description at most {MOST_FACTS_BYTES}")
        tree = json.loads(data)
        if isinstance(tree, dict) and tree.get("format") != FORMAT:
            raise DataError(f"{where} has bundle format {tree.get('format')}, this scalecv reads {FORMAT}")
        return Facts.model_validate(tree)
    except FileNotFoundError:
        raise DataError(
            f"no bundle at {storage.without_secrets(uri)}: expected a folder with {FACTS} and {WEIGHTS}, "
            "runs:/ID or models:/NAME@ALIAS"
        ) from None
    except (ValidationError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{where} is not a bundle's description: {_first(error)}") from None


def read_weights(uri: str, facts: Facts) -> "dict[str, torch.Tensor]":
    """The weights of a bundle, checked against their size and hash.

    Raises: IntegrityError: other bytes than were written.
    """
    from scalecv.models.weights import BadWeights, tensors

    where = storage.join(uri, WEIGHTS)
    try:
        data = storage.get(where, facts.weights_bytes, facts.weights_sha256)
    except FileNotFoundError:
        raise IntegrityError(f"{where} is missing: the bundle is not whole") from None
    try:
        return tensors(data)
    except BadWeights as error:
        raise IntegrityError(f"{where}: {error}") from None


def open_bundle(uri: str, *, allow_import: bool = False) -> Bundle:
    """The model in a folder, ready to use.

    A network that was built by the user's own function is only imported where the caller allows it:
    a bundle never decides by itself which code runs.
    """
    from scalecv.artifacts import networks

    facts = read_facts(uri)
    networks.check_calls(uri, facts)
    weights = read_weights(uri, facts)
    try:
        model = networks.network(facts, allow_import=allow_import)
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except (RuntimeError, MemoryError) as error:  # another shape, or a size that no machine has
        raise IntegrityError(
            f"{uri}: the network {facts.call.arch} and its weights do not fit: {_first(error)}"
        ) from None
    if missing or unexpected:
        raise IntegrityError(
            f"{uri}: weights do not fit {facts.call.arch}: {len(missing)} missing, {len(unexpected)} unexpected; "
            "the library that builds it may have changed since"
        )
    return Bundle(uri, facts, model.eval())


def _first(error: BaseException) -> str:
    """The first line that says something, with the place that pydantic names."""
    if isinstance(error, ValidationError):
        one = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}"[:300]
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
