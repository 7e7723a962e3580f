"""VHD directory: a VHD as a folder of small files ("chunks"); bytes in, values out.

::

    chunk-filters.json    ["brotli"] or ["gzip"]; absent: nothing is compressed
    header, footer        those of a VHD file
    bat                   which blocks are present: one bit a block, MSB first
    blocks/<i // 1000>/<i % 1000>    bitmap and data of block i

Every chunk but ``chunk-filters.json`` is compressed by itself.  Bytes that contradict this
raise ``Corrupt`` whose ``data`` says ``what``; a compression that is not known is ``Refused``
(``ENOTSUP``), as nothing is wrong with such a disk.  What is decompressed is bounded before
it is made.
"""

from __future__ import annotations

import zlib
from enum import StrEnum
from typing import TYPE_CHECKING, Final

import brotli
import msgspec

from proxy.errors import Corrupt, Refused
from proxy.formats.vhd import BLOCK_SIZE, FULL_BITMAP, STORED_BLOCK

if TYPE_CHECKING:
    from collections.abc import Sequence

FILTERS, HEADER, FOOTER, TABLE, BLOCKS = "chunk-filters.json", "header", "footer", "bat", "blocks"
SMALL_CHUNK: Final = 65536
"""More than any header, footer or list of filters has as stored."""
LONGEST_BLOCK: Final = STORED_BLOCK + 65536
"""Bytes of a block as stored: what cannot be compressed grows a little."""

