"""What can be known to be wrong before a worker starts: the experiment against the manifest."""

import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from scalecv.batches import sampling
from scalecv.batches.pixels import Pixels, pixels_of
from scalecv.config import Experiment
from scalecv.errors import ConfigError, DataError, nearest
from scalecv.shards.manifest import Manifest, constant_bands, copies_line, overlap_line

MEASURES = {
    "classify": ("loss", "accuracy", "macro_accuracy", "f1", "average_precision"),
    "segment": ("loss", "iou", "f1", "average_precision", "precision", "recall", "macro_accuracy", "accuracy"),
    "upscale": ("loss", "psnr", "ssim"),
}
PER_CLASS = ("recall_", "iou_")
KIND = {"classify": "label", "segment": "mask"}
"""What rows are labelled with; other tasks look at images alone."""
SHARDS = 4
"""Logical shards of a global batch where train.exact is set (see exact.py)."""


def check(experiment: Experiment, manifest: Manifest) -> list[str]:
    """Notes on what is allowed but worth knowing.

    Raises: ConfigError, DataError: the run cannot work; the message names key, found, expected and what to do.
    """
    where = experiment.data.uri
    _labels(experiment, manifest, where)
    leaks = _leaks(experiment, manifest, where)
    pixels = pixels_of(manifest, experiment.data, where)
    wanted = experiment.model.in_channels
    if wanted is not None and wanted != pixels.channels:
        raise ConfigError(
            f"model.in_channels={wanted}, but images of {where} give {pixels.channels} bands: leave model.in_channels "
            "out, or choose bands with data.bands"
        )
    init = experiment.model.in_channels_init
    if isinstance(init, tuple) and (len(init) != pixels.channels or set(init) == {"zero"}):
        raise ConfigError(
            f"model.in_channels_init={', '.join(init)}, but images of {where} give {pixels.channels} bands: name for "
            "each band red, green, blue, mean or zero, not zero for all"
        )
    _batch(experiment, manifest)
    _threshold(experiment, manifest)
    sampling.check(experiment.data, manifest, where)
    _augment(experiment, manifest, pixels)
    if experiment.train.exact:
        _exact(experiment)
    _sizes(experiment)
    return [*leaks, *_notes(experiment, manifest, pixels)]


