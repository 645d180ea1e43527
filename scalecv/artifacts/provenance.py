"""Where a run comes from: code, packages and hardware, as short texts for tags.

The driver's part (`run_facts`) is known before a run starts, the workers' part (`worker_facts`) is told by them.
"""

import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "scalecv torch torchvision timm segmentation-models-pytorch numpy pillow rasterio pyarrow ray deltalake obstore "
    "safetensors pydantic mlflow torchcodec"
).split()
MOST_DIFF_BYTES = 1 << 20
MOST_NAMES = 8


def run_facts() -> dict[str, str]:
    """Tags of a run: code, git commit and changes of the working directory, package versions, CPU and GPUs."""
    facts = {
        "scalecv.code": code_hash(),
        "scalecv.python": platform.python_version(),
        "scalecv.platform": platform.platform(),
        "scalecv.cpu": cpu_model(),
        "scalecv.cpu_count": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "scalecv.gpu": ", ".join(gpus()) or "none",
        "scalecv.gpu_driver": ", ".join(sorted(set(_nvidia("driver_version")))) or "none",
    }
    for package, found in versions().items():
        facts[f"scalecv.version.{package}"] = found
    commit = _git("rev-parse", "HEAD")
    if commit:
        facts["mlflow.source.git.commit"] = commit.strip()
        facts["scalecv.git.dirty"] = "true" if (_git("status", "--porcelain") or "").strip() else "false"
        facts["scalecv.git.changes"] = _changes()
    return facts


def worker_facts(ranks: int, device: str, resumed_at: int, more: Mapping[str, str]) -> dict[str, str]:
    """Tags about the processes that train; called on every rank at the same place, for they tell each other.

    Args:
        ranks: number of training processes.
        device: torch device of this rank.
        resumed_at: update that this start goes on from, 0 for a fresh one.
        more: tags of this rank.
    """
    import torch

    where = torch.device(device)
    has_gpu = where.type == "cuda"
    cuda = "none"
    if has_gpu:
        cuda = f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"  # type: ignore[no-untyped-call]
    mine = {
        "scalecv.threads": str(torch.get_num_threads()),
        "scalecv.worker_cpu": cpu_model(),
        "scalecv.cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "scalecv.device": torch.cuda.get_device_name(where) if has_gpu else where.type,
        "scalecv.cuda": cuda,
        **more,
    }
    everyone = [mine]
    if torch.distributed.is_initialized():
        everyone = [{} for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(everyone, mine)
    facts = {key: "; ".join(sorted({one[key] for one in everyone})) for key in mine}
    resumed = {"scalecv.resumed_at": str(resumed_at)} if resumed_at else {}
    return {**facts, "scalecv.ranks": str(ranks), **resumed}


@lru_cache(maxsize=1)
def code_hash() -> str:
    """First 16 digits of the SHA-256 over the modules of scalecv, as this process found them first."""
    top, sums = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(top.rglob("*.py")):
        data = file.read_bytes()
        sums.update(f"{file.relative_to(top).as_posix()} {len(data)}\n".encode() + data)
    return sums.hexdigest()[:16]


def _changes() -> str:
    """What the working directory has beyond its commit: a hash over changed files and new modules, and their names."""
    diff = _git("diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD") or ""
    names = (_git("diff", "--name-only", "-z", "HEAD") or "").split("\0")
    new = (_git("ls-files", "--others", "--exclude-standard", "--full-name", "-z", ":/*.py") or "").split("\0")
    top = Path((_git("rev-parse", "--show-toplevel") or ".").strip())
    sums = hashlib.sha256(diff.encode())
    for name in sorted(filter(None, new)):
        try:
            sums.update(name.encode() + hashlib.sha256((top / name).read_bytes()).digest())
        except OSError:
            sums.update(name.encode())
    changed = sorted(filter(None, [*names, *new]))
    if not changed:
        return "none"
    more = f" and {len(changed) - MOST_NAMES} more" if len(changed) > MOST_NAMES else ""
    return f"{sums.hexdigest()[:16]} in {', '.join(changed[:MOST_NAMES])}{more}"


def working_diff() -> str | None:
    """Changes of tracked files against the commit, at most 1 MB; None without a repository or changes."""
    diff = _git("diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD")
    if not diff:
        return None
    data = diff.encode()
    if len(data) <= MOST_DIFF_BYTES:
        return diff
    cut = data[:MOST_DIFF_BYTES].decode(errors="ignore")
    return f"{cut}\n… cut here, the whole diff has {len(data)} bytes\n"


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def cpu_model() -> str:
    """Name of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def gpus() -> list[str]:
    """Name and memory of each GPU that the driver shows, without importing torch."""
    return _nvidia("name,memory.total")


def _nvidia(fields: str) -> list[str]:
    """What the driver says of each GPU."""
    if not shutil.which("nvidia-smi"):
        return []
    asked = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    return [line.strip() for line in (_output(asked) or "").splitlines() if line.strip()]


def _git(*words: str) -> str | None:
    if not shutil.which("git"):
        return None
    return _output(["git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", *words])


def _output(command: list[str], timeout_s: float = 10.0) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout_s, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None
