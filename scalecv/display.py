"""What a person sees while work goes on: one live line on a terminal, plain lines elsewhere; all on stderr."""

import sys
import time
from typing import Any

PLAIN_EVERY_S = 30.0


class Display:
    """Shows the events of a run: a line for each epoch, a moving one within it."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.live = sys.stderr.isatty()
        self.said_at = 0.0
        self.has_live_line = False

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event."""
        if self.quiet or event.get("kind") != "progress":
            return
        if "message" in event:
            self.line(event["message"])
        elif "done" in event:
            self.moving(f"{event['done']:,} of {event['total']:,}")
        elif event.get("is_epoch_end"):
            self.line(_epoch(event))
        elif "step" in event:
            self.moving(_step(event))

    def moving(self, text: str) -> None:
        """A line that the next one takes the place of; on a file, one of them now and then."""
        if self.live and not self.quiet:
            sys.stderr.write("\r\x1b[2K" + text)
            sys.stderr.flush()
            self.has_live_line = True
        elif time.monotonic() - self.said_at > PLAIN_EVERY_S:
            self.line(text)

    def line(self, text: str) -> None:
        """One line that stays."""
        if self.quiet:
            return
        if self.has_live_line:
            sys.stderr.write("\r\x1b[2K")
            self.has_live_line = False
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
        self.said_at = time.monotonic()


class IngestDisplay(Display):
    """Shows how far an ingest is."""

    def __call__(self, progress: Any) -> None:
        """Show one `shards.ingest.Progress`."""
        if progress.phase == "listing":
            self.moving(f"listing  {progress.rows:,} images")
            return
        share = progress.rows / max(1, progress.total)
        bar = "█" * round(20 * share) + "░" * (20 - round(20 * share))
        left = "" if progress.left_s is None else f"  left {duration(progress.left_s)}"
        aside = f"  {progress.quarantined} set aside" if progress.quarantined else ""
        speed = f"{progress.images_per_s:,.0f} images/s"
        self.moving(f"{progress.phase}  {bar}  {progress.rows:,}/{progress.total:,}  {speed}{left}{aside}")


def _step(event: dict[str, Any]) -> str:
    told = event["metrics"]
    speed, share = told["system/images_per_s"], told["system/data_wait_share"]
    return (
        f"epoch {event['epoch']}/{event['epochs']}  step {event['step']}/{event['steps']}  "
        f"loss {told['train/batch_loss']:.4f}  {speed:,.0f} images/s  data wait {share:.0%}  "
        f"left {duration(event['left_s'])}"
    )


def _epoch(event: dict[str, Any]) -> str:
    told = event["metrics"]
    # Where most pixels are background, accuracy is high for a model that sees nothing: IoU says more.
    names = ("val/iou", "val/f1", "val/average_precision") if "val/iou" in told else ("val/accuracy", "val/f1")
    scores = [f"{name} {told[name]:.4f}" for name in (*names, "val/macro_accuracy", "val/loss") if name in told]
    if told.get("val/is_trivial"):
        scores.append("says background everywhere, or nothing better")
    return "  ".join(
        [
            f"epoch {event['epoch']}/{event['epochs']}",
            f"loss {told['train/loss']:.4f}",
            *scores,
            f"{told['system/epoch_images_per_s']:,.0f} images/s",
            f"data wait {told['system/epoch_data_wait_share']:.0%}",
            *([f"left {duration(event['left_s'])}"] if event["left_s"] > 0 else []),
        ]
    )


def duration(seconds: float) -> str:
    """Seconds as 0:42, 12:07 or 3:04:05."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
