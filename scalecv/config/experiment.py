"""One question: the whole tree, and what of it makes the result."""

import hashlib
import json
from typing import Literal

from pydantic import Field, model_validator

from scalecv.config.data import Cache, Data
from scalecv.config.frozen import Frozen
from scalecv.config.network import Loss, Model
from scalecv.config.search import Search
from scalecv.config.training import Scale, Track, Train
from scalecv.config.upscale import Upscale


class Experiment(Frozen):
    """One question, written down so that it can be run anywhere."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Name of the run; the same name goes on with the same run."""
    question: str = ""
    """What the experiment is to find out."""
    task: Literal["classify", "segment", "upscale"]
    """Kind of problem."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of order, augmentation and starting weights."""
    data: Data
    """Which dataset, and how its images become tensors."""
    upscale: Upscale = Upscale()
    """Whether the network sees its images enlarged."""
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
    search: Search = Search()
    """What `scalecv tune` may change, and what it may cost."""

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
        if self.task == "upscale":
            if self.upscale.factor > 1:
                raise ValueError("upscale.factor is a stage before another task; task=upscale takes model.args.factor")
            told = {
                "train.threshold": self.train.threshold,
                "loss.class_weights": self.loss.class_weights != "none",
                "loss.label_smoothing": self.loss.label_smoothing,
            }
            for key in (key for key, is_set in told.items() if is_set):
                raise ValueError(f"{key} is for tasks that tell classes apart, and task=upscale has none: leave it out")
        return self

    def identity(self) -> str:
        """SHA-256 of all that makes the result: more epochs, other hardware or tracking leave it as it is."""
        tree = self.model_dump(mode="json")
        for key in ("scale", "track", "cache", "question", "search"):
            tree.pop(key)
        tree["train"].pop("epochs")
        if tree["data"]["decode"] != "gpu":  # whose pixels are others
            tree["data"].pop("decode")
        for key in ("uri", "get", "reader", "decode_threads", "max_bad"):
            tree["data"].pop(key)
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
