"""JPEG without detours: libjpeg-turbo by simplejpeg, with the pixels that Pillow gives, bit for bit.

For bytes that `scalecv.shards.decode` has accepted once. What is out of the ordinary (CMYK, a turned picture, 12 bits,
odd sampling of colours, a torn colour profile, bytes that libjpeg warns about) is left to Pillow. A crop needs no row
below it: for the common sequential JPEG the height in the header of a copy is set to the rows that are needed, and
libjpeg-turbo stops there.
"""

import struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BROKEN = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, struct.error, OverflowError)
"""What Pillow's readers raise on damaged bytes."""
_ORIENTATION = 0x0112
_ROWS_BELOW = 2
"""Rows below the last one that colour is interpolated from."""
_SEQUENTIAL = (0xC0, 0xC1)
_PROGRESSIVE = 0xC2
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SAMPLINGS = (0x11, 0x21, 0x12, 0x22, 0x41, 0x14)
"""Pixels across and down that share a colour, four bits each; libjpeg-turbo's short way to pixels knows no others."""
_ICC = b"ICC_PROFILE\0"
_BARE = frozenset(range(0xD0, 0xD9)) | {0x01}
"""Markers without a length."""


class Header(NamedTuple):
    """What is needed to decode a JPEG."""

    height: int
    width: int
    channels: int
    """1 or 3."""
    height_at: int
    """Byte where the height stands; 0 where the picture cannot be cut."""


def header(data: bytes) -> Header | None:
    """The header of an ordinary JPEG; None for all else, which Pillow must look at."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    at, end, found = 2, len(data) - 9, None  # bytes of a frame after its marker
    profile: list[bytes] = []
    while at < end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _BARE or marker == 0xFF:
            at += 1 if marker == 0xFF else 2
            continue
        length = data[at + 2] << 8 | data[at + 3]
        if marker in _FRAMES:
            found = _frame(data, at, marker)
            if found is None:
                return None
        elif marker == 0xE1 and _is_turned(data[at + 4 : at + 2 + length]):
            return None
        elif marker == 0xE2 and data.startswith(_ICC, at + 4):
            profile.append(data[at + 16 : at + 2 + length])
        elif marker == 0xDA:
            if profile and not _is_whole(profile):
                return None
            if found is not None and data[at + 4] != found.channels:  # a scan for each channel
                return Header(found.height, found.width, found.channels, 0)
            return found
        at += 2 + length
    return None


def _frame(data: bytes, at: int, marker: int) -> Header | None:
    if marker not in (*_SEQUENTIAL, _PROGRESSIVE) or data[at + 4] != 8 or data[at + 9] not in (1, 3):
        return None
    height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
    if data[at + 9] == 3:
        sampling = data[at + 11 : at + 18 : 3]
        if sampling[1:] != b"\x11\x11" or sampling[0] not in _SAMPLINGS:
            return None
    return Header(height, width, data[at + 9], at + 5 if marker in _SEQUENTIAL else 0) if height and width else None


def _is_whole(profile: list[bytes]) -> bool:
    """Whether the parts of a colour profile, each with its number and how many there are, are all there."""
    wanted = [bytes([number, len(profile)]) for number in range(1, len(profile) + 1)]
    return sorted(part[:2] for part in profile) == wanted and any(len(part) > 2 for part in profile)


def _is_turned(segment: bytes) -> bool:
    """Whether an APP1 segment may ask for the picture to be turned."""
    if b"Orientation" in segment:  # in XMP
        return True
    if not segment.startswith(b"Exif") or (b"\x01\x12" not in segment and b"\x12\x01" not in segment):
        return False
    from PIL.Image import Exif

    exif = Exif()
    try:
        exif.load(segment)
        return bool(exif.get(_ORIENTATION, 1) != 1)
    except BROKEN:
        return True


def decode(
    data: bytes,
    known: Header,
    rows: int | None = None,
    memory: NDArray[Any] | None = None,
    *,
    is_exact: bool = True,
) -> NDArray[Any] | None:
    """The pixels of a JPEG.

    Args:
        data: the file.
        known: its header.
        rows: rows from the top that are needed; None needs all.
        memory: uint8, where the pixels may be written if there is room.
        is_exact: False takes a sixth less time for pixels that differ by some levels; warnings are the same.
    Returns: uint8 [H, W, C], writable, with at least the needed rows; None where libjpeg-turbo has something to say.
    """
    import simplejpeg

    color, is_cut = ("GRAY" if known.channels == 1 else "RGB"), False
    if rows is not None and known.height_at and rows + _ROWS_BELOW < known.height:
        height = (rows + _ROWS_BELOW).to_bytes(2, "big")
        data, is_cut = b"".join((data[: known.height_at], height, data[known.height_at + 2 :])), True
    try:
        has_room = memory is not None and memory.size >= known.height * known.width * known.channels
        # A cut picture is decoded with a warning about the rows that are left.
        pixels = simplejpeg.decode_jpeg(
            data,
            color,
            fastdct=not is_exact,
            fastupsample=not is_exact,
            strict=not is_cut,
            buffer=memory if has_room else None,
        )
    except ValueError:
        return None
    return np.asarray(pixels)
