"""An experiment from its file, with keys set on top, and back."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from scalecv.config.experiment import Experiment
from scalecv.config.explain import explain
from scalecv.config.network import MIXTURES
from scalecv.config.search import Spec
from scalecv.config.text import parse_yaml
from scalecv.errors import ConfigError, nearest

SPACE = "search.space."


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
        *path, last = _parts(dotted)
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{dotted}: '{part}' is a value, not a group of keys")
        node[last] = value
    if not isinstance(out, dict):
        raise ConfigError("expected a mapping of keys")
    return out


def _parts(dotted: str) -> list[str]:
    """A dotted key by its levels; a key of the space holds dots itself."""
    if not dotted.startswith(SPACE):
        return dotted.split(".")
    whole = dotted.removeprefix(SPACE)
    key, _, way = whole.rpartition(".")
    return ["search", "space", *([key, way] if key and way in Spec.model_fields else [whole])]


def build(tree: Mapping[str, Any], where: str) -> Experiment:
    """The experiment that a nested mapping describes.

    Raises: ConfigError: one line per problem, each with its key, what was found and what was expected.
    """
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(where, problem) for problem in error.errors())) from None


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
    """Each key of the resolved experiment, its value, and its origin: command line, file, loss.name or default."""
    tree = read(path)
    given = flatten(tree)
    built = build(with_overrides(tree, overrides), str(path))
    named = {f"loss.{key}" for key in MIXTURES.get(built.loss.name or "", {})}
    for key, value in flatten(built.model_dump(mode="json")).items():
        unset = "loss.name" if key in named else "default"
        yield key, value, "command line" if key in overrides else str(path) if key in given else unset


def dump(experiment: Experiment) -> str:
    """The experiment as YAML, every key written out but for those of a space, of which one is set."""
    tree = experiment.model_dump(mode="json")
    tree["search"]["space"] = {
        key: spec.model_dump(mode="json", exclude_defaults=True) for key, spec in experiment.search.space.items()
    }
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """JSON Schema of an experiment file, for editors."""
    schema = Experiment.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "scalecv experiment"}
