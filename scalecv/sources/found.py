"""What a source yields: one record per image that was found or left out, and no pixels."""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from scalecv.errors import ConfigError
from scalecv.schema import SPLITS

IMAGE_ENDINGS = ("png", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "dib", "tif", "tiff")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ODD = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
SPLIT_NAMES: Mapping[str, str] = {s: s for s in SPLITS} | {"valid": "val", "validation": "val"}
"""Folder or column value -> split."""


@dataclass(frozen=True, slots=True)
class Found:
    """One image in a source."""

    path: str
    """Below the source."""
    size_bytes: int
    etag: str
    label: str | None = None
    mask: str | None = None
    """Path of the mask below the source."""
    mask_size_bytes: int = 0
    mask_etag: str = ""
    group: str | None = None
    """What the split must keep together; None means the image stands alone."""
    split: str | None = None
    """As the source says; None leaves it to the split by hash."""
    meta: Mapping[str, str] = field(default_factory=dict)
    problem: str | None = None
    """Reason for which the image is set aside without being read: missing, no_label, no_mask; or REASON: DETAIL."""
    key: bytes | None = None
    """What rows are sorted by before they are cut into units; None takes the hash of the path."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """One thing that is there and is not taken."""

    path: str
    why: str


def odd(path: str) -> LeftOut | None:
    """What to say of a path that cannot be written down: not UTF-8, or with control characters; None of all others."""
    if not _ODD.search(path):
        return None
    shown = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return LeftOut(_CONTROL.sub("?", shown), "a name that is not UTF-8, or holds control characters: rename it")


def is_image(path: str) -> bool:
    """Whether the name ends like an image's."""
    _, dot, ending = path.rpartition(".")
    return bool(dot) and ending.lower() in IMAGE_ENDINGS


def split_named(name: str, also: Mapping[str, str] = SPLIT_NAMES) -> str | None:
    """The split that a folder or a column's value names; `also` holds names beside the usual ones."""
    return also.get(name.strip()) or SPLIT_NAMES.get(name.strip().lower())


def grouping(pattern: str | None) -> Callable[[str], str | None]:
    """A function from path to group: what the capture groups of a regular expression hold, joined by '/'.

    Raises: ConfigError: not a regular expression, or one without a capture group.
    """
    if pattern is None:
        return lambda path: None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--group {pattern!r} is not a regular expression: {error}") from None
    if not compiled.groups:
        raise ConfigError(f"--group {pattern} captures nothing: put the group's part in brackets, as in '/(\\d+)_'")

    def group(path: str) -> str | None:
        match = compiled.search(path)
        return "/".join(part or "" for part in match.groups()) if match else None

    return group


def share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / (1 << 48)
