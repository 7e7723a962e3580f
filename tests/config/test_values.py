from __future__ import annotations

import math

import pytest

from proxy.config import parse_duration, parse_size


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (0, 0),
        (600e3, 600),
        (250, 0.25),
        ("250", 0.25),
        ("5m", 300),
        ("1 min", 60),
        ("1.5 hours", 5400),
        (".5s", 0.5),
        ("2 DAYS", 172800),
        ("1w", 604800),
        ("1y", 31557600),
        (math.inf, math.inf),
    ],
)
def test_durations_follow_the_grammar_of_ms(given: object, seconds: float) -> None:
    assert parse_duration(given) == seconds


@pytest.mark.parametrize(
    "given", [-1, "-5m", "", "m", "5 parsecs", True, None, [], "1..5s", math.nan]
)
def test_anything_else_is_no_duration(given: object) -> None:
    with pytest.raises(ValueError, match="Expected a duration"):
        parse_duration(given)


@pytest.mark.parametrize(
    ("given", "count"),
    [
        (0, 0),
        (17, 17),
        ("17", 17),
        ("64MiB", 67108864),
        ("1 GB", 10**9),
        ("1.5k", 1500),
        ("2TiB", 2**41),
    ],
)
def test_sizes(given: object, count: int) -> None:
    assert parse_size(given) == count


@pytest.mark.parametrize("given", [-1, 1.5, "", "MiB", "1 XiB", True, None])
def test_anything_else_is_no_size(given: object) -> None:
    with pytest.raises(ValueError, match="Expected a size"):
        parse_size(given)
