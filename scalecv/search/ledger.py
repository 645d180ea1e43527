"""What a sweep knows, on storage: one small object for each trial, written whole whenever it changes.

    STORAGE/NAME/sweep.json           key of the sweep, the hash of what it searches, its first rung, the data
    STORAGE/NAME/trials/0007.json     record of a trial
    STORAGE/NAME/race/0002.json       record of a training of the race
    STORAGE/NAME/verdicts.json        what was asked of it each time that a race was judged
    STORAGE/NAME/runs/NAME-0007/      run of a trial: checkpoints, bundle, spool
A segment that was under way when its driver died is run again from its run's checkpoint; of its seconds until then
those of the epochs that were saved count.
"""

import hashlib
import json
import re
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from scalecv import redact, storage
from scalecv.config import Experiment
from scalecv.errors import ConfigError, DataError
from scalecv.search.schedule import first_rung
from scalecv.search.trials import Point, Trial

READS = 16
INSTEAD = "restore it, or give the sweep another name"


class Ledger:
    """The records of one sweep; a single driver writes them (it holds the name's lease)."""

    def __init__(self, home: str, experiment: Experiment, version: int = 0) -> None:
        """Open the ledger, or begin it with a version of the data.

        Raises: ConfigError: the name belongs to a sweep over another space or another experiment.
        """
        self.home = home
        told = _read(storage.join(home, "sweep.json"))
        identity = _identity(experiment)
        if told is None:
            rung, in_seconds = first_rung(experiment.search)
            told = {"key": uuid.uuid4().hex, "identity": identity, "rung": rung, "in_seconds": in_seconds}
            told["version"] = version
            storage.put(storage.join(home, "sweep.json"), json.dumps(told).encode())
        if not {"key", "identity", "rung", "in_seconds", "version"} <= told.keys():
            raise DataError(f"{storage.join(home, 'sweep.json')} is no record of a sweep: {INSTEAD}")
        if told["identity"] != identity:
            raise ConfigError(
                f"name={experiment.name} belongs to another sweep at {home}, over another space or experiment: give "
                "this one another name (more search.trials or search.budget go on with the same)"
            )
        self.key: str = told["key"]
        self.version: int = told["version"]
        """Of the data, for all trials, whatever is ingested meanwhile."""
        self.rung: tuple[float, bool] = told["rung"], told["in_seconds"]
        """The first rung, and whether it is in device-seconds; a larger budget does not move it."""
        self.trials = _all(home, "trials")
        self.race = _all(home, "race")
        self._writer = ThreadPoolExecutor(1, "ledger")
        self._written: dict[str, Future[None]] = {}
        self._asked = {key: getattr(experiment.search, key) for key in ("trials", "budget", "finalists", "seeds")}
        self._verdicts: list[dict[str, Any]] = (_read(storage.join(home, "verdicts.json")) or {}).get("asked", [])

    @property
    def verdicts_before(self) -> int:
        """Times that this sweep was judged with other limits before it was with these."""
        return self._verdicts.index(self._asked) if self._asked in self._verdicts else len(self._verdicts)

    def judged(self) -> None:
        """Note that the race was judged: whoever looks again must err less."""
        if self._asked not in self._verdicts:
            self._verdicts.append(self._asked)
            storage.put(storage.join(self.home, "verdicts.json"), json.dumps({"asked": self._verdicts}).encode())

    def keep(self, trial: Trial) -> None:
        """Have a record in its list, and write it in the background, after those before it.

        A driver may die before it is written. What a segment ended with is in its run, which is asked again. Of a trial
        that had begun nothing is known then: its number is drawn again, and its run, which has saved nothing in that
        instant, is gone on with or passed over (`runs.open_run`).

        Raises: StorageError, StorageDenied: a record before it could not be written.
        """
        folder, records = ("trials", self.trials) if trial.entrant is None else ("race", self.race)
        place = _place(self.home, folder, trial.number)
        for key in [key for key, done in self._written.items() if done.done() or key == place]:
            self._written.pop(key).result()
        records[trial.number : trial.number + 1] = [trial]
        self._written[place] = self._writer.submit(_write, place, trial)

    def settle(self) -> None:
        """Wait until every record is written. Raises: StorageError, StorageDenied: one could not be."""
        while self._written:
            self._written.popitem()[1].result()

    @property
    def device_s(self) -> float:
        """Device-seconds of all that has ended."""
        return sum(one.device_s for one in [*self.trials, *self.race])

    def wake(self) -> None:
        """Segments that a killed driver left under way are to be run on."""
        for trial in [*self.trials, *self.race]:
            if trial.status == "running":
                self.keep(replace(trial, status="waiting"))
        self.settle()


def is_begun(home: str) -> bool:
    """Whether a sweep lies below a folder."""
    return storage.exists(storage.join(home, "sweep.json"))


def read_trials(home: str) -> list[Trial]:
    """The records of the sweep below a folder, which may be under way, and then those of its race.

    Raises: DataError: no sweep there, or a record that is none.
    """
    if _read(storage.join(home, "sweep.json")) is None:
        raise DataError(f"no sweep at {storage.without_secrets(home)}: expected what scalecv tune wrote, STORAGE/NAME")
    return [*_all(home, "trials"), *_all(home, "race")]


def _all(home: str, folder: str) -> list[Trial]:
    found = [name for name in storage.list_names(storage.join(home, folder)) if re.fullmatch(r"\d{4,}\.json", name)]
    with ThreadPoolExecutor(READS) as pool:
        return list(pool.map(lambda number: _trial(home, folder, number), range(len(found))))


def _trial(home: str, folder: str, number: int) -> Trial:
    where = _place(home, folder, number)
    record = _read(where)
    if record is None:
        raise DataError(f"{where} is missing, later ones are there: {INSTEAD}")
    try:
        return Trial(**record | {"points": tuple(Point(**point) for point in record["points"])})
    except (KeyError, TypeError) as error:
        raise DataError(f"{where} is no record of a trial ({error}): {INSTEAD}") from None


def _write(place: str, trial: Trial) -> None:
    record = {**vars(trial), "points": [vars(point) for point in trial.points]}
    storage.put(place, json.dumps(redact.clean_tree(record)).encode())


def _place(home: str, folder: str, number: int) -> str:
    return storage.join(home, folder, f"{number:04d}.json")


def _identity(experiment: Experiment) -> str:
    space = {key: spec.model_dump(mode="json") for key, spec in experiment.search.space.items()}
    how = experiment.search.model_dump(mode="json", include={"metric", "cost", "scheduler", "rung", "eta"})
    tree = [experiment.identity(), experiment.train.epochs, space, how]
    return hashlib.sha256(json.dumps(tree, sort_keys=False).encode()).hexdigest()


def _read(uri: str) -> dict[str, Any] | None:
    try:
        told = json.loads(storage.get(uri))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{uri} is not JSON ({error}): {INSTEAD}") from None
    if not isinstance(told, dict):
        raise DataError(f"{uri} is no record of a sweep: {INSTEAD}")
    return told
