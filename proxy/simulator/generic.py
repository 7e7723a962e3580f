"""The calls that every class has: records, fields, maps, sets, create, destroy."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from proxy.errors import XapiError
from proxy.simulator.records import COMPUTED, READ_ONLY, SCHEMA

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy.simulator.store import Record, Store

_GETTERS = ("get_all", "get_all_records", "get_all_records_where", "get_record", "get_by_uuid")


def method_names(kind: str) -> list[str]:
    """The generic methods of a class, for ``system.listMethods``."""
    names = [f"{kind}.{name}" for name in _GETTERS]
    for name, field in SCHEMA[kind].items():
        names.append(f"{kind}.get_{name}")
        if (kind, name) in READ_ONLY:
            continue
        names.append(f"{kind}.set_{name}")
        if field.code == "M":
            names += [f"{kind}.add_to_{name}", f"{kind}.remove_from_{name}"]
        elif field.code == "L":
            names += [f"{kind}.add_{name}", f"{kind}.remove_{name}"]
    if "name_label" in SCHEMA[kind]:
        names.append(f"{kind}.get_by_name_label")
    return names


def _counted(method: str, params: list[Any], expected: int) -> None:
    if len(params) != expected:
        raise XapiError(
            "MESSAGE_PARAMETER_COUNT_MISMATCH", [method, str(expected), str(len(params))]
        )


def call(store: Store, method: str, params: list[Any]) -> Any:
    """Answer a generic call; raises ``XapiError`` (``MESSAGE_METHOD_UNKNOWN`` when none)."""
    kind, _, verb = method.partition(".")
    if kind not in SCHEMA:
        raise XapiError("MESSAGE_METHOD_UNKNOWN", [method])
    if verb in _WHOLE_CLASS:
        count, function = _WHOLE_CLASS[verb]
        _counted(method, params, count)
        return function(store, kind, *params)
    for prefix, codes, count, change in _FIELD_VERBS:
        if not verb.startswith(prefix):
            continue
        field = SCHEMA[kind].get(verb[len(prefix) :])
        if field is None or (codes and field.code not in codes):
            continue
        if change is not _get and (kind, verb[len(prefix) :]) in READ_ONLY:
            continue
        _counted(method, params, count)
        record = store.get(kind, params[0])
        return change(store, kind, verb[len(prefix) :], record, params)
    raise XapiError("MESSAGE_METHOD_UNKNOWN", [method])


def _get(_store: Store, _kind: str, name: str, record: Record, _params: list[Any]) -> Any:
    return record[name]


def _set(store: Store, kind: str, name: str, _record: Record, params: list[Any]) -> str:
    store.update(kind, params[0], **{name: params[1]})
    return ""


def _add_to(store: Store, kind: str, name: str, record: Record, params: list[Any]) -> str:
    ref, key, value = params
    if key in record[name]:
        raise XapiError("MAP_DUPLICATE_KEY", [kind, name, ref, key])
    store.update(kind, ref, **{name: {**record[name], key: value}})
    return ""


def _remove_from(store: Store, kind: str, name: str, record: Record, params: list[Any]) -> str:
    ref, key = params
    kept = {each: value for each, value in record[name].items() if each != key}
    store.update(kind, ref, **{name: kept})
    return ""


def _add(store: Store, kind: str, name: str, record: Record, params: list[Any]) -> str:
    ref, value = params
    if value not in record[name]:
        store.update(kind, ref, **{name: [*record[name], value]})
    return ""


def _remove(store: Store, kind: str, name: str, record: Record, params: list[Any]) -> str:
    ref, value = params
    store.update(kind, ref, **{name: [each for each in record[name] if each != value]})
    return ""


_Change = "Callable[[Store, str, str, Record, list[Any]], Any]"
_FIELD_VERBS: tuple[tuple[str, tuple[str, ...], int, Any], ...] = (
    ("get_", (), 1, _get),
    ("set_", (), 2, _set),
    ("add_to_", ("M",), 3, _add_to),
    ("remove_from_", ("M",), 2, _remove_from),
    ("add_", ("L",), 2, _add),
    ("remove_", ("L",), 2, _remove),
)


def _all(store: Store, kind: str) -> list[str]:
    return [ref for ref, _ in store.all(kind)]


def _all_records(store: Store, kind: str) -> Record:
    return dict(store.all(kind))


def _where(store: Store, kind: str, expression: str) -> Record:
    test = parse_filter(kind, expression)
    return {ref: record for ref, record in store.all(kind) if test(record)}


def _record(store: Store, kind: str, ref: str) -> Record:
    return store.get(kind, ref)


def _by_uuid(store: Store, kind: str, identifier: str) -> str:
    return store.by_uuid(kind, identifier)


def _by_name(store: Store, kind: str, label: str) -> list[str]:
    return [ref for ref, record in store.all(kind) if record.get("name_label") == label]


def _create(store: Store, kind: str, fields: Record) -> str:
    given = {name: value for name, value in fields.items() if (kind, name) not in COMPUTED}
    given.pop("uuid", None)
    return store.create(kind, **given)


def _destroy(store: Store, kind: str, ref: str) -> str:
    store.destroy(kind, ref)
    return ""


_WHOLE_CLASS: dict[str, tuple[int, Any]] = {
    "get_all": (0, _all),
    "get_all_records": (0, _all_records),
    "get_all_records_where": (1, _where),
    "get_record": (1, _record),
    "get_by_uuid": (1, _by_uuid),
    "get_by_name_label": (1, _by_name),
    "create": (1, _create),
    "destroy": (1, _destroy),
}


# get_all_records_where: field "name" = "value", not, and, or, parentheses, true, false

_WORD = re.compile(
    r"""\s*(?:(?P<open>\()|(?P<close>\))|(?P<eq>=)|"(?P<dq>[^"]*)"|'(?P<sq>[^']*)'|(?P<word>\w+))"""
)


