"""Counts what is done on a remote, by verb; the daemon shows it, nothing here decides on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar, cast

import trio

from proxy.errors import ProxyError
from proxy.remotes.wrapper import Operation, Wrapper

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from proxy.remotes.interface import Remote

T = TypeVar("T")


@dataclass(slots=True)
class Counts:
    """Of one verb.  ``size`` is the bytes written or read, ``failed`` by the error's code;
    what was cancelled counts under ``ECANCELED``."""

    calls: int = 0
    running: int = 0
    size: int = 0
    seconds: float = 0.0
    failed: dict[str, int] = field(default_factory=dict[str, int])


class Metrics(Wrapper):
    """:meth:`statistics` shows the live counts of this remote."""

    def __init__(self, inner: Remote) -> None:
        super().__init__(inner)
        self._counts: dict[str, Counts] = {}

    def statistics(self) -> Mapping[str, Counts]:
        """By verb, as in :class:`proxy.remotes.wrapper.Operation`; not a copy."""
        return self._counts

    async def around(self, operation: Operation, run: Callable[[], Awaitable[T]]) -> T:
        counts = self._counts.setdefault(operation.verb, Counts())
        counts.calls += 1
        counts.running += 1
        started = trio.current_time()
        try:
            result = await run()
        except BaseException as error:
            code = "EFAILED"
            if isinstance(error, trio.Cancelled):
                code = "ECANCELED"
            elif isinstance(error, ProxyError):
                code = error.code
            counts.failed[code] = counts.failed.get(code, 0) + 1
            raise
        finally:
            counts.running -= 1
            counts.seconds += trio.current_time() - started
        counts.size += _size(operation, result)
        return result


def _size(operation: Operation, result: object) -> int:
    if operation.data is not None:
        return operation.size
    if isinstance(result, bytes):
        return len(result)
    if operation.verb in ("read.read_into", "edit.read_into") and isinstance(result, int):
        return result
    if operation.verb == "read_files":
        contents = cast("Sequence[bytes | ProxyError]", result)
        return sum(len(content) for content in contents if isinstance(content, bytes))
    return 0
