"""`scalecv doctor`: one line for each thing that a run stands on, and what to do where it does not hold."""

import ctypes
import email.utils
import os
import platform
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from scalecv import redact, runtime, storage
from scalecv.artifacts import tracking
from scalecv.artifacts.provenance import cpu_model, gpus, versions
from scalecv.errors import ScalecvError, UserError
from scalecv.loopback import is_loopback

GIB = 1 << 30
JPEG_S = 180.0
"""Longest time for loading torch and compiling, on a slow disk."""
NEEDED = ("ray", "torch", "torchvision", "mlflow", "pyarrow", "deltalake", "obstore", "pillow", "pydantic")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool | None
    """None: works, but worth knowing."""
    found: str
    do: str = ""
    """What to do; empty where nothing is to be done."""


def checks(storage_uris: Iterable[str] = ()) -> list[Check]:
    """Look at this machine, Ray, MLflow and the given places; takes a few seconds, starts nothing.

    Args:
        storage_uris: places to read and to write a small object.
    """
    uris = list(storage_uris)
    looks: list[tuple[str, Callable[[], Check]]] = [
        ("python", _python),
        ("cpu", _cpu),
        ("jpeg", _jpeg),
        ("gpu", _gpu),
        ("disk", _disk),
        ("shm", _shared_memory),
        ("ray", _ray),
        ("head", _open_head),
        ("mlflow", _mlflow),
        *[("storage", lambda uri=uri: _storage(uri)) for uri in uris],
    ]
    if any(uri.startswith("s3:") for uri in uris) and _endpoint():
        looks.append(("clock", _clock))
    return [_looked(name, look) for name, look in looks]


def exit_code(found: Iterable[Check]) -> int:
    """0 where nothing is broken, else 1."""
    return 1 if any(check.ok is False for check in found) else 0


def _looked(name: str, look: Callable[[], Check]) -> Check:
    try:
        return look()
    except ScalecvError as error:
        return Check(name, False, redact.clean(str(error)))
    except Exception as error:  # one broken thing must not hide the others
        return Check(name, False, redact.clean(f"{type(error).__name__}: {error}"), "report this if it stays")


def _python() -> Check:
    installed = versions()
    missing = [name for name in NEEDED if name not in installed]
    told = ", ".join(f"{name} {installed[name]}" for name in ("scalecv", *NEEDED[:4]) if name in installed)
    found = f"{platform.python_version()}; {told}"
    if missing:
        return Check("python", False, f"{found}; missing: {', '.join(missing)}", "make setup")
    fits = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Check("python", fits, found, "" if fits else "use Python 3.11 to 3.13")


def _cpu() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    size = os.sysconf("SC_PAGE_SIZE")
    total, free = (os.sysconf(f"SC_{kind}_PAGES") * size / GIB for kind in ("PHYS", "AVPHYS"))
    found = f"{cores} cores ({cpu_model()}), {total:.0f} GiB memory, {free:.1f} free"
    low = total < 6
    return Check("cpu", None if low else True, found, "8 GiB or more are comfortable" if low else "")


