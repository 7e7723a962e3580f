"""The XML of Azure Blob Storage: pages of a listing, lists of blocks, errors.

Documents come from outside: they are bounded, and one that declares a type or an entity is
refused, so that nothing expands.  What is not a whole document is ``Corrupt``, never a short
listing.
"""

from __future__ import annotations

import base64
from collections import deque
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote
from xml.parsers import expat

from proxy.errors import Corrupt

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

LARGEST: Final = 32 * 1024 * 1024
"""Bytes of a page of 5,000 names of 1,024 characters, three bytes each, and their properties."""
_DEEPEST: Final = 16
_LONGEST_TEXT: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Blob:
    """``mtime`` is seconds since the epoch."""

    name: str
    size: int
    mtime: float


@dataclass(frozen=True, slots=True)
class Blobs:
    """A page of a listing; ``marker`` continues it, ``None`` at its end."""

    blobs: Sequence[Blob]
    prefixes: Sequence[str]
    marker: str | None


class _Reader:
    """Walks one document; ``ended`` hears of each element with its path, attributes and text."""

    def __init__(self, ended: Callable[[str, Mapping[str, str], str], None]) -> None:
        self._ended = ended
        self._path: deque[str] = deque()
        self._attributes: deque[Mapping[str, str]] = deque()
        self._text: list[str] = []
        self._length = 0

    def run(self, document: bytes) -> None:
        if len(document) > LARGEST:
            raise Corrupt(f"an answer of {len(document)} bytes of XML is refused")
        parser = expat.ParserCreate()
        parser.buffer_text = True
        parser.StartDoctypeDeclHandler = self._refuse
        parser.EntityDeclHandler = self._refuse
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._characters
        try:
            parser.Parse(document, True)
        except expat.ExpatError as error:
            raise Corrupt(
                f"the store's answer is not XML: {expat.ErrorString(error.code)},"
                f" line {error.lineno}"
            ) from error

    @staticmethod
    def _refuse(*_: object) -> None:
        raise Corrupt("the store's XML declares a type or an entity: refused")

    def _start(self, tag: str, attributes: Mapping[str, str]) -> None:
        if len(self._path) >= _DEEPEST:
            raise Corrupt("the store's XML is nested too deep")
        self._path.append(tag)
        self._attributes.append(attributes)
        self._clear()

    def _characters(self, text: str) -> None:
        self._length += len(text)
        if self._length > _LONGEST_TEXT:
            raise Corrupt("the store's XML holds a text that is too long")
        self._text.append(text)

    def _end(self, _tag: str) -> None:
        text = "".join(self._text)
        self._clear()
        self._ended("/".join(self._path), self._attributes.pop(), text)
        self._path.pop()

    def _clear(self) -> None:
        self._text.clear()
        self._length = 0


class _Listing:
    """One page of List Blobs."""

    def __init__(self) -> None:
        self.blobs: deque[Blob] = deque()
        self.prefixes: deque[str] = deque()
        self.marker: str | None = None
        self._blob: dict[str, str] = {}

    def ended(self, path: str, attributes: Mapping[str, str], text: str) -> None:
        match path.removeprefix("EnumerationResults/Blobs/"):
            case "Blob":
                self._add()
            case "Blob/Name":
                self._blob["name"] = _name(attributes, text)
            case "Blob/Properties/Content-Length":
                self._blob["size"] = text
            case "Blob/Properties/Last-Modified":
                self._blob["mtime"] = text
            case "Blob/Properties/ResourceType":
                self._blob["type"] = text
            case "BlobPrefix/Name":
                self.prefixes.append(_name(attributes, text))
            case "EnumerationResults/NextMarker":
                self.marker = text
            case _:
                pass

    def _add(self) -> None:
        blob, self._blob = self._blob, {}
        # an account with a hierarchical namespace lists its directories among the blobs
        if blob.get("type") == "directory":
            return
        try:
            self.blobs.append(Blob(blob["name"], _size(blob["size"]), http_date(blob["mtime"])))
        except (KeyError, ValueError) as error:
            raise Corrupt(f"a listing that is no listing: {error}") from error


def _size(text: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise ValueError(f"size {text[:32]!r}")
    return int(text)


def _name(attributes: Mapping[str, str], text: str) -> str:
    """Names that XML cannot hold come percent-encoded, since version 2021-02-12."""
    if attributes.get("Encoded", "").lower() != "true":
        return text
    return unquote(text, errors="strict")


def http_date(text: str) -> float:
    """Seconds since the epoch of an HTTP date; ``ValueError``."""
    return parsedate_to_datetime(text).timestamp()


def load_page(document: bytes, token: str | None) -> Blobs:
    """One page of List Blobs, asked for with the marker ``token``.

    A page that does not say whether it is the last (``NextMarker``, empty when it is) or leads
    back to itself is ``Corrupt``.
    """
    listing = _Listing()
    try:
        _Reader(listing.ended).run(document)
    except UnicodeDecodeError as error:
        raise Corrupt("a listing with a name that is not UTF-8") from error
    if listing.marker is None:
        raise Corrupt("a listing that does not say whether it goes on: nothing is made of it")
    if listing.marker and listing.marker == token:
        raise Corrupt("a listing that leads back to itself: nothing is made of it")
    return Blobs(tuple(listing.blobs), tuple(listing.prefixes), listing.marker or None)


def load_error(document: bytes) -> dict[str, str]:
    """The fields of an error's document (``Code``, ``Message``, …); empty when it is none."""
    fields: dict[str, str] = {}

    def ended(path: str, _: Mapping[str, str], text: str) -> None:
        if path.startswith("Error/"):
            fields.setdefault(path.removeprefix("Error/"), text.strip())

    try:
        _Reader(ended).run(document)
    except Corrupt:
        return {}
    return fields


def block_id(upload: str, number: int, piece: int = 0) -> str:
    """The id of a piece of part ``number``.  All ids of one blob must have one length.

    Those of an upload that another process left unfinished count too, so they have the shape
    that Xen Orchestra's client gives them: a UUID and twelve digits.
    """
    return base64.b64encode(f"{upload}{number:07d}{piece:05d}".encode()).decode()


def dump_block_list(ids: Sequence[str]) -> bytes:
    """The body of Put Block List.

    ``Latest`` finds the blocks committed too, when a list whose answer was lost is sent again.
    """
    blocks = "".join(f"<Latest>{identifier}</Latest>" for identifier in ids)
    return f'<?xml version="1.0" encoding="utf-8"?><BlockList>{blocks}</BlockList>'.encode()
