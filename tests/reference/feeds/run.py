"""Start a row's process, watch its memory, and give what it told; and the store that rows read from."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.reference.feeds.processes import Peak, end_below
from tests.reference.feeds.row import FIRST
from tests.reference.feeds.work import Store, Work

ROOT = Path(__file__).parents[3]
BUSY_EVERY_S = 1.0
"""Looking at memory takes CPU time: less often in the epoch whose speed counts."""


def run(name: str, work: Work, rate: float | None = None) -> dict[str, Any]:
    """{"epochs": what row.py told, "peak_mb": largest PSS of the tree from the first batch on}.

    {"error": its last words} if it failed.
    """
    command = [sys.executable, "-m", "tests.reference.feeds.row", name, json.dumps(work.as_dict() | {"rate": rate})]
    epochs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="feeds-") as folder, tempfile.TemporaryFile("w+") as log:
        env = os.environ | {"RAY_ADDRESS": "", "OPENCV_LOG_LEVEL": "ERROR", "TMPDIR": folder}
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True, env=env)
        assert child.stdout
        try:
            with Peak(child.pid) as peak:
                for line in child.stdout:
                    if line.startswith(FIRST):
                        peak.begin()
                    if line.startswith('{"epoch"'):
                        epochs.append(json.loads(line))
                        peak.every_s = BUSY_EVERY_S
                child.wait()
        finally:
            end_below(child.pid)
            child.kill()
        if child.returncode or len(epochs) < 2:
            log.seek(0)
            return {"error": f"exit {child.returncode}: {log.read()[-2000:]}"}
    return {"epochs": epochs, "peak_mb": round(peak.mb)}


@dataclass(frozen=True)
class Stores:
    """One bucket, by two ways."""

    direct: Store
    delayed: Store


def remote(stack: ExitStack, latency_s: float) -> tuple[Stores, Callable[[], int]]:
    """A SeaweedFS with an empty bucket and a proxy that delays each request, and how many requests it has passed on."""
    from scalecv.testing.servers import S3Server

    server = S3Server(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="feeds-s3-"))))
    server.start()
    stack.callback(server.kill)
    direct = Store(server.endpoint, server.key, server.secret, server.bucket().removeprefix("s3://"))
    faults = json.dumps({"latency_s": latency_s})
    command = [sys.executable, "-m", "scalecv.testing.store_proxy", "--upstream", direct.endpoint, "--faults", faults]
    proxy = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stack.callback(proxy.wait)
    stack.callback(proxy.terminate)
    assert proxy.stdin and proxy.stdout
    endpoint = json.loads(proxy.stdout.readline())["endpoint"]

    def requests() -> int:
        assert proxy.stdin and proxy.stdout
        proxy.stdin.write(faults + "\n")
        proxy.stdin.flush()
        return int(json.loads(proxy.stdout.readline()).get("requests", 0))

    return Stores(direct, replace(direct, endpoint=endpoint)), requests
