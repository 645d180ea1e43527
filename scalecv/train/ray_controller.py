"""Ray Train's controller, run in the driver, with workers that have started before it (see `ray_workers`).

Ray Train would start one process after the other, each with imports of its own: its controller, a helper for the
placement group, then the workers. Here the workers start first and the rest is done in the driver meanwhile. A restart
of workers goes the usual way.
"""

from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle

from scalecv.train.ray_workers import EarlyWorkers


class Group(WorkerGroup):  # type: ignore[misc]  # ray is untyped here
    """Workers that take the place of early ones once, and are told of no controller actor, since there is none."""

    early: EarlyWorkers

    def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> Any:
        if self.early.is_taken or worker_group_context.num_workers != len(self.early.actors):
            return super()._create_placement_group(scaling_config, worker_group_context)
        return DefaultPlacementGroupHandle(self.early.group)

    def _create_workers(self, num_workers: int, group: Any, resources: dict[str, float], **others: Any) -> Any:
        if group != self.early.group:
            return super()._create_workers(num_workers, group, resources, **others)
        self.early.is_taken = True
        try:
            told = ray.get([actor.get_metadata.remote() for actor in self.early.actors])
        except RayActorError as error:
            raise WorkerGroupStartupFailedError(f"a worker did not start: {error}") from error
        pairs = enumerate(zip(self.early.actors, told, strict=True))
        workers = [Worker(actor, facts, resources, placement_group_bundle_index=at) for at, (actor, facts) in pairs]
        return WorkerGroup._assign_worker_ranks(workers, 0, None, None)

    def _init_train_context_on_workers(self, workers: list[Any], sync_actor: Any, train_context_args: Any) -> None:
        # A worker would ask the controller actor only for reported checkpoints; ours are found by their manifests.
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=sync_actor,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **{name: values[at] for name, values in train_context_args.items()},
                )
                for at, worker in enumerate(workers)
            ]
        )
        self._decorate_worker_log_file_paths(workers)

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
        return custom_runtime_env  # Ray Train's own variables are for the controller, which runs here


class Controller(TrainController):  # type: ignore[misc]  # ray is untyped here
    """Gives back what lost workers held before it looks for room."""

    def _make_and_handle_scaling_decision_for_non_running_worker_group(self, controller_state: Any) -> Any:
        if self._worker_group:
            self._shutdown_worker_group()
        return super()._make_and_handle_scaling_decision_for_non_running_worker_group(controller_state)


def controller(early: EarlyWorkers, **given: Any) -> Any:
    """Ray Train's controller for a run whose first workers are there already."""
    kind = type("Controller", (Controller,), {"worker_group_cls": type("Group", (Group,), {"early": early})})
    return kind(**given)