def parse_filter(kind: str, expression: str) -> Callable[[Record], bool]:
    """The test that an expression of the ``_where`` language means; raises ``XapiError``."""
    words: list[tuple[str, str]] = []
    position = 0
    while expression[position:].strip():
        match = _WORD.match(expression, position)
        if match is None or match.lastgroup is None:
            raise _bad_filter(expression)
        words.append((match.lastgroup, match[match.lastgroup]))
        position = match.end()
    parser = _Filter(kind, expression, words)
    test = parser.either()
    if parser.words:
        raise _bad_filter(expression)
    return test


def _bad_filter(expression: str) -> XapiError:
    return XapiError("INTERNAL_ERROR", [f"cannot parse the filter: {expression}"])


class _Filter:
    def __init__(self, kind: str, expression: str, words: list[tuple[str, str]]) -> None:
        self.kind = kind
        self.expression = expression
        self.words = words

    def _next(self, *groups: str) -> str:
        if not self.words or self.words[0][0] not in groups:
            raise _bad_filter(self.expression)
        return self.words.pop(0)[1]

    def _is(self, word: str) -> bool:
        if self.words and self.words[0] == ("word", word):
            self.words.pop(0)
            return True
        return False

    def either(self) -> Callable[[Record], bool]:
        left = self._both()
        while self._is("or"):
            left = _or(left, self._both())
        return left

    def _both(self) -> Callable[[Record], bool]:
        left = self._one()
        while self._is("and"):
            left = _and(left, self._one())
        return left

    def _one(self) -> Callable[[Record], bool]:
        if self._is("not"):
            inner = self._one()
            return lambda record: not inner(record)
        if self._is("true"):
            return lambda record: True
        if self._is("false"):
            return lambda record: False
        if self.words and self.words[0][0] == "open":
            self.words.pop(0)
            inside = self.either()
            self._next("close")
            return inside
        if not self._is("field"):
            raise _bad_filter(self.expression)
        name = self._next("dq", "sq", "word")
        self._next("eq")
        value = self._next("dq", "sq")
        if name not in SCHEMA[self.kind]:
            raise _bad_filter(self.expression)
        return lambda record: _as_text(record[name]) == value


def _and(
    left: Callable[[Record], bool], right: Callable[[Record], bool]
) -> Callable[[Record], bool]:
    return lambda record: left(record) and right(record)


def _or(
    left: Callable[[Record], bool], right: Callable[[Record], bool]
) -> Callable[[Record], bool]:
    return lambda record: left(record) or right(record)


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
