"""Trained models that may become members of an ensemble: where they are, and whether they fit together."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from scalecv import config, storage
from scalecv.artifacts import bundle, lookup
from scalecv.artifacts.bundle import Facts, MemberFacts, Origin, PixelFacts
from scalecv.config import Track
from scalecv.errors import ConfigError, DataError, UserError
from scalecv.search.ledger import read_trials

SUMS = ("format", "scalecv", "weights_hash", "weights_sha256", "weights_bytes")
"""Facts that follow from the weights."""
RUNS = Track().storage
"""Where runs lie if nothing else is said."""


@dataclass(frozen=True)
class Candidate:
    """A bundle."""

    name: str
    uri: str
    facts: Facts
    run_id: str | None
    """Its MLflow run, where it was named by one."""

    @property
    def origins(self) -> tuple[Origin, ...]:
        """The model that it is, or those whose weights it is the mean of."""
        itself = Origin(name=self.name, run_id=self.run_id, weights_hash=self.facts.weights_hash)
        return self.facts.origins or (itself,)

    def member(self, weight: float, pixels: PixelFacts, sides: tuple[int, int]) -> MemberFacts:
        """Its facts as a member.

        Args:
            weight: share of the mean.
            pixels: as which images come.
            sides: height and width in which they come.
        """
        own = self.facts.pixels.size_px
        is_same = own is None or own == pixels.size_px
        return MemberFacts(
            weight=weight,
            call=self.facts.call,
            pixels=self.facts.pixels,
            scale=(1.0, 1.0) if is_same or own is None else (own / sides[0], own / sides[1]),
            upscale=self.facts.upscale,
            origins=self.origins,
        )


@dataclass(frozen=True)
class Place:
    """Where an ensemble is kept and recorded."""

    home: str
    """Folder below which runs lie."""
    name: str
    experiment: str
    """Of MLflow."""
    uri: str | None
    """Tracking URI; None takes the one in use."""


def place_of(sweep: str | None, to: str | None, experiment: str) -> tuple[Place, str | None]:
    """Where the result goes, and the folder of the sweep.

    Args:
        sweep: an experiment file, the name of a sweep below runs/, or its folder.
        to: name of the result.
        experiment: of MLflow, where no file names one.
    Raises: ConfigError: a name that cannot be one.
    """
    folder, uri = None, None
    if sweep and sweep.endswith((".yaml", ".yml")):
        tree = config.load(sweep)
        folder = storage.join(storage.absolute(tree.track.storage), tree.name)
        experiment, uri = tree.track.experiment, tree.track.uri
    elif sweep:
        folder = storage.absolute(sweep if "/" in sweep else storage.join(RUNS, sweep)).rstrip("/")
    home, name = folder.rsplit("/", 1) if folder else (storage.absolute(RUNS), "")
    name = to or f"{name[:90]}{'-' if name else ''}ensemble"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ConfigError(f"--to {name}: expected a name of letters, digits, '.', '_' and '-', as of a run")
    return Place(home, name, experiment, uri), folder


def find(runs: Sequence[str], sweep_folder: str | None, place: Place) -> list[Candidate]:
    """What a sweep and its race trained to the end and the models that are named, each weights once.

    Args:
        runs: bundle folders, runs:/ID, models:/NAME@ALIAS or names of runs.
        sweep_folder: of the sweep; None takes none of one.
        place: where names are looked up.
    Raises: UserError: fewer than two, one that is not there, or one that does not go with the first.
    """
    found = [*_trials(sweep_folder), *(_named(run, place) for run in runs)]
    each = list({one.facts.weights_hash: one for one in reversed(found)}.values())[::-1]
    if len(each) < 2:
        have = f"found {each[0].name} alone" if each else "found none"
        raise UserError(
            f"an ensemble needs at least two trained models, {have}: name a sweep with finished trials (--from-sweep), "
            "or more runs"
        )
    for one in each:
        _check_alike(each[0], one)
    return each


def fields_of(facts: Facts) -> dict[str, Any]:
    """Facts as `bundle.parts` takes them."""
    return {name: getattr(facts, name) for name in Facts.model_fields if name not in SUMS}


def _trials(folder: str | None) -> Iterator[Candidate]:
    if folder is None:
        return
    name = folder.rpartition("/")[2]
    for trial in read_trials(folder):
        if trial.status == "finished" and trial.bundle:
            yield Candidate(trial.run_name(name), trial.bundle, bundle.read_facts(trial.bundle), trial.run_id)


def _named(run: str, place: Place) -> Candidate:
    if not lookup.is_reference(run) and not storage.exists(storage.join(run, bundle.FACTS)):
        run = f"runs:/{lookup.find_run(run, place.experiment, place.uri)}"
    uri = lookup.lookup(run, place.uri)
    facts = bundle.read_facts(uri)
    return Candidate(facts.name, uri, facts, run[6:].partition("/")[0] if run.startswith("runs:/") else None)


def _check_alike(first: Candidate, one: Candidate) -> None:
    """Raises: DataError: probabilities of the two cannot be averaged."""
    a, b = first.facts, one.facts
    if b.task == "upscale" or b.members:
        kind = "an ensemble itself" if b.members else "for task=upscale, which has no probabilities"
        raise DataError(f"{one.name} ({one.uri}) is {kind}: name trained models for classify or segment")
    data_of = (a.data.fingerprint, b.data.fingerprint)
    pairs: dict[str, tuple[object, object]] = {
        "task": (a.task, b.task),
        "classes": (a.classes, b.classes),
        "mask values": (a.pixels.mask_values, b.pixels.mask_values),
        "outputs": (a.call.outputs, b.call.outputs),
        "data.color": (a.pixels.color, b.pixels.color),
        "dtype of images": (a.pixels.source_dtype, b.pixels.source_dtype),
        "data": (a.data.uri, b.data.uri) if data_of[0] != data_of[1] else (None, None),
    }
    for what, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise DataError(
                f"{one.name} ({one.uri}) has {what} {_short(theirs)}, {first.name} has {_short(ours)}: an ensemble "
                "averages probabilities of the same classes on the same validation split, name runs that agree"
            )


def _short(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 80 else text[:80] + " …"