def _jpeg() -> Check:
    """Whether crops are native, from a process of its own: who loads the library knows, and torch comes with it."""
    ask = "from scalecv.batches import crops; print(int(crops.load() is not None), crops.state())"
    ours = {"PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))}
    told = subprocess.run(
        [sys.executable, "-P", "-c", ask], env=os.environ | ours, capture_output=True, text=True, timeout=JPEG_S
    )
    if told.returncode:
        said = (told.stderr.strip().splitlines() or [f"exit code {told.returncode}"])[-1][:200]
        return Check("jpeg", False, f"what decodes JPEGs does not start: {said}", "make setup")
    is_native, _, found = told.stdout.strip().splitlines()[-1].partition(" ")
    return Check("jpeg", True if is_native == "1" else None, found)


def _gpu() -> Check:
    there = gpus()
    if not there:
        if Path("/proc/driver/nvidia/version").exists():
            return Check("gpu", False, "an NVIDIA driver, but no GPU answers", "see what nvidia-smi says")
        return Check("gpu", None, "none seen: training runs on the CPU")
    found = "; ".join(there)
    if "+cpu" in versions().get("torch", ""):
        return Check("gpu", False, f"{found}; but torch is built without CUDA", "make setup installs the CUDA build")
    code = _cuda_init()
    if code:
        return Check("gpu", False, f"{found}; but CUDA does not start (error {code})", "update the driver, or restart")
    return Check("gpu", True, found)


def _cuda_init() -> int:
    """0 where CUDA starts; importing torch to ask would take seconds."""
    try:
        return int(ctypes.CDLL("libcuda.so.1").cuInit(0))
    except OSError:
        return -1


def _disk() -> Check:
    places = dict.fromkeys((os.getcwd(), "/tmp"))  # noqa: S108 - Ray writes there
    free = {place: shutil.disk_usage(place).free / GIB for place in places}
    found = ", ".join(f"{gib:.1f} GiB free in {place}" for place, gib in free.items())
    if not os.access(os.getcwd(), os.W_OK):
        return Check("disk", False, f"{os.getcwd()} cannot be written", "go to a folder of your own")
    if min(free.values()) < 1:
        return Check("disk", False, found, "make room: Ray stops working on a full disk")
    low = min(free.values()) < 10
    return Check("disk", None if low else True, found, "checkpoints and shards may need more" if low else "")


def _shared_memory() -> Check:
    if not os.path.isdir("/dev/shm"):  # noqa: S108
        return Check("shm", None, "no /dev/shm: Ray keeps objects on disk")
    size = shutil.disk_usage("/dev/shm").total / GIB  # noqa: S108
    low = size < 1
    return Check(
        "shm",
        None if low else True,
        f"/dev/shm has {size:.1f} GiB",  # noqa: S108
        "give the container more (docker run --shm-size=4g): Ray falls back to /tmp, which is slow" if low else "",
    )


def _ray() -> Check:
    address = os.environ.get("RAY_ADDRESS", "")
    ours = versions().get("ray", "")
    if address in ("", "local"):
        return Check("ray", True, f"{ours}; RAY_ADDRESS is not set, Ray starts on this machine when needed")
    if address == "auto":
        return Check("ray", None, f"{ours}; RAY_ADDRESS=auto takes the cluster this machine is a node of")
    theirs = runtime.head_version(address)
    if theirs != ours:
        return Check("ray", False, f"{address} runs Ray {theirs}, here is {ours}", "install the same version")
    return _openness("ray", address, f"{address} answers, Ray {theirs}")


def _open_head() -> Check:
    """A head that `ray start` left running on this machine."""
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")  # noqa: S108 - Ray's own place
    address = note.read_text(encoding="utf-8").strip() if note.is_file() else ""
    if not address:
        return Check("head", True, "no cluster was started on this machine")
    try:
        runtime.head_version(address)
    except UserError as error:
        refused = "token" in str(error)
        return Check("head", True, f"{address} {'asks for a token' if refused else 'is not running any more'}")
    return _openness("head", address, f"{address} runs on this machine")


def _openness(name: str, address: str, found: str) -> Check:
    is_open = _answers_anyone(address)
    if is_open is None:
        return Check(name, None, f"{found}; whether it asks for a token is not known, it gave no second answer")
    if not is_open:
        return Check(name, True, f"{found}, asks for a token")
    if is_loopback(address.rpartition(":")[0]):
        return Check(name, None, f"{found}, without token, on loopback")
    return Check(
        name,
        False,
        f"{found}, and takes jobs of anyone who reaches it",
        "ray get-auth-token --generate, then start it with RAY_AUTH_MODE=token",
    )


def _answers_anyone(address: str) -> bool | None:
    """Whether a head answers without a token; None where it gave neither an answer nor a refusal."""
    try:
        runtime.head_version(address, with_token=False)
    except UserError as error:
        return False if "token" in str(error) else None
    return True


def _mlflow() -> Check:
    uri = tracking.tracking_uri(None)
    shown = storage.without_secrets(uri)
    problem = tracking.probe(uri)
    if problem:
        return Check("mlflow", False, problem, "start it or set MLFLOW_TRACKING_URI; runs go on, their points wait")
    if not uri.startswith("http"):
        return Check("mlflow", True, f"{shown}, client {versions().get('mlflow', '?')}")
    with urllib.request.urlopen(f"{uri}/version", timeout=5) as answer:  # noqa: S310 - http(s), see tracking_uri
        theirs = answer.read(50).decode(errors="replace").strip()
    ours = versions().get("mlflow", "?")
    same = theirs.split(".")[:1] == ours.split(".")[:1]
    do = "" if same else "use the same major version on both sides"
    return Check("mlflow", True if same else None, f"{shown} runs {theirs}, client {ours}", do)


def _storage(uri: str) -> Check:
    shown, began = storage.without_secrets(uri), time.monotonic()
    if storage.is_local(uri) and not os.path.exists(storage.absolute(uri)):
        return Check("storage", None, f"{shown} is not there yet", "it is made when something is written")
    storage.list_names(uri, limit=1)  # a bucket may hold millions
    try:
        storage.check_writable(uri)
    except ScalecvError as error:
        return Check("storage", None, f"{shown} can be read, not written: {error}")
    return Check("storage", True, f"{shown} read and written in {time.monotonic() - began:.2f} s")


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _clock() -> Check:
    """S3 refuses requests whose time is 15 minutes off."""
    parts = urlsplit(_endpoint())
    if parts.scheme not in ("http", "https"):
        return Check("clock", False, f"AWS_ENDPOINT_URL={_endpoint()!r} is not a URL", "set http(s)://HOST:PORT")
    request = urllib.request.Request(_endpoint(), method="HEAD")  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
            told = answer.headers.get("Date")
    except urllib.error.HTTPError as error:
        told = error.headers.get("Date")  # a refusal tells the time, too
    if not told:
        return Check("clock", None, "the storage does not tell the time")
    off_s = time.time() - email.utils.parsedate_to_datetime(told).timestamp()
    bad = abs(off_s) > 300
    return Check("clock", not bad, f"{off_s:+.0f} s against the storage", "set this machine's clock" if bad else "")
