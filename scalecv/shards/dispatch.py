"""Units of work to Ray Data, or one after the other in this process; small rows come back as they finish."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from scalecv import errors, runtime
from scalecv.shards import unit

RETRIES = 3
"""Times that a unit runs again after its process or node was lost."""
HERE_ROWS, HERE_BYTES = 20_000, 128 << 20
"""What one process examines in less time than Ray takes to start: 128 MB of photographs take it about 5 s."""
PLACES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")


def run_units(
    names: Sequence[str], target: str, concurrency: int | None, rows: int, size_bytes: int
) -> Iterator[dict[str, Any]]:
    """Run units, each in a Ray task of one CPU; what each of them returned, in the order in which they end.

    Args:
        names: units, described below the target.
        target: URI of the dataset.
        concurrency: units at the same time; None takes the cluster's CPUs, or none where the work is done before Ray
            would have started; 0 runs them here without Ray.
        rows: of all these units.
        size_bytes: of their images and masks.

    Raises: ScalecvError: as a unit raised it. StorageError: a unit's process was lost too often.
    """
    items = [{"unit": name} for name in names]
    if not items:
        return
    is_here = concurrency == 0 or (concurrency is None and _is_small(rows, size_bytes) and not runtime.is_at_hand())
    results = _here(items, target) if is_here else _in_ray(items, target, concurrency)
    for result in results:
        if result["error"]:
            raise getattr(errors, result["error_type"], errors.ScalecvError)(result["error"])
        yield result


def _is_small(rows: int, size_bytes: int) -> bool:
    return rows <= HERE_ROWS and size_bytes <= HERE_BYTES


def _here(items: list[dict[str, Any]], target: str) -> Iterator[dict[str, Any]]:
    try:
        for item in items:
            yield unit.run(item, target)
    finally:
        unit.close()


def run_remote(item: dict[str, Any], target: str, places: dict[str, str]) -> dict[str, Any]:
    """`unit.run` on another node; credentials come from that node's environment, only the address from here."""
    for name, value in places.items():
        os.environ.setdefault(name, value)
    return unit.run(item, target)


def _in_ray(items: list[dict[str, Any]], target: str, concurrency: int | None) -> Iterator[dict[str, Any]]:
    runtime.connect()
    import ray
    import ray.data

    places = {name: os.environ[name] for name in PLACES if name in os.environ}
    with quiet(ray.data.DataContext.get_current()), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # max_retries has no other way into Ray Data 2.60
        done = ray.data.from_items(items, override_num_blocks=len(items)).map(
            run_remote,
            fn_kwargs={"target": target, "places": places},
            num_cpus=1,
            concurrency=concurrency,
            max_retries=RETRIES,
        )
        try:
            yield from done.iter_rows()
        except (ray.exceptions.RayError, ray.exceptions.RaySystemError) as error:
            raise errors.StorageError(
                f"a unit of the ingest failed {RETRIES + 1} times ({_said(error)}): the same command goes on; "
                "a smaller --shard-mb needs less memory"
            ) from error


@contextlib.contextmanager
def quiet(context: Any) -> Iterator[None]:
    """Ray Data's own lines and bars off: progress is told by us."""
    logger = logging.getLogger("ray.data")
    before = logger.level, context.enable_progress_bars, context.print_on_execution_start
    logger.setLevel(logging.ERROR)
    context.enable_progress_bars = context.print_on_execution_start = False
    try:
        yield
    finally:
        logger.setLevel(before[0])
        context.enable_progress_bars, context.print_on_execution_start = before[1:]


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip()[:200]}" if lines else type(error).__name__
