"""XML-RPC values as XAPI writes them: in ``ova.xml``, in task results, on the wire.

XAPI sends its 64-bit integers as decimal *strings*, an untyped ``<value>`` is a string, and
dates look like ``20260101T00:00:00Z``.  What a value means is the reader's business: this
codec returns plain Python values and keeps dates as the strings they were.
"""

from __future__ import annotations

import datetime
import re
from typing import TYPE_CHECKING, Any, TypeGuard
from xml.parsers import expat
from xml.sax.saxutils import escape

from proxy.errors import Corrupt

if TYPE_CHECKING:
    from collections.abc import Mapping

LARGEST = 64 * 1024 * 1024
"""Bytes of the biggest document that is looked at."""
_DEEPEST = 64

_DATE = re.compile(r"\d{8}T\d{2}:\d{2}:\d{2}Z\Z")
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")


def is_map(value: Any) -> TypeGuard[dict[Any, Any]]:
    """Whether ``value`` is a struct."""
    return isinstance(value, dict)


def is_list(value: Any) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    """Whether ``value`` is an array."""
    return isinstance(value, list | tuple)


def dump_value(value: Any) -> str:
    """``value`` as ``<value>…</value>``; integers become strings, ``None`` an empty value."""
    pieces: list[str] = []
    _write(value, pieces)
    return "".join(pieces)


def _write(value: Any, out: list[str]) -> None:
    out.append("<value>")
    if isinstance(value, bool):
        out.append(f"<boolean>{int(value)}</boolean>")
    elif isinstance(value, float):
        out.append(f"<double>{value!r}</double>")
    elif isinstance(value, int):
        out.append(str(value))
    elif isinstance(value, str):
        if _DATE.match(value):
            out.append(f"<dateTime.iso8601>{value}</dateTime.iso8601>")
        else:
            out.append(escape(_FORBIDDEN.sub("?", value)))
    elif is_map(value):
        out.append("<struct>")
        for name, item in value.items():
            out.append(f"<member><name>{escape(str(name))}</name>")
            _write(item, out)
            out.append("</member>")
        out.append("</struct>")
    elif is_list(value):
        out.append("<array><data>")
        for item in value:
            _write(item, out)
        out.append("</data></array>")
    elif value is not None:
        raise TypeError(f"XML-RPC has no {type(value).__name__}")
    out.append("</value>")


class _Parser:
    """Builds one value from expat's events; refuses declarations, so that nothing expands."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.method = ""
        self._containers: list[list[Any] | dict[str, Any]] = []
        self._names: list[str] = []
        self._path: list[str] = []
        self._text: list[str] = []
        self._typed = False
        self._scalar: Any = ""

    def run(self, document: bytes) -> None:
        parser = expat.ParserCreate()
        parser.buffer_text = True
        parser.StartDoctypeDeclHandler = self._refuse
        parser.EntityDeclHandler = self._refuse
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text.append
        try:
            parser.Parse(document, True)
        except expat.ExpatError as error:
            raise Corrupt(
                f"not an XML-RPC document: {expat.ErrorString(error.code)}, line {error.lineno}"
            ) from error
        except (ValueError, IndexError, TypeError) as error:
            raise Corrupt(f"not an XML-RPC value: {error}") from error

    @staticmethod
    def _refuse(*_: object) -> None:
        raise Corrupt("an XML-RPC document declares a type or an entity: refused")

    def _start(self, tag: str, _attributes: Mapping[str, str]) -> None:
        if len(self._path) > _DEEPEST * 4:
            raise Corrupt("an XML-RPC document is nested too deep")
        if tag == "value":
            self._typed = False
            self._scalar = ""
        elif tag == "struct":
            self._containers.append({})
            self._typed = True
        elif tag == "array":
            self._containers.append([])
            self._typed = True
        elif self._path and self._path[-1] == "value":
            self._typed = True
        self._text.clear()
        self._path.append(tag)

    def _end(self, tag: str) -> None:
        self._path.pop()
        text = "".join(self._text)
        if tag == "value":
            self._place(self._scalar if self._typed else text)
            self._typed = True
        elif tag in ("struct", "array"):
            self._scalar = self._containers.pop()
            self._typed = True
        elif tag == "name":
            self._names.append(text)
        elif tag == "methodName":
            self.method = text.strip()
        elif self._path and self._path[-1] == "value":
            self._scalar = _scalar(tag, text)
        self._text.clear()

    def _place(self, value: Any) -> None:
        if not self._containers:
            self.values.append(value)
        elif isinstance(top := self._containers[-1], dict):
            top[self._names.pop()] = value
        else:
            top.append(value)


def _scalar(tag: str, text: str) -> Any:
    if tag in ("int", "i4", "i8"):
        return int(text)
    if tag == "double":
        return float(text)
    if tag == "boolean":
        return text.strip() == "1"
    if tag in ("nil", "ex:nil"):
        return None
    if tag == "dateTime.iso8601":
        return text.strip()
    return text


def _parse(document: bytes | str) -> _Parser:
    data = document.encode() if isinstance(document, str) else document
    if len(data) > LARGEST:
        raise Corrupt(f"an XML-RPC document of {len(data)} bytes is refused")
    parser = _Parser()
    parser.run(data)
    return parser


def load_value(document: bytes | str) -> Any:
    """The one value of ``document``; raises ``Corrupt`` when it is none."""
    values = _parse(document).values
    if len(values) != 1:
        raise Corrupt(f"expected one XML-RPC value, found {len(values)}")
    return values[0]


def load_call(document: bytes) -> tuple[str, list[Any]]:
    """Method and parameters of a ``methodCall``; raises ``Corrupt``."""
    parser = _parse(document)
    if not parser.method:
        raise Corrupt("an XML-RPC call without methodName")
    return parser.method, parser.values


def dump_response(value: Any) -> bytes:
    """A ``methodResponse`` that carries ``value``."""
    body = f"<methodResponse><params><param>{dump_value(value)}</param></params></methodResponse>"
    return ('<?xml version="1.0"?>' + body).encode()


def date(moment: datetime.datetime) -> str:
    """A date as XAPI writes it, in UTC and without fractions."""
    return moment.astimezone(datetime.UTC).strftime("%Y%m%dT%H:%M:%SZ")
