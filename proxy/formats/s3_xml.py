"""The XML of S3's answers and requests: small trees of names and texts, no I/O.

The server may be anybody's: a document type (and with it every entity) is refused, size, depth
and number of elements are bounded.  Namespaces are ignored: servers differ in them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import unquote_plus
from xml.parsers import expat
from xml.sax.saxutils import escape

from proxy.errors import Corrupt

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LARGEST = 16 * 1024 * 1024
"""Bytes; a page of 1,000 keys of 1,024 bytes, percent-encoded, is below 4 MiB."""
_DEEPEST = 16
_MOST_ELEMENTS = 30_000
"""Three times those of a page of 1,000 keys."""


@dataclass(slots=True)
class Element:
    """``text`` is what stands directly in it."""

    name: str
    text: str = ""
    children: list[Element] = field(default_factory=list["Element"])

    def all(self, name: str) -> Iterator[Element]:
        """The children of that name."""
        return (child for child in self.children if child.name == name)

    def value(self, name: str) -> str | None:
        """The text of the first child of that name; ``None`` without one."""
        return next((child.text for child in self.all(name)), None)


class _Builder:
    def __init__(self) -> None:
        self.root: Element | None = None
        self._open: list[Element] = []
        self._pieces: list[list[str]] = []
        self._count = 0

    def start(self, name: str, _attributes: object) -> None:
        self._count += 1
        if len(self._open) >= _DEEPEST or self._count > _MOST_ELEMENTS:
            raise Corrupt("the XML of the answer is too deep or too long")
        element = Element(name.rpartition(":")[2])
        if self._open:
            self._open[-1].children.append(element)
        else:
            self.root = element
        self._open.append(element)
        self._pieces.append([])

    def end(self, _name: str) -> None:
        self._open.pop().text = "".join(self._pieces.pop())

    def text(self, text: str) -> None:
        self._pieces[-1].append(text)

    def doctype(self, *_: object) -> None:
        raise Corrupt("the XML of the answer declares a document type")


def parse(document: bytes) -> Element:
    """The root element.  ``Corrupt`` for what is no XML, or more than a server has to say."""
    if len(document) > LARGEST:
        raise Corrupt(f"the XML of the answer has more than {LARGEST} bytes")
    builder = _Builder()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.text
    parser.StartDoctypeDeclHandler = builder.doctype
    try:
        parser.Parse(document, True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise Corrupt(f"the answer is no XML: {error}") from error
    assert builder.root is not None, "expat refuses a document without an element"
    return builder.root


def decoded(text: str | None, *, encoded: bool) -> str:
    """A name of a listing, which says itself whether its names are ``encoded`` (``EncodingType``
    is ``url``).  ``ValueError`` for one that is missing or no UTF-8."""
    if text is None:
        raise ValueError("an entry has no name")
    return unquote_plus(text, errors="strict") if encoded else text


def can_hold(text: str) -> bool:
    """Whether XML 1.0 can spell ``text`` so that it is read back the same."""
    return all(
        character >= " "
        and character not in "\ufffe\uffff"
        and not "\ud800" <= character <= "\udfff"
        for character in text
    )


def delete_request(keys: Iterable[str]) -> bytes:
    """The body of DeleteObjects, which answers for each key."""
    objects = "".join(f"<Object><Key>{escape(key)}</Key></Object>" for key in keys)
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        f'<Delete xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{objects}'
        "<Quiet>false</Quiet></Delete>"
    ).encode()


def complete_request(parts: Iterable[tuple[int, str]]) -> bytes:
    """The body of CompleteMultipartUpload: numbers in rising order with their etags."""
    listed = "".join(
        f"<Part><PartNumber>{number}</PartNumber><ETag>{escape(etag)}</ETag></Part>"
        for number, etag in parts
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        f'<CompleteMultipartUpload xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{listed}'
        "</CompleteMultipartUpload>"
    ).encode()
