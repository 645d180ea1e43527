"""What rank 0 reports to Ray Train, written to the run's spool."""

from typing import Any

from ray.train import UserCallback

from scalecv.artifacts import spool


class SpoolCallback(UserCallback):  # type: ignore[misc]  # ray is untyped here
    """Appends the events of each report to a spool.

    Ray runs it in the controller of the run, a process on the driver's node, so the spool is a local file of
    the driver. Rank 0 reports ``{"events": [...]}`` besides its metrics; the others' are not looked at.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Append rank 0's events in their order."""
        for event in (metrics[0] or {}).get("events", ()) if metrics else ():
            spool.append(self.path, event)
