"""Where the seconds of this rank's steps go.

On a GPU the laps are events in its queue, read when a point is told: nothing waits for them during a step. What runs
beside training (decoding, the ranks' agreement) is measured on the host's clock.
"""

import time
from typing import Any

import torch

PARTS = ("transfer", "compute", "sync", "optimizer")


class Times:
    """Seconds by part, added up until they are taken.

    transfer: from the host's uint8 to normalised floats on the device. compute: forward and backward pass.
    sync: what is left of the gradients' sum over the ranks after the backward pass, and waiting for their agreement.
    optimizer: the gradient's norm, and the update.
    """

    def __init__(self, device: torch.device, network: torch.nn.Module, ranks: int) -> None:
        """Measure steps of `network`; with several ranks its first weight tells when the backward pass ends."""
        self.on_device = device.type == "cuda"
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.pending: list[tuple[str, Any, Any]] = []
        self.last = self.now()
        self.backward_end: Any = None
        self.hook: Any = None
        first = next((p for p in network.parameters() if p.requires_grad), None)
        if ranks > 1 and first is not None:
            self.hook = first.register_post_accumulate_grad_hook(self._first_weight)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Listen to the network no more."""
        if self.hook:
            self.hook.remove()

    def now(self) -> Any:
        """A moment: seconds, or an event in the GPU's queue."""
        if not self.on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def start(self) -> None:
        """The next lap begins here."""
        self.last, self.backward_end = self.now(), None

    def lap(self, part: str) -> None:
        """What has passed since the lap before belongs to `part`."""
        now = self.now()
        self.pending.append((part, self.last, now))
        self.last = now

    def computed(self) -> None:
        """The gradients are there: a lap of compute, and one of sync where the ranks added them up."""
        if self.backward_end is not None:
            self.pending.append(("compute", self.last, self.backward_end))
            self.last, self.backward_end = self.backward_end, None
            self.lap("sync")
        else:
            self.lap("compute")

    def add(self, part: str, seconds: float) -> None:
        """Seconds by the host's clock."""
        self.seconds[part] += seconds

    def take(self) -> list[float]:
        """Seconds of PARTS since the last call; call it where the device is known to have finished."""
        for part, begin, end in self.pending:
            self.seconds[part] += begin.elapsed_time(end) / 1000 if self.on_device else end - begin
        taken, self.pending = [self.seconds[part] for part in PARTS], []
        self.seconds = dict.fromkeys(PARTS, 0.0)
        return taken

    def _first_weight(self, _: torch.Tensor) -> None:
        """The gradient of the network's first weight is the last one; with accumulation the last call counts."""
        self.backward_end = self.now()
