"""Verbs around experiments: doctor, chaos, ui, sync, submit."""

import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from scalecv.cli.output import Json, json_stream, print_json


def doctor(
    what: Annotated[
        list[str] | None,
        typer.Argument(metavar="[URI]... | EXPERIMENT [KEY=VALUE]...", help="Places to try, or an experiment file."),
    ] = None,
    attempt: Annotated[str | None, typer.Option("--try", help="KEY=VALUE to try, instead of what fits best.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Seconds of training for the change that is tried.")] = 60.0,
    as_json: Json = False,
) -> None:
    """Say what is broken or slow, and what to do.

    Without an experiment: Ray, token, storage, disk, MLflow and GPU, one line each. With one: what takes its time, and
    a change that was tried against it in turns with the experiment as it is.
    """
    if what and what[0].endswith((".yaml", ".yml")):
        _why_slow(what[0], what[1:], attempt, seconds, as_json=as_json)
        return
    from scalecv.doctor import checks

    found = checks(what or [])
    if as_json:
        print_json({"ok": all(c.ok is not False for c in found), "checks": [asdict(c) for c in found]})
    else:
        marks = {True: "ok  ", False: "BAD ", None: "note"}
        for check in found:
            sys.stdout.write(
                f"{marks[check.ok]}  {check.name:10} {check.found}{'  -> ' + check.do if check.do else ''}\n"
            )
    if any(check.ok is False for check in found):
        raise typer.Exit(1)


def _why_slow(path: str, pairs: list[str], attempt: str | None, seconds: float, *, as_json: bool) -> None:
    from scalecv import config

    given, tried = config.parse_overrides(pairs), config.parse_overrides([attempt]) if attempt else None
    config.load(path, {**given, **(tried or {})})  # what is wrong with it is told before torch is imported
    from scalecv.speed.advice import advise

    speeds, advice = advise(path, given, attempt=tried, seconds=seconds, tell=tell_line)
    if as_json:
        told = {**asdict(advice), "helps": advice.helps} if advice else None
        print_json({**asdict(speeds), "advice": told})
        return
    for line in [*speeds.lines(), advice.line() if advice else "nothing to try: no change is known that fits"]:
        sys.stdout.write(line + "\n")


def chaos(
    experiment: Annotated[str, typer.Argument(metavar="EXPERIMENT", help="Experiment file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys to set.")] = None,
    faults: Annotated[
        str, typer.Option(help="Some of worker,node,driver,store,disk,tracker.")
    ] = "worker,node,driver,store,disk,tracker",
    seed: Annotated[int, typer.Option(help="Seed of the steps at which faults come.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each fault is tried.")] = 1,
    to: Annotated[str | None, typer.Option(help="New folder for runs and logs; a temporary one by default.")] = None,
    as_json: Json = False,
) -> None:
    """Prove that a recipe survives faults: run it in peace, then with each fault, and compare.

    The run is shortened to 3 epochs unless train.epochs is set.
    """
    from scalecv import config
    from scalecv.chaos.run import chaos as run

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended on the way out
    given = config.parse_overrides(overrides or [])
    resolved = config.load(experiment, given)
    folder = Path(to or tempfile.mkdtemp(prefix="scalecv-chaos-"))
    report = run(
        [str(Path(experiment).resolve()), *(overrides or [])],
        resolved,
        list(given),
        faults=[name.strip() for name in faults.split(",") if name.strip()],
        folder=folder,
        seed=seed,
        rounds=rounds,
        tell=tell_line,
    )
    if as_json:
        print_json({**asdict(report), "passed": report.passed, "share_done_once": report.share_done_once})
    else:
        for line in report.lines():
            tell_line(line)
    if not report.passed:
        raise typer.Exit(1)


def tell_line(line: str) -> None:
    """A line of progress on stderr."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def sync(
    folder: Annotated[str, typer.Argument(help="Where runs lie (track.storage).")] = "runs",
    uri: Annotated[str | None, typer.Option(help="MLflow store; the one of each run by default.")] = None,
    as_json: Json = False,
) -> None:
    """Send what waits in the spools of runs to MLflow."""
    from scalecv.artifacts.tracking import sync as run
    from scalecv.train.runs import cache_folder

    done, waiting = (a + b for a, b in zip(run(folder, uri=uri), run(cache_folder(), uri=uri), strict=True))
    if as_json:
        print_json({"sent": done, "waiting": waiting})
    else:
        sys.stderr.write(f"{done} runs are recorded, {waiting} still wait for MLflow\n")
    if waiting:
        raise typer.Exit(1)


def ui(
    uri: Annotated[
        str | None, typer.Option(help="MLflow store; MLFLOW_TRACKING_URI or ./mlruns.db by default.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 5000,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen on another address without a login.")] = False,
) -> None:
    """Open the MLflow UI on the store in use, on this machine only."""
    from scalecv.ui import serve_ui

    raise typer.Exit(serve_ui(uri, host, port, insecure=insecure))


def submit(
    context: typer.Context,
    verb: Annotated[str, typer.Argument(help="The verb to run there, with its arguments.")],
    address: Annotated[
        str | None, typer.Option(help="Job server, http://HOST:8265; RAY_API_SERVER_ADDRESS by default.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Stream the lines and wait for the end.")] = True,
    env: Annotated[list[str] | None, typer.Option(help="Name of a variable to hand on.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Accept a remote cluster without a token.")] = False,
) -> None:
    """Run the same command as a job of a Ray cluster."""
    from scalecv.submit import submit as run

    raise typer.Exit(
        run([verb, *context.args], address, follow=follow, env=env or [], insecure=insecure, out=json_stream())
    )
