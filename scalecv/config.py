"""One frozen, typed tree for an experiment; a YAML file is that tree, written down.

`load` reads a file, `with_overrides` is the only way a value is changed (command line, search and
Python alike), `origins` tells where each value came from, `json_schema` serves editors.
Every field's docstring is its text in the JSON Schema.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from scalecv.errors import ConfigError, nearest

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
Scalar = bool | int | float | str | None


class Frozen(BaseModel):
    """A record that cannot be changed and refuses keys it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )


class Augment(Frozen):
    """Random changes of training images, applied to image and target together.

    Each is drawn from (seed, epoch, sample id) alone, so it is the same on any number of workers.
    """

    hflip: float = Field(0.0, ge=0, le=1)
    """Probability of a left-right flip."""
    vflip: float = Field(0.0, ge=0, le=1)
    """Probability of an up-down flip."""
    rot90: bool = False
    """Rotate by a random multiple of 90 degrees (square images)."""
    pad_crop_px: int = Field(0, ge=0)
    """Pad by this many pixels on each side (reflected), then crop back at a random place."""
    resized_crop: tuple[float, float] | None = None
    """Crop a random share of the area in this range, then resize to data.size_px."""
    rotate_deg: float = Field(0.0, ge=0, le=180)
    """Largest rotation to either side, degrees."""
    translate: float = Field(0.0, ge=0, le=0.5)
    """Largest shift to each side, share of the image side."""
    zoom: float = Field(0.0, ge=0, lt=1)
    """Largest change of scale: 0.1 means 0.9 to 1.1."""
    brightness: float = Field(0.0, ge=0, le=1)
    """Largest relative change of brightness."""
    contrast: float = Field(0.0, ge=0, le=1)
    """Largest relative change of contrast."""
    erase: float = Field(0.0, ge=0, le=1)
    """Probability of blanking one random rectangle (2 to 20 % of the area) of the image."""

    @field_validator("resized_crop")
    @classmethod
    def _share(cls, v: tuple[float, float] | None) -> tuple[float, float] | None:
        if v is not None and not 0 < v[0] <= v[1] <= 1:
            raise ValueError("needs 0 < smallest <= largest <= 1")
        return v


