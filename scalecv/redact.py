"""Secrets stay out of what is written and shown: they are recognised by their value, never by the name of a key.

A value is secret if a variable of the environment whose name says so holds it (AWS_SECRET_ACCESS_KEY, HF_TOKEN …),
if it is the login or the signature of a URL, or if it has the form of a well-known credential. Names and words are
kept: `use_cls_token` is no secret.
"""

import json
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote, quote_plus

MARK = "[secret]"
SHORTEST = 8
"""Characters of the shortest value that is looked for: a shorter one would hide common words."""

_SECRET_NAME = re.compile(
    r"SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|CONNECTION_STRING|APIKEY|(^|_)(TOKEN|KEY|PAT|SAS)(_|$)",
    re.IGNORECASE,
)
_NO_SECRET_NAME = re.compile(r"_(ID|PATH|FILE|DIR|URI|URL|NAME|MODE|TTL|TYPE)$", re.IGNORECASE)
_LOGIN = re.compile(
    r"(?<![\w+.-])([a-zA-Z][\w+.-]*://)(?:[^/\s\"'<>?#]*@|[^/\s\"'<>?#:@\[]+:(?!\d+(?:[/\s?#]|$))[^\s\"'<>?#@]*@)"
)
_SIGNED = re.compile(
    r"([?&;]|%3F|%26|\\u0026|&amp;)((?:X-Amz-|X-Goog-)[\w-]+|sig|signature|AWSAccessKeyId|GoogleAccessId|AccountKey"
    r"|SharedAccessSignature|password|passwd|secret|(?:access_|auth_|id_|session_|security_)?token|api_?key|access_key"
    r"|client_secret)(=|%3D)(?!\[secret\])[^&\s\"'<>;,)}\]\\]+",
    re.IGNORECASE,
)
_HEADER = re.compile(r"(\bAuthorization['\"]?\s*[:=]\s*['\"]?(?:Basic|Bearer)\s+)[\w.~+/=-]{8,}", re.IGNORECASE)
_FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}|sk-[\w-]{32,}"
    r"|xox[abprs]-[\w-]{10,}|AIza[\w-]{35}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)


def is_secret_name(name: str) -> bool:
    """Whether the name of a variable says that its value is a secret."""
    return bool(_SECRET_NAME.search(name)) and not _NO_SECRET_NAME.search(name)


def clean(text: str) -> str:
    """The text with `[secret]` in the place of each secret; the login of a URL is left out."""
    return _clean(text, _of_environment(_secrets()))


def clean_tree(value: Any) -> Any:
    """A copy of nested mappings, lists and texts with every text cleaned, the keys too."""
    found = _of_environment(_secrets())

    def walk(node: Any) -> Any:
        if isinstance(node, str):
            return _clean(node, found)
        if isinstance(node, Mapping):
            return {walk(key): walk(inner) for key, inner in node.items()}
        if isinstance(node, list | tuple):
            return [walk(inner) for inner in node]
        return node

    return walk(value)


def _clean(text: str, found: re.Pattern[str] | None) -> str:
    if found is not None:
        text = found.sub(MARK, text)
    if "://" in text or "=" in text or "%3" in text:
        text = _SIGNED.sub(rf"\1\2\3{MARK}", _LOGIN.sub(r"\1", text))
    if len(text) > SHORTEST:
        text = _FORMS.sub(MARK, _HEADER.sub(rf"\1{MARK}", text))
    return text


def variable_in(text: str) -> str | None:
    """The name of the variable whose secret stands in a text; None where there is none."""
    return next((name for name, value in _secrets() if any(form in text for form in _spellings(value))), None)


def _secrets() -> tuple[tuple[str, str], ...]:
    """Name and value of the secrets in the environment, as it is now."""
    named = [(name, os.environ.get(name, "")) for name in os.environ if _says_secret(name)]
    return tuple((name, value) for name, value in named if len(value) >= SHORTEST and not _is_path(value))


_says_secret = lru_cache(maxsize=4096)(is_secret_name)


def _is_path(value: str) -> bool:
    """A variable may name the file of a secret; that is no secret itself."""
    return value.startswith("/") and os.path.exists(value)


@lru_cache(maxsize=8)
def _of_environment(secrets: tuple[tuple[str, str], ...]) -> re.Pattern[str] | None:
    spelled = {form for _, value in secrets for form in _spellings(value)}
    if not spelled:
        return None
    return re.compile("|".join(re.escape(form) for form in sorted(spelled, key=len, reverse=True)))


def _spellings(value: str) -> set[str]:
    """A secret as it stands in a text, in a URL, in JSON and in a Python literal."""
    quoted = json.dumps(value)[1:-1]
    return {value, value.strip(), quote(value, safe=""), quote(value), quote_plus(value), quoted, repr(value)[1:-1]}
