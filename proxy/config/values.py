"""Durations and sizes as people write them."""

from __future__ import annotations

import re


class Seconds(float):
    """A duration.  In a file: a number of *milliseconds*, or ``'5m'``, ``'1.5 hours'``.

    In Python seconds, as Trio counts.  0 means "no limit" or "off" where the key says so.
    """

    __slots__ = ()


class Bytes(int):
    """A size.  In a file: a number of bytes, or ``'256MiB'``, ``'1 GB'``."""

    __slots__ = ()


_DURATION = re.compile(r"(?P<number>\d*\.?\d+) *(?P<unit>[a-z]*)", re.IGNORECASE)
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?) *(?P<prefix>[kmgt]?)(?P<binary>i?)b?", re.IGNORECASE)

# The grammar of npm's "ms", which Xen Orchestra's files and settings use.
_UNITS: dict[str, float] = {}
for _names, _seconds in (
    ("milliseconds millisecond msecs msec ms", 1e-3),
    ("seconds second secs sec s", 1.0),
    ("minutes minute mins min m", 60.0),
    ("hours hour hrs hr h", 3600.0),
    ("days day d", 86400.0),
    ("weeks week w", 7 * 86400.0),
    ("years year yrs yr y", 365.25 * 86400.0),
):
    for _name in _names.split():
        _UNITS[_name] = _seconds


def parse_duration(value: object) -> Seconds:
    """Milliseconds as a number, or text with a unit, to seconds; ``ValueError`` otherwise."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        return Seconds(value / 1000)
    if isinstance(value, str) and (match := _DURATION.fullmatch(value.strip())):
        factor = _UNITS.get(match["unit"].lower() or "ms")
        if factor is not None:
            return Seconds(float(match["number"]) * factor)
    raise ValueError("Expected a duration (milliseconds, or text such as '5m')")


def parse_size(value: object) -> Bytes:
    """Bytes as a number, or text with a unit, to bytes; ``ValueError`` otherwise."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return Bytes(value)
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        base = 1024 if match["binary"] else 1000
        power = " kmgt".index(match["prefix"].lower() or " ")
        return Bytes(float(match["number"]) * base**power)
    raise ValueError("Expected a size (bytes, or text such as '256MiB')")
