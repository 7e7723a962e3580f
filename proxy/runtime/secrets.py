"""Keeps secrets out of logs, tasks, errors and answers.

Two nets, because each alone has holes: values under names that mean a secret are replaced
wherever a structure leaves the daemon, and every secret that a call or the configuration
brought is remembered so that it is also found inside free text (an exception's message, a
URL, a command's output).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any, cast
from urllib.parse import quote

HIDDEN = "***"
_SHORTEST = 6
"""Shorter values would blank ordinary words; the structural net still covers them."""
_REMEMBERED = 4096

_NAMES = re.compile(
    r"(password|passwd|secret|(secret|access|account|api)_?key|token|encryptionkey|credentials"
    r"|authorization|cookie|session_?id)$",
    re.IGNORECASE,
)
_URL_PASSWORD = re.compile(r"(?P<head>[a-z][a-z0-9+.-]*://[^\s:/@]*:)[^\s]*(?=@)", re.IGNORECASE)
_URL_KEY = re.compile(r"(?P<head>encryptionKey=)[^&\s#]+", re.IGNORECASE)
_SESSION = re.compile(r"(?P<head>session_id=)[^&\s]+", re.IGNORECASE)

_known: OrderedDict[str, None] = OrderedDict()


def remember(secret: str) -> None:
    """Hide ``secret`` from now on wherever text leaves the daemon."""
    if len(secret) < _SHORTEST:
        return
    for form in {secret, quote(secret, safe="")}:
        _known[form] = None
        _known.move_to_end(form)
    while len(_known) > _REMEMBERED:
        _known.popitem(last=False)


def remember_in(value: Any) -> None:
    """Remember every string that ``value`` (JSON) holds under a name that means a secret."""
    if isinstance(value, dict):
        for key, item in cast("dict[object, object]", value).items():
            if _NAMES.search(str(key)):
                _remember_all(item)
            else:
                remember_in(item)
    elif isinstance(value, list):
        for item in cast("list[object]", value):
            remember_in(item)


def _remember_all(value: Any) -> None:
    if isinstance(value, str):
        remember(value)
    elif isinstance(value, dict):
        for key, item in cast("dict[object, object]", value).items():
            if key != "username":
                _remember_all(item)


def scrub_text(text: str) -> str:
    """``text`` without any known secret and without credentials in URLs."""
    if "://" in text:
        text = _URL_PASSWORD.sub(rf"\g<head>{HIDDEN}", text)
    if "=" in text:
        text = _URL_KEY.sub(rf"\g<head>{HIDDEN}", text)
        text = _SESSION.sub(rf"\g<head>{HIDDEN}", text)
    found = [secret for secret in _known if secret in text]
    return _without(text, found) if found else text


def _without(text: str, secrets: list[str]) -> str:
    """All at once: one after the other, a secret that is part of another would save its rest."""
    spans: list[tuple[int, int]] = []
    for secret in secrets:
        at = text.find(secret)
        while at >= 0:
            spans.append((at, at + len(secret)))
            at = text.find(secret, at + 1)
    left, position = "", 0
    for begin, end in sorted(spans):
        if begin >= position:
            left += text[position:begin] + HIDDEN
        position = max(position, end)
    return left + text[position:]


def scrub(value: Any) -> Any:
    """A copy of a JSON value that may leave the daemon."""
    if isinstance(value, str):
        return scrub_text(value)
    if isinstance(value, dict):
        return {
            key: HIDDEN if _NAMES.search(str(key)) and item else scrub(item)
            for key, item in cast("dict[object, object]", value).items()
        }
    if isinstance(value, list | tuple):
        return [scrub(item) for item in cast("list[object]", value)]
    return value
