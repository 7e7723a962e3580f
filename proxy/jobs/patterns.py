"""XO's ``SimpleIdPattern``: ``{id: "x"}`` or ``{id: {__or: ["x", …]}}``."""

from __future__ import annotations

from typing import cast

from proxy.errors import Refused


def ids_of(pattern: object) -> list[str]:
    """The ids that a pattern names; none for ``None``.

    Raises ``Refused`` with upstream's message for anything else: XO resolves smart patterns
    before it calls.
    """
    if pattern is None:
        return []
    inner = _only(pattern, "id")
    if isinstance(inner, str):
        return [inner]
    found = _only(inner, "__or")
    if isinstance(found, list):
        ids = cast("list[object]", found)
        names = [one for one in ids if isinstance(one, str)]
        if len(names) == len(ids):
            return list(dict.fromkeys(names))
    raise Refused("invalid pattern", code="EINVAL")


def _only(value: object, key: str) -> object:
    if isinstance(value, dict):
        fields = cast("dict[str, object]", value)
        if list(fields) == [key]:
            return fields[key]
    raise Refused("invalid pattern", code="EINVAL")
