"""The only place that starts or joins a Ray cluster.

RAY_ADDRESS decides: empty starts Ray on this machine, `auto` or HOST:PORT joins a cluster that this machine is
a node of (inside a Ray job it is set). Everything is looked at before Ray is asked, since Ray itself tries for
80 s to reach a cluster that is not there and then ends the process.
"""

import contextlib
import gc
import logging
import os
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from scalecv.errors import ConfigError, UserError

REACH_S = 5.0
LOCAL_TRIMS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # training is what this machine is asked to do
}
SHOWS_WORKERS = os.environ.get("SCALECV_VERBOSE", "") not in ("", "0")
"""Whether the lines that workers print come to the terminal; they are in Ray's logs anyway."""
_started = False


@dataclass(frozen=True)
class ClusterInfo:
    """The cluster that this process is a driver of."""

    address: str
    """HOST:PORT of its head, or "local"."""
    started: bool
    """Whether this process started it (and `shutdown` ends it)."""
    nodes: int
    cpus: float
    gpus: float


def connect(local_cpus: int | None = None, code_dirs: Iterable[str] = ()) -> ClusterInfo:
    """Join the cluster of RAY_ADDRESS, or start Ray on this machine; a second call changes nothing.

    Args:
        local_cpus: CPUs that a Ray started here may hand out; None takes those of the machine.
        code_dirs: folders whose modules the workers must find, such as the experiment's own.
    Raises: UserError: the cluster cannot be reached, refuses the token, or runs another version.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    folders = [os.path.abspath(folder) for folder in code_dirs]
    starts = address in ("", "local")
    if starts:
        _prepare_local(folders)
    else:
        use_token()
    import ray

    if ray.is_initialized():
        return _info(ray)
    if starts:
        with contextlib.nullcontext() if folders else _elsewhere():
            _start(ray, local_cpus)
    else:
        _join(ray, address, folders)
    return _info(ray)


def is_at_hand() -> bool:
    """Whether there is a cluster to join, or this process has joined or started one: then Ray costs no start."""
    if os.environ.get("RAY_ADDRESS", "") not in ("", "local"):
        return True
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Work without the garbage collector, which looks through all modules and what is new again and again.

    For what makes many objects and no cycles: imports (a tenth of torch's time), and the rows of an ingest.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def resources() -> tuple[float, float]:
    """CPUs and GPUs of the cluster that this process has joined."""
    import ray

    found = ray.cluster_resources()
    return found.get("CPU", 0.0), found.get("GPU", 0.0)


def nodes() -> list[str]:
    """IDs of the nodes of the cluster that this process has joined."""
    import ray

    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]


def check_fits(workers: int, cpus_per_worker: float, gpu: bool) -> None:
    """See that all workers can run at once, for Ray would wait for ever.

    Raises: ConfigError: with the largest number of workers that fits.
    """
    cpus, gpus = resources()
    if gpu and workers > gpus:
        fewer = f"set scale.workers={int(gpus)}, or " if gpus >= 1 else ""
        raise ConfigError(
            f"scale.workers={workers} with a GPU each needs {workers} GPUs, the cluster has {gpus:g}: "
            f"{fewer}set scale.gpu=no"
        )
    if workers * cpus_per_worker > cpus:
        most = int(cpus // cpus_per_worker)
        advice = f"set scale.workers={most}" if most else f"set scale.cpus_per_worker={cpus:g} or less"
        raise ConfigError(
            f"scale.workers={workers} needs {workers * cpus_per_worker:g} CPUs, the cluster has {cpus:g}: "
            f"{advice}, or add nodes"
        )


def shutdown() -> None:
    """End the Ray that `connect` started; a cluster that was joined is left as it is."""
    global _started
    import ray

    if _started and ray.is_initialized():
        ray.shutdown()
    _started = False


def _prepare_local(folders: list[str]) -> None:
    for name, value in LOCAL_TRIMS.items():
        os.environ.setdefault(name, value)
    # Ray's processes inherit the environment; a runtime_env would cost each worker a fresh start.
    if folders:
        known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*folders, *(k for k in known if k)]))


@contextlib.contextmanager
def _elsewhere() -> Iterator[None]:
    """Meanwhile in the root folder.

    Ray lets its workers import from the folder that it is started in before all others, and strangers' images may lie
    there, beside a `gzip.py`. What the user's own code needs travels by PYTHONPATH.
    """
    here = os.getcwd()
    os.chdir("/")
    try:
        yield
    finally:
        os.chdir(here)


def _start(ray: Any, local_cpus: int | None) -> None:
    global _started
    for attempt in (1, 2):  # a node that starts on a busy machine may miss Ray's own 30 s limit
        try:
            ray.init(
                address="local",
                num_cpus=local_cpus,
                include_dashboard=False,
                object_store_memory=_object_store_bytes(),
                logging_level=logging.ERROR,
                log_to_driver=SHOWS_WORKERS,
            )
            break
        except Exception as error:  # Ray raises a bare Exception here
            ray.shutdown()
            if attempt == 2:
                raise UserError(
                    f"Ray did not start on this machine: {_first_line(error)}; run `scalecv doctor`"
                ) from error
    _started = True


def _object_store_bytes() -> int:
    """A quarter of the free memory, at most 2 GiB, and inside /dev/shm where that is not tiny."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = min(2 << 30, max(256 << 20, free // 4))
    if os.path.isdir("/dev/shm"):  # noqa: S108 - only its size is read
        shared = int(shutil.disk_usage("/dev/shm").free * 0.8)  # noqa: S108
        if shared >= 128 << 20:
            size = min(size, shared)
    return size


