"""Checkpoints written beside training: the state is copied between two steps, a thread does the rest."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch


class Writer:
    """Does one piece of work at a time in a thread; an error of it is raised at the next question."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin with it; the one before must be done."""
        self.thread = threading.Thread(target=self._do, args=(work,), name="checkpoint", daemon=True)
        self.thread.start()

    def is_done(self, wait_s: float = 0.0) -> bool:
        """Whether nothing is under way, after waiting for at most so many seconds.

        Raises: what the work raised.
        """
        if self.thread is not None:
            self.thread.join(wait_s)
            if self.thread.is_alive():
                return False
            self.thread = None
        if self.error is not None:
            raise self.error
        return True

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.error = error


def on_host(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of a nested state whose tensors are on the host and nobody else's."""
    return {key: _copied(value) for key, value in state.items()}


def as_optimizer(state: dict[str, Any]) -> torch.optim.Optimizer:
    """What looks like an optimiser in a copied state."""
    return cast(torch.optim.Optimizer, SimpleNamespace(state_dict=lambda: state))


def first_non_finite(state: dict[str, Any]) -> str | None:
    """The name of a tensor that holds NaN or infinity."""
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            return name
    return None


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return on_host(value)
    return value
