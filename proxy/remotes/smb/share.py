"""Blocking file operations on a share, below one directory of it.

A share opens its connection when it is needed and opens a new one when that was lost; handles
belong to the connection that they were opened on.  Every operation on a path is one compound of
messages, one round trip.  Links are opened as themselves and never followed by us; what a server
resolves on its own side (Samba's links inside the share, junctions) no client can see.

Everything here blocks, each answer under a deadline; :mod:`proxy.remotes.smb.remote` calls it in
worker threads and ends the connection when a cancelled caller cannot wait.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final, TypeVar

from proxy.errors import Conflict, Corrupt, NotFound, ProxyError, Refused, Unreachable
from proxy.remotes import paths
from proxy.remotes.interface import Entry, FileStat, RemoteInfo
from proxy.remotes.posix import split
from proxy.remotes.smb import status, wire
from proxy.remotes.smb.connection import (
    FLUSH_SECONDS,
    Link,
    Login,
    connect,
)
from proxy.remotes.smb.names import Place
from proxy.remotes.smb.status import StatusError, from_status, translated
from proxy.remotes.smb.transport import Transport
from proxy.remotes.smb.wire import Access, Disposition, Options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from proxy.remotes.smb.connection import Pending

T = TypeVar("T")

_LOOK: Final = Access.READ_ATTRIBUTES | Access.SYNCHRONIZE
_FILE: Final = Options.NOT_A_DIRECTORY | Options.OPEN_REPARSE_POINT
_DIRECTORY: Final = Options.DIRECTORY | Options.OPEN_REPARSE_POINT
_ANYTHING: Final = Options.OPEN_REPARSE_POINT
_AT_ONCE: Final = 64 * 1024
"""Bytes of a file that are read with the message that opens it."""
_FAILURE_COUNTS_SECONDS: Final = 2.0
"""How long a failed connect answers for others, so that they do not all wait for a dead server."""
_CLOSE_WAITS_SECONDS: Final = 10.0
_REPLACE_TRIES: Final = 10
_REPLACE_PAUSE_SECONDS: Final = 0.1
"""Small files are read in less: what still has the target open then keeps it open."""
_ON_THEIR_WAY: Final = 4
"""Requests for bytes of one call that wait for their answers at a time."""


class Call:
    """One blocking call, which may be given up: from then on it gets no connection any more."""

    def __init__(self) -> None:
        self.is_given_up = False

    def run(self, function: Callable[..., T], *args: object) -> T:
        _thread.call = self
        try:
            return function(*args)
        finally:
            _thread.call = None


class _Thread(threading.local):
    call: Call | None = None


_thread = _Thread()


def given_up() -> bool:
    """Whether the call that this thread runs was."""
    return _thread.call is not None and _thread.call.is_given_up


class Share:
    """Thread-safe.  After :meth:`close` everything is refused."""

    def __init__(
        self,
        login: Login,
        place: Place,
        *,
        names: Share | None = None,
        opener: Callable[[Login, Transport], Link] = connect,
    ) -> None:
        self.names = names or self
        """The same share over another connection, for renames: servers refuse to replace a file
        that the connection itself has open."""
        self._login = login
        self._place = place
        self._opener = opener
        self._connecting = threading.Lock()
        self._link: Link | None = None
        self._transport: Transport | None = None
        self._failure: tuple[float, ProxyError] | None = None
        self._closed = False
        self.is_read_only = login.options.read_only
        self.read_size = login.options.read_size
        self.write_size = login.options.write_size

    # -- the connection

    def link(self) -> Link:
        """The connection, opened when there is none.  ``Refused`` (``EBADF``) once closed;
        ``Unreachable`` (``ECANCELED``) in a call that was given up."""
        with self._connecting:
            self._refuse_given_up()
            if self._closed:
                raise Refused("EBADF: the remote was closed", code="EBADF")
            if self._link is not None and not self._link.is_lost:
                return self._link
            if self._failure is not None:
                since, failure = self._failure
                if time.monotonic() - since < _FAILURE_COUNTS_SECONDS:
                    raise type(failure)(failure.message, code=failure.code, data=failure.data)
            lost, self._link = self._link, None
            if lost is not None:
                lost.close()  # its thread is ended already or about to
            self._link = self._opened_link()
            self._refuse_given_up()
            return self._link

    def _opened_link(self) -> Link:
        options = self._login.options
        self._transport = Transport(options.address or self._login.server, options.port)
        try:
            link = self._opener(self._login, self._transport)
        except ProxyError as error:
            if not given_up():
                self._failure = (time.monotonic(), error)
            raise
        finally:
            self._transport = None
        self._failure = None
        return link

    @staticmethod
    def _refuse_given_up() -> None:
        if given_up():
            raise Unreachable("ECANCELED: the call was given up", code="ECANCELED")

    def abort(self) -> None:
        """End the connection under everybody; the next operation opens a new one."""
        link, transport = self._link, self._transport
        if transport is not None:
            transport.abort()
        if link is not None:
            link.abort()

    def close(self) -> None:
        """Idempotent.  What is open is lost."""
        self._closed = True
        if self._connecting.acquire(timeout=_CLOSE_WAITS_SECONDS):
            try:
                link, self._link = self._link, None
            finally:
                self._connecting.release()
            if link is not None:
                link.close()
        else:  # somebody connects to a dead server, and finds us closed afterwards
            self.abort()

    # -- opening

    def name(self, path: str) -> str:
        return self._place.name(path)

    def creation(
        self,
        path: str,
        access: Access,
        disposition: Disposition = Disposition.OPEN,
        options: Options = _FILE,
    ) -> wire.Message:
        """The message that opens ``path``."""
        changes = access.changes or disposition is not Disposition.OPEN
        if changes and self.is_read_only:
            raise Refused(
                f"EROFS: '{path}' cannot be changed: the remote has the option 'ro'",
                code="EROFS",
                data={"path": path, "option": "ro"},
            )
        return wire.create(self.name(path), access | _LOOK, disposition, options)

    def opened(
        self,
        path: str,
        access: Access,
        disposition: Disposition = Disposition.OPEN,
        options: Options = _FILE,
    ) -> tuple[Link, wire.Created]:
        """An open file; raises :class:`StatusError`.  The caller closes it: :func:`let_go`."""
        message = self.creation(path, access, disposition, options)
        link = self.link()
        created = wire.parse_created(link.call(message))
        if created.is_link:
            let_go(link, created.file_id)
            raise StatusError(status.STOPPED_ON_SYMLINK)
        return link, created

    def missing_directory(self, path: str, error: StatusError) -> StatusError:
        """``error``, or that a file stands where a directory of ``path`` should.

        Servers answer ``PATH_NOT_FOUND`` for both, and when the remote's own directory is gone:
        that is ``Unreachable`` (``ESTALE``), as nobody may take it for an empty remote.
        """
        if error.status not in (status.PATH_NOT_FOUND, status.NAME_NOT_FOUND):
            return error
        above = paths.parent(path)
        while above:
            try:
                found = self._look(above)
            except StatusError as below:
                if below.status not in status.MISSING:
                    return error
                above = paths.parent(above)
                continue
            if found.is_link:
                return StatusError(status.STOPPED_ON_SYMLINK, error.step)
            if not found.is_dir:
                return StatusError(status.NOT_A_DIRECTORY, error.step)
            return error
        if paths.normalise(path):
            self._refuse_vanished()
        return error

    def _refuse_vanished(self) -> None:
        try:
            self._look("")
        except StatusError as error:
            if error.status in status.MISSING:
                raise Unreachable(
                    "ESTALE: the remote's directory was removed from the share since it was "
                    "opened; check the server's file systems and open the remote again",
                    code="ESTALE",
                ) from None
            raise

    @contextlib.contextmanager
    def translated(self, doing: str, path: str) -> Iterator[None]:
        """:func:`~proxy.remotes.smb.status.translated`, telling ``ENOTDIR`` from ``ENOENT``."""
        with translated(doing, path):
            try:
                yield
            except StatusError as error:
                raise self.missing_directory(path, error) from None

    def _look(self, path: str) -> wire.Created:
        return wire.parse_created(
            self.link().compound(self.creation(path, Access(0), options=_ANYTHING), wire.close())[0]
        )

    # -- reading

    def stat(self, path: str) -> FileStat:
        """Of a link: its own."""
        with self.translated("stat", path):
            found = self._look(path)
        return _file_stat(found)

    def start_read(self, path: str, limit: int) -> tuple[Link, list[Pending]]:
        """Ask for the beginning of a small file; :meth:`finish_read` takes it."""
        link = self.link()
        length = min(limit + 1, _AT_ONCE)
        return link, link.start(
            self.creation(path, Access.READ), wire.read(0, length), wire.close()
        )

    def finish_read(self, path: str, limit: int, started: tuple[Link, list[Pending]]) -> bytes:
        link, requests = started
        with self.translated("open", path):
            try:
                created, data, _ = link.collect(requests)
            except StatusError as error:
                if error.status == status.END_OF_FILE and error.step == 1:
                    return b""
                raise
            opened = wire.parse_created(created)
            content = bytes(wire.parse_data(data))
        if opened.is_link:
            raise from_status(status.STOPPED_ON_SYMLINK, "open", path)
        if len(content) <= limit and opened.size > len(content):
            content = self._read_all(path, limit)
        if len(content) > limit:
            raise Corrupt(
                f"'{path}' is larger than the {limit} bytes that are read at once",
                data={"path": path, "limit": limit},
            )
        return content

    def read_file(self, path: str, limit: int) -> bytes:
        return self.finish_read(path, limit, self.start_read(path, limit))

    def _read_all(self, path: str, limit: int) -> bytes:
        with self.translated("read", path):
            link, created = self.opened(path, Access.READ)
            try:
                buffer = bytearray(min(created.size, limit) + 1)
                filled = 0
                while True:
                    filled += read_into(
                        link,
                        created.file_id,
                        filled,
                        memoryview(buffer)[filled:],
                        self.read_size,
                    )
                    if filled < len(buffer) or filled > limit:
                        return bytes(buffer[:filled])
                    buffer.extend(bytes(min(limit + 1 - filled, _AT_ONCE)))  # it grew meanwhile
            finally:
                let_go(link, created.file_id)

    def items(self, path: str) -> list[wire.Item]:
        """All of it or an error; sorted."""
        found: dict[str, wire.Item] = {}
        with self.translated("scandir", path):
            link, opened = self.opened(path, Access.READ, options=_DIRECTORY)
            try:
                while True:
                    query = wire.query_directory(link.max_listing, opened.file_id)
                    try:
                        some = wire.parse_directory(link.call(query))
                    except StatusError as error:
                        if error.status == status.NO_MORE_FILES:
                            break
                        raise
                    before = len(found)
                    found.update((item.name, item) for item in some)
                    if len(found) == before and some:
                        raise ValueError("a directory's entries repeat without an end")
            finally:
                let_go(link, opened.file_id)
        return [found[name] for name in sorted(found)]

    def entries(self, path: str) -> list[Entry]:
        return [Entry(item.name, item.is_dir) for item in self.items(path)]

    def list_with_stat(self, path: str) -> list[tuple[str, FileStat]]:
        return [
            (item.name, FileStat(item.size, wire.to_seconds(item.modified), item.is_dir))
            for item in self.items(path)
        ]

    def info(self) -> RemoteInfo:
        with self.translated("statvfs", ""):
            answers = self.link().compound(
                self.creation("", Access(0), options=_DIRECTORY), wire.query_space(), wire.close()
            )
            space = wire.parse_space(answers[1])
        return RemoteInfo(space.size, space.size - space.free, space.available)

    # -- changing

    def mktree(self, path: str) -> None:
        """Make ``path`` and what is missing above it, each durable before the next."""
        with self.translated("mkdir", path):
            self._make(paths.normalise(path))

    def make_root(self) -> None:
        """The directory that the remote lives in, from the share's root."""
        above = Share(self._login, Place(""), opener=lambda _login, _transport: self.link())
        above.mktree("/".join(self._place.parts))

    def _make(self, path: str) -> None:
        missing: list[str] = []
        here = path
        while True:
            try:
                self._make_one(here)
                break
            except StatusError as error:
                if error.status != status.PATH_NOT_FOUND or not here:
                    raise
                missing.append(here)
                here = paths.parent(here)
        for below in reversed(missing):
            self._make_one(below)

    def _make_one(self, path: str) -> None:
        disposition = Disposition.OPEN_OR_CREATE if path else Disposition.OPEN
        message = self.creation(path, Access(0), disposition, _DIRECTORY)
        created = wire.parse_created(self.link().compound(message, wire.close())[0])
        if created.is_link:
            raise StatusError(status.STOPPED_ON_SYMLINK)
        if created.is_new:
            self._sync_directory(paths.parent(path))

    def sync_directory(self, path: str) -> None:
        """Make a directory's names durable.  One that somebody removed has none to lose."""
        with self.translated("fsync", path), contextlib.suppress(_Gone):
            self._sync_directory(path)

    def _sync_directory(self, path: str) -> None:
        link = self.link()
        message = self.creation(path, Access.WRITE | Access.APPEND, options=_DIRECTORY)
        try:
            link.compound(message, wire.flush(), wire.close(), seconds=FLUSH_SECONDS)
        except StatusError as error:
            if error.step == 0 and error.status in status.MISSING:
                raise _Gone(error.status) from None
            # servers without the notion write names through
            if error.status not in status.UNSUPPORTED:
                raise

    def rename(self, old: str, new: str, *, replace: bool = True) -> None:
        """Durable on return.  A missing ``old`` makes no directories."""
        self.rename_only(old, new, replace=replace)
        # the new name first: after a crash both may exist, never neither
        above_old, above_new = paths.parent(old), paths.parent(new)
        self.sync_directory(above_new)
        if above_old != above_new:
            self.sync_directory(above_old)

    def rename_only(self, old: str, new: str, *, replace: bool = True) -> None:
        """Not durable before its directories are synced."""
        split(old)
        split(new)
        message = self.creation(old, Access.DELETE, options=_ANYTHING)
        renaming = wire.set_name(self.name(new), replace=replace)
        failure = self._renamed(message, renaming)
        if failure is not None and failure.step > 0 and failure.status in status.MISSING:
            self.mktree(paths.parent(new))
            failure = self._renamed(message, renaming)
        tries = _REPLACE_TRIES if replace else 0
        while tries and self._is_in_use(failure, new) and not given_up():
            tries -= 1
            time.sleep(_REPLACE_PAUSE_SECONDS)
            failure = self._renamed(message, renaming)
        if failure is None:
            return
        if failure.step == 0:
            with self.translated("rename", old):
                raise failure
        if self._is_kind(new, directory=True):
            raise Conflict(
                f"EISDIR: is a directory, rename '{old}' to '{new}'",
                code="EISDIR",
                data={"path": new},
            )
        raise from_status(failure.status, "rename", old)

    def _renamed(self, *messages: wire.Message) -> StatusError | None:
        try:
            self.link().compound(*messages, wire.close())
        except StatusError as error:
            return error
        return None

    def _is_in_use(self, failure: StatusError | None, path: str) -> bool:
        """Whether a rename failed because somebody reads the file that it would replace; Windows
        and Samba call that a denied access."""
        return (
            failure is not None
            and failure.step > 0
            and failure.status in (status.ACCESS_DENIED, status.SHARING_VIOLATION)
            and self._is_kind(path, directory=False)
        )

    def _is_kind(self, path: str, *, directory: bool) -> bool:
        try:
            found = self._look(path)
        except StatusError:
            return False
        return not found.is_link and found.is_dir is directory

    def unlink(self, path: str) -> None:
        """Durable on return."""
        above, _ = split(path)
        self.remove(path)
        self.sync_directory(above)

    def rmdir(self, path: str) -> None:
        above, _ = split(path)
        self.remove(path, _DIRECTORY, "rmdir")
        self.sync_directory(above)

    def remove(self, path: str, options: Options = _FILE, doing: str = "unlink") -> None:
        message = self.creation(path, Access.DELETE, options=options)
        with self.translated(doing, path):
            self.link().compound(message, wire.set_deleted(), wire.close())

    def clear(self, path: str) -> list[str]:
        """Unlink all that is no directory right in ``path``; the paths of its directories."""
        below: list[str] = []
        for item in self.items(path):
            full = paths.join(path, item.name)
            if item.is_dir:
                below.append(full)
                continue
            try:
                self.remove(full, _ANYTHING)
            except NotFound as error:
                if error.code != "ENOENT":
                    raise
        return below


