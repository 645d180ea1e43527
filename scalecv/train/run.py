"""`scalecv train`: check, claim the name, start the workers, record, and say how it ended."""

import contextlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scalecv import storage
from scalecv.artifacts import spool, tracking
from scalecv.config import Experiment, dump, flatten
from scalecv.errors import ConfigError, Interrupted, ScalecvError, UserError
from scalecv.shards.store import Dataset
from scalecv.train import runs, upscaler
from scalecv.train.checks import check, check_names, check_network, sizes
from scalecv.train.job import Job, Pause
from scalecv.train.signals import stop_on_signals

Event = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    run_id: str | None
    """MLflow run; None where MLflow could not be reached."""
    status: str
    """finished, or stopped early by train.early_stop_patience."""
    name: str
    metrics: dict[str, float]
    weights_hash: str
    """SHA-256 of the weights after the last update."""
    order_hash: str
    """SHA-256 over every id and its place in every epoch."""
    bundle: str
    """URI of the bundle with the best weights."""
    images_per_s: float
    data_wait_share: float
    epochs: int
    best_epoch: int
    run_uri: str
    tracking_uri: str
    is_continued: bool
    was_complete: bool
    """Whether nothing was left to do."""


def train(
    experiment: Experiment,
    *,
    new: bool = False,
    code_dirs: tuple[str, ...] = (),
    allow_import: bool = True,
    tell: Callable[[Event], None] = lambda _: None,
    until: Pause | None = None,
    tags: Mapping[str, str] | None = None,
) -> Result:
    """Train an experiment to its end, going on from where an earlier command of the same name stopped.

    Args:
        experiment: what to run.
        new: start over under the same name.
        code_dirs: folders whose modules the workers must find, such as the experiment's own.
        allow_import: whether model.arch may name a function to import; False for an experiment out of a record.
        tell: called with each event, for a live display.
        until: where the run pauses, all of it saved; None trains to the end.
        tags: further tags of the MLflow run.
    Raises: UserError: wrong input, nothing was started. Interrupted: stopped on request or paused, state saved.
        ScalecvError: the run failed.
    """
    if ":" in experiment.model.arch and not allow_import:
        raise ConfigError(
            f"model.arch={experiment.model.arch} comes from a record and would import code: run the experiment's own "
            "file, or name it on the command line"
        )
    experiment = same_everywhere(experiment)
    uri = tracking.tracking_uri(experiment.track.uri)
    trouble = tracking.probe(uri)
    storage.check_writable(runs.home(experiment))
    with runs.lease(experiment):
        notes: list[str] = []

        def checked(dataset: Dataset) -> None:
            notes.extend(check(experiment, dataset.manifest))
            upscaler.check(experiment, dataset.manifest)

        run = runs.open_run(experiment, checked, find_weights=lambda weights: recorded_weights(weights, uri), new=new)
        for note in notes:
            tell({"kind": "progress", "message": note})
        if (run.result and run.result["epochs"] >= experiment.train.epochs) or (
            run.result and run.result["status"] == "stopped"
        ):
            return _complete(experiment, run, uri, patience_s=5 if trouble else 60)
        if run.goes_on:
            tell({"kind": "progress", "message": f"goes on with {run.uri} (--new starts over)"})
        if trouble:
            tell({"kind": "progress", "message": f"{trouble}. The run goes on; its record waits in {run.uri}"})
        wait_s = 5 if trouble else 60
        return _record_and_run(experiment, run, uri, code_dirs, tell, until, tags or {}, patience_s=wait_s)


