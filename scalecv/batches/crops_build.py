"""How crops.c is compiled: at its first use on a machine, and once into a wheel that needs no compiler any more.

Nothing but the standard library, for `hatch_build.py` runs before anything is installed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("crops.c")
SHIPPED = Path(__file__).with_name("libcrops.so")
"""Where a wheel has the compiled library."""
COMPILE_S = 120.0


def missing() -> str:
    """What this machine lacks for having the library; empty where it has it, or can compile it."""
    if SHIPPED.exists():
        return ""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return "a C compiler"
    asked = [compiler, "-E", "-x", "c", "-include", "stdio.h", "-include", "jpeglib.h", os.devnull]
    return "libjpeg-turbo's headers" if subprocess.run(asked, capture_output=True, check=False).returncode else ""


def compile_crops(target: Path) -> None:
    """The library, whole or not at all; it runs on every processor of this kind of machine.

    Raises: FileNotFoundError: there is no compiler. subprocess.SubprocessError: it refuses, as it does without the
        headers of libjpeg-turbo.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise FileNotFoundError("there is no C compiler")
    strict = ["-Wl,-z,defs"] if sys.platform == "linux" else []
    options = ["-O3", "-ffp-contract=off", "-Werror=implicit-function-declaration", "-shared", "-fPIC", *strict]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder, target.name)
        command = [compiler, *options, str(SOURCE), "-o", str(made), "-ljpeg", "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["the compiler failed"]
            raise subprocess.SubprocessError(lines[0][:200])
        made.chmod(0o700)
        made.replace(target)
