"""Object stores: every call is tried again until it is answered or a budget of time is spent.

The client tries single requests again a few times; the loop here also covers bodies that break off and a store
that is away for minutes. It says once that it waits, and once that the store is back.
"""

import contextlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

from scalecv.errors import ConfigError, StorageDenied, StorageError
from scalecv.storage_place import Entry, Place

GIVE_UP = "SCALECV_STORAGE_GIVE_UP_S"
"""Environment variable: seconds for which a call goes on after its first failure."""
GIVE_UP_S = 300.0
START_GIVE_UP_S = 60.0
"""The same where nothing is at stake yet: a store that was never there is more likely a wrong address."""
SAY_AFTER_S = 10.0
READ_TIMEOUT_S = 60.0
"""Seconds without a byte after which a request is dead; a slow one may take as long as it needs."""
FOLDERS_ONE_BY_ONE = 20

T = TypeVar("T")
_log = logging.getLogger("scalecv.storage")
_lock = threading.Lock()
_away: set[str] = set()
"""Buckets that were said not to answer."""
_thread = threading.local()


class Abandoned(StorageError):
    """A call that its thread no longer wanted (see `abandon_when`): it says nothing of the store."""


def abandon_when(event: threading.Event | None) -> None:
    """From this event on, calls of this thread are not tried again: nobody waits for their answer any more."""
    _thread.abandoned = event


def abandoned() -> threading.Event | None:
    """The event of this thread, to hand on to threads that work for it."""
    return getattr(_thread, "abandoned", None)


def head(place: Place) -> Entry | None:
    """Size and etag of one object, or None where there is none."""
    import obstore

    try:
        meta = _persist(place, lambda: obstore.head(_store(place), place.path))
    except FileNotFoundError:
        return None
    tag = meta["version"] if place.scheme == "gs" else meta["e_tag"]  # Google compares generations, not etags
    return Entry(place.path.rpartition("/")[2], meta["size"], tag or "")


def get(place: Place) -> bytes:
    """The bytes of one object."""
    import obstore

    return _persist(place, lambda: bytes(obstore.get(_store(place), place.path).bytes()))


def get_range(place: Place, start: int, end: int) -> memoryview:
    """Bytes `start` to `end` of one object; fewer where it ends before."""
    import obstore

    def whole(got: memoryview) -> bool:
        if len(got) == end - start:
            return True
        entry = head(place)  # a body that broke off is tried again, an object that ends here is not
        return entry is not None and entry.size_bytes < end

    return _persist(
        place, lambda: memoryview(obstore.get_range(_store(place), place.path, start=start, end=end)), whole
    )


def put(place: Place, data: bytes | memoryview, give_up_s: float | None = None) -> None:
    """Write one object over what was there."""
    import obstore

    body = obstore.Bytes(data)
    large = len(body) > 64 << 20
    _persist(place, lambda: obstore.put(_store(place), place.path, body, use_multipart=large), give_up_s=give_up_s)


def put_if_absent(place: Place, data: bytes) -> bool:
    """Write one object only where there is none; False if there was one."""
    import obstore

    try:
        _persist(place, lambda: obstore.put(_store(place), place.path, data, mode="create"))
    except obstore.exceptions.AlreadyExistsError:
        # A retry after a lost answer meets our own object: the same bytes are ours (claims carry a nonce).
        return get(place) == data
    return True


def put_if_match(place: Place, data: bytes, etag: str) -> bool:
    """Write over one object only while it still has `etag`; False if it changed."""
    import obstore

    try:
        _persist(place, lambda: obstore.put(_store(place), place.path, data, mode={"e_tag": etag, "version": etag}))
    except obstore.exceptions.PreconditionError:
        with contextlib.suppress(FileNotFoundError):
            return get(place) == data  # as above
        return False
    return True


def delete(places: Sequence[Place]) -> None:
    """Remove objects of one bucket; those that are not there are no error."""
    import obstore

    with contextlib.suppress(FileNotFoundError):
        _persist(places[0], lambda: obstore.delete(_store(places[0]), [place.path for place in places]))


def entries(place: Place) -> Iterator[Entry]:
    """The objects below a place, streamed, hidden ones left out."""
    prefix = place.path + "/" if place.path else ""
    for page in _pages(place):
        for meta in page:
            path = meta["path"].removeprefix(prefix)
            if not any(part.startswith(".") for part in path.split("/")):
                yield Entry(path, meta["size"], meta["e_tag"] or "")


def names(place: Place, limit: int | None = None) -> list[str]:
    """What lies directly below a place, sorted, folders included; with `limit` only some that come first.

    Objects are streamed, so that a flat bucket of millions costs its names alone; a folder is jumped over.
    Many folders are asked for at once, and so are those of Azure, which cannot begin in the middle.
    """
    prefix = place.path + "/" if place.path else ""
    found: set[str] = set()
    after, jumps = "", 0
    while place.scheme != "az" and jumps < FOLDERS_ONE_BY_ONE:
        folder = ""
        for page in _pages(place, after):
            tops = [meta["path"].removeprefix(prefix).partition("/") for meta in page]
            found.update(top for top, _, _ in tops)
            if limit is not None and len(found) >= limit:
                return sorted(found)[:limit]
            if tops[-1][1]:
                folder = tops[-1][0]
                break
        if not folder:
            return sorted(found)
        after, jumps = f"{prefix}{folder}/\U0010ffff", jumps + 1
    import obstore

    listed = _persist(place, lambda: obstore.list_with_delimiter(_store(place), prefix=place.path or None))
    paths = [*listed["common_prefixes"], *(meta["path"] for meta in listed["objects"])]
    return sorted({path.rstrip("/").rpartition("/")[2] for path in paths})[:limit]


