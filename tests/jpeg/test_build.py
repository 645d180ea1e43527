"""A wheel brings our compiled C with it, and what they are linked to; one that does not load is passed over."""

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from scalecv import doctor
from scalecv.batches import crops
from scalecv.jpeg import build, native

ROOT = Path(__file__).parents[2]
needs_native = pytest.mark.skipif(crops.load() is None, reason=crops.state())
needs_builder = pytest.mark.skipif(
    build.missing() != ""
    or platform.libc_ver()[0] != "glibc"
    or not any(Path(file).exists() for file in runpy.run_path(str(ROOT / "hatch_build.py"))["LICENCES"]),
    reason="a wheel is built with glibc, a compiler, and libjpeg-turbo with its headers and its licence",
)


@pytest.fixture(autouse=True)
def anew():
    """The choice is made anew, and once more after the test."""
    crops.load.cache_clear()
    yield
    crops.load.cache_clear()


SAYS = """
import sys
from scalecv import doctor
from scalecv.batches import crops
print(crops.load() is not None, crops.__file__)
print(*{line.split()[-1] for line in open("/proc/self/maps") if "/jpeg/" in line and ".so" in line})
"""


def wheel(folder, kind, root=ROOT):
    """A wheel of this checkout, as `make wheel` makes it."""
    plain, bins = folder / "plain", str(Path(sys.executable).parent)
    environment = os.environ | {"SCALECV_WHEEL": kind, "PATH": f"{bins}{os.pathsep}{os.environ['PATH']}"}
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(plain)]
    subprocess.run(build, cwd=root, env=environment, check=True, capture_output=True)
    (made,) = plain.iterdir()
    if kind == "native":
        repair = ["auditwheel", "repair", "--lib-sdir", "/jpeg", "--wheel-dir", str(folder), str(made)]
        subprocess.run(repair, env=environment, check=True, capture_output=True)
        (made,) = folder.glob("*.whl")
    return made


@needs_builder
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
    assert {Path(name).name.partition("-")[0] for name in libraries.split()} == {"libnative.so", "libjpeg"}


def test_what_a_machine_lacks_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "no-headers").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "no-headers").chmod(0o755)
    for compiler, lacks in (("no-such-compiler", "a C compiler"), (tmp_path / "no-headers", "libjpeg-turbo's headers")):
        monkeypatch.setenv("CC", str(compiler))
        assert build.missing() == lacks
        crops.load.cache_clear()
        told = f"crops without native code, for want of {lacks} (Debian: gcc libjpeg-dev): twice the time"
        found = doctor._jpeg()
        assert (found.ok, found.found) == (None, told)


def test_without_being_asked_a_wheel_is_pure_python_and_the_image_of_a_node_has_all_that_it_needs(tmp_path):
    copied = re.findall(r"^COPY (.+) \./", (ROOT / "cluster/Dockerfile").read_text(), re.MULTILINE)
    for name in " ".join(copied).split():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns(build.SHIPPED.name))
        else:
            shutil.copy(ROOT / name, tmp_path)
    made = wheel(tmp_path / "dist", "", tmp_path)
    assert made.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(made) as files:
        assert {Path(name).suffix for name in files.namelist() if name.startswith("scalecv/jpeg/")} == {".c", ".py"}


@needs_native
def test_a_library_of_another_machine_is_passed_over(tmp_path, monkeypatch):
    shutil.copy(build.SOURCES[0], tmp_path / "libnative.so")
    monkeypatch.setattr(native, "SHIPPED", tmp_path / "libnative.so")
    assert crops.load() is not None
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    crops.load.cache_clear()
    assert crops.load() is None


def changed(monkeypatch, folder, library, mark, old="", new=""):
    """A library of a changed crops.c, marked as it is told."""
    crops_c, *others = build.SOURCES
    source = folder / "changed.c"
    source.write_text(crops_c.read_text().replace(old, new))
    with monkeypatch.context() as patched:
        patched.setattr(build, "SOURCES", (source, *others))
        patched.setattr(build, "source_mark", lambda: mark)
        build.compile_native(library, "-DPLAIN")


@needs_builder
def test_a_library_of_another_source_is_passed_over(tmp_path, monkeypatch):
    for number, mark in enumerate((build.source_mark(), "another", "")):
        library = tmp_path / f"{number}.so"
        changed(monkeypatch, tmp_path, library, mark)
        if number == 0:
            native.opened(library)
            continue
        with pytest.raises(OSError, match=r"was not made of these crops\.c and sums\.c"):
            native.opened(library)
    subprocess.run(["cc", "-shared", "-x", "c", "/dev/null", "-o", str(tmp_path / "empty.so")], check=True)
    with pytest.raises(OSError, match=r"was not made of these crops\.c and sums\.c"):
        native.opened(tmp_path / "empty.so")


@needs_builder
def test_one_in_the_cache_that_does_not_load_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = native.kept_at()
    place.parent.mkdir(parents=True, mode=0o700)
    place.write_bytes(b"not a library")
    place.chmod(0o700)
    assert crops.load() is not None


@needs_builder
def test_a_library_that_gives_other_pixels_is_not_used(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = tmp_path / "libnative.so"
    changed(monkeypatch, tmp_path, library, build.source_mark(), "sum >>= bits;", "sum = (sum >> bits) ^ 1;")
    monkeypatch.setattr(native, "SHIPPED", library)
    assert crops.load() is not None, "then it is compiled"
    assert f"{library} gives other numbers" in caplog.text
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    native.kept_at().parent.mkdir(parents=True, mode=0o700)
    library.replace(native.kept_at())
    crops.load.cache_clear()
    assert crops.load() is None and "gives other pixels" in crops.state()
