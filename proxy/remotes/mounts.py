"""The mounts of this process: each made once, shared by all remotes that need it, and undone.

One mount serves all remotes whose server, path, type, options and credentials are equal, whatever
their id; a record with another of these gets another mount at once.  Its directory is the
remote's id where that is free, as Xen Orchestra does, so what an earlier daemon left there is
found: it is unmounted, or where somebody else still uses it and it is the same, shared.

Whoever uses a mount holds a directory of it open (:class:`proxy.remotes.posix.Root`), which
keeps everybody's plain ``umount`` from succeeding: another daemon on the same mounts directory
cannot take ours away, nor we theirs.  The one that leaves last succeeds.

Every step on a server runs in a helper process under a deadline; what was achieved is read
from the kernel's table of mounts, never from an exit code.
"""

from __future__ import annotations

import os
import secrets
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import trio

from proxy.errors import Busy, ProxyError, Refused, Unreachable, from_os_error
from proxy.remotes import mountinfo
from proxy.remotes.breaker import Breaker
from proxy.remotes.helper import run_helper
from proxy.remotes.lane import Lane
from proxy.remotes.mount_command import (
    explain,
    is_busy,
    plain_environment,
    probe_error,
    unmount,
)
from proxy.runtime.deadlines import undo_within
from proxy.runtime.threads import Work, in_thread
from proxy.runtime.trouble import tell_trouble

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy.remotes.mount_command import MountRequest
    from proxy.remotes.mountinfo import Mounted

_log = structlog.get_logger("proxy.remotes")

_PROBE = Path(__file__).with_name("mount_probe.py")
_ASK_SECONDS = 4.0
"""For the question whether a remote is back: Xen Orchestra waits 5 s for ``remote.getInfo``."""
_LEAST_PROBE_SECONDS = 5.0
_UNMOUNT_SECONDS = 10.0
_LAZY_SECONDS = 3.0
"""For an unmount where the server is known not to answer, or at the daemon's end."""
_SETTLE_SECONDS = 5.0
"""For threads that close files, before the unmount that they would make busy."""
_HURRIED_SECONDS = 0.5
"""The same where the server is known not to answer."""
_BUSY_WAITS = (0.1, 0.4, 1.0)
_UNDO_SECONDS = 60.0
_SBIN = (Path("/sbin"), Path("/usr/sbin"), Path("/usr/local/sbin"))


@dataclass(frozen=True, slots=True)
class MountOptions:
    """The daemon's settings for mounts; times in seconds."""

    directory: str
    sudo: bool = False
    mount_seconds: float = 45.0
    """For ``mount`` and the probe behind it together, 0 for ever."""
    patience: float = 600.0
    """For one operation on a mounted file, 0 for ever."""
    threads: int = 16


class Mount:
    """One mount in place; for as long as its user holds it."""

    def __init__(self, directory: str, mount_id: int, lane: Lane) -> None:
        self.directory = directory
        self.id = mount_id
        self.lane = lane

    def check(self, descriptor: int) -> None:
        """Raise ``Unreachable`` (``ESTALE``) when an open directory does not lie on this mount.

        It was unmounted since: what is written there would fill the appliance's own disk.
        """
        if mountinfo.mount_id_of(descriptor) != self.id:
            raise Unreachable(
                "ESTALE: the remote was unmounted while it was opened: try again", code="ESTALE"
            )


class _Entry:
    def __init__(self) -> None:
        self.users = 0
        self.turn = trio.Lock()
        self.mount: Mount | None = None
        self.request: MountRequest | None = None


