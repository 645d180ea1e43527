"""How many workers a run has: as many as the cluster has room for, of the numbers that are allowed.

A run begins with the workers that were started early. After a loss it waits a little for the same number, then takes
the largest that fits; where not even the smallest does, it waits with a limit. It grows again right after a checkpoint,
so that nothing is done twice.
"""

import time
from collections.abc import Callable
from typing import Any

import ray
from ray._private.state import available_resources_per_node, state
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.train.v2._internal.execution.preemption import PreemptionWatcher
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)

from scalecv.errors import ScalecvError

SETTLE_S = 15.0
"""Seconds to wait for all workers before going on with fewer: a loss frees its resources late."""
ROOM_S = 300.0
"""Seconds to wait for the fewest workers before giving up."""
LOOK_S = 10.0
"""Seconds between two looks whether a run can grow."""
WATCH_S = 2.0
"""Seconds between two looks whether a node is to be taken away."""


class Sizes(FixedScalingPolicy):  # type: ignore[misc]  # ray is untyped here
    """Ray Train's scaling policy for the numbers of workers that a run may have."""

    def __init__(self, scaling_config: Any, sizes: list[int], tell: Callable[[str], None]) -> None:
        super().__init__(scaling_config)
        self.sizes, self.tell = sizes, tell
        self.first: int | None = scaling_config.num_workers
        self.waits_since: float | None = None
        self.looked_at = 0.0
        self.was_saved = False
        self.has_asked = False

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ask for nothing yet: the placement group does, and the actor to ask would be a process at every start."""
        self._requester_id = f"train-{train_run_context.run_id}"
        self._coordinator_client = TrainAutoscalingCoordinatorClient(self._requester_id)

    def make_decision_for_non_running_worker_group(self) -> Any:
        """The first size, or what fits now; none while there is hope for more."""
        if self.first is not None:
            first, self.first = self.first, None
            return self._resize(first)
        self._maybe_send_resource_request()
        self.has_asked = True
        now = time.monotonic()
        if self.waits_since is None:
            self.waits_since = now
        free, waited = room(self._resources()), now - self.waits_since
        fitting = [size for size in self.sizes if size <= free]
        if fitting and (fitting[0] == self.sizes[0] or waited > SETTLE_S):
            if fitting[0] < self.sizes[0]:
                self.tell(f"the cluster has room for {free} workers: goes on with {fitting[0]} of {self.sizes[0]}")
            return self._resize(fitting[0])
        if waited > ROOM_S:
            raise ScalecvError(
                f"a worker was lost, and for {ROOM_S:.0f} s the cluster had room for {free} of at least "
                f"{self.sizes[-1]} workers: add a node or set scale.min_workers={max(1, free)}; "
                "the same command goes on from the last checkpoint"
            )
        time.sleep(0.5)  # Ray asks again at once
        return NoopDecision()

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """A larger size if there is room for it and a checkpoint was just written."""
        self.waits_since = None
        has, now = worker_group_state.num_workers, time.monotonic()
        if not self.was_saved or has >= self.sizes[0] or now - self.looked_at < LOOK_S:
            return NoopDecision()
        self.was_saved, self.looked_at = False, now
        larger = [size for size in self.sizes if has < size <= has + room(self._resources())]
        if not larger:
            return NoopDecision()
        self.tell(f"the cluster has room again: goes on with {larger[0]} workers instead of {has}")
        return self._resize(larger[0])

    def saved(self) -> None:
        """A checkpoint was written: a good moment to begin again with more workers."""
        self.was_saved = True

    def _cancel_resource_request(self) -> None:
        if self.has_asked:
            super()._cancel_resource_request()

    def _resources(self) -> dict[str, float]:
        return dict(self.scaling_config._resources_per_worker_not_none)

    def _resize(self, workers: int) -> Any:
        self.waits_since, self.was_saved = None, False
        return ResizeDecision(num_workers=workers, resources_per_worker=self._resources())


class Watch(PreemptionCallback):  # type: ignore[misc]  # ray is untyped here
    """Ray Train's watch for nodes that are to be taken away, in a thread of the driver instead of a process."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Watch the nodes of these workers."""
        self._stop_watcher()
        ranks: dict[str, list[int]] = {}
        actors = {}
        for worker in worker_group.get_workers():
            rank = worker.distributed_context.world_rank
            ranks.setdefault(worker.metadata.node_id, []).append(rank)
            actors[rank] = worker.actor
        self._watcher = PreemptionWatcher(ranks, WATCH_S, actors)

    def _stop_watcher(self) -> None:
        if self._watcher is not None:
            self._watcher._stop_event.set()
            self._watcher = None


def room(resources: dict[str, float]) -> int:
    """How many workers of these resources fit on the nodes that are there and will stay."""
    leaving = state.get_draining_nodes()
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    needed = {name: amount for name, amount in resources.items() if amount}
    return sum(
        min(int((free.get(name, 0.0) + 1e-6) // amount) for name, amount in needed.items())
        for node, free in available_resources_per_node().items()
        if node in alive and node not in leaving
    )
