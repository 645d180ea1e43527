"""What a URI names, and what a store says of one object."""

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from scalecv.errors import UserError

SCHEMES = ("s3", "gs", "az", "file")
_BUCKET = re.compile(r"[\w.-]+")
_CONTROL = re.compile(r"[\x00-\x1f]")


@dataclass(frozen=True)
class Entry:
    """One object: its path below what was listed, and what the store says of it."""

    path: str
    size_bytes: int
    etag: str


@dataclass(frozen=True)
class Place:
    """A URI, taken apart; the bucket of a local path is empty."""

    scheme: str
    bucket: str
    path: str

    @property
    def is_local(self) -> bool:
        """Whether it is a path of this machine."""
        return self.scheme == "file"

    @property
    def uri(self) -> str:
        """The place as a URI, or as an absolute path where it is local."""
        return self.path if self.is_local else f"{self.scheme}://{self.bucket}/{self.path}".rstrip("/")


def place_of(uri: str) -> Place:
    """The parts of a URI.

    Raises: UserError: a scheme other than s3, gs, az and file, or a URI without a bucket.
    """
    if _CONTROL.search(uri):
        raise UserError(f"{without_secrets(uri)!r} holds control characters: expected a path, or s3:// gs:// az://")
    scheme, sep, rest = uri.partition("://")
    if not sep and (uri.startswith("/vsi") or uri.partition(":")[0] in SCHEMES):
        raise UserError(f"'{uri}' is neither a path nor a URI: write s3://BUCKET/PATH (gs://, az://), or file:///PATH")
    if not sep:
        return Place("file", "", os.path.abspath(os.path.expanduser(uri)))
    if scheme not in SCHEMES:
        raise UserError(
            f"{without_secrets(uri)}: scheme '{scheme}' is not supported; use a path or one of s3:// gs:// az://"
        )
    if scheme == "file" and not rest.removeprefix("localhost").startswith("/"):
        raise UserError(f"{uri} names another machine: a file of this one is file:///PATH, or the path alone")
    if scheme == "file":
        rest = rest.removeprefix("localhost")
        return Place("file", "", os.path.abspath(unquote(rest)))
    bucket, _, path = rest.partition("/")
    if not _BUCKET.fullmatch(bucket) or "?" in rest:
        raise UserError(
            f"{without_secrets(uri)}: expected {scheme}://BUCKET/PATH, credentials come from the environment"
        )
    return Place(scheme, bucket, path.strip("/"))


def without_secrets(uri: str) -> str:
    """The URI without user, password, query and fragment, fit for logs."""
    try:
        parts = urlsplit(uri)
    except ValueError:  # brackets that are no address
        scheme, sep, rest = uri.partition("://")
        return scheme + sep + rest.partition("/")[0].rpartition("@")[2]
    if not parts.scheme or not parts.netloc:
        return uri
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
