"""How the network learns, where the run executes, and what is recorded."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from scalecv.config.frozen import Frozen


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
    lr_factors: dict[str, Annotated[float, Field(gt=0, le=1000)]] = {}
    """Factors of the learning rate by a module's dotted name, the longest that fits counts; encoder is all but the
    head, as in {encoder: 0.1}."""
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
    threshold: Annotated[float, Field(gt=0, lt=1)] | Literal["tuned"] | None = None
    """Probability from which on two classes are told as the second, to 1/4096 (finer near 0 and 1). tuned: the best of
    the validation split for the best weights (by iou for segment, accuracy for classify), kept in the bundle; until
    then 0.5. Empty: tuned for segment, 0.5 for classify."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of torch in each worker; empty means its share of the cores."""


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
    """Newest checkpoints that are kept besides the best one; 1 in the trials of a sweep."""
    pictures: int = Field(16, ge=0)
    """Images on each picture of predictions; at most 6 on those of each validation, 0 draws none."""
    pictures_every: int = Field(1, ge=0)
    """Epochs between pictures of the validation; 0 draws them at the end only."""

    @field_validator("uri")
    @classmethod
    def _no_login(cls, v: str | None) -> str | None:
        if v and "@" in v.partition("://")[2].partition("/")[0]:
            raise ValueError(
                "a login does not belong into an experiment: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return v
