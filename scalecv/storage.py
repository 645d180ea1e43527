"""The one door to storage: local paths, s3://, gs:// and az:// behind the same few functions.

Reads state the size (and hash) they expect, writes are whole or absent, and retries are bounded by
total time, bodies that break off included. Credentials come from the environment alone.
"""

import contextlib
import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from scalecv import storage_local as local
from scalecv import storage_remote as remote
from scalecv.errors import IntegrityError, StorageDenied
from scalecv.storage_place import Entry, Place, place_of, without_secrets
from scalecv.storage_remote import Abandoned, abandon_when, abandoned

__all__ = [
    "Abandoned",
    "Entry",
    "abandon_when",
    "abandoned",
    "absolute",
    "check_writable",
    "delete",
    "delta_options",
    "exists",
    "get",
    "get_range",
    "head",
    "is_local",
    "join",
    "list_entries",
    "list_names",
    "put",
    "put_if_absent",
    "put_if_match",
    "without_secrets",
]

observer: Callable[[str, str, str], None] | None = None
"""Called as (moment, kind, uri) before and after each change of storage; moment is before or after, kind put,
put_if_absent, put_if_match or delete. For tests of faults (see scalecv.testing); what it raises ends the call."""


def absolute(uri: str) -> str:
    """The URI with a local path made absolute and without a trailing slash.

    Raises: UserError: a scheme other than s3, gs, az and file, or a URI without a bucket.
    """
    return place_of(uri).uri


def join(uri: str, *parts: str) -> str:
    """The URI below `uri` that `parts` name."""
    return "/".join([uri.rstrip("/"), *(p.strip("/") for p in parts)])


def is_local(uri: str) -> bool:
    """Whether the URI is a path of this machine."""
    return place_of(uri).is_local


def exists(uri: str) -> bool:
    """Whether an object is there."""
    return head(uri) is not None


def head(uri: str) -> Entry | None:
    """Size and etag of one object, or None where there is none."""
    place = place_of(uri)
    return local.head(place.path) if place.is_local else remote.head(place)


def get(uri: str, size_bytes: int | None = None, sha256: str | None = None) -> bytes:
    """The bytes of one object; a wrong size or hash is read once more before it counts as damage.

    Raises: FileNotFoundError: no such object. IntegrityError: other bytes than were recorded.
    """
    place, problem = place_of(uri), ""
    for _ in range(2):
        data = local.get(place.path) if place.is_local else remote.get(place)
        if size_bytes is not None and len(data) != size_bytes:
            problem = f"has {len(data)} bytes, {size_bytes} were written"
        elif sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            problem = f"does not have the sha256 {sha256[:12]}… it was written with"
        else:
            return data
    raise IntegrityError(f"{uri} {problem}: the object is damaged; restore it or write it again")


def get_range(uri: str, start: int, end: int, memory: memoryview | None = None) -> memoryview:
    """Bytes `start` to `end` (exclusive) of one object, not copied from where the client received them.

    Args:
        uri: the object.
        start, end: the range.
        memory: where a local file may be read into, if the range fits; then the answer lies there.

    Raises: FileNotFoundError: no such object. IntegrityError: the object ends before `end`.
    """
    place = place_of(uri)
    if place.is_local and memory is not None and end - start <= len(memory):
        data = memory[: local.read_into(place.path, start, memory[: end - start])]
    elif place.is_local:
        data = memoryview(local.get_range(place.path, start, end))
    else:
        data = memoryview(remote.get_range(place, start, end))
    if len(data) != end - start:
        raise IntegrityError(f"{uri} ends at byte {start + len(data)}, expected at least {end}: the object was cut")
    return data


def put(uri: str, data: bytes | memoryview) -> None:
    """Write one object, whole or not at all, over what was there.

    Raises: StorageError: no space, or no answer. StorageDenied: the place may not be written.
    """
    place = place_of(uri)
    with _observed("put", uri):
        local.put(place.path, data) if place.is_local else remote.put(place, data)


def put_if_absent(uri: str, data: bytes) -> bool:
    """Write one object only where there is none; False if there was one."""
    place = place_of(uri)
    with _observed("put_if_absent", uri):
        return local.put_if_absent(place.path, data) if place.is_local else remote.put_if_absent(place, data)


def put_if_match(uri: str, data: bytes, etag: str) -> bool:
    """Write over one object only while it still has `etag`; False if it changed."""
    place = place_of(uri)
    with _observed("put_if_match", uri):
        if place.is_local:
            return local.put_if_match(place.path, data, etag)
        return remote.put_if_match(place, data, etag)


def delete(uris: Iterable[str]) -> None:
    """Remove objects; those that are not there are no error."""
    todo = iter(uris)
    while batch := [place_of(uri) for uri in islice(todo, 500)]:
        buckets: dict[tuple[str, str], list[Place]] = {}
        for place in batch:
            if place.is_local:
                with _observed("delete", place.uri):
                    local.delete(place.path)
            else:
                buckets.setdefault((place.scheme, place.bucket), []).append(place)
        for places in buckets.values():
            with _observed("delete", places[0].uri):
                remote.delete(places)


def list_entries(uri: str) -> Iterator[Entry]:
    """The objects below a URI, streamed; local ones in the order an object store gives.

    Hidden files and folders (a name that starts with a dot) are left out.
    Raises: StorageDenied: the place does not exist or may not be read.
    """
    place = place_of(uri)
    yield from local.entries(place.path) if place.is_local else remote.entries(place)


def list_names(uri: str, limit: int | None = None) -> list[str]:
    """Names directly below a URI, folders included, sorted; empty where there is nothing.

    With `limit`, that many that come early, without looking at the rest: for a place that may hold millions.
    """
    place = place_of(uri)
    return local.names(place.path)[:limit] if place.is_local else remote.names(place, limit)


def check_writable(uri: str) -> None:
    """Write and remove a small object.

    Raises: StorageDenied: the place does not exist or may not be written. StorageError: it does not answer.
    """
    probe = place_of(join(uri, f".scalecv-{os.getpid()}-{random.getrandbits(48):x}"))
    try:
        if probe.is_local:
            local.put(probe.path, b"probe")
            local.delete(probe.path)
        else:
            remote.put(probe, b"probe", remote.START_GIVE_UP_S)
            remote.delete([probe])
    except OSError as error:
        raise StorageDenied(f"cannot write to {without_secrets(uri)}: {error.strerror or error}") from None


def delta_options(uri: str) -> dict[str, str]:
    """Storage options of `deltalake` for a URI; empty for a local path."""
    return remote.delta_options(place_of(uri))


@contextlib.contextmanager
def _observed(kind: str, uri: str) -> Iterator[None]:
    told = observer
    if told:
        told("before", kind, uri)
    yield
    if told:
        told("after", kind, uri)
