"""Scenes, window by window: a child process opens and decodes them, this one hands it the bytes that it asks for.

    here: storage ──range──▶ pipe ──▶ child: GDAL's blocks ──pixels──▶ pipe ──▶ here

So a scene of any size takes the memory of its windows, storage is read by ranges, and what decodes has no credentials
and may die. TIFF is read by blocks; other formats are decoded in full, once, within the limits of `decode`.
"""

import contextlib
import io
import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from scalecv import raster, storage
from scalecv.errors import IntegrityError
from scalecv.raster import PIXELS, Profile
from scalecv.shards.child import Child, Died, allow, reply, serving
from scalecv.shards.decode import REASONS, TIFF, BadImage, Reason, class_numbers, decode_image, decode_mask
from scalecv.tiles import Window

TIMEOUT_S = 120.0
"""For one window."""
SPARE_S = 30.0
"""CPU time of a window beyond that, after which a child without a parent ends."""
MOST_BLOCK_BYTES = 256 << 20
_CHUNK = 2 << 20
_CHUNKS = 16


class SceneReader:
    """Reads one scene at a time in a child process; it is started on first use and again after it died."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._child = Child("scalecv.shards.scene:serve")
        self._timeout_s = timeout_s
        self._open: tuple[str, int, bool] | None = None
        self.is_raster = False
        """Whether the open scene is a TIFF."""

    def open(self, uri: str, size_bytes: int, is_mask: bool = False) -> Profile:
        """What the header of a scene says.

        Args:
            uri: the scene.
            size_bytes: of the object.
            is_mask: whether its numbers are classes; windows are then [h, w].

        Raises: BadImage: it cannot be read, or not by windows. StorageError: storage fails.
        """
        with self._turn():
            answer = self._asked({"open": size_bytes, "mask": is_mask}, uri, size_bytes)
            found = _refusal(answer) or _profile(answer["profile"])
        if isinstance(found, BadImage):
            raise found
        self.is_raster = bool(answer["is_raster"])
        self._open = (uri, size_bytes, is_mask)
        return found

    def read(self, window: Window) -> NDArray[Any]:
        """Pixels [h, w, C] of the open scene, or numbers [h, w] of a mask.

        Raises: BadImage: they are damaged, or decoding them killed the child; the scene stays open.
        """
        opened = cast("tuple[str, int, bool]", self._open)
        if self._child.process is None:
            self.open(*opened)
        with self._turn():
            answer = self._asked({"read": str(window)}, *opened[:2])
            found = _refusal(answer)
            if found is None:
                height, width, *bands = map(int, answer["shape"])
                dtype = np.dtype(str(answer["dtype"]))
                if (height, width) != (window.height, window.width) or dtype.kind not in "uif" or min([1, *bands]) < 1:
                    raise ValueError
                size_bytes = height * width * math.prod(bands) * dtype.itemsize
                pixels = np.frombuffer(self._child.read(size_bytes, self._timeout_s), dtype)
        if found is not None:
            raise found
        return pixels.reshape((height, width, *bands))

    def close(self) -> None:
        """End the child."""
        self._child.close()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """A question to the child, whose end in any other way is the scene's."""
        try:
            with self._child.turn():
                yield
        except Died as error:
            raise BadImage("decoder_died", f"the decoder {error}") from None
        except TimeoutError:
            raise BadImage("timeout", f"not decoded after {self._timeout_s:g} s") from None
        except (FileNotFoundError, IntegrityError, PermissionError) as error:
            raise BadImage("unreadable", str(error)) from None

    def _asked(self, request: Mapping[str, Any], uri: str, size_bytes: int) -> dict[str, Any]:
        self._child.send(request, (), self._timeout_s)
        while "want" in (answer := self._child.answer(self._timeout_s)):
            start, end = map(int, answer["want"])
            if not 0 <= start < end <= size_bytes:
                raise ValueError
            self._child.send({}, [_range(uri, start, end)], self._timeout_s)
        return answer


def _range(uri: str, start: int, end: int) -> memoryview:
    return storage.get_range(uri, start, end)


def _refusal(answer: Mapping[str, Any]) -> BadImage | None:
    if "reason" not in answer:
        return None
    reason = answer["reason"] if answer["reason"] in REASONS else "damaged"
    return BadImage(cast("Reason", reason), str(answer["detail"]))


def _profile(told: Mapping[str, Any]) -> Profile:
    return Profile(**{**told, **{name: tuple(told[name]) for name in ("transform", "block_px", "names")}})


