"""The one door to storage: local paths, s3://, gs:// and az:// behind the same few functions.

Reads state the size (and hash) they expect, writes are whole or absent, and retries are bounded by
total time, bodies that break off included. Credentials come from the environment alone.
"""

import contextlib
import errno
import hashlib
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from stat import S_ISREG
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from scalecv.errors import IntegrityError, StorageDenied, StorageError, UserError

SCHEMES = ("s3", "gs", "az", "file")
GIVE_UP_AFTER_S = 60.0

T = TypeVar("T")
_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


@dataclass(frozen=True)
class Entry:
    """One object: its path below what was listed, and what the store says of it."""

    path: str
    size_bytes: int
    etag: str


@dataclass(frozen=True)
class _Place:
    scheme: str
    bucket: str
    path: str


def absolute(uri: str) -> str:
    """The URI with a local path made absolute and without a trailing slash.

    Raises: UserError: a scheme other than s3, gs, az and file, or a URI without a bucket.
    """
    place = _place(uri)
    if place.scheme == "file":
        return place.path
    return f"{place.scheme}://{place.bucket}/{place.path}".rstrip("/")


def join(uri: str, *parts: str) -> str:
    """The URI below `uri` that `parts` name."""
    return "/".join([uri.rstrip("/"), *(p.strip("/") for p in parts)])


def is_local(uri: str) -> bool:
    """Whether the URI is a path of this machine."""
    return _place(uri).scheme == "file"


def without_secrets(uri: str) -> str:
    """The URI without user, password, query and fragment, fit for logs."""
    parts = urlsplit(uri)
    if not parts.scheme or not parts.netloc:
        return uri
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def exists(uri: str) -> bool:
    """Whether an object is there."""
    return head(uri) is not None