def _record_and_run(
    experiment: Experiment,
    run: runs.Run,
    uri: str,
    code_dirs: tuple[str, ...],
    tell: Callable[[Event], None],
    until: Pause | None,
    tags: Mapping[str, str],
    patience_s: float,
) -> Result:
    path = runs.local_folder(run) / "spool.jsonl"
    begin = path.stat().st_size if path.exists() else 0
    _introduce(experiment, run, path)
    senders: list[tracking.Sender] = []
    results: list[Event] = []

    def start_sending() -> tracking.Sender:
        if not senders:
            senders.append(_sender(experiment, run, uri, tags))
        return senders[0]

    def hear(event: Event) -> None:
        if "step" in event or "is_epoch_end" in event:
            start_sending()  # not earlier: importing MLflow would take the cores that the workers start on
        if event["kind"] == "result":
            results.append(event)
        tell(event)

    status, stop, is_refused = "FAILED", threading.Event(), False

    def ask() -> None:
        stop.set()
        threading.Thread(target=storage.put, args=(storage.join(run.uri, "STOP"), b"stop"), daemon=True).start()

    try:
        with _heard(path, begin, hear), stop_on_signals(ask, tell):
            _run_workers(experiment, run, str(path), code_dirs, stop, until)
        if not results:
            raise ScalecvError(f"the workers ended without a result; what they said is in {path}")
        if results[-1]["status"] == "interrupted":
            raise Interrupted(f"stopped as asked, state saved in {run.uri}: the same command goes on")
        status = "FINISHED"
    except UserError:  # before the first step: a mistake, which leaves nothing behind
        is_refused = not (run.goes_on or senders)
        raise
    except Interrupted:
        status = "KILLED"
        raise
    except KeyboardInterrupt:
        status = "KILLED"
        raise Interrupted(f"stopped at once; the same command goes on from the last checkpoint in {run.uri}") from None
    finally:
        if is_refused:
            runs.withdraw(run)
        else:
            spool.append(path, {"kind": "end", "status": status})
            sender = start_sending()
            has_time = status == "FINISHED" or (until is not None and not stop.is_set())
            all_sent = sender.close(timeout_s=patience_s if has_time else min(5, patience_s))
            with contextlib.suppress(OSError):  # nobody looks any more
                tell({"kind": "recorded", "run_id": sender.run_id})
                if not all_sent and status != "FAILED":
                    tell({"kind": "progress", "message": sender.waiting()})
    result = Result(
        run_id=sender.run_id,
        name=experiment.name,
        run_uri=run.uri,
        tracking_uri=storage.without_secrets(uri),
        is_continued=run.goes_on,
        was_complete=False,
        **{key: results[-1][key] for key in RESULT_KEYS},
    )
    storage.put(storage.join(run.uri, "result.json"), json.dumps(asdict(result), indent=1).encode())
    return result


def _complete(experiment: Experiment, run: runs.Run, uri: str, patience_s: float) -> Result:
    """The result of a run that has ended; what MLflow missed of it is sent now."""
    sender = _sender(experiment, run, uri)
    sender.close(patience_s)
    told = {**(run.result or {}), "is_continued": True, "was_complete": True}
    return Result(**{**told, "run_id": sender.run_id or told["run_id"]})


def _sender(experiment: Experiment, run: runs.Run, uri: str, tags: Mapping[str, str] | None = None) -> tracking.Sender:
    """Begin to pass on what the run's spool holds."""
    folder = runs.local_folder(run)
    where = (folder / "spool.jsonl", folder / "spool.sent.json", uri, experiment.track.experiment, experiment.name)
    return tracking.Sender(*where, run.key, {**_tags(experiment), **(tags or {})})


RESULT_KEYS = (
    "status",
    "metrics",
    "weights_hash",
    "order_hash",
    "bundle",
    "images_per_s",
    "data_wait_share",
    "epochs",
    "best_epoch",
)


def _introduce(experiment: Experiment, run: runs.Run, path: Path) -> None:
    """What the record of a run begins with."""
    manifest = run.dataset.manifest
    tree = experiment.model_dump(mode="json", exclude={"search"})
    flat = {key: value for key, value in flatten(tree).items() if value not in ({}, None)}
    spool.append(path, {"kind": "params", "params": flat})
    spool.append(path, {"kind": "text", "file": "experiment.yaml", "text": dump(experiment)})
    diff = tracking.working_diff()
    if diff:
        spool.append(path, {"kind": "text", "file": "code.diff", "text": diff})
    spool.append(
        path,
        {
            "kind": "dataset",
            "name": Path(experiment.data.uri).name,
            "uri": storage.without_secrets(run.dataset.uri),
            "version": run.dataset.version,
            "digest": manifest.fingerprint,
            "context": "train",
        },
    )


def _tags(experiment: Experiment) -> dict[str, str]:
    question = {"mlflow.note.content": experiment.question} if experiment.question else {}
    return {"scalecv.task": experiment.task, **question, **tracking.run_facts()}


