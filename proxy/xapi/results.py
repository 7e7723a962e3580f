"""The result of a XAPI task: one XML-RPC value as text, whatever the transport is.

Empty text and an empty ``<value/>`` stand for void.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from xml.etree import ElementTree

from proxy.errors import Corrupt

if TYPE_CHECKING:
    from collections.abc import Callable
    from xml.etree.ElementTree import Element

LARGEST: Final = 64 * 1024 * 1024
"""Characters: the bitmap of the changed blocks of the largest disks fits."""


def parse_result(text: str) -> Any:
    """The Python value of ``<value>…</value>``; ``''`` for void.

    Integers become ``int``, dates stay text.  Raises ``Corrupt`` for anything else.
    """
    if not text.strip():
        return ""
    if len(text) > LARGEST or "<!" in text:
        # A document type could define entities that grow without bound.
        raise Corrupt("the result of a XAPI task is not an XML-RPC value")
    try:
        return _value(ElementTree.fromstring(text), depth=0)  # noqa: S314  no DTD, bounded
    except (ElementTree.ParseError, ValueError, KeyError, IndexError, RecursionError) as error:
        raise Corrupt("the result of a XAPI task is not an XML-RPC value") from error


def _value(element: Element, depth: int) -> Any:
    if element.tag != "value" or depth > 64:
        raise ValueError(element.tag)
    children = list(element)
    if not children:
        return element.text or ""
    (inner,) = children
    if inner.tag == "array":
        data = inner.find("data")
        return [] if data is None else [_value(item, depth + 1) for item in data]
    if inner.tag == "struct":
        return {
            member.findtext("name", ""): _value(_only(member, "value"), depth + 1)
            for member in inner
        }
    return _SCALARS[inner.tag](inner.text or "")


_SCALARS: Final[dict[str, Callable[[str], Any]]] = {
    "int": int,
    "i4": int,
    "i8": int,
    "double": float,
    "boolean": lambda text: text.strip() == "1",
    "string": str,
    "dateTime.iso8601": str,
    "base64": str,
    "nil": lambda _: None,
}


def _only(member: Element, tag: str) -> Element:
    found = member.find(tag)
    if found is None:
        raise ValueError(tag)
    return found