def head(uri: str) -> Entry | None:
    """Size and etag of one object, or None where there is none."""
    place = _place(uri)
    if place.scheme == "file":
        try:
            stat = os.stat(place.path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Entry(os.path.basename(place.path), stat.st_size, _local_etag(stat)) if S_ISREG(stat.st_mode) else None
    import obstore

    try:
        meta = _persist(uri, lambda: obstore.head(_store(place.scheme, place.bucket), place.path))
    except FileNotFoundError:
        return None
    return Entry(place.path.rpartition("/")[2], meta["size"], meta["e_tag"] or "")


def get(uri: str, size_bytes: int | None = None, sha256: str | None = None) -> bytes:
    """The bytes of one object; a wrong size or hash is read once more before it counts as damage.

    Raises: FileNotFoundError: no such object. IntegrityError: other bytes than were recorded.
    """
    problem = ""
    for _ in range(2):
        data = _get(uri)
        if size_bytes is not None and len(data) != size_bytes:
            problem = f"has {len(data)} bytes, {size_bytes} were written"
        elif sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            problem = f"does not have the sha256 {sha256[:12]}… it was written with"
        else:
            return data
    raise IntegrityError(f"{uri} {problem}: the object is damaged; restore it or write it again")


def get_range(uri: str, start: int, end: int) -> bytes:
    """Bytes `start` to `end` (exclusive) of one object.

    Raises: FileNotFoundError: no such object. IntegrityError: the object ends before `end`.
    """
    place = _place(uri)
    if place.scheme == "file":
        with open(place.path, "rb") as file:
            data = os.pread(file.fileno(), end - start, start)
    else:
        import obstore

        store = _store(place.scheme, place.bucket)

        def whole(got: bytes) -> bool:
            if len(got) == end - start:
                return True
            entry = head(uri)  # a body that broke off is tried again, an object that ends here is not
            return entry is not None and entry.size_bytes < end

        data = _persist(uri, lambda: bytes(obstore.get_range(store, place.path, start=start, end=end)), whole)
    if len(data) != end - start:
        raise IntegrityError(f"{uri} ends at byte {start + len(data)}, expected at least {end}: the object was cut")
    return data


def put(uri: str, data: bytes | memoryview) -> None:
    """Write one object, whole or not at all, over what was there."""
    place = _place(uri)
    if place.scheme == "file":
        with _local_part(place.path, data) as part:
            os.replace(part, place.path)
        return
    import obstore

    body = obstore.Bytes(data)
    _persist(
        uri,
        lambda: obstore.put(_store(place.scheme, place.bucket), place.path, body, use_multipart=len(body) > 64 << 20),
    )


def put_if_absent(uri: str, data: bytes) -> bool:
    """Write one object only where there is none; False if there was one."""
    place = _place(uri)
    if place.scheme == "file":
        with _local_part(place.path, data) as part:
            try:
                os.link(part, place.path)
            except FileExistsError:
                return False
        return True
    import obstore

    store = _store(place.scheme, place.bucket)
    try:
        _persist(uri, lambda: obstore.put(store, place.path, data, mode="create"))
    except obstore.exceptions.AlreadyExistsError:
        # A retry after a lost answer meets our own object: the same bytes are ours (claims carry a nonce).
        return _get(uri) == data
    return True


def put_if_match(uri: str, data: bytes, etag: str) -> bool:
    """Write over one object only while it still has `etag`; False if it changed."""
    place = _place(uri)
    if place.scheme == "file":
        from filelock import FileLock

        with FileLock(place.path + ".lock"):
            now = head(uri)
            if now is None or now.etag != etag:
                return False
            put(uri, data)
        return True
    import obstore

    store = _store(place.scheme, place.bucket)
    try:
        _persist(uri, lambda: obstore.put(store, place.path, data, mode={"e_tag": etag}))
    except obstore.exceptions.PreconditionError:
        return False
    return True


def delete(uris: Iterable[str]) -> None:
    """Remove objects; those that are not there are no error."""
    todo = iter(uris)
    while batch := list(islice(todo, 500)):
        remote: dict[tuple[str, str], list[str]] = {}
        for place in map(_place, batch):
            if place.scheme == "file":
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(place.path)
                with contextlib.suppress(OSError):
                    os.rmdir(os.path.dirname(place.path))  # only an empty folder goes
            else:
                remote.setdefault((place.scheme, place.bucket), []).append(place.path)
        for (scheme, bucket), paths in remote.items():
            import obstore

            with contextlib.suppress(FileNotFoundError):
                _persist(f"{scheme}://{bucket}", partial(obstore.delete, _store(scheme, bucket), paths))


def list_entries(uri: str) -> Iterator[Entry]:
    """The objects below a URI, streamed; local ones in the order an object store gives.

    Hidden files and folders (a name that starts with a dot) are left out.
    Raises: StorageDenied: the place does not exist or may not be read.
    """
    place = _place(uri)
    if place.scheme == "file":
        if not os.path.isdir(place.path):
            raise StorageDenied(f"no folder at {place.path}: check the path")
        try:
            yield from _walk(place.path, "")
        except PermissionError as error:
            raise StorageDenied(f"{error.filename}: {error.strerror}; check its rights") from None
        return
    import obstore

    prefix = place.path + "/" if place.path else ""
    store, last = _store(place.scheme, place.bucket), ""

    def pages_after(key: str) -> Any:
        return iter(obstore.list(store, prefix=place.path or None, offset=key or None, chunk_size=1000))

    pages = pages_after(last)

    def page() -> Any:
        nonlocal pages
        try:
            return next(pages, None)
        except Exception:
            pages = pages_after(last)  # a stream that failed once would say that it has ended
            raise

    while (found := _persist(uri, page)) is not None:
        for meta in found:
            last = max(last, meta["path"])
            path = meta["path"].removeprefix(prefix)
            if not any(part.startswith(".") for part in path.split("/")):
                yield Entry(path, meta["size"], meta["e_tag"] or "")


def list_names(uri: str) -> list[str]:
    """Names directly below a URI, folders included, sorted; empty where there is nothing."""
    place = _place(uri)
    if place.scheme == "file":
        return sorted(os.listdir(place.path)) if os.path.isdir(place.path) else []
    import obstore

    found = _persist(
        uri, lambda: obstore.list_with_delimiter(_store(place.scheme, place.bucket), prefix=place.path or None)
    )
    paths = [*found["common_prefixes"], *(o["path"] for o in found["objects"])]
    return sorted({p.rstrip("/").rpartition("/")[2] for p in paths})


def check_writable(uri: str) -> None:
    """Write and remove a small object.

    Raises: StorageDenied: the place does not exist or may not be written.
    """
    probe = join(uri, f".scalecv-{os.getpid()}-{random.getrandbits(48):x}")
    try:
        put(probe, b"probe")
        delete([probe])
    except OSError as error:
        raise StorageDenied(f"cannot write to {without_secrets(uri)}: {error.strerror or error}") from None


def delta_options(uri: str) -> dict[str, str]:
    """Storage options of `deltalake` for a URI; empty for a local path."""
    if _place(uri).scheme != "s3":
        return {}
    options = {"conditional_put": "etag"}
    if _endpoint().startswith("http://"):
        options["AWS_ALLOW_HTTP"] = "true"
    if _endpoint():
        options["AWS_ENDPOINT_URL"] = _endpoint()
    return options


def _place(uri: str) -> _Place:
    scheme, sep, rest = uri.partition("://")
    if not sep:
        return _Place("file", "", os.path.abspath(os.path.expanduser(uri)))
    if scheme not in SCHEMES:
        raise UserError(
            f"{without_secrets(uri)}: scheme '{scheme}' is not supported; use a path or one of s3:// gs:// az://"
        )
    if scheme == "file":
        return _Place("file", "", os.path.abspath(unquote(rest)))
    bucket, _, path = rest.partition("/")
    if not bucket or "@" in bucket or "?" in rest or "#" in bucket:
        raise UserError(
            f"{without_secrets(uri)}: expected {scheme}://BUCKET/PATH, credentials come from the environment"
        )
    return _Place(scheme, bucket, path.strip("/"))


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _store(scheme: str, bucket: str) -> Any:
    environment = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith(("AWS_", "GOOGLE_", "AZURE_"))))
    return _store_for(scheme, bucket, environment, os.getpid())


