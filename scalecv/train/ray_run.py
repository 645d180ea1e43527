"""One run on Ray Train: worker processes, their failures, and what they report."""

import asyncio
import logging
import os
import tempfile
import traceback
import uuid
from collections.abc import Callable
from typing import Any

import ray
import ray.train
from ray.train import UserCallback
from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context

from scalecv import redact
from scalecv.artifacts import spool
from scalecv.artifacts.callback import SpoolCallback
from scalecv.config import Scale
from scalecv.errors import ScalecvError
from scalecv.runtime import SHOWS_WORKERS
from scalecv.train.job import Job, Place
from scalecv.train.ray_controller import controller
from scalecv.train.ray_scaling import Sizes, Watch
from scalecv.train.ray_workers import EarlyWorkers, environment, resources
from scalecv.train.signals import in_thread

LOST = ("gloo", "nccl", "connection closed by peer", "connection reset", "store->get", "broken pipe", "timed out")
"""What a rank says when another one is gone: not its own error."""


class WorkerBug(ScalecvError):
    """An error of the program in a worker; trying again would show it again."""


class _Listener(UserCallback):  # type: ignore[misc]  # ray is untyped here
    """Ends the run at an error of the user or of the program; lost workers are left to restarts, which it tells."""

    def __init__(self, tell: Callable[[str], None], saved: Callable[[], None]) -> None:
        self.tell, self.saved = tell, saved

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if any(event["kind"] == "checkpoint" for event in (metrics[0] or {}).get("events", ())):
            self.saved()

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            cause = _cause(error)
            if cause is not None:
                raise cause
        for rank, error in list(worker_exceptions.items())[:1]:
            said = str(error).strip().splitlines() or [type(error).__name__]
            self.tell(f"lost worker {rank} ({said[-1].strip()[:200]}); the workers are started again")


class _Sigterm(WorkerCallback):  # type: ignore[misc]  # ray is untyped here
    """Makes a worker that is told to go save first; runs on its main thread, the only one that may listen."""

    def after_init_train_context(self) -> None:
        from scalecv.train.requests import hear_sigterm

        hear_sigterm()


def run(
    job: Job,
    sizes: list[int],
    path: str,
    early: EarlyWorkers,
    *,
    use_gpu: bool,
    code_dirs: tuple[str, ...] = (),
) -> None:
    """Run the workers to the end. What they have to say comes through the spool.

    Args:
        job: what every rank is given.
        sizes: how many ranks there may be, most first.
        path: of the spool, a local file that the reports of rank 0 are appended to.
        early: what `ray_workers.start_workers` gave for the same arguments.
        use_gpu: whether each rank takes a GPU.
        code_dirs: folders whose modules the workers must find.

    Raises: ScalecvError: what a worker raised, that workers were lost more often than scale.max_failures, or that
        there was no room for them any more.
    """
    from ray.train.torch import TorchConfig, TorchTrainer

    scale = job.experiment.scale
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)

    def tell(message: str) -> None:
        spool.append(path, {"kind": "progress", "message": message})

    scaling = ray.train.ScalingConfig(
        num_workers=len(early.actors), use_gpu=use_gpu, resources_per_worker=resources(scale, use_gpu=use_gpu)
    )
    policy = Sizes(scaling, sizes, tell)
    with tempfile.TemporaryDirectory(prefix="scalecv-ray-") as folder:

        class Trainer(TorchTrainer):  # type: ignore[misc]  # ray is untyped here
            """Runs Ray Train's controller in this process, and leaves two helpers out.

            The process for datasets has nothing to do, since our workers read for themselves; the one that frees the
            placement group when a controller dies neither, since Ray does so when the driver goes.
            """

            def _create_default_callbacks(self) -> list[Any]:
                unused = ("DatasetsCallback", "PlacementGroupCleanerCallback")
                made = [one for one in super()._create_default_callbacks() if type(one).__name__ not in unused]
                return [*made, Watch(), _Sigterm()]

            def _initialize_and_run_controller(self, **given: Any) -> Any:
                ours = controller(early, **{**given, "scaling_policy": policy})
                if not SHOWS_WORKERS:
                    logging.getLogger("ray.train").setLevel(logging.ERROR)  # what matters of it is told as events
                asyncio.run(ours.run())
                return ours.get_result()

        trainer = Trainer(
            _rank,
            train_loop_config={"job": job},
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=scaling,
            run_config=ray.train.RunConfig(
                # Resume goes by our manifests alone; Ray's own state of a run is never met again.
                name=f"{job.experiment.name}-{uuid.uuid4().hex[:8]}",
                storage_path=folder,
                failure_config=ray.train.FailureConfig(max_failures=scale.max_failures, controller_failure_limit=3),
                callbacks=[SpoolCallback(path), _Listener(tell, policy.saved)],
                worker_runtime_env=environment(code_dirs),
            ),
        )
        try:
            in_thread(trainer.fit, "ray-train")
        except ray.train.TrainingFailedError as error:
            raise _explained(error, scale) from None


def _rank(config: dict[str, Any]) -> None:
    """What Ray Train calls in each worker."""
    from ray.train.torch import get_device
    from torch import distributed as dist

    from scalecv.train.requests import Leaves
    from scalecv.train.worker import work

    context = ray.train.get_context()
    place = Place(
        rank=context.get_world_rank(),
        ranks=context.get_world_size(),
        ranks_on_node=context.get_local_world_size(),
        device=str(get_device()),
    )

    def report(events: list[dict[str, Any]]) -> None:
        ray.train.report({"events": events if place.rank == 0 else []})

    def drains() -> bool:
        """Whether Ray has told this process of a preemption; its public question makes all ranks wait."""
        return get_train_context().preemption_context.preemption_info is not None

    try:
        work(config["job"], place, report, drains=drains)
    except (ScalecvError, Leaves):
        raise
    except Exception as error:
        if isinstance(error, dist.DistError) or any(word in str(error).lower() for word in LOST):
            raise  # another rank is gone; Ray starts all of them again
        said = f"rank {place.rank}: {type(error).__name__}: {error}\n{traceback.format_exc()}"
        raise WorkerBug(redact.clean(said)) from None


def _cause(error: BaseException) -> ScalecvError | None:
    """The error of ours inside what Ray wrapped, if there is one."""
    seen: set[int] = set()
    stack: list[Any] = [error]
    while stack:
        one = stack.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, ScalecvError):
            return one
        for name in ("_base_exc", "base_exc", "cause", "__cause__", "__context__", "controller_failure"):
            inner = getattr(one, name, None)
            if isinstance(inner, BaseException):
                stack.append(inner)
        stack += list(getattr(one, "worker_failures", {}).values())
    return None


def _explained(error: BaseException, scale: Scale) -> ScalecvError:
    ours = _cause(error)
    if ours is not None:
        return ours
    lines = [line for line in str(error).splitlines() if line.strip()]
    return ScalecvError(
        f"workers were lost more than scale.max_failures={scale.max_failures} times; the last time: "
        f"{lines[-1][:400] if lines else type(error).__name__}. The same command goes on from the last checkpoint"
    )


QUIET = {
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # `Watch` does it without a process of its own
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # one report is taken at each look at the workers
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
"""Ray Train's metrics, state tracking and change of folder off: each costs a process, a second or a surprise."""
