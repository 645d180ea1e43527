"""Where a run comes from: code, packages and hardware, as short texts for tags."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "scalecv ray torch torchvision timm segmentation-models-pytorch mlflow pyarrow deltalake obstore pillow rasterio "
    "numpy safetensors pydantic"
).split()
MOST_DIFF_BYTES = 1 << 20


def run_facts() -> dict[str, str]:
    """Tags of a run: git commit and dirtiness of the working directory, package versions, CPU and GPUs."""
    facts = {
        "scalecv.python": platform.python_version(),
        "scalecv.platform": platform.platform(),
        "scalecv.cpu": cpu_model(),
        "scalecv.cpu_count": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "scalecv.gpu": ", ".join(gpus()) or "none",
    }
    for package, found in versions().items():
        facts[f"scalecv.version.{package}"] = found
    commit = _git("rev-parse", "HEAD")
    if commit:
        facts["mlflow.source.git.commit"] = commit.strip()
        facts["scalecv.git.dirty"] = "true" if (_git("status", "--porcelain") or "").strip() else "false"
    return facts


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
    if not shutil.which("nvidia-smi"):
        return []
    asked = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
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
