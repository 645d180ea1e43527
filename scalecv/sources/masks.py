"""Images and masks by the same name: [SPLIT/]images/NAME.ext beside [SPLIT/]masks/NAME.ext.

The two listings are joined on disk (an SQLite file without a name), so memory stays flat.
"""

import contextlib
import sqlite3
from collections.abc import Callable, Iterator, Mapping

from scalecv import storage
from scalecv.errors import DataError
from scalecv.sources.found import Found, LeftOut, grouping, is_image, odd, split_named

IMAGE_FOLDERS = ("images", "image", "imgs", "img")
MASK_FOLDERS = ("masks", "mask", "labels", "label", "annotations")


def masks(
    uri: str, group: str | None = None, split_folders: Mapping[str, str] | None = None
) -> Iterator[Found | LeftOut]:
    """The images below `uri` with their masks; an image without one has the problem no_mask.

    Args:
        uri: the source.
        group: regular expression whose capture groups, found in the image's path, name the group.
        split_folders: top folder -> split, beside the usual names.

    Raises: DataError: no folders of images and masks.
    """
    group_of = grouping(group)
    tops = storage.list_names(uri)
    if _pick(tops, IMAGE_FOLDERS):
        yield from _pairs(uri, "", None, group_of)
        return
    places = [(name, split_named(name, split_folders or {})) for name in tops]
    if not any(split for _, split in places):
        raise DataError(
            f"{storage.without_secrets(uri)} holds {', '.join(tops[:8]) or 'nothing'}; layout masks expects "
            "images/ and masks/, or these below train/, val/ and test/"
        )
    for name, split in places:
        if split:
            yield from _pairs(uri, name + "/", split, group_of)
        else:
            yield LeftOut(name, "not an image by its name" if "." in name else f"{name}/ is none of train, val, test")


def _pairs(
    uri: str, prefix: str, split: str | None, group_of: Callable[[str], str | None]
) -> Iterator[Found | LeftOut]:
    names = storage.list_names(storage.join(uri, prefix)) if prefix else storage.list_names(uri)
    image_folder, mask_folder = _pick(names, IMAGE_FOLDERS), _pick(names, MASK_FOLDERS)
    if not image_folder or not mask_folder:
        raise DataError(
            f"{storage.without_secrets(storage.join(uri, prefix))} holds {', '.join(names[:8]) or 'nothing'}; "
            "layout masks expects images/ and masks/"
        )
    for name in names:
        if name not in (image_folder, mask_folder):
            yield LeftOut(
                prefix + name, "not an image by its name" if "." in name else f"{name} lies beside images/ and masks/"
            )
    with contextlib.closing(sqlite3.connect("")) as table:
        table.execute("PRAGMA journal_mode=OFF")
        table.execute("CREATE TABLE mask (stem TEXT PRIMARY KEY, path TEXT, size INT, etag TEXT) WITHOUT ROWID")
        for entry in storage.list_entries(storage.join(uri, prefix + mask_folder)):
            if is_image(entry.path) and not odd(entry.path):
                row = (_stem(entry.path), f"{prefix}{mask_folder}/{entry.path}", entry.size_bytes, entry.etag)
                try:
                    table.execute("INSERT INTO mask VALUES (?, ?, ?, ?)", row)
                except sqlite3.IntegrityError:
                    raise DataError(
                        f"two masks are named {row[0]}, such as {row[1]}: keep one for each image"
                    ) from None
        for entry in storage.list_entries(storage.join(uri, prefix + image_folder)):
            path = f"{prefix}{image_folder}/{entry.path}"
            if strange := odd(path):
                yield strange
                continue
            if not is_image(path):
                yield LeftOut(path, "not an image by its name")
                continue
            mask = table.execute("SELECT path, size, etag FROM mask WHERE stem = ?", (_stem(entry.path),)).fetchone()
            mask_path, mask_size, mask_etag = mask or (None, 0, "")
            yield Found(
                path,
                entry.size_bytes,
                entry.etag,
                mask=mask_path,
                mask_size_bytes=mask_size,
                mask_etag=mask_etag,
                group=group_of("/" + path),
                split=split,
                problem=None if mask else "no_mask",
            )


def _stem(path: str) -> str:
    return path.rpartition(".")[0]


def _pick(names: list[str], known: tuple[str, ...]) -> str | None:
    by_lower = {name.lower(): name for name in names}
    return next((by_lower[k] for k in known if k in by_lower), None)