class Data(Frozen):
    """Which dataset, and how its images become tensors."""

    uri: str
    """Dataset to train on: a path, s3://, gs:// or az:// URI that `scalecv ingest` wrote."""
    version: int | None = Field(None, ge=0)
    """Version of the dataset; empty means the newest."""
    get: str = ""
    """One line that tells how to get the data, shown when it is not there."""
    size_px: int | None = Field(None, ge=1, le=8192)
    """Side of the square that images are resized to; empty keeps the native size, which must then be one size."""
    resize: Literal["stretch", "crop"] = "stretch"
    """How a non-square image becomes square: stretch it, or cut its centre."""
    color: Literal["auto", "rgb", "gray", "native"] = "auto"
    """Channels of photographs: native ones if all images agree, else rgb; rasters always keep their bands."""
    bands: tuple[int, ...] | None = None
    """Bands to use, counted from 1 in the order of the file; empty means all."""
    augment: Augment = Augment()
    """Random changes of training images."""
    window_mb: int = Field(128, ge=1)
    """Encoded megabytes among which rows are shuffled, over all workers together."""
    reader: Literal["auto", "ray", "threads"] = "auto"
    """Who reads row groups: Ray Data, or threads of the training process; auto: Ray Data when Ray Train runs."""
    decode: Literal["auto", "trainer", "cluster"] = "auto"
    """Who decodes: threads of the training process, or free CPUs of the cluster too; auto: these if training waits.
    """
    decode_threads: int | None = Field(None, ge=1)
    """Threads that decode images in each training process; empty means its share of the cores."""
    max_bad: float = Field(0.01, ge=0, le=1)
    """Share of a split's rows that a run may leave out because their bytes are damaged or gone; more stops it."""

    @field_validator("bands")
    @classmethod
    def _bands(cls, v: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if v is not None and (not v or min(v) < 1 or len(set(v)) != len(v)):
            raise ValueError("needs different band numbers, counted from 1")
        return v


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


class Train(Frozen):
    """How the network learns."""

    epochs: int = Field(10, ge=1)
    """Passes over the training split."""
    batch: int = Field(64, ge=1)
    """Images of one update, over all workers together."""
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Images per forward pass of one worker; smaller than its share of the batch means accumulation. auto: its whole
    share, halved as often as memory runs out."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate after warm-up."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adamw"
    """Optimiser of torch.optim."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay; biases and normalisation are left out of it."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of sgd."""
    schedule: Literal["constant", "cosine", "plateau"] = "cosine"
    """Learning rate over time; plateau follows the validation metric."""
    warmup_epochs: float = Field(0.0, ge=0)
    """Epochs of linear warm-up from zero."""
    plateau_patience: int = Field(5, ge=0)
    """Epochs without improvement before the plateau schedule lowers the rate."""
    plateau_factor: float = Field(0.5, gt=0, lt=1)
    """Factor by which the plateau schedule lowers the rate."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of the gradient; empty does not clip."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the forward pass; what the device cannot do falls back to fp32 and says so."""
    exact: bool = False
    """The same weights, bit for bit, on 0, 1, 2 or 4 workers; slower, and without batch statistics."""
    channels_last: bool = False
    """Memory format channels_last, faster for convolutions on most devices."""
    compile: bool = False
    """Compile the network with torch.compile."""
    recompute: bool = False
    """Gradient checkpointing: activations are computed again in the backward pass; less memory, more time."""
    early_stop_patience: int | None = Field(None, ge=1)
    """Epochs without improvement of the metric before training stops; empty never stops."""
    early_stop_min_delta: float = Field(1e-4, ge=0)
    """Smallest change that counts as an improvement."""
    metric: str | None = None
    """Metric that decides what is best, such as val/macro_accuracy; empty takes the task's own."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of torch in each worker; empty means its share of the cores."""


class Cache(Frozen):
    """A place on each node's disk for what was read from a bucket, shared by all workers and runs of the node."""

    dir: str | None = None
    """Folder on a local disk; empty reads from the bucket in each epoch."""
    max_gb: float = Field(50.0, gt=0)
    """Most gigabytes (10^9 bytes) in the folder; what was used longest ago goes first."""


class Scale(Frozen):
    """Where a run executes."""

    workers: int = Field(1, ge=0)
    """Training processes; 0 runs the loop in the caller's process, without Ray."""
    gpu: Literal["auto", "yes", "no"] = "auto"
    """Whether each worker takes a GPU; auto: if the cluster has one for each."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """CPUs that Ray reserves for each worker."""
    max_failures: int = Field(3, ge=0)
    """Times that the workers are started again after one of them, or its node, was lost."""
    min_workers: int | None = Field(None, ge=1)
    """Fewest workers to go on with while nodes are lost; each number of them must divide train.batch."""
    hang_after_s: float = Field(600.0, gt=0)
    """Seconds without a step after which the stacks of all workers are saved and they are started again."""


class Track(Frozen):
    """What is recorded, and where."""

    storage: str = "runs"
    """Where checkpoints and bundles lie: a path, s3://, gs:// or az:// URI."""
    experiment: str = "scalecv"
    """Name of the MLflow experiment."""
    uri: str | None = None
    """MLflow tracking URI; empty takes MLFLOW_TRACKING_URI, else SQLite in ./mlruns.db."""
    log_every: int = Field(20, ge=1)
    """Steps between two points of the training curves."""
    checkpoint_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints within an epoch; empty leaves them to the ends of epochs and the clock."""
    checkpoint_minutes: float = Field(10.0, gt=0)
    """Minutes after which a checkpoint is due, whatever the step."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints that are kept besides the best one."""
    pictures: int = Field(16, ge=0)
    """Images on each picture of predictions."""

    @field_validator("uri")
    @classmethod
    def _no_login(cls, v: str | None) -> str | None:
        if v and "@" in v.partition("://")[2].partition("/")[0]:
            raise ValueError(
                "a login does not belong into an experiment: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return v


class Experiment(Frozen):
    """One question, written down so that it can be run anywhere."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Name of the run; the same name goes on with the same run."""
    question: str = ""
    """What the experiment is to find out."""
    task: Literal["classify", "segment"]
    """Kind of problem."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of order, augmentation and starting weights."""
    data: Data
    """Which dataset, and how its images become tensors."""
    model: Model
    """Which network."""
    loss: Loss = Loss()
    """Weighted terms; empty takes the task's default."""
    train: Train = Train()
    """How the network learns."""
    cache: Cache = Cache()
    """What each node keeps of what it read."""
    scale: Scale = Scale()
    """Where the run executes."""
    track: Track = Track()
    """What is recorded, and where."""

    @model_validator(mode="after")
    def _fits(self) -> "Experiment":
        ranks = max(1, self.scale.workers)
        if self.train.batch % ranks:
            low = self.train.batch // ranks * ranks
            raise ValueError(
                f"train.batch={self.train.batch} cannot be shared evenly by scale.workers={ranks}: "
                f"set train.batch={low or ranks} or {low + ranks}"
            )
        fewest = self.scale.min_workers
        if fewest is not None and fewest > self.scale.workers:
            raise ValueError(f"scale.min_workers={fewest} is more than scale.workers={self.scale.workers}")
        share = self.train.batch // ranks
        if isinstance(self.train.micro_batch, int) and share % self.train.micro_batch:
            raise ValueError(
                f"train.micro_batch={self.train.micro_batch} does not divide the {share} images that each worker "
                f"gets of train.batch={self.train.batch}"
            )
        if self.data.augment.resized_crop and not self.data.size_px:
            raise ValueError("data.augment.resized_crop needs data.size_px, the size to resize to")
        return self

    def identity(self) -> str:
        """SHA-256 of all that makes the result: more epochs, other hardware or tracking leave it as it is."""
        tree = self.model_dump(mode="json")
        for key in ("scale", "track", "cache", "question"):
            tree.pop(key)
        tree["train"].pop("epochs")
        for key in ("uri", "get", "reader", "decode", "decode_threads", "max_bad"):
            tree["data"].pop(key)
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


class _UniqueKeyLoader(yaml.SafeLoader):
    """The safe loader, without aliases, duplicate keys and deep nesting."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ConfigError("YAML aliases (*name) are not accepted; write the value again")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ConfigError(f"nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"line {key_node.start_mark.line + 1}: a key must be a word")
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: key '{key}' stands twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """The mapping in a YAML text.

    Raises: ConfigError: not YAML, not a mapping, too large, or with aliases or duplicate keys.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{where} has {len(text)} bytes; an experiment has at most {MAX_BYTES}")
    try:
        tree = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a subclass of SafeLoader
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:  # the last two: dates, long numbers
        at = getattr(error, "problem_mark", None)
        line = f":{at.line + 1}" if at else ""
        raise ConfigError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: expected keys such as name, task and data, found {type(tree).__name__}")
    return tree


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """``["train.lr=3e-4"]`` as ``{"train.lr": "3e-4"}``, values read as YAML.

    Raises: ConfigError: a word without '='.
    """
    out: dict[str, Any] = {}
    for pair in pairs:
        key, eq, value = pair.partition("=")
        if not eq or not key:
            raise ConfigError(f"'{pair}' is not key=value; write for example train.lr=3e-4")
        try:
            out[key.strip()] = yaml.safe_load(value) if value else None
        except yaml.YAMLError:
            out[key.strip()] = value
    return out


def with_overrides(tree: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested mapping with dotted keys set; the one way a value is changed.

    Raises: ConfigError: a dotted key leads through a plain value.
    """
    out = json.loads(json.dumps(tree, default=str))
    for dotted, value in overrides.items():
        node = out
        *path, last = dotted.split(".")
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{dotted}: '{part}' is a value, not a group of keys")
        node[last] = value
    if not isinstance(out, dict):
        raise ConfigError("expected a mapping of keys")
    return out


def build(tree: Mapping[str, Any], where: str) -> Experiment:
    """The experiment that a nested mapping describes.

    Raises: ConfigError: one line per problem, each with its key, what was found and what was expected.
    """
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(where, problem) for problem in error.errors())) from None


def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """The experiment in a YAML file, with dotted keys set on top.

    Raises: ConfigError: file missing, not YAML, or not a valid experiment.
    """
    return build(with_overrides(read(path), overrides or {}), str(path))


def read(path: str | Path) -> dict[str, Any]:
    """The nested mapping in an experiment file, not yet checked."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = nearest(file.name, sorted(p.name for p in file.parent.glob("*.y*ml"))) if file.parent.is_dir() else ""
        raise ConfigError(f"no experiment at {file}{near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read experiment {file}: {error}") from None
    return parse_yaml(text, str(file))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"train": {"lr": 1}}`` as ``{"train.lr": 1}``; empty groups stay as they are."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            out.update(flatten(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


def origins(path: str | Path, overrides: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Each key of the resolved experiment with its value and where that came from: command line, file or default."""
    tree = read(path)
    given = flatten(tree)
    for key, value in flatten(build(with_overrides(tree, overrides), str(path)).model_dump(mode="json")).items():
        origin = "command line" if key in overrides else str(path) if key in given else "default"
        yield key, value, origin


def dump(experiment: Experiment) -> str:
    """The experiment as YAML, every key written out."""
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """JSON Schema of an experiment file, for editors."""
    schema = Experiment.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "scalecv experiment"}


def _explain(where: str, problem: Any) -> str:
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key '{key}'{_near_key(path)}"
    if problem["type"] == "missing":
        return f"{where}: key '{key}' is missing"
    found = problem.get("input")
    said = problem["msg"].removeprefix("Value error, ")
    said = said[0].lower() + said[1:]
    if not key or isinstance(found, dict) or "login" in said:
        return f"{where}: {key + ': ' if key else ''}{said}"
    return f"{where}: {key}={found!r}: {said}"


ELSEWHERE = {
    "learning_rate": "train.lr",
    "batch_size": "train.batch",
    "max_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "num_workers": "data.decode_threads",
    "amp": "train.precision",
    "accumulate_grad_batches": "train.micro_batch",
    "image_size": "data.size_px",
    "img_size": "data.size_px",
    "imgsz": "data.size_px",
    "backbone": "model.encoder",
    "pretrained": "model.weights",
    "dataset": "data.uri",
}
"""What keys are called in other tools."""


def _near_key(path: list[str]) -> str:
    known = _keys(Experiment)
    if path[-1] in ELSEWHERE:
        return f"; did you mean '{ELSEWHERE[path[-1]]}'?"
    siblings = [k for k in known if k.rpartition(".")[0] == ".".join(path[:-1])]
    same = nearest(path[-1], [k.rpartition(".")[2] for k in siblings])
    if same:
        return same.replace("'", "'" + "".join(p + "." for p in path[:-1]), 1)
    elsewhere = [k for k in known if k.rpartition(".")[2] == path[-1]]
    return (
        f"; did you mean '{elsewhere[0]}'?"
        if elsewhere
        else f"; known here: {', '.join(k.rpartition('.')[2] for k in siblings)}"
    )


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    out: list[str] = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        out.append(prefix + name)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            out += _keys(inner, f"{prefix}{name}.")
    return out