def sizes(experiment: Experiment) -> list[int]:
    """The numbers of workers that a run may have, largest first; one alone where scale.min_workers is not set."""
    train, scale = experiment.train, experiment.scale
    if not scale.workers:
        return [0]
    return [
        workers
        for workers in range(scale.workers, (scale.min_workers or scale.workers) - 1, -1)
        if not train.batch % workers
        and not (isinstance(train.micro_batch, int) and train.batch // workers % train.micro_batch)
        and not (train.exact and SHARDS % workers)
    ]


def check_names(experiment: Experiment) -> None:
    """Look up a network's names in the libraries' sources, in some milliseconds; ask the libraries if one is not there.

    Raises: ConfigError: nobody knows the name.
    """
    model = experiment.model
    if experiment.task == "classify" and not re.search(r"[:/]", model.arch):
        declared = r"^@register_model\(.*\)\n(?:@.*\n)*def (\w+)\("
        if model.arch not in _declared("torchvision", "models", declared):
            from scalecv.models import check_arch

            check_arch(experiment.task, model.arch)
    if experiment.task == "segment" and not model.encoder.startswith("tu-"):
        if model.encoder not in _declared("segmentation_models_pytorch", "encoders", r'^ {4}"([\w.-]+)": \{'):
            from scalecv.models.segmenters import check_encoder

            check_encoder(model.encoder)


@lru_cache(maxsize=8)
def _declared(package: str, folder: str, pattern: str) -> set[str]:
    """Names that the files of a package's folder declare, without importing it; a sweep asks for each trial."""
    spec = find_spec(package)
    top = Path(spec.origin).parent / folder if spec and spec.origin else Path()
    return {name for file in top.glob("*.py") for name in re.findall(pattern, file.read_text(), re.MULTILINE)}


def check_network(experiment: Experiment, manifest: Manifest) -> None:
    """The part that needs torch: while it is imported, workers start already.

    Raises: ConfigError: network or loss do not fit the task.
    """
    from scalecv.models import check_arch, misfit
    from scalecv.tasks import TASKS

    check_arch(experiment.task, experiment.model.arch)
    if experiment.model.weights == "imagenet":
        from scalecv.models.library import check_imagenet

        check_imagenet(experiment.model.arch, experiment.model.encoder)
    TASKS[experiment.task].check(experiment.loss, len(manifest.classes))
    model, size = experiment.model, experiment.data.size_px
    sides = (size, size) if size else manifest.sizes_px[:2]
    wrong = misfit(experiment.task, model.arch, model.encoder, model.args, sides, experiment.upscale.factor)
    if wrong is not None:
        raise ConfigError(f"{wrong[0]}: set data.size_px={wrong[1]}")


def _threshold(experiment: Experiment, manifest: Manifest) -> None:
    wanted, classes = experiment.train.threshold, len(manifest.classes)
    if wanted is None:
        return
    if classes != 2:
        raise ConfigError(
            f"train.threshold={wanted} is for two classes, {experiment.data.uri} has {classes}: leave it out"
        )
    if wanted == "tuned" and not manifest.splits.get("val"):
        raise ConfigError(
            f"train.threshold=tuned needs a val split, {experiment.data.uri} has none ({_splits(manifest)}): set a "
            "number instead"
        )


def _exact(experiment: Experiment) -> None:
    """Refuse what cannot be exact, with the reason and what to set instead."""
    train, workers = experiment.train, max(1, experiment.scale.workers)
    if experiment.model.norm in ("batch", "sync"):
        raise ConfigError(
            f"train.exact=true with model.norm={experiment.model.norm}: batch statistics depend on how a batch is cut; "
            "set model.norm=group or frozen"
        )
    if SHARDS % workers:
        raise ConfigError(f"train.exact=true works on 1, 2 or {SHARDS} workers, not on scale.workers={workers}")
    if train.batch % SHARDS:
        raise ConfigError(
            f"train.exact=true cuts a batch into {SHARDS}: train.batch={train.batch} is no multiple of it"
        )
    if isinstance(train.micro_batch, int) and train.batch // SHARDS % train.micro_batch:
        raise ConfigError(
            f"train.exact=true: train.micro_batch={train.micro_batch} does not divide the {train.batch // SHARDS} "
            f"images of a logical shard (train.batch={train.batch} in {SHARDS} parts)"
        )
    if train.precision == "fp16":
        raise ConfigError("train.exact=true with train.precision=fp16: the loss scale is not kept; set bf16 or fp32")
    if experiment.data.decode == "gpu":
        raise ConfigError("train.exact=true with data.decode=gpu: its pixels hang on the GPU; set data.decode=trainer")


def _sizes(experiment: Experiment) -> None:
    fewest = experiment.scale.min_workers
    fitting = sizes(experiment)
    if fewest and fewest not in fitting:
        batch = f"train.batch={experiment.train.batch}" + (" with train.exact=true" if experiment.train.exact else "")
        raise ConfigError(
            f"scale.min_workers={fewest}: {batch} cannot be shared by {fewest} workers; "
            f"set scale.min_workers={min(fitting)}, or leave it out to have {experiment.scale.workers} at all times"
        )


def _labels(experiment: Experiment, manifest: Manifest, where: str) -> None:
    kind = KIND.get(experiment.task)
    if kind and manifest.kind != kind:
        raise ConfigError(
            f"task={experiment.task} needs rows with a {kind}, {where} has rows with a {manifest.kind}: "
            f"set task={'segment' if manifest.kind == 'mask' else 'classify'}, or ingest with another --layout"
        )
    if not manifest.splits.get("train"):
        raise DataError(f"{where} has no rows in its train split ({_splits(manifest)}): ingest with a train split")
    if not kind:
        return
    if len(manifest.classes) < 2:
        raise DataError(
            f"{where} has one class only ({', '.join(manifest.classes) or 'none'}): there is nothing to tell apart; "
            "check the folders or the label column, and ingest again"
        )
    seen = {name for name, rows in manifest.class_counts.get("train", {}).items() if rows}
    for split in ("val", "test"):
        missing = [name for name, rows in manifest.class_counts.get(split, {}).items() if rows and name not in seen]
        if missing:
            some = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
            raise DataError(
                f"{where}: {split} has classes that train lacks: {some}. A network cannot learn what it never sees: "
                "split the data again, or leave these classes out"
            )


def _augment(experiment: Experiment, manifest: Manifest, pixels: Pixels) -> None:
    """Refuse changes that make no sense for these images."""
    augment, where = experiment.data.augment, experiment.data.uri
    if augment.band_drop and pixels.channels < 2:
        raise ConfigError(
            f"data.augment.band_drop={augment.band_drop:g}: images of {where} give one band, and without it nothing is "
            "left: leave it out"
        )
    width, height = manifest.sizes_px[:2]
    if augment.rot90 and not experiment.data.size_px and width != height:
        raise ConfigError(
            f"data.augment.rot90 turns images of {where} from {width}x{height} to {height}x{width} pixels, and a batch "
            "needs one size: set data.size_px, or leave it out"
        )


def _batch(experiment: Experiment, manifest: Manifest) -> None:
    train = experiment.train
    share = train.batch // max(1, experiment.scale.workers)
    micro = train.micro_batch if isinstance(train.micro_batch, int) else share
    is_alone = experiment.model.norm == "sync" and experiment.scale.workers <= 1
    # The networks of task=upscale normalise nothing.
    if micro == 1 and (experiment.model.norm == "batch" or is_alone) and experiment.task != "upscale":
        raise ConfigError(
            f"train.batch={train.batch} gives each worker one image at a time, and batch normalisation needs two: "
            "set model.norm=group or frozen, or a larger train.batch or train.micro_batch"
            + ("; train.micro_batch=auto and train.recompute=true make room" if experiment.upscale.factor > 1 else "")
        )
    if train.metric:
        check_metric(train.metric, "train.metric", experiment.task)
    if train.metric and train.metric.startswith("val/") and not manifest.splits.get("val"):
        raise ConfigError(
            f"train.metric={train.metric}, but {experiment.data.uri} has no val split ({_splits(manifest)})"
        )


def check_metric(metric: str, key: str, task: str) -> None:
    """Raises: ConfigError: a task has no such metric; `key` is where it was asked for."""
    where, _, measure = metric.partition("/")
    if where not in ("val", "train"):
        raise ConfigError(f"{key}={metric}: expected a name such as val/{MEASURES[task][1]}")
    known = ("loss",) if where == "train" else MEASURES[task]
    if measure not in known and not measure.startswith(PER_CLASS):
        names = ", ".join(f"{where}/{name}" for name in known)
        raise ConfigError(f"{key}={metric}: there is no {measure}{nearest(measure, known)}; task={task} has {names}")


def _notes(experiment: Experiment, manifest: Manifest, pixels: Pixels) -> list[str]:
    notes = []
    if experiment.model.freeze != "none" and not experiment.model.weights:
        notes.append("model.freeze without model.weights: what is frozen stays as the seed draws it")
    if not manifest.splits.get("val"):
        notes.append("there is no val split: the best checkpoint is chosen by train/loss")
    rows = min(manifest.splits["train"], experiment.data.limit or manifest.splits["train"])
    if rows < manifest.splits["train"]:
        notes.append(f"data.limit: {rows:,} of {manifest.splits['train']:,} training rows are used")
    if experiment.data.sampling.balance and experiment.loss.class_weights == "balanced":
        notes.append("data.sampling.balance and loss.class_weights=balanced both raise rare classes: one is enough")
    if experiment.train.batch > rows:
        notes.append(
            f"train.batch={experiment.train.batch} is more than the {rows} training rows: "
            "each epoch is one update, filled up with repeated rows that count nowhere"
        )
    stats = next(iter(manifest.stats.values()), None)
    if stats is not None and pixels.color == "native" and pixels.channels > 1:
        notes += constant_bands(stats, used=pixels.bands)
    return notes


def _leaks(experiment: Experiment, manifest: Manifest, where: str) -> list[str]:
    """Notes on leaks that the experiment allows.

    Raises: DataError: images of two splits lie on each other, or are the same.
    """
    found = {
        "overlap": (
            [overlap_line(overlap) for overlap in manifest.overlaps],
            "ingest with a split by place (--split-by scene or block, --split-folder)",
        ),
        "copies": (
            [copies_line(copies) for copies in manifest.copies],
            "leave the copies out of the source or keep them together with --group, and ingest again",
        ),
    }
    allowed = experiment.data.allow_leak
    for name, (lines, fix) in found.items():
        if lines and name not in allowed:
            names = ", ".join([*allowed, name])
            raise DataError(
                f"{where}: {'; '.join(lines)}. What is learnt in one is asked in the other: {fix}, or say "
                f"data.allow_leak=[{names}]"
            )
    return [f"allowed by data.allow_leak=[{name}]: {line}" for name, (lines, _) in found.items() for line in lines]


def _splits(manifest: Manifest) -> str:
    return ", ".join(f"{name} {rows}" for name, rows in manifest.splits.items()) or "no rows"
