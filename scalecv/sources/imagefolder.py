"""Folders that name classes: CLASS/x.jpg, or SPLIT/CLASS/x.jpg; images without any folder have no label."""

from collections.abc import Iterator, Mapping

from scalecv import storage
from scalecv.errors import DataError
from scalecv.sources.found import Found, LeftOut, grouping, is_image, odd, split_named


def imagefolder(
    uri: str, group: str | None = None, split_folders: Mapping[str, str] | None = None
) -> Iterator[Found | LeftOut]:
    """The images below `uri`, in the order of the listing.

    If some top folder is named like a split, the other top folders are left out. The class is the
    folder below the split, however deep the image lies.

    Args:
        uri: the source.
        group: regular expression whose capture groups, found in the path, name the group.
        split_folders: top folder -> split, beside the usual names.
    """
    group_of = grouping(group)
    tops = storage.list_names(uri)
    has_splits = any(split_named(name, split_folders or {}) for name in tops)
    others = [name for name in tops if not split_named(name, split_folders or {}) and "." not in name]
    filled: set[str] = set()
    folder, within = "", list[str]()
    for entry in storage.list_entries(uri):
        if strange := odd(entry.path):
            yield strange
            continue
        if folder != (folder := entry.path.rpartition("/")[0]):  # many files follow each other in the same
            within = folder.split("/") if folder else []
            filled.update("/".join(within[:depth]) for depth in (1, 2))  # folders, of which there are few
        folders = within
        if not is_image(entry.path):
            yield LeftOut(entry.path, "not an image by its name")
            continue
        split = None
        if has_splits:
            split = split_named(folders[0], split_folders or {}) if folders else None
            if split is None:
                top = folders[0] + "/" if folders else "the top folder"
                yield LeftOut(entry.path, f"{top} is none of train, val, test")
                continue
            folders = folders[1:]
            if not folders and others:
                top = entry.path.split("/")[0]
                raise DataError(
                    f"{storage.without_secrets(uri)}: images lie in {top}/ itself, beside {', '.join(others[:4])}: if "
                    "it is a class, put all classes below train/; if a split, put its classes in folders of their own"
                )
        yield Found(
            entry.path,
            entry.size_bytes,
            entry.etag,
            label=folders[0] if folders else None,
            group=group_of("/" + entry.path),
            split=split,
        )
    if storage.is_local(uri):  # an object store knows no folder without objects
        above = [top for top in tops if split_named(top, split_folders or {})] if has_splits else [""]
        below = ((top, name) for top in above for name in storage.list_names(storage.join(uri, top) if top else uri))
        for folder in (f"{top}/{name}" if top else name for top, name in below):
            if folder not in filled and "." not in folder:
                yield LeftOut(f"{folder}/", "an empty folder")