class Mounts:
    """For one event loop: see :func:`mounts`."""

    def __init__(self) -> None:
        self._entries: dict[tuple[object, ...], _Entry] = {}
        self._taken: set[str] = set()
        """Directories of entries, and those that are being tried."""

    async def acquire(
        self, request: MountRequest, remote_id: object, options: MountOptions, *, what: str
    ) -> Mount:
        """The mount for ``request``, made when it is not there; :meth:`release` is due for it.

        ``what`` names it in messages.  On an error and on cancel nothing is left mounted that
        nobody uses.
        """
        key = (options, request.key)
        entry = self._entries.setdefault(key, _Entry())
        entry.users += 1
        try:
            async with entry.turn:
                if entry.mount is not None and not await _is_in_place(entry.mount):
                    _log.warning("a mount has vanished", directory=entry.mount.directory)
                    self._taken.discard(entry.mount.directory)
                    entry.mount = None
                if entry.mount is None:
                    entry.mount = await self._mount(request, remote_id, options, what)
                    entry.request = request
                return entry.mount
        except BaseException:
            await self._leave(key, entry)
            raise

    async def release(self, request: MountRequest, options: MountOptions) -> None:
        """One user of the mount is gone; the last one's leaving unmounts it.

        When that fails the mount stays, which is told: the next user takes it over, and the
        daemon's end tries again.
        """
        key = (options, request.key)
        await self._leave(key, self._entries[key])

    async def _leave(self, key: tuple[object, ...], entry: _Entry) -> None:
        entry.users -= 1
        if entry.users > 0:
            return
        try:
            with undo_within("unmounting", _UNDO_SECONDS):
                async with entry.turn:
                    if entry.users > 0:
                        return
                    options = key[0]
                    assert isinstance(options, MountOptions), "see acquire()"
                    if entry.mount is not None:
                        await _unmount_unused(entry.mount, options)
                        self._taken.discard(entry.mount.directory)
                        entry.mount = None
                    if self._entries.get(key) is entry and entry.users == 0:
                        del self._entries[key]
        except ProxyError as error:
            directory = entry.mount.directory if entry.mount else ""
            tell_trouble("not unmounted", error, directory=directory)

    async def aclose(self) -> None:
        """Unmount what could not be unmounted before, at the daemon's end.

        What hangs is detached (``umount -l``), the last resort: the kernel ends it when nothing
        holds it any more.  What another process uses stays, it is theirs too.
        """
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                for key, entry in list(self._entries.items()):
                    nursery.start_soon(self._finish, key, entry)

    async def _finish(self, key: tuple[object, ...], entry: _Entry) -> None:
        options = key[0]
        assert isinstance(options, MountOptions), "see acquire()"
        mount = entry.mount
        if mount is None:
            return
        hangs = mount.lane.hangs
        if not hangs:
            try:
                if await _unmount(mount.directory, options, seconds=_LAZY_SECONDS):
                    return
            except ProxyError:
                hangs = True
        if not hangs and entry.users == 0:
            _log.info("a mount stays, as others use it", directory=mount.directory)
            return
        try:
            await _unmount(mount.directory, options, seconds=_LAZY_SECONDS, lazy=True)
            _log.warning("detached a mount that hangs", directory=mount.directory)
        except ProxyError as error:
            tell_trouble("not unmounted", error, directory=mount.directory)

    def statistics(self) -> dict[str, dict[str, object]]:
        """By directory."""
        return {
            entry.mount.directory: {"users": entry.users, **entry.mount.lane.statistics()}
            for entry in self._entries.values()
            if entry.mount is not None
        }

    # -- mounting

    async def _mount(
        self, request: MountRequest, remote_id: object, options: MountOptions, what: str
    ) -> Mount:
        above = await in_thread(Work.DISK, _prepare, options.directory)
        for name in request.names(remote_id):
            directory = f"{above}/{name}"
            if directory in self._taken:
                continue
            self._taken.add(directory)
            try:
                mounted = await _mount_at(directory, request, options, what)
            except BaseException:
                self._taken.discard(directory)
                raise
            if mounted is not None:
                return Mount(directory, mounted.id, _lane(directory, request, options, what))
            self._taken.discard(directory)
        raise Busy(
            f"EBUSY: all directories for {what} in {above} are in use by other mounts",
            code="EBUSY",
        )


def _lane(directory: str, request: MountRequest, options: MountOptions, what: str) -> Lane:
    async def ask() -> None:
        seconds = min(_ASK_SECONDS, options.mount_seconds or _ASK_SECONDS)
        await _probe(directory, request, seconds=seconds, what=what)

    return Lane(Breaker(what), ask, patience=options.patience, threads=options.threads)


async def _mount_at(
    directory: str, request: MountRequest, options: MountOptions, what: str
) -> Mounted | None:
    """Mount at ``directory``, or share what is there; ``None`` when it is taken."""
    found = await _seen_at(directory)
    if found is not None:
        return await _clear_stale(directory, found, request, options, what)
    await in_thread(Work.DISK, _make_directory, directory)
    began = trio.current_time()
    try:
        await _run_mount(directory, request, options, what)
        found = await _seen_at(directory)
        if found is None:
            raise Refused(f"EIO: mount ended well, but {what} is not mounted", code="EIO")
        left = options.mount_seconds and max(
            options.mount_seconds - (trio.current_time() - began), _LEAST_PROBE_SECONDS
        )
        await _probe(directory, request, seconds=left, what=what)
    except BaseException:
        # also when the command was killed: it may have been done by then
        await _undo_mount(directory, options)
        raise
    _log.info("mounted", remote=what, directory=directory)
    return found


async def _clear_stale(
    directory: str, found: Mounted, request: MountRequest, options: MountOptions, what: str
) -> Mounted | None:
    """Unmount what an earlier daemon left, and mount anew; share it when it is in use and the
    same.  A mount with credentials is never shared: the kernel does not tell with which."""
    _log.warning("something is mounted already", directory=directory, source=found.source)
    try:
        if await _unmount(directory, options, seconds=_UNMOUNT_SECONDS):
            return await _mount_at(directory, request, options, what)
        if request.credentials or not mountinfo.serves(found, request):
            return None
        await _probe(directory, request, seconds=options.mount_seconds, what=what)
    except Unreachable as error:
        if await _seen_at(directory) is None:
            raise
        _log.warning("an older mount hangs", directory=directory, error=error.message)
        return None
    _log.info("sharing a mount that another process uses", directory=directory)
    return found


