"""A sample is its share, stable for a day, and goes round."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Refused
from proxy.repository.sampling import Sample

DAY = 86400


@given(st.floats(0.01, 1), st.integers(0, 300), st.integers(0, 40_000), st.text(max_size=5))
def test_it_is_its_share_and_everything_has_its_turn(
    share: float, count: int, day: int, key: str
) -> None:
    seen: set[int] = set()
    for later in range(math.ceil(1 / share)):
        sample = Sample(share, now=(day + later) * DAY + 7)
        taken = list(sample.of(range(count), key))
        assert taken == list(Sample(share, now=(day + later + 1) * DAY - 1).of(range(count), key))
        assert taken == sorted(set(taken))
        assert abs(len(taken) - share * count) <= 1
        assert taken or not count
        seen.update(taken)
    assert seen == set(range(count))


def test_all_of_it_is_all() -> None:
    assert list(Sample(1, now=0).of([3, 5, 9], "x")) == [3, 5, 9]


@pytest.mark.parametrize("share", [0, -0.5, 1.01, math.nan, math.inf])
def test_what_is_no_share_is_refused(share: float) -> None:
    with pytest.raises(Refused):
        Sample(share, now=0)
