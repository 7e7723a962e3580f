"""Tries again what a storage failed to do for a reason that passes.

Only ``Unreachable`` passes: a full disk, a missing file, a refusal or a bug are the same the
second time.  What cannot be repeated is not: bytes of an open file, a commit, and exclusive
writes, whose first try may have happened after all.  Nor is a sync: after a failed one the
kernel calls lost pages clean, and a second one would succeed.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, TypeVar

import structlog
import trio

from proxy.errors import NotFound, ProxyError, Unreachable
from proxy.remotes.wrapper import Operation, Wrapper

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from proxy.remotes.interface import Remote

T = TypeVar("T")

WAITS = (0.1, 0.2, 0.5, 1.0, 2.0)
"""Seconds between the tries, upstream's."""
_SILENCE = 30.0

_log = structlog.get_logger(__name__)

_REPEATABLE = frozenset(
    {
        *("read_file", "read.open", "read.read_into", "read.read_at", "read.read_into_at"),
        *("list", "stat", "info", "capabilities"),
        *("write_file", "create.open", "rename", "unlink", "mktree", "rmdir", "rmtree"),
        *("edit.open", "edit.read_into", "edit.write_at", "edit.truncate", "batch.open"),
        *("batch.write", "lock.check"),
    }
)


class Told:
    """Tells the daemon's log that a remote fails, now and then: a dead one fails a thousand
    times a minute."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._silent_until = float("-inf")
        self._more = 0

    def __call__(self, operation: Operation, error: ProxyError) -> None:
        now = trio.current_time()
        if now < self._silent_until:
            self._more += 1
            return
        _log.warning(
            "an operation on a remote failed and is tried again",
            remote=self._url,
            verb=operation.verb,
            path=operation.path,
            error=error.message,
            more=self._more,
        )
        self._silent_until, self._more = now + _SILENCE, 0


class Retry(Wrapper):
    """``told`` hears of every failure that is tried again, before the wait."""

    def __init__(
        self,
        inner: Remote,
        *,
        waits: Sequence[float] = WAITS,
        told: Callable[[Operation, ProxyError], None] | None = None,
    ) -> None:
        super().__init__(inner)
        self._waits = waits
        self._told = told

    async def around(self, operation: Operation, run: Callable[[], Awaitable[T]]) -> T:
        if self._is_repeatable(operation):
            for wait in self._waits:
                try:
                    return await run()
                except Unreachable as error:
                    if "retryIn" in error.data:  # whoever failed it knows that it is too early
                        raise
                    if self._told is not None:
                        self._told(operation, error)
                await trio.sleep(wait)
        return await run()

    def _is_repeatable(self, operation: Operation) -> bool:
        if operation.verb not in _REPEATABLE or operation.exclusive:
            return False
        # files of an immutable remote are all exclusive
        exclusive = ("write_file", "create.open", "batch.write")
        return not (self.is_immutable and operation.verb in exclusive)

    async def read_files(
        self, paths: Sequence[str], *, limit: int = 16 * 1024 * 1024
    ) -> Sequence[bytes | ProxyError]:
        """In one go, then those that failed for a passing reason one by one."""
        contents: deque[bytes | ProxyError] = deque()
        for path, content in zip(
            paths, await self.inner.read_files(paths, limit=limit), strict=True
        ):
            again = content
            if isinstance(content, Unreachable):
                try:
                    again = await self.read_file(path, limit=limit)
                except ProxyError as error:
                    again = error
            contents.append(again)
        return tuple(contents)

    async def unlink(self, path: str, *, missing_ok: bool = True) -> None:
        tries = 0

        async def run() -> None:
            nonlocal tries
            tries += 1
            # a try that failed may have removed it all the same
            await self.inner.unlink(path, missing_ok=missing_ok or tries > 1)

        await self.around(Operation("unlink", path), run)

    async def rmdir(self, path: str, *, missing_ok: bool = True) -> None:
        tries = 0

        async def run() -> None:
            nonlocal tries
            tries += 1
            await self.inner.rmdir(path, missing_ok=missing_ok or tries > 1)

        await self.around(Operation("rmdir", path), run)

    async def rename(self, old: str, new: str) -> None:
        """A second try that misses ``old`` has succeeded if ``new`` is what ``old`` was."""
        before = await self.stat(old)
        tries = 0

        async def run() -> None:
            nonlocal tries
            tries += 1
            try:
                await self.inner.rename(old, new)
            except NotFound:
                if tries == 1 or await self.inner.stat(new) != before:
                    raise

        await self.around(Operation("rename", old, target=new), run)