_BLOCKS_PER_FOLDER: Final = 1000
_BLOCK_WINDOW: Final = 18
"""Quality 0 looks back 256 KiB at most: a wider window compresses no better, and a 2 MiB
block then costs up to five times as long (what does not compress most)."""
_SAMPLE: Final = 1024
_SAMPLED: Final = range(len(FULL_BITMAP), STORED_BLOCK, BLOCK_SIZE // 32)
"""Where the samples of a block begin."""
_WORTHLESS: Final = 0.98
"""The part of a sample that must be left for compressing to be worth it."""
_TO_DIGITS: Final = bytes.maketrans(b"\0\1", b"01")
_FROM_DIGITS: Final = bytes.maketrans(b"01", b"\0\1")


class Compression(StrEnum):
    BROTLI = "brotli"
    GZIP = "gzip"
    NONE = "none"
    """Never written down: the list of filters is absent."""


def parse_filters(data: bytes | None) -> Compression:
    """The compression that ``chunk-filters.json`` names; ``None``: the file is absent.

    Only the first entry counts, as for Xen Orchestra.
    """
    if data is None:
        return Compression.NONE
    try:
        names = msgspec.json.decode(data, type=list[str])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _corrupt("filters", f"the list of filters cannot be read ({error})") from error
    if not names:
        return Compression.NONE
    if names[0] not in (Compression.BROTLI, Compression.GZIP):
        raise Refused(
            f"the disk is compressed by {names[0][:40]!r}, of which this version knows nothing",
            code="ENOTSUP",
            data={"compression": names[0][:40]},
        )
    return Compression(names[0])


def pack_filters(compression: Compression) -> bytes | None:
    """The content of ``chunk-filters.json``, ``None`` when there must be none."""
    if compression is Compression.NONE:
        return None
    return msgspec.json.encode([compression.value])


def block_path(index: int) -> str:
    """Of a block, from the directory of the disk."""
    folder, name = divmod(index, _BLOCKS_PER_FOLDER)
    return f"{BLOCKS}/{folder}/{name}"


def pack_table(flags: bytes, entries: int) -> bytes:
    """``bat`` of blocks with one byte each, 1 where present.

    As long as Xen Orchestra makes it, ``entries`` *bytes*: its merge drops silently what a
    shorter one has no room for.
    """
    digits = flags.translate(_TO_DIGITS).ljust(-(-len(flags) // 8) * 8, b"0")
    bits = int(digits or b"0", 2).to_bytes(len(digits) // 8, "big")
    return bits.ljust(entries, b"\0")


def parse_table(data: bytes, count: int) -> bytes:
    """One byte for each of ``count`` blocks, 1 where present; blocks behind the end are not."""
    bits = data[: -(-count // 8)]
    digits = f"{int.from_bytes(bits, 'big'):0{8 * len(bits)}b}" if bits else ""
    return digits.encode().translate(_FROM_DIGITS)[:count].ljust(count, b"\0")


def compress(compression: Compression, data: bytes) -> bytes:
    """A small chunk as stored."""
    if compression is Compression.BROTLI:
        return brotli.compress(data, quality=0)
    if compression is Compression.GZIP:
        return zlib.compress(data, 1, wbits=31)
    return data


def compress_block(compression: Compression, stored: memoryview) -> bytes | memoryview:
    """A block (:data:`STORED_BLOCK` bytes) as stored; takes up to 30 ms without the GIL.

    Without compression the answer is ``stored`` itself.
    """
    pieces = block_pieces(compression, stored)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def block_pieces(compression: Compression, stored: memoryview) -> Sequence[bytes | memoryview]:
    """As :func:`compress_block`, in pieces, for those who copy them anyway."""
    if compression is Compression.NONE:
        return (stored,)
    if _ZEROS.startswith(stored):  # a comparison at the speed of memory
        return (_ZEROS_COMPRESSED[compression],)
    if compression is Compression.BROTLI:
        if _is_incompressible(stored):
            return (_AS_IT_IS, stored, _BROTLI_END)
        return (brotli.compress(stored, quality=0, lgwin=_BLOCK_WINDOW),)
    return (zlib.compress(stored, 1, wbits=31),)


def _is_incompressible(stored: memoryview) -> bool:
    """Judged by samples from all over the block, at about a hundredth of what compressing it
    costs.  What guests encrypted or compressed themselves takes the longest to compress."""
    sample = b"".join([stored[at : at + _SAMPLE] for at in _SAMPLED])
    return len(brotli.compress(sample, quality=0)) > _WORTHLESS * len(sample)


def decompress(compression: Compression, data: bytes, *, longest: int) -> bytes:
    """The content of a chunk: ``Corrupt`` when it is cut, damaged, followed by anything, or
    has more than ``longest`` bytes, of which at most about twice as many are made."""
    if compression is Compression.NONE:
        content, complete = data, True
    elif compression is Compression.BROTLI:
        content, complete = _from_brotli(data, longest)
    else:
        content, complete = _from_gzip(data, longest)
    if len(content) > longest:
        raise _corrupt("chunk size", f"more than {longest} bytes")
    if not complete:
        raise _corrupt("chunk cut", f"the {compression} stream is cut")
    return content


def _from_brotli(data: bytes, longest: int) -> tuple[bytes, bool]:
    if len(data) == _PLAIN_BLOCK and data.startswith(_AS_IT_IS) and data.endswith(_BROTLI_END):
        return data[len(_AS_IT_IS) : -len(_BROTLI_END)], True  # one copy, not the decoder's four
    decoder = brotli.Decompressor()
    try:
        content = decoder.process(data, output_buffer_limit=longest + 1)
    except brotli.error as error:
        raise _corrupt("chunk", "no brotli stream") from error
    return content, decoder.is_finished()


def _from_gzip(data: bytes, longest: int) -> tuple[bytes, bool]:
    decoder = zlib.decompressobj(wbits=31)
    try:
        content = decoder.decompress(data, longest + 1)
    except zlib.error as error:
        raise _corrupt("chunk", f"no gzip stream ({error})") from error
    if decoder.unused_data:
        raise _corrupt("chunk", "something follows the gzip stream")
    return content, decoder.eof


def _corrupt(what: str, message: str) -> Corrupt:
    return Corrupt(f"corrupt VHD directory: {message}", data={"what": what})


_AS_IT_IS: Final = (
    0 << 0  # one bit: a window of 64 KiB
    | 0 << 1  # one bit: not the last meta-block
    | (6 - 4) << 2  # two bits: six nibbles of length
    | (STORED_BLOCK - 1) << 4
    | 1 << 28  # one bit: not compressed
).to_bytes(4, "little")
"""What precedes the bytes of a block that stands uncompressed in a brotli stream (RFC 7932,
sections 9.1 and 9.2)."""
_BROTLI_END: Final = b"\x03"
"""A last meta-block without content."""
_PLAIN_BLOCK: Final = len(_AS_IT_IS) + STORED_BLOCK + len(_BROTLI_END)
_ZEROS: Final = FULL_BITMAP + bytes(BLOCK_SIZE)
_ZEROS_COMPRESSED: Final = {
    Compression.BROTLI: brotli.compress(_ZEROS, quality=0, lgwin=_BLOCK_WINDOW),
    Compression.GZIP: zlib.compress(_ZEROS, 1, wbits=31),
}
