"""Crops of JPEG files by our own C (crops.c): the same pixels, sooner.

Of a file only the crop's part becomes pixels, and a run of files is one call, during which other threads run. A wheel
for this kind of machine has the library; else it is compiled once. Without a compiler or libjpeg-turbo's
headers (Debian: gcc, libjpeg-dev), or where a picture made here would differ in one bit, other libraries do it:
`scalecv.batches.collate` gives the same either way. SCALECV_NATIVE=0 leaves it to them.
"""

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scalecv.batches import transforms
from scalecv.batches.crops_build import BUILD, SHIPPED, SOURCE, compile_crops, missing, source_mark
from scalecv.cache import user_folder
from scalecv.shards import jpeg

SWITCH = "SCALECV_NATIVE"
Job = tuple[bytes, transforms.Box, int, int]
"""An encoded picture, the box to take, flips (1: left-right, 2: up-down), and the address where it goes: height, width,
channel in memory."""
_log = logging.getLogger("scalecv.crops")


class Crops:
    """The compiled functions."""

    def __init__(self, library: Path) -> None:
        """Raises: OSError: not a library for this machine, or of another crops.c."""
        loaded = ctypes.CDLL(str(library))  # a call lets other threads run
        try:
            mark = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(loaded, "source")))
        except ValueError:
            mark = b""
        if mark.decode("ascii", "replace") != source_mark():
            raise OSError(f"{library} was not made of this {SOURCE.name}")
        self._crop, self._room = loaded.crop_images, loaded.room
        pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
        self._crop.argtypes = [number, pointer, pointer, pointer, number, pointer, pointer, size, pointer]
        self._crop.restype = None
        self._room.argtypes, self._room.restype = [number] * 4, size

    def room(self, known: jpeg.Header, box: transforms.Box, side: int) -> int:
        """Bytes of memory that one picture takes."""
        return int(self._room(known.width, box[2], box[3], side))

    def __call__(self, jobs: Sequence[Job], side: int, memory: np.ndarray) -> np.ndarray:
        """Decode, cut, resize and flip pictures into their places; bool [N], False where one was left alone.

        Args:
            jobs: pictures.
            side: of each of them as it is to be.
            memory: uint8, of this thread, with room for each of them.
        """
        data = (ctypes.c_char_p * len(jobs))(*[job[0] for job in jobs])
        sizes = np.array([len(job[0]) for job in jobs], np.uintp)
        boxes = np.array([(*job[1], job[2]) for job in jobs], np.int32)
        places = np.array([job[3] for job in jobs], np.uintp)
        left = np.empty(len(jobs), np.uint8)
        self._crop(
            len(jobs), ctypes.addressof(data), sizes.ctypes.data, boxes.ctypes.data, side, places.ctypes.data,
            memory.ctypes.data, memory.size, left.ctypes.data,
        )  # fmt: skip
        return np.asarray(left == 0)


@lru_cache(maxsize=1)
def load() -> Crops | None:
    """What makes crops on this machine; None where it cannot. The first call ever may compile, some seconds."""
    if os.environ.get(SWITCH) == "0":
        return None
    for library in (_shipped, _kept, _compiled):
        try:
            made = Crops(library())
            if _is_exact(made):
                return made
            _log.warning("%s gives other pixels than simplejpeg and torch on this machine: not used", library())
            if library is not _shipped:
                break  # another one would be made of the same libjpeg-turbo
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home folder
            _log.info("no native crops: %s", error)
    return None


def state() -> str:
    """One line on who makes crops here."""
    if load() is not None:
        return "native crops of JPEGs"
    if os.environ.get(SWITCH) == "0":
        return f"crops without native code, for {SWITCH}=0"
    lacks = missing()
    why = (
        f", for want of {lacks} (Debian: gcc libjpeg-dev): twice the time"
        if lacks
        else ": it does not compile or load here, or gives other pixels"
    )
    return f"crops without native code{why}"


def _shipped() -> Path:
    """The library that came with the package; that of another kind of machine does not load.

    Raises: FileNotFoundError: there is none.
    """
    if not SHIPPED.exists():
        raise FileNotFoundError(f"no {SHIPPED.name} came with the package")
    return SHIPPED


def _place() -> Path:
    """Where this user keeps the library for this system: a home folder can be shared by several."""
    try:
        release = platform.freedesktop_os_release()
        system = f"{release.get('ID')} {release.get('VERSION_ID')}"
    except OSError:
        system = platform.platform()
    about = SOURCE.read_bytes() + BUILD.read_bytes() + f"{platform.machine()} {system}".encode()
    return user_folder() / "native" / f"crops-{hashlib.sha256(about).hexdigest()[:32]}.so"


def _kept() -> Path:
    """The library that was compiled before.

    Raises: OSError: there is none, or it can be somebody else's.
    """
    return _own(_place())


def _compiled() -> Path:
    """The library, compiled now.

    Raises: OSError, subprocess.SubprocessError: no compiler, or it refuses.
    """
    target = _place()
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    compile_crops(target)
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


def _is_exact(made: Crops) -> bool:
    """Whether a picture comes out as by simplejpeg and torch."""
    import simplejpeg

    rng = np.random.default_rng(0)
    noise = np.repeat(np.repeat(rng.integers(0, 256, (12, 14, 3), np.uint8), 7, 0), 7, 1)
    box: transforms.Box = (9, 21, 61, 70)
    for sampling, side in (("444", 32), ("422", 96), ("420", 32), ("440", 96), ("411", 32)):
        data = simplejpeg.encode_jpeg(noise, quality=85, colorsubsampling=sampling)
        known: Any = jpeg.header(data)
        out = torch.empty((side, side, 3), dtype=torch.uint8).permute(2, 0, 1)
        done = made([(data, box, 1, out.data_ptr())], side, np.empty(made.room(known, box, side), np.uint8))
        whole = torch.from_numpy(jpeg.decode(data, known)).permute(2, 0, 1)
        cut = whole[:, box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
        if not done[0] or not torch.equal(out, transforms.scaled(cut, side, side).flip(-1)):
            return False
    return True
