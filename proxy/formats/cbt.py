"""The answer of ``VDI.list_changed_blocks``: a bitmap in base64, a bit for each 64 KiB.

The first 64 KiB are the highest bit of the first byte, so 4 bytes are one block of 2 MiB.
Where the bitmap leaves a doubt the block counts as changed: reading a block too many costs
2 MiB, taking one for unchanged costs the backup.
"""

from __future__ import annotations

import base64
from array import array
from typing import Final

from proxy.errors import Corrupt
from proxy.formats.vhd import BLOCK_SIZE, MAX_ENTRIES, blocks_of

GRAIN: Final = 64 * 1024
"""Bytes of the disk that one bit stands for."""
_WORD: Final = BLOCK_SIZE // GRAIN // 8
"""Bytes of the bitmap for one block."""


def changed_flags(text: str, virtual_size: int) -> bytes:
    """One byte for each 2 MiB block of a disk of ``virtual_size``: 1 where it changed, else 0.

    The bitmap may have any length.  Bytes behind the end of the disk are not looked at; blocks
    that it does not cover in full count as changed, and so does the last block of a disk that
    ends inside a grain, for whose rest hosts keep no bit.

    Raises ``Corrupt`` for text that is not base64 and for a disk too large to be one.
    """
    count = blocks_of(virtual_size)
    if not 0 <= count <= MAX_ENTRIES:
        raise Corrupt("changed blocks: impossible size of the disk", data={"what": "size"})
    needed = -(-virtual_size // (8 * GRAIN))
    try:
        # Only as much as the disk needs: three bytes in each four characters.
        bitmap = base64.b64decode(text[: -(-needed // 3) * 4], validate=True)[:needed]
    except ValueError as error:
        raise Corrupt(
            "changed blocks: the bitmap is not base64", data={"what": "base64"}
        ) from error
    covered = count if len(bitmap) == needed else len(bitmap) // _WORD
    flags = bytearray(map(bool, array("I", bitmap.ljust(count * _WORD, b"\0"))))
    flags[covered:] = b"\1" * (count - covered)
    if virtual_size % GRAIN:
        flags[-1] = 1
    return bytes(flags)