def delta_options(place: Place) -> dict[str, str]:
    """Storage options of `deltalake`."""
    if place.scheme != "s3":
        return {}
    options = {"conditional_put": "etag"}
    if _endpoint().startswith("http://"):
        options["AWS_ALLOW_HTTP"] = "true"
    if _endpoint():
        options["AWS_ENDPOINT_URL"] = _endpoint()
    return options


def give_up_after_s() -> float:
    """Seconds for which a call goes on after its first failure, as the environment says.

    Raises: ConfigError: not a number.
    """
    told = os.environ.get(GIVE_UP, "")
    try:
        return float(told) if told else GIVE_UP_S
    except ValueError:
        raise ConfigError(f"{GIVE_UP}={told} is not a number of seconds: set one such as 300, or unset it") from None


def _pages(place: Place, after: str = "") -> Iterator[Any]:
    """Pages of a listing in the store's order; one that breaks off goes on after the last key that came."""
    import obstore

    last = after

    def start() -> Any:
        return iter(obstore.list(_store(place), prefix=place.path or None, offset=last or None, chunk_size=1000))

    stream = start()

    def page() -> Any:
        nonlocal stream
        try:
            return next(stream, None)
        except Exception:
            stream = start()  # a stream that failed once would say that it has ended
            raise

    while (found := _persist(place, page)) is not None:
        if found:
            last = max(last, max(meta["path"] for meta in found))
            yield found


def _persist(
    place: Place, call: Callable[[], T], good: Callable[[T], bool] = lambda _: True, give_up_s: float | None = None
) -> T:
    """Call until it answers well, or until the budget is spent that begins with the first failure."""
    import obstore

    budget_s = give_up_after_s() if give_up_s is None else min(give_up_s, give_up_after_s())
    since, wait_s = None, 0.1
    while True:
        try:
            answer = call()
            if good(answer):
                _answered(place)
                return answer
            why = "the body broke off"
        except (obstore.exceptions.BaseError, OSError) as error:
            denied = _denied(error)
            if denied:
                raise StorageDenied(f"{place.uri}: {denied}") from None
            if isinstance(error, (FileNotFoundError, *_answers())):
                _answered(place)
                raise
            why = _first_line(error)
        since = since or time.monotonic()
        failing_s = time.monotonic() - since
        if failing_s >= budget_s:
            raise StorageError(
                f"{place.uri}: no good answer for {budget_s:.0f} s, last: {why}. See that the store can be reached "
                f"from this machine, then run the same command again; {GIVE_UP} sets how long to wait"
            )
        if failing_s > SAY_AFTER_S:
            _silent(place, why, failing_s, budget_s)
        _pause(min(wait_s * (0.5 + random.random()), max(0.0, budget_s - failing_s)), place, why)  # noqa: S311 - jitter
        wait_s = min(wait_s * 2, 5.0)


def _pause(seconds: float, place: Place, why: str) -> None:
    """Wait before a call is tried again.

    Raises: Abandoned: the thread's calls are not wanted any more.
    """
    event = abandoned()
    if event is None:
        time.sleep(seconds)
    elif event.wait(seconds):
        raise Abandoned(f"{place.uri}: not asked again, for the run stops; last: {why}")


def _silent(place: Place, why: str, failing_s: float, budget_s: float) -> None:
    """Say once for each absence of a store that calls wait for it."""
    bucket = f"{place.scheme}://{place.bucket}"
    with _lock:
        if bucket in _away:
            return
        _away.add(bucket)
    _log.warning("%s has not answered for %.0f s (%s): waiting up to %.0f s", bucket, failing_s, why, budget_s)


def _answered(place: Place) -> None:
    if not _away:
        return
    bucket = f"{place.scheme}://{place.bucket}"
    with _lock:
        if bucket not in _away:
            return
        _away.remove(bucket)
    _log.warning("%s answers again", bucket)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


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


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _store(place: Place) -> Any:
    environment = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith(("AWS_", "GOOGLE_", "AZURE_"))))
    return _store_for(place.scheme, place.bucket, environment, os.getpid(), READ_TIMEOUT_S)


@lru_cache(maxsize=16)
def _store_for(
    scheme: str, bucket: str, environment: tuple[tuple[str, str], ...], pid: int, read_timeout_s: float
) -> Any:
    from obstore.store import AzureStore, GCSStore, S3Store

    few: Any = {
        "max_retries": 3,
        "retry_timeout": timedelta(seconds=START_GIVE_UP_S),
        "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=2), "base": 2},
    }
    client: Any = {
        "connect_timeout": "5s",
        "read_timeout": timedelta(seconds=read_timeout_s),
        "timeout": "1h",
    }
    if scheme == "s3":
        if _endpoint() and not urlsplit(_endpoint()).netloc:  # the client panics over it
            raise StorageDenied(
                f"s3://{bucket}: AWS_ENDPOINT_URL={_endpoint()!r} is not a URL such as https://HOST:PORT"
            )
        client["allow_http"] = _endpoint().startswith("http://")
        config: Any = {"endpoint": _endpoint()} if _endpoint() else {}
        config["region"] = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        return S3Store(bucket, config=config, client_options=client, retry_config=few)
    maker = GCSStore if scheme == "gs" else AzureStore
    return maker(bucket, client_options=client, retry_config=few)
