"""`scalecv train` as a process that can be watched step by step, and killed at one of them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scalecv.artifacts import spool
from scalecv.testing.servers import end

Event = dict[str, Any]


@dataclass
class TrainProcess:
    """One start of a train command; what its run tells is read from the run's spool."""

    arguments: list[str]
    """What stands behind `scalecv train`."""
    environment: Mapping[str, str]
    """Set besides that of this process; an empty text removes a variable."""
    folder: Path
    """For its output and its cache."""
    spools: tuple[Path, str]
    """A folder, and the pattern of the spool of the run below it."""
    process: subprocess.Popen[bytes] | None = None
    events: list[Event] = field(default_factory=list)
    """All that the run has told since this start."""
    _offsets: dict[Path, int] = field(default_factory=dict)

    def start(self) -> "TrainProcess":
        """Start it, in a process group of its own."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._offsets = {path: path.stat().st_size for path in self._paths()}
        self.events = []
        env = {**os.environ, "XDG_CACHE_HOME": str(self.folder / "cache"), **self.environment}
        with (self.folder / "stdout").open("ab") as out, (self.folder / "stderr").open("ab") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "scalecv", "train", *self.arguments, "--json", "--quiet"],
                stdout=out,
                stderr=err,
                env={name: value for name, value in env.items() if value},
                start_new_session=True,
                cwd=self.folder,
            )
        return self

    def watch(self, timeout_s: float = 3600) -> Iterator[Event]:
        """Events as they come, until the process has ended.

        Raises: TimeoutError: it runs for longer than `timeout_s`; it is ended then.
        """
        ends = time.monotonic() + timeout_s
        while True:
            code = self.running.poll()
            yield from self._new()
            if code is not None:
                return
            if time.monotonic() > ends:
                self.kill()
                raise TimeoutError(f"scalecv train did not end within {timeout_s:.0f} s, see {self.folder / 'stderr'}")
            time.sleep(0.02)

    def wait(self, timeout_s: float = 3600) -> int:
        """Let it run to its end; its exit code."""
        for _ in self.watch(timeout_s):
            pass
        return self.code

    def until_step(self, step: int, timeout_s: float = 3600) -> bool:
        """Let it run until the record has this step; False where it ended before."""
        return any(updates_of(event) >= step for event in self.watch(timeout_s))

    def kill(self) -> None:
        """End the process of the command, and only that, without a word."""
        self.running.send_signal(signal.SIGKILL)
        self.running.wait(20)
        for _ in self._new():
            pass

    def stop(self) -> None:
        """End the command and all that it started; for when nobody waits for it any more."""
        end(self.process)

    @property
    def running(self) -> subprocess.Popen[bytes]:
        """The process."""
        if self.process is None:
            raise RuntimeError("not started")
        return self.process

    @property
    def code(self) -> int:
        """Exit code of a process that has ended."""
        return int(self.running.returncode)

    @property
    def pids(self) -> list[int]:
        """Processes of the workers of the last start of workers, by rank."""
        told = [event["pids"] for event in self.events if event["kind"] == "workers"]
        return list(told[-1]) if told else []

    def result(self) -> dict[str, Any]:
        """What the command printed last with --json."""
        lines = (self.folder / "stdout").read_text().splitlines()
        return dict(json.loads(lines[-1])) if lines else {}

    def said(self) -> str:
        """The last line of its messages."""
        lines = (self.folder / "stderr").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def _new(self) -> Iterator[Event]:
        for path in self._paths():
            events, self._offsets[path] = spool.read(path, self._offsets.get(path, 0))
            self.events += events
            yield from events

    def _paths(self) -> list[Path]:
        return sorted(self.spools[0].glob(self.spools[1]))


def updates_of(event: Event) -> int:
    """How many updates there were when an event of a training step was told; 0 for any other event."""
    is_step = event["kind"] == "metrics" and "train/batch_loss" in event["metrics"]
    return int(event["step"]) if is_step else 0
