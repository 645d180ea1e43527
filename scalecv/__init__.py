"""scalecv: computer-vision experiments that outgrow one machine.

The Python interface is the command line's: `Experiment` is the tree of an experiment file, `train` runs it.
Importing scalecv imports nothing heavy and starts nothing.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Experiment", "evaluate", "ingest", "load", "train"]

if TYPE_CHECKING:
    from scalecv.config import Experiment, load
    from scalecv.serve.evaluate import evaluate
    from scalecv.shards.ingest import ingest
    from scalecv.train.run import train

_WHERE = {
    "Experiment": "scalecv.config",
    "evaluate": "scalecv.serve.evaluate",
    "ingest": "scalecv.shards.ingest",
    "load": "scalecv.config",
    "train": "scalecv.train.run",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for."""
    from importlib import import_module

    if name not in _WHERE:
        raise AttributeError(f"module 'scalecv' has no attribute '{name}'")
    return getattr(import_module(_WHERE[name]), name)