def _run_workers(
    experiment: Experiment,
    run: runs.Run,
    path: str,
    code_dirs: tuple[str, ...],
    stop: threading.Event,
    until: Pause | None,
) -> None:
    from scalecv import runtime

    reader = experiment.data.reader
    if reader == "auto" and experiment.scale.workers == 0:
        reader = "threads"
    storage.delete([storage.join(run.uri, "STOP")])
    manifest = run.dataset.manifest
    check_names(experiment)
    if experiment.scale.workers == 0:
        check_network(experiment, manifest)
        if reader == "ray" or experiment.data.decode == "cluster":
            runtime.connect(code_dirs=code_dirs)
        _run_here(Job(experiment, run.dataset.version, run.uri, reader, run.weights, until=until), path, stop)
        return
    scale, allowed = experiment.scale, sizes(experiment)
    rows = min(manifest.splits["train"], experiment.data.limit or manifest.splits["train"])
    steps = math.ceil(rows / experiment.train.batch)
    message = f"{rows:,} rows, about {steps:,} steps in an epoch; Ray and {scale.workers} workers start"
    spool.append(path, {"kind": "progress", "message": message})
    with runtime.without_collector():
        runtime.connect(code_dirs=code_dirs)
        cpus, gpus = runtime.resources()
        use_gpu = scale.gpu == "yes" or (scale.gpu == "auto" and gpus >= allowed[-1])
        most = min(cpus // scale.cpus_per_worker, gpus if use_gpu else cpus)
        workers = next((size for size in allowed if size <= most), allowed[-1])
        runtime.check_fits(workers, scale.cpus_per_worker, use_gpu)
        from scalecv.train import ray_workers

    if workers < scale.workers:
        message = f"the cluster has room for {workers} of scale.workers={scale.workers}: begins with these"
        spool.append(path, {"kind": "progress", "message": message})
    with ray_workers.start_workers(workers, scale, use_gpu=use_gpu, code_dirs=code_dirs) as early:
        with runtime.without_collector():
            from scalecv.train import ray_run
            from scalecv.train.network import check_builds

            check_network(experiment, manifest)
            check_builds(experiment, manifest)
        runs.check_shared(run.uri, runtime.nodes())
        job = Job(experiment, run.dataset.version, run.uri, reader, run.weights, until=until)
        ray_run.run(job, allowed, path, early, use_gpu=use_gpu, code_dirs=code_dirs)


def _run_here(job: Job, path: str, stop: threading.Event) -> None:
    import torch

    from scalecv.train.job import Place
    from scalecv.train.watchdog import leave
    from scalecv.train.worker import work

    wants = job.experiment.scale.gpu
    device = "cuda" if wants != "no" and torch.cuda.is_available() else "cpu"

    def report(events: list[Event]) -> None:
        for event in events:
            spool.append(path, event)

    def end(message: str) -> None:
        spool.append(path, {"kind": "end", "status": "FAILED"})
        leave(message)

    work(job, Place(device=device), report, stop=stop, end=end)


@contextlib.contextmanager
def _heard(path: Path, begin: int, hear: Callable[[Event], None]) -> Iterator[None]:
    """Pass on what is written to the spool, as it comes."""
    tail, ended = spool.Tail(path, begin), threading.Event()

    def pass_on() -> None:
        while events := tail.new():
            for event in events:
                with contextlib.suppress(OSError):  # nobody looks any more, the run goes on
                    hear(event)

    def listen() -> None:
        while not ended.wait(0.2):
            pass_on()

    thread = threading.Thread(target=listen, name="display", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        pass_on()


def recorded_weights(weights: str, uri: str) -> str | None:
    """Where the bundle lies that runs:/ID or models:/NAME@ALIAS stands for now; None for any other word.

    Raises: UserError: no such run or model, or one without a bundle.
    """
    return storage.absolute(tracking.lookup(weights, uri)) if tracking.is_reference(weights) else None


def same_everywhere(experiment: Experiment) -> Experiment:
    """The experiment as a worker in another folder understands it.

    Local paths are made absolute, and runs:/ID of upscale.model becomes the bundle that it stands for.
    """
    data = experiment.data.model_copy(update={"uri": storage.absolute(experiment.data.uri)})
    track = experiment.track.model_copy(update={"storage": storage.absolute(experiment.track.storage)})
    weights = experiment.model.weights
    if weights and weights != "imagenet" and "://" not in weights and not tracking.is_reference(weights):
        weights = os.path.abspath(weights)  # also where it is gone: a run that goes on does not need it
    model = experiment.model.model_copy(update={"weights": weights})
    upscale = experiment.upscale
    if upscale.model:
        place = tracking.lookup(upscale.model, experiment.track.uri)
        upscale = upscale.model_copy(update={"model": storage.absolute(place)})
    cache = experiment.cache
    if cache.dir:
        cache = cache.model_copy(update={"dir": os.path.abspath(os.path.expanduser(cache.dir))})
    return experiment.model_copy(
        update={"data": data, "track": track, "model": model, "upscale": upscale, "cache": cache}
    )