async def _run_mount(
    directory: str, request: MountRequest, options: MountOptions, what: str
) -> None:
    answer = await run_helper(
        request.mount(directory, sudo=options.sudo),
        request.environment(os.environ),
        seconds=options.mount_seconds,
        what=f"mounting {what}",
    )
    if answer.code != 0:
        raise explain(
            answer.text, answer.code, request, has_helper=helper_of(request.type) is not None
        )


async def _probe(directory: str, request: MountRequest, *, seconds: float, what: str) -> None:
    """Raise when the mount does not answer, or may not be used."""
    answer = await run_helper(
        [sys.executable, "-I", "-S", str(_PROBE), directory, f".keeper_{secrets.token_hex(8)}"],
        plain_environment(os.environ),
        seconds=seconds,
        what=what,
    )
    number, _, doing = answer.text.strip().partition(" ")
    if number == "ok":
        return
    if not number.isdigit():
        raise Unreachable(f"EIO: {what} could not be checked", code="EIO")
    raise probe_error(int(number), doing, request)


# -- unmounting


async def _undo_mount(directory: str, options: MountOptions) -> None:
    try:
        with undo_within("unmounting", _UNDO_SECONDS):
            if not await _unmount(directory, options, seconds=_UNMOUNT_SECONDS):
                raise Busy(f"EBUSY: {directory} is in use", code="EBUSY")
    except ProxyError as error:
        tell_trouble("not unmounted", error, directory=directory)


async def _unmount_unused(mount: Mount, options: MountOptions) -> None:
    """Raise when it stays mounted."""
    answers = mount.lane.breaker.outage is None
    await mount.lane.wait_idle(_SETTLE_SECONDS if answers else _HURRIED_SECONDS)
    seconds = _UNMOUNT_SECONDS if answers else _LAZY_SECONDS
    for wait in (*_BUSY_WAITS, None):
        if await _unmount(mount.directory, options, seconds=seconds):
            _log.info("unmounted", directory=mount.directory)
            return
        if wait is not None:
            await trio.sleep(wait)
    raise Busy(f"EBUSY: {mount.directory} is in use by another process", code="EBUSY")


async def _unmount(
    directory: str, options: MountOptions, *, seconds: float, lazy: bool = False
) -> bool:
    """Whether nothing is mounted there any more; false when somebody uses it.

    Raises when ``umount`` fails for another reason, or hangs.
    """
    if await _seen_at(directory) is None:
        await in_thread(Work.DISK, _remove_directory, directory)  # where nothing came to be mounted
        return True
    answer = await run_helper(
        unmount(directory, sudo=options.sudo, lazy=lazy),
        plain_environment(os.environ),
        seconds=seconds,
        what=f"unmounting {directory}",
    )
    if await _seen_at(directory) is None:
        await in_thread(Work.DISK, _remove_directory, directory)
        return True
    if answer.code == 0 or is_busy(answer.text):  # 0: another mount lay beneath
        return False
    raise Refused(f"EIO: {answer.text.strip()[:300]}", code="EIO")


# -- looking


async def _is_in_place(mount: Mount) -> bool:
    seen = await _seen_at(mount.directory)
    return seen is not None and seen.id == mount.id


async def _seen_at(directory: str) -> Mounted | None:
    return await in_thread(Work.DISK, mountinfo.mounted_at, directory)


def _prepare(directory: str) -> str:
    """The mounts directory, made when missing, without links, as the kernel tells it."""
    try:
        Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.path.realpath(directory)
    except OSError as error:
        raise from_os_error(error, "preparing the mounts directory", directory) from error


def _make_directory(directory: str) -> None:
    try:
        Path(directory).mkdir(mode=0o700, exist_ok=True)
        if not stat.S_ISDIR(os.lstat(directory).st_mode):  # a link would mount elsewhere
            raise Refused(f"ENOTDIR: {directory} is not a directory", code="ENOTDIR")
    except OSError as error:
        raise from_os_error(error, "preparing the mount", directory) from error


def _remove_directory(directory: str) -> None:
    try:
        Path(directory).rmdir()
    except FileNotFoundError:
        return
    except OSError as error:  # not empty, or mounted again by another daemon
        _log.debug("a mount directory stays", directory=directory, error=str(error))


def helper_of(kind: str, environment: Mapping[str, str] = os.environ) -> Path | None:
    """The program ``mount.<kind>`` that ``mount`` would call."""
    given = [Path(each) for each in environment.get("PATH", "").split(os.pathsep) if each]
    for directory in (*given, *_SBIN):
        candidate = directory / f"mount.{kind}"
        if os.access(candidate, os.X_OK):
            return candidate
    return None


def may_mount(*, sudo: bool) -> bool:
    """Whether this process may ask for mounts, as far as it can know."""
    if sudo:
        return True
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> 21 & 1)  # CAP_SYS_ADMIN
    return False


_mounts: trio.lowlevel.RunVar[Mounts] = trio.lowlevel.RunVar("mounts")


def mounts() -> Mounts:
    """The table of this ``trio.run``: whoever opens remotes shares it."""
    try:
        return _mounts.get()
    except LookupError:
        table = Mounts()
        _mounts.set(table)
        return table
