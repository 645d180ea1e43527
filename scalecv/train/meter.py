"""Loss, speed and waiting of an epoch, added up over steps and ranks."""

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

from scalecv.train.times import PARTS

if TYPE_CHECKING:
    from scalecv.batches.epoch import Damaged, Epoch
    from scalecv.train.loop import Setup, State
    from scalecv.train.times import Times


class Meter:
    """Gathers what the ranks have seen since the last point; one host sync and one collective for each point.

    Losses are added step by step, in the same order however often they were gathered: so the loss of an epoch does
    not depend on where a run was stopped.
    """

    def __init__(self, setup: "Setup", batches: "Epoch", start: int, times: "Times") -> None:
        self.setup, self.batches, self.steps, self.told_step = setup, batches, batches.plan.steps, start
        self.times = times
        self.began = self.last = time.perf_counter()
        self.losses: list[torch.Tensor] = []
        self.rows, self.seen_wait_s, self.seen_decode_s = 0, 0.0, 0.0
        self.point = dict.fromkeys(("loss", "rows", "steps", "wait", "decode", *PARTS), 0.0)
        self.rows_seen, self.wait_s = 0.0, 0.0
        self.damaged: dict[tuple[str, int], Damaged] = {}
        self.untold: list[Damaged] = []
        self.sent = 0

    def add(self, loss: torch.Tensor, rows: int) -> None:
        """One step of this rank: the sum of its losses, and its rows that count."""
        self.losses.append(loss)
        self.rows += rows

    def gather(self, state: "State") -> None:
        """Add what all ranks have seen since the last call to the state of the epoch; called on all ranks."""
        waited, self.seen_wait_s = self.batches.wait_s - self.seen_wait_s, self.batches.wait_s
        news = self.batches.damaged[self.sent :]
        self.sent += len(news)
        decoded, self.seen_decode_s = self.batches.decode_s - self.seen_decode_s, self.batches.decode_s
        # The losses come to the host, so the device has finished, and its times are known.
        losses = torch.stack(self.losses).double().cpu() if self.losses else torch.zeros(0, dtype=torch.float64)
        mine = [
            self.rows,
            len(news),
            waited,
            decoded,
            *self.times.take(),
        ]
        numbers = torch.tensor(mine, dtype=torch.float64)
        everyone = [part.tolist() for part in _all(torch.cat([numbers, losses]), self.setup.device)]
        self.point["steps"] += len(self.losses)
        self.losses, self.rows = [], 0
        rows, damaged, waited, *took = (sum(part[at] for part in everyone) for at in range(len(mine)))
        if damaged:
            self._learn(news)
        for of_step in zip(*(part[len(mine) :] for part in everyone), strict=True):
            state.epoch_loss += sum(of_step)
            self.point["loss"] += sum(of_step)
        state.epoch_rows += rows
        self.point["rows"] += rows
        for name, seconds in zip(("wait", "decode", *PARTS), (waited, *took), strict=True):
            self.point[name] += seconds
        self.rows_seen, self.wait_s = self.rows_seen + rows, self.wait_s + waited

    def _learn(self, news: list["Damaged"]) -> None:
        """Join what the ranks could not read; a row group that two of them needed counts once."""
        everyone = [news]
        if dist.is_initialized():
            everyone = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(everyone, news)
        for one in (one for part in everyone for one in part):
            if (one.shard, one.row_group) not in self.damaged:
                self.damaged[one.shard, one.row_group] = one
                self.untold.append(one)
        self.batches.check_budget(self.damaged.values())

    def tell(self, state: "State", lr: float, norm: float) -> None:
        """Report a point; called on all ranks."""
        self.gather(state)
        now = time.perf_counter()
        took, self.last = now - self.last, now
        rows, waited = self.point["rows"], self.point["wait"]
        shares = self.setup.ranks * max(1.0, self.point["steps"])
        point = {
            "train/batch_loss": self.point["loss"] / max(1.0, rows),
            "train/lr": lr,
            "train/grad_norm": norm,
            "system/images_per_s": rows / max(took, 1e-9),
            "system/data_wait_share": waited / self.setup.ranks / max(took, 1e-9),
            **{f"time/{name}_s": self.point[name] / shares for name in ("decode", *PARTS)},
        }
        self.point = dict.fromkeys(self.point, 0.0)
        if self.setup.device.type == "cuda":
            point["system/gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        time_ms = int(time.time() * 1000)
        events: list[dict[str, Any]] = [
            {"kind": "metrics", "step": state.updates, "time_ms": time_ms, "metrics": point},
            {
                "kind": "progress",
                "epoch": state.epoch + 1,
                "epochs": self.setup.experiment.train.epochs,
                "step": state.step,
                "steps": self.steps,
                "metrics": point,
                "left_s": self._left_s(state, took),
            },
        ]
        state.recent.append(events[0])
        events += [{"kind": "progress", "message": f"{one.rows} rows left out: {one.reason}"} for one in self.untold]
        self.untold = []
        notes = self.batches.decoders.notes
        while notes:
            events.append({"kind": "progress", "message": notes.pop(0)})
        self.setup.report([*events, *self.setup.saver.written()])

    def _left_s(self, state: "State", took: float) -> float:
        """Seconds to the end of the run at the speed since the last point, validation left out."""
        done = state.step - self.told_step
        self.told_step = state.step
        steps_left = self.steps - state.step + (self.setup.experiment.train.epochs - state.epoch - 1) * self.steps
        return took / max(1, done) * steps_left

    def of_epoch(self, state: "State") -> dict[str, float]:
        """The epoch's loss over all its rows, and speed and waiting since this process began with it."""
        took = time.perf_counter() - self.began
        plan = self.batches.plan
        left_out = sum(plan.valid_rows(step) for step in range(plan.steps)) - state.epoch_rows
        return {
            **({"data/rows_left_out": left_out} if left_out else {}),
            "train/loss": state.epoch_loss / max(1.0, state.epoch_rows),
            "time/train_s": took,
            "system/epoch_images_per_s": self.rows_seen / max(took, 1e-9),
            "system/epoch_data_wait_share": self.wait_s / self.setup.ranks / max(took, 1e-9),
        }


def _all(mine: torch.Tensor, device: torch.device) -> list[torch.Tensor]:
    if not dist.is_initialized():
        return [mine]
    here = mine.to(device)
    everyone = [torch.empty_like(here) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, here)
    return everyone
