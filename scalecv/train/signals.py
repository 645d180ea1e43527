"""Ctrl-C and SIGTERM while something long runs: the first asks it to save and stop, the second leaves at once."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from scalecv.artifacts.spool import Event


@contextlib.contextmanager
def stop_on_signals(ask: Callable[[], None], tell: Callable[[Event], None]) -> Iterator[None]:
    """Call `ask` at the first signal, and raise KeyboardInterrupt at the second; nothing where this is no main thread.

    Args:
        ask: must not block.
        tell: told what the first signal does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []

    def handle(number: int, frame: object) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt
        ask()
        tell({"kind": "progress", "message": "stopping: the state is saved first; once more leaves at once"})

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def in_thread(call: Callable[[], object], name: str) -> None:
    """Call from a thread of its own, so that the main thread is free to run the handlers of signals."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)  # a bounded wait lets the main thread run signal handlers
    if failed:
        raise failed[0]