def _join(ray: Any, address: str, folders: list[str]) -> None:
    if address != "auto":
        _check_version(address, head_version(address), ray.__version__)
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    environment: Any = None
    if folders and not in_job:
        path = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {"env_vars": {"PYTHONPATH": path}}
    try:
        with _elsewhere():
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=SHOWS_WORKERS, runtime_env=environment)
    except (Exception, SystemExit) as error:  # Ray exits where it finds no head
        raise UserError(_why_not(address, error)) from None


def head_version(address: str, *, with_token: bool = True) -> str:
    """Ray's version on the head at HOST:PORT, asked with the token that is set; answers within about 5 s.

    Raises: UserError: nothing answers there, it is no head, or it refuses the token.
    """
    scheme, sep, _ = address.partition("://")
    if sep:
        what = "the Ray Client" if scheme == "ray" else "the job server"
        raise UserError(
            f"RAY_ADDRESS={address} is an address of {what}; expected HOST:PORT of a head that this machine is a "
            f"node of. To run on that cluster from outside: scalecv submit --address http://HOST:8265 …"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"RAY_ADDRESS={address} is not HOST:PORT (the port of a head is 6379 by default)")
    _check_open(address, host.strip("[]"), int(port))
    import ray

    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return str(ray.__version__)  # the certificates are Ray's business; ray.init will ask
    import grpc  # type: ignore[import-untyped]
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    token = auth_token() if with_token else None
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(address) as channel:
        ask = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).CheckAlive
        try:
            reply = ask(gcs_service_pb2.CheckAliveRequest(), timeout=REACH_S, metadata=metadata)
        except grpc.RpcError as error:
            raise UserError(_refusal(address, error.code().name, bool(token))) from None
    return str(reply.ray_version)


def auth_token() -> str | None:
    """The cluster token of this user: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token."""
    given = os.environ.get("RAY_AUTH_TOKEN")
    if given:
        return given.strip()
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip() or None
    except OSError:
        return None


def use_token() -> None:
    """Turn token authentication on where a token is there; Ray does so only for some of its clients."""
    if auth_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _check_open(address: str, host: str, port: int) -> None:
    try:
        with socket.create_connection((host, port), timeout=REACH_S):
            pass
    except OSError as error:
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error.strerror or error}): check that it runs, "
            f"or unset RAY_ADDRESS to start Ray on this machine"
        ) from None


def _check_version(address: str, theirs: str, ours: str) -> None:
    if theirs != ours:
        raise UserError(
            f"the Ray cluster at {address} runs Ray {theirs}, this environment has {ours}: install the same "
            f"version on both sides (requirements.lock names it)"
        )


def _refusal(address: str, code: str, had_token: bool) -> str:
    if code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        found = "did not accept the token" if had_token else "wants a token and none is set"
        return (
            f"the Ray cluster at {address} {found}: put the cluster's token into RAY_AUTH_TOKEN, "
            f"or its file's path into RAY_AUTH_TOKEN_PATH"
        )
    return (
        f"what answers at RAY_ADDRESS={address} is no Ray head ({code.lower()}): expected the port of the head, "
        f"6379 by default (8265 is the dashboard and takes jobs: scalecv submit)"
    )


def _why_not(address: str, error: BaseException) -> str:
    said = _first_line(error)
    low = str(error).lower()
    if "version" in low and "mismatch" in low:
        return f"the Ray cluster at {address} runs other versions: {' '.join(str(error).split())}"
    if "node_ip_address" in low or "no node" in low or "this node" in low:
        return (
            f"this machine is not a node of the Ray cluster at {address} ({said}): use `scalecv submit`, "
            f"or run `ray start --address={address}` here"
        )
    return f"could not join the Ray cluster at {address}: {said}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _info(ray: Any) -> ClusterInfo:
    cpus, gpus = resources()
    alive = sum(1 for node in ray.nodes() if node["Alive"])
    where = "local" if _started else ray.get_runtime_context().gcs_address
    return ClusterInfo(where, _started, alive, cpus, gpus)