@lru_cache(maxsize=16)
def _store_for(scheme: str, bucket: str, environment: tuple[tuple[str, str], ...], pid: int) -> Any:
    from obstore.store import AzureStore, GCSStore, S3Store

    give_up: Any = {"max_retries": 10, "retry_timeout": timedelta(seconds=GIVE_UP_AFTER_S)}
    client: Any = {"connect_timeout": "5s", "timeout": "60s"}
    if scheme == "s3":
        if _endpoint() and not urlsplit(_endpoint()).netloc:  # the client panics over it
            raise StorageDenied(
                f"s3://{bucket}: AWS_ENDPOINT_URL={_endpoint()!r} is not a URL such as https://HOST:PORT"
            )
        client["allow_http"] = _endpoint().startswith("http://")
        config: Any = {"endpoint": _endpoint()} if _endpoint() else {}
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        config["region"] = region
        return S3Store(bucket, config=config, client_options=client, retry_config=give_up)
    maker = GCSStore if scheme == "gs" else AzureStore
    return maker(bucket, client_options=client, retry_config=give_up)


def _get(uri: str) -> bytes:
    place = _place(uri)
    if place.scheme == "file":
        return Path(place.path).read_bytes()
    import obstore

    return _persist(uri, lambda: bytes(obstore.get(_store(place.scheme, place.bucket), place.path).bytes()))


def _persist(uri: str, call: Callable[[], T], good: Callable[[T], bool] = lambda _: True) -> T:
    """Call until it answers well or the time budget is spent; the clients do not retry bodies that break off."""
    import obstore

    where, began, wait_s = without_secrets(uri), time.monotonic(), 0.1
    while True:
        try:
            answer = call()
            if good(answer) or time.monotonic() - began > GIVE_UP_AFTER_S:
                return answer
            last: Exception | str = "the body broke off"
        except (obstore.exceptions.BaseError, OSError) as error:
            last, denied = error, _denied(error)
            if denied:
                raise StorageDenied(f"{where}: {denied}") from None
            if isinstance(error, (FileNotFoundError, *_answers())):
                raise
            if time.monotonic() - began > GIVE_UP_AFTER_S:
                said = str(last).strip().splitlines()[0][:300] if str(last).strip() else type(last).__name__
                raise StorageError(f"{where}: no good answer for {GIVE_UP_AFTER_S:.0f} s, last: {said}") from None
        time.sleep(wait_s * (0.5 + random.random()))  # noqa: S311 - jitter
        wait_s = min(wait_s * 2, 5.0)


def _answers() -> tuple[type[Exception], ...]:
    """Errors that are answers: trying again would not change them."""
    from obstore.exceptions import AlreadyExistsError, NotModifiedError, PreconditionError

    return AlreadyExistsError, PreconditionError, NotModifiedError


def _denied(error: Exception) -> str:
    """What to do about an error that no retry can mend; empty for any other."""
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    said = str(error)
    if "NoSuchBucket" in said:
        return "no such bucket; create it or check the name"
    if any(mark in said for mark in ("Missing AccessKeyId", "Missing SecretAccessKey", "169.254.169.254")):
        return "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or what your store needs)"
    # Listings answer 401 and 403 as general errors, other calls by their classes.
    refused = any(f"status code: {code}" in said for code in (401, 403))
    if refused or isinstance(error, (PermissionDeniedError, UnauthenticatedError)):
        return "access denied; check the credentials in the environment (AWS_ACCESS_KEY_ID …)"
    return ""


def _local_failure(path: str, error: OSError) -> Exception:
    """A full or forbidden disk as one clear error; any other error as it is."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageError(f"{path}: no space left to write there: free some, and the same command goes on")
    if error.errno in _REFUSALS:
        return StorageDenied(f"{path}: {error.strerror}; check the path and its rights")
    return error


@contextlib.contextmanager
def _local_part(path: str, data: bytes | memoryview) -> Iterator[str]:
    """A durable temporary file beside `path`, removed unless it was moved away."""
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=folder, prefix=".part-")
    except OSError as error:
        raise _local_failure(path, error) from None
    try:
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(part, 0o644)
        except OSError as error:
            raise _local_failure(path, error) from None
        yield part
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)


def _local_etag(stat: os.stat_result) -> str:
    return f"{stat.st_mtime_ns:x}-{stat.st_size:x}-{stat.st_ino:x}"


def _walk(folder: str, prefix: str) -> Iterator[Entry]:
    with os.scandir(folder) as found:
        items = [e for e in found if not e.name.startswith(".")]
    keyed = sorted((e.name + "/" if e.is_dir() else e.name, e) for e in items if e.is_dir() or e.is_file())
    for name, entry in keyed:
        if name.endswith("/"):
            yield from _walk(entry.path, prefix + name)
        else:
            stat = entry.stat()
            yield Entry(prefix + name, stat.st_size, _local_etag(stat))
