"""The bitmap of a block against a model that looks at one sector at a time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.disks.bitmap import settle_bitmap
from proxy.errors import Corrupt
from proxy.formats.vhd import BITMAP_SIZE, BLOCK_SIZE, FULL_BITMAP

SECTORS = st.sets(st.integers(0, 4095) | st.sampled_from([0, 1, 7, 8, 4095]), max_size=20)


@settings(deadline=None, max_examples=40)
@given(SECTORS, st.integers(1, 4096), st.booleans(), st.booleans())
def test_every_sector_is_the_data_or_zeros(
    odd: set[int], sectors: int, flip: bool, is_differencing: bool
) -> None:
    present = set(range(4096)) - odd if flip else odd
    bitmap = bytearray(BITMAP_SIZE)
    for sector in present:
        bitmap[sector // 8] |= 0x80 >> sector % 8
    stored = memoryview(bytearray(bitmap + b"\x5a" * BLOCK_SIZE))
    length = sectors * 512
    if is_differencing and not present.issuperset(range(sectors)):
        with pytest.raises(Corrupt, match="some sectors"):
            settle_bitmap(stored, length, is_differencing=True)
        return
    settle_bitmap(stored, length, is_differencing=is_differencing)
    assert stored[:BITMAP_SIZE] == FULL_BITMAP
    expected = b"".join(
        b"\x5a" * 512 if sector < sectors and sector in present else bytes(512)
        for sector in range(4096)
    )
    assert bytes(stored[BITMAP_SIZE:]) == expected
