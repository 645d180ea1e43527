"""Workers that start before the driver has imported Ray Train and torch: it and they do it at the same time."""

import os
from collections.abc import Callable
from types import TracebackType
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from scalecv.config import Scale
from scalecv.runtime import without_collector


class TrainWorker:
    """Ray Train's worker, imported where it runs."""

    def __init__(self) -> None:
        with without_collector():
            from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker

            import scalecv.train.worker  # noqa: F401
        self.worker = RayTrainWorker()


def _passed_on(name: str) -> Callable[..., Any]:
    def method(self: TrainWorker, *given: Any, **named: Any) -> Any:
        return getattr(self.worker, name)(*given, **named)

    return method


METHODS = (
    "execute",
    "run_train_fn",
    "get_metadata",
    "mark_preempt",
    "poll_status",
    "clear_result_queue",
    "shutdown",
    "init_train_context",
)
"""What Ray Train's controller calls."""
for _name in METHODS:
    setattr(TrainWorker, _name, _passed_on(_name))


class EarlyWorkers:
    """The workers of a run's first attempt, importing what they need; on leaving, those not taken are ended."""

    def __init__(self, workers: int, resources: dict[str, float], runtime_env: dict[str, Any]) -> None:
        self.group = placement_group([resources] * workers)
        made = ray.remote(TrainWorker)
        self.actors = [
            made.options(
                num_cpus=resources["CPU"],
                num_gpus=resources.get("GPU", 0.0),
                runtime_env=runtime_env,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, bundle),
            ).remote()
            for bundle in range(workers)
        ]
        self.is_taken = False

    def __enter__(self) -> "EarlyWorkers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self.is_taken:
            remove_placement_group(self.group)


def start_workers(workers: int, scale: Scale, *, use_gpu: bool, code_dirs: tuple[str, ...] = ()) -> EarlyWorkers:
    """Let so many workers start, while the driver does what is left to do before `ray_run.run`."""
    return EarlyWorkers(workers, resources(scale, use_gpu=use_gpu), environment(code_dirs))


def resources(scale: Scale, *, use_gpu: bool) -> dict[str, float]:
    """What each worker takes of its node."""
    return {"CPU": scale.cpus_per_worker, **({"GPU": 1.0} if use_gpu else {})}


def environment(code_dirs: tuple[str, ...]) -> dict[str, Any]:
    """The runtime environment of the workers; empty where they need none, since one costs a start of its own.

    No secrets: those come from each node's environment.
    """
    variables = {}
    own = [folder for folder in code_dirs if any(name.endswith(".py") for name in os.listdir(folder))]
    if own:
        variables["PYTHONPATH"] = os.pathsep.join([*own, *filter(None, [os.environ.get("PYTHONPATH")])])
    if os.environ.get("RAY_ADDRESS"):
        variables |= {name: os.environ[name] for name in ("AWS_ENDPOINT_URL", "AWS_REGION") if name in os.environ}
    return {"env_vars": variables} if variables else {}
