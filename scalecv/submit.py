"""`scalecv submit VERB …`: the same command as a Ray job, with its files, environment and token handled."""

import asyncio
import contextlib
import json
import logging
import os
import secrets
import shlex
import signal
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

from scalecv import redact, runtime, staging
from scalecv.errors import ScalecvError, UserError
from scalecv.loopback import is_loopback

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
NOT_AS_A_JOB = ("submit", "ui")
ANSWER_S = 10.0
NODES_S = 60.0
"""Seconds for which a cluster that has just started may not know its nodes."""
INTERRUPTED = 75
PATIENT_INTERRUPTS = 3


def submit(
    argv: list[str],
    address: str | None = None,
    *,
    follow: bool = True,
    env: Iterable[str] = (),
    insecure: bool = False,
    out: TextIO | None = None,
) -> int:
    """Run `scalecv ARGV` on a cluster; lines go to stderr, the JSON object of `--json` to `out`.

    Args:
        argv: verb and arguments.
        address: job server, http://HOST:8265; None takes RAY_API_SERVER_ADDRESS, else this machine's.
        follow: stream the lines and wait for the end; else return when the job is accepted.
        env: names of further variables to hand on; those who have the token can read them.
        insecure: accept a cluster elsewhere without token authentication.
        out: where the JSON object goes; None takes stdout.
    Returns: the exit code of the command, 75 where it was stopped, 0 without `follow`.
    Raises: UserError: nothing was sent, and why. ScalecvError: the cluster went away.
    """
    if not argv or argv[0] in NOT_AS_A_JOB:
        raise UserError(f"'{' '.join(argv[:1])}' does not run as a job; expected a verb such as train")
    server = _server(address)
    token = _checked_token(server, insecure)
    names = list(env)
    _say_what_is_seen(names)
    with tempfile.TemporaryDirectory(prefix="scalecv-job-") as folder:
        here = _is_this_machine(server, token)
        staged = staging.stage(argv, names, Path(folder), same_machine=here)
        _say(f"sends {len(staged.files)} files, {staged.size_bytes / 1e3:.1f} kB, to {server}")
        client = _client(server, token)
        job = client.submit_job(
            entrypoint=_entrypoint(staged.argv, here),
            submission_id=f"scalecv-{argv[0]}-{secrets.token_hex(5)}",
            runtime_env={
                "working_dir": folder,
                "py_modules": [str(Path(__file__).parent)],
                "excludes": ["__pycache__"],
                "env_vars": staged.env,
            },
            metadata={"command": redact.clean(shlex.join(["scalecv", *argv]))[:1000]},
        )
    _say(f"job {job}")
    if not follow:
        _say(_how_to(job, server))
        return 0
    return _follow(client, job, server, out or sys.stdout, wants_json="--json" in argv)


def _server(address: str | None) -> str:
    given = address or os.environ.get("RAY_API_SERVER_ADDRESS") or ""
    if not given and os.environ.get("RAY_ADDRESS", "").startswith("http"):
        given = os.environ["RAY_ADDRESS"]
    given = (given or DEFAULT_ADDRESS).rstrip("/")
    parts = urlsplit(given)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise UserError(f"'{redact.clean(given)}' is not the address of a job server; expected http://HOST:8265")
    return given


def _checked_token(server: str, insecure: bool) -> str | None:
    """The token that the server wants, None where it wants none; it is sent to no server that did not ask.

    Raises: UserError: no answer, token missing or wrong, another version, or an open server elsewhere.
    """
    code, answer = _get(server, "/api/version", None)
    token = None
    if code in (401, 403):
        token = runtime.auth_token()
        if token is None:
            raise UserError(
                f"{server} wants a token and none is set: put the cluster's token into RAY_AUTH_TOKEN, "
                "its file's path into RAY_AUTH_TOKEN_PATH, or the file at ~/.ray/auth_token"
            )
        if urlsplit(server).scheme == "http" and not is_loopback(urlsplit(server).hostname):
            _say("note: the token crosses the network unencrypted; use https, or a tunnel to port 8265")
        code, answer = _get(server, "/api/version", token)
        if code in (401, 403):
            raise UserError(f"{server} did not accept the token: compare RAY_AUTH_TOKEN with the cluster's")
    elif code == 200 and not insecure:
        _check_not_open(server)
    theirs = answer.get("ray_version") if isinstance(answer, dict) else None
    if code != 200 or not theirs:
        raise UserError(f"{server} answers {code}, but not as a Ray job server does: expected http://HOST:8265")
    from importlib.metadata import version

    if str(theirs).split(".")[:2] != version("ray").split(".")[:2]:
        raise UserError(f"{server} runs Ray {theirs}, this environment has {version('ray')}: install the same version")
    return token


def _check_not_open(server: str) -> None:
    """Raises: UserError: a server without a token that others reach, too."""
    if not is_loopback(urlsplit(server).hostname):
        raise UserError(
            f"{server} runs jobs of anyone who reaches it: start the cluster with RAY_AUTH_MODE=token "
            "(cluster/README.md), or say --insecure"
        )


def _get(server: str, path: str, token: str | None) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(server + path, headers=headers)  # noqa: S310 - http(s), see _server
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:  # noqa: S310
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, None
    except ValueError:
        return 200, None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"no job server answers at {server} ({getattr(reason, 'strerror', None) or reason}): start one with "
            "`ray start --head`, or name it with --address http://HOST:8265"
        ) from None


