"""The patterns of ``value-matcher``, in which a job says which backups it mirrors.

Values are what JSON knows.  The rules are those of the npm package that Xen Orchestra filters
with, met exactly, so that a job means the same here:

- a scalar matches what is equal and of the same type: ``1`` is neither ``true`` nor ``'1'``;
- a list matches a list in which each of its patterns matches some item;
- an object with the one key ``__and``, ``__or`` (lists of patterns) or ``__not`` (a pattern)
  combines; with any other key beside it, these are names like any other;
- any other object matches an object that has all of its fields, each matching.  A list has its
  positions and its ``length`` as fields.

Nothing here does I/O.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias, cast

from proxy.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Iterable

Predicate: TypeAlias = Callable[[object], bool]

_MOST_PARTS: Final = 100_000
"""Of one pattern: far more VMs than a remote has, and a bound for what a client can cost."""
_DEEPEST: Final = 50

_MISSING: Final = object()
_POSITION = re.compile(r"0|[1-9][0-9]{0,9}")


def predicate(pattern: object) -> Predicate:
    """The function that says whether a value matches ``pattern``.

    ``Refused`` (``EINVAL``) for a pattern that cannot be one, is nested deeper than 50 levels or
    has more than 100,000 parts: told before anything is compared.
    """
    return _Compiler().compile(pattern, 0)


def fields_of(pattern: object) -> frozenset[tuple[str, ...]]:
    """The fields that decide whether a value matches, as paths from its top.

    Whoever knows these fields of a value needs nothing else of it.  ``()`` is the whole value.
    The pattern is one that :func:`predicate` takes.
    """
    return frozenset(_paths(pattern, ()))


def _paths(pattern: object, above: tuple[str, ...]) -> Iterable[tuple[str, ...]]:
    if not isinstance(pattern, dict) or not pattern:
        yield above
        return
    fields = cast("dict[str, object]", pattern)
    operator = _operator(fields)
    if operator == "__not":
        yield from _paths(fields[operator], above)
    elif operator is not None:
        for each in cast("list[object]", fields[operator]):
            yield from _paths(each, above)
    else:
        for name, each in fields.items():
            yield from _paths(each, (*above, name))


def _operator(fields: dict[str, object]) -> str | None:
    if len(fields) == 1:
        (name,) = fields
        if name in ("__and", "__or", "__not"):
            return name
    return None


class _Compiler:
    def __init__(self) -> None:
        self._parts = 0

    def compile(self, pattern: object, depth: int) -> Predicate:
        self._parts += 1
        if depth > _DEEPEST or self._parts > _MOST_PARTS:
            raise _wrong(
                f"it is nested deeper than {_DEEPEST} levels or has more than {_MOST_PARTS} parts"
            )
        if isinstance(pattern, dict):
            fields = cast("dict[str, object]", pattern)
            operator = _operator(fields)
            if operator is not None:
                return self._combined(operator, fields[operator], depth + 1)
            return _object({name: self.compile(each, depth + 1) for name, each in fields.items()})
        if isinstance(pattern, list):
            items = cast("list[object]", pattern)
            return _list([self.compile(each, depth + 1) for each in items])
        return _scalar(pattern)

    def _combined(self, operator: str, operand: object, depth: int) -> Predicate:
        if operator == "__not":
            inner = self.compile(operand, depth)
            return lambda value: not inner(value)
        if not isinstance(operand, list):
            raise _wrong(f"{operator} takes a list of patterns")
        patterns = cast("list[object]", operand)
        if operator == "__or" and all(isinstance(each, str) for each in patterns):
            self._parts += len(patterns)
            # a list of VMs, which may be long
            texts = frozenset(cast("list[str]", patterns))
            return lambda value: isinstance(value, str) and value in texts
        inners = [self.compile(each, depth) for each in patterns]
        if operator == "__or":
            return lambda value: any(inner(value) for inner in inners)
        return lambda value: all(inner(value) for inner in inners)


def _object(fields: dict[str, Predicate]) -> Predicate:
    def matches(value: object) -> bool:
        if not isinstance(value, dict | list):
            return False
        for name, inner in fields.items():
            found = _field(cast("dict[str, object] | list[object]", value), name)
            if found is _MISSING or not inner(found):
                return False
        return True

    return matches


def _field(value: dict[str, object] | list[object], name: str) -> object:
    if isinstance(value, dict):
        return value.get(name, _MISSING)
    if name == "length":
        return len(value)
    if _POSITION.fullmatch(name) is not None and int(name) < len(value):
        return value[int(name)]
    return _MISSING


def _list(inners: list[Predicate]) -> Predicate:
    def matches(value: object) -> bool:
        if not isinstance(value, list):
            return False
        items = cast("list[object]", value)
        return all(any(inner(item) for item in items) for inner in inners)

    return matches


def _scalar(pattern: object) -> Predicate:
    if pattern is None or isinstance(pattern, bool):
        return lambda value: value is pattern
    if isinstance(pattern, int | float):
        # JSON has one kind of number; for Python a bool is one too
        return lambda value: (
            isinstance(value, int | float) and not isinstance(value, bool) and value == pattern
        )
    if isinstance(pattern, str):
        return lambda value: isinstance(value, str) and value == pattern
    raise _wrong(f"a pattern is JSON, not {type(pattern).__name__}")


def _wrong(message: str) -> Refused:
    return Refused(f"the filter is wrong: {message}", code="EINVAL")
