"""What a rank is given. Light to import: the driver and Ray's controller need it, and need no torch for it."""

from dataclasses import dataclass

from scalecv.config import Experiment


@dataclass(frozen=True)
class Job:
    """What every rank is given; plain data."""

    experiment: Experiment
    dataset_version: int
    run: str
    """URI of the run: checkpoints, pictures and the final bundle lie below it."""
    reader: str
    """threads, ray, or auto: Ray Data for splits that do not fit into the window."""
    weights: str | None = None
    """Where the starting weights lie that runs:/ID or models:/NAME@ALIAS stood for when the run began."""
    allow_import: bool = True
    """Whether the network may be a function of the user's own; not for an experiment that came from a record."""
    until: int | None = None
    """Epochs after which the run pauses; None trains to the end."""


@dataclass(frozen=True)
class Place:
    """Where this rank runs."""

    rank: int = 0
    ranks: int = 1
    ranks_on_node: int = 1
    device: str = "cpu"
