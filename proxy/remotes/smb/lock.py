"""Upstream's lock (:mod:`proxy.remotes.locking`) on a share: the same directory, the same record.

Interoperates with whoever takes it on the exported directory itself or through a mount.  A lock
is ours by the file's number on the server, which a handle that stays open keeps from being given
to another directory; where the connection was lost meanwhile, by the number and the exact mtime
that we set.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from proxy.errors import Busy, Conflict, NotFound, ProxyError, Refused, Unreachable
from proxy.remotes import paths
from proxy.remotes.holding import parse_record
from proxy.remotes.locking import (
    LONGEST_RECORD,
    MTIME_TOLERANCE,
    RACES,
    STALE_SECONDS,
    KeptLock,
    Seen,
)
from proxy.remotes.smb import status, wire
from proxy.remotes.smb.share import let_go
from proxy.remotes.smb.status import StatusError
from proxy.remotes.smb.wire import Access, Disposition, Options
from proxy.runtime.deadlines import deadline

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from proxy.remotes.holding import Holder
    from proxy.remotes.smb.connection import Link
    from proxy.remotes.smb.share import Share

T = TypeVar("T")

_REFRESH_SECONDS: Final = 2.0
"""For one try to refresh, connecting included; there must be room for a second one."""
_STEP_SECONDS: Final = 10.0
"""For every other step: the threads of locks are few."""
_DIRECTORY: Final = Options.DIRECTORY | Options.OPEN_REPARSE_POINT
_ANYTHING: Final = Options.OPEN_REPARSE_POINT
_TOLERANCE: Final = int(MTIME_TOLERANCE * 1e7)
_TAKEN_BY_OTHERS: Final = "somebody else refreshes it"


class ShareLock(KeptLock):
    """``run`` calls a blocking function in a thread and ends its connection on a cancel."""

    def __init__(
        self,
        share: Share,
        path: str,
        owner: str,
        run: Callable[[Callable[[], object]], Awaitable[object]],
    ) -> None:
        super().__init__(path, owner)
        self._share = share
        self._run = run
        self._place = paths.join(self._directory, self._name)
        self._record = paths.join(self._directory, self._record_name)
        share.name(self._place)
        self._number: int | None = None
        self._pin: tuple[Link, bytes] | None = None
        self._modified = 0
        self._ahead = 0
        """Of the server's clock, in units of 100 ns, before our monotonic one."""

    async def in_thread(
        self,
        function: Callable[..., T],
        *args: object,
        dispose: Callable[[T], object] | None = None,
    ) -> T:
        del dispose  # a call whose caller has left is waited for
        outcome: list[T] = []
        seconds = _STEP_SECONDS
        if function == self._refresh_now:
            left = STALE_SECONDS - 1 - (trio.current_time() - self._fresh_at)
            seconds = max(0.5, min(_REFRESH_SECONDS, left))
        with deadline(f"the lock of '{self.path}'", seconds):
            await self._run(lambda: outcome.append(function(*args)))
        return outcome[0]

    async def give_up(self) -> None:
        await self.in_thread(self.release)

    # -- taking

    def _try(self) -> Seen | None:
        with self._share.translated("lock", self._place):
            for _ in range(RACES):
                try:
                    self._make()
                except StatusError as error:
                    if error.status == status.PATH_NOT_FOUND:
                        self._share.mktree(self._directory)
                        continue
                    if error.status not in (status.NAME_COLLISION, status.DELETE_PENDING):
                        raise
                else:
                    return None
                try:
                    return self._look()
                except StatusError as error:
                    if error.status not in status.MISSING:  # released this moment
                        raise
        raise self.many_want_it()

    def _make(self) -> None:
        link = self._share.link()
        access = Access.DELETE | Access.WRITE_ATTRIBUTES
        answers = link.compound(
            self._share.creation(self._place, access, Disposition.CREATE, _DIRECTORY),
            wire.query_number(),
        )
        made = wire.parse_created(answers[0])
        self._pin = (link, made.file_id)
        self._number = wire.parse_number(answers[1])
        self._modified = made.modified
        self._ahead = made.modified - _ticks()
        self._touch(link, made.file_id)
        self._write_record()

    def _look(self) -> Seen:
        found, number = self._identified(self._place)
        if not found.is_dir or found.is_link:
            raise StatusError(status.NOT_A_DIRECTORY)
        age = (self._clock_of_server() - found.modified) / 1e7
        return Seen((0, number, found.modified), age, self._read_record(found.modified))

    def _identified(self, path: str) -> tuple[wire.Created, int]:
        answers = self._share.link().compound(
            self._share.creation(path, Access(0), options=_ANYTHING),
            wire.query_number(),
            wire.close(),
        )
        return wire.parse_created(answers[0]), wire.parse_number(answers[1])

    def _clock_of_server(self) -> int:
        name = paths.temporary_name(self._name, time.time_ns() // 1_000_000)
        answers = self._share.link().compound(
            self._share.creation(
                paths.join(self._directory, name),
                Access.WRITE | Access.DELETE,
                Disposition.OVERWRITE_OR_CREATE,
            ),
            wire.set_deleted(),
            wire.close(),
        )
        return wire.parse_created(answers[0]).modified

    def _take_over(self, stale: tuple[int, int, int]) -> bool:
        """As on a directory: rename it away, look at what that got, give another one back."""
        aside = paths.join(
            self._directory, paths.temporary_name(self._name, time.time_ns() // 1_000_000)
        )
        with self._share.translated("lock", self._place):
            try:
                if self._identity_of(self._place) != stale:
                    return False
                self._share.rename_only(self._place, aside, replace=False)
                if self._identity_of(aside) == stale:
                    self._share.remove(aside, _DIRECTORY, "rmdir")
                    return True
            except StatusError as error:
                if error.status in status.MISSING:
                    return True
                raise
            except NotFound:
                return True
            except Conflict as error:
                self._give_back(aside)
                if error.code == "ENOTEMPTY":
                    raise self.not_a_lock() from error
                raise
            except (Busy, Refused):
                self._give_back(aside)
                return False
            self._give_back(aside)
            return False

    def _identity_of(self, path: str) -> tuple[int, int, int]:
        found, number = self._identified(path)
        return 0, number, found.modified

    def _give_back(self, aside: str) -> None:
        try:
            self._share.rename_only(aside, self._place, replace=False)
        except NotFound:
            return
        except Conflict:  # a third one was quicker; the owner of this one will notice
            with contextlib.suppress(NotFound):
                self._share.remove(aside, _DIRECTORY, "rmdir")

    # -- keeping

    def _refresh_now(self) -> str | None:
        with self._share.translated("lock", self._place):
            link, handle, reason = self._reopened(Access.WRITE_ATTRIBUTES)
            if handle is None:
                return reason
            try:
                if reason is None:
                    self._touch(link, handle)
                    self._touch_record()
            finally:
                if reason is None and (self._pin is None or self._pin[0].is_lost):
                    self._pin = (link, handle)
                else:
                    let_go(link, handle)
            return reason

    def _reopened(self, access: Access) -> tuple[Link, bytes | None, str | None]:
        """What has our name now, and why it is not ours."""
        link = self._share.link()
        try:
            answers = link.compound(
                self._share.creation(self._place, access, options=_ANYTHING), wire.query_number()
            )
        except StatusError as error:
            if error.status in status.MISSING:
                return link, None, "its directory is gone"
            raise
        found = wire.parse_created(answers[0])
        if wire.parse_number(answers[1]) != self._number:
            return link, found.file_id, "somebody else took it over"
        is_pinned = self._pin is not None and not self._pin[0].is_lost
        if abs(found.modified - self._modified) > (_TOLERANCE if is_pinned else 0):
            return link, found.file_id, _TAKEN_BY_OTHERS
        return link, found.file_id, None

    def _touch(self, link: Link, handle: bytes) -> None:
        """Set the mtime to the server's own now, and remember what it made of it."""
        assert self._number is not None, "not held"
        answers = link.compound(
            wire.set_modified(_ticks() + self._ahead, handle), wire.query_times(handle)
        )
        self._modified = wire.parse_modified(answers[1])
        self.identity = (0, self._number, self._modified)

    def release(self) -> None:
        """By its handle, so that nobody else's goes: idempotent."""
        if self._number is None:
            return
        try:
            with self._share.translated("unlock", self._place):
                link, handle, reason = self._reopened(Access.DELETE)
                if handle is None:
                    return
                if reason not in (None, _TAKEN_BY_OTHERS):
                    let_go(link, handle)
                    return
                with contextlib.suppress(ProxyError):
                    self._share.remove(self._record)
                try:
                    link.call(wire.set_deleted(handle))
                finally:
                    let_go(link, handle)
        finally:
            self._number = None
            pin, self._pin = self._pin, None
            if pin is not None:
                let_go(*pin)

    # -- the record of the holder: only information, no reason to fail a backup

    def _write_record(self) -> None:
        text = self.record(wire.to_seconds(self._modified))
        with contextlib.suppress(ProxyError, StatusError, ValueError):
            self._share.link().compound(
                self._share.creation(
                    self._record,
                    Access.WRITE | Access.WRITE_ATTRIBUTES,
                    Disposition.OVERWRITE_OR_CREATE,
                ),
                wire.write(0, text),
                wire.set_modified(self._modified),
                wire.close(),
            )

    def _touch_record(self) -> None:
        with contextlib.suppress(Refused, Unreachable, StatusError):
            self._share.link().compound(
                self._share.creation(self._record, Access.WRITE_ATTRIBUTES),
                wire.set_modified(self._modified),
                wire.close(),
            )

    def _read_record(self, modified: int) -> Holder | None:
        try:
            answers = self._share.link().compound(
                self._share.creation(self._record, Access.READ),
                wire.read(0, LONGEST_RECORD),
                wire.close(),
            )
            if abs(wire.parse_created(answers[0]).modified - modified) > _TOLERANCE:
                return None
            return parse_record(bytes(wire.parse_data(answers[1])))
        except (StatusError, ValueError):
            return None


def _ticks() -> int:
    return time.monotonic_ns() // 100
