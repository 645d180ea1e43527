"""The segments that run now, and the device-seconds that they hold."""

import threading
import time

from scalecv.search.trials import Trial


class UnderWay:
    """Segments by Tune's name of them. One that still waits for a machine holds no device."""

    def __init__(self, devices: int) -> None:
        """Args: devices: that each segment holds."""
        self.devices = devices
        self._lock = threading.Lock()
        self._trials: dict[str, Trial] = {}
        self._began: dict[str, float] = {}
        self._died: set[str] = set()

    def begin(self, name: str, trial: Trial) -> None:
        """A segment was given to Tune; one that goes on is there in an instant."""
        with self._lock:
            self._trials[name] = trial
            if trial.points:
                self._began[name] = time.monotonic()

    def is_seen(self, name: str) -> None:
        """A segment's process is known to run."""
        with self._lock:
            if name in self._trials:
                self._began.setdefault(name, time.monotonic())

    def died(self, name: str) -> None:
        """A segment's process died, and another one goes on: what that one tells is not all that was held."""
        with self._lock:
            self._died.add(name)

    def end(self, name: str, told_s: float | None) -> tuple[Trial | None, float]:
        """The trial of a segment that ended, None if it is not known, and the device-seconds that it held.

        Args: told_s: device-seconds that its last process tells of; None if it told nothing.
        """
        with self._lock:
            began = self._began.pop(name, None)
            held_s = 0.0 if began is None else (time.monotonic() - began) * self.devices
            if told_s is not None:
                held_s = max(held_s, told_s) if name in self._died else told_s
            self._died.discard(name)
            return self._trials.pop(name, None), held_s

    @property
    def held_s(self) -> float:
        """Device-seconds that all of them hold until now."""
        with self._lock:
            now = time.monotonic()
            return sum((now - began) * self.devices for began in self._began.values())

    @property
    def trials(self) -> list[Trial]:
        """Their trials."""
        with self._lock:
            return list(self._trials.values())

    @property
    def waiting(self) -> dict[str, Trial]:
        """Those whose process is not known to run."""
        with self._lock:
            return {name: trial for name, trial in self._trials.items() if name not in self._began}

    def __bool__(self) -> bool:
        return bool(self._trials)