class _Gone(StatusError):
    """The directory itself is missing."""


def let_go(link: Link, file_id: bytes) -> None:
    """Close a handle; what cannot be closed was closed with its connection."""
    with contextlib.suppress(StatusError, Unreachable):
        link.call(wire.close(file_id))


def read_into(link: Link, file_id: bytes, offset: int, buffer: memoryview, size: int) -> int:
    """Fill ``buffer`` in requests of ``size`` bytes, several on their way at once; fewer bytes
    only at the end of the file.  Raises :class:`StatusError`."""
    filled = 0
    while filled < len(buffer):
        count = _read_once(link, file_id, offset + filled, buffer[filled:], size)
        filled += count
        if count == 0:
            break
    return filled


def _read_once(link: Link, file_id: bytes, offset: int, buffer: memoryview, size: int) -> int:
    """Bytes up to the first gap: a server may answer with less than was asked for."""
    length = min(size, link.max_read)
    asked: deque[tuple[int, int, Pending]] = deque()
    start, ending = 0, len(buffer)
    failure: StatusError | None = None
    while asked or start < min(ending, len(buffer)):
        if start < ending and len(asked) < _ON_THEIR_WAY and failure is None:
            wanted = min(length, len(buffer) - start)
            message = wire.read(offset + start, wanted, file_id)
            asked.append((start, wanted, link.start(message)[0]))
            start += wanted
            continue
        if not asked:
            break
        begin, wanted, request = asked.popleft()
        try:
            data = wire.parse_data(link.finish(request))
        except StatusError as error:
            if error.status == status.END_OF_FILE:
                ending = min(ending, begin)
            else:
                failure = failure or error
            continue
        if len(data) > wanted:
            raise ValueError("more bytes than were asked for")
        if len(data) < wanted:
            ending = min(ending, begin + len(data))
        buffer[begin : begin + len(data)] = data
    if failure is not None:
        raise failure
    return ending


def write_all(link: Link, file_id: bytes, offset: int, data: memoryview, size: int) -> None:
    """Write ``data`` in requests of ``size`` bytes, several on their way at once.

    Raises :class:`StatusError`; then any part of it may be written.
    """
    length = min(size, link.max_write)
    sent: deque[tuple[int, Pending]] = deque()
    start = 0
    failure: StatusError | None = None
    while sent or (start < len(data) and failure is None):
        if start < len(data) and len(sent) < _ON_THEIR_WAY and failure is None:
            part = data[start : start + length]
            sent.append((len(part), link.start(wire.write(offset + start, part, file_id))[0]))
            start += len(part)
            continue
        wanted, request = sent.popleft()
        try:
            written = wire.parse_written(link.finish(request))
        except StatusError as error:
            failure = failure or error
            continue
        if written != wanted:
            raise ValueError(f"{written} of {wanted} bytes were written")
    if failure is not None:
        raise failure


def _file_stat(created: wire.Created) -> FileStat:
    is_dir = created.is_dir and not created.is_link
    return FileStat(created.size, wire.to_seconds(created.modified), is_dir)
