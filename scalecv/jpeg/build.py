"""How crops.c and sums.c are compiled: at their first use on a machine, and once into a wheel that needs no compiler.

Nothing but the standard library, for `hatch_build.py` runs before anything is installed.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = tuple(Path(__file__).with_name(name) for name in ("crops.c", "sums.c"))
BUILD = Path(__file__)
SHIPPED = Path(__file__).with_name("libnative.so")
"""Where a wheel has the compiled library."""
COMPILE_S = 60.0
LOOK_S = 10.0


def source_mark() -> str:
    """What a library has to be marked with: that of other sources may take its arguments in another way."""
    return hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES)).hexdigest()[:32]


def missing() -> str:
    """What this machine lacks for compiling the library; empty where that should work."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return "a C compiler"
    asked = [compiler, "-E", "-x", "c", "-include", "stdio.h", "-include", "jpeglib.h", os.devnull]
    try:
        done = subprocess.run(asked, capture_output=True, check=False, timeout=LOOK_S)
    except (OSError, subprocess.TimeoutExpired):
        return "a C compiler that answers"
    return "libjpeg-turbo's headers" if done.returncode else ""


def compile_native(target: Path, *more: str) -> None:
    """The library, whole or not at all; it runs on every processor of this kind of machine.

    Args:
        target: where it belongs.
        more: options of the compiler.
    Raises: FileNotFoundError: there is no compiler. subprocess.SubprocessError: it refuses, as it does without the
        headers of libjpeg-turbo.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise FileNotFoundError("there is no C compiler")
    strict = ["-Wl,-z,defs"] if sys.platform == "linux" else []
    options = ["-O3", "-ffp-contract=off", "-Werror=implicit-function-declaration", "-shared", "-fPIC", *strict, *more]
    options.append(f'-DSOURCE="{source_mark()}"')
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder, target.name)
        command = [compiler, *options, *map(str, SOURCES), "-o", str(made), "-ljpeg", "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILE_S, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["the compiler failed"]
            raise subprocess.SubprocessError(lines[0][:200])
        made.chmod(0o700)
        with made.open("rb") as file:
            os.fsync(file.fileno())  # what a power cut leaves of a library ends whoever loads it
        made.replace(target)
