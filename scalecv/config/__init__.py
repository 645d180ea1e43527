"""One frozen, typed tree for an experiment; a YAML file is that tree, written down.

`load` reads a file, `with_overrides` is the only way a value is changed (command line, search and
Python alike), `origins` tells where each value came from, `json_schema` serves editors.
Every field's docstring is its text in the JSON Schema.
"""

from scalecv.config.data import Augment, Cache, Data, Sampling
from scalecv.config.experiment import Experiment
from scalecv.config.files import build, dump, flatten, json_schema, load, origins, parse_overrides, read, with_overrides
from scalecv.config.frozen import Frozen, Scalar
from scalecv.config.network import IMAGE_TERMS, LOSS_TERMS, Loss, Model
from scalecv.config.search import Search, Spec
from scalecv.config.text import parse_yaml
from scalecv.config.training import Scale, Track, Train
from scalecv.config.upscale import Upscale

__all__ = [
    "IMAGE_TERMS",
    "LOSS_TERMS",
    "Augment",
    "Cache",
    "Data",
    "Experiment",
    "Frozen",
    "Loss",
    "Model",
    "Sampling",
    "Scalar",
    "Scale",
    "Search",
    "Spec",
    "Track",
    "Train",
    "Upscale",
    "build",
    "dump",
    "flatten",
    "json_schema",
    "load",
    "origins",
    "parse_overrides",
    "parse_yaml",
    "read",
    "with_overrides",
]
