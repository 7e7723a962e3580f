"""``test.*``: harmless calls by which a client tries its own code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from proxy.errors import ProxyError, Refused
from proxy.rpc.registry import Params, Registry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from proxy.rpc.context import Context

methods = Registry()


class Range(Params, kw_only=True):
    start: float = 0
    step: float | msgspec.UnsetType = msgspec.UNSET
    stop: float


class Throw(Params):
    message: str


@methods.method("test.range", Range, result={"type": "number", "x-stream": "ndjson"})
def count(_context: Context, params: Range) -> Iterator[float]:
    """Numbers from ``start`` up or down to ``stop``, without it."""
    step = params.step
    if step is msgspec.UNSET:
        step = -1 if params.start > params.stop else 1
    if step == 0:
        raise Refused("a step of 0 would never end", code="EDOM")
    return _count(params.start, params.stop, step)


def _count(start: float, stop: float, step: float) -> Iterator[float]:
    # by multiples: adding up would lose a small step against a large start, for ever
    index = 0
    value = start
    while value < stop if step > 0 else value > stop:
        yield int(value) if value == int(value) else value
        index += 1
        value = start + index * step


@methods.method("test.throw", Throw)
def throw(_context: Context, params: Throw) -> None:
    raise ProxyError(params.message)
