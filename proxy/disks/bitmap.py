"""What the bitmap of a stored block means for its data."""

from __future__ import annotations

from proxy.errors import Corrupt
from proxy.formats.vhd import BITMAP_SIZE, BLOCK_SIZE, FULL_BITMAP, SECTOR


def settle_bitmap(stored: memoryview, length: int, *, is_differencing: bool) -> None:
    """Make a block that was just read what blocks are here: a full bitmap, zeros where
    nothing is.

    ``length`` is how many bytes of it belong to the disk; behind them are zeros.  A sector that
    the bitmap lacks is zeros in a dynamic disk.  In a differencing one its content is the
    parent's, which nobody here mixes into a block: ``Corrupt``.  Neither Xen Orchestra nor
    XAPI writes such blocks.
    """
    bitmap = bytes(stored[:BITMAP_SIZE])
    if bitmap != FULL_BITMAP:
        sectors = -(-length // SECTOR)
        bits = f"{int.from_bytes(bitmap, 'big'):0{8 * BITMAP_SIZE}b}"[:sectors]
        start = bits.find("0")
        if start >= 0 and is_differencing:
            raise Corrupt(
                "a block of a differencing disk holds some sectors only",
                data={"what": "partial block", "sector": start},
            )
        while start >= 0:
            end = bits.find("1", start)
            end = sectors if end < 0 else end
            _clear(stored, BITMAP_SIZE + start * SECTOR, BITMAP_SIZE + end * SECTOR)
            start = bits.find("0", end)
        stored[:BITMAP_SIZE] = FULL_BITMAP
    if length < BLOCK_SIZE:
        _clear(stored, BITMAP_SIZE + length, len(stored))


def _clear(view: memoryview, start: int, end: int) -> None:
    view[start:end] = bytes(end - start)
