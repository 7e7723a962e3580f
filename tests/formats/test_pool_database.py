"""What tells a whole database of a pool from anything else that a host may send."""

from __future__ import annotations

import itertools
import lzma
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Corrupt
from proxy.formats.pool_database import DatabaseCheck

POOL = "1656a1c0-d499-45bd-9bd7-2e870992ce0f"
RECORDED = Path(__file__).parents[1] / "fixtures" / "repository" / "metadata" / "remote"


def check(*pieces: bytes, pool: str = POOL) -> None:
    made = DatabaseCheck(pool)
    for piece in pieces:
        made.feed(memoryview(piece))
    made.finish()


def recorded() -> bytes:
    return next(RECORDED.glob("xo-pool-metadata-backups/*/*/*/data")).read_bytes()


@given(cuts=st.lists(st.integers(0, 1500), max_size=8))
def test_a_recorded_database_is_whole_in_any_pieces(cuts: list[int]) -> None:
    data = recorded()
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    check(*(data[a:b] for a, b in itertools.pairwise(places)))
    check(data, b"\n \n")


@given(kept=st.integers(0, 10_000))
def test_no_part_of_it_is(kept: int) -> None:
    data = recorded()
    with pytest.raises(Corrupt):
        check(data[: kept % len(data)])


def test_another_pool_and_other_files_are_refused() -> None:
    with pytest.raises(Corrupt, match="does not hold the pool"):
        check(recorded(), pool="9656a1c0-d499-45bd-9bd7-2e870992ce0f")
    with pytest.raises(Corrupt, match="no XML"):
        check(lzma.compress(recorded()))
    with pytest.raises(Corrupt, match="no XML"):
        check(b"")
    with pytest.raises(Corrupt, match="before its end"):
        check(b"<html>500 Internal Server Error</html>")
