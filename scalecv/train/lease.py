"""One owner of a run's name at a time: a small object that its owner renews, and that others watch.

No clock is compared with another machine's. Whoever wants a name that a process elsewhere holds looks at the lease
for LEASE_S of its own time: one renewal in that time means that the owner lives. An owner that finds somebody
else's lease in the place of its own was thought dead (it slept, or could not reach the storage): it stops at once.
"""

import contextlib
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scalecv import storage
from scalecv.errors import ScalecvError, UserError

LEASE_S = 60.0
RENEW_S = 15.0
LOOK_S = 2.0
WAKE = signal.SIGUSR2
"""What interrupts the main thread when the lease is lost."""


class LeaseLost(KeyboardInterrupt):
    """Somebody else owns the name now. Not an `Exception`, so that nothing on the way takes it for a worker's error."""


class Lease:
    """A name that is held."""

    def __init__(self, uri: str, nonce: str, name: str) -> None:
        self.uri = uri
        self.nonce = nonce
        self.name = name
        self.lost_to: str | None = None
        """Who owns the name now; None while it is ours."""

    def check(self) -> None:
        """Raises: ScalecvError: somebody else owns the name now."""
        if self.lost_to is not None:
            raise ScalecvError(
                f"name={self.name} was taken over by {self.lost_to} ({storage.without_secrets(self.uri)}), because "
                f"this command did not renew its lease for {LEASE_S:.0f} s: it stops, and the other one goes on"
            )

    def renew(self) -> None:
        """Say that the owner lives; notice when the lease is another's."""
        for _ in range(3):
            entry = storage.head(self.uri)
            held = _read(self.uri)
            if entry is None and held is None:
                if storage.put_if_absent(self.uri, _ticket(self.nonce)):  # somebody tidied up
                    return
            elif held is not None and held.get("nonce") != self.nonce:
                self.lost_to = _who(held)
                return
            elif entry is not None and storage.put_if_match(self.uri, _ticket(self.nonce), entry.etag):
                return


@contextlib.contextmanager
def hold(uri: str, name: str, say: Callable[[str], None] = lambda _: None) -> Iterator[Lease]:
    """Hold a name while training; a second live run of one name is refused.

    A lease whose process is gone from this machine is taken over at once, one of another machine after LEASE_S
    without renewal. When it is lost, the main thread is interrupted.

    Args:
        uri: place of the lease.
        name: the run's name, for messages.
        say: told that one has to wait, and why.

    Raises: UserError: somebody else holds it. ScalecvError: it was lost while this command ran.
    """
    held = Lease(uri, uuid.uuid4().hex, name)
    _claim(held, say)
    ended = threading.Event()
    main = threading.main_thread()
    can_wake = threading.current_thread() is main

    def keep() -> None:
        while not ended.wait(RENEW_S):
            with contextlib.suppress(Exception):  # storage away: tried again, and noticed when it is back
                held.renew()
            if held.lost_to is not None:
                if can_wake and not ended.is_set():
                    signal.pthread_kill(main.ident or 0, WAKE)
                return

    def interrupt(_signal: int, _frame: object) -> None:
        if not ended.is_set():
            raise LeaseLost

    before = signal.signal(WAKE, interrupt) if can_wake else None
    thread = threading.Thread(target=keep, name="lease", daemon=True)
    thread.start()
    try:
        yield held
    except BaseException:
        held.check()  # the clear reason in the place of the interruption
        raise
    else:
        held.check()
    finally:
        ended.set()
        thread.join()
        if can_wake:
            signal.signal(WAKE, before or signal.SIG_DFL)
        with contextlib.suppress(Exception):
            if (_read(uri) or {}).get("nonce") == held.nonce:
                storage.delete([uri])


def _claim(lease: Lease, say: Callable[[str], None]) -> None:
    """Take the lease, or wait until it is known whether its owner lives.

    Raises: UserError: the owner lives.
    """
    uri, ends, first = lease.uri, 0.0, None
    while True:
        if storage.put_if_absent(uri, _ticket(lease.nonce)):
            return
        entry, held = storage.head(uri), _read(uri)
        if entry is None:
            continue  # given back between the two looks
        if held and held.get("host") == _host() and held.get("started"):
            is_dead = _started(held.get("pid")) != held.get("started")
        elif first is None:
            is_dead, first, ends = False, entry.etag, time.monotonic() + LEASE_S
            say(f"name={lease.name} is held by {_who(held)}: looking for up to {LEASE_S:.0f} s whether it still runs")
        else:
            is_dead = entry.etag == first and time.monotonic() > ends
        if is_dead:
            if storage.put_if_match(uri, _ticket(lease.nonce), entry.etag):
                return
        elif first is None or entry.etag != first:
            raise UserError(
                f"name={lease.name} is being trained by {_who(held)} ({storage.without_secrets(uri)}): "
                "wait for it, or use another name"
            )
        else:
            time.sleep(min(LOOK_S, LEASE_S / 10))


def _read(uri: str) -> dict[str, Any] | None:
    """What a lease says; empty where it is damaged, None where there is none."""
    try:
        held = json.loads(storage.get(uri))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return held if isinstance(held, dict) else {}


def _who(held: dict[str, Any] | None) -> str:
    if not held:
        return "another process"
    return f"process {held.get('pid')} on {str(held.get('host')).partition('/')[0]}"


def _ticket(nonce: str) -> bytes:
    pid = os.getpid()
    told = {"nonce": nonce, "host": _host(), "pid": pid, "started": _started(pid), "renewal": uuid.uuid4().hex}
    return json.dumps(told).encode()


def _host() -> str:
    """This boot of this machine, and the process numbers that count here."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    number = boot.read_text().strip()[:8] if boot.exists() else ""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()}/{number}/{space}"


def _started(pid: object) -> str:
    """When a process started, in ticks since boot; empty if it is gone or that cannot be known."""
    if not isinstance(pid, int):
        return ""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
