"""What a rank is given. Light to import: the driver and Ray's controller need it, and need no torch for it."""

from collections.abc import Sequence
from dataclasses import dataclass

from scalecv.config import Experiment


@dataclass(frozen=True)
class Pause:
    """Where a run pauses: at the end of the epoch that is nearest to this place."""

    at: float
    """Epochs, or device-seconds of training and validation, since the beginning of the run."""
    in_device_s: bool = False

    def is_reached(self, at: float, last: float) -> bool:
        """Whether the end of an epoch is the nearest, the next one taken to be as long as the last.

        Args:
            at: epochs or device-seconds so far.
            last: those of the last epoch.
        """
        return at + last / 2 >= self.at

    def comes(self, history: Sequence[dict[str, float]], ranks: int) -> bool:
        """Whether a run pauses now.

        Args:
            history: numbers of each epoch that is done.
            ranks: devices that train.
        """
        if not history:
            return False
        took = [ranks * epoch_s(epoch) if self.in_device_s else 1.0 for epoch in history]
        return self.is_reached(sum(took), took[-1])


def epoch_s(epoch: dict[str, float]) -> float:
    """Seconds of training and validation of an epoch, by the numbers that a run keeps of it."""
    return epoch["time/train_s"] + epoch["time/validation_s"]


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
    until: Pause | None = None
    """Where the run pauses; None trains to the end."""


@dataclass(frozen=True)
class Place:
    """Where this rank runs."""

    rank: int = 0
    ranks: int = 1
    ranks_on_node: int = 1
    device: str = "cpu"