def _is_this_machine(server: str, token: str | None) -> bool:
    """Whether all nodes are this machine; a loopback address may also be a tunnel to elsewhere."""
    if not is_loopback(urlsplit(server).hostname):
        return False
    ends = time.monotonic() + NODES_S
    while True:
        _, answer = _get(server, "/nodes?view=summary", token)
        nodes = ((answer or {}).get("data") or {}).get("summary") or []
        addresses = [node.get("ip") for node in nodes]
        if addresses and all(addresses):
            return all(staging.is_own_ip(ip) for ip in addresses)
        if time.monotonic() > ends:  # a cluster that has just started does not know its nodes yet
            return False
        time.sleep(0.5)


def _entrypoint(argv: tuple[str, ...], same_machine: bool) -> str:
    # On this machine the nodes may have been started by full path, with no `python` of ours in PATH.
    return shlex.join([sys.executable if same_machine else "python", "-m", "scalecv", *argv])


def _client(server: str, token: str | None) -> Any:
    if token:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.job_submission import JobSubmissionClient

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    client = JobSubmissionClient(server, headers=headers)
    logging.getLogger("ray").setLevel(logging.WARNING)  # the client's constructor sets it to INFO
    return client


def _follow(client: Any, job: str, server: str, out: TextIO, *, wants_json: bool) -> int:
    """Stream the lines until the job ends; the first Ctrl-C tells how to leave, the second leaves."""
    lines = _Lines(wants_json)
    with _counted_interrupts() as interrupts:
        info = _until_end(client, job, lines, lambda: len(interrupts) > 0)
        if info is None:
            _say(f"the job goes on; Ctrl-C once more leaves it running. {_how_to(job, server)}")
            info = _until_end(client, job, lines, lambda: len(interrupts) > 1)
        if info is None:
            _say(f"left; the job goes on. {_how_to(job, server)}")
            return INTERRUPTED
    if lines.result is not None:
        out.write(redact.clean(lines.result) + "\n")
        out.flush()
    return _exit_code(info)


@contextlib.contextmanager
def _counted_interrupts() -> Iterator[list[int]]:
    """Ctrl-C is written down: as an exception it gets lost where a library is busy closing a connection."""
    heard: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield heard
        return

    def hear(number: int, _: object) -> None:
        heard.append(number)
        if len(heard) > PATIENT_INTERRUPTS:  # something waits for a server that does not answer
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, hear)
    try:
        yield heard
    finally:
        signal.signal(signal.SIGINT, before)


def _until_end(client: Any, job: str, lines: "_Lines", interrupted: Callable[[], bool]) -> Any:
    """What is known of the job once it has ended; None as soon as somebody interrupts."""
    lost_s = 0.0
    while not interrupted():
        try:
            asyncio.run(_tail(client, job, lines, interrupted))
            info = client.get_job_info(job)
            if info.status.is_terminal():
                lines.take(client.get_job_logs(job))
                return info
            lost_s = 0.0
        except (RuntimeError, OSError) as error:  # requests' and aiohttp's are OSErrors
            lost_s += 2.0
            if lost_s > 120:
                raise ScalecvError(f"the job server does not answer any more ({error}); job {job} may go on") from None
            time.sleep(1)
        if not interrupted():
            time.sleep(1)
    return None


async def _tail(client: Any, job: str, lines: "_Lines", interrupted: Callable[[], bool]) -> None:
    """Pass on the log from its beginning until it ends or somebody interrupts; what was shown before is passed over."""

    async def read() -> None:
        whole = ""
        async for chunk in client.tail_job_logs(job):
            whole += chunk
            lines.take(whole)

    reading = asyncio.ensure_future(read())
    while not reading.done() and not interrupted():
        await asyncio.wait([reading], timeout=0.2)
    if reading.done():
        reading.result()
    reading.cancel()


class _Lines:
    """Shows each line of a growing log once; keeps the last JSON object back for stdout."""

    def __init__(self, wants_json: bool) -> None:
        self.wants_json = wants_json
        self.result: str | None = None
        self.shown = 0

    def take(self, whole: str) -> None:
        """Show what is new in the log; a line without its end is left for the next call."""
        end = whole.rfind("\n") + 1
        if end <= self.shown:
            return
        for line in whole[self.shown : end].splitlines():
            if self.wants_json and line.startswith("{") and _is_object(line):
                self.result = line
            else:
                sys.stderr.write(redact.clean(line) + "\n")
        sys.stderr.flush()
        self.shown = end


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _exit_code(info: Any) -> int:
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "STOPPED":
        _say("the job was stopped; the same command goes on from its last checkpoint")
        return INTERRUPTED
    code = info.driver_exit_code
    if code is None or not 0 < code < 126:
        _say(f"the job failed: {(info.message or '').strip()}")
        return 1
    return int(code)


def _say_what_is_seen(names: list[str]) -> None:
    secret = [name for name in names if redact.is_secret_name(name)]
    if secret:
        _say(f"note: {', '.join(secret)} can be read through the job API by all who have the cluster's token")


def _how_to(job: str, server: str) -> str:
    at = f"--address {server} {job}"
    return f"Follow it: ray job logs --follow {at}    Stop it: ray job stop {at}"


def _say(text: str) -> None:
    sys.stderr.write(redact.clean(text) + "\n")
    sys.stderr.flush()