class _Wanted(io.RawIOBase):
    """The child's view of a scene: a file whose bytes are asked for, some chunks of it kept."""

    def __init__(self, size_bytes: int, ask: Callable[[int, int], bytes]) -> None:
        self._size, self._ask, self._at = size_bytes, ask, 0
        self._chunks: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        """It can be read."""
        return True

    def seekable(self) -> bool:
        """At any place."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        """The place."""
        return self._at

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        end = self._size if size < 0 else min(self._size, self._at + size)
        parts, at = [], self._at
        while at < end:
            number, skip = divmod(at, _CHUNK)
            part = self._chunk(number)[skip : skip + end - at]
            parts.append(part)
            at += len(part)
        self._at = at
        return b"".join(parts)

    def _chunk(self, number: int) -> bytes:
        if number not in self._chunks:
            self._chunks[number] = self._ask(number * _CHUNK, min(self._size, (number + 1) * _CHUNK))
            if len(self._chunks) > _CHUNKS:
                self._chunks.popitem(last=False)
        self._chunks.move_to_end(number)
        return self._chunks[number]


@dataclass(frozen=True)
class _Opened:
    """A scene in the child."""

    profile: Profile
    window: Callable[[Window], NDArray[Any]]
    close: Callable[[], None]
    is_raster: bool


def serve() -> None:
    """The child's end: answers until its input ends."""
    source, target = serving()
    opened: _Opened | None = None
    while line := source.readline():
        head = json.loads(line)
        allow(TIMEOUT_S + SPARE_S)
        answer: dict[str, Any]
        data: Any = b""
        try:
            if "open" in head:
                if opened is not None:
                    opened.close()
                opened = _opened(int(head["open"]), bool(head["mask"]), source, target)
                answer = {"profile": opened.profile.__dict__, "is_raster": opened.is_raster}
            else:
                pixels = np.ascontiguousarray(cast("_Opened", opened).window(Window.parse(head["read"])))
                answer, data = {"shape": pixels.shape, "dtype": pixels.dtype.str}, pixels.data.cast("B")
        except BadImage as error:
            answer = {"reason": error.reason, "detail": error.detail}
        except MemoryError:
            answer = {"reason": "too_large", "detail": "does not fit into memory"}
        except Exception as error:  # whatever a decoder raises is about this scene, and must not stop the others
            answer = {"reason": "damaged", "detail": f"{type(error).__name__}: {error}"[:200]}
        reply(target, answer, data)


def _opened(size_bytes: int, is_mask: bool, source: IO[bytes], target: IO[bytes]) -> _Opened:
    if not size_bytes:
        raise BadImage("empty", "0 bytes")

    def ask(start: int, end: int) -> bytes:
        reply(target, {"want": [start, end]})
        source.readline()
        return source.read(end - start)

    first = ask(0, min(size_bytes, 64))
    if first.startswith(TIFF):
        return _tiff(size_bytes, is_mask, ask)
    data = ask(0, size_bytes)
    nodata, names = None, ()
    pixels = decode_mask(data)[:, :, None] if is_mask else decode_image(data).pixels
    height, width, bands = pixels.shape
    found = Profile(width, height, bands, str(pixels.dtype), nodata, None, PIXELS, None, (width, height), names)

    def window(w: Window) -> NDArray[Any]:
        part = pixels[w.row : w.row + w.height, w.col : w.col + w.width]
        return part[..., 0] if is_mask else part

    return _Opened(found, window, lambda: None, False)


def _tiff(size_bytes: int, is_mask: bool, ask: Callable[[int, int], bytes]) -> _Opened:
    stack = contextlib.ExitStack()
    try:
        file = lambda: cast("Any", _Wanted(size_bytes, ask))  # noqa: E731
        scene = stack.enter_context(raster.open_scene(file))
    except raster.RasterError as error:
        said = str(error).splitlines()[0][:200]
        raise BadImage("unsupported" if "different dtypes" in said else "damaged", said) from None
    found = scene.profile
    _check(found)

    def window(w: Window) -> NDArray[Any]:
        try:
            pixels = scene.read(w)
        except raster.RasterError as error:
            raise BadImage("damaged", str(error).splitlines()[0][:200]) from None
        return class_numbers(pixels) if is_mask else pixels

    return _Opened(found, window, stack.close, True)


def _check(found: Profile) -> None:
    """Raises: BadImage: pixels of a kind that is not read, or that come in pieces too large for memory."""
    kind = np.dtype(found.dtype)
    if kind.kind not in "uif":
        raise BadImage("unsupported", f"pixels of dtype {found.dtype}")
    width, height = found.block_px
    if width * height * found.bands * kind.itemsize > MOST_BLOCK_BYTES:
        raise BadImage(
            "too_large",
            f"blocks of {width}x{height} px with {found.bands} bands cannot be read by windows: write it anew with "
            "blocks, as gdal_translate -co TILED=YES does",
        )
