"""From a merged table to typed sections: every wrong key is reported, not only the first."""

from __future__ import annotations

import difflib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, cast

import msgspec

from proxy.config.values import Bytes, Seconds, parse_duration, parse_size
from proxy.errors import ProxyError

Key = tuple[str, ...]
S = TypeVar("S", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with ``key`` as ``path`` sets it; an empty key means the whole file."""

    path: Path | None
    key: Key
    text: str

    def __str__(self) -> str:
        where = [str(self.path)] if self.path is not None else []
        return ": ".join([*where, *([".".join(self.key)] if self.key else []), self.text])


class ConfigError(ProxyError):
    """The configuration cannot be used; ``problems`` holds every reason found."""

    default_code = "ECONFIG"

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("invalid configuration: " + "; ".join(map(str, problems)))
        self.problems = problems


@dataclass(slots=True)
class Checker:
    """Collects what is wrong (``problems``) and what is merely odd (``warnings``)."""

    origins: dict[Key, Path]
    ignored: dict[str, str]
    problems: list[Problem] = field(default_factory=list[Problem])
    warnings: list[Problem] = field(default_factory=list[Problem])

    def _at(self, key: Key, text: str) -> Problem:
        for length in range(len(key), 0, -1):
            if (path := self.origins.get(key[:length])) is not None:
                return Problem(path, key, text)
        return Problem(None, key, text)

    def wrong(self, key: Key, text: str) -> None:
        self.problems.append(self._at(key, text))

    def odd(self, key: Key, text: str) -> None:
        self.warnings.append(self._at(key, text))

    def section(self, kind: type[S], table: object, at: Key = ()) -> S | None:
        """``table`` as a ``kind``, or ``None`` when something in it is wrong."""
        if not isinstance(table, dict):
            self.wrong(at, f"expected a table, got {_name(table)}")
            return None
        given = cast("dict[str, Any]", table)
        known = {item.encode_name: item for item in msgspec.structs.fields(kind)}
        values: dict[str, Any] = {}
        before = len(self.problems)
        for name, value in given.items():
            key = (*at, name)
            if name not in known:
                self._unknown(key, list(known))
            elif value is not None:  # null takes the value back to its default
                values[known[name].name] = self._value(known[name].type, value, key)
        return kind(**values) if len(self.problems) == before else None

    def _value(self, kind: Any, value: object, key: Key) -> Any:
        if _is_section(kind):
            return self.section(kind, value, key)
        inner = _section_of_table(kind)
        if inner is not None and isinstance(value, dict):
            tables = cast("dict[str, Any]", value)
            return {
                name: self.section(inner, table, (*key, name))
                for name, table in tables.items()
                if table is not None  # null removes a named table, such as a listener
            }
        try:
            return msgspec.convert(value, kind, dec_hook=_special)
        except msgspec.ValidationError as error:
            self.wrong(key, _plain(str(error)))
            return None

    def _unknown(self, key: Key, known: list[str]) -> None:
        for pattern, reason in self.ignored.items():
            parts = pattern.split(".")
            if len(parts) == len(key) and all(
                p in ("*", k) for p, k in zip(parts, key, strict=True)
            ):
                self.odd(key, f"has no effect here: {reason}")
                return
        near = difflib.get_close_matches(key[-1], known, n=1, cutoff=0.6)
        hint = f", did you mean {near[0]}?" if near else ""
        self.odd(key, f"unknown key{hint}")


def _is_section(kind: object) -> TypeGuard[type[msgspec.Struct]]:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _section_of_table(kind: object) -> type[msgspec.Struct] | None:
    """The section type in ``dict[str, Section]``: named tables, such as the listeners."""
    if typing.get_origin(kind) is dict and _is_section(inner := typing.get_args(kind)[1]):
        return inner
    return None


def _special(kind: type[Any], value: Any) -> Any:
    if kind is Seconds:
        return parse_duration(value)
    if kind is Bytes:
        return parse_size(value)
    if kind is Path:
        if isinstance(value, str) and value and "\0" not in value:
            return Path(value)
        raise ValueError("Expected a path")
    raise NotImplementedError(kind)


_NAMES: dict[type, str] = {list: "an array", str: "text", bool: "a boolean", int: "a number"}


def _name(value: object) -> str:
    return _NAMES.get(type(value), type(value).__name__)


def _plain(text: str) -> str:
    return text.replace("`", "").replace("Expected", "expected", 1)
