"""Our own C on top of libjpeg-turbo (crops.c, sums.c): where the library of it comes from, and whom it is kept from.

A wheel for this kind of machine has the library; else it is compiled once. Without a compiler or libjpeg-turbo's
headers (Debian: gcc, libjpeg-dev), or where it does not give, bit for bit, what other libraries give, these do the
work: the results are the same, later. SCALECV_NATIVE=0 leaves it to them.
"""

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from scalecv.cache import user_folder
from scalecv.jpeg.build import BUILD, SHIPPED, SOURCES, compile_native, source_mark

SWITCH = "SCALECV_NATIVE"
T = TypeVar("T")
_log = logging.getLogger("scalecv.native")


def is_off() -> bool:
    """Whether the user asked for other libraries."""
    return os.environ.get(SWITCH) == "0"


def find(wrap: Callable[[ctypes.CDLL], T], is_exact: Callable[[T], bool]) -> T | None:
    """Functions of the library, once they have shown that they give what they should; None where there are none.

    The first call ever may compile, some seconds.

    Args:
        wrap: takes the functions out of the library.
        is_exact: tries them.
    """
    if is_off():
        return None
    for place in (_shipped, _kept, _compiled):
        try:
            file = place()
            made = wrap(opened(file))
            if is_exact(made):
                return made
            _log.warning("%s gives other numbers than other libraries do on this machine: not used", file)
            if place is not _shipped:
                break  # another one would be made of the same libjpeg-turbo
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home folder
            _log.info("no native code: %s", error)
    return None


def opened(file: Path) -> ctypes.CDLL:
    """The library in a file; a call of its functions lets other threads run.

    Raises: OSError: it is none for this machine, or was made of other sources.
    """
    loaded = ctypes.CDLL(str(file))
    try:
        mark = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(loaded, "source")))
    except ValueError:
        mark = b""
    if mark.decode("ascii", "replace") != source_mark():
        raise OSError(f"{file} was not made of these {' and '.join(source.name for source in SOURCES)}")
    return loaded


def _shipped() -> Path:
    """The library that came with the package; that of another kind of machine does not load.

    Raises: FileNotFoundError: there is none.
    """
    if not SHIPPED.exists():
        raise FileNotFoundError(f"no {SHIPPED.name} came with the package")
    return SHIPPED


def kept_at() -> Path:
    """Where this user keeps the library for this system: a home folder can be shared by several."""
    try:
        release = platform.freedesktop_os_release()
        system = f"{release.get('ID')} {release.get('VERSION_ID')}"
    except OSError:
        system = platform.platform()
    about = source_mark().encode() + BUILD.read_bytes() + f"{platform.machine()} {system}".encode()
    return user_folder() / "native" / f"jpeg-{hashlib.sha256(about).hexdigest()[:32]}.so"


def _kept() -> Path:
    """The library that was compiled before.

    Raises: OSError: there is none, or it can be somebody else's.
    """
    return _own(kept_at())


def _compiled() -> Path:
    """The library, compiled now.

    Raises: OSError, subprocess.SubprocessError: no compiler, or it refuses.
    """
    target = kept_at()
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    compile_native(target)
    return _own(target)


def _own(file: Path) -> Path:
    """A file that nobody but this user can have written.

    Raises: PermissionError: it is somebody else's.
    """
    for place in (file, file.parent):
        found = place.stat()
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise PermissionError(f"{place} can be written by others: remove it")
    return file
