"""A wheel brings the compiled crops with it, and what they are linked to; one that does not load is passed over."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from scalecv.batches import crops, crops_build
from scalecv.doctor import checks

ROOT = Path(__file__).parents[2]
needs_native = pytest.mark.skipif(crops.load() is None, reason=crops.state())
SAYS = """
import sys
from scalecv.batches import crops
print(crops.load() is not None, crops.__file__)
print(*{line.split()[-1] for line in open("/proc/self/maps") if "/batches/" in line and ".so" in line})
"""


def wheel(folder, kind):
    """A wheel of this checkout, as `make wheel` makes it."""
    plain, bins = folder / "plain", str(Path(sys.executable).parent)
    environment = os.environ | {"SCALECV_WHEEL": kind, "PATH": f"{bins}{os.pathsep}{os.environ['PATH']}"}
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(plain)]
    subprocess.run(build, cwd=ROOT, env=environment, check=True, capture_output=True)
    (made,) = plain.iterdir()
    if kind == "native":
        repair = ["auditwheel", "repair", "--lib-sdir", "/batches", "--wheel-dir", str(folder), str(made)]
        subprocess.run(repair, env=environment, check=True, capture_output=True)
        (made,) = folder.glob("*.whl")
    return made


@needs_native
def test_a_wheel_needs_no_compiler_and_no_library_of_the_system(tmp_path):
    made = wheel(tmp_path, "native")
    assert "-py3-none-manylinux" in made.name
    with zipfile.ZipFile(made) as files:
        names = files.namelist()
        files.extractall(tmp_path / "there")
    assert any(name.endswith("licenses/libjpeg-turbo") for name in names), "what is in a wheel, its licence is too"
    environment = {"PYTHONPATH": str(tmp_path / "there"), "CC": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SAYS], env=environment, cwd=tmp_path, check=True, capture_output=True, text=True
    )
    first, libraries = done.stdout.splitlines()
    assert first == f"True {tmp_path}/there/scalecv/batches/crops.py"
    assert {Path(name).name.partition("-")[0] for name in libraries.split()} == {"libcrops.so", "libjpeg"}


def test_what_a_machine_lacks_is_told(monkeypatch, tmp_path):
    (tmp_path / "no-headers").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "no-headers").chmod(0o755)
    for compiler, lacks in (("no-such-compiler", "a C compiler"), (tmp_path / "no-headers", "libjpeg-turbo's headers")):
        monkeypatch.setenv("CC", str(compiler))
        assert crops_build.missing() == lacks
        found = next(check for check in checks() if check.name == "jpeg")
        assert (found.ok, found.found) == (None, f"crops without native code, for want of {lacks}")
    monkeypatch.setattr(crops_build, "SHIPPED", tmp_path / "no-headers")
    assert crops_build.missing() == ""


def test_without_being_asked_a_wheel_is_pure_python(tmp_path):
    made = wheel(tmp_path, "")
    assert made.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(made) as files:
        assert [name for name in files.namelist() if "crops" in name] == [
            "scalecv/batches/crops.c",
            "scalecv/batches/crops.py",
            "scalecv/batches/crops_build.py",
        ]


@needs_native
def test_a_library_of_another_machine_is_passed_over(tmp_path, monkeypatch):
    shutil.copy(crops_build.SOURCE, tmp_path / "libcrops.so")
    monkeypatch.setattr(crops, "SHIPPED", tmp_path / "libcrops.so")
    crops.load.cache_clear()
    assert crops.load() is not None
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    crops.load.cache_clear()
    assert crops.load() is None
    crops.load.cache_clear()
