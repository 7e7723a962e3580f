"""Counts what is done on a remote, by verb; the daemon shows it, nothing here decides on it."""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar, cast

import trio

from proxy.errors import ProxyError
from proxy.remotes.wrapper import Operation, Wrapper

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

    from proxy.remotes.interface import Remote

T = TypeVar("T")

_MOST_CODES = 32


@dataclass(slots=True)
class Counts:
    """Of one verb.  ``calls`` are those that have ended, ``size`` the bytes written or read,
    ``failed`` by the error's code; what was cancelled counts under ``ECANCELED``."""

    calls: int = 0
    running: int = 0
    size: int = 0
    seconds: float = 0.0
    failed: dict[str, int] = field(default_factory=dict[str, int])

    def copy(self) -> Counts:
        return replace(self, failed=dict(self.failed))

    def add(self, size: int, seconds: float, failure: str | None) -> None:
        """One call that has ended."""
        self.calls += 1
        self.size += size
        self.seconds += seconds
        if failure is not None:
            if failure not in self.failed and len(self.failed) >= _MOST_CODES:
                failure = "other"  # a server may make up as many as it likes
            self.failed[failure] = self.failed.get(failure, 0) + 1


_tallies: ContextVar[tuple[dict[str, Counts], ...]] = ContextVar("tallies", default=())


@contextlib.contextmanager
def tally() -> Iterator[Mapping[str, Counts]]:
    """What this task, and those it starts in the block, do on remotes with :class:`Metrics`.

    An operation counts when it has ended.  Blocks may be nested: the outer one counts all.
    """
    counts: dict[str, Counts] = {}
    token = _tallies.set((*_tallies.get(), counts))
    try:
        yield counts
    finally:
        _tallies.reset(token)


class Metrics(Wrapper):
    """:meth:`statistics` shows the live counts of this remote.

    ``counts`` is where to count, for figures that outlive the connection.
    """

    def __init__(self, inner: Remote, counts: dict[str, Counts] | None = None) -> None:
        super().__init__(inner)
        self._counts: dict[str, Counts] = {} if counts is None else counts

    def statistics(self) -> Mapping[str, Counts]:
        """By verb, as in :class:`proxy.remotes.wrapper.Operation`; not a copy."""
        return self._counts

    async def around(self, operation: Operation, run: Callable[[], Awaitable[T]]) -> T:
        own = self._counts.setdefault(operation.verb, Counts())
        own.running += 1
        started = trio.current_time()
        size, failure = 0, None
        try:
            result = await run()
            size = _size(operation, result)
        except BaseException as error:
            failure = _code(error)
            raise
        finally:
            own.running -= 1
            seconds = trio.current_time() - started
            own.add(size, seconds, failure)
            for counts in _tallies.get():
                counts.setdefault(operation.verb, Counts()).add(size, seconds, failure)
        return result


def _code(error: BaseException) -> str:
    if isinstance(error, trio.Cancelled):
        return "ECANCELED"
    return error.code if isinstance(error, ProxyError) else "EFAILED"


def _size(operation: Operation, result: object) -> int:
    if operation.data is not None:
        return operation.size
    if isinstance(result, bytes):
        return len(result)
    if operation.verb in ("read.read_into", "read.read_into_at", "edit.read_into") and isinstance(
        result, int
    ):
        return result
    if operation.verb == "read_files":
        contents = cast("Sequence[bytes | ProxyError]", result)
        return sum(len(content) for content in contents if isinstance(content, bytes))
    return 0
